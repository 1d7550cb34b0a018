"""Where one forward's time goes, by Nsight Compute's counters (ncu).

    python tools/profile_kernel.py [KEY] [--head-dim N] [--seqlen N] [--causal] [--gqa N] [--dtype bf16|f16] [--csv FILE]

The shape is bench.py's: batch * seqlen is 16k, heads * head_dim 2048. KEY, the name of a forward's cell, stands for --head-dim, --causal
and --dtype. ncu runs a process that launches the kernel a few times and profiles one launch. It replays that launch once for each group of
counters, with the clocks as they are and the L2 cache as the replay before left it, so its duration is not bench.py's.

Metric names and what they mean: "Profiling Guide" of Nsight Compute, sections Metrics Structure, Metrics Decoder (pipelines) and Warp
Stall Reasons (https://docs.nvidia.com/nsight-compute/ProfilingGuide). `ncu --query-metrics` lists those of a GPU; what it does not list is
not asked for and left out of the table.
"""

from __future__ import annotations

import argparse
import csv
import re
import shutil
import subprocess
import sys
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))  # this checkout's package, whatever is installed

import cutlass_fa
from cutlass_fa.cell import Cell
from cutlass_fa.demo import forward_flops, launch_problem
from cutlass_fa.dispatch import DISPATCH_TABLE, DispatchKey
from cutlass_fa.errors import FlashAttnError
from cutlass_fa.render import render
from cutlass_fa.requests import Causal, Fa3FwdRequest, Full
from tools.bench_device import CupyDevice
from tools.bench_points import Point
from tools.bench_report import aligned

WARM_UP_LAUNCHES = 3
NCU_PLACES = ("/usr/local/cuda/bin/ncu", "/opt/nvidia/nsight-compute")
SHOWN_STALLS = 8


@dataclass(frozen=True)
class Figure:
    """One line of the table: what it says, its unit there ("%", "us", "MB", "MHz" or "" for a count), and the metrics that may give it, of
    which the first that a GPU has is taken."""

    label: str
    unit: str
    metrics: tuple[str, ...]


def _pipe(name: str) -> tuple[str, ...]:
    return (
        f"sm__inst_executed_pipe_{name}.avg.pct_of_peak_sustained_active",
        f"sm__pipe_{name}_cycles_active.avg.pct_of_peak_sustained_active",
    )


# On sm_90 the tensor pipe's cycles count WGMMA as "hmma", and its instructions as "gmma". Pipelines are given as a share of their peak
# while an SM is active, so idle SMs at a launch's end show in "SMs active" alone.
FIGURES = (
    Figure("duration", "us", ("gpu__time_duration.sum",)),
    Figure("SM clock", "MHz", ("sm__cycles_elapsed.avg.per_second", "smsp__cycles_elapsed.avg.per_second")),
    Figure("SMs active", "%", ("sm__cycles_active.avg.pct_of_peak_sustained_elapsed",)),
    Figure("SM throughput", "%", ("sm__throughput.avg.pct_of_peak_sustained_elapsed",)),
    Figure(
        "tensor pipe, cycles busy",
        "%",
        (
            "sm__pipe_tensor_op_hmma_cycles_active.avg.pct_of_peak_sustained_active",
            "sm__pipe_tensor_cycles_active.avg.pct_of_peak_sustained_active",
        ),
    ),
    Figure("XU pipe (exp2, conversions)", "%", _pipe("xu")),
    Figure("FMA pipe", "%", _pipe("fma")),
    Figure("ALU pipe", "%", _pipe("alu")),
    Figure("LSU pipe", "%", _pipe("lsu")),
    Figure("issue slots used", "%", ("smsp__issue_active.avg.pct_of_peak_sustained_active",)),
    Figure("warp instructions", "", ("smsp__inst_executed.sum",)),
    Figure("  on XU", "", ("sm__inst_executed_pipe_xu.sum",)),
    Figure("  WGMMA", "", ("sm__inst_executed_pipe_tensor_op_gmma.sum",)),
    Figure("shared memory bank conflicts", "", ("l1tex__data_bank_conflicts_pipe_lsu_mem_shared.sum",)),
    Figure("L2 throughput", "%", ("lts__throughput.avg.pct_of_peak_sustained_elapsed",)),
    Figure("L2 bytes", "MB", ("lts__t_bytes.sum",)),
    Figure("L2 hit rate", "%", ("lts__t_sector_hit_rate.pct",)),
    Figure(
        "DRAM throughput",
        "%",
        ("gpu__dram_throughput.avg.pct_of_peak_sustained_elapsed", "dram__throughput.avg.pct_of_peak_sustained_elapsed"),
    ),
    Figure("DRAM bytes read", "MB", ("dram__bytes_read.sum",)),
    Figure("DRAM bytes written", "MB", ("dram__bytes_write.sum",)),
    Figure("achieved occupancy", "%", ("sm__warps_active.avg.pct_of_peak_sustained_active",)),
    Figure("registers a thread at launch", "", ("launch__registers_per_thread",)),
)

