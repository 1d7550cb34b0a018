"""The list of the blocks of packed sequences, which the kernels that work on them take their tiles from."""

from __future__ import annotations

from dataclasses import dataclass

from ..cell import Cell
from ..dispatch import DispatchKey
from ..params import ParamField

_BUCKETS = 256  # two numbers each
LIST_HEADER = 2  # numbers before the blocks, each of which takes two


@dataclass(frozen=True)
class SequenceTilesCell(Cell):
    """One CTA that looks at all sequences; the sizes of blocks, and what they see, are runtime numbers."""

    template = "common/sequence_tiles.cu.j2"
    entry = "flash_sequence_tiles"

    @classmethod
    def for_key(cls, key: DispatchKey) -> SequenceTilesCell:
        return cls(key)

    def misfits(self) -> list[str]:
        return []

    @property
    def summary(self) -> str:
        return f"{self.threads} threads, smem {self.smem_bytes} B"

    @property
    def tile_m(self) -> int:
        """0: it computes no tile."""
        return 0

    @property
    def threads(self) -> int:
        return 1024

    @property
    def smem_bytes(self) -> int:
        return 2 * 4 * _BUCKETS

    @property
    def params(self) -> tuple[ParamField, ...]:
        sequences = tuple(
            ParamField(f"{name}_{side}", "int*", meaning)
            for side in ("rows", "columns")
            for name, meaning in (
                ("cu_seqlens", "(batch + 1,) first rows and the end"),
                ("seqused", "(batch,) rows that are used, or null"),
            )
        )
        return (
            ParamField("tile_list", "int*", "(2 + 2 * capacity,) how many blocks, then (sequence, block) of each"),
            *sequences,
            ParamField("batch", "int", "sequences"),
            ParamField("total_rows", "int", "rows of all sequences; blocks are of rows"),
            ParamField("total_columns", "int", "columns of all sequences"),
            ParamField("block_rows", "int", "rows of a block"),
            ParamField("block_columns", "int", "columns that count as one piece of work"),
            ParamField("left", "int", "columns before a row's position that it sees"),
            ParamField("right", "int", "columns after a row's position that it sees"),
            ParamField("capacity", "int", "blocks that the list has room for"),
        )
