"""DispatchKey -> Kernel: memory, then disk, then packs, then a compile. The only road from a key to a cubin."""

from __future__ import annotations

import logging
import threading
import time
from dataclasses import dataclass
from pathlib import Path

from .cache import SOURCE_FILE, Hit, Origin, discard_damaged, entry_lock, lookup, publish
from .cell import Cell
from .compile import Cubin, announce, compile_source, content_key
from .dispatch import DispatchKey
from .errors import CompileDisabled, CompileError
from .render import Source, render
from .rendered import recall, remember
from .settings import cache_dir, compile_allowed
from .toolchain import find_toolchain

_logger = logging.getLogger("cutlass_fa")
_kernels: dict[DispatchKey, Kernel] = {}
_locks: dict[DispatchKey, threading.Lock] = {}


@dataclass(frozen=True, eq=False)
class Kernel:
    """A cell ready to be loaded. One object per key and process, so identity is equality.

    path: the entry's directory in the cache or a pack, None where the kernel is in memory only.
    origin: how this process came by it: "disk", "pack" or "compiled".
    """

    key: DispatchKey
    cell: Cell
    source: Source
    cubin: Cubin
    path: Path | None
    origin: Origin


def get(key: DispatchKey) -> Kernel:
    """The kernel of `key`, compiled if need be; safe to call from several threads and processes, which then compile once between them.

    Raises UnsupportedCell where no kernel serves the key, CompileDisabled where it would have to be compiled and may not be, CompileError
    where NVRTC refuses it or a wheel is missing. A failure is not remembered.
    """
    kernel = _kernels.get(key)
    if kernel is not None:
        return kernel
    with _locks.setdefault(key, threading.Lock()):
        kernel = _kernels.get(key)
        if kernel is None:
            kernel = _kernels[key] = load_or_compile(Cell.of(key))
    return kernel


def is_loaded(key: DispatchKey) -> bool:
    """Whether `get(key)` would be answered from memory."""
    return key in _kernels


def forget() -> None:
    """Drop every kernel from memory; the disk cache stays."""
    _kernels.clear()


def load_or_compile(cell: Cell) -> Kernel:
    """The kernel of a cell, in the tables or not (a sweep tries others), from disk, from a pack or from NVRTC. Raises as `get` does."""
    start = time.perf_counter()
    recalled = recall(cell)
    source = recalled or render(cell)  # needed to find the kernel too: the text is part of its content key
    how = "rendered" if recalled is None else "recalled"
    _logger.debug("cutlass_fa: %s %s in %.1f ms", how, source.name, 1e3 * (time.perf_counter() - start))
    hit = obtain(source)
    if recalled is None and hit.path is not None:
        remember(cell, source, hit.path)
    return Kernel(cell.key, cell, source, hit.cubin, hit.path, hit.origin)


def obtain(source: Source) -> Hit:
    """The cubin of a translation unit, from disk, from a pack or from NVRTC. Raises as `get` does.

    Without the compiler's wheels an entry made from the same text, headers and options serves, whatever versions made it.
    """
    missing = None
    try:
        toolchain = find_toolchain()
    except CompileError as error:
        toolchain, missing = None, error
    key = content_key(source, toolchain)
    found = lookup(key)
    if found.hit is not None and not found.damaged:
        return found.hit
    if toolchain is None or not compile_allowed():
        if found.hit is not None:
            return found.hit
        raise missing if missing is not None and compile_allowed() else _disabled(source, found.damaged)
    with entry_lock(key):
        found = lookup(key)  # another process may have compiled or repaired it in the meantime
        discard_damaged(found.damaged)
        if found.hit is not None:
            return found.hit
        cubin = compile_source(source, str(cache_dir() / key.entry_name / SOURCE_FILE), toolchain)
        hit = publish(key, source, cubin)
    announce(source.name, cubin.compile_seconds, hit.path)
    return hit


def _disabled(source: Source, damaged: tuple[tuple[Path, str], ...]) -> CompileDisabled:
    notes = "".join(f" ({path} is damaged: {reason})" for path, reason in damaged)
    return CompileDisabled(
        f"{source.name} is in no cache{notes} and compiling is switched off. Compile it beforehand: cutlass-fa precompile {source.name}"
    )