# Warps in a state, on average, for each cycle in which a scheduler issued: what warps waited for between two of their instructions.
_STALL = re.compile(r"smsp__average_warps_issue_stalled_(?P<reason>\w+)_per_issue_active(?:\.ratio)?")
STALL_REASONS = (
    "barrier", "branch_resolving", "dispatch_stall", "drain", "gmma", "imc_miss", "lg_throttle", "long_scoreboard", "math_pipe_throttle",
    "membar", "mio_throttle", "misc", "no_instruction", "not_selected", "selected", "short_scoreboard", "sleeping", "tex_throttle", "wait",
)  # fmt: skip

# ncu's units, printed for base and for readable values by one version or another, in seconds, bytes, hertz.
_UNITS = {
    **{"nsecond": 1e-9, "ns": 1e-9, "usecond": 1e-6, "us": 1e-6, "msecond": 1e-3, "ms": 1e-3, "second": 1.0, "s": 1.0},
    **{"byte": 1.0, "Kbyte": 1e3, "Mbyte": 1e6, "Gbyte": 1e9},
    **{"hz": 1.0, "Khz": 1e3, "Mhz": 1e6, "Ghz": 1e9, "cycle/second": 1.0, "cycle/usecond": 1e6, "cycle/nsecond": 1e9},
    **{"cycle/s": 1.0, "cycle/us": 1e6, "cycle/ns": 1e9},
}
_SHOWN = {"us": 1e6, "MB": 1e-6, "MHz": 1e-6, "%": 1.0, "": 1.0}


@dataclass(frozen=True)
class Profile:
    """One profiled launch: kernel, launch shape as ncu prints it, and its metrics in seconds, bytes, hertz, percent or counts."""

    kernel: str
    grid: str
    block: str
    metrics: dict[str, float]


class ProfilerError(RuntimeError):
    """ncu is missing, refuses, or printed something else than a profile."""


# ---- what ncu is asked and what it answers -------------------------------------------------------------------------------------------


def wanted_metrics(available: Iterable[str]) -> list[str]:
    """The metrics of FIGURES and of the stall reasons that a GPU has. available: base names, as `ncu --query-metrics` lists them; empty
    where they are not known, and everything is wanted."""
    names = set(available)
    if not names:
        return [metric for figure in FIGURES for metric in figure.metrics] + [_stall_metric(reason) for reason in STALL_REASONS]
    chosen: list[str] = []
    for figure in FIGURES:
        # What a launch states of itself (launch__) needs no counter and is in no list of them.
        found = [metric for metric in figure.metrics if metric.startswith("launch__") or metric.partition(".")[0] in names]
        chosen += found[:1]
    listed = [match["reason"] for match in map(_STALL.fullmatch, sorted(names)) if match is not None]
    return chosen + [_stall_metric(reason) for reason in listed or STALL_REASONS if not reason.endswith("_not_issued")]


def _stall_metric(reason: str) -> str:
    return f"smsp__average_warps_issue_stalled_{reason}_per_issue_active.ratio"


def parse_metric_names(listing: str) -> list[str]:
    """Base names out of the table that `ncu --query-metrics` prints."""
    return re.findall(r'^"?([a-z0-9]+__\w+)', listing, re.MULTILINE)


