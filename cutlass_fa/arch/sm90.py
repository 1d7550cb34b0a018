"""Hopper (sm_90a): the tile table of the fa3 forward.

Tiles are data: FlashAttention-3's table was the start, tools/sweep_tiles.py the judge.
"""

from __future__ import annotations

from collections.abc import Set
from dataclasses import dataclass


@dataclass(frozen=True)
class Fa3FwdTile:
    """One row: tile_m query rows x tile_n keys, `stages` key blocks in flight, q_stages tiles of Q, registers per thread of each role.

    swizzle_bytes is the width of a shared-memory chunk: 128 unless head_dim is not a multiple of 64.
    scheduler: "static" CTAs walk the work list side by side; "dynamic" ones take tiles from a counter; "split" ones have equal shares.
    own_overlap: new probabilities get registers of their own, so that a warpgroup's P V runs during its softmax; else only other
    warpgroups' products do.
    """

    tile_m: int
    tile_n: int
    producer_registers: int
    consumer_registers: int
    scheduler: str
    stages: int = 2
    q_stages: int = 1
    swizzle_bytes: int = 128
    own_overlap: bool = False


# tile_m -> registers per thread of the producer and of a consumer. Two consumers leave the producer 40: at 24 its tile decoding spills.
REGISTER_SPLITS = {128: (40, 232), 192: (32, 160)}


def fa3_fwd_tile(
    tile_m: int, tile_n: int, scheduler: str, q_stages: int, swizzle_bytes: int = 128, own_overlap: bool = False
) -> Fa3FwdTile:
    """A row with the register split of its height."""
    producer, consumer = REGISTER_SPLITS[tile_m]
    return Fa3FwdTile(tile_m, tile_n, producer, consumer, scheduler, 2, q_stages, swizzle_bytes, own_overlap)


# (head_dim, uneven) -> tile. uneven: rows see different keys, under a causal mask, which was timed, or a window, which was not. Chosen
# on an H100 80GB HBM3 (driver 580.159, NVRTC 13.0, bf16, 16k tokens, seqlen 1k, 4k and 16k), by the geometric mean of the three;
# benchmarks/experiments.json has the candidates. Consumers taking turns at the tensor cores won or drew for every tile, so every cell does
# it.
FA3_FWD_TILES: dict[tuple[int, bool], Fa3FwdTile] = {
    (64, False): fa3_fwd_tile(192, 128, "dynamic", q_stages=2),
    (64, True): fa3_fwd_tile(192, 128, "dynamic", q_stages=2),
    (80, False): fa3_fwd_tile(192, 112, "dynamic", q_stages=2, swizzle_bytes=64),
    (80, True): fa3_fwd_tile(192, 96, "dynamic", q_stages=2, swizzle_bytes=64),
    (96, False): fa3_fwd_tile(192, 112, "dynamic", q_stages=2, swizzle_bytes=64),
    (96, True): fa3_fwd_tile(192, 96, "dynamic", q_stages=2, swizzle_bytes=64),
    (128, False): fa3_fwd_tile(128, 128, "static", q_stages=2, own_overlap=True),
    (128, True): fa3_fwd_tile(128, 128, "dynamic", q_stages=2, own_overlap=True),
    (192, False): fa3_fwd_tile(128, 80, "dynamic", q_stages=2),
    (192, True): fa3_fwd_tile(128, 96, "dynamic", q_stages=1),
    (256, False): fa3_fwd_tile(128, 64, "static", q_stages=1),
    (256, True): fa3_fwd_tile(128, 64, "dynamic", q_stages=1),
}


# head_dim -> tile of a paged cache's cells: blocks of a power of two keys, so that pages fill them or hold several. Not timed.
PAGED_FA3_FWD_TILES: dict[int, Fa3FwdTile] = {
    64: fa3_fwd_tile(192, 128, "dynamic", q_stages=2),
    80: fa3_fwd_tile(128, 128, "dynamic", q_stages=2, swizzle_bytes=64),
    96: fa3_fwd_tile(128, 128, "dynamic", q_stages=2, swizzle_bytes=64),
    128: fa3_fwd_tile(128, 128, "dynamic", q_stages=2, own_overlap=True),
    192: fa3_fwd_tile(128, 64, "dynamic", q_stages=1),
    256: fa3_fwd_tile(128, 64, "dynamic", q_stages=1),
}


def split_tile(tile_n: int, stages: int, q_stages: int, swizzle_bytes: int = 128) -> Fa3FwdTile:
    """A row of one consumer, whose registers nobody need give up, and as many stages as fit: what counts is bytes on their way."""
    return Fa3FwdTile(64, tile_n, 256, 256, "split", stages, q_stages, swizzle_bytes)


# head_dim -> tile of the cells that divide a tile's keys among CTAs, for few rows of queries. Not timed.
SPLIT_FA3_FWD_TILES: dict[int, Fa3FwdTile] = {
    64: split_tile(128, stages=6, q_stages=2),
    80: split_tile(128, stages=4, q_stages=2, swizzle_bytes=64),
    96: split_tile(128, stages=4, q_stages=2, swizzle_bytes=64),
    128: split_tile(128, stages=3, q_stages=2),
    192: split_tile(64, stages=4, q_stages=1),
    256: split_tile(64, stages=3, q_stages=1),
}


def fa3_fwd_tile_of(head_dim: int, features: Set[str]) -> Fa3FwdTile:
    """The row of a cell. features: presence flags of dispatch.py."""
    if "split" in features:
        return SPLIT_FA3_FWD_TILES[head_dim]
    if "paged" in features:
        return PAGED_FA3_FWD_TILES[head_dim]
    return FA3_FWD_TILES[head_dim, bool(features & {"causal", "sliding_window"})]
