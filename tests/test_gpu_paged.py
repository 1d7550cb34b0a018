"""Attention over KV caches on a GPU, by the test rule against float64; whatever of a cache is not in use holds NaN."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import pytest

import cutlass_fa
from cutlass_fa.device import device_info
from cutlass_fa.dispatch import BUILT_FLAGS
from tests.append_cases import moved
from tests.backward_cases import DTYPES
from tests.cache_cases import LAYOUTS, WILD, Cache, CacheCase, name_wild_blocks
from tests.covering import covering
from tests.numerics import check_forward, poisoned

pytestmark = pytest.mark.gpu

FAMILIES = tuple(family for family in ("fa2", "fa3") if "paged" in BUILT_FLAGS[family, "fwd"])
HEADS = {"mha": (2, 2), "gqa4": (8, 2), "gqa8": (16, 2), "mqa": (6, 1)}
MASKS: dict[str, dict[str, Any]] = {
    "full": {},
    "causal": {"causal": True},
    "window": {"window_size": (70, 3)},
    "sinks": {"causal": True, "window_size": (90, 0), "sink_tokens": 5},
}


def need(family: str) -> None:
    """Skips where this GPU lacks the family's instructions."""
    if family == "fa3" and device_info(0).arch != "sm_90a":
        pytest.skip("family fa3 needs sm_90a")


def on_gpu(cache: Cache) -> Cache:
    """The same arrays on the GPU, caches in the same strides."""
    import cupy

    arrays = moved(cupy, {name: getattr(cache, name) for name in ("q", "k", "v", "k_cache", "v_cache")})
    return Cache(**arrays, extras=moved(cupy, cache.extras), packed=moved(cupy, cache.packed))


def attend(cache: Cache, family: str, *, batch: int = 0, **options: Any) -> tuple[Any, Any]:
    """(out, lse) as packed sequences have them. batch: q goes in with this first dimension, 0: packed."""
    import cupy

    given = dict(cache.extras)
    starts, table = given.pop("cu_seqlens_q"), given.pop("block_table", None)
    q = cache.q.reshape(batch, -1, *cache.q.shape[1:]) if batch else cache.q
    given["cache_seqlens"] = given.pop("seqused_k")
    if table is not None:
        given["block_table" if table.ndim == 2 else "cache_batch_idx"] = table
    if not batch:
        given["cu_seqlens_q"] = starts
    written = {"out": poisoned(cupy, q.shape, q.dtype), "return_softmax_lse": True, "family": family}
    out, lse = cutlass_fa.flash_attn_with_kvcache(q, cache.k_cache, cache.v_cache, **given, **written, **options)
    if not batch:
        return out, lse
    return out.reshape(cache.q.shape), lse.swapaxes(0, 1).reshape(lse.shape[1], -1)


def features(heads: int, alibi: bool, learnable_sink: bool, softcap: bool) -> dict[str, Any]:
    """What the call and the reference are given of them."""
    import cupy

    found: dict[str, Any] = {"softcap": 15.0} if softcap else {}
    if alibi:
        found["alibi_slopes"] = cupy.asarray(np.linspace(0.01, 0.6, heads, dtype=np.float32))
    if learnable_sink:
        found["learnable_sink"] = cupy.asarray(np.linspace(-2, 3, heads, dtype=np.float32))
    return found