def parse_raw_csv(text: str) -> Profile:
    """The last launch in the output of `ncu --csv --page raw`: a header, a line of units, a line for each launch; whatever the profiled
    program and ncu itself printed before is skipped. Raises ProfilerError where there is no launch."""
    lines = text.splitlines()
    start = next((number for number, line in enumerate(lines) if line.startswith('"ID",')), None)
    rows = [] if start is None else list(csv.reader(line for line in lines[start:] if line.startswith('"')))
    if len(rows) < 3:
        raise ProfilerError("ncu profiled no launch:\n" + "\n".join(lines[-20:]))
    header, units, values = rows[0], rows[1], rows[-1]
    columns = dict(zip(header, values, strict=False))
    metrics = {}
    for name, unit, value in zip(header, units, values, strict=False):
        number = _number(value)
        if "__" in name and number is not None:
            metrics[name] = number * _UNITS.get(unit, 1.0)
    return Profile(columns.get("Kernel Name", ""), columns.get("Grid Size", ""), columns.get("Block Size", ""), metrics)


def _number(text: str) -> float | None:
    """1,234.5 is a number, with ncu's separators; n/a is none."""
    try:
        return float(text.replace(",", ""))
    except ValueError:
        return None


def figure_table(profile: Profile, flops: float) -> list[list[str]]:
    """The lines of FIGURES that were measured, after the rate that the duration means for `flops` operations."""
    lines = [["figure", "value", ""]]
    for figure in FIGURES:
        value = next((profile.metrics[metric] for metric in figure.metrics if metric in profile.metrics), None)
        if value is not None:
            lines.append([figure.label, f"{value * _SHOWN[figure.unit]:,.1f}" if figure.unit else f"{value:,.0f}", figure.unit])
    seconds = profile.metrics.get("gpu__time_duration.sum")
    if seconds:
        lines.insert(2, ["rate", f"{flops / seconds / 1e12:,.1f}", "TFLOP/s"])
    return lines


def stall_table(profile: Profile, shown: int = SHOWN_STALLS) -> list[list[str]]:
    """The reasons that most warps wait for, and what share of all warps in flight each has; "selected" is the instruction that issues."""
    found = [(match["reason"], value) for name, value in profile.metrics.items() if (match := _STALL.fullmatch(name)) is not None]
    total = sum(value for _, value in found)
    ranked = sorted(found, key=lambda each: -each[1])[:shown]
    lines = [[reason, f"{value:.2f}", f"{value / total:.0%}"] for reason, value in ranked if value]
    return [["warps wait for", "per issue", "share"], *lines]


# ---- running ncu ---------------------------------------------------------------------------------------------------------------------


def find_ncu() -> str:
    """ncu on PATH or where NVIDIA's packages put it. Raises ProfilerError."""
    known = [place for place in (Path(name) for name in NCU_PLACES) if place.is_file()]
    known += sorted(Path(NCU_PLACES[-1]).glob("*/ncu"), reverse=True)
    found = shutil.which("ncu") or next(map(str, known), None)
    if found is None:
        raise ProfilerError("ncu (Nsight Compute) is not installed; it comes with the CUDA toolkit, or give its place with --ncu")
    return found


def ncu_command(ncu: str, metrics: Sequence[str], kernel: str, program: Sequence[str]) -> list[str]:
    """Profile the launch of `kernel` that follows the warm-up."""
    options = ["--csv", "--page", "raw", "--print-units", "base", "--clock-control", "none", "--cache-control", "none"]
    launch = ["--kernel-name", kernel, "--launch-skip", str(WARM_UP_LAUNCHES), "--launch-count", "1"]
    return [ncu, *options, *launch, "--metrics", ",".join(metrics), *program]


def profile(ncu: str, kernel: str, program: Sequence[str]) -> tuple[Profile, str]:
    """One launch's profile, and the CSV it came from. Raises ProfilerError with what ncu printed."""
    metrics = wanted_metrics(parse_metric_names(_run([ncu, "--query-metrics"]).stdout))
    done = _run(ncu_command(ncu, metrics, kernel, program))
    printed = done.stdout + done.stderr
    if done.returncode != 0:
        complaints = "\n".join(line for line in printed.splitlines() if line.startswith(("==ERROR==", "==WARNING==")))
        refused = [metric for metric in metrics if metric.partition(".")[0] in complaints]
        if not refused:
            raise ProfilerError(f"ncu ended with status {done.returncode}:\n" + "\n".join(printed.splitlines()[-20:]))
        print(f"ncu does not know {', '.join(refused)}: left out", file=sys.stderr)
        done = _run(ncu_command(ncu, [metric for metric in metrics if metric not in refused], kernel, program))
    return parse_raw_csv(done.stdout), done.stdout


