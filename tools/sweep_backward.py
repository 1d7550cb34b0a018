#!/usr/bin/env python
"""Sweep the fa2 backward's tile table on a GPU: predicted beside measured, one line per candidate.

A candidate is tile_m x tile_n, the blocks of Q, of dO, and of P with dS that are kept (q, o, s), warps of a group along the keys (n), and
warps of dQ along the queries (m). Predicted: registers of a thread's accumulators while it makes scores, shared memory, the bytes that the
warps read from and write to it for each thousand multiplications (at 100, 128 bytes a cycle feed about what mma.sync does on Hopper), and
the share of the products that falls inside the problem. What spills more than a few words is left out. Each candidate's whole call
(preprocess, main kernel, convert) is timed as tools/bench.py times peers, beside PyTorch's flash attention.

usage: tools/sweep_backward.py [--arch sm_90a] [--head-dims 64,128] [--causal full|causal|both] [--seqlens 4096,16384]
                               [--tiles 64x128,128x128] [--rounds N] [--max-spill BYTES] [--compile-only]
"""

from __future__ import annotations

import argparse
import statistics
import sys
from concurrent.futures import ProcessPoolExecutor
from dataclasses import replace
from itertools import product
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from cutlass_fa.arch.fa2_bwd import FA2_BWD_TILES, Fa2BwdTile
from cutlass_fa.arch.limits import limits_of, table_arch
from cutlass_fa.cells.fa2_bwd import Fa2BwdCell
from cutlass_fa.dispatch import DispatchKey
from cutlass_fa.kernels import load_or_compile
from tools.bench import interleaved_medians
from tools.bench_points import Point

TILE_MS = (32, 64, 96, 128)
TILE_NS = (32, 64, 96, 128, 192, 256)
SPARE_REGISTERS = 48  # besides accumulators: operands, addresses, loop state


def candidates(arch: str, head_dim: int, causal: bool, tiles: list[tuple[int, int]] | None) -> list[Fa2BwdCell]:
    """Every tile (of `tiles`, (tile_m, tile_n), or of the grid) that fits shared memory and registers."""
    key = DispatchKey("fa2", "bwd", arch, "bf16", head_dim, causal=causal)
    rings = [(3, 2, 2), (2, 2, 2), (2, 2, 1), (2, 1, 1)]
    cells = [
        Fa2BwdCell(key, Fa2BwdTile(tile_m, tile_n, *ring, warps_n, dq_warps_m))
        for tile_m, tile_n in tiles or product(TILE_MS, TILE_NS)
        for ring in rings
        for warps_n in (4, 2)
        for dq_warps_m in (1, 2, 4, 8)
    ]
    fitting = [cell for cell in cells if not cell.misfits() and cell.smem_bytes <= limits_of(arch).smem_bytes]
    best: dict[tuple[int, ...], Fa2BwdCell] = {}
    for cell in sorted(fitting, key=shared_traffic):  # of warps of dQ the cheapest; of rings the first, the most in flight
        best.setdefault((cell.tile_m, cell.tile_n, cell.warps_n), cell)
    return [cell for cell in best.values() if registers(cell) + SPARE_REGISTERS <= 255]


def registers(cell: Fa2BwdCell) -> int:
    """Accumulators of dV (or dK) and of S (or dP) in a thread."""
    return cell.tile_n * (cell.head_dim + cell.tile_m) // 128


