#!/usr/bin/env python
"""Sweep the tile table of the fa3 forward on a Hopper GPU: predicted beside measured, one line per candidate.

A candidate is tile_m x tile_n, a scheduler, one or two tiles of Q in flight, and whether a warpgroup's P V runs during its softmax
("own"). Predicted: registers a consumer thread needs for S, P and O (of those it has), shared memory, and the share of the matrix products
that falls inside the problem (what is left after whole tiles, and under a causal mask after whole blocks on the diagonal). What spills, or
has its products serialised by the compiler, is left out. Each candidate is timed as tools/bench.py times peers.

usage: tools/sweep_tiles.py [--head-dims 64,128] [--causal full|causal|both] [--seqlens 4096,16384] [--tiles 192x112,128x128]
                            [--schedulers static,dynamic] [--rounds N] [--fa3-library FILE] [--compile-only]
"""

from __future__ import annotations

import argparse
import statistics
import sys
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from cutlass_fa.arch.limits import limits_of
from cutlass_fa.arch.sm90 import FA3_FWD_TILES, REGISTER_SPLITS, fa3_fwd_tile
from cutlass_fa.cells.fa3_fwd import Fa3FwdCell
from cutlass_fa.dispatch import DispatchKey
from cutlass_fa.kernels import Kernel, load_or_compile
from tools.bench import Point, interleaved_medians
from tools.bench_device import TorchDevice

TILE_NS = {64: (96, 112, 128, 144, 160, 176, 192), 80: (96, 112, 128, 144, 160, 176, 192), 96: (80, 96, 112, 128, 144, 160, 176, 192),
           128: (80, 96, 112, 128, 144, 160, 176, 192), 192: (64, 80, 96, 112), 256: (48, 64, 80)}  # fmt: skip


def candidates(head_dim: int, causal: bool, tiles: list[tuple[int, int]] | None, schedulers: list[str]) -> list[Fa3FwdCell]:
    """Every tile (of `tiles`, or of the grid) that fits shared memory and leaves a consumer 24 registers besides S, P and O."""
    key = DispatchKey("fa3", "fwd", "sm_90a", "bf16", head_dim, causal=causal)
    swizzle = FA3_FWD_TILES[head_dim, causal].swizzle_bytes
    cells = [
        Fa3FwdCell(key, fa3_fwd_tile(tile_m, tile_n, scheduler, q_stages, swizzle, own_overlap))
        for tile_m, tile_n in tiles or ((tile_m, tile_n) for tile_m in REGISTER_SPLITS for tile_n in TILE_NS[head_dim])
        for scheduler in schedulers
        for q_stages in (1, 2)
        for own_overlap in (False, True)
    ]
    return [
        cell for cell in cells if cell.smem_bytes <= limits_of(cell.arch).smem_bytes and registers(cell) <= cell.consumer_registers - 24
    ]


def registers(cell: Fa3FwdCell) -> int:
    """Registers of S, P and O in one consumer thread."""
    return cell.tile_n // 2 + cell.tile_n // 4 * (1 + cell.has_own_overlap) + cell.head_dim // 2


