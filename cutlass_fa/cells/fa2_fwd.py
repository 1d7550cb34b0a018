"""The forward by sm_80's instructions (mma.sync, ldmatrix, cp.async) of one key."""

from __future__ import annotations

from dataclasses import dataclass

from ..arch.limits import MAX_REGISTERS_PER_THREAD, REGISTERS_PER_SM, limits_of
from ..arch.sm80 import Fa2FwdTile, fa2_fwd_tile
from ..cell import round_up
from ..dispatch import DispatchKey
from ..params import ParamField, fa2_fwd_params
from .swizzled import SwizzledCell

MMA_ROWS = 16  # query rows, head_dim columns or keys of one mma's operand A; two blocks of its B
CTA_RESERVED_BYTES = 1 << 10  # shared memory that the system takes for each CTA


@dataclass(frozen=True)
class Fa2FwdCell(SwizzledCell):
    """One fa2 forward kernel: tile, shared-memory layouts and the named booleans that its template tests."""

    tile: Fa2FwdTile

    template = "sm80/fwd.cu.j2"
    entry = "flash_fwd"

    @classmethod
    def for_key(cls, key: DispatchKey) -> Fa2FwdCell:
        return cls(key, fa2_fwd_tile(key.arch, key.head_dim, causal=key.causal, features=key.features))

    def misfits(self) -> list[str]:
        tile, rows_per_pass = self.tile, self.threads * 16 // self.swizzle_bytes
        together = tile.ctas_per_sm * (self.smem_bytes + CTA_RESERVED_BYTES)
        available = limits_of(self.arch).sm_smem_bytes
        checks = (
            (tile.warp_rows % MMA_ROWS != 0, f"warp_rows {tile.warp_rows} is no multiple of {MMA_ROWS}"),
            (tile.tile_n % MMA_ROWS != 0, f"tile_n {tile.tile_n} is no multiple of {MMA_ROWS}"),
            (tile.tile_n % rows_per_pass != 0, f"tile_n {tile.tile_n} is no multiple of the {rows_per_pass} rows copied at a time"),
            (self.tile_m % rows_per_pass != 0, f"tile_m {self.tile_m} is no multiple of the {rows_per_pass} rows copied at a time"),
            (tile.stages < 2, f"{tile.stages} stages: one is read while another lands"),
            (together > available, f"{together} B of shared memory for {tile.ctas_per_sm} CTAs, {available} in a multiprocessor"),
            (self.accumulator_registers > self.register_limit, f"{self.accumulator_registers} registers of {self.register_limit}"),
        )
        return [reason for refused, reason in checks if refused]

    # ---- sizes -------------------------------------------------------------------------------------------------------------------

    @property
    def tile_m(self) -> int:
        return self.tile.warps * self.tile.warp_rows

    @property
    def tile_n(self) -> int:
        return self.tile.tile_n

    @property
    def stages(self) -> int:
        return self.tile.stages

    @property
    def warp_rows(self) -> int:
        return self.tile.warp_rows

    @property
    def ctas_per_sm(self) -> int:
        return self.tile.ctas_per_sm

    @property
    def threads(self) -> int:
        return 32 * self.tile.warps

    @property
    def work_heads(self) -> str:
        """The Params field that counts the heads of the work list."""
        return "num_heads_q"

    @property
    def tile_begin(self) -> str:
        """The first query of a causal cell's tile, row_of_tiles before the last."""
        return "(params.num_m_blocks - 1 - row_of_tiles) * kQueriesPerTile"

    @property
    def tiles_words(self) -> str:
        return "The first tile begins with query 0."

    @property
    def accumulator_registers(self) -> int:
        """Registers of O, S and a Q that stays."""
        kept_q = self.warp_rows * self.head_dim // 64 if self.has_q_in_registers else 0
        return self.warp_rows * (self.head_dim + self.tile_n) // 32 + kept_q

    @property
    def register_limit(self) -> int:
        """Registers a thread may have where ctas_per_sm CTAs share a multiprocessor."""
        return min(MAX_REGISTERS_PER_THREAD, REGISTERS_PER_SM // (self.ctas_per_sm * self.threads) // 8 * 8)

    # ---- shared memory -----------------------------------------------------------------------------------------------------------

    @property
    def swizzle_bytes(self) -> int:
        return 128 if self.head_dim % 64 == 0 else 64

    @property
    def smem_bytes(self) -> int:
        """sizeof(SharedStorage): Q and the rings of K and V, each tile at a multiple of 1024."""
        return round_up(self.q_tile.size_bytes, 1024) + 2 * round_up(self.stages * self.kv_tile.size_bytes, 1024)

    # ---- named booleans ----------------------------------------------------------------------------------------------------------

    @property
    def has_q_in_registers(self) -> bool:
        return self.tile.q_in_registers

    @property
    def has_q_in_shared_memory(self) -> bool:
        return not self.tile.q_in_registers

    @property
    def has_pointers_to_inputs(self) -> bool:
        """Whether Params has q, k and v."""
        return True

    # ---- Params ------------------------------------------------------------------------------------------------------------------

    @property
    def params(self) -> tuple[ParamField, ...]:
        return fa2_fwd_params(self.key)
