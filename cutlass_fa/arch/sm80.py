"""The kernels of sm_80's instructions (family fa2): their tile tables, on every architecture."""

from __future__ import annotations

from collections.abc import Set
from dataclasses import dataclass, replace
from typing import TypeAlias

from .limits import table_arch


@dataclass(frozen=True)
class Fa2FwdTile:
    """One row: `warps` warps of warp_rows query rows each, tile_n keys, `stages` key blocks in shared memory.

    warp_rows: 32 lets every fragment of K and V serve two products; where head_dim is so large that 32 rows of O overflow a thread's
    registers, 16. ctas_per_sm: CTAs that registers and shared memory must leave room for; one computes its softmax while another
    multiplies. q_in_registers: Q is loaded from shared memory once and not for every key block.
    """

    warps: int
    warp_rows: int
    tile_n: int
    ctas_per_sm: int
    q_in_registers: bool = False
    stages: int = 2

    @property
    def tile_m(self) -> int:
        """Query rows of a CTA's tile."""
        return self.warps * self.warp_rows


def fa2_fwd_tile(arch: str, head_dim: int, *, causal: bool, features: Set[str] = frozenset(), packed: bool = False) -> Fa2FwdTile:
    """The row of an architecture, or of the nearest older one that has a table. features: presence flags of dispatch.py. packed: whether
    the rows are of several query heads, which only short queries have; on a cache their blocks have as many keys as those of single heads,
    since a row's sums go by blocks: a prompt's short chunks then give the bits that one pass gives."""
    table = _TABLES[table_arch(arch)]
    if packed and "paged" not in features:
        return table.packed[head_dim]
    single = next(
        (rows[head_dim] for needed, rows in table.cramped if features >= set(needed.split()) and head_dim in rows),
        table.tiles[head_dim, causal],
    )
    return replace(table.packed[head_dim], tile_n=single.tile_n) if packed else single


_Rows: TypeAlias = tuple[tuple[str, dict[int, Fa2FwdTile]], ...]


@dataclass(frozen=True)
class _Table:
    """tiles: (head_dim, causal) -> tile. cramped: features and their rows, head_dim -> tile, where the features' registers leave no room
    for that one; the first that a cell has all of counts. packed: head_dim -> tile of packed query heads, 64 rows in all."""

    tiles: dict[tuple[int, bool], Fa2FwdTile]
    cramped: _Rows
    packed: dict[int, Fa2FwdTile]


def _both(rows: dict[int, Fa2FwdTile]) -> dict[tuple[int, bool], Fa2FwdTile]:
    """The same tile with and without a causal mask."""
    return {(head_dim, causal): tile for head_dim, tile in rows.items() for causal in (False, True)}


