"""Explain: what a key or a request becomes on the machine, read off the cell, the compiled kernel and its machine code. Needs no GPU."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any, ClassVar, Literal, Protocol, TypeAlias

from . import kernels
from .arch.limits import table_arch
from .cache import IMAGE_FILE, SOURCE_FILE
from .disassembly import tensor_core_instructions
from .dispatch import DISPATCH_TABLE, DispatchKey
from .errors import FlashAttnError

CacheState: TypeAlias = Literal["memory", "disk", "pack", "compiled"]


class Request(Protocol):
    """Any request of requests.py: it knows its key."""

    def dispatch_key(self) -> DispatchKey: ...


Target: TypeAlias = "DispatchKey | Request | str"


def key_of(target: Target) -> DispatchKey:
    """The key of a request, of a key's name, or of a key. Raises UnknownKey for a name that is none, TypeError for anything else."""
    if isinstance(target, DispatchKey):
        return target
    if isinstance(target, str):
        return DispatchKey.parse(target)
    if hasattr(target, "dispatch_key"):
        return target.dispatch_key()
    raise TypeError(f"{target!r} is a {type(target).__name__}: expected a DispatchKey, a request or a key's name")


def keys_of(target: Target) -> tuple[DispatchKey, ...]:
    """Every key that a call needs: of a request for a backward those of its several kernels, else the one of key_of. Raises as it does."""
    return target.dispatch_keys() if hasattr(target, "dispatch_keys") else (key_of(target),)


@dataclass(frozen=True)
class Explanation:
    """One compiled kernel.

    key: the cell's name. arch: NVRTC's name of the target.
    tile_m, tile_n: query rows and keys of a tile. stages: key blocks in flight. threads: of a CTA.
    registers: per thread at launch. spill_bytes: per thread; -1 for either where the compiler did not say.
    smem_bytes: dynamic shared memory of a CTA; static_smem_bytes: what comes on top.
    tensor_core_instructions: lines of machine code by kind, e.g. {"HGMMA.64x128x16.F32.BF16": 48}; None where no disassembler is
        installed, tensor_core_instructions_missing then says why.
    cubin_bytes: the image the driver loads; cubin_stored_bytes: as the cache stores it, None where it is in memory only.
    compile_seconds: wall time in NVRTC when it was compiled, which need not be now. compiler_warnings: lines of its output that warn.
    cache_state: where the kernel came from this time. cache_path, tu_path: its entry and the translation unit in it, None without one.
    nvrtc_version, cutlass_version: what compiled it. notes: remarks on how the key was chosen.
    """

    supported: ClassVar[bool] = True

    key: str
    arch: str
    tile_m: int
    tile_n: int
    stages: int
    threads: int
    registers: int
    spill_bytes: int
    smem_bytes: int
    static_smem_bytes: int
    tensor_core_instructions: dict[str, int] | None
    tensor_core_instructions_missing: str | None
    cubin_bytes: int
    cubin_stored_bytes: int | None
    compile_seconds: float
    compiler_warnings: tuple[str, ...]
    cache_state: CacheState
    cache_path: str | None
    tu_path: str | None
    nvrtc_version: str
    cutlass_version: str
    notes: tuple[str, ...] = ()

    def as_dict(self) -> dict[str, Any]:
        """Everything above and "supported", in types that JSON has."""
        return _plain(self)


@dataclass(frozen=True)
class Refusal:
    """A combination without a kernel, and every reason why. notes as in Explanation."""

    supported: ClassVar[bool] = False

    key: str
    reasons: tuple[str, ...]
    notes: tuple[str, ...] = ()

    def as_dict(self) -> dict[str, Any]:
        """Everything above and "supported", in types that JSON has."""
        return _plain(self)


def _plain(report: Explanation | Refusal) -> dict[str, Any]:
    values = {name: list(value) if isinstance(value, tuple) else value for name, value in asdict(report).items()}
    return {"key": values.pop("key"), "supported": report.supported, **values}


