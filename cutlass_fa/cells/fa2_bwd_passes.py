"""The passes around the fa2 backward's main kernel: preprocess before it, convert after it."""

from __future__ import annotations

from dataclasses import dataclass

from ..cell import Cell
from ..dispatch import DispatchKey
from ..params import LEARNABLE_SINK, SEQUENCES, ParamField
from .fa2_bwd import Fa2BwdCell, array_fields

_PACKED_SIZES = (  # num_m_blocks are then the places of all sequences' blocks
    ParamField("batch", "int", "sequences"),
    ParamField("total_q", "int", "rows of q"),
)
ROW_LANES = 8  # threads that share a row


@dataclass(frozen=True)
class _Pass(Cell):
    """main: the main kernel whose blocks it works on, of the same architecture, dtype and head_dim."""

    main: Fa2BwdCell

    def misfits(self) -> list[str]:
        return []

    @property
    def tile_m(self) -> int:
        return self.main.tile_m

    @property
    def threads(self) -> int:
        return self.main.threads

    @property
    def smem_bytes(self) -> int:
        return 0

    @property
    def summary(self) -> str:
        return f"{self.tile_m} rows, {self.threads} threads, no shared memory"


def main_key(key: DispatchKey) -> DispatchKey:
    """The plainest main kernel of a pass's architecture, dtype and head_dim: flags do not change the blocks that passes see."""
    return DispatchKey(key.family, "bwd", key.arch, key.dtype, key.head_dim)


@dataclass(frozen=True)
class Fa2BwdPreprocessCell(_Pass):
    """rowsum(dout * out) - dlse, lse in powers of two, and zeros for dQ; with learnable_sink, each block's part of that gradient."""

    template = "common/bwd_preprocess.cu.j2"
    entry = "flash_bwd_preprocess"

    @classmethod
    def for_key(cls, key: DispatchKey) -> Fa2BwdPreprocessCell:
        return cls(key, Fa2BwdCell.for_key(main_key(key)))

    def misfits(self) -> list[str]:
        rows = self.threads // ROW_LANES
        return [] if self.tile_m % rows == 0 else [f"{self.tile_m} rows, and {rows} are read at a time"]

    @property
    def params(self) -> tuple[ParamField, ...]:
        addresses: tuple[ParamField, ...] = (
            ParamField("out", "void*", "(batch, seqlen_q, num_heads_q, head_dim) in the element type, last dimension contiguous"),
            ParamField("dout", "void*", "like out"),
            ParamField("lse", "float*", "(batch, num_heads_q, seqlen_q) natural logarithm, last dimension contiguous"),
            ParamField("dlse", "float*", "like lse, or null"),
            ParamField("lse_log2", "float*", "(batch, num_heads_q, num_m_blocks * kTileM), written"),
            ParamField("dpsum", "float*", "like lse_log2, written"),
            ParamField("dq_acc", "float*", "(num_copies, batch, num_heads_q, num_m_blocks, kTileM * kHeadDim), set to 0"),
        )
        if self.has_learnable_sink:
            parts = ParamField("learnable_sink_parts", "float*", "(num_heads_q, batch * num_m_blocks), written")
            addresses += (LEARNABLE_SINK, parts)
        lse = tuple(ParamField(f"{name}_stride_{axis}", "int64_t", "elements") for name in ("lse", "dlse") for axis in ("batch", "head"))
        numbers = (
            ParamField("seqlen_q", "int", "query rows of each sequence"),
            ParamField("num_heads_q", "int", "query heads"),
            ParamField("head_dim", "int", "columns that exist, at most kHeadDim"),
            ParamField("num_m_blocks", "int", "ceil(seqlen_q / kTileM)"),
            ParamField("num_copies", "int", "copies of dq_acc"),
            *_PACKED_SIZES * self.is_varlen,
        )
        wide, rows = array_fields("out", "dout")
        return (*addresses, *SEQUENCES[::2] * self.is_varlen, *wide, *lse, *rows, *numbers)


@dataclass(frozen=True)
class Fa2BwdConvertCell(_Pass):
    """dQ out of its accumulator; with the flag split, dK or dV out of the parts that CTAs made."""

    template = "common/bwd_convert.cu.j2"
    entry = "flash_bwd_convert"

    @classmethod
    def for_key(cls, key: DispatchKey) -> Fa2BwdConvertCell:
        return cls(key, Fa2BwdCell.for_key(main_key(key)))

    @property
    def dq_warps_m(self) -> int:
        return self.main.dq_warps_m

    @property
    def dq_part_d(self) -> int:
        return self.main.dq_part_d

    @property
    def vector_atomics(self) -> str:
        return self.main.vector_atomics

    @property
    def is_query_gradient(self) -> bool:
        return not self.key.split

    @property
    def queries_written(self) -> str:
        """How many rows are written: of packed sequences all that a sequence owns."""
        return "queries.rows" if self.is_varlen else "params.seqlen_q"

    @property
    def params(self) -> tuple[ParamField, ...]:
        scale = ParamField("scale", "float", "factor of the sum")
        head_dim = ParamField("head_dim", "int", "columns that exist, at most kHeadDim")
        if self.is_query_gradient:
            wide, rows = array_fields("dq")
            return (
                ParamField("dq", "void*", "(batch, seqlen_q, num_heads_q, head_dim) in the element type, written"),
                ParamField("dq_acc", "float*", "(num_copies, batch, num_heads_q, num_m_blocks, kTileM * kHeadDim) in fragment order"),
                *SEQUENCES[:1] * self.is_varlen,
                *wide,
                *rows,
                ParamField("seqlen_q", "int", "query rows of each sequence"),
                ParamField("num_heads_q", "int", "query heads"),
                head_dim,
                ParamField("num_m_blocks", "int", "ceil(seqlen_q / kTileM)"),
                ParamField("num_copies", "int", "copies of dq_acc"),
                *_PACKED_SIZES * self.is_varlen,
                scale,
            )
        wide, rows = array_fields("gradient")
        return (
            ParamField("gradient", "void*", "(batch, seqlen_k, num_heads_kv, head_dim) in the element type, written"),
            ParamField("parts", "float*", "(num_parts, batch, num_heads_kv, seqlen_k, kHeadDim)"),
            *wide,
            ParamField("part_size", "int64_t", "numbers of one part"),
            *rows,
            ParamField("seqlen_k", "int", "keys of each sequence"),
            ParamField("num_heads_kv", "int", "key heads"),
            head_dim,
            ParamField("num_parts", "int", "parts to add"),
            scale,
        )


@dataclass(frozen=True)
class Fa2BwdReduceCell(_Pass):
    """One float for each query head out of parts: the gradient by learnable_sink, out of the preprocess's. A warp a head, as there are
    only as many parts as blocks of queries."""

    template = "common/bwd_reduce.cu.j2"
    entry = "flash_bwd_reduce"

    @classmethod
    def for_key(cls, key: DispatchKey) -> Fa2BwdReduceCell:
        return cls(key, Fa2BwdCell.for_key(main_key(key)))

    @property
    def threads(self) -> int:
        return 32

    @property
    def summary(self) -> str:
        return f"a head of blocks of {self.tile_m} rows, {self.threads} threads, no shared memory"

    @property
    def params(self) -> tuple[ParamField, ...]:
        return (
            ParamField("parts", "float*", "(num_heads_q, num_parts)"),
            ParamField("sums", "float*", "(num_heads_q,), written"),
            ParamField("num_parts", "int", "parts of a head"),
        )
