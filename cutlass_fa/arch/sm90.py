"""Hopper (sm_90a): limits and the tile table of the fa3 forward.

Tiles are data: FlashAttention-3's table was the start, tools/sweep_tiles.py the judge.
"""

from __future__ import annotations

from dataclasses import dataclass

MAX_SMEM_BYTES = 232448  # dynamic shared memory one CTA may ask for (227 KiB)
REGISTERS_PER_SM = 65536


@dataclass(frozen=True)
class Fa3FwdTile:
    """One row: tile_m query rows x tile_n keys, `stages` key blocks in flight, q_stages tiles of Q, registers per thread of each role.

    swizzle_bytes is the width of a shared-memory chunk: 128 unless head_dim is not a multiple of 64.
    scheduler: "static" CTAs walk the work list side by side; "dynamic" ones take tiles from a counter.
    """

    tile_m: int
    tile_n: int
    producer_registers: int
    consumer_registers: int
    scheduler: str
    stages: int = 2
    q_stages: int = 1
    swizzle_bytes: int = 128


def _two(tile_n: int, scheduler: str, q_stages: int = 1) -> Fa3FwdTile:
    """Two consumer warpgroups: 128 query rows. The producer needs 40 registers: at 24 its tile decoding spills."""
    return Fa3FwdTile(128, tile_n, producer_registers=40, consumer_registers=232, scheduler=scheduler, q_stages=q_stages)


def _three(tile_n: int, scheduler: str, swizzle_bytes: int = 128) -> Fa3FwdTile:
    """Three consumer warpgroups: 192 query rows, each thread with fewer registers. Shared memory has room for two tiles of Q."""
    registers = {"producer_registers": 32, "consumer_registers": 160}
    return Fa3FwdTile(192, tile_n, scheduler=scheduler, swizzle_bytes=swizzle_bytes, q_stages=2, **registers)


# (head_dim, causal) -> tile. Chosen on an H100 80GB HBM3 (driver 580.159, NVRTC 13.0, bf16, 16k tokens, seqlen 1k, 4k and 16k), by the
# geometric mean of the three; benchmarks/experiments.json has the candidates. Consumers taking turns at the tensor cores won or drew for
# every tile, so every cell does it.
FA3_FWD_TILES: dict[tuple[int, bool], Fa3FwdTile] = {
    (64, False): _three(128, "dynamic"),
    (64, True): _three(128, "dynamic"),
    (80, False): _three(112, "dynamic", swizzle_bytes=64),
    (80, True): _three(96, "dynamic", swizzle_bytes=64),
    (96, False): _three(112, "static", swizzle_bytes=64),
    (96, True): _three(112, "dynamic", swizzle_bytes=64),
    (128, False): _two(128, "static", q_stages=2),
    (128, True): _two(128, "dynamic", q_stages=2),
    (192, False): _two(80, "dynamic", q_stages=2),
    (192, True): _two(96, "dynamic"),
    (256, False): _two(80, "dynamic"),
    (256, True): _two(64, "dynamic"),
}