def useful_share(cell: Fa3FwdCell, seqlen: int) -> float:
    """Matrix products inside the problem over matrix products issued."""
    tile_m, tile_n, causal = cell.tile_m, cell.tile_n, cell.is_causal
    blocks = 0
    for first in range(0, seqlen, tile_m):
        end = min(seqlen, first + tile_m) if causal else seqlen
        blocks += -(-end // tile_n)
    useful = seqlen * (seqlen + 1) / 2 if causal else seqlen * seqlen
    return useful / (blocks * tile_m * tile_n)


def label(cell: Fa3FwdCell) -> str:
    return f"{cell.tile_m}x{cell.tile_n} {cell.tile.scheduler} q{cell.q_stages}" + " own" * cell.has_own_overlap


def launchers(cells: list[Fa3FwdCell], kernels: list[Kernel], head_dim: int, causal: bool, seqlen: int, fa3: Any) -> dict[str, Any]:
    """What to time on one problem, by label."""
    import torch

    from cutlass_fa.arrays import library_of
    from cutlass_fa.launches import forward_plan
    from cutlass_fa.problem import Problem
    from cutlass_fa.requests import Window

    shape = Point("bf16", head_dim, seqlen, causal).q_shape
    q, k, v, out = (torch.randn(shape, device="cuda", dtype=torch.bfloat16) for _ in range(4))
    library = library_of(type(q))
    problem = Problem.from_specs(*map(library.spec, (q, k, v, out)), arch="sm_90a", mask=Window(-1, -1, causal))
    lse = torch.empty((shape[0], shape[2], seqlen), device="cuda")
    pointers = (q.data_ptr(), k.data_ptr(), v.data_ptr())

    def ours(kernel: Kernel) -> Any:
        plan = forward_plan(problem, kernel)
        # the default argument keeps the arrays alive as long as their addresses are used
        return lambda _keep=(q, k, v, out): plan.run(pointers, out.data_ptr(), lse.data_ptr(), torch.cuda.current_stream().cuda_stream)

    runs = {label(cell): ours(kernel) for cell, kernel in zip(cells, kernels, strict=True)}
    if fa3 is not None:
        runs["fa3"] = lambda: fa3.fwd(q, k, v, softmax_scale=head_dim**-0.5, is_causal=causal)
    return runs


def compiled(cells: list[Fa3FwdCell], pool: ProcessPoolExecutor) -> list[tuple[Fa3FwdCell, Kernel]]:
    """The candidates that the compiler neither spills nor serialises."""
    pairs = zip(cells, pool.map(load_or_compile, cells), strict=True)
    return [(cell, kernel) for cell, kernel in pairs if kernel.cubin.spill_bytes == 0 and not kernel.cubin.warnings]


def sweep(head_dim: int, causal: bool, arguments: argparse.Namespace, fa3: Any, pool: ProcessPoolExecutor) -> None:
    built = compiled(candidates(head_dim, causal, arguments.tiles, arguments.schedulers), pool)
    if arguments.compile_only:
        print(f"head_dim {head_dim} {'causal' if causal else 'full'}: {', '.join(label(cell) for cell, _ in built)}", flush=True)
        return
    import torch

    timings = TorchDevice(torch).timings
    cells, kernels = [cell for cell, _ in built], [kernel for _, kernel in built]
    seqlens: list[int] = arguments.seqlens
    rates: dict[str, list[float]] = {}
    for seqlen in seqlens:
        point = Point("bf16", head_dim, seqlen, causal)
        for name, ms in interleaved_medians(launchers(cells, kernels, head_dim, causal, seqlen, fa3), timings, arguments.rounds, 5).items():
            rates.setdefault(name, []).append(point.row(name, ms).tflops or 0.0)
    best = sorted(rates, key=lambda name: -statistics.geometric_mean(rates[name]))
    by_label = {label(cell): (cell, kernel) for cell, kernel in zip(cells, kernels, strict=True)}
    mask = "causal" if causal else "full"
    print(f"== head_dim {head_dim} {mask}: TFLOP/s at {seqlens}; S+P+O registers, spill bytes, smem KB, useful share")
    for name in best:
        measured = " ".join(f"{rate:6.1f}" for rate in rates[name])
        if name not in by_label:
            print(f"{name:24} {measured}")
            continue
        cell, kernel = by_label[name]
        share = " ".join(f"{useful_share(cell, seqlen):.3f}" for seqlen in seqlens)
        mark = "  <- table" if cell.tile == FA3_FWD_TILES[head_dim, causal] else ""
        resources = f"{registers(cell)}/{cell.consumer_registers} {kernel.cubin.spill_bytes} {cell.smem_bytes // 1024}"
        print(f"{name:24} {measured}   {resources} {share}{mark}", flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--head-dims", default=[64, 80, 96, 128, 192, 256], type=lambda text: [int(part) for part in text.split(",")])
    parser.add_argument("--causal", choices=("full", "causal", "both"), default="both")
    parser.add_argument("--seqlens", default=[1024, 4096, 16384], type=lambda text: [int(part) for part in text.split(",")])
    parser.add_argument("--tiles", type=lambda text: [tuple(map(int, part.split("x"))) for part in text.split(",")], help="192x112,128x128")
    parser.add_argument("--schedulers", default=["static", "dynamic"], type=lambda text: text.split(","))
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--fa3-library")
    parser.add_argument("--jobs", type=int, default=8, help="processes that compile")
    parser.add_argument("--compile-only", action="store_true", help="fill the cache and say what is left to time; needs no GPU")
    arguments = parser.parse_args()
    fa3 = None
    if arguments.fa3_library:
        import torch

        torch.ops.load_library(arguments.fa3_library)
        fa3 = torch.ops.flash_attn_3
    import multiprocessing

    with ProcessPoolExecutor(arguments.jobs, mp_context=multiprocessing.get_context("spawn")) as pool:
        for head_dim in arguments.head_dims:
            for causal in {"full": (False,), "causal": (True,), "both": (False, True)}[arguments.causal]:
                sweep(head_dim, causal, arguments, fa3, pool)


if __name__ == "__main__":
    main()
