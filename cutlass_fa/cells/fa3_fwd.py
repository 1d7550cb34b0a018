"""The fa3 forward (Hopper: TMA and WGMMA) of one key."""

from __future__ import annotations

from dataclasses import dataclass

from ..arch.limits import REGISTERS_PER_SM
from ..arch.sm90 import Fa3FwdTile, fa3_fwd_tile_of
from ..cell import round_up
from ..dispatch import FP8_DTYPES, DispatchKey
from ..params import ParamField, fa3_fwd_params
from .swizzled import SwizzledCell

WARPGROUP_THREADS = 128


@dataclass(frozen=True)
class Fa3FwdCell(SwizzledCell):
    """One fa3 forward kernel: tile, stages, registers, shared-memory layouts and the named booleans that templates test."""

    tile: Fa3FwdTile

    template = "sm90/fwd.cu.j2"
    entry = "flash_fwd"

    @classmethod
    def for_key(cls, key: DispatchKey) -> Fa3FwdCell:
        return cls(key, fa3_fwd_tile_of(key.head_dim, key.features, fp8=key.dtype in FP8_DTYPES))

    @property
    def mma_k(self) -> int:
        """Columns (or keys) that one product sums over."""
        return 32 // self.element_bytes

    def misfits(self) -> list[str]:
        registers = WARPGROUP_THREADS * (self.tile.producer_registers + self.consumers * self.tile.consumer_registers)
        checks = (
            (self.tile.tile_m % 64 != 0, f"tile_m {self.tile.tile_m} is no multiple of a warpgroup's 64 rows"),
            (self.tile.tile_n % self.mma_k != 0, f"tile_n {self.tile.tile_n} is no multiple of {self.mma_k}"),
            (registers > REGISTERS_PER_SM, f"{registers} registers"),
        )
        return [reason for refused, reason in checks if refused]

    # ---- sizes -------------------------------------------------------------------------------------------------------------------

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

    # ---- packed sequences --------------------------------------------------------------------------------------------------------

    @property
    def row_origin(self) -> str:
        """Where a tile's sequence starts in the tensor map of q."""
        return "tile.queries.first + " if self.is_varlen else ""

    @property
    def batch_coordinate(self) -> str:
        """Of a tile in the tensor map of q."""
        return "0" if self.is_varlen else "tile.batch"

    @property
    def kv_coordinate(self) -> str:
        """What says where a tile's keys lie."""
        return "tile.keys" if self.is_varlen else "tile.batch"

    @property
    def queue(self) -> str:
        """The type of what passes tiles on."""
        return "WorkQueue<Tile>" if self.is_varlen else "TileQueue"

    @property
    def queue_readers(self) -> str:
        return "kConsumerWarps + 1" if self.is_varlen else "kConsumerWarps"

    @property
    def has_pointers_to_inputs(self) -> bool:
        """Whether Params has q, k and v, which tensor maps describe here."""
        return False

    # ---- shared memory -----------------------------------------------------------------------------------------------------------

    @property
    def swizzle_bytes(self) -> int:
        return self.tile.swizzle_bytes

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
        """sizeof(SharedStorage): the rings of Q, K and V, their mbarriers of 8 bytes and the tile queue, padded to 1024."""
        queue_bytes = (56 if self.is_varlen else 24) * self.has_dynamic_scheduler
        data = self.q_stages * round_up(self.q_tile.size_bytes, 1024) + 2 * self.stages * round_up(self.kv_tile.size_bytes, 1024)
        return round_up(data + 8 * (2 * self.q_stages + 4 * self.stages) + queue_bytes, 1024)

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

    # ---- what the templates call things ----------------------------------------------------------------------------------------------

    @property
    def v_ring(self) -> str:
        """The ring that blocks of V land in."""
        return "v"

    @property
    def online_softmax(self) -> str:
        return "online_softmax<Element>"

    @property
    def p_words(self) -> str:
        """Registers of a block's probabilities, as an expression of the template's constants."""
        return "kTileN / 4"

    @property
    def pv_target(self) -> str:
        """The accumulator of P V."""
        return "acc_o"

    @property
    def tile_params(self) -> str:
        """The arguments of a tile."""
        return "params"

    # ---- named booleans ----------------------------------------------------------------------------------------------------------

    @property
    def has_dynamic_scheduler(self) -> bool:
        return self.is_varlen or self.tile.scheduler == "dynamic"

    @property
    def has_precise(self) -> bool:
        """Whether P V of a block is added up in registers of its own first."""
        return self.key.precise

    @property
    def has_descale(self) -> bool:
        return self.key.descale

    @property
    def has_block_descale(self) -> bool:
        return self.key.block_descale

    @property
    def has_tile_params(self) -> bool:
        """Whether a tile has arguments of its own."""
        return self.has_descale and not self.has_block_descale

    @property
    def has_scaled_bias(self) -> bool:
        """Whether a bias is in units of the scores before their factors."""
        return self.has_alibi and not self.has_softcap

    @property
    def has_own_overlap(self) -> bool:
        return self.tile.own_overlap

    @property
    def has_masked_steps(self) -> bool:
        """Whether blocks after the first may need a mask."""
        return self.is_causal or self.has_window

    @property
    def has_waiting_steps(self) -> bool:
        """Whether some blocks are taken with P V first: where there is no overlap, and the few masked ones, whose code is then smaller."""
        return self.has_masked_steps or not self.has_own_overlap

    # ---- Params ------------------------------------------------------------------------------------------------------------------

    @property
    def params(self) -> tuple[ParamField, ...]:
        return fa3_fwd_params(self.key, self.has_dynamic_scheduler)
