"""A prompt processed in chunks against what is in the cache gives the bits of one pass, on the CPU executor: no row depends on the rows
that its tile holds beside it, nor on how heads are packed."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from functools import cache
from itertools import accumulate, product
from typing import Any

import numpy as np
import pytest

from cutlass_fa.cell import Cell
from cutlass_fa.dispatch import ARCHS, CELL_HEAD_DIMS, DispatchKey
from cutlass_fa.executor import ExecutorKernel, Program, compiler_problem, run_forward
from cutlass_fa.executor.forward import Forward
from cutlass_fa.render import render
from tests.backward_cases import DTYPES
from tests.cache_cases import LAYOUTS
from tests.numerics import check_forward

pytestmark = pytest.mark.skipif(compiler_problem() is not None, reason=str(compiler_problem()))

CHUNKS = (1, 63, 64, 100, 72)
PROMPT = sum(CHUNKS)
PAGE = 16
FLAGS = ("causal", "sliding_window", "alibi", "learnable_sink", "softcap", "k_tokens_inner", "v_tokens_inner")
LOUD = 6.0  # of queries: scores grow from block to block, so that rows move their origins, each when its own scores say so


@cache
def program_of(key: DispatchKey) -> Program:
    """Compiled once."""
    return ExecutorKernel.build(render(Cell.of(key)))


def features(key: DispatchKey, heads: int) -> dict[str, Any]:
    """What a call of the key's features is given; the reference takes the same."""
    found: dict[str, Any] = {"window_size": (90, 0)} if key.sliding_window else {}
    if key.sink:
        found["sink_tokens"] = 5
    if key.alibi:
        found["alibi_slopes"] = np.float32(0.3) * np.float32(2) ** -np.arange(heads, dtype=np.float32)
    if key.learnable_sink:
        found["learnable_sink"] = np.linspace(-2, 3, heads, dtype=np.float32)
    if key.softcap:
        found["softcap"] = 20.0
    return found


def prompt(key: DispatchKey) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """q, k, v (tokens, heads, head_dim) of one sequence; the largest scores of different rows lie in different blocks."""
    rng = np.random.default_rng(3)
    q, k, v = (rng.standard_normal((PROMPT, heads, key.head_dim), dtype=np.float32) for heads in (4, 1, 1))
    return tuple(x.astype(DTYPES[key.dtype]) for x in (LOUD * q, k, v))  # type: ignore[return-value]


def pages_of(layout: str, packed: np.ndarray, table: np.ndarray) -> np.ndarray:
    """A cache with these tokens; NaN in all that they do not fill."""
    order = LAYOUTS[layout]
    extents = (table.size + 2, PAGE, *packed.shape[1:])
    memory = np.full([extents[axis] for axis in order], np.nan, np.float32).astype(packed.dtype)
    pages = memory.transpose([order.index(axis) for axis in range(4)])
    token = np.arange(len(packed))
    pages[table[0, token // PAGE], token % PAGE] = packed
    return pages


def chunks() -> Iterator[tuple[int, slice]]:
    """(tokens up to its end, rows) of each."""
    for end, rows in zip(accumulate(CHUNKS), CHUNKS, strict=True):
        yield end, slice(end - rows, end)


def run_cached(key: DispatchKey, q: np.ndarray, k: np.ndarray, v: np.ndarray) -> Forward:
    """q at the end of the tokens of k and v, which lie in a cache."""
    table = np.random.default_rng(1).permutation(-(-len(k) // PAGE)).astype(np.int32)[None]
    layouts = ("tokens" if inner else "rows" for inner in (key.k_tokens_inner, key.v_tokens_inner))
    caches = [pages_of(layout, x, table) for layout, x in zip(layouts, (k, v), strict=True)]
    sequence = {"block_table": table, "seqused_k": np.array([len(k)], np.int32), "cu_seqlens_q": np.array([0, len(q)], np.int32)}
    return run_forward(Cell.of(key), q, *caches, seed=len(q), program=program_of(key), cached=True, **sequence, **features(key, q.shape[1]))


def run_packed(key: DispatchKey, q: np.ndarray, k: np.ndarray, v: np.ndarray) -> Forward:
    """The same where k and v are one packed sequence."""
    sequence = {f"cu_seqlens_{name}": np.array([0, len(x)], np.int32) for name, x in (("q", q), ("k", k))}
    return run_forward(Cell.of(key), q, k, v, seed=len(q), program=program_of(key), **sequence, **features(key, q.shape[1]))


@pytest.mark.parametrize(
    ("name", "chunk_name"),
    [
        ("fa3_fwd_sm90a_bf16_hdim128_causal_varlen_paged", "fa3_fwd_sm90a_bf16_hdim128_causal_varlen_paged_gqa4"),
        ("fa3_fwd_sm90a_f16_hdim64_causal_varlen_window_sink_lsink_paged", ""),
        ("fa3_fwd_sm90a_bf16_hdim256_causal_varlen_alibi_paged_kinner_softcap", ""),
        ("fa3_fwd_sm90a_bf16_hdim80_causal_varlen", "fa3_fwd_sm90a_bf16_hdim80_causal_varlen_gqa4"),
        ("fa2_fwd_sm90a_bf16_hdim128_causal_varlen_paged", "fa2_fwd_sm90a_bf16_hdim128_causal_varlen_paged_gqa4"),
        ("fa2_fwd_sm80_f16_hdim64_causal_varlen_alibi_paged_kinner_vinner", ""),
        ("fa2_fwd_sm86_bf16_hdim128_causal_varlen_paged", "fa2_fwd_sm86_bf16_hdim128_causal_varlen_paged_gqa4"),
        ("fa2_fwd_sm80_f16_hdim64_causal_varlen_window_sink_lsink", ""),
    ],
)
def test_chunks_give_the_bits_of_one_pass(name: str, chunk_name: str) -> None:
    """chunk_name: the cell of the chunks, where it is another, and of the pass where it is the same."""
    key, chunk_key = DispatchKey.parse(name), DispatchKey.parse(chunk_name or name)
    run = run_cached if key.paged else run_packed
    q, k, v = prompt(key)
    whole = run(key, q, k, v)
    for end, rows in chunks():
        part = run(chunk_key, q[rows], k[:end], v[:end])
        assert part.out.tobytes() == whole.out[rows].tobytes(), f"rows {rows}"
        assert part.lse.tobytes() == np.ascontiguousarray(whole.lse[:, rows]).tobytes(), f"rows {rows}"
    sequence = {f"cu_seqlens_{side}": np.array([0, PROMPT], np.int32) for side in "qk"}
    check_forward(whole.out, whole.lse, q, k, v, case=name, causal=True, **features(key, q.shape[1]), **sequence)


@pytest.mark.parametrize("arch", ARCHS)
@pytest.mark.parametrize("head_dim", CELL_HEAD_DIMS)
def test_packed_heads_have_blocks_of_as_many_keys(arch: str, head_dim: int) -> None:
    """Of every cell on a cache: a chunk that is short enough to have its heads packed sums by the blocks that the pass has."""
    families = ("fa2", "fa3") if arch == "sm_90a" else ("fa2",)
    for family, *flags in product(families, *[(False, True)] * len(FLAGS)):
        key = DispatchKey(family, "fwd", arch, "bf16", head_dim, varlen=True, paged=True, **dict(zip(FLAGS, flags, strict=True)))  # type: ignore[arg-type]
        assert Cell.of(key).tile_n == Cell.of(replace(key, gqa_ratio=4)).tile_n, key
