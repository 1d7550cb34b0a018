"""Points of bench.py on KV caches: a few queries after many keys (decode), and a chunk of a prompt after its prefix."""

from __future__ import annotations

from dataclasses import dataclass, fields, replace
from typing import Any

import numpy as np

from tools.bench_points import Point
from tools.bench_report import DENSE, Row

HEADS, HEADS_KV = 32, 8
NO_PAGES = 0  # a contiguous cache


@dataclass(frozen=True)
class CachePoint(Point):
    """A call on a cache: `sequences` of them with seqlen queries each, the last of seqlen_k keys each. page: keys of a page, NO_PAGES for
    a contiguous cache."""

    sequences: int = 1
    page: int = NO_PAGES

    @property
    def batch(self) -> int:
        return self.sequences

    @property
    def num_heads_q(self) -> int:
        return HEADS

    @property
    def num_heads_kv(self) -> int:
        return HEADS_KV

    @property
    def kv_shape(self) -> tuple[int, ...]:
        """(blocks, keys of a block, num_heads_kv, head_dim)."""
        blocks = self.sequences * (-(-self.seqlen_k // self.page) if self.page else 1)
        return blocks, self.page or self.seqlen_k, HEADS_KV, self.head_dim

    @property
    def flops(self) -> float:
        """Of the pairs of a query and a key that a causal mask leaves visible."""
        pairs = self.seqlen * (self.seqlen_k - self.seqlen) + self.seqlen * (self.seqlen + 1) // 2
        return 4.0 * self.sequences * pairs * HEADS * self.head_dim

    @property
    def kv_bytes(self) -> int:
        """Of the keys and values in use, each read once."""
        return 2 * self.sequences * self.seqlen_k * HEADS_KV * self.head_dim * 2

    @property
    def baseline(self) -> tuple[str, Point] | None:
        """A chunk's: the same call on arrays without a cache."""
        return (DENSE, DenseChunk(**{field.name: getattr(self, field.name) for field in fields(self)})) if self.seqlen > 16 else None

    def row(self, peer: str, milliseconds: float, remark: str = "") -> Row:
        row = super().row(peer, milliseconds, remark)
        return replace(row, gbs=round(self.kv_bytes / milliseconds / 1e6, 1), page=str(self.page) if self.page else "none")

    def cache_arrays(self) -> dict[str, np.ndarray]:
        """cache_seqlens, and block_table of a paged cache, the blocks in an order drawn once."""
        found: dict[str, Any] = {"cache_seqlens": np.full(self.sequences, self.seqlen_k, np.int32)}
        if self.page:
            blocks = np.random.default_rng(0).permutation(self.kv_shape[0]).astype(np.int32)
            found["block_table"] = blocks.reshape(self.sequences, -1)
        return found


@dataclass(frozen=True)
class DenseChunk(CachePoint):
    """The same queries and keys without a cache."""

    @property
    def kv_shape(self) -> tuple[int, ...]:
        return self.sequences, self.seqlen_k, HEADS_KV, self.head_dim

    def cache_arrays(self) -> dict[str, np.ndarray]:
        return {}


DECODE_LENGTHS = ((1, 16384), (8, 16384), (64, 4096), (128, 1024))  # sequences, keys of each
PAGES = (NO_PAGES, 16, 64, 256)


def decode_points(dtype: str, head_dim: int) -> list[Point]:
    """One query for each sequence."""
    return [
        CachePoint(dtype, head_dim, 1, True, HEADS // HEADS_KV, seqlen_k=keys, sequences=sequences, page=page)
        for sequences, keys in DECODE_LENGTHS
        for page in PAGES
    ]


def chunk_points(dtype: str, head_dim: int) -> list[Point]:
    """2k queries after 14k keys of a prompt, whose baseline is the same without a cache."""
    return [CachePoint(dtype, head_dim, 2048, True, HEADS // HEADS_KV, seqlen_k=16384, sequences=4, page=page) for page in PAGES]
