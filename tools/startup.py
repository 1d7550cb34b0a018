"""What a program waits for before its first result: imports, compiles, the first call.

    python tools/startup.py [--output benchmarks/startup.json] [options]

Three measurements. Import: seconds of `from cutlass_fa import flash_attn_func` in fresh
processes (`import cutlass_fa` alone loads nothing). Compile: seconds of every golden cell, one after the other in
this process, into an empty cache, NVRTC loaded beforehand. First call, where a GPU is: a fresh process from its start to the result of one
causal bf16 call (batch 1, seqlen 1024, 16 heads, head_dim 128), with an empty cache and with one that holds the kernel, on CuPy arrays and
on PyTorch's. Python's byte code and the file system's cache are warm throughout (a run that does not count goes first), and this process
keeps the driver loaded, as persistence mode does.
"""

from __future__ import annotations

import argparse
import importlib.metadata
import importlib.util
import json
import logging
import os
import platform
import statistics
import subprocess
import sys
import time
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from datetime import datetime, timezone
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))  # this checkout's package, whatever is installed

import cutlass_fa
from cutlass_fa.cell import Cell
from cutlass_fa.demo import launch_problem
from cutlass_fa.dispatch import DISPATCH_TABLE, DispatchKey
from cutlass_fa.errors import CompileError, FlashAttnError
from cutlass_fa.kernels import obtain
from cutlass_fa.precompile import usable_processors
from cutlass_fa.render import render
from cutlass_fa.settings import CACHE_DIR, NO_COMPILE, PACK_DIRS
from cutlass_fa.toolchain import compile_options, nvrtc_compile
from tools.bench import REPOSITORY, commit_of, driver_version
from tools.bench_device import CupyDevice
from tools.bench_report import OWN_PEER, aligned

# Seconds: of the import, and of the first call from process start to result on a machine of 16 cores; PACKAGE is this package's part of
# the latter with a warm cache.
IMPORT_BUDGET = 0.4
COLD_BUDGET = 2.5
WARM_BUDGET = 1.0
PACKAGE_BUDGET = 0.2

NO_GPU = "no GPU"
LIBRARIES = ("cupy", "torch")
START_TO_RESULT = "start to result"
PACKAGE = "of which this package"
WHOLE_PROCESS = "whole process"
PACKAGE_STEPS = ("import cutlass_fa", "first call")

# argv: "numpy" to import it before the clock starts.
_IMPORT_PROGRAM = """
import sys, time
if sys.argv[1:]:
    import numpy
start = time.perf_counter()
from cutlass_fa import flash_attn_func
print(time.perf_counter() - start)
"""

# argv: the array library. Prints, as JSON, each step's name and the clock at its end. CuPy and the CUDA context are had before the first
# call, on both libraries' arrays, so that neither is counted as this package's time.
FIRST_CALL_PROGRAM = """
import json, sys, time
marks = [("interpreter", time.perf_counter())]
def mark(step):
    marks.append((step, time.perf_counter()))
if sys.argv[1] == "torch":
    import torch
    mark("import torch")
import cupy
mark("import cupy")
import cutlass_fa
mark("import cutlass_fa")
cupy.cuda.runtime.free(0)
mark("CUDA context")
shape = (1, 1024, 16, 128)
if sys.argv[1] == "torch":
    synchronize = torch.cuda.synchronize
    q, k, v = (torch.randn(shape, dtype=torch.bfloat16, device="cuda") for _ in range(3))
else:
    import ml_dtypes, numpy
    synchronize = cupy.cuda.get_current_stream().synchronize
    values = numpy.random.default_rng(0).standard_normal(shape, dtype=numpy.float32).astype(ml_dtypes.bfloat16)
    q, k, v = (cupy.asarray(values.view(numpy.uint16)).view(values.dtype) for _ in range(3))
synchronize()
mark("inputs")
for step in ("first call", "second call"):
    cutlass_fa.flash_attn_func(q, k, v, causal=True)
    synchronize()
    mark(step)
print(json.dumps(marks))
"""