def explain(target: Target, notes: Sequence[str] = ()) -> Explanation | Refusal:
    """What `target` (a key, its name, or a request) becomes: compiles it if need be; the GPU is not asked for.

    A combination without a kernel gives a Refusal. Raises UnknownKey for a name that is no key's, CompileError where NVRTC refuses the
    kernel or is not installed, CompileDisabled where it would have to be compiled and may not be.
    """
    key = key_of(target)
    notes = (*notes, *rounding_notes(getattr(target, "head_dim", key.head_dim), key), *choice_notes(key))
    if len(keys_of(target)) > 1:
        notes = (*notes, "the call launches " + ", ".join(map(str, keys_of(target))))
    reasons = DISPATCH_TABLE.why_not(key)
    if reasons:
        return Refusal(str(key), tuple(reasons), notes)
    in_memory = kernels.is_loaded(key)
    kernel = kernels.get(key)
    cell, cubin = kernel.cell, kernel.cubin
    path = kernel.path if kernel.path is not None and (kernel.path / IMAGE_FILE).is_file() else None  # it may have been cleared since
    instructions, missing = _matrix_instructions(cubin.image)
    return Explanation(
        key=cell.name,
        arch=cell.arch,
        tile_m=cell.tile_m,
        tile_n=cell.tile_n,
        stages=cell.stages,
        threads=cell.threads,
        registers=cubin.registers,
        spill_bytes=cubin.spill_bytes,
        smem_bytes=cell.smem_bytes,
        static_smem_bytes=cubin.static_smem_bytes,
        tensor_core_instructions=instructions,
        tensor_core_instructions_missing=missing,
        cubin_bytes=len(cubin.image),
        cubin_stored_bytes=None if path is None else (path / IMAGE_FILE).stat().st_size,
        compile_seconds=round(cubin.compile_seconds, 3),
        compiler_warnings=cubin.warnings,
        cache_state="memory" if in_memory else kernel.origin,
        cache_path=None if path is None else str(path),
        tu_path=None if path is None else str(path / SOURCE_FILE),
        nvrtc_version=cubin.nvrtc_version,
        cutlass_version=cubin.cutlass_version,
        notes=notes,
    )


def rounding_notes(head_dim: int, key: DispatchKey) -> tuple[str, ...]:
    """A remark where `key` is the cell of more columns than `head_dim`; nothing where they agree."""
    if head_dim == key.head_dim:
        return ()
    return (f"head_dim {head_dim} runs in the cell of head_dim {key.head_dim}; the columns beyond it are read as zeros and never stored",)


def choice_notes(key: DispatchKey) -> tuple[str, ...]:
    """Remarks on what was chosen for the key's GPU: a table of an older one, a family that is not the GPU's own, packed heads."""
    notes = []
    table = table_arch(key.arch)
    if table != key.arch:
        notes.append(
            f"there is no table for {key.arch}: it runs the newest kernels of sm_80's instructions, compiled for it, in {table}'s tiles"
        )
    if key.family == "fa2" and key.arch == "sm_90a" and key.direction == "fwd":
        why = "which has dropout" if key.dropout else "as asked"
        notes.append(f"a forward of family fa2 on sm_90a, {why}; without dropout family fa3 serves calls there")
    if key.gqa_ratio > 1:
        notes.append(
            f"queries are few: the {key.gqa_ratio} query heads of a key head share a tile, whose keys are loaded once for all of them"
        )
    if key.split and key.direction == "fwd":
        notes.append(
            "CTAs share the keys of a sequence, each an equal part of all work (num_splits: of equal parts of each sequence); "
            "the one that brings the last part of a tile adds them up, in the same launch"
        )
    return tuple(notes)


def _matrix_instructions(image: bytes) -> tuple[dict[str, int] | None, str | None]:
    """Counts by kind, or the reason why they cannot be had."""
    try:
        return tensor_core_instructions(image), None
    except FlashAttnError as error:
        return None, str(error)
