"""Requests over KV caches: chunks of a prompt, what is refused, and the kernels that they need."""

from __future__ import annotations

from typing import Any

import pytest

import cutlass_fa
from cutlass_fa import ChunkedPrefillRequest, ChunkLayout, ContiguousKvCache, PagedAttentionRequest, PagedKvCache, errors
from cutlass_fa.dispatch import DISPATCH_TABLE, DispatchKey
from cutlass_fa.explain import keys_of
from cutlass_fa.precompile import precompile
from cutlass_fa.request_parts import MAX_SEQLEN
from cutlass_fa.settings import no_compile

HEADS: dict[str, Any] = {"num_heads_q": 8, "num_heads_kv": 2, "head_dim": 128}
CACHE = PagedKvCache(num_blocks=64, block_size=16, max_blocks=32)
CHUNK = ChunkLayout(chunk_q_tokens=200, prefix_kv_tokens=300, total_chunks=3, chunk_index=2)


@pytest.mark.parametrize(
    ("chunk", "error", "words"),
    [
        ((0, 0, 1, 0), errors.ZeroSeqlen, "chunk_q_tokens=0"),
        ((5, 0, 0, 0), errors.ZeroSeqlen, "total_chunks=0"),
        ((5, 5, 3, 3), errors.ChunkIndexOutOfRange, "chunk_index=3: .* 0 to 2"),
        ((5, 5, 3, -1), errors.ChunkIndexOutOfRange, "chunk_index=-1"),
        ((5, -1, 3, 0), errors.InvalidArgument, "prefix_kv_tokens=-1"),
        ((5, 0, 3, 1), errors.InvalidArgument, "prefix_kv_tokens=0 before chunk 1"),
        ((5, MAX_SEQLEN - 4, 3, 1), errors.SeqlenOverflow, "prefix_kv_tokens"),
    ],
)
def test_a_chunk_that_is_none_is_refused(chunk: tuple[int, int, int, int], error: type[Exception], words: str) -> None:
    with pytest.raises(error, match=words) as caught:
        ChunkLayout(*chunk)
    assert isinstance(caught.value, errors.FlashAttnError)


def test_a_cache_without_room_for_the_chunk_is_refused() -> None:
    with pytest.raises(errors.InvalidArgument, match="room for 480 keys"):
        ChunkedPrefillRequest(kv_cache=PagedKvCache(64, 16, 30), chunk=CHUNK, **HEADS)
    assert ChunkedPrefillRequest(kv_cache=ContiguousKvCache(1, 500), chunk=CHUNK, **HEADS).seqlen_k == 500


@pytest.mark.parametrize("batch", [1, 3])
def test_a_chunk_is_a_causal_call_on_the_cache(batch: int) -> None:
    request = ChunkedPrefillRequest(kv_cache=CACHE, chunk=CHUNK, batch=batch, **HEADS)
    assert (request.batch, request.rows_q, request.seqlen_q, request.seqlen_k) == (batch, 200 * batch, 200, 500)
    assert request.mask == cutlass_fa.Causal() and request.kv_cache == CACHE
    same = PagedAttentionRequest(kv_cache=CACHE, batch=batch, total_q=200 * batch, seqlen_q=200, mask=cutlass_fa.Causal(), **HEADS)
    assert request.dispatch_keys() == same.dispatch_keys()
    key = request.dispatch_key()
    assert key.paged and key.varlen and key.causal and DISPATCH_TABLE.lookup(key) is key


def test_a_cache_with_tokens_innermost_has_kernels_of_its_own() -> None:
    cache = PagedKvCache(64, 16, 32, k_tokens_inner=True, v_tokens_inner=True)
    mask = cutlass_fa.SlidingCausal(64)
    key = ChunkedPrefillRequest(kv_cache=cache, chunk=CHUNK, mask=mask, softcap=10.0, num_splits=1, **HEADS).dispatch_key()
    assert str(key) == "fa3_fwd_sm90a_bf16_hdim128_causal_varlen_window_paged_kinner_vinner_softcap_gqa4"


def test_a_chunk_is_planned_with_every_kernel_of_its_call() -> None:
    assert [key.split for key in keys_of(ChunkedPrefillRequest(kv_cache=CACHE, chunk=CHUNK, **HEADS))] == [True]  # few tiles: one launch
    request = ChunkedPrefillRequest(kv_cache=CACHE, chunk=CHUNK, num_splits=1, **HEADS)
    keys = keys_of(request)
    assert keys == request.dispatch_keys() and [key.direction for key in keys] == ["sequence_tiles", "fwd"]
    with no_compile():
        results = list(precompile([request]))
    assert {result.key for result in results} == {str(key) for key in keys} and all(DispatchKey.parse(result.key) for result in results)
