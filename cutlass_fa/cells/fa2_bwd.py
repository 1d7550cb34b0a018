"""The fa2 backward of one key: the main kernel (mma.sync, ldmatrix, cp.async)."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property

from ..arch.fa2_bwd import Fa2BwdTile, fa2_bwd_tile
from ..arch.limits import arch_number
from ..cell import Cell, round_up
from ..dispatch import DispatchKey
from ..layouts import PaddedTile
from ..params import (
    ALIBI_SLOPES,
    ALIBI_STRIDE,
    DROPOUT_RATE,
    DROPOUT_STATE,
    KEY_BLOCK_LIST,
    SEQUENCES,
    ParamField,
    mask_params,
    scale_params,
)

WARPS_PER_GROUP = 4
WARPS = 2 * WARPS_PER_GROUP
MMA_ROWS = 16
MMA_COLUMNS = 8


@dataclass(frozen=True)
class Fa2BwdCell(Cell):
    """One main kernel of the backward: tile, stages, shared-memory layouts and the named booleans that templates test."""

    tile: Fa2BwdTile

    template = "sm80/bwd.cu.j2"
    entry = "flash_bwd"

    @classmethod
    def for_key(cls, key: DispatchKey) -> Fa2BwdCell:
        return cls(key, fa2_bwd_tile(key.arch, key.head_dim, key.features))

    def misfits(self) -> list[str]:
        tile = self.tile
        halves, dq_warps_d = WARPS_PER_GROUP // tile.warps_n, WARPS // tile.dq_warps_m
        checks = (
            (tile.warps_n not in (2, 4), f"warps_n {tile.warps_n}"),
            (tile.tile_n % (MMA_ROWS * tile.warps_n) != 0, f"{tile.tile_n} keys for {tile.warps_n} warps"),
            (tile.tile_m % (MMA_ROWS * halves) != 0, f"{tile.tile_m} queries in {halves} parts"),
            (self.head_dim % (2 * MMA_COLUMNS * halves) != 0, f"head_dim {self.head_dim} in {halves} parts"),
            (tile.tile_m % (MMA_ROWS * tile.dq_warps_m) != 0, f"{tile.tile_m} queries for {tile.dq_warps_m} warps of dQ"),
            (self.head_dim % (MMA_COLUMNS * dq_warps_d) != 0, f"head_dim {self.head_dim} for {dq_warps_d} warps of dQ"),
            (tile.tile_m * self.head_dim % (4 * self.threads) != 0, f"{tile.tile_m} x {self.head_dim} numbers are cleared 4 a thread"),
            (tile.q_stages < 2, "one block of Q: it is read after the next is asked for"),
            (tile.dout_stages not in (1, 2) or tile.score_stages not in (1, 2), "dO, P and dS come in one or two stages"),
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
        return self.tile.q_stages

    @property
    def q_stages(self) -> int:
        return self.tile.q_stages

    @property
    def dout_stages(self) -> int:
        return self.tile.dout_stages

    @property
    def score_stages(self) -> int:
        return self.tile.score_stages

    @property
    def warps_n(self) -> int:
        return self.tile.warps_n

    @property
    def dq_warps_m(self) -> int:
        return self.tile.dq_warps_m

    @property
    def dq_part_d(self) -> int:
        """Columns of dQ that a warp makes at a time: 32 registers a thread at most, where a warp's columns can be cut so."""
        columns = self.head_dim * self.dq_warps_m // WARPS
        most = max(1024 // (self.tile_m // self.dq_warps_m) // MMA_COLUMNS, 1) * MMA_COLUMNS
        return next(part for part in range(min(columns, most), 0, -MMA_COLUMNS) if columns % part == 0)

    @property
    def threads(self) -> int:
        return 32 * WARPS

    # ---- shared memory -----------------------------------------------------------------------------------------------------------

    @cached_property
    def kv_tile(self) -> PaddedTile:
        return PaddedTile(self.tile_n, self.head_dim)

    @cached_property
    def q_tile(self) -> PaddedTile:
        return PaddedTile(self.tile_m, self.head_dim)

    @cached_property
    def ds_tile(self) -> PaddedTile:
        return PaddedTile(self.tile_n, self.tile_m)

    @property
    def smem_bytes(self) -> int:
        """sizeof(SharedStorage): K and V, the rings of Q (with lse) and dO (with dpsum), and of P and dS."""
        p_bytes = 2 * self.tile_m * self.tile_n
        scores = self.score_stages * (p_bytes * (1 + self.has_own_p) + self.ds_tile.size_bytes)
        rows = (self.q_stages + self.dout_stages) * (self.q_tile.size_bytes + 4 * self.tile_m)
        return round_up(2 * self.kv_tile.size_bytes + rows + scores, 1024)

    # ---- named booleans ----------------------------------------------------------------------------------------------------------

    @property
    def is_deterministic(self) -> bool:
        return self.key.deterministic

    @property
    def has_split_rows(self) -> bool:
        return self.tile.warps_n < WARPS_PER_GROUP

    @property
    def has_p_slope(self) -> bool:
        """Whether the other group gets more than P: the softcap's derivative in it, or which elements were dropped."""
        return self.has_softcap or self.has_dropout

    @property
    def has_own_p(self) -> bool:
        """Whether warps of the dV group need a P of their own from each other."""
        return self.has_split_rows and self.has_p_slope

    @property
    def operand_p(self) -> str:
        return "own_p" if self.has_own_p else "p"

    @property
    def dv_scale(self) -> str:
        return "params.keep_scale" if self.has_dropout else "1.0f"

    @property
    def m_end(self) -> str:
        """Where the blocks of queries that see a work's keys end, in each head."""
        return "m_end" if self.has_window else "params.num_m_blocks"

    # ---- packed sequences --------------------------------------------------------------------------------------------------------

    @property
    def block_head(self) -> str:
        """The query head of a block of queries."""
        if self.is_varlen:
            return "block.index / params.blocks_per_head"
        return "(block.index - block.m_block) / params.num_m_blocks - work.batch * params.num_heads_q"

    @property
    def block_batch_head(self) -> str:
        """batch * num_heads_q + head of a block of queries."""
        if self.is_varlen:
            return "work.batch * params.num_heads_q + block.index / params.blocks_per_head"
        return "(block.index - block.m_block) / params.num_m_blocks"

    @property
    def keys_written(self) -> str:
        """How many keys' gradients are written: of packed sequences all that a sequence owns."""
        return "params.rows_k" if self.is_varlen else "params.seqlen_k"

    @property
    def has_dense_shares(self) -> bool:
        """Whether CTAs with copies of dQ find their keys in a batch of equally long sequences."""
        return self.is_deterministic and self.has_batch

    @property
    def has_whole_gradients(self) -> bool:
        """Whether a CTA writes its keys' gradients and not parts of them."""
        return not self.is_split

    @property
    def has_key_block_list(self) -> bool:
        """Whether CTAs find their keys in a list: not where each goes through the keys of a sequence in a fixed order."""
        return self.is_varlen and not self.is_deterministic

    @property
    def has_unseen_keys(self) -> bool:
        """Whether no query at all may see a block of keys."""
        return self.has_window or self.has_offset or self.is_varlen

    @property
    def has_late_dq(self) -> bool:
        return self.tile.score_stages == 2

    @property
    def has_one_dout(self) -> bool:
        return self.tile.dout_stages == 1

    @property
    def has_two_douts(self) -> bool:
        return self.tile.dout_stages == 2

    @property
    def vector_atomics(self) -> str:
        """Whether the GPU adds four floats in one request."""
        return "true" if arch_number(self.arch) >= 90 else "false"

    # ---- Params ------------------------------------------------------------------------------------------------------------------

    @property
    def params(self) -> tuple[ParamField, ...]:
        return fa2_bwd_params(self.key)


def array_fields(*names: str) -> tuple[tuple[ParamField, ...], tuple[ParamField, ...]]:
    """The strides of arrays (batch, seqlen, heads, head_dim): the 64-bit ones, and those of rows."""
    wide = tuple(ParamField(f"{name}_stride_{axis}", "int64_t", "elements") for name in names for axis in ("batch", "head"))
    return wide, tuple(ParamField(f"{name}_stride_row", "int", "elements") for name in names)


_NUMBERS = (
    ParamField("batch", "int", "sequences"),
    ParamField("seqlen_q", "int", "query rows of each sequence"),
    ParamField("seqlen_k", "int", "keys of each sequence"),
    ParamField("num_heads_q", "int", "query heads"),
    ParamField("num_heads_kv", "int", "key heads"),
    ParamField("heads_per_kv_head", "int", "num_heads_q / num_heads_kv"),
    ParamField("head_dim", "int", "columns that exist, at most kHeadDim"),
    ParamField("num_m_blocks", "int", "ceil(seqlen_q / kTileM)"),
    ParamField("num_n_blocks", "int", "ceil(seqlen_k / kTileN)"),
    ParamField("softmax_scale", "float", "factor of q k^T, and so of dk"),
)


def fa2_bwd_params(key: DispatchKey) -> tuple[ParamField, ...]:
    """The fields of a main kernel: what a run writes, then the other wide ones, then the narrow ones."""
    inputs = (
        ParamField("q", "void*", "(batch, seqlen_q, num_heads_q, head_dim) in the element type, last dimension contiguous"),
        ParamField("k", "void*", "(batch, seqlen_k, num_heads_kv, head_dim), likewise"),
        ParamField("v", "void*", "like k"),
        ParamField("dout", "void*", "like q"),
        ParamField(
            "lse_log2", "float*", "(batch, num_heads_q, num_m_blocks * kTileM) log-sum-exp in powers of two, +inf where no key counts"
        ),
        ParamField("dpsum", "float*", "like lse_log2: rowsum(dout * out) - dlse"),
        ParamField("dq_acc", "float*", "(copies, batch, num_heads_q, num_m_blocks, kTileM * kHeadDim) in fragment order, added to"),
    )
    gradients = (ParamField("dk", "void*", "like k, written"), ParamField("dv", "void*", "like k, written"))
    parts = (
        ParamField("dk_parts", "float*", "(splits, batch, num_heads_kv, seqlen_k, kHeadDim), written"),
        ParamField("dv_parts", "float*", "like dk_parts"),
    )
    numbers = _packed_numbers(key) if key.varlen else _NUMBERS
    splits = (ParamField("num_splits", "int", "CTAs that share a block of keys, each with some of its queries"),) * key.split
    copies = (ParamField("num_copies", "int", "copies of dq_acc, at most num_n_blocks"),) * key.deterministic
    wide, rows = array_fields("q", "k", "v", "dout", *(() if key.split else ("dk", "dv")))
    addresses = inputs + (parts if key.split else gradients) + (ALIBI_SLOPES,) * key.alibi
    addresses += SEQUENCES * key.varlen + (KEY_BLOCK_LIST,) * (key.varlen and not key.deterministic) + DROPOUT_STATE * key.dropout
    wide += (ALIBI_STRIDE,) * key.alibi
    return addresses + wide + rows + numbers + splits + copies + scale_params(key) + mask_params(key) + DROPOUT_RATE * key.dropout


def _packed_numbers(key: DispatchKey) -> tuple[ParamField, ...]:
    """Sizes of a main kernel on packed sequences; params_of finds those that are said to be a sequence's."""
    return (
        ParamField("batch", "int", "sequences"),
        ParamField("total_q", "int", "rows of q"),
        ParamField("total_k", "int", "rows of k and v"),
        ParamField("seqlen_q", "int", "a sequence's: query rows that are used"),
        ParamField("seqlen_k", "int", "a sequence's: keys that are used"),
        ParamField("rows_k", "int", "a sequence's: keys that it owns"),
        *(ParamField("first_k", "int", "a sequence's: its first key among all"),) * key.split,
        ParamField("num_m_blocks", "int", "a sequence's: ceil(seqlen_q / kTileM)"),
        ParamField("first_block", "int", "a sequence's: place of its block 0 in a head's workspace"),
        ParamField("blocks_per_head", "int", "places of a head's workspace"),
        ParamField("num_heads_q", "int", "query heads"),
        ParamField("num_heads_kv", "int", "key heads"),
        ParamField("heads_per_kv_head", "int", "num_heads_q / num_heads_kv"),
        ParamField("head_dim", "int", "columns that exist, at most kHeadDim"),
        ParamField("softmax_scale", "float", "factor of q k^T, and so of dk"),
    )
