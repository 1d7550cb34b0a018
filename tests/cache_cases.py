"""KV caches whose unused rows hold NaN, and the same keys packed, for the reference; on the CPU executor and on a GPU."""

from __future__ import annotations

from dataclasses import dataclass
from types import ModuleType
from typing import Any

import numpy as np

from tests.numerics import random_array

LAYOUTS = {  # name -> the order in memory of (block, key, head, column)
    "rows": (0, 1, 2, 3),
    "heads": (0, 2, 1, 3),
}


@dataclass(frozen=True)
class CacheCase:
    """Queries and keys of each sequence; block_size 0: a contiguous cache. layout: of K and V. padding: keys before a sequence's first."""

    name: str
    pairs: tuple[tuple[int, int], ...]
    block_size: int = 0
    layout: str = "rows"
    shared: bool = False  # the first block of all sequences is one
    padding: tuple[int, ...] | None = None
    batch_index: tuple[int, ...] | None = None

    def __str__(self) -> str:
        return self.name

    @property
    def batch(self) -> int:
        return len(self.pairs)

    @property
    def total_q(self) -> int:
        return max(sum(q for q, _ in self.pairs), 1)

    def make(self, xp: ModuleType, rng: Any, heads: tuple[int, int], head_dim: int, dtype: Any) -> Cache:
        """Fresh arrays. heads: of q, and of k and v."""
        q = random_array(xp, rng, (self.total_q, heads[0], head_dim), dtype)
        lengths = [k for _, k in self.pairs]
        k, v = (random_array(xp, rng, (max(sum(lengths), 1), heads[1], head_dim), dtype) for _ in "kv")
        table, places, shape = self._paged(rng) if self.block_size else self._contiguous()
        caches = [self._empty(xp, shape, heads[1], head_dim, dtype) for _ in "kv"]
        starts = np.concatenate([[0], np.cumsum(lengths)]).astype(np.int32)
        for sequence, length in enumerate(lengths):
            rows = slice(int(starts[sequence]), int(starts[sequence]) + length)
            for cache, packed in zip(caches, (k, v), strict=True):
                blocks, rows_of_block = (xp.asarray(places[sequence][i][:length]) for i in (0, 1))
                if self.shared and sequence and length:  # what is there already is this sequence's too
                    common = min(length, self.block_size, lengths[0])
                    packed[rows.start : rows.start + common] = cache[blocks[:common], rows_of_block[:common]]
                cache[blocks, rows_of_block] = packed[rows]
        padding = self.padding or (0,) * self.batch
        extras = {
            "cu_seqlens_q": xp.asarray(np.concatenate([[0], np.cumsum([q for q, _ in self.pairs])]).astype(np.int32)),
            "seqused_k": xp.asarray(np.array([n + p for n, p in zip(lengths, padding, strict=True)], np.int32)),
        }
        if table is not None:
            extras["block_table"] = xp.asarray(table)
        if self.padding is not None:
            extras["cache_leftpad"] = xp.asarray(np.array(self.padding, np.int32))
        return Cache(q, k, v, caches[0], caches[1], extras, {"cu_seqlens_q": extras["cu_seqlens_q"], "cu_seqlens_k": xp.asarray(starts)})

    def _empty(self, xp: ModuleType, shape: tuple[int, int], heads: int, head_dim: int, dtype: Any) -> Any:
        """NaN everywhere, (block, key, head, column) as a view of the layout's memory."""
        order = LAYOUTS[self.layout]
        extents = (*shape, heads, head_dim)
        memory = xp.full(tuple(extents[axis] for axis in order), np.nan, np.float32).astype(dtype)
        return memory.transpose(tuple(order.index(axis) for axis in range(4)))

    def _paged(self, rng: Any) -> tuple[np.ndarray, list[tuple[np.ndarray, np.ndarray]], tuple[int, int]]:
        """The block table, where each key lies (blocks, rows), and (blocks, rows of a block)."""
        counts = [-(-length // self.block_size) for _, length in self.pairs]
        max_blocks, num_blocks = max(*counts, 1) + 1, sum(counts) + 3
        order = np.random.default_rng(int(rng.integers(1 << 30))).permutation(num_blocks)
        table = np.full((self.batch, max_blocks), 1 << 30, np.int32)  # never looked at, or far outside
        first = 0
        for sequence, count in enumerate(counts):
            table[sequence, :count] = order[first : first + count]
            if self.shared and count and sequence:
                table[sequence, 0] = table[0, 0]
            first += count
        places = []
        for sequence, (_, length) in enumerate(self.pairs):
            key = np.arange(length)
            places.append((table[sequence, key // self.block_size], key % self.block_size))
        return table, places, (num_blocks, self.block_size)

    def _contiguous(self) -> tuple[np.ndarray | None, list[tuple[np.ndarray, np.ndarray]], tuple[int, int]]:
        padding = self.padding or (0,) * self.batch
        index = self.batch_index or tuple(range(self.batch))
        rows = max(length + pad for (_, length), pad in zip(self.pairs, padding, strict=True)) + 5
        places = [
            (np.full(length, place), np.arange(length) + pad) for (_, length), pad, place in zip(self.pairs, padding, index, strict=True)
        ]
        table = None if self.batch_index is None else np.array(self.batch_index, np.int32)
        return table, places, (max(index) + 2, rows)


@dataclass(frozen=True)
class Cache:
    """q (total_q, heads, head_dim); k, v: the keys in use, packed; k_cache, v_cache: (blocks, keys, heads, head_dim); extras: of a call on
    the cache; packed: cu_seqlens of q and of k and v."""

    q: Any
    k: Any
    v: Any
    k_cache: Any
    v_cache: Any
    extras: dict[str, Any]
    packed: dict[str, Any]


PAGED_CASES = (
    *(
        CacheCase(f"page{size}-{layout}", ((1, 9), (70, 300), (5, 0), (0, 40), (130, 131)), size, layout)
        for size, layout in ((8, "rows"), (16, "heads"), (32, "rows"), (64, "heads"), (128, "rows"), (256, "heads"))
    ),
    CacheCase("shared", ((3, 100), (2, 40), (1, 150)), 16, shared=True),
    CacheCase("contiguous", ((1, 9), (70, 300), (5, 0), (130, 131))),
    CacheCase("contiguous-heads-padding-index", ((1, 9), (70, 200), (5, 133)), 0, "heads", padding=(3, 20, 150), batch_index=(4, 0, 2)),
)