# Hopper's rows for head_dim 64, 128 and 256 were chosen on an H100 80GB HBM3 (driver 580.159, NVRTC 13.0, bf16, seqlen 4k and 16k;
# benchmarks/experiments.json has the candidates). The others are the largest tiles that fit without spills and have not been compared on
# a GPU: tools/sweep_tiles.py --family fa2 times candidates.
# A decoding step's rows, one to eight times the ratio, fill one warp of 16 or two: the memory's rate is what counts, and several CTAs to a
# multiprocessor keep it busy. Not timed.
_PACKED = {
    64: Fa2FwdTile(4, 16, 64, 2, q_in_registers=True, stages=3),
    80: Fa2FwdTile(4, 16, 64, 2, q_in_registers=True),
    96: Fa2FwdTile(4, 16, 64, 2, q_in_registers=True),
    128: Fa2FwdTile(4, 16, 64, 2, q_in_registers=True),
    192: Fa2FwdTile(4, 16, 32, 2),
    256: Fa2FwdTile(4, 16, 32, 1),
}
_PACKED_SMALL = {
    64: Fa2FwdTile(4, 16, 64, 2, q_in_registers=True),
    80: Fa2FwdTile(4, 16, 32, 2, q_in_registers=True),
    96: Fa2FwdTile(4, 16, 32, 2, q_in_registers=True),
    128: Fa2FwdTile(4, 16, 32, 2, q_in_registers=True),
    192: Fa2FwdTile(4, 16, 32, 1),
    256: Fa2FwdTile(4, 16, 32, 1),
}
# A cache's pages take registers of the whole tile, and its keys' columns may come 32 or 64 keys at a time. Not timed.
_PAGED_ALIBI: dict[int, Fa2FwdTile] = {64: Fa2FwdTile(4, 32, 32, 2)}
_PAGED_TILES: dict[int, Fa2FwdTile] = {
    64: Fa2FwdTile(4, 32, 64, 2),
    80: Fa2FwdTile(4, 32, 32, 2),
    96: Fa2FwdTile(4, 32, 32, 2),
    128: Fa2FwdTile(8, 16, 64, 1),
    192: Fa2FwdTile(8, 16, 32, 1),
    256: Fa2FwdTile(8, 16, 32, 1),
}
_TOKENS_INNER: dict[int, Fa2FwdTile] = {192: Fa2FwdTile(4, 16, 32, 1), 256: Fa2FwdTile(4, 16, 32, 1)}
_PAGED_FIRST: _Rows = (("k_tokens_inner", _TOKENS_INNER), ("v_tokens_inner", _TOKENS_INNER), ("paged alibi", _PAGED_ALIBI))
_PAGED: _Rows = (*_PAGED_FIRST, ("paged", _PAGED_TILES))
_SMALL_TOKENS_INNER: dict[int, Fa2FwdTile] = {128: Fa2FwdTile(4, 16, 32, 1)}
_PAGED_SMALL: _Rows = (  # blocks of as many keys as packed heads have room for
    ("k_tokens_inner", _SMALL_TOKENS_INNER),
    ("v_tokens_inner", _SMALL_TOKENS_INNER),
    *_PAGED_FIRST,
    ("paged", {**_PAGED_TILES, 128: Fa2FwdTile(8, 16, 32, 1), 256: Fa2FwdTile(4, 16, 32, 1)}),
)
_HOPPER_DROPOUT: _Rows = (
    ("dropout sliding_window", {64: Fa2FwdTile(4, 32, 32, 2)}),
    (
        "dropout",
        {
            64: Fa2FwdTile(4, 32, 64, 2),
            80: Fa2FwdTile(4, 32, 32, 2),
            96: Fa2FwdTile(4, 32, 32, 2),
            128: Fa2FwdTile(8, 16, 64, 1),
            256: Fa2FwdTile(8, 16, 32, 1),
        },
    ),
)
_HOPPER_SOFTCAP: _Rows = (("softcap", {80: Fa2FwdTile(4, 32, 32, 2), 96: Fa2FwdTile(4, 32, 32, 2), 128: Fa2FwdTile(4, 32, 48, 2)}),)
_HOPPER = _Table(
    tiles=_both(
        {
            64: Fa2FwdTile(4, 32, 64, 2, q_in_registers=True, stages=3),
            80: Fa2FwdTile(4, 32, 64, 2),
            96: Fa2FwdTile(4, 32, 64, 2),
            128: Fa2FwdTile(4, 32, 64, 2),
            192: Fa2FwdTile(8, 16, 64, 1),
            256: Fa2FwdTile(8, 16, 64, 1),
        }
    ),
    cramped=(
        *_PAGED,
        *_HOPPER_DROPOUT,
        ("alibi sliding_window offset", {96: Fa2FwdTile(4, 32, 32, 2), 128: Fa2FwdTile(4, 32, 32, 2)}),
        ("alibi sliding_window", {128: Fa2FwdTile(4, 32, 32, 2)}),
        ("alibi", {128: Fa2FwdTile(4, 32, 48, 2)}),
        *_HOPPER_SOFTCAP,
    ),
    packed=_PACKED,
)
_BLACKWELL = _Table(  # tiles that spill where Hopper's do not
    tiles=_HOPPER.tiles | _both({128: Fa2FwdTile(4, 32, 48, 2)}),
    cramped=(
        *_PAGED,
        *_HOPPER_DROPOUT,
        ("alibi sliding_window", {96: Fa2FwdTile(4, 32, 32, 2), 128: Fa2FwdTile(8, 16, 64, 1)}),
        ("alibi", {128: Fa2FwdTile(4, 32, 32, 2)}),
        ("sliding_window", {64: Fa2FwdTile(4, 32, 64, 2), 128: Fa2FwdTile(4, 32, 32, 2)}),
        ("causal offset", {128: Fa2FwdTile(4, 32, 32, 2)}),
        *_HOPPER_SOFTCAP,
    ),
    packed=_PACKED,
)
_AMPERE = _Table(
    tiles=_both(
        {
            64: Fa2FwdTile(4, 32, 64, 2, q_in_registers=True),
            80: Fa2FwdTile(4, 32, 64, 2),
            96: Fa2FwdTile(4, 32, 64, 2),
            128: Fa2FwdTile(4, 32, 32, 2),
            192: Fa2FwdTile(8, 16, 64, 1),
            256: Fa2FwdTile(8, 16, 32, 1),
        }
    ),
    cramped=(
        *_PAGED,
        (
            "dropout",
            {
                64: Fa2FwdTile(4, 32, 64, 2),
                80: Fa2FwdTile(4, 32, 32, 2),
                96: Fa2FwdTile(4, 32, 32, 2),
                128: Fa2FwdTile(8, 16, 64, 1),
            },
        ),
        ("softcap", {80: Fa2FwdTile(4, 32, 32, 2), 96: Fa2FwdTile(4, 32, 32, 2)}),
    ),
    packed=_PACKED,
)
_SMALL = _Table(  # 99 KiB of shared memory
    tiles=_both(
        {
            64: Fa2FwdTile(4, 32, 64, 2, q_in_registers=True),
            80: Fa2FwdTile(4, 32, 32, 2),
            96: Fa2FwdTile(4, 32, 32, 2),
            128: Fa2FwdTile(8, 16, 32, 1),
            192: Fa2FwdTile(8, 16, 32, 1),
            256: Fa2FwdTile(4, 16, 32, 1),
        }
    ),
    cramped=(*_PAGED_SMALL, ("dropout", {64: Fa2FwdTile(4, 32, 64, 2)}), ("alibi sliding_window", {64: Fa2FwdTile(4, 32, 64, 2)})),
    packed=_PACKED_SMALL,
)
_TABLES: dict[str, _Table] = {
    "sm_80": _AMPERE,
    "sm_86": _SMALL,
    "sm_89": _SMALL,
    "sm_90a": _HOPPER,
    "sm_100": _BLACKWELL,
    "sm_120": _SMALL,
}
