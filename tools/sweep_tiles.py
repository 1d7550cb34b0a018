#!/usr/bin/env python
"""Sweep a forward's tile table on a GPU: predicted beside measured, one line per candidate.

A candidate of family fa3 (Hopper) is tile_m x tile_n, a scheduler, one or two tiles of Q in flight, and whether a warpgroup's P V runs
during its softmax ("own"). One of family fa2 is warps x rows of a warp x tile_n, CTAs to a multiprocessor, and whether Q stays in registers
("q"). Predicted: registers that S, P and O (and a Q that stays) take of those a thread has, shared memory, and the share of the matrix
products that falls inside the problem (what is left after whole tiles, and under a causal mask after whole blocks on the diagonal). What
spills, or has its products serialised by the compiler, is left out. Each candidate is timed as tools/bench.py times peers, family fa2
beside PyTorch's flash attention.

usage: tools/sweep_tiles.py [--family fa3|fa2] [--dtype bf16|e4m3] [--head-dims 64,128] [--causal full|causal|both] [--seqlens 4096,16384]
                            [--tiles 192x112,128x128 | --tiles 4x32x64,8x16x64] [--schedulers static,dynamic] [--rounds N]
                            [--fa3-library FILE] [--compile-only]
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

from cutlass_fa.arch.limits import limits_of
from cutlass_fa.arch.sm80 import Fa2FwdTile
from cutlass_fa.arch.sm90 import FA3_FWD_FP8_TILES, FA3_FWD_TILES, REGISTER_SPLITS, fa3_fwd_fp8_tile, fa3_fwd_tile
from cutlass_fa.cell import Cell
from cutlass_fa.cells.fa2_fwd import Fa2FwdCell
from cutlass_fa.cells.fa3_fwd import Fa3FwdCell
from cutlass_fa.cells.fa3_fwd_fp8 import Fa3FwdFp8Cell
from cutlass_fa.dispatch import DispatchKey
from cutlass_fa.kernels import Kernel, load_or_compile
from tools.bench import interleaved_medians
from tools.bench_device import Prepare, TorchDevice
from tools.bench_inputs import Inputs
from tools.bench_points import Point

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
        cell for cell in cells if cell.smem_bytes <= limits_of(cell.arch).smem_bytes and fa3_registers(cell) <= cell.consumer_registers - 24
    ]


FP8_TILE_NS = (64, 96, 128, 160, 192, 224)


def fp8_candidates(head_dim: int, causal: bool, tiles: list[tuple[int, int]] | None, schedulers: list[str]) -> list[Fa3FwdFp8Cell]:
    """As candidates, of q, k and v in e4m3."""
    key = DispatchKey("fa3", "fwd", "sm_90a", "e4m3", head_dim, causal=causal)
    table = FA3_FWD_FP8_TILES[head_dim, causal]
    cells = [
        Fa3FwdFp8Cell(key, replace(fa3_fwd_fp8_tile(tile_m, tile_n, q_stages, table.swizzle_bytes, scheduler), own_overlap=own_overlap))
        for tile_m, tile_n in tiles or product(REGISTER_SPLITS, FP8_TILE_NS)
        for scheduler in schedulers
        for q_stages in (1, 2)
        for own_overlap in (False, True)
    ]
    return [
        cell for cell in cells if cell.smem_bytes <= limits_of(cell.arch).smem_bytes and fa3_registers(cell) <= cell.consumer_registers - 8
    ]


FA2_TILE_NS = (32, 48, 64, 80, 96, 128)
FA2_SPARE_REGISTERS = 40  # besides S, O and Q: operands, addresses, the rows' origins and sums


def fa2_candidates(arch: str, head_dim: int, causal: bool, tiles: list[tuple[int, ...]] | None) -> list[Fa2FwdCell]:
    """Every tile (of `tiles`, (warps, warp_rows, tile_n), or of the grid) that fits, with every number of CTAs that leaves it registers."""
    key = DispatchKey("fa2", "fwd", arch, "bf16", head_dim, causal=causal)
    grid = ((warps, rows, tile_n) for warps in (4, 8) for rows in (16, 32) for tile_n in FA2_TILE_NS)
    cells = [
        Fa2FwdCell(key, Fa2FwdTile(warps, rows, tile_n, ctas_per_sm, q_in_registers))
        for warps, rows, tile_n in tiles or grid
        for ctas_per_sm in (1, 2, 3, 4)
        for q_in_registers in (False, True)
    ]
    fitting = [cell for cell in cells if not cell.misfits() and cell.smem_bytes <= limits_of(arch).smem_bytes]
    # Fewer than eight warps leave a multiprocessor's four schedulers with nothing to do while one waits.
    return [
        cell
        for cell in fitting
        if cell.accumulator_registers + FA2_SPARE_REGISTERS <= cell.register_limit and cell.tile.warps * cell.ctas_per_sm >= 8
    ]


def registers(cell: Cell) -> tuple[int, int]:
    """Registers of S, P and O in a thread that multiplies, and those it has."""
    if isinstance(cell, Fa2FwdCell):
        return cell.accumulator_registers, cell.register_limit
    assert isinstance(cell, Fa3FwdCell)
    return fa3_registers(cell), cell.consumer_registers


def fa3_registers(cell: Fa3FwdCell) -> int:
    p_words = cell.tile_n * cell.element_bytes // 8
    return cell.tile_n // 2 + p_words * (1 + cell.has_own_overlap) + cell.head_dim // 2


def useful_share(cell: Cell, seqlen: int) -> float:
    """Matrix products inside the problem over matrix products issued."""
    tile_m, tile_n, causal = cell.tile_m, cell.tile_n, cell.is_causal
    blocks = 0
    for first in range(0, seqlen, tile_m):
        end = min(seqlen, first + tile_m) if causal else seqlen
        blocks += -(-end // tile_n)
    useful = seqlen * (seqlen + 1) / 2 if causal else seqlen * seqlen
    return useful / (blocks * tile_m * tile_n)


def label(cell: Cell) -> str:
    if isinstance(cell, Fa2FwdCell):
        tile = cell.tile
        return f"{tile.warps}x{tile.warp_rows}x{tile.tile_n} ctas{tile.ctas_per_sm}" + " q" * tile.q_in_registers
    assert isinstance(cell, Fa3FwdCell)
    return f"{cell.tile_m}x{cell.tile_n} {cell.tile.scheduler} q{cell.q_stages}" + " own" * cell.has_own_overlap


def launchers(built: list[tuple[Cell, Kernel]], point: Point, peers: dict[str, Prepare]) -> dict[str, Any]:
    """What to time on one problem, by label."""
    import torch

    from cutlass_fa.arrays import library_of
    from cutlass_fa.launches import forward_plan
    from cutlass_fa.problem import Problem
    from cutlass_fa.request_parts import Window

    device = TorchDevice(torch)
    q, k, v = (device.normal(point.q_shape, point.dtype) for _ in range(3))
    out = device.empty_out(q)
    library = library_of(type(q))
    key = built[0][0].key
    problem = Problem.from_specs(*map(library.spec, (q, k, v, out)), arch=key.arch, family=key.family, mask=Window(-1, -1, point.causal))
    lse = torch.empty((point.batch, point.num_heads_q, point.seqlen), device="cuda")
    pointers = (q.data_ptr(), k.data_ptr(), v.data_ptr())

    def ours(kernel: Kernel) -> Any:
        plan = forward_plan(problem, kernel)
        # the default argument keeps the arrays alive as long as their addresses are used
        return lambda _keep=(q, k, v, out): plan.run(pointers, out.data_ptr(), lse.data_ptr(), torch.cuda.current_stream().cuda_stream)

    runs = {label(cell): ours(kernel) for cell, kernel in built}
    return runs | {name: prepare(Inputs(q, k, v, point.causal)) for name, prepare in peers.items()}


def compiled(cells: list[Cell], pool: ProcessPoolExecutor) -> list[tuple[Cell, Kernel]]:
    """The candidates that the compiler neither spills nor serialises."""
    pairs = zip(cells, pool.map(load_or_compile, cells), strict=True)
    return [(cell, kernel) for cell, kernel in pairs if kernel.cubin.spill_bytes == 0 and not kernel.cubin.warnings]


def sweep(head_dim: int, causal: bool, arguments: argparse.Namespace, peers: dict[str, Prepare], pool: ProcessPoolExecutor) -> None:
    cells: list[Cell] = []
    if arguments.family == "fa2":
        cells += fa2_candidates(arguments.arch, head_dim, causal, arguments.tiles)
    else:
        of_dtype = fp8_candidates if arguments.dtype == "e4m3" else candidates
        cells += of_dtype(head_dim, causal, arguments.tiles, arguments.schedulers)
    built = compiled(cells, pool)
    if arguments.compile_only:
        print(f"head_dim {head_dim} {'causal' if causal else 'full'}: {', '.join(label(cell) for cell, _ in built)}", flush=True)
        return
    import torch

    timings = TorchDevice(torch).timings
    seqlens: list[int] = arguments.seqlens
    rates: dict[str, list[float]] = {}
    for seqlen in seqlens:
        point = Point(arguments.dtype, head_dim, seqlen, causal)
        for name, ms in interleaved_medians(launchers(built, point, peers), timings, arguments.rounds, 5).items():
            rates.setdefault(name, []).append(point.row(name, ms).tflops or 0.0)
    report(built, rates, seqlens)


def report(built: list[tuple[Cell, Kernel]], rates: dict[str, list[float]], seqlens: list[int]) -> None:
    """Best first; a line that has no prediction is a peer's."""
    by_label = {label(cell): (cell, kernel) for cell, kernel in built}
    key = built[0][0].key
    mask = "causal" if key.causal else "full"
    in_table = label(Cell.of(key))
    print(f"== head_dim {key.head_dim} {mask}: TFLOP/s at {seqlens}; S+P+O registers, registers at launch, smem KB, useful share")
    for name in sorted(rates, key=lambda name: -statistics.geometric_mean(rates[name])):
        measured = " ".join(f"{rate:6.1f}" for rate in rates[name])
        if name not in by_label:
            print(f"{name:24} {measured}")
            continue
        cell, kernel = by_label[name]
        share = " ".join(f"{useful_share(cell, seqlen):.3f}" for seqlen in seqlens)
        needed, available = registers(cell)
        mark = "  <- table" if name == in_table else ""
        print(f"{name:24} {measured}   {needed}/{available} {kernel.cubin.registers} {cell.smem_bytes // 1024} {share}{mark}", flush=True)


