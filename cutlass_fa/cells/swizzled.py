"""What the forwards share, whose tiles of Q, K and V lie swizzled in shared memory."""

from __future__ import annotations

from abc import abstractmethod
from dataclasses import dataclass
from functools import cached_property

from ..cell import Cell
from ..layouts import SwizzledTile


@dataclass(frozen=True)
class SwizzledCell(Cell):
    """One kernel with swizzled tiles, Q's of tile_m rows, K's and V's of tile_n."""

    @property
    @abstractmethod
    def swizzle_bytes(self) -> int:
        """Width of a chunk, within which 16-byte units are swizzled."""

    @property
    def element_bytes(self) -> int:
        """Of q, k and v."""
        return 2

    @cached_property
    def q_tile(self) -> SwizzledTile:
        return SwizzledTile(self.tile_m, self.head_dim, self.swizzle_bytes, self.element_bytes)

    @cached_property
    def kv_tile(self) -> SwizzledTile:
        return SwizzledTile(self.tile_n, self.head_dim, self.swizzle_bytes, self.element_bytes)

    @property
    def out_element(self) -> str:
        """The C type of what is written to out."""
        return "float" if self.has_float_out else "Element"

    @property
    def chunk_columns(self) -> int:
        return self.q_tile.chunk_cols

    @property
    def chunks(self) -> int:
        return self.q_tile.num_chunks
