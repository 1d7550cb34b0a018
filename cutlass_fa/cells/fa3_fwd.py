"""The fa3 forward (Hopper: TMA and WGMMA) of one key."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property

from ..arch.limits import REGISTERS_PER_SM
from ..arch.sm90 import Fa3FwdTile, fa3_fwd_tile_of
from ..cell import round_up
from ..dispatch import FP8_DTYPES, DispatchKey
from ..layouts import KeyGroupTile
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
            (self.is_split and (self.consumers > 1 or self.tile.own_overlap), "a part of a tile is one consumer's, without own overlap"),
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
    def tile_begin(self) -> str:
        """The first query of a causal cell's tile, row_of_tiles before the last."""
        return "params.seqlen_q - (row_of_tiles + 1) * kQueriesPerTile"

    @property
    def tiles_words(self) -> str:
        return "The last tile ends with the last query."

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
    def kv_maps(self) -> str:
        """What the tensor maps of k and v are of, where sequences have their own lengths."""
        return "maps of pages" if self.is_paged else "maps of sequences"

    @property
    def k_place(self) -> str:
        """What says where a tile's keys lie in the tensor maps of k."""
        return self._kv_place("k")

    @property
    def v_place(self) -> str:
        """The same of v."""
        return self._kv_place("v")

    @property
    def kv_hint(self) -> str:
        """What the L2 cache should do with keys: those of a tile that is divided are read once, others by all tiles of their head."""
        return "kEvictFirst" if self.is_split else "kEvictLast"

    def _kv_place(self, array: str) -> str:
        if self._tokens_inner(array):
            return "params, tile"
        if self.is_paged:
            return f"params, {{params.{array}_page_step, params.{array}_row_step}}"
        return "tile.keys" if self.is_varlen else "tile.batch"

    @property
    def end_of_blocks(self) -> str:
        """Where the key blocks of a tile end that a CTA works on, as the loop counts them."""
        if self.is_split:
            return "tile.own.end"
        return "blocks.count()" if self.has_window else "n_block_end(params, tile.first_query + kQueriesPerTile)"

    @property
    def first_block(self) -> str:
        """The last of them that the loop comes to."""
        return "tile.own.begin" if self.is_split else "0"

    @property
    def is_scheduler(self) -> str:
        """Which threads of the producer's warpgroup find the tiles."""
        return "thread_index() / kWarpSize == 1" if self.is_split else "thread_index() == kWarpSize"

    @property
    def result_threads(self) -> int:
        """Threads that hold a tile's result."""
        return WARPGROUP_THREADS * self.consumers

    def _tokens_inner(self, array: str) -> bool:
        return {"k": self.key.k_tokens_inner, "v": self.key.v_tokens_inner}[array]

    @property
    def k_maps(self) -> str:
        """The type of what describes k to TMA."""
        return self._kv_maps("k")

    @property
    def v_maps(self) -> str:
        """The same of v."""
        return self._kv_maps("v")

    def _kv_maps(self, array: str) -> str:
        return "KeyGroupMaps" if self._tokens_inner(array) else "TensorMap"

    @property
    def queue(self) -> str:
        """The type of what passes tiles on."""
        return "WorkQueue<Tile>" if self.is_varlen else "TileQueue"

    @property
    def queue_readers(self) -> str:
        """Warps, and threads by themselves: the producer, which is two warps where it loads pages."""
        if self.is_paged:
            return "kConsumerWarps + 2"
        return "kConsumerWarps, 1" if self.is_varlen else "kConsumerWarps"

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

    @cached_property
    def key_group_tile(self) -> KeyGroupTile:
        """A tile of K or V whose tokens are innermost."""
        return KeyGroupTile(self.tile_n, self.head_dim)

    @property
    def key_group_bytes(self) -> int:
        return self.key_group_tile.group_bytes

    @property
    def k_tile_bytes(self) -> str:
        """Of one stage, in the template's words."""
        return self._kv_tile_bytes("k")

    @property
    def v_tile_bytes(self) -> str:
        """The same of V."""
        return self._kv_tile_bytes("v")

    def _kv_tile_bytes(self, array: str) -> str:
        return "kTileN / kKeyGroup * kKeyGroupBytes" if self._tokens_inner(array) else "kChunks * kKvChunkBytes"

    @property
    def smem_bytes(self) -> int:
        """sizeof(SharedStorage): the rings of Q, K and V, their mbarriers of 8 bytes and the tile queue, padded to 1024."""
        tile_bytes = (60 if self.is_split else 36) if self.is_varlen else 4
        queue_bytes = round_up(2 * 8 + tile_bytes, 8) * self.has_queue + 4 * self.is_split
        kv_bytes = sum((self.key_group_tile if self._tokens_inner(array) else self.kv_tile).size_bytes for array in "kv")
        data = self.q_stages * round_up(self.q_tile.size_bytes, 1024) + self.stages * round_up(kv_bytes, 1024)
        return round_up(data + 8 * (2 * self.q_stages + 4 * self.stages) + queue_bytes, 1024)

    # ---- what WGMMA is told about it ---------------------------------------------------------------------------------------------

    @property
    def q_descriptor(self) -> str:
        return f"{self.q_tile.k_major_descriptor().bits:#018x}ull"

    @property
    def k_descriptor(self) -> str:
        descriptor = self.key_group_tile.mn_major_descriptor() if self.has_k_tokens_inner else self.kv_tile.k_major_descriptor()
        return f"{descriptor.bits:#018x}ull"

    @property
    def v_descriptor(self) -> str:
        descriptor = self.key_group_tile.k_major_descriptor() if self.has_v_tokens_inner else self.kv_tile.mn_major_descriptor()
        return f"{descriptor.bits:#018x}ull"

    @property
    def k_major(self) -> str:
        """The side of K^T along which elements follow each other, a name of Major."""
        return "kMn" if self.has_k_tokens_inner else "kK"

    @property
    def v_major(self) -> str:
        """The same of V."""
        return "kK" if self.has_v_tokens_inner else "kMn"

    @property
    def k_step(self) -> str:
        """Where the step-th group of 16 columns of K starts, in the template's words."""
        return "kKStepBytes * step" if self.has_k_tokens_inner else "column_step_bytes(step, kKvChunkBytes)"

    @property
    def k_step_bytes(self) -> int:
        """Of K whose tokens are innermost."""
        return self.key_group_tile.column_step_bytes

    @property
    def v_step_bytes(self) -> int:
        return self.key_group_tile.key_step_bytes if self.has_v_tokens_inner else self.kv_tile.mn_major_step_bytes(1)

    @property
    def warpgroup_q_bytes(self) -> int:
        return 64 * self.swizzle_bytes

    # ---- what the templates call things ------------------------------------------------------------------------------------------

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
    def has_tiles_from_end(self) -> bool:
        """Whether tiles are counted from the last query back: under a causal mask the tile that is not full is then the one that sees
        the fewest keys. Of packed sequences tiles begin at query 0, as the list of tiles has them."""
        return self.is_causal and not self.is_varlen

    @property
    def has_k_tokens_inner(self) -> bool:
        return self.key.k_tokens_inner

    @property
    def has_v_tokens_inner(self) -> bool:
        return self.key.v_tokens_inner

    @property
    def has_key_groups(self) -> bool:
        """Whether K or V is a cache's whose tokens are innermost."""
        return self.has_k_tokens_inner or self.has_v_tokens_inner

    @property
    def has_key_rows(self) -> bool:
        """Whether K or V has the columns of a key together."""
        return not (self.has_k_tokens_inner and self.has_v_tokens_inner)

    @property
    def has_page_rows(self) -> bool:
        """The same of a cache's pages."""
        return self.is_paged and self.has_key_rows

    @property
    def has_dynamic_scheduler(self) -> bool:
        """Whether CTAs take tiles from a counter."""
        return self.has_tile_list or (self.tile.scheduler == "dynamic" and not self.is_split)

    @property
    def has_dense_counter(self) -> bool:
        return self.has_dynamic_scheduler and not self.is_varlen

    @property
    def has_static_scheduler(self) -> bool:
        return not (self.has_dynamic_scheduler or self.is_split)

    @property
    def has_queue(self) -> bool:
        """Whether one thread tells the others which tile comes next."""
        return self.has_dynamic_scheduler or self.is_split

    @property
    def has_turns(self) -> bool:
        """Whether consumers take turns at the tensor cores."""
        return self.consumers > 1

    @property
    def has_register_moves(self) -> bool:
        """Whether the producer gives registers to the consumers: one consumer has as many as a thread can use."""
        return self.consumers > 1

    @property
    def has_traded_columns(self) -> bool:
        """Whether lanes trade columns of a float32 result."""
        return self.has_float_out

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

    @property
    def has_short_sinks(self) -> bool:
        """Whether the last sink tokens take a short block of sink_tile keys; pages come in whole blocks."""
        return self.has_sink and not self.is_paged

    @property
    def sink_tile(self) -> int:
        """Keys of a short block: one step of P V."""
        return self.mma_k

    @property
    def sink_row(self) -> str:
        """Which row of a stage holds the first key of a short block."""
        return "0" if self.is_varlen else "kTileN - kSinkTile"

    @property
    def sink_blocks(self) -> str:
        if not self.has_short_sinks:
            return super().sink_blocks
        return "whole_sink_blocks(params, begin < n_block_end(params, query_end))"

    @property
    def has_linear_bias(self) -> bool:
        """Whether the softmax adds ALiBi's bias: the two rows of a thread have one slope, as they have not where heads are packed."""
        return self.has_alibi and not self.has_row_bias

    @property
    def bias_argument(self) -> str:
        """What the softmax is told of a bias."""
        return "bias, " if self.has_linear_bias else ""

    # ---- Params ------------------------------------------------------------------------------------------------------------------

    @property
    def params(self) -> tuple[ParamField, ...]:
        return fa3_fwd_params(self.key, self.has_dynamic_scheduler)
