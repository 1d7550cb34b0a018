"""Forwards that divide the keys of a tile among CTAs: how many CTAs, and where the parts of results lie between them."""

from __future__ import annotations

from dataclasses import dataclass

from ..cells.fa3_fwd import Fa3FwdCell
from ..device import DeviceInfo
from ..errors import InvalidArgument
from ..launch import MAX_TILES
from ..problem import Problem
from ..requests import PersistentMode
from .sequence_tiles import capacity

_FLOAT_BYTES = 4


def num_splits_of(problem: Problem, cell: Fa3FwdCell) -> int:
    """Parts of a tile at most, 0: as CTAs' shares divide it."""
    return min(problem.request.num_splits, _blocks_of_tile(problem, cell))


def blocks_at_most(problem: Problem, cell: Fa3FwdCell) -> int:
    """Blocks of keys of all tiles. Raises InvalidArgument where a 32-bit number does not count them."""
    tiles = capacity(problem.request, "q", cell.queries_per_tile) * (problem.request.num_heads_q // cell.gqa_ratio)
    blocks = tiles * _blocks_of_tile(problem, cell)
    if blocks > MAX_TILES:
        raise InvalidArgument(
            f"{tiles} tiles of queries * {_blocks_of_tile(problem, cell)} blocks of keys: CTAs share at most {MAX_TILES}; "
            "pass num_splits=1, or divide the batch"
        )
    return blocks


def _blocks_of_tile(problem: Problem, cell: Fa3FwdCell) -> int:
    return -(-problem.request.seqlen_k // cell.tile_n)


def split_grid(problem: Problem, cell: Fa3FwdCell, mode: PersistentMode, device: DeviceInfo) -> int:
    """CTAs, each of which has an equal share of all blocks: one for each multiprocessor, and never more than there may be blocks."""
    return min(blocks_at_most(problem, cell), mode.num_sms or device.num_sms)


@dataclass(frozen=True)
class PartsWorkspace:
    """Two arrays in one workspace: part_o (places, the cell's head_dim), then part_rows (places, 2), float32.

    places: rows of parts. With a fixed number of parts those of q as many times; else two tiles a CTA: of a tile that it goes on with
    and of one that it begins."""

    places: int
    head_dim: int

    @classmethod
    def of(cls, problem: Problem, cell: Fa3FwdCell, grid: int) -> PartsWorkspace:
        """The workspace of a launch of `grid` CTAs."""
        num_splits, request = num_splits_of(problem, cell), problem.request
        places = num_splits * request.rows_q * request.num_heads_q if num_splits else 2 * grid * cell.tile_m
        return cls(places, cell.head_dim)

    @property
    def floats(self) -> int:
        return self.places * (self.head_dim + 2)

    @property
    def part_rows_bytes(self) -> int:
        """Where part_rows begins."""
        return self.places * self.head_dim * _FLOAT_BYTES
