"""Requests whose keys and values lie in a KV cache: attention over it, and a prompt processed in chunks."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from .errors import ChunkIndexOutOfRange, InvalidArgument
from .kv_cache import KvCache
from .request_parts import Causal, CumulativeSeqlens, PersistentMode, check_rows
from .requests import FwdRequest, forward_request


def PagedAttentionRequest(
    *,
    kv_cache: KvCache,
    batch: int,
    total_q: int,
    seqlen_q: int | None = None,
    family: str | None = None,
    persistent: PersistentMode | None = None,
    **arguments: Any,
) -> FwdRequest:
    """A forward whose keys and values lie in a cache: `batch` sequences with total_q queries together, at most seqlen_q each (default: not
    known), and as many keys as their lengths say at run time. arguments: those of AttentionRequest. Raises as forward_request does."""
    rows = CumulativeSeqlens(total_q, batch * kv_cache.capacity)
    longest = {"seqlen_q": total_q if seqlen_q is None else min(seqlen_q, total_q), "seqlen_k": kv_cache.capacity}
    defaults = {"arch": "sm_90a", "dropout_p": 0.0}
    return forward_request(family, persistent, batch=batch, cu_seqlens=rows, kv_cache=kv_cache, **longest, **(defaults | arguments))


@dataclass(frozen=True)
class ChunkLayout:
    """Chunk chunk_index (from 0) of total_chunks of a prompt: chunk_q_tokens queries behind prefix_kv_tokens keys, which earlier chunks, or
    a prefix that sequences share, have left in the cache. The chunk's own keys are in the cache too when its attention runs.

    Raises ZeroSeqlen, SeqlenOverflow, ChunkIndexOutOfRange, InvalidArgument."""

    chunk_q_tokens: int
    prefix_kv_tokens: int
    total_chunks: int
    chunk_index: int

    def __post_init__(self) -> None:
        check_rows("chunk_q_tokens", self.chunk_q_tokens)
        check_rows("total_chunks", self.total_chunks)
        if not 0 <= self.chunk_index < self.total_chunks:
            raise ChunkIndexOutOfRange(
                f"chunk_index={self.chunk_index}: the chunks of a prompt of {self.total_chunks} are 0 to {self.total_chunks - 1}"
            )
        if self.prefix_kv_tokens < self.chunk_index:
            raise InvalidArgument(
                f"prefix_kv_tokens={self.prefix_kv_tokens} before chunk {self.chunk_index}: the keys of the chunks before it belong to its "
                "prefix, at least one each"
            )
        check_rows("prefix_kv_tokens + chunk_q_tokens", self.kv_tokens)

    @property
    def kv_tokens(self) -> int:
        """Keys that the chunk's last query sees."""
        return self.prefix_kv_tokens + self.chunk_q_tokens


def ChunkedPrefillRequest(
    *,
    kv_cache: KvCache,
    chunk: ChunkLayout,
    batch: int = 1,
    family: str | None = None,
    persistent: PersistentMode | None = None,
    **arguments: Any,
) -> FwdRequest:
    """A forward of one chunk of a prompt, or of `batch` prompts in step, over a cache that holds its prefix and its own keys. Where no CTAs
    share the keys of a sequence, a prompt gives the same bits in whatever chunks it comes, and in one (docs/kvcache.md).

    arguments: those of AttentionRequest; mask: default Causal(). Raises as forward_request does, and InvalidArgument where the cache has no
    room for the chunk."""
    if chunk.kv_tokens > kv_cache.capacity:
        raise InvalidArgument(
            f"prefix_kv_tokens={chunk.prefix_kv_tokens} and chunk_q_tokens={chunk.chunk_q_tokens}: the cache has room for "
            f"{kv_cache.capacity} keys of a sequence"
        )
    rows = CumulativeSeqlens(batch * chunk.chunk_q_tokens, batch * kv_cache.capacity)
    sizes = {"batch": batch, "seqlen_q": chunk.chunk_q_tokens, "seqlen_k": chunk.kv_tokens}
    defaults = {"arch": "sm_90a", "dropout_p": 0.0, "mask": Causal()}
    return forward_request(family, persistent, cu_seqlens=rows, kv_cache=kv_cache, **sizes, **(defaults | arguments))