def shared_traffic(cell: Fa2BwdCell) -> float:
    """Bytes through shared memory for each thousand multiplications of a block: operands of the five products, P, dS, and the copies."""
    m, n, d, tile = cell.tile_m, cell.tile_n, cell.head_dim, cell.tile
    halves = 4 // tile.warps_n
    scores = 2 * 4 * 2 * d * (n // tile.warps_n + m // halves)
    gradients = 2 * 4 * 2 * m * d // halves + (2 * 4 * m * n // 2 if halves == 2 else 0)
    dq = 8 * 2 * n * (m // tile.dq_warps_m + d * tile.dq_warps_m // 8)
    exchange, copies = 3 * 2 * m * n, 2 * 2 * m * d
    return (scores + gradients + dq + exchange + copies) / (5 * m * n * d / 1000)


def useful_share(cell: Fa2BwdCell, seqlen: int) -> float:
    """Matrix products inside the problem over matrix products issued."""
    blocks = 0
    for first_key in range(0, seqlen, cell.tile_n):
        first_query = first_key // cell.tile_m if cell.is_causal else 0
        blocks += -(-seqlen // cell.tile_m) - first_query
    useful = seqlen * (seqlen + 1) / 2 if cell.is_causal else seqlen * seqlen
    return useful / (blocks * cell.tile_m * cell.tile_n)


def label(cell: Fa2BwdCell) -> str:
    tile = cell.tile
    return f"{tile.tile_m}x{tile.tile_n} q{tile.q_stages}o{tile.dout_stages}s{tile.score_stages} n{tile.warps_n} m{tile.dq_warps_m}"


def launcher(cell: Fa2BwdCell, point: Point, arrays: tuple[Any, ...]) -> Any:
    """The whole call with this tile in all of its kernels; arrays: dout, q, k, v, out, lse, dq, dk, dv."""
    import torch

    from cutlass_fa.arrays import library_of
    from cutlass_fa.launches.fa2_bwd import Fa2BwdPlan
    from cutlass_fa.problem_backward import BackwardProblem
    from cutlass_fa.requests import Window

    spec = library_of(type(arrays[0])).spec
    dout, q, k, v, out, lse, dq, dk, dv = arrays
    gradients = (spec(dq), spec(dk), spec(dv))
    arguments: dict[str, Any] = {"recompute": False, "arch": cell.arch, "mask": Window(-1, -1, point.causal), "num_splits": 1}
    table = FA2_BWD_TILES[table_arch(cell.arch)]
    kept, table[cell.head_dim] = table[cell.head_dim], cell.tile  # the one way into all passes at once
    try:
        specs = (spec(dout), spec(q), spec(k), spec(v), spec(out), spec(lse))
        problem = BackwardProblem.from_specs(*specs, None, gradients, **arguments)
        kernels = {key: load_or_compile(_cell_of(key)) for key in problem.request.dispatch_keys()}
        plan = Fa2BwdPlan(problem, kernels)
    finally:
        table[cell.head_dim] = kept
    workspace = torch.empty(plan.workspace.floats, device="cuda")
    addresses = {name: x.data_ptr() for name, x in zip(("dout", "q", "k", "v", "out", "lse", "dq", "dk", "dv"), arrays, strict=True)}
    addresses["dlse"] = 0
    # the default argument keeps the arrays alive as long as their addresses are used
    return lambda _keep=(arrays, workspace): plan.run(addresses, workspace.data_ptr(), torch.cuda.current_stream().cuda_stream)


def _cell_of(key: DispatchKey) -> Any:
    from cutlass_fa.cell import Cell

    return Cell.of(key)


def sweep(head_dim: int, causal: bool, arguments: argparse.Namespace, pool: ProcessPoolExecutor) -> None:
    cells = candidates(arguments.arch, head_dim, causal, arguments.tiles)
    built = list(zip(cells, pool.map(load_or_compile, cells), strict=True))
    built = [(cell, kernel) for cell, kernel in built if kernel.cubin.spill_bytes <= arguments.max_spill]
    in_table = FA2_BWD_TILES[table_arch(arguments.arch)][head_dim]
    rates: dict[str, list[float]] = {label(cell): [] for cell, _ in built}
    for seqlen in [] if arguments.compile_only else arguments.seqlens:
        for name, rate in measured(built, replace(Point("bf16", head_dim, seqlen, causal), direction="bwd"), arguments.rounds).items():
            rates.setdefault(name, []).append(rate)
    mask = "causal" if causal else "full"
    columns = "accumulators, registers, spill, smem KB, bytes of it a thousand products, useful share"
    print(f"== head_dim {head_dim} {mask}: TFLOP/s at {arguments.seqlens}; {columns}")
    by_label = {label(cell): (cell, kernel.cubin) for cell, kernel in built}
    for name in sorted(rates, key=lambda name: -statistics.geometric_mean(rates[name] or [1.0])):
        line = f"{name:26} " + " ".join(f"{rate:6.1f}" for rate in rates[name])
        if name in by_label:
            cell, cubin = by_label[name]
            share = " ".join(f"{useful_share(cell, seqlen):.3f}" for seqlen in arguments.seqlens)
            line += (
                f"   {registers(cell)} {cubin.registers} {cubin.spill_bytes} {cell.smem_bytes // 1024} {shared_traffic(cell):.0f} {share}"
            )
            line += "  <- table" * (cell.tile == in_table)
        print(line, flush=True)


def measured(built: list[tuple[Fa2BwdCell, Any]], point: Point, rounds: int) -> dict[str, float]:
    """TFLOP/s of every candidate and of PyTorch's flash attention on one problem."""
    import torch

    import cutlass_fa
    from tools.bench_device import TorchDevice
    from tools.bench_inputs import Inputs

    device = TorchDevice(torch)
    q, k, v, dout = (torch.randn(point.q_shape, device="cuda", dtype=torch.bfloat16) for _ in range(4))
    out, lse = cutlass_fa.flash_attn_func(q, k, v, causal=point.causal, return_lse=True)
    arrays = (dout, q, k, v, out, lse, *(torch.empty_like(x) for x in (q, k, v)))
    calls = {label(cell): launcher(cell, point, arrays) for cell, _ in built}
    calls["fa2"] = device.backward_peers(False)["fa2"](Inputs(q, k, v, point.causal))
    medians = interleaved_medians(calls, device.timings, rounds, 5)
    return {name: point.row(name, milliseconds).tflops or 0.0 for name, milliseconds in medians.items()}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--arch", default="sm_90a")
    parser.add_argument("--head-dims", default=[64, 80, 96, 128, 192, 256], type=lambda text: [int(part) for part in text.split(",")])
    parser.add_argument("--causal", choices=("full", "causal", "both"), default="both")
    parser.add_argument("--seqlens", default=[4096, 16384], type=lambda text: [int(part) for part in text.split(",")])
    parser.add_argument("--tiles", type=lambda text: [tuple(map(int, part.split("x"))) for part in text.split(",")])
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--max-spill", type=int, default=256, metavar="BYTES")
    parser.add_argument("--compile-only", action="store_true")
    arguments = parser.parse_args()
    with ProcessPoolExecutor() as pool:
        for head_dim in arguments.head_dims:
            for causal in {"full": (False,), "causal": (True,), "both": (False, True)}[arguments.causal]:
                sweep(head_dim, causal, arguments, pool)


if __name__ == "__main__":
    main()
