"""Small kernels (tests/primitives/*.cu) on the CPU executor."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from cutlass_fa.executor import ExecutorKernel, GlobalMemory, Program, launch
from cutlass_fa.render import Source

PRIMITIVES = Path(__file__).parent / "primitives"


@dataclass(frozen=True)
class SmallKernel:
    """One file of tests/primitives, whose only kernel has the file's name."""

    name: str
    threads: int
    smem_bytes: int
    grid: int = 1

    def source(self, arch: str, constants: Mapping[str, object]) -> Source:
        """Its text with other values for some of its constants (`constexpr ... name = value;`)."""
        text = (PRIMITIVES / f"{self.name}.cu").read_text()
        for name, value in constants.items():
            pattern = rf"(constexpr [\w ]*\b{name}|using {name}) = [^;]*;"
            text, count = re.subn(pattern, rf"\g<1> = {value};", text)
            assert count == 1, f"{self.name}.cu has no constant {name}"
        return Source(self.name, arch, self.name, text, self.smem_bytes, self.threads)

    def build(self, **constants: object) -> Program:
        """Compile it for the executor, with other values for some of its constants."""
        return ExecutorKernel.build(self.source("sm_90a", constants))


def run(
    program: Program, memory: GlobalMemory, arguments: Sequence[bytes], *, grid: int = 1, seed: int = 0, time_limit_s: int = 20
) -> None:
    """`grid` CTAs."""
    launch(program, grid, arguments, memory, seed=seed, time_limit_s=time_limit_s)


def words(*values: int | np.ndarray) -> bytes:
    """A Params struct: 64-bit addresses first, then 32-bit numbers given as int32 arrays."""
    fields = (value.astype(np.int32).tobytes() if isinstance(value, np.ndarray) else value.to_bytes(8, "little") for value in values)
    packed = b"".join(fields)
    return packed.ljust(-(-len(packed) // 8) * 8, b"\0")
