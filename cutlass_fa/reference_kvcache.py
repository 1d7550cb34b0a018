"""Attention over a KV cache in float64, straight from its definition: rotary, appending, gathering each sequence's keys.

Runs on the array module of its inputs, NumPy or CuPy; numbers that say where things lie (lengths, tables) may be either's or lists.

Shapes, everywhere in this module:
    q           (batch, seqlen_q, num_heads_q, head_dim), or packed (total_q, ...) with cu_seqlens_q (batch + 1,)
    k, v        (batch, seqlen_new, num_heads_kv, head_dim), or packed (total_new, ...) with cu_seqlens_k_new (batch + 1,)
    caches      contiguous (batch_cache, seqlen_cache, num_heads_kv, head_dim), of which sequence b has row cache_batch_idx[b] (default b);
                or paged (num_blocks, block_size, num_heads_kv, head_dim) with block_table (batch, max_blocks)
    rotary_cos  (seqlen_rotary, rotary_dim / 2), as rotary_sin
A sequence's keys before the call stand at positions 0 to cache_seqlens[b] of its part of the cache, those before cache_leftpad[b] being
padding; positions, rotary's too, count the padding.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

import numpy as np

from .reference import Array, array_module, as_float64, attention_forward


@dataclass(frozen=True, eq=False)
class CacheLayout:
    """Where a sequence's keys lie, and how many there are: arguments of attention_with_kvcache, as plain NumPy arrays."""

    block_size: int
    num_blocks: int
    table: np.ndarray  # (batch, max_blocks) of a contiguous cache (batch, 1): one block a sequence

    @classmethod
    def of(cls, cache: Array, batch: int, block_table: Array | None = None, cache_batch_idx: Array | None = None) -> CacheLayout:
        """batch: sequences."""
        rows = np.arange(batch) if cache_batch_idx is None else _host(cache_batch_idx)
        table = rows[:, None] if block_table is None else _host(block_table)
        return cls(int(cache.shape[1]), int(cache.shape[0]), table)

    @property
    def capacity(self) -> int:
        """Keys that a sequence may have."""
        return self.table.shape[1] * self.block_size

    def places(self, sequence: int, positions: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """(block, key in it, which of the positions have such a place): the others are outside the cache."""
        inside = (positions >= 0) & (positions < self.capacity)
        entries = np.where(inside, positions, 0) // self.block_size
        blocks = self.table[sequence][entries]
        exists = inside & (blocks >= 0) & (blocks < self.num_blocks)
        return blocks[exists], (positions % self.block_size)[exists], exists


@dataclass(frozen=True, eq=False)
class Prepared:
    """What attention is given after rows were appended: q and the caches in float64 where they were turned or written, and lengths."""

    q: Array
    k_cache: Array
    v_cache: Array
    seqlens_k: np.ndarray  # (batch,) keys of each sequence, padding included


def rotated(x: Array, rotary_cos: Array, rotary_sin: Array, positions: np.ndarray, interleaved: bool) -> Array:
    """Rows x (rows, heads, head_dim) turned by the angles of their positions (rows,), in float64 (RoFormer: Su et al. 2021).

    interleaved: pairs are columns 2i and 2i + 1, else i and i + rotary_dim / 2. Columns from rotary_dim on stay as they are; a position
    that the tables have not takes their first or last row.
    """
    xp = array_module(x)
    half = rotary_cos.shape[1]
    rows = xp.asarray(np.clip(positions, 0, rotary_cos.shape[0] - 1))
    cos, sin = (as_float64(table)[rows][:, None, :] for table in (rotary_cos, rotary_sin))  # (rows, 1, rotary_dim / 2)
    result = as_float64(x).copy()
    first, second = (slice(0, 2 * half, 2), slice(1, 2 * half, 2)) if interleaved else (slice(0, half), slice(half, 2 * half))
    a, b = as_float64(x[..., first]), as_float64(x[..., second])
    result[..., first] = a * cos - b * sin
    result[..., second] = a * sin + b * cos
    return result


def prepare(
    q: Array,
    k_cache: Array,
    v_cache: Array,
    k: Array | None = None,
    v: Array | None = None,
    *,
    rotary_cos: Array | None = None,
    rotary_sin: Array | None = None,
    cache_seqlens: Array | int | None = None,
    cache_batch_idx: Array | None = None,
    block_table: Array | None = None,
    cu_seqlens_q: Array | None = None,
    cu_seqlens_k_new: Array | None = None,
    rotary_seqlens: Array | None = None,
    rotary_interleaved: bool = True,
    successive_queries: bool = False,
) -> Prepared:
    """New rows of k and v in copies of the caches, and q and the new keys turned where there are tables of angles.

    Row i of k goes to position cache_seqlens[b] + i; what has no place in the cache (positions past its end, blocks that do not exist) is
    left out. successive_queries: row i of q is turned by the angle of position cache_seqlens[b] + i, else all rows by that of
    cache_seqlens[b]; rotary_seqlens replaces cache_seqlens for angles.
    """
    batch = q.shape[0] if cu_seqlens_q is None else len(cu_seqlens_q) - 1
    layout = CacheLayout.of(k_cache, batch, block_table, cache_batch_idx)
    lengths = _lengths(cache_seqlens, batch, layout.capacity)
    angles = lengths if rotary_seqlens is None else _host(rotary_seqlens).astype(np.int64)
    if k is None or v is None:
        return Prepared(q, k_cache, v_cache, np.clip(lengths, 0, layout.capacity))
    k_cache, v_cache = as_float64(k_cache).copy(), as_float64(v_cache).copy()
    rows_new = np.zeros(batch, np.int64)
    for sequence, (new_k, new_v) in enumerate(zip(_rows(k, cu_seqlens_k_new), _rows(v, cu_seqlens_k_new), strict=True)):
        rows_new[sequence], index = len(new_k), np.arange(len(new_k))
        blocks, keys, exists = layout.places(sequence, lengths[sequence] + index)
        if rotary_cos is not None:
            new_k = rotated(new_k, rotary_cos, rotary_sin, angles[sequence] + index, rotary_interleaved)
        k_cache[blocks, keys] = as_float64(new_k[exists])
        v_cache[blocks, keys] = as_float64(new_v[exists])
    if rotary_cos is not None:
        turned = as_float64(q).copy()
        for sequence, row in enumerate(_rows(turned, cu_seqlens_q)):
            positions = angles[sequence] + np.arange(len(row)) * int(successive_queries)
            row[...] = rotated(row, rotary_cos, rotary_sin, positions, rotary_interleaved)
        q = turned
    return Prepared(q, k_cache, v_cache, np.clip(lengths + rows_new, 0, layout.capacity))


def gather_cached(cache: Array, layout: CacheLayout, seqlens_k: np.ndarray, cache_leftpad: Array | None = None) -> list[Array]:
    """The keys (or values) of each sequence, those of its padding left out: batch arrays (seqlen, num_heads_kv, head_dim)."""
    firsts = np.zeros(len(seqlens_k), np.int64) if cache_leftpad is None else _host(cache_leftpad)
    found = []
    for sequence, (first, end) in enumerate(zip(firsts, seqlens_k, strict=True)):
        blocks, keys, exists = layout.places(sequence, np.arange(int(first), max(int(first), int(end))))
        if not exists.all():
            raise ValueError(f"sequence {sequence}: its {end} keys are not all in the cache")
        found.append(cache[blocks, keys])
    return found


def cached_attention(
    q: Array,
    k_cache: Array,
    v_cache: Array,
    seqlens_k: Array,
    *,
    cache_batch_idx: Array | None = None,
    cache_leftpad: Array | None = None,
    block_table: Array | None = None,
    cu_seqlens_q: Array | None = None,
    **options: Any,
) -> tuple[Array, Array]:
    """``(out, lse)`` of attention over what the caches hold, as q; options: those of AttentionOptions that know no packed keys."""
    xp, seqlens_k = array_module(q), _host(seqlens_k)
    layout = CacheLayout.of(k_cache, len(seqlens_k), block_table, cache_batch_idx)
    k, v = (gather_cached(cache, layout, seqlens_k, cache_leftpad) for cache in (k_cache, v_cache))
    starts = [0, *np.cumsum([len(keys) for keys in k])]
    if cu_seqlens_q is not None:
        options["cu_seqlens_q"] = cu_seqlens_q
    return attention_forward(q, xp.concatenate(k), xp.concatenate(v), cu_seqlens_k=starts, **options)


def attention_with_kvcache(
    q: Array,
    k_cache: Array,
    v_cache: Array,
    k: Array | None = None,
    v: Array | None = None,
    *,
    rotary_cos: Array | None = None,
    rotary_sin: Array | None = None,
    cache_seqlens: Array | int | None = None,
    cache_batch_idx: Array | None = None,
    cache_leftpad: Array | None = None,
    block_table: Array | None = None,
    cu_seqlens_q: Array | None = None,
    cu_seqlens_k_new: Array | None = None,
    rotary_seqlens: Array | None = None,
    rotary_interleaved: bool = True,
    **options: Any,
) -> tuple[Array, Array, Array, Array]:
    """``(out, lse, k_cache, v_cache)``: prepare, then attention over the updated caches, which are returned and not written in place.

    options: those of AttentionOptions. Nothing is rounded between the steps. Rows of q turn as the mask has them stand: one after the
    other where it is causal or a window, else all at the position of the first.
    """
    places = {"cache_batch_idx": cache_batch_idx, "block_table": block_table, "cu_seqlens_q": cu_seqlens_q}
    ready = prepare(
        q,
        k_cache,
        v_cache,
        k,
        v,
        rotary_cos=rotary_cos,
        rotary_sin=rotary_sin,
        cache_seqlens=cache_seqlens,
        cu_seqlens_k_new=cu_seqlens_k_new,
        rotary_seqlens=rotary_seqlens,
        rotary_interleaved=rotary_interleaved,
        successive_queries=has_successive_queries(options.get("causal", False), options.get("window_size", (-1, -1))),
        **places,
    )
    out, lse = cached_attention(ready.q, ready.k_cache, ready.v_cache, ready.seqlens_k, cache_leftpad=cache_leftpad, **places, **options)
    return out, lse, ready.k_cache, ready.v_cache


def has_successive_queries(causal: bool, window_size: tuple[int, int]) -> bool:
    """Whether rotary turns queries by positions that follow one another: where the mask depends on them, as flash-attn has it."""
    return causal or tuple(window_size) != (-1, -1)


def _lengths(cache_seqlens: Array | int | None, batch: int, capacity: int) -> np.ndarray:
    """Keys of each sequence before the call, (batch,)."""
    if cache_seqlens is None:
        return np.full(batch, capacity)
    return np.broadcast_to(_host(cache_seqlens).astype(np.int64), (batch,))


def _rows(x: Array, cu_seqlens: Array | None) -> Iterator[Array]:
    """Views of each sequence's rows."""
    if cu_seqlens is None:
        yield from x
        return
    for start, end in pairwise(_host(cu_seqlens)):
        yield x[int(start) : int(end)]


def _host(x: Array) -> Any:
    return x.get() if hasattr(x, "get") else np.asarray(x)
