"""Cell: everything a template needs to know about one kernel, as a pure function of its DispatchKey."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property

from .arch.sm90 import FA3_FWD_TILES, MAX_SMEM_BYTES, REGISTERS_PER_SM, Fa3FwdTile
from .dispatch import DISPATCH_TABLE, DispatchKey
from .layouts import SwizzledTile
from .params import ParamField, fa3_fwd_params, params_dtype

WARPGROUP_THREADS = 128
MMA_K = 16  # columns (or keys) one 16-bit wgmma consumes
_ELEMENTS = {"bf16": "bfloat16", "f16": "float16"}


@dataclass(frozen=True)
class Cell:
    """One fa3 forward kernel: tile, stages, registers, shared-memory layouts and the named booleans that templates test."""

    key: DispatchKey
    tile: Fa3FwdTile

    template = "sm90/fwd.cu.j2"
    entry = "flash_fwd"

    @classmethod
    def of(cls, key: DispatchKey) -> Cell:
        """The cell that serves `key`. Raises UnsupportedCell with every reason when there is none."""
        DISPATCH_TABLE.lookup(key)
        cell = cls(key, FA3_FWD_TILES[key.head_dim, key.causal])
        cell.check_limits()
        return cell

    def check_limits(self) -> None:
        """A tile table row must fit the machine; a row that does not is a defect of the table."""
        registers = WARPGROUP_THREADS * (self.tile.producer_registers + self.consumers * self.tile.consumer_registers)
        if self.tile.tile_m % 64 or self.tile.tile_n % MMA_K or self.smem_bytes > MAX_SMEM_BYTES or registers > REGISTERS_PER_SM:
            raise AssertionError(f"{self.name}: {self.tile} does not fit ({self.smem_bytes} B of shared memory, {registers} registers)")

    # ---- identity ----------------------------------------------------------------------------------------------------------------

    @property
    def name(self) -> str:
        return str(self.key)

    @property
    def arch(self) -> str:
        return self.key.arch

    @property
    def summary(self) -> str:
        return f"tile {self.tile_m}x{self.tile_n}, {self.stages} stages, {self.threads} threads, smem {self.smem_bytes} B"

    # ---- sizes -------------------------------------------------------------------------------------------------------------------

    @property
    def element(self) -> str:
        return _ELEMENTS[self.key.dtype]

    @property
    def head_dim(self) -> int:
        return self.key.head_dim

    @property
    def tile_m(self) -> int:
        return self.tile.tile_m

    @property
    def tile_n(self) -> int:
        return self.tile.tile_n

    @property
    def stages(self) -> int:
        return self.tile.stages

    @property
    def q_stages(self) -> int:
        return self.tile.q_stages

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
    def q_map_dimensions(self) -> str:
        return "num_heads_kv, seqlen_q, kGqaRatio" if self.is_packed else "num_heads_q, seqlen_q"

    @property
    def consumers(self) -> int:
        return self.tile_m // 64

    @property
    def threads(self) -> int:
        return WARPGROUP_THREADS * (1 + self.consumers)

    @property
    def producer_registers(self) -> int:
        return self.tile.producer_registers

    @property
    def consumer_registers(self) -> int:
        return self.tile.consumer_registers

    # ---- shared memory -----------------------------------------------------------------------------------------------------------

    @property
    def swizzle_bytes(self) -> int:
        return self.tile.swizzle_bytes

    @cached_property
    def q_tile(self) -> SwizzledTile:
        return SwizzledTile(self.tile_m, self.head_dim, self.swizzle_bytes)

    @cached_property
    def kv_tile(self) -> SwizzledTile:
        return SwizzledTile(self.tile_n, self.head_dim, self.swizzle_bytes)

    @property
    def chunk_columns(self) -> int:
        return self.q_tile.chunk_cols

    @property
    def chunks(self) -> int:
        return self.q_tile.num_chunks

    @property
    def padded_columns(self) -> int:
        return self.q_tile.padded_cols

    @property
    def q_chunk_bytes(self) -> int:
        return self.q_tile.chunk_bytes

    @property
    def kv_chunk_bytes(self) -> int:
        return self.kv_tile.chunk_bytes

    @property
    def smem_bytes(self) -> int:
        """sizeof(SharedStorage): the rings of Q, K and V, their mbarriers of 8 bytes and the tile queue's 24, padded to 1024."""
        data = self.q_stages * _round_up(self.q_tile.size_bytes, 1024) + 2 * self.stages * _round_up(self.kv_tile.size_bytes, 1024)
        return _round_up(data + 8 * (2 * self.q_stages + 4 * self.stages) + 24 * self.has_dynamic_scheduler, 1024)

    # ---- what WGMMA is told about it ---------------------------------------------------------------------------------------------

    @property
    def q_descriptor(self) -> str:
        return f"{self.q_tile.k_major_descriptor().bits:#018x}ull"

    @property
    def k_descriptor(self) -> str:
        return f"{self.kv_tile.k_major_descriptor().bits:#018x}ull"

    @property
    def v_descriptor(self) -> str:
        return f"{self.kv_tile.mn_major_descriptor().bits:#018x}ull"

    @property
    def v_step_bytes(self) -> int:
        return self.kv_tile.mn_major_step_bytes(1)

    @property
    def warpgroup_q_bytes(self) -> int:
        return 64 * self.swizzle_bytes

    # ---- named booleans ----------------------------------------------------------------------------------------------------------

    @property
    def is_causal(self) -> bool:
        return self.key.causal

    @property
    def is_packed(self) -> bool:
        return self.key.gqa_ratio > 1

    @property
    def has_dynamic_scheduler(self) -> bool:
        return self.tile.scheduler == "dynamic"

    # ---- Params ------------------------------------------------------------------------------------------------------------------

    @property
    def params(self) -> tuple[ParamField, ...]:
        return fa3_fwd_params(self.is_causal, self.is_packed, self.has_dynamic_scheduler)

    @property
    def params_bytes(self) -> int:
        return params_dtype(self.params).itemsize


def _round_up(value: int, multiple: int) -> int:
    return (value + multiple - 1) // multiple * multiple
