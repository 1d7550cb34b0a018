"""Calls on KV caches whose keys CTAs share, on a GPU: by the test rule, equal bits in any order, in any batch and at each replay."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

import cutlass_fa
from cutlass_fa.device import device_info
from tests.cache_cases import Cache, CacheCase
from tests.numerics import check_forward

pytestmark = pytest.mark.gpu

SPLITS = (0, 1, 2, 3, 7, 100)
CASES = (
    CacheCase("one-query", ((1, 700), (1, 0), (1, 1), (1, 129), (1, 5130)), 16),
    CacheCase("one-sequence", ((1, 30011),), 64, "heads"),
    CacheCase("some-queries", ((2, 300), (5, 6400), (16, 16), (0, 50), (3, 0)), 128),
    CacheCase("several-tiles", ((70, 4000), (1, 20), (130, 131)), 32),
    CacheCase("contiguous", ((5, 3000), (2, 5), (1, 777)), padding=(3, 0, 20), batch_index=(4, 0, 2)),
    CacheCase("many-sequences", tuple((1, 7 * i % 950) for i in range(300)), 8),
    CacheCase("shared", tuple((1, 1000 + i) for i in range(64)), 256, shared=True),
)
HEADS = {"gqa4": (32, 8), "mqa": (40, 1), "mha": (3, 3), "gqa5": (10, 2)}
FEATURES: dict[str, dict[str, Any]] = {
    "causal": {"causal": True},
    "full": {},
    "window": {"causal": True, "window_size": (200, 0), "sink_tokens": 70},
    "softcap": {"softcap": 20.0},
}


@pytest.fixture(autouse=True)
def hopper() -> None:
    if device_info(0).arch != "sm_90a":
        pytest.skip("family fa3 alone divides keys among CTAs")


def make(case: CacheCase, heads: str, head_dim: int) -> Cache:
    import cupy

    rng = cupy.random.default_rng(np.random.SeedSequence().generate_state(1)[0])
    return case.make(cupy, rng, HEADS[heads], head_dim, np.float16)


def attend(cache: Cache, num_splits: int, **options: Any) -> tuple[Any, Any]:
    extras = dict(cache.extras)
    extras["cache_seqlens"] = extras.pop("seqused_k")
    if "block_table" in extras and extras["block_table"].ndim == 1:
        extras["cache_batch_idx"] = extras.pop("block_table")
    options = {"num_splits": num_splits, "return_softmax_lse": True} | options
    return cutlass_fa.flash_attn_with_kvcache(cache.q, cache.k_cache, cache.v_cache, **extras, **options)


def bits(arrays: tuple[Any, Any]) -> bytes:
    return b"".join(x.get().tobytes() for x in arrays)


@pytest.mark.parametrize("num_splits", SPLITS)
@pytest.mark.parametrize("case", CASES, ids=str)
def test_shapes(case: CacheCase, num_splits: int) -> None:
    cache = make(case, "gqa4", 128)
    out, lse = attend(cache, num_splits, causal=True)
    check_forward(out, lse, cache.q, cache.k, cache.v, case=f"{case} {num_splits}", causal=True, **cache.packed)


@pytest.mark.parametrize("features", FEATURES)
@pytest.mark.parametrize("heads", HEADS)
@pytest.mark.parametrize("head_dim", [64, 72, 96, 128, 192, 256])
def test_features(head_dim: int, heads: str, features: str) -> None:
    case = CASES[(head_dim // 8 + len(heads)) % 5]
    cache = make(case, heads, head_dim)
    for num_splits in (0, 3):
        out, lse = attend(cache, num_splits, **FEATURES[features])
        expected = FEATURES[features] | cache.packed
        check_forward(out, lse, cache.q, cache.k, cache.v, case=f"{case} {head_dim} {heads} {features} {num_splits}", **expected)


@pytest.mark.parametrize("num_splits", [0, 3])
@pytest.mark.parametrize("case", [CASES[0], CASES[1], CASES[5]], ids=str)
def test_a_thousand_calls_give_equal_bits(case: CacheCase, num_splits: int) -> None:
    """Whichever part of a tile comes last; and counters are back at 0 after each."""
    cache = make(case, "gqa4", 128)
    first = attend(cache, num_splits, causal=True)
    for _ in range(1000):
        again = attend(cache, num_splits, causal=True)
        assert bool((again[0].view(np.uint16) == first[0].view(np.uint16)).all() and (again[1] == first[1]).all())


def test_a_fixed_number_of_parts_does_not_depend_on_the_batch() -> None:
    both = make(CacheCase("both", ((1, 3000), *((1, 500 + 37 * i) for i in range(40))), 16), "gqa4", 128)
    out, lse = attend(both, 4, causal=True)
    tables = {
        "block_table": both.extras["block_table"][:1],
        "seqused_k": both.extras["seqused_k"][:1],
        "cu_seqlens_q": both.extras["cu_seqlens_q"][:2],
    }
    one = Cache(both.q[:1], both.k, both.v, both.k_cache, both.v_cache, tables, both.packed)
    assert bits(attend(one, 4, causal=True)) == bits((out[:1], lse[:, :1]))


@pytest.mark.parametrize("num_splits", [0, 5])
def test_a_captured_call_reads_new_lengths_and_tables(num_splits: int) -> None:
    import cupy

    cache = make(CacheCase("graph", ((1, 3000), (1, 2000), (1, 900)), 16), "gqa4", 128)
    lengths, table = cache.extras["seqused_k"], cache.extras["block_table"]
    out = cupy.empty_like(cache.q)
    attend(cache, num_splits, causal=True, out=out)
    stream = cupy.cuda.Stream(non_blocking=True)
    with stream:
        stream.begin_capture()
        attend(cache, num_splits, causal=True, out=out)
        graph = stream.end_capture()
    for new in ((3000, 2000, 900), (1, 0, 17), (64, 1999, 333)):
        lengths[:] = cupy.array(new, np.int32)
        table[1:2, :4] = table[2:3, :4]
        expected = attend(cache, num_splits, causal=True)[0]
        cupy.cuda.Device().synchronize()
        for _ in range(3):
            graph.launch(stream)
        stream.synchronize()
        assert bool((out.view(np.uint16) == expected.view(np.uint16)).all())
