"""Time the kernels on this machine's GPU beside their peers, and keep the results.

    python tools/bench.py [run] [options]     measure, append to benchmarks/<gpu>.json, print a table
    python tools/bench.py table [FILE]        the newest run as a markdown table
    python tools/bench.py plot [FILE]         the newest run's TFLOP/s against sequence length as PNGs beside the file

A run times the dense grid (head_dim, seqlen, mask), or with --cases named sets of points: windows, packed sequences, ALiBi, sinks.

Peers, in the same process and interleaved point by point, since a GPU's clocks follow its temperature and its power budget: PyTorch's
flash attention (fa2) and cuDNN (cudnn) where PyTorch is installed, FlashAttention-3 (fa3) with --fa3-library, the shared library that
registers torch.ops.flash_attn_3; of fp8 q, k and v (--dtypes e4m3) cuDNN through nvidia-cudnn-frontend where that is installed. At a point
with a feature that it lacks a peer is not timed. This library without the feature
(without), or on equal lengths (equal), takes turns as one more peer, so that its price is a ratio of one run. A time is the median of
CUDA-event timings over all rounds. batch * seqlen is 16k and heads * head_dim 2048 throughout, packed sequences excepted, inputs are
standard normal numbers, and the L2 cache is not flushed: most inputs are larger.
"""

from __future__ import annotations

import argparse
import random
import shlex
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from datetime import datetime, timezone
from itertools import product
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))  # this checkout's package, whatever is installed

from cutlass_fa.dispatch import FAMILIES
from cutlass_fa.errors import MockMode
from cutlass_fa.requests_fp8 import ACCUMULATES
from tools.bench_cache import CachePoint
from tools.bench_cases import CASES, case_points
from tools.bench_device import ArrayDevice, Call, Prepare, current_devices
from tools.bench_inputs import Inputs
from tools.bench_points import WIDTH, Point
from tools.bench_report import OWN_PEER, Row, Run, aligned, append_run, load_runs, markdown, other_rows, plot, results_name, table

REPOSITORY = Path(__file__).resolve().parent.parent
GRID_HEAD_DIMS = (64, 128, 256)
GRID_DEFAULTS: dict[str, Any] = {"seqlens": (1024, 4096, 16384), "directions": ("fwd",), "causal": "both", "gqa": (1,)}
WARM_UP_S = 1.0
LEAD_MS = 100.0  # much longer than the window over which a GPU averages its power
# Between two implementations on standard normal inputs: some roundings of a 16-bit result, no more. Gradients reach larger numbers.
DISAGREEMENT = {"fwd": 0.05, "bwd": 0.2}

HOST_DECODE = CachePoint("bf16", 128, 1, True, 4, seqlen_k=256, sequences=4, page=16)
DISAGREES = "disagrees"  # the mark of a row whose result is not the peers'


def points(arguments: argparse.Namespace) -> Iterator[Point]:
    """The points asked for."""
    if arguments.no_grid:
        return iter(())
    if arguments.cases is not None:
        return case_points(arguments.cases, arguments.dtypes, arguments.head_dims)
    return grid(arguments)


def grid(arguments: argparse.Namespace) -> Iterator[Point]:
    """The dense grid's points; a GQA ratio that does not divide the number of heads is left out."""
    seqlens, directions, causal, gqa = (getattr(arguments, name) or default for name, default in GRID_DEFAULTS.items())
    masks = {"full": (False,), "causal": (True,), "both": (False, True)}[causal]
    cases = product(directions, arguments.dtypes, arguments.head_dims or GRID_HEAD_DIMS, gqa, masks, seqlens)
    for direction, dtype, head_dim, ratio, is_causal, seqlen in cases:
        if WIDTH // head_dim % ratio == 0:
            yield Point(dtype, head_dim, seqlen, is_causal, ratio, direction)


# ---- measuring -----------------------------------------------------------------------------------------------------------------------


