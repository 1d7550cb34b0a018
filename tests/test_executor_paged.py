"""Cells on KV caches on the CPU executor, by the test rule, under several schedules; unused rows of the cache hold NaN."""

from __future__ import annotations

from dataclasses import replace
from functools import cache
from typing import Any

import numpy as np
import pytest

from cutlass_fa.cell import Cell
from cutlass_fa.dispatch import DISPATCH_TABLE, DispatchKey
from cutlass_fa.executor import ExecutorKernel, Program, compiler_problem, run_forward
from cutlass_fa.render import render
from tests.backward_cases import DTYPES
from tests.cache_cases import PAGED_CASES, WILD, CacheCase, name_wild_blocks
from tests.numerics import check_forward
from tests.test_executor_varlen import features
from tests.varlen_cases import Lengths

pytestmark = pytest.mark.skipif(compiler_problem() is not None, reason=str(compiler_problem()))

GOLDEN = [key for key in DISPATCH_TABLE if key.direction == "fwd" and key.paged]
OTHERS = [  # more masks, tokens innermost in K alone, in V alone, and in every cell's shared memory
    DispatchKey.parse(name)
    for name in (
        "fa2_fwd_sm80_f16_hdim64_varlen_window_alibi_sink_lsink_paged_kinner",
        "fa2_fwd_sm80_bf16_hdim96_varlen_alibi_paged_offsets_f32out_gqa4",
        "fa2_fwd_sm80_bf16_hdim80_causal_varlen_paged_vinner",
        "fa2_fwd_sm86_bf16_hdim256_causal_varlen_paged_vinner",
        "fa2_fwd_sm90a_f16_hdim192_varlen_window_paged_kinner_vinner_gqa5",
        "fa2_fwd_sm120_bf16_hdim128_causal_varlen_window_paged",
        "fa3_fwd_sm90a_f16_hdim64_varlen_window_alibi_sink_lsink_paged_kinner",
        "fa3_fwd_sm90a_bf16_hdim80_varlen_paged_vinner_gqa4",
        "fa3_fwd_sm90a_f16_hdim96_causal_varlen_paged_kinner_vinner",
        "fa3_fwd_sm90a_bf16_hdim192_causal_varlen_window_paged_vinner",
        "fa3_fwd_sm90a_bf16_hdim256_varlen_alibi_paged_kinner_vinner_offsets_f32out",
    )
]
SEEDS = (0, 1, 2)


@cache
def program_of(key: DispatchKey) -> Program:
    """Compiled once."""
    return ExecutorKernel.build(render(Cell.of(key)))


@pytest.mark.parametrize(("key", "case"), [(key, case) for key in (*GOLDEN, *OTHERS) for case in PAGED_CASES if case.serves(key)], ids=str)
def test_cell(key: DispatchKey, case: CacheCase) -> None:
    """Right under every schedule, and bitwise the same."""
    heads = max(key.gqa_ratio, 2) * 2, 2
    cache = case.make(np, np.random.default_rng(7), heads, key.head_dim, DTYPES[key.dtype])
    called, expected = features(key, Lengths(case.name, case.pairs), heads[0])
    results = []
    for seed in SEEDS:
        inputs = {"seed": seed, "program": program_of(key), "cached": True}
        results.append(run_forward(Cell.of(key), cache.q, cache.k_cache, cache.v_cache, **inputs, **called, **cache.extras))
        assert results[-1].out.tobytes() == results[0].out.tobytes() and (results[-1].lse == results[0].lse).all()
    expected |= {"causal": key.causal, **cache.packed}
    check_forward(results[0].out, results[0].lse, cache.q, cache.k, cache.v, case=f"{key} {case}", **expected)


@pytest.mark.parametrize("layout", ["rows", "tokens/rows", "heads/tokens", "tokens"])
def test_blocks_that_do_not_exist_are_zeros(layout: str) -> None:
    """And no copy reads outside the cache."""
    case = replace(WILD, layout=layout)
    inner: dict[str, Any] = {f"{name}_tokens_inner": each == "tokens" for name, each in zip("kv", case.layouts, strict=True)}
    key = DispatchKey("fa3", "fwd", "sm_90a", "f16", 64, varlen=True, paged=True, **inner)
    cache = case.make(np, np.random.default_rng(3), (4, 2), key.head_dim, DTYPES[key.dtype])
    name_wild_blocks(cache, case)
    inputs = {"seed": 5, "program": program_of(key), "cached": True, **cache.extras}
    result = run_forward(Cell.of(key), cache.q, cache.k_cache, cache.v_cache, **inputs)
    check_forward(result.out, result.lse, cache.q, cache.k, cache.v, case=f"{key} wild", **cache.packed)