@dataclass(frozen=True)
class ImportTimes:
    """Medians of the import of flash_attn_func in seconds: with all that it imports, and where numpy had been imported before."""

    with_numpy: float
    after_numpy: float
    runs: int


@dataclass(frozen=True)
class CellTime:
    """One golden cell: seconds inside NVRTC, seconds from its key to a published cache entry, bytes of the cubin."""

    cell: str
    nvrtc: float
    total: float
    cubin_bytes: int


@dataclass(frozen=True)
class FirstCall:
    """Medians over `runs` processes: seconds of each step, in order, then the sums. cache: "cold" or "warm"."""

    library: str
    cache: str
    runs: int
    seconds: dict[str, float]


# ---- measuring -----------------------------------------------------------------------------------------------------------------------


@contextmanager
def own_settings(cache_directory: Path) -> Iterator[None]:
    """This package's settings, of this process and those it starts: that cache, no packs, compiling allowed."""
    chosen = {CACHE_DIR.name: str(cache_directory), PACK_DIRS.name: "", NO_COMPILE.name: "0"}
    before = {name: os.environ.get(name) for name in chosen}
    os.environ.update(chosen)
    try:
        yield
    finally:
        for name, value in before.items():
            os.environ.pop(name)
            if value is not None:
                os.environ[name] = value


def run_python(program: str, *arguments: str) -> str:
    """What a fresh interpreter prints that runs `program`, this checkout first on its path. Raises RuntimeError with its stderr."""
    path = os.pathsep.join(filter(None, (str(REPOSITORY), os.environ.get("PYTHONPATH", ""))))
    environment = {**os.environ, "PYTHONPATH": path}
    done = subprocess.run([sys.executable, "-c", program, *arguments], capture_output=True, text=True, env=environment, check=False)
    if done.returncode != 0:
        raise RuntimeError(f"a measured process ended with status {done.returncode}:\n{done.stderr}")
    return done.stdout


def measure_import(runs: int) -> ImportTimes:
    """Both kinds in turn, `runs` processes each."""
    run_python(_IMPORT_PROGRAM)
    with_numpy, after_numpy = [], []
    for _ in range(runs):
        with_numpy.append(float(run_python(_IMPORT_PROGRAM)))
        after_numpy.append(float(run_python(_IMPORT_PROGRAM, "numpy")))
    return ImportTimes(round(statistics.median(with_numpy), 4), round(statistics.median(after_numpy), 4), runs)


def measure_cells(keys: Sequence[DispatchKey]) -> list[CellTime]:
    """Compile each cell into an empty cache. Raises CompileError where the compiler's wheels are missing."""
    nvrtc_compile('extern "C" __global__ void nothing() {}\n', "nothing.cu", compile_options("sm_90a"))
    render(Cell.of(keys[0]))
    times = []
    with TemporaryDirectory() as directory, own_settings(Path(directory)):
        for key in keys:
            start = time.perf_counter()
            cubin = obtain(render(Cell.of(key))).cubin
            times.append(CellTime(str(key), round(cubin.compile_seconds, 4), round(time.perf_counter() - start, 4), len(cubin.image)))
    return times


def measure_first_calls(library: str, runs: int) -> list[FirstCall]:
    """`runs` processes with an empty cache each, then as many with the last one's. Needs a GPU."""
    with TemporaryDirectory() as directory:
        parent = Path(directory)
        first_call_seconds(library, parent / "not counted")
        cold = [first_call_seconds(library, parent / str(run)) for run in range(runs)]
        warm = [first_call_seconds(library, parent / str(runs - 1)) for _ in range(runs)]
    return [FirstCall(library, cache, runs, medians(samples)) for cache, samples in (("cold", cold), ("warm", warm))]


