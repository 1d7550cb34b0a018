"""The arrays of a benchmark's point, as every peer gets them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

FEATURES = ("window_size", "sink_tokens", "alibi_slopes", "learnable_sink", "cu_seqlens", "cache_seqlens", "block_table")

_PLACES = ("cu_seqlens", "cache_seqlens", "block_table")  # where sequences lie, which is no part of a mask


@dataclass(frozen=True)
class Inputs:
    """Arrays and mask of a call, under the names that flash_attn_func has for them; None where it goes without.

    q: (batch, seqlen_q, num_heads_q, head_dim), k, v: (batch, seqlen_k, num_heads_kv, head_dim); of packed sequences (total, heads,
    head_dim), with cu_seqlens int32 (batch + 1,) for queries and keys alike and the longest length in max_seqlen. alibi_slopes,
    learnable_sink: float32 (num_heads_q,). Of a KV cache k and v are its blocks, with cache_seqlens int32 (batch,) and, where it is paged,
    block_table int32 (batch, max_blocks). dtype: what uint8 arrays hold, of libraries without 8-bit floating-point types.
    """

    q: Any
    k: Any
    v: Any
    causal: bool = False
    window_size: tuple[int, int] | None = None
    sink_tokens: int | None = None
    alibi_slopes: Any = None
    learnable_sink: Any = None
    cu_seqlens: Any = None
    max_seqlen: int = 0
    cache_seqlens: Any = None
    block_table: Any = None
    dtype: str | None = None

    @property
    def features(self) -> list[str]:
        """Those of FEATURES that are in use."""
        return [name for name in FEATURES if getattr(self, name) is not None]

    @property
    def options(self) -> dict[str, Any]:
        """The keyword arguments that describe the mask to this library; a feature that is not used is not named."""
        named = {"causal": self.causal} | ({} if self.dtype is None else {"dtype": self.dtype})
        return named | {name: getattr(self, name) for name in self.features if name not in _PLACES}

    def check_features(self, *known: str) -> None:
        """Raises NotImplementedError, naming them, where features other than those are in use."""
        unknown = [name for name in self.features if name not in known]
        if unknown:
            raise NotImplementedError(f"it has no {', '.join(unknown)}")


def alibi_slopes(num_heads: int) -> np.ndarray:
    """float32 (num_heads,): 2^(-8 / num_heads) and its powers (Press et al. 2021)."""
    return np.exp2(-8.0 / num_heads * np.arange(1, num_heads + 1)).astype(np.float32)


def sink_logits(num_heads: int) -> np.ndarray:
    """float32 (num_heads,), standard normal, always the same."""
    return np.random.default_rng(0).standard_normal(num_heads, dtype=np.float32)


def cumulative(lengths: Sequence[int]) -> np.ndarray:
    """int32 (batch + 1,): where each sequence begins, and where the last ends."""
    return np.concatenate([[0], np.cumsum(lengths)]).astype(np.int32)
