"""The kernels of sm_80's instructions (family fa2): their tile tables, on every architecture."""

from __future__ import annotations

from dataclasses import dataclass

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


def fa2_fwd_tile(arch: str, head_dim: int, causal: bool) -> Fa2FwdTile:
    """The row of an architecture, or of the nearest older one that has a table."""
    return _TABLES[table_arch(arch)][head_dim, causal]


_Table = dict[tuple[int, bool], Fa2FwdTile]


def _both(rows: dict[int, Fa2FwdTile]) -> _Table:
    """The same tile with and without a causal mask."""
    return {(head_dim, causal): tile for head_dim, tile in rows.items() for causal in (False, True)}


# Rows that no GPU has timed yet: they follow from what fits. tools/sweep_tiles.py times candidates.
_HOPPER = _both(
    {
        64: Fa2FwdTile(4, 32, 64, 3),
        80: Fa2FwdTile(4, 32, 64, 2),
        96: Fa2FwdTile(4, 32, 64, 2),
        128: Fa2FwdTile(4, 32, 64, 2),
        192: Fa2FwdTile(8, 16, 64, 1),
        256: Fa2FwdTile(8, 16, 64, 1),
    }
)
_AMPERE = _both(
    {
        64: Fa2FwdTile(4, 32, 64, 3),
        80: Fa2FwdTile(4, 32, 64, 2),
        96: Fa2FwdTile(4, 32, 64, 2),
        128: Fa2FwdTile(4, 32, 32, 2),
        192: Fa2FwdTile(8, 16, 64, 1),
        256: Fa2FwdTile(8, 16, 32, 1),
    }
)
_SMALL = _both(  # 99 KiB
    {
        64: Fa2FwdTile(4, 32, 64, 2),
        80: Fa2FwdTile(4, 16, 32, 2),
        96: Fa2FwdTile(4, 16, 32, 2),
        128: Fa2FwdTile(4, 16, 32, 2),
        192: Fa2FwdTile(4, 16, 32, 1),
        256: Fa2FwdTile(4, 16, 32, 1),
    }
)
_TABLES: dict[str, _Table] = {
    "sm_80": _AMPERE,
    "sm_86": _SMALL,
    "sm_89": _SMALL,
    "sm_90a": _HOPPER,
    "sm_100": _HOPPER,
    "sm_120": _SMALL,
}
