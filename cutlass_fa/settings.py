"""The environment variables, in one place, read at each use; and `no_compile()`, the same switch for one block of code.

`SETTINGS` is the table that README and `cutlass-fa --help` print.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass
from pathlib import Path


@dataclass(frozen=True)
class Setting:
    """One environment variable: its name, what holds when it is unset or empty, and what it does."""

    name: str
    default: str
    meaning: str


CACHE_DIR = Setting(
    "CUTLASS_FA_CACHE_DIR",
    "$XDG_CACHE_HOME/cutlass_fa, else ~/.cache/cutlass_fa",
    "directory of the compiled kernels; created at the first compile",
)
PACK_DIRS = Setting(
    "CUTLASS_FA_PACK_DIRS",
    "none",
    f"read-only directories of prebuilt kernels, searched after the cache directory, separated by {os.pathsep!r}",
)
NO_COMPILE = Setting(
    "CUTLASS_FA_NO_COMPILE",
    "0",
    "1: a kernel that is in no cache is an error (CompileDisabled) instead of a compile",
)
SETTINGS: tuple[Setting, ...] = (CACHE_DIR, PACK_DIRS, NO_COMPILE)

_FALSE_WORDS = ("", "0", "false", "no", "off")
_no_compile: ContextVar[bool] = ContextVar("cutlass_fa_no_compile", default=False)


def cache_dir() -> Path:
    """The directory of compiled kernels; need not exist."""
    chosen = os.environ.get(CACHE_DIR.name, "")
    if chosen:
        return Path(os.path.abspath(os.path.expanduser(chosen)))
    xdg = os.environ.get("XDG_CACHE_HOME", "")
    if os.path.isabs(xdg):  # the XDG specification has relative values ignored
        return Path(xdg) / "cutlass_fa"
    home = os.path.expanduser("~")
    # A user id without a home gets a place that can never be written: cache.py then keeps kernels in memory and says so once.
    # A shared temporary directory is no substitute, since another user could have put kernels there.
    return Path(home if home != "~" else os.devnull) / ".cache" / "cutlass_fa"


def pack_dirs() -> tuple[Path, ...]:
    """The read-only directories of prebuilt kernels, in search order."""
    listed = os.environ.get(PACK_DIRS.name, "").split(os.pathsep)
    return tuple(Path(os.path.abspath(os.path.expanduser(entry))) for entry in listed if entry)


@contextmanager
def no_compile() -> Iterator[None]:
    """Within the block a kernel that is in no cache raises CompileDisabled instead of being compiled.

    Nests, and holds for the calling thread (or asyncio task) alone: other threads, those started inside the block included, go by
    CUTLASS_FA_NO_COMPILE.
    """
    token = _no_compile.set(True)
    try:
        yield
    finally:
        _no_compile.reset(token)


def compile_allowed() -> bool:
    """False inside `no_compile()` and where CUTLASS_FA_NO_COMPILE is set to anything but 0, false, no or off."""
    return not _no_compile.get() and os.environ.get(NO_COMPILE.name, "").strip().lower() in _FALSE_WORDS
