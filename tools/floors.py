"""How far each forward is from what the GPU could do at best, as a markdown table.

    python tools/floors.py [FILE] [--run N] [--sm-clock-mhz N] [--num-sms N]     FILE: benchmarks/h100.json by default

A forward must multiply (4 * batch * heads * seqlen_q * seqlen_k * head_dim floating-point operations, half of them under a causal mask),
take exponentials (one for each score) and move q, k, v and the result through device memory once. Three times follow: operations over
the rate of a large matrix product, bytes over the rate of a large copy, both measured on the same GPU (bench.py --ceilings), and
exponentials over the special-function units' rate. The units work side by side, so the largest is the floor. The product's rate depends on
what it multiplies and on the clock that the power limit leaves, so a kernel that keeps the GPU cooler can come out a little under 1.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))  # this checkout's package, whatever is installed

from cutlass_fa.demo import forward_flops
from tools.bench_report import OWN_PEER, Row, Run, load_runs, markdown

RESULTS = Path(__file__).resolve().parent.parent / "benchmarks" / "h100.json"
EXPONENTIALS_PER_SM_AND_CLOCK = 16  # of compute capability 9.0: CUDA C++ Programming Guide, throughput of native arithmetic instructions
NUM_SMS = 132  # H100 SXM, H200
# An assumption: an H100 SXM runs at up to 1980 MHz, and under load at what its power limit leaves. tools/profile_kernel.py shows the
# clock of a single launch.
SM_CLOCK_MHZ = 1755
ELEMENT_BYTES = {"bf16": 2, "f16": 2}


@dataclass(frozen=True)
class Ceilings:
    """Rates per second: floating-point operations of a 16-bit matrix product, bytes copied (read and written), exponentials."""

    flops: float
    bytes: float
    exponentials: float


@dataclass(frozen=True)
class Floor:
    """A measured row beside the least time each resource needs for it, in milliseconds."""

    row: Row
    matmul_ms: float
    copy_ms: float
    exp_ms: float

    @property
    def ms(self) -> float:
        return max(self.matmul_ms, self.copy_ms, self.exp_ms)

    @property
    def bound_by(self) -> str:
        """The resource that sets the floor."""
        times = {"matmul": self.matmul_ms, "copy": self.copy_ms, "exp": self.exp_ms}
        return max(times, key=lambda name: times[name])

    @property
    def achieved(self) -> float:
        """Measured time over the floor; 1 is the best there is."""
        return self.row.ms / self.ms


def floor_of(row: Row, ceilings: Ceilings) -> Floor:
    """The floor of a forward row of 16-bit arrays, seqlen_q = seqlen_k."""
    flops = forward_flops(row.b, row.h, row.s, row.s, row.d, bool(row.causal))
    exponentials = row.b * row.h * row.s * row.s * (0.5 if row.causal else 1.0)
    moved = 2 * row.b * row.s * (row.h + row.hk) * row.d * ELEMENT_BYTES[row.dtype]  # q and out, k and v
    return Floor(row, 1e3 * flops / ceilings.flops, 1e3 * moved / ceilings.bytes, 1e3 * exponentials / ceilings.exponentials)


def forward_rows(rows: Iterable[Row]) -> list[Row]:
    """This library's forwards of 16-bit arrays with a full or causal mask and nothing else, in reading order."""
    own = [row for row in rows if row.peer == OWN_PEER and row.direction == "fwd" and not row.features]
    chosen = [row for row in own if row.dtype in ELEMENT_BYTES]
    return sorted(chosen, key=lambda row: row.case)


def ceiling_row(runs: Sequence[Run], device: str, direction: str) -> tuple[Run, Row]:
    """The newest measured "matmul" or "copy" of that GPU and its run. Raises LookupError where there is none."""
    for run in reversed(runs):
        for row in run.rows:
            if run.device == device and row.peer == "ceiling" and row.direction == direction:
                return run, row
    raise LookupError(f"no run on {device} has a ceiling row {direction!r}: measure with `python tools/bench.py --ceilings`")


def measured_ceilings(runs: Sequence[Run], device: str, num_sms: int, sm_clock_mhz: float) -> tuple[Ceilings, str]:
    """The ceilings of a GPU and a sentence on where they come from. Raises LookupError where one was not measured."""
    matmul_run, matmul = ceiling_row(runs, device, "matmul")
    copy_run, copy = ceiling_row(runs, device, "copy")
    if matmul.tflops is None or copy.gbs is None:
        raise LookupError(f"a ceiling row of {device} states no rate")
    exponentials = EXPONENTIALS_PER_SM_AND_CLOCK * num_sms * sm_clock_mhz * 1e6
    note = (
        f"Ceilings: matrix product {matmul.tflops:.0f} TFLOP/s (measured {matmul_run.date[:10]}), copy {copy.gbs:.0f} GB/s (measured "
        f"{copy_run.date[:10]}), exponentials {exponentials / 1e12:.2f} T/s ({EXPONENTIALS_PER_SM_AND_CLOCK} per clock on each of "
        f"{num_sms} multiprocessors at {sm_clock_mhz:.0f} MHz, assumed). Times in milliseconds."
    )
    return Ceilings(1e12 * matmul.tflops, 1e9 * copy.gbs, exponentials), note


def floor_table(floors: Sequence[Floor]) -> list[list[str]]:
    """A header, then a line for each row; times in milliseconds."""
    header = ["dtype", "head_dim", "heads", "mask", "seqlen", "matmul", "copy", "exp", "floor", "measured", "measured / floor", "bound by"]
    return [header, *(_line(floor) for floor in floors)]


def _line(floor: Floor) -> list[str]:
    row = floor.row
    heads = f"{row.h}" if row.h == row.hk else f"{row.h}/{row.hk}"
    case = [row.dtype, str(row.d), heads, "causal" if row.causal else "full", str(row.s)]
    times = [f"{ms:.3f}" for ms in (floor.matmul_ms, floor.copy_ms, floor.exp_ms, floor.ms, row.ms)]
    return [*case, *times, f"{floor.achieved:.2f}", floor.bound_by]


def main(argv: Sequence[str] | None = None) -> int:
    """Returns the exit status: 1 where the file lacks the rows."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("file", type=Path, nargs="?", default=RESULTS, metavar="FILE", help="results of tools/bench.py")
    parser.add_argument("--run", type=int, default=-1, metavar="N", help="which run with forwards, 0 the oldest (default: -1)")
    parser.add_argument("--num-sms", type=int, default=NUM_SMS, metavar="N", help=f"multiprocessors (default: {NUM_SMS})")
    parser.add_argument("--sm-clock-mhz", type=float, default=SM_CLOCK_MHZ, metavar="N", help=f"clock under load (default: {SM_CLOCK_MHZ})")
    arguments = parser.parse_args(argv)
    runs = load_runs(arguments.file)
    with_forwards = [run for run in runs if forward_rows(run.rows)]
    try:
        run = with_forwards[arguments.run]
        ceilings, note = measured_ceilings(runs, run.device, arguments.num_sms, arguments.sm_clock_mhz)
    except LookupError as error:
        print(f"{arguments.file} holds {len(runs)} runs, {len(with_forwards)} of them with forwards: {error}", file=sys.stderr)
        return 1
    print(f"{run.caption}. {note}\n")
    print(markdown(floor_table([floor_of(row, ceilings) for row in forward_rows(run.rows)])))
    return 0


if __name__ == "__main__":
    sys.exit(main())
