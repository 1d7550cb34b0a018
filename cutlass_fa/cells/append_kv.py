"""The pass before attention over a KV cache: appends keys and values, turns queries and new keys (rotary), counts keys."""

from __future__ import annotations

from dataclasses import dataclass

from ..cell import Cell
from ..dispatch import DispatchKey
from ..params import ParamField, strides


@dataclass(frozen=True)
class AppendKvCell(Cell):
    """One CTA for each row; head_dim, the layouts of the caches and their pages are runtime numbers, so that one kernel serves all."""

    template = "common/append_kv.cu.j2"
    entry = "flash_append_kv"

    @classmethod
    def for_key(cls, key: DispatchKey) -> AppendKvCell:
        return cls(key)

    def misfits(self) -> list[str]:
        return []

    @property
    def summary(self) -> str:
        return f"{self.tile_m} row, {self.threads} threads, no shared memory"

    @property
    def tile_m(self) -> int:
        """A CTA's rows: one, of all heads."""
        return 1

    @property
    def threads(self) -> int:
        return 256

    @property
    def smem_bytes(self) -> int:
        return 0

    @property
    def has_rotary(self) -> bool:
        return self.key.rotary

    @property
    def params(self) -> tuple[ParamField, ...]:
        rotary = self.has_rotary
        addresses = (
            *_CACHES,
            *_ROTARY_ADDRESSES * rotary,
            ParamField("seqlens_k", "int*", "(batch,) keys of each sequence after the call, written"),
            ParamField("num_cached", "int64_t", "keys of each sequence before the call where cache_seqlens is null"),
        )
        wide = (
            *strides("k"),
            *strides("v"),
            *_cache_strides("k_cache"),
            *_cache_strides("v_cache"),
            ParamField("block_table_stride", "int64_t", "elements"),
            *_ROTARY_STRIDES * rotary,
        )
        return (*addresses, *wide, *_SIZES, *_ROTARY_SIZES * rotary)


def _cache_strides(array: str) -> tuple[ParamField, ...]:
    return tuple(ParamField(f"{array}_stride_{axis}", "int64_t", "elements") for axis in ("page", "row", "head", "column"))


_CACHES = (
    ParamField("k", "void*", "(batch, seqlen_new, num_heads_kv, head_dim) or (total_new, ...), last dimension contiguous"),
    ParamField("v", "void*", "like k"),
    ParamField("k_cache", "void*", "(num_pages, page_size, num_heads_kv, head_dim) by its strides, written"),
    ParamField("v_cache", "void*", "like k_cache"),
    ParamField("cache_seqlens", "int*", "(batch,) keys of each sequence before the call, or null: num_cached"),
    ParamField("block_table", "int*", "(batch, max_pages) pages of each sequence in order, or null: page b is sequence b's only one"),
    ParamField("cu_seqlens_k_new", "int*", "(batch + 1,) first rows of the sequences in k and v, or null: equally many each"),
)
_SIZES = (
    ParamField("batch", "int", "sequences"),
    ParamField("total_new", "int", "rows of k and v of all sequences"),
    ParamField("num_heads_kv", "int", "key heads"),
    ParamField("head_dim", "int", "columns, a multiple of 8"),
    ParamField("page_size", "int", "keys of a page"),
    ParamField("num_pages", "int", "pages of the caches"),
    ParamField("capacity", "int", "keys that a sequence may have"),
)
_ROTARY_ADDRESSES = (
    ParamField("q", "void*", "(batch, seqlen_q, num_heads_q, head_dim) or (total_q, ...), last dimension contiguous"),
    ParamField("rotary_cos", "void*", "(seqlen_rotary, rotary_dim / 2), last dimension contiguous"),
    ParamField("rotary_sin", "void*", "like rotary_cos"),
    ParamField("cu_seqlens_q", "int*", "(batch + 1,) first rows of the sequences in q, or null: equally many each"),
    ParamField("rotary_seqlens", "int*", "(batch,) positions of the first rows of q and k, or null: the cached keys"),
    ParamField("turned_q", "void*", "like q, written"),
)
_ROTARY_STRIDES = (
    *strides("q"),
    *strides("turned_q"),
    ParamField("rotary_cos_stride", "int64_t", "elements"),
    ParamField("rotary_sin_stride", "int64_t", "elements"),
)
_ROTARY_SIZES = (
    ParamField("total_q", "int", "rows of q of all sequences"),
    ParamField("num_heads_q", "int", "query heads"),
    ParamField("rotary_dim", "int", "columns that are turned, a multiple of 16"),
    ParamField("seqlen_rotary", "int", "positions that the tables have"),
    ParamField("rotary_interleaved", "int", "whether pairs are neighbours (1) or of two halves (0)"),
    ParamField("query_step", "int", "positions from one row of q to the next: 1, or 0 where all stand at the first"),
)
