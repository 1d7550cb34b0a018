"""Source -> program: one generated translation unit, unchanged, compiled by the host's C++ compiler against the executor's headers."""

from __future__ import annotations

import hashlib
import os
import re
import shutil
import subprocess
import tempfile
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path

from ..render import Source, include_dir
from .faults import ExecutorError, HostCompileError

EXECUTOR_DIR = Path(__file__).parent
RUNTIME_SOURCES = tuple(sorted((EXECUTOR_DIR / "runtime").glob("*.cpp")))

_COMMON_FLAGS = ("-g1", "-march=native", "-pipe", "-Wall", "-Wextra")
_RUNTIME_FLAGS = ("-std=gnu++20", "-O3", *_COMMON_FLAGS)
# CUDA C++ allows what -fno-strict-aliasing does. Locals start as a pattern, and an array index out of bounds traps: both are faults that a
# GPU would not show.
_KERNEL_FLAGS = (
    "-std=gnu++17",
    "-O2",
    *_COMMON_FLAGS,
    "-Wno-unknown-pragmas",
    "-Wno-unused-parameter",
    "-Wno-unused-function",
    "-Wno-missing-field-initializers",
    "-fno-strict-aliasing",
    "-ftrivial-auto-var-init=pattern",
    "-fsanitize=bounds",
    "-fsanitize-undefined-trap-on-error",
    "-fsanitize=thread",  # a call before each load and store, which runtime/plain.cpp answers
    "--param=tsan-instrument-func-entry-exit=0",
)


def compiler_problem() -> str | None:
    """Why nothing can be built here, or None. The compiler is $CXX, by default g++."""
    compiler = _compiler()
    if shutil.which(compiler) is None:
        return f"no host C++ compiler: {compiler} is not found; install g++ 12 or later, or set CXX"
    return None


@dataclass(frozen=True)
class Program:
    """A kernel built for the CPU: the executable, and the Source it came from."""

    source: Source
    path: Path


class ExecutorKernel:
    """Builds programs; `build` is all there is to call."""

    @staticmethod
    def build(source: Source, directory: Path | None = None) -> Program:
        """Compile `source`, or find it compiled in `directory` (default: one temporary directory per process). Safe between processes.

        Raises ExecutorError without a compiler, HostCompileError when it refuses the text.
        """
        directory = _process_directory() if directory is None else directory
        directory.mkdir(parents=True, exist_ok=True)
        runtime = _runtime_object(directory)
        name = f"{source.name}-{_digest(source.text, source.entry, *_KERNEL_FLAGS, _headers_text(), runtime.name)}"
        program = directory / name
        if not program.exists():
            _compile_kernel(source, runtime, program)
        return Program(source, program)


def _compile_kernel(source: Source, runtime: Path, program: Path) -> None:
    with tempfile.TemporaryDirectory(dir=program.parent) as scratch:
        unit = Path(scratch) / f"{source.name}.cu"
        unit.write_text(source.text)
        driver = Path(scratch) / "driver.cpp"
        entry = f"CUTLASS_FA_EXECUTOR_ENTRY({source.entry}, {_cluster_dims(source)})"
        driver.write_text(f'#include "{unit.name}"\n#include <cutlass_fa_executor/entry.hpp>\n{entry}\n')
        made = Path(scratch) / "program"
        # The file's own directory is left out of reports: the compiler runs inside it.
        unit_object = f"{driver.stem}.o"
        _run([_compiler(), *_KERNEL_FLAGS, *_include_flags(), "-c", driver.name, "-o", unit_object], source.name, scratch)
        _run([_compiler(), unit_object, str(runtime), "-no-pie", "-o", made.name], source.name, scratch)
        made.replace(program)


def _cluster_dims(source: Source) -> str:
    """What the entry's __cluster_dims__ says, an expression of the text; "1" where it has none."""
    code = re.sub(r"//[^\n]*", "", source.text)
    match = re.search(rf"__cluster_dims__\(([^()]*)\)[^;{{}}]*\b{source.entry}\(", code)
    return match[1] if match else "1"


def _include_flags() -> list[str]:
    """The executor's twins come first; a header without a twin is plain C++ and taken from the device's own."""
    return ["-I", str(EXECUTOR_DIR / "include"), "-I", str(include_dir())]


def _runtime_object(directory: Path) -> Path:
    """The runtime, compiled once per directory; all its files as one, which takes 4 s of a processor where one by one they take 10."""
    headers = "".join(path.read_text() for path in sorted((EXECUTOR_DIR / "runtime").glob("*.hpp")))
    digest = _digest(headers, *(path.read_text() for path in RUNTIME_SOURCES), *_RUNTIME_FLAGS, _headers_text())
    runtime = directory / f"runtime-{digest}.o"
    if not runtime.exists():
        with tempfile.TemporaryDirectory(dir=directory) as scratch:
            unit, made = Path(scratch) / "runtime.cpp", Path(scratch) / "runtime.o"
            unit.write_text("".join(f'#include "{path}"\n' for path in RUNTIME_SOURCES))
            command = [_compiler(), *_RUNTIME_FLAGS, *_include_flags(), "-c", unit.name, "-o", made.name]
            _run(command, "the executor's runtime", scratch)
            made.replace(runtime)
    return runtime


def _run(command: list[str], what: str, directory: str) -> None:
    problem = compiler_problem()
    if problem is not None:
        raise ExecutorError(problem)
    done = subprocess.run(command, cwd=directory, capture_output=True, text=True)
    if done.returncode != 0:
        raise HostCompileError(f"{command[0]} refused {what}:\n{done.stderr}", done.stderr)


def _compiler() -> str:
    return os.environ.get("CXX", "g++")


def _digest(*parts: str) -> str:
    hasher = hashlib.sha256()
    for part in (*parts, _compiler_identity()):
        hasher.update(part.encode() + b"\0")
    return hasher.hexdigest()[:16]


@lru_cache(maxsize=1)
def _headers_text() -> str:
    directories = (EXECUTOR_DIR / "include", include_dir())
    return "".join(path.read_text() for directory in directories for path in sorted(directory.rglob("*")) if path.is_file())


@lru_cache(maxsize=1)
def _compiler_identity() -> str:
    """The compiler and the processor that -march=native means, so that a shared directory never serves code for another machine."""
    try:
        version = subprocess.run([_compiler(), "-march=native", "-Q", "--help=target", "--version"], capture_output=True, text=True).stdout
    except OSError:
        version = ""
    return version


@lru_cache(maxsize=1)
def _process_directory() -> Path:
    holder = tempfile.TemporaryDirectory(prefix="cutlass-fa-executor-")
    _holders.append(holder)
    return Path(holder.name)


_holders: list[tempfile.TemporaryDirectory[str]] = []  # removed when the process ends
