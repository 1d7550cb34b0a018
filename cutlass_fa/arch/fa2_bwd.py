"""The tile table of the fa2 backward.

Tiles are data: the sizes that FlashAttention-2 publishes for each shared memory were the start; tools/sweep_backward.py compares others.
"""

from __future__ import annotations

from collections.abc import Set
from dataclasses import dataclass

from .limits import table_arch


@dataclass(frozen=True)
class Fa2BwdTile:
    """One row: blocks of tile_m queries x tile_n keys a CTA.

    q_stages, dout_stages: blocks of Q (at least 2) and of dO (1 or 2) in flight. score_stages: blocks of P and dS that are kept; with 2,
    one of the two groups of warps adds to dQ a block later than it could, and neither waits for the other.
    warps_n: warps of a group side by side along the keys: 4, or 2 that split the queries (and head_dim) in two halves.
    dq_warps_m: of the eight warps, how many share the queries of a block of dQ; the others share head_dim.
    """

    tile_m: int
    tile_n: int
    q_stages: int
    dout_stages: int
    score_stages: int
    warps_n: int
    dq_warps_m: int


_T = Fa2BwdTile

# By arch and head_dim. Those of sm_90a for head_dim 64, 128 and 256 were chosen on an H100 80GB HBM3 (driver 580.159, NVRTC 13.0, bf16,
# seqlen 4k and 16k; benchmarks/experiments.json has the candidates). The others have not been compared on a GPU.
FA2_BWD_TILES: dict[str, dict[int, Fa2BwdTile]] = {
    "sm_80": {  # 163 KiB
        64: _T(64, 128, 2, 2, 2, 4, 2),
        80: _T(64, 128, 2, 2, 1, 4, 4),
        96: _T(64, 128, 2, 2, 1, 4, 2),
        128: _T(64, 128, 2, 1, 1, 4, 2),
        192: _T(64, 64, 2, 1, 1, 2, 2),
        256: _T(32, 64, 2, 2, 1, 2, 2),
    },
    "sm_86": {  # 99 KiB
        64: _T(64, 128, 2, 1, 1, 4, 2),
        80: _T(64, 64, 2, 2, 1, 4, 4),
        96: _T(64, 64, 2, 2, 1, 4, 2),
        128: _T(32, 64, 2, 2, 1, 4, 2),
        192: _T(32, 64, 2, 1, 1, 2, 2),
        256: _T(32, 32, 2, 1, 1, 2, 2),
    },
    "sm_90a": {  # 227 KiB
        64: _T(64, 128, 2, 2, 2, 2, 2),
        80: _T(64, 128, 3, 2, 2, 4, 4),
        96: _T(64, 128, 3, 2, 2, 4, 2),
        128: _T(64, 128, 2, 2, 1, 4, 2),
        192: _T(64, 64, 2, 2, 2, 2, 2),
        256: _T(64, 64, 2, 2, 1, 2, 2),
    },
}
FA2_BWD_TILES["sm_89"] = FA2_BWD_TILES["sm_120"] = FA2_BWD_TILES["sm_86"]
FA2_BWD_TILES["sm_100"] = FA2_BWD_TILES["sm_90a"]

# Tiles of kernels that keep a second copy of P (softcap or dropout where warps_n is 2), where the table's leave no room for it.
FA2_BWD_OWN_P_TILES: dict[str, dict[int, Fa2BwdTile]] = {
    arch: {192: _T(32, 32, 2, 1, 1, 2, 2)} for arch in ("sm_86", "sm_89", "sm_120")
}  # fmt: skip


def fa2_bwd_tile(arch: str, head_dim: int, features: Set[str] = frozenset()) -> Fa2BwdTile:
    """The tile of a cell. features: presence flags of dispatch.py. tile_m and the order of dQ are the same for all of them, so that one
    preprocess and one convert serve."""
    known = table_arch(arch)
    tile = FA2_BWD_TILES[known][head_dim]
    return FA2_BWD_OWN_P_TILES.get(known, {}).get(head_dim, tile) if features & {"softcap", "dropout"} else tile