# ---- every two choices ---------------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Call:
    """Sequences of seqlen_q queries each, or, packed, of at most as many."""

    family: str
    dtype: str
    head_dim: int
    block_size: int
    layout: str
    seqlen_q: int
    heads: str
    mask: str
    alibi: bool
    learnable_sink: bool
    softcap: bool
    packed: bool
    shared: bool

    def __str__(self) -> str:
        words = [self.family, self.dtype, f"d{self.head_dim}", f"page{self.block_size}", self.layout.replace("/", "_"), f"q{self.seqlen_q}"]
        flags = ("alibi", "learnable_sink", "softcap", "packed", "shared")
        return "-".join([*words, self.heads, self.mask, *(flag for flag in flags if getattr(self, flag))])

    @property
    def case(self) -> CacheCase:
        longest = self.seqlen_q
        queries = (longest, max(longest // 2, 1), 1, longest, 0, longest) if self.packed else (longest,) * 6
        keys = (530, longest + 77, 9, longest, 40, 0)  # the first fills the block that all share
        return CacheCase(str(self), tuple(zip(queries, keys, strict=True)), self.block_size, self.layout, self.shared)


FACTORS: dict[str, Any] = {
    "family": FAMILIES,
    "dtype": ("f16", "bf16"),
    "head_dim": (64, 128, 256),
    "block_size": (8, 16, 32, 64, 128, 256, 0),
    "layout": ("rows", "heads", "tokens", "tokens/rows", "heads/tokens"),
    "seqlen_q": (1, 2, 5, 16, 63, 128, 511),
    "heads": tuple(HEADS),
    "mask": tuple(MASKS),
} | {flag: (False, True) for flag in ("alibi", "learnable_sink", "softcap", "packed", "shared")}


@pytest.mark.parametrize("call", [Call(**chosen) for chosen in covering(FACTORS, 2)], ids=str)
def test_every_two_choices(call: Call) -> None:
    need(call.family)
    heads = HEADS[call.heads]
    cache = on_gpu(call.case.make(np, np.random.default_rng(7), heads, call.head_dim, DTYPES[call.dtype]))
    options = MASKS[call.mask] | features(heads[0], call.alibi, call.learnable_sink, call.softcap)
    out, lse = attend(cache, call.family, batch=0 if call.packed else call.case.batch, **options)
    check_forward(out, lse, cache.q, cache.k, cache.v, case=call, **options, **cache.packed)


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("head_dim", [72, 80, 96, 128, 136])
@pytest.mark.parametrize("layout", ["rows", "tokens"])
def test_other_head_dims(family: str, head_dim: int, layout: str) -> None:
    need(family)
    case = CacheCase("head_dims", ((5, 200), (130, 131), (1, 63)), 16, layout)
    cache = on_gpu(case.make(np, np.random.default_rng(3), (4, 2), head_dim, DTYPES["bf16"]))
    out, lse = attend(cache, family, causal=True)
    check_forward(out, lse, cache.q, cache.k, cache.v, case=f"{family} {head_dim} {layout}", causal=True, **cache.packed)


@pytest.mark.parametrize("family", FAMILIES)
def test_padding_in_front_and_rows_of_other_sequences(family: str) -> None:
    need(family)
    case = CacheCase("padding", ((1, 9), (70, 200), (5, 133)), 0, "heads", padding=(3, 20, 150), batch_index=(4, 0, 2))
    cache = on_gpu(case.make(np, np.random.default_rng(3), (4, 2), 128, DTYPES["bf16"]))
    out, lse = attend(cache, family, causal=True)
    check_forward(out, lse, cache.q, cache.k, cache.v, case=f"{family} padding", causal=True, **cache.packed)


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("layout", ["rows", "tokens"])
def test_blocks_that_do_not_exist_are_zeros(family: str, layout: str) -> None:
    """For compute-sanitizer too: no access outside the arrays."""
    need(family)
    case = replace(WILD, layout=layout)
    cache = case.make(np, np.random.default_rng(3), (4, 2), 64, DTYPES["f16"])
    name_wild_blocks(cache, case)
    cache = on_gpu(cache)
    out, lse = attend(cache, family)
    check_forward(out, lse, cache.q, cache.k, cache.v, case=f"{family} {layout} wild", **cache.packed)


# ---- a cache whose numbers change ------------------------------------------------------------------------------------------------------


def pages(rng: np.random.Generator, layout: str, num_blocks: int, block_size: int, heads: int, head_dim: int, dtype: Any) -> np.ndarray:
    """Random numbers everywhere, (block, key, head, column) as a view of the layout's memory."""
    order, extents = LAYOUTS[layout], (num_blocks, block_size, heads, head_dim)
    memory = rng.standard_normal([extents[axis] for axis in order], dtype=np.float32).astype(dtype)
    return memory.transpose([order.index(axis) for axis in range(4)])


def gathered(cache: np.ndarray, table: np.ndarray, lengths: np.ndarray) -> np.ndarray:
    """The keys in use, packed."""
    heads, head_dim = cache.shape[2:]
    rows = [cache[blocks].reshape(-1, heads, head_dim)[:length] for blocks, length in zip(table, lengths, strict=True)]
    return np.ascontiguousarray(np.concatenate(rows))


def starts_of(lengths: Any) -> np.ndarray:
    return np.concatenate([[0], np.cumsum(lengths)]).astype(np.int32)


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("layout", ["rows", "tokens"])
def test_a_captured_call_reads_new_lengths_and_tables(family: str, layout: str) -> None:
    import cupy

    need(family)
    rng, batch, dtype = np.random.default_rng(5), 5, DTYPES["bf16"]
    caches = [pages(rng, layout, 64, 16, 2, 64, dtype) for _ in "kv"]
    q = rng.standard_normal((batch, 3, 8, 64), dtype=np.float32).astype(dtype)
    numbers = {"cache_seqlens": np.zeros(batch, np.int32), "block_table": np.zeros((batch, 12), np.int32)}
    on_device = moved(cupy, {"q": q, "k_cache": caches[0], "v_cache": caches[1], **numbers})
    stream = cupy.cuda.Stream(non_blocking=True)
    call = {"causal": True, "return_softmax_lse": True, "family": family}
    with stream:
        cutlass_fa.flash_attn_with_kvcache(**on_device, **call)  # compiled before the capture
        stream.synchronize()
        stream.begin_capture()
        out, lse = cutlass_fa.flash_attn_with_kvcache(**on_device, **call)
        graph = stream.end_capture()
    for step in range(10):
        numbers["cache_seqlens"][:] = rng.integers(0, 12 * 16 + 1, batch)
        numbers["block_table"][:] = rng.permutation(64)[: batch * 12].reshape(batch, 12)
        for name, array in numbers.items():
            on_device[name].set(array)
        cupy.cuda.Device().synchronize()
        graph.launch(stream)
        stream.synchronize()
        k, v = (gathered(cache, numbers["block_table"], numbers["cache_seqlens"]) for cache in caches)
        arrays = moved(cupy, {"q": q.reshape(-1, 8, 64).copy(), "k": k, "v": v})
        packed = {"cu_seqlens_q": cupy.asarray(starts_of([3] * batch)), "cu_seqlens_k": cupy.asarray(starts_of(numbers["cache_seqlens"]))}
        packed_lse = lse.swapaxes(0, 1).reshape(8, -1)
        check_forward(out.reshape(-1, 8, 64), packed_lse, **arrays, case=f"{family} {layout} replay {step}", causal=True, **packed)


# ---- chunks and generation -------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("layout", ["rows", "tokens"])
@pytest.mark.parametrize("heads", ["mha", "gqa8"])
@pytest.mark.parametrize("feature", ["none", "alibi", "sinks", "softcap"])
def test_chunks_give_the_bits_of_one_pass(family: str, layout: str, heads: str, feature: str) -> None:
    """Chunks of all sizes, some of which take other tiles and kernels than the pass does."""
    import cupy

    need(family)
    rng, dtype, num_heads = np.random.default_rng(5), DTYPES["bf16"], HEADS[heads]
    chunks = (1, 63, 64, 100, 72, 511, 3, 186)
    prompt = sum(chunks)
    options = features(num_heads[0], feature == "alibi", False, feature == "softcap") | MASKS["sinks" if feature == "sinks" else "causal"]
    q = (6 * rng.standard_normal((1, prompt, num_heads[0], 128), dtype=np.float32)).astype(dtype)  # loud: origins move
    arrays = {
        "k_cache": pages(rng, layout, 70, 16, num_heads[1], 128, dtype),
        "v_cache": pages(rng, layout, 70, 16, num_heads[1], 128, dtype),
    }
    table = rng.permutation(70)[: -(-prompt // 16)].astype(np.int32)[None]
    on_device = moved(cupy, {"q": q, "block_table": table, **arrays})
    q = on_device.pop("q")
    call = {**options, **on_device, "num_splits": 1, "return_softmax_lse": True, "family": family}

    def attention(first: int, end: int) -> tuple[Any, Any]:
        return cutlass_fa.flash_attn_with_kvcache(q[:, first:end], cache_seqlens=cupy.full(1, end, np.int32), **call)

    out, lse = attention(0, prompt)
    first = 0
    for rows in chunks:
        part, part_lse = attention(first, first + rows)
        assert (part.view(np.uint16) == out[:, first : first + rows].view(np.uint16)).all(), f"rows {first} to {first + rows}"
        assert (part_lse.view(np.uint32) == lse[:, :, first : first + rows].view(np.uint32)).all(), f"rows {first} to {first + rows}"
        first += rows


class Generation:
    """Sequences that grow in a paged cache, and beside it all that was ever appended, padded: (sequence, position, head, column)."""

    def __init__(self, family: str, layout: str, prompts: np.ndarray, steps: int) -> None:
        import cupy

        self.family, self.prompts, self.batch = family, prompts, len(prompts)
        self.heads, self.head_dim, self.dtype = (4, 1), 64, DTYPES["bf16"]
        capacity = int(prompts.max()) + steps
        blocks = -(-capacity // 16)
        rng = np.random.default_rng(11)
        empty = pages(rng, layout, self.batch * blocks + 3, 16, self.heads[1], self.head_dim, self.dtype)
        empty[...] = np.nan
        table = rng.permutation(len(empty))[: self.batch * blocks].reshape(self.batch, blocks).astype(np.int32)
        arrays = moved(cupy, {"k_cache": empty, "v_cache": empty, "block_table": table})
        self.caches = arrays
        self.lengths = cupy.zeros(self.batch, np.int32)
        shape = (self.batch, capacity, self.heads[1], self.head_dim)
        self.k, self.v = (cupy.asarray(rng.standard_normal(shape, dtype=np.float32)).astype(self.dtype) for _ in "kv")
        self.q = cupy.asarray(rng.standard_normal((self.batch, capacity, self.heads[0], self.head_dim), dtype=np.float32)).astype(
            self.dtype
        )

    def advance(self, rows: np.ndarray) -> tuple[Any, np.ndarray, np.ndarray]:
        """The next `rows` tokens of each sequence are appended and attended to: (out of all, sequence of each row, position of each)."""
        import cupy

        before = self.lengths.get()
        sequence = np.repeat(np.arange(self.batch), rows)
        position = before[sequence] + np.arange(rows.sum()) - starts_of(rows)[sequence]
        at = cupy.asarray(sequence), cupy.asarray(position)
        starts = cupy.asarray(starts_of(rows))
        packed = {"cu_seqlens_q": starts, "cu_seqlens_k_new": starts, "cache_seqlens": self.lengths}
        new = (x.view(np.uint16)[at].view(self.dtype) for x in (self.q, self.k, self.v))
        q, k, v = new
        out = cutlass_fa.flash_attn_with_kvcache(q, k=k, v=v, causal=True, family=self.family, **packed, **self.caches)
        self.lengths = self.lengths + cupy.asarray(rows.astype(np.int32))
        return out, sequence, position

    def check(self, out: Any, sequence: np.ndarray, position: np.ndarray, case: str) -> None:
        """Each row against float64 over all keys up to its own, none of which is read from the cache."""
        import cupy

        q = self.q.view(np.uint16)[cupy.asarray(sequence), cupy.asarray(position)].view(self.dtype).astype(np.float64)
        end = int(position.max()) + 1
        k, v = (x[:, :end, 0].astype(np.float64)[cupy.asarray(sequence)] for x in (self.k, self.v))
        scores = cupy.einsum("rhd,rnd->rhn", q, k) / np.sqrt(self.head_dim)
        scores[(cupy.arange(end)[None] > cupy.asarray(position)[:, None])[:, None].repeat(self.heads[0], 1)] = -np.inf
        p = cupy.exp(scores - scores.max(-1, keepdims=True))
        expected = cupy.einsum("rhn,rnd->rhd", p / p.sum(-1, keepdims=True), v)
        error = float(cupy.abs(out.astype(np.float64) - expected).max())
        allowed = 4 * 2.0**-8 * float(cupy.abs(expected).max())  # P and out are rounded to bfloat16, each by half an ulp
        assert error <= allowed, f"{case}: {error} where {allowed} is allowed"


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("layout", ["rows", "tokens"])
def test_generation(family: str, layout: str) -> None:
    """64 prompts of different lengths in chunks of at most 32 tokens, then 200 tokens each, one at a time; each step is held to float64."""
    need(family)
    prompts = np.random.default_rng(2).integers(1, 120, 64)
    generation = Generation(family, layout, prompts, steps=200)
    left = prompts.copy()
    while left.any():
        rows = np.minimum(left, 32)
        generation.check(*generation.advance(rows), f"prompts, {left.sum()} tokens left")
        left -= rows
    for step in range(200):
        generation.check(*generation.advance(np.ones(64, np.int64)), f"step {step}")