def first_call_seconds(library: str, cache_directory: Path) -> dict[str, float]:
    """Seconds of one process's steps and their sums."""
    with own_settings(cache_directory):
        start = time.perf_counter()  # the system's monotonic clock, so that the process's readings of it may be set beside this one
        printed = run_python(FIRST_CALL_PROGRAM, library)
        end = time.perf_counter()
    return steps(start, json.loads(printed.splitlines()[-1]), end)


def steps(start: float, marks: Iterable[tuple[str, float]], end: float) -> dict[str, float]:
    """Seconds of each step, from clock readings at the steps' ends; then from `start` to the first call's end, this package's part of
    that (its import and that call, which includes the compile of a cold cache), and the time to `end`."""
    seconds, before, result = {}, start, start
    for step, at in marks:
        seconds[step] = at - before
        before = at
        if step == PACKAGE_STEPS[-1]:
            result = at
    package = sum(seconds[step] for step in PACKAGE_STEPS)
    return {**seconds, START_TO_RESULT: result - start, PACKAGE: package, WHOLE_PROCESS: end - start}


def medians(samples: Sequence[dict[str, float]]) -> dict[str, float]:
    """Of each step by itself, in the first sample's order."""
    return {step: round(statistics.median(sample[step] for sample in samples), 4) for step in samples[0]}


# ---- reporting -----------------------------------------------------------------------------------------------------------------------


def import_table(times: ImportTimes) -> list[list[str]]:
    return [
        ["from cutlass_fa import flash_attn_func", "seconds", "budget", ""],
        ["numpy included", f"{times.with_numpy:.3f}", f"{IMPORT_BUDGET}", verdict(times.with_numpy, IMPORT_BUDGET)],
        ["numpy there already", f"{times.after_numpy:.3f}", "", ""],
    ]


def cell_table(times: Sequence[CellTime]) -> list[list[str]]:
    lines = [["cell", "NVRTC s", "total s", "cubin KB"]]
    lines += [[time.cell, f"{time.nvrtc:.2f}", f"{time.total:.2f}", f"{time.cubin_bytes / 1e3:.0f}"] for time in times]
    for name, summary in (("median", statistics.median), ("slowest", max)):
        lines.append([name, f"{summary([time.nvrtc for time in times]):.2f}", f"{summary([time.total for time in times]):.2f}", ""])
    return lines


def first_call_table(calls: Sequence[FirstCall]) -> list[list[str]]:
    """A line for each step, a column for each library and cache; then what the budgets say."""
    names = dict.fromkeys(name for call in sorted(calls, key=lambda call: -len(call.seconds)) for name in call.seconds)
    lines = [["seconds", *(f"{call.library} {call.cache}" for call in calls)]]
    lines += [[name, *(f"{call.seconds[name]:.3f}" if name in call.seconds else "-" for call in calls)] for name in names]
    totals = [verdict(call.seconds[START_TO_RESULT], COLD_BUDGET if call.cache == "cold" else WARM_BUDGET) for call in calls]
    parts = [verdict(call.seconds[PACKAGE], PACKAGE_BUDGET) if call.cache == "warm" else "-" for call in calls]
    lines.append([f"{START_TO_RESULT}: budget {COLD_BUDGET} cold, {WARM_BUDGET} warm", *totals])
    lines.append([f"this package: budget {PACKAGE_BUDGET} warm", *parts])
    return lines


def verdict(seconds: float, budget: float) -> str:
    return "ok" if seconds <= budget else "OVER"


def append_entry(path: Path, entry: dict[str, Any]) -> None:
    """Add an object to a JSON file that holds a list of them; the file appears whole or not at all."""
    entries = json.loads(path.read_text(encoding="utf-8")) if path.exists() else []
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    temporary.write_text(json.dumps([*entries, entry], indent=1, allow_nan=False) + "\n", encoding="utf-8")
    temporary.replace(path)


