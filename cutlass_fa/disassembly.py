"""What a cubin's machine code consists of: instructions counted by kind, through NVIDIA's disassembler. Needs no GPU."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import tempfile
from collections import Counter
from functools import lru_cache
from pathlib import Path

from .errors import FlashAttnError
from .toolchain import package_dirs

# `        /*0070*/              @!P0 HGMMA.64x128x16.F32.BF16 R24, gdesc[UR8], R24, !UPT ;`
_INSTRUCTION = re.compile(r"/\*[0-9a-f]{4,}\*/\s+\{?\s*(?:@!?U?P\w+\s+)?(?P<opcode>[A-Z][A-Z0-9_]*(?:\.[A-Za-z0-9_]+)*)", re.ASCII)


def instruction_counts(image: bytes) -> dict[str, int]:
    """How often each instruction stands in the cubin, by its name without modifiers ("HGMMA", "FFMA", "LDL"), most frequent first.

    Counts lines of code, not executions. Raises FlashAttnError as `disassemble` does.
    """
    counts: Counter[str] = Counter()
    for opcode, count in _opcodes(image).items():
        counts[opcode.partition(".")[0]] += count
    return dict(counts.most_common())


def tensor_core_instructions(image: bytes) -> dict[str, int]:
    """Matrix instructions with shape and types, e.g. {"HGMMA.64x128x16.F32.BF16": 16}: HGMMA, QGMMA, HMMA, IMMA and the like."""
    return {opcode: count for opcode, count in _opcodes(image).most_common() if opcode.partition(".")[0].endswith("MMA")}


def local_memory_instructions(image: bytes) -> int:
    """Loads from and stores to local memory (LDL and STL): register spills, or arrays indexed at run time."""
    counts = instruction_counts(image)
    return counts.get("LDL", 0) + counts.get("STL", 0)


def disassemble(image: bytes) -> str:
    """The cubin's code as nvdisasm prints it. Raises FlashAttnError where nvdisasm is missing or refuses the image."""
    tool = find_nvdisasm()
    with tempfile.TemporaryDirectory(prefix="cutlass_fa-") as directory:
        path = Path(directory) / "kernel.cubin"
        path.write_bytes(image)
        done = subprocess.run([str(tool), "--print-code", str(path)], capture_output=True, text=True, check=False)
    if done.returncode != 0:
        raise FlashAttnError(f"{tool} refused the cubin of {len(image)} bytes: {(done.stderr or done.stdout).strip()}")
    return done.stdout


def find_nvdisasm() -> Path:
    """nvdisasm of a wheel (nvidia/*/bin on sys.path), else on PATH. Raises FlashAttnError naming the wheel."""
    for directory in package_dirs("nvidia"):
        for path in sorted(directory.glob("*/bin/nvdisasm*"), reverse=True):  # of several the newest, which reads every older cubin
            if os.access(path, os.X_OK):
                return path
    on_path = shutil.which("nvdisasm")
    if on_path is None:
        raise FlashAttnError("disassembling needs nvdisasm, which is in no wheel here nor on PATH: pip install nvidia-cuda-nvdisasm")
    return Path(on_path)


@lru_cache(maxsize=8)
def _opcodes(image: bytes) -> Counter[str]:
    return Counter(match["opcode"] for match in map(_INSTRUCTION.search, disassemble(image).splitlines()) if match)
