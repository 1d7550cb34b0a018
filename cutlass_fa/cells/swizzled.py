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
    def gqa_ratio(self) -> int:
        return self.key.gqa_ratio

    @property
    def queries_per_tile(self) -> int:
        """Queries of one tile: its rows, divided among the heads that are packed into them."""
        return self.tile_m // self.gqa_ratio

    @property
    def work_heads(self) -> str:
        """The Params field that counts the heads of the work list."""
        return "num_heads_kv" if self.is_packed else "num_heads_q"

    @property
    def has_row_bias(self) -> bool:
        """Whether each row has a bias of its own: where it may have a slope of its own, and on a cache, where rows must not depend on those
        beside them, so that a prompt in chunks gives the bits of one pass."""
        return self.has_alibi and (self.is_packed or self.is_paged)

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