def versions() -> dict[str, str]:
    """Of every package that took part, where it is installed."""
    try:
        found = CupyDevice().versions()
    except (ImportError, CompileError):
        found = {OWN_PEER: cutlass_fa.__version__, "Python": platform.python_version()}
    for name, distribution in (("NumPy", "numpy"), ("Jinja2", "jinja2"), ("PyTorch", "torch")):
        try:
            found[name] = importlib.metadata.version(distribution)
        except importlib.metadata.PackageNotFoundError:
            continue
    return found


# ---- command line --------------------------------------------------------------------------------------------------------------------


def main(argv: Sequence[str] | None = None) -> int:
    """Returns the exit status: 0, or 2 for a name that is no cell's."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--import-runs", type=int, default=7, metavar="N", help="processes of each kind (default: 7; 0: leave out)")
    parser.add_argument("--call-runs", type=int, default=5, metavar="N", help="processes of each kind (default: 5; 0: leave out)")
    parser.add_argument("--cells", nargs="*", metavar="KEY", help="cells to compile (default: every golden cell; none: --cells)")
    parser.add_argument("--libraries", nargs="+", choices=LIBRARIES, default=LIBRARIES, help="whose arrays (default: those installed)")
    parser.add_argument("--output", type=Path, metavar="FILE", help="append the results to this JSON file")
    parser.add_argument("--commit", metavar="HASH", help="commit to record (default: git's HEAD)")
    arguments = parser.parse_args(argv)
    try:
        names = map(str, DISPATCH_TABLE) if arguments.cells is None else arguments.cells
        keys = [DISPATCH_TABLE.lookup(DispatchKey.parse(name)) for name in names]
    except FlashAttnError as error:
        parser.error(str(error))
    logging.getLogger("cutlass_fa").setLevel(logging.ERROR)  # the table says what a slow compile's log line would
    problem = launch_problem()
    device = NO_GPU if problem is not None else CupyDevice().gpu_name
    print(f"{device}, {usable_processors()} processors; " + ", ".join(f"{name} {version}" for name, version in versions().items()))
    startup = {"processors": usable_processors(), **measure(arguments, keys, problem)}
    if arguments.output is not None:
        entry = {
            "commit": arguments.commit or commit_of(REPOSITORY),
            "device": device,
            "driver": driver_version(),
            "versions": versions(),
            "date": datetime.now(timezone.utc).isoformat(timespec="seconds"),
            "startup": startup,
        }
        append_entry(arguments.output, entry)
        print(f"\nappended to {arguments.output}")
    return 0


def measure(arguments: argparse.Namespace, keys: Sequence[DispatchKey], gpu_problem: str | None) -> dict[str, Any]:
    """Everything asked for that this machine can do, each table printed when it is there; the same as plain data for JSON."""
    found: dict[str, Any] = {}
    if arguments.import_runs:
        times = measure_import(arguments.import_runs)
        found["import"] = asdict(times)
        print(f"\nFresh processes, median of {times.runs}:\n{aligned(import_table(times))}", flush=True)
    if keys:
        try:
            cells = measure_cells(keys)
        except CompileError as error:
            print(f"\nNothing compiled: {error}", flush=True)
        else:
            found["compile"] = [asdict(cell) for cell in cells]
            print(f"\nCompiles, one at a time:\n{aligned(cell_table(cells))}", flush=True)
    if gpu_problem is not None:
        print(f"\nNo first call: {gpu_problem}.")
    elif arguments.call_runs:
        installed = [library for library in arguments.libraries if importlib.util.find_spec(library) is not None]
        calls = [call for library in installed for call in measure_first_calls(library, arguments.call_runs)]
        found["first_call"] = [asdict(call) for call in calls]
        print(f"\nFirst call in a fresh process, median of {arguments.call_runs}:\n{aligned(first_call_table(calls))}")
    return found


if __name__ == "__main__":
    sys.exit(main())