def interleaved_medians(
    calls: dict[str, Call], timings: Callable[[Call, int, int], list[float]], rounds: int, count: int
) -> dict[str, float]:
    """Median of each call's timings over `rounds` rounds, in each of which every call has a turn, in an order drawn anew.

    A turn is LEAD_MS of the call untimed, then `count` timed ones: a GPU at its power limit runs faster after a gentle kernel than after
    a hungry one, so every call is measured in the state that it brings about itself.
    """
    leads = {name: max(2, round(LEAD_MS / statistics.median(timings(call, 3, 2)))) for name, call in calls.items()}
    samples: dict[str, list[float]] = {name: [] for name in calls}
    order = random.Random(0)
    for _ in range(rounds):
        for name in order.sample(list(calls), len(calls)):
            samples[name] += timings(calls[name], count, leads[name])
    return {name: statistics.median(found) for name, found in samples.items()}


def measure_point(device: ArrayDevice, peers: dict[str, Prepare], point: Point, rounds: int, count: int) -> list[Row]:
    """Every peer that can do this point, and the point's baseline; one that cannot says so on stderr and is left out. This library must;
    its rows name the family that was asked for."""
    inputs = device.inputs(point)
    calls: dict[str, Call] = {}
    results: dict[str, Any] = {}
    for name, prepare in peers.items():
        try:
            call = prepare(inputs)
            results[name] = call()
            device.synchronize()
            calls[name] = call
        except (RuntimeError, TypeError, AttributeError) as error:
            if name == OWN_PEER:
                raise
            print(f"{name} cannot do {point}: {error}", file=sys.stderr)
    family = "fa2" if point.direction == "bwd" else device.family  # every backward is that family's
    remarks = [f"family={family}"] * bool(family) + ["deterministic"] * (point.direction == "bwd" and device.deterministic)
    remark = " ".join(remarks + [f"accumulate={device.accumulate}"] * bool(device.accumulate))
    for name, result in results.items():
        difference = device.max_difference(results[OWN_PEER], result)
        if not difference <= DISAGREEMENT[point.direction]:  # nor is NaN
            remark = f"{remark} {DISAGREES}".strip() if DISAGREES not in remark else remark
            print(f"{point}: {OWN_PEER} and {name} differ by {difference:.3g}", file=sys.stderr)
    if point.baseline is not None:
        name, plainer = point.baseline
        calls[name] = peers[OWN_PEER](device.inputs(plainer, like=inputs))
    medians = interleaved_medians(calls, device.timings, rounds, count)
    return [point.row(name, milliseconds, remark if name == OWN_PEER else "") for name, milliseconds in medians.items()]


def measure_host(devices: Sequence[ArrayDevice]) -> Iterator[Row]:
    """Host time of small calls whose kernels are cached: batch 1, seqlen 64, 16 heads, head_dim 128, bf16; and one token after the paged
    keys of four sequences."""
    for device in devices:
        inputs = Inputs(*(device.normal((1, 64, 16, 128), "bf16") for _ in range(3)))
        for peer, extra, call in device.host_calls(inputs):
            microseconds = host_microseconds(call, device.synchronize)
            yield Row(peer, "host", "bf16", 128, 1, 16, 16, 64, 0, extra, round(microseconds / 1e3, 5))
        decode = device.own_call(device.inputs(HOST_DECODE))
        microseconds = host_microseconds(decode, device.synchronize)
        yield Row(OWN_PEER, "host", "bf16", 128, 4, 32, 8, 1, 1, f"{device.library} decode", round(microseconds / 1e3, 5))


def host_microseconds(call: Call, synchronize: Call, batches: int = 60, count: int = 50) -> float:
    """Median over batches of the time a call takes to return; the GPU is idle at each batch's start, and its queue never fills."""
    samples = []
    for _ in range(batches + 1):
        start = time.perf_counter()
        for _ in range(count):
            call()
        samples.append((time.perf_counter() - start) / count)
        synchronize()
    return 1e6 * statistics.median(samples[1:])


