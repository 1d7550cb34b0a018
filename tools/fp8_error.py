"""Relative RMS error and time of the fp8 forward on this machine's GPU, fast and precise, beside the same mathematics without tiles.

    python tools/fp8_error.py [--head-dims 64 128 256] [--seqlens 1024 4096 16384 65536] [--outliers]

Of each sequence ROWS query rows, spread over its length, are computed in float64 and in low precision (tests/numerics.py); the call has
them all. Keys see every query. fast: sums as the tensor cores keep them; precise: added up in float32 after each block of keys. values of
mean 1 show what truncation does to sums of one sign.
"""

from __future__ import annotations

import argparse
import statistics
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))  # this checkout's package, whatever is installed

import cutlass_fa
from cutlass_fa.reference import attention_forward
from cutlass_fa.requests_fp8 import ACCUMULATES
from tests.numerics import lowp_forward, random_outliers
from tools.bench_device import CupyDevice
from tools.bench_points import WIDTH

DTYPE = np.dtype(ml_dtypes.float8_e4m3fn)
ROWS = 64
HEADS = 2  # that are looked at


def relative_rms(actual: np.ndarray, expected: np.ndarray) -> float:
    return float(np.sqrt(((actual.astype(np.float64) - expected) ** 2).mean() / (expected**2).mean()))


def measure(device: Any, head_dim: int, seqlen: int, outliers: bool, mean: float) -> list[str]:
    """One line of the table."""
    import cupy

    rng = np.random.default_rng(seqlen)
    shape = (1, seqlen, WIDTH // head_dim, head_dim)
    q, k, v = (random_outliers(rng, shape) if outliers else rng.standard_normal(shape, dtype=np.float32) for _ in range(3))
    q, k, v = q.astype(DTYPE), k.astype(DTYPE), (v + np.float32(mean)).astype(DTYPE)
    rows = np.linspace(0, seqlen - 1, ROWS).astype(int)
    looked_at = q[:, rows, :HEADS], k[:, :, :HEADS], v[:, :, :HEADS]
    expected, _ = attention_forward(*looked_at)
    low, _ = lowp_forward(*looked_at)
    bits = [cupy.asarray(x.view(np.uint8)) for x in (q, k, v)]
    line = [str(head_dim), str(seqlen), "outliers" if outliers else "normal", f"{mean:g}", f"{relative_rms(low, expected):.4f}"]
    for accumulate in ACCUMULATES:
        out = cutlass_fa.flash_attn_func(*bits, dtype=DTYPE, accumulate=accumulate)
        options = {"dtype": DTYPE, "accumulate": accumulate, "out": cupy.empty_like(out)}
        milliseconds = statistics.median(device.timings(lambda options=options: cutlass_fa.flash_attn_func(*bits, **options), 10, 5))
        line += [f"{relative_rms(out.get()[:, rows, :HEADS], expected):.4f}", f"{milliseconds:.3f}"]
    return line


def main(argv: Sequence[str] | None = None) -> int:
    """Prints a markdown table; returns the exit status."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--head-dims", type=int, nargs="+", default=[64, 128, 256], metavar="N")
    parser.add_argument("--seqlens", type=int, nargs="+", default=[1024, 4096, 16384, 65536], metavar="N")
    parser.add_argument("--outliers", action="store_true", help="one number of 500 is ten times as large")
    arguments = parser.parse_args(argv)
    device = CupyDevice()
    names = ("head_dim", "seqlen", "numbers", "mean of v", "without tiles", "fast", "fast ms", "precise", "precise ms")
    print("| " + " | ".join(names) + " |\n|" + " ---: |" * len(names))
    for head_dim in arguments.head_dims:
        for seqlen in arguments.seqlens:
            for mean in (0.0, 1.0):
                print("| " + " | ".join(measure(device, head_dim, seqlen, arguments.outliers, mean)) + " |", flush=True)
    return 0


if __name__ == "__main__":
    sys.exit(main())
