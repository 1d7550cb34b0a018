"""Precompile: fill the cache before the first call, with as many processes as the machine has processors. Needs no GPU.

Processes, because NVRTC serialises threads (measured: two cells in 15.0 s one after the other, 13.2 s by two threads, 10.2 s by two
processes). They are plain subprocesses rather than multiprocessing's, so that a script may call `precompile` at its top level, and a
process that dies costs one cell and not the pool. The parent itself compiles nothing, and so needs none of the compiler's wheels.
"""

from __future__ import annotations

import json
import logging
import os
import queue
import signal
import subprocess
import sys
import threading
import time
import warnings
from collections.abc import Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor, as_completed
from dataclasses import asdict, dataclass
from typing import Literal, TypeAlias

from . import kernels
from .dispatch import DISPATCH_TABLE, DispatchKey
from .errors import FlashAttnError, InvalidArgument
from .explain import Target, keys_of
from .settings import NO_COMPILE, compile_allowed

State: TypeAlias = Literal["compiled", "disk", "pack", "unsupported", "failed"]


@dataclass(frozen=True)
class PrecompileResult:
    """What became of one cell.

    key: its name. seconds: wall time from asking to having it. state: "compiled" now, found on "disk" or in a "pack", "unsupported" (no
    such kernel) or "failed"; of the last two `error` says why. path: the cache entry. warnings: the cache's, e.g. of a damaged entry.
    """

    key: str
    seconds: float
    state: State
    error: str | None = None
    path: str | None = None
    warnings: tuple[str, ...] = ()

    @property
    def ok(self) -> bool:
        return self.error is None


def precompile(targets: Iterable[Target], jobs: int | None = None) -> Iterator[PrecompileResult]:
    """Compile the cells of `targets` (keys, their names, requests; repetitions count once) into the cache; results come as they are done.

    jobs: processes; default one per processor this process may use, and never more than cells. The work starts with the first result
    asked for; closing the iterator early stops it. A cell that cannot be had is a result like any other, not an exception.
    Raises UnknownKey, at once, for a name that is no key's, InvalidArgument for jobs < 1.
    """
    keys = list(dict.fromkeys(key for target in targets for key in keys_of(target)))
    if jobs is not None and jobs < 1:
        raise InvalidArgument(f"jobs={jobs}: at least one process is needed")
    return _results(keys, jobs or usable_processors())


def usable_processors() -> int:
    """Processors this process may run on."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def _results(keys: list[DispatchKey], jobs: int) -> Iterator[PrecompileResult]:
    supported = []
    for key in keys:
        reasons = DISPATCH_TABLE.why_not(key)
        if reasons:
            yield PrecompileResult(str(key), 0.0, "unsupported", error="; ".join(reasons))
        else:
            supported.append(key)
    if supported:
        yield from _compile_all(supported, min(jobs, len(supported)))


def _compile_all(keys: list[DispatchKey], jobs: int) -> Iterator[PrecompileResult]:
    """Hand the keys to `jobs` workers, each driven by a thread of this process that waits for it."""
    environment = {**os.environ, NO_COMPILE.name: "0" if compile_allowed() else "1"}  # no_compile() of this thread holds there too
    workers = [_Worker(environment) for _ in range(jobs)]
    idle: queue.SimpleQueue[_Worker] = queue.SimpleQueue()
    for worker in workers:
        idle.put(worker)

    def compile_one(key: DispatchKey) -> PrecompileResult:
        worker = idle.get()
        try:
            return worker.compile(str(key))
        finally:
            idle.put(worker)

    try:
        with ThreadPoolExecutor(jobs) as pool:
            futures = [pool.submit(compile_one, key) for key in keys]
            try:
                for future in as_completed(futures):
                    yield future.result()
            finally:
                for future in futures:
                    future.cancel()
                for worker in workers:
                    worker.stop()
    finally:
        for worker in workers:
            worker.close()


class _Worker:
    """A subprocess that compiles one cell at a time: a name goes in as a line, a PrecompileResult comes back as a line of JSON."""

    def __init__(self, environment: dict[str, str]) -> None:
        self._environment = environment
        self._process: subprocess.Popen[str] | None = None
        self._lock = threading.Lock()  # between starting and stopping
        self._stopped = False

    def compile(self, name: str) -> PrecompileResult:
        """Ask for one cell and wait. A worker that died is replaced by the next call."""
        start = time.perf_counter()
        process = self._running()
        line = ""
        if process is not None and process.stdin is not None and process.stdout is not None:
            try:
                print(name, file=process.stdin, flush=True)
                line = process.stdout.readline()
            except OSError:
                line = ""  # it ended before it read the name
        if line.endswith("\n"):
            fields = json.loads(line)
            return PrecompileResult(**{**fields, "warnings": tuple(fields["warnings"])})
        status = None if process is None else process.wait()
        return PrecompileResult(name, time.perf_counter() - start, "failed", error=f"the compiling process ended (exit status {status})")

    def stop(self) -> None:
        """End the process, for good; a `compile` that waits for it in another thread returns."""
        with self._lock:
            self._stopped = True
            if self._process is not None:
                self._process.kill()

    def close(self) -> None:
        """Release the pipes and the process, once no thread uses them any more."""
        if self._process is not None:
            self._process.communicate()

    def _running(self) -> subprocess.Popen[str] | None:
        with self._lock:
            if self._stopped:
                return None
            if self._process is None or self._process.poll() is not None:
                self.close()
                self._process = subprocess.Popen(
                    # The same sys.path as here, however this process came by it, so that both mean the same package.
                    [sys.executable, "-c", _WORKER_PROGRAM, json.dumps(sys.path)],
                    stdin=subprocess.PIPE,
                    stdout=subprocess.PIPE,
                    text=True,
                    env=self._environment,
                )
            return self._process


_WORKER_PROGRAM = f"import json, sys; sys.path[:] = json.loads(sys.argv[1]); from {__name__} import _serve; _serve()"


def _serve() -> None:
    """The worker's side: until stdin ends."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C reaches the whole group; the parent then stops its workers
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)  # whatever else prints, prints to stderr
    logging.getLogger("cutlass_fa").setLevel(logging.ERROR)  # the result says what a slow compile's log line would
    for line in sys.stdin:
        print(json.dumps(asdict(_compile_here(DispatchKey.parse(line.strip())))), file=answers, flush=True)


def _compile_here(key: DispatchKey) -> PrecompileResult:
    start = time.perf_counter()
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        try:
            kernel = kernels.get(key)
        except FlashAttnError as error:
            kernel, message = None, str(error)
    seconds = time.perf_counter() - start
    told = tuple(str(warning.message) for warning in caught)
    if kernel is None:
        return PrecompileResult(str(key), seconds, "failed", error=message, warnings=told)
    if kernel.path is None:
        return PrecompileResult(str(key), seconds, "failed", error="compiled, but the cache directory cannot be written", warnings=told)
    return PrecompileResult(str(key), seconds, kernel.origin, path=str(kernel.path), warnings=told)