def measure_ceilings(device: ArrayDevice) -> Iterator[Row]:
    """What the GPU does at best: a copy within its memory (bytes read and written), and a matrix product where a library has one."""
    copied, copy = device.copy_call()
    milliseconds = statistics.median(device.timings(copy, 20, 2))
    extra = f"{copied >> 30}GiB d2d"
    yield Row("ceiling", "copy", "bf16", 0, 0, 0, 0, 0, 0, extra, round(milliseconds, 5), None, round(2 * copied / milliseconds / 1e6, 1))
    product = device.matmul_call()
    if product is not None:
        size, multiply = product
        milliseconds = statistics.median(device.timings(multiply, 20, 10))
        yield Row("ceiling", "matmul", "bf16", 0, 0, 0, 0, size, 0, "", round(milliseconds, 5), round(2 * size**3 / milliseconds / 1e9, 1))


def warm_up(device: ArrayDevice) -> None:
    """Bring the clocks to where they stay under load."""
    _, copy = device.copy_call()
    end = time.perf_counter() + WARM_UP_S
    while time.perf_counter() < end:
        device.timings(copy, 20, 2)


# ---- what it was measured with -------------------------------------------------------------------------------------------------------


def commit_of(repository: Path) -> str:
    """HEAD, with "-dirty" where a tracked file differs; "unknown" outside a git checkout."""
    try:
        head = _output("git", "-C", str(repository), "rev-parse", "HEAD")
        changed = _output("git", "-C", str(repository), "status", "--porcelain", "--untracked-files=no")
    except (OSError, subprocess.CalledProcessError):
        return "unknown"
    return head + ("-dirty" if changed else "")


def driver_version() -> str:
    """As nvidia-smi states it for the first GPU; "unknown" without nvidia-smi."""
    try:
        return _output("nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader").splitlines()[0]
    except (OSError, subprocess.CalledProcessError, IndexError):
        return "unknown"


def _output(*command: str) -> str:
    return subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip()


def command_line(arguments: Sequence[str]) -> str:
    """The command, with paths cut to their last part: where a file lay on the machine tells a reader nothing."""
    return shlex.join(["python", "tools/bench.py", *(Path(argument).name if "/" in argument else argument for argument in arguments)])


# ---- command line --------------------------------------------------------------------------------------------------------------------


def main(argv: Sequence[str] | None = None) -> int:
    """Returns the exit status: 1 without a GPU, or where this library's results disagree with a peer's."""
    argv = list(sys.argv[1:] if argv is None else argv)
    if argv[:1] in (["table"], ["plot"]):
        return report(argv[0], argv[1:])
    arguments = run_arguments(argv[1:] if argv[:1] == ["run"] else argv)
    try:
        devices = current_devices()
    except MockMode as error:
        print(error, file=sys.stderr)
        return 1
    for each in devices:
        each.family = arguments.family
        each.deterministic = arguments.deterministic
        each.accumulate = arguments.accumulate
    device = devices[0]
    rows: list[Row] = []
    warm_up(device)
    if arguments.host:
        rows += measure_host(devices)
    if arguments.ceilings:
        rows += measure_ceilings(device)
    peers = {"fwd": device.peers(arguments.fa3_library), "bwd": device.backward_peers(arguments.fa3_library is not None)}
    chosen = None if arguments.peers is None else (OWN_PEER, *arguments.peers)
    for point in points(arguments):
        here = {name: prepare for name, prepare in peers[point.direction].items() if chosen is None or name in chosen}
        measured = measure_point(device, here, point, arguments.rounds, arguments.calls)
        rows += measured
        print(f"{point}: " + ", ".join(f"{row.peer} {row.tflops}" for row in measured), file=sys.stderr, flush=True)
    run = Run(
        commit=arguments.commit or commit_of(REPOSITORY),
        device=device.gpu_name,
        driver=driver_version(),
        versions=device.versions() | ({"fa3": arguments.fa3_version or arguments.fa3_library.name} if arguments.fa3_library else {}),
        date=datetime.now(timezone.utc).isoformat(timespec="seconds"),
        command=command_line(argv),
        rows=tuple(rows),
    )
    output = arguments.output or REPOSITORY / "benchmarks" / results_name(device.gpu_name)
    append_run(output, run)
    print(f"{run.caption}\nappended to {output}")
    for lines in (other_rows(rows), table(rows)):
        if len(lines) > 1:
            print("\n" + aligned(lines))
    return 1 if any(DISAGREES in row.extra for row in rows) else 0