def peers_of(arguments: argparse.Namespace) -> dict[str, Prepare]:
    """What is timed beside the candidates: FlashAttention-3 where its library is given, PyTorch's flash attention beside family fa2."""
    if arguments.compile_only:
        return {}
    import torch

    found = TorchDevice(torch).peers(Path(arguments.fa3_library) if arguments.fa3_library else None)
    wanted = ["fa3"] * bool(arguments.fa3_library) + ["fa2"] * (arguments.family == "fa2")
    return {name: found[name] for name in wanted}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--family", choices=("fa3", "fa2"), default="fa3")
    parser.add_argument("--dtype", choices=("bf16", "e4m3"), default="bf16", help="e4m3 is of family fa3; give --head-dims without 80")
    parser.add_argument("--arch", default="sm_90a", help="of family fa2's candidates (default: sm_90a)")
    parser.add_argument("--head-dims", default=[64, 80, 96, 128, 192, 256], type=lambda text: [int(part) for part in text.split(",")])
    parser.add_argument("--causal", choices=("full", "causal", "both"), default="both")
    parser.add_argument("--seqlens", default=[1024, 4096, 16384], type=lambda text: [int(part) for part in text.split(",")])
    parser.add_argument(
        "--tiles",
        type=lambda text: [tuple(map(int, part.split("x"))) for part in text.split(",")],
        help="tile_m x tile_n of family fa3, warps x rows x tile_n of fa2",
    )
    parser.add_argument("--schedulers", default=["static", "dynamic"], type=lambda text: text.split(","))
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--fa3-library")
    parser.add_argument("--jobs", type=int, default=8, help="processes that compile")
    parser.add_argument("--compile-only", action="store_true", help="fill the cache and say what is left to time; needs no GPU")
    arguments = parser.parse_args()
    peers = peers_of(arguments)
    import multiprocessing

    with ProcessPoolExecutor(arguments.jobs, mp_context=multiprocessing.get_context("spawn")) as pool:
        for head_dim in arguments.head_dims:
            for causal in {"full": (False,), "causal": (True,), "both": (False, True)}[arguments.causal]:
                sweep(head_dim, causal, arguments, peers, pool)


if __name__ == "__main__":
    main()