def _run(command: Sequence[str]) -> subprocess.CompletedProcess[str]:
    try:
        return subprocess.run(command, capture_output=True, text=True, check=False)
    except OSError as error:
        raise ProfilerError(f"{command[0]} cannot be run: {error}") from error


def launch_all(point: Point) -> None:
    """The profiled process: launches of the kernel, the warm-up's and one more."""
    device = CupyDevice()
    q, k, v = (device.normal(shape, point.dtype) for shape in (point.q_shape, point.kv_shape, point.kv_shape))
    out = device.empty_like(q)
    for _ in range(WARM_UP_LAUNCHES + 1):
        cutlass_fa.flash_attn_func(q, k, v, causal=point.causal, out=out)
    device.synchronize()


# ---- command line --------------------------------------------------------------------------------------------------------------------


def point_of(parser: argparse.ArgumentParser, arguments: argparse.Namespace) -> Point:
    """The case asked for; ends the program where a KEY is none that this shape uses."""
    if arguments.key is None:
        return Point(arguments.dtype, arguments.head_dim, arguments.seqlen, arguments.causal, arguments.gqa or 1)
    try:
        key = DispatchKey.parse(arguments.key)
        point = Point(key.dtype, key.head_dim, arguments.seqlen, key.causal, arguments.gqa or key.gqa_ratio)
        used = key_of(point)
    except FlashAttnError as error:
        parser.error(str(error))
    if used != key:
        parser.error(f"{point} is served by {used}, not {key}; --seqlen and --gqa choose another shape")
    return point


def key_of(point: Point) -> DispatchKey:
    """The forward cell that serves a case. Raises FlashAttnError where there is none."""
    request = Fa3FwdRequest(
        batch=point.batch,
        seqlen_q=point.seqlen,
        seqlen_k=point.seqlen,
        num_heads_q=point.num_heads_q,
        num_heads_kv=point.num_heads_kv,
        head_dim=point.head_dim,
        dtype=point.dtype,
        mask=Causal() if point.causal else Full(),
    )
    return DISPATCH_TABLE.lookup(request.dispatch_key())


def argument_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("key", nargs="?", metavar="KEY", help="name of a forward's cell; in place of --head-dim, --causal, --dtype")
    parser.add_argument("--head-dim", type=int, default=128, metavar="N", help="(default: 128)")
    parser.add_argument("--seqlen", type=int, default=16384, metavar="N", help="of queries and keys (default: 16384)")
    parser.add_argument("--causal", action="store_true")
    parser.add_argument("--gqa", type=int, metavar="N", help="query heads to a key head (default: KEY's, else 1)")
    parser.add_argument("--dtype", default="bf16", choices=["bf16", "f16"])
    parser.add_argument("--csv", type=Path, metavar="FILE", help="keep ncu's output")
    parser.add_argument("--ncu", metavar="PATH", help="Nsight Compute's command (default: found on PATH and in NVIDIA's places)")
    parser.add_argument("--launch", action="store_true", help=argparse.SUPPRESS)  # be the profiled process
    return parser


def main(argv: Sequence[str] | None = None) -> int:
    """Returns the exit status: 1 without a GPU or ncu, or where ncu fails."""
    argv = list(sys.argv[1:] if argv is None else argv)
    parser = argument_parser()
    arguments = parser.parse_args(argv)
    point = point_of(parser, arguments)
    if arguments.launch:
        launch_all(point)
        return 0
    try:
        cell = Cell.of(key_of(point))
        ncu = arguments.ncu or find_ncu()
        problem = launch_problem()
        if problem is not None:
            raise ProfilerError(f"nothing to profile: {problem}")
        program = [sys.executable, str(Path(__file__).resolve()), "--launch", *argv]
        found, text = profile(ncu, render(cell).entry, program)
    except (ProfilerError, FlashAttnError) as error:
        print(error, file=sys.stderr)
        return 1
    if arguments.csv is not None:
        arguments.csv.write_text(text, encoding="utf-8")
    flops = forward_flops(point.batch, point.num_heads_q, point.seqlen, point.seqlen, point.head_dim, point.causal)
    print(f"{cell.name}: {cell.summary}")
    print(f"{point}; {found.kernel}, grid {found.grid}, block {found.block}\n")
    print(aligned(figure_table(found, flops)) + "\n\n" + aligned(stall_table(found)))
    return 0


if __name__ == "__main__":
    sys.exit(main())