def run_arguments(argv: Sequence[str]) -> argparse.Namespace:
    """The options of a measuring run; ends the program where they contradict each other."""
    parser = run_parser()
    arguments = parser.parse_args(argv)
    given = [f"--{name}" for name in GRID_DEFAULTS if getattr(arguments, name) is not None]
    if arguments.cases is not None and given:
        parser.error(f"--cases names its points itself: leave out {', '.join(given)}")
    return arguments


def run_parser() -> argparse.ArgumentParser:
    """The options of a measuring run."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--cases", nargs="+", choices=CASES, help="these sets of forwards in place of the dense grid")
    parser.add_argument("--head-dims", type=int, nargs="+", metavar="N", help="(default: 64 128 256; of --cases: each set's own)")
    parser.add_argument("--seqlens", type=int, nargs="+", metavar="N", help="of the grid (default: 1024 4096 16384)")
    parser.add_argument("--dtypes", nargs="+", default=["bf16"], choices=["bf16", "f16", "e4m3", "e5m2"])
    parser.add_argument("--directions", nargs="+", choices=["fwd", "bwd"], help="passes of the grid (default: fwd)")
    parser.add_argument("--deterministic", action="store_true", help="this library's backward with deterministic=True")
    parser.add_argument("--accumulate", choices=ACCUMULATES, help="how this library adds up fp8 products (default: fast)")
    parser.add_argument("--causal", choices=["full", "causal", "both"], help="masks of the grid (default: both)")
    parser.add_argument("--gqa", type=int, nargs="+", metavar="N", help="query heads to a key head in the grid (default: 1)")
    parser.add_argument("--family", choices=FAMILIES, help="this library's kernels (default: the family that serves the call)")
    parser.add_argument("--peers", nargs="*", choices=["fa2", "cudnn", "fa3"], help="only these (default: all there are; none: --peers)")
    parser.add_argument("--fa3-library", type=Path, metavar="PATH", help="shared library that registers torch.ops.flash_attn_3")
    parser.add_argument("--fa3-version", metavar="TEXT", help="what to call it in the results (default: the file's name)")
    parser.add_argument("--rounds", type=int, default=6, metavar="N", help="turns of each peer at a point (default: 6)")
    parser.add_argument("--calls", type=int, default=10, metavar="N", help="timed calls in a turn (default: 10)")
    parser.add_argument("--host", action="store_true", help="also the host time of a small cached call")
    parser.add_argument("--ceilings", action="store_true", help="also a copy and a matrix product")
    parser.add_argument("--no-grid", action="store_true", help="only what --host and --ceilings ask for")
    parser.add_argument("--output", type=Path, metavar="FILE", help="results file (default: benchmarks/<gpu>.json)")
    parser.add_argument("--commit", metavar="HASH", help="commit to record (default: git's HEAD)")
    return parser


def report(command: str, argv: Sequence[str]) -> int:
    """`table` and `plot`: from the newest run of a results file; returns the exit status."""
    parser = argparse.ArgumentParser(prog=f"bench.py {command}")
    parser.add_argument("file", type=Path, nargs="?", default=REPOSITORY / "benchmarks" / "h100.json", metavar="FILE")
    parser.add_argument("--run", type=int, default=-1, metavar="N", help="which run, 0 the oldest (default: -1, the newest)")
    arguments = parser.parse_args(argv)
    runs = load_runs(arguments.file)
    try:
        run = runs[arguments.run]
    except IndexError:
        parser.error(f"{arguments.file} holds {len(runs)} runs")
    if command == "plot":
        for path in plot(run, arguments.file.parent, arguments.file.stem):
            print(path)
        return 0
    print(f"{run.caption}. TFLOP/s, made by `{run.command}`.")
    for lines in (table(run.rows), other_rows(run.rows)):
        if len(lines) > 1:
            print("\n" + markdown(lines))
    return 0


if __name__ == "__main__":
    sys.exit(main())
