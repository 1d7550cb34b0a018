"""The fa3 forward of 8-bit q, k and v: what differs from that of 16 bits."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property

from ..cell import round_up
from ..extras import DESCALE_BLOCK
from ..layouts import SwizzledTile
from .fa3_fwd import Fa3FwdCell

_ELEMENTS = {"e4m3": "float8_e4m3", "e5m2": "float8_e5m2"}
TRANSPOSED_SWIZZLE_BYTES = 32  # kTransposedSwizzleBytes
TRANSPOSERS = 2  # warps of the producer's warpgroup: the first loads, the second schedules packed sequences


@dataclass(frozen=True)
class Fa3FwdFp8Cell(Fa3FwdCell):
    """One fa3 forward kernel of 8-bit numbers. Blocks of V land in a ring of their own, v_rows, and two warps of the producer's warpgroup
    transpose them into the ring that the consumers read."""

    def misfits(self) -> list[str]:
        checks = (
            (self.head_dim % (self.slice_columns or self.head_dim) != 0, f"slices of {self.slice_columns} columns"),
            (
                self.has_block_descale and DESCALE_BLOCK % self.tile_n != 0,
                f"tile_n {self.tile_n}: a block of factors has {DESCALE_BLOCK} keys",
            ),
        )
        return super().misfits() + [reason for refused, reason in checks if refused]

    @property
    def element_bytes(self) -> int:
        return 1

    # ---- types -------------------------------------------------------------------------------------------------------------------

    @property
    def element(self) -> str:
        """Of the output."""
        return "float16" if self.key.half_out else "bfloat16"

    @property
    def qk_element(self) -> str:
        return _ELEMENTS[self.key.dtype]

    @property
    def v_element(self) -> str:
        return _ELEMENTS[self.key.v_dtype]

    # ---- shared memory -----------------------------------------------------------------------------------------------------------

    @cached_property
    def vt_tile(self) -> SwizzledTile:
        """V^T of a block: a row for each column of V, in column_order; keys in kv_order."""
        return SwizzledTile(self.head_dim, self.tile_n, TRANSPOSED_SWIZZLE_BYTES, 1)

    @property
    def vt_bytes(self) -> int:
        return self.vt_tile.size_bytes

    @property
    def transposers(self) -> int:
        return TRANSPOSERS

    @property
    def smem_bytes(self) -> int:
        """sizeof(SharedStorage): the rings of Q, K, V and V^T, their mbarriers, a word for each stage and the tile queue."""
        queue_bytes = (56 if self.is_varlen else 24) * self.has_queue
        blocks = 2 * round_up(self.kv_tile.size_bytes, 1024) + round_up(self.vt_bytes, 1024)
        data = self.q_stages * round_up(self.q_tile.size_bytes, 1024) + self.stages * blocks
        return round_up(data + 8 * (2 * self.q_stages + 6 * self.stages) + round_up(4 * self.stages, 8) + queue_bytes, 1024)

    @property
    def v_descriptor(self) -> str:
        return f"{self.vt_tile.k_major_descriptor().bits:#018x}ull"

    @property
    def v_step_bytes(self) -> int:
        return self.vt_tile.k_major_step_bytes(1)

    # ---- what the templates call things ------------------------------------------------------------------------------------------

    @property
    def v_ring(self) -> str:
        return "v_rows"

    @property
    def online_softmax(self) -> str:
        return "softmax_in_units" if self.has_block_descale else "online_softmax_fp8"

    @property
    def pv_target(self) -> str:
        return "part_o" if self.has_precise else "acc_o"

    @property
    def tile_params(self) -> str:
        return "tile_params" if self.has_tile_params else "params"

    @property
    def tile_params_value(self) -> str:
        """What a tile's own arguments are made from."""
        return "descaled(params, tile)"

    @property
    def descale_block(self) -> int:
        return DESCALE_BLOCK

    @property
    def slice_columns(self) -> int:
        """Columns of V whose products are added up at once where sums are precise."""
        return self.tile.slice_columns

    @property
    def slice_bytes(self) -> int:
        return self.slice_columns * TRANSPOSED_SWIZZLE_BYTES

    @property
    def p_words(self) -> str:
        return "kTileN / 8"

    @property
    def used_row(self) -> str:
        """Whether a row that is written has queries; of packed sequences not all have."""
        return "is_used" if self.is_varlen else "true"

    # ---- named booleans ----------------------------------------------------------------------------------------------------------

    @property
    def has_traded_columns(self) -> bool:
        """Not here: a thread has four neighbours of every 16 columns."""
        return False

    @property
    def has_short_sinks(self) -> bool:
        """Sink tokens come in whole blocks: a product of 8-bit numbers sums over 32 keys, and V is transposed in whole blocks."""
        return False

    @property
    def has_row_bias(self) -> bool:
        """The softmax, which has the largest score of every block looked for, adds no bias: scores have it before."""
        return self.has_alibi
