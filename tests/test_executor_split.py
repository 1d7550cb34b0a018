"""Golden cells that divide the keys of a tile among CTAs, on the CPU executor: by the test rule, with CTAs in any order, and bitwise equal
whatever the order; unused rows of the cache and the parts' workspace hold NaN."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np
import pytest

from cutlass_fa.cell import Cell
from cutlass_fa.dispatch import DISPATCH_TABLE, DispatchKey
from cutlass_fa.executor import compiler_problem, run_forward
from cutlass_fa.executor.forward import SMALL_DEVICE, Forward
from tests.backward_cases import DTYPES
from tests.cache_cases import Cache, CacheCase
from tests.numerics import check_forward
from tests.test_executor_paged import program_of
from tests.test_executor_varlen import features
from tests.varlen_cases import Lengths

pytestmark = pytest.mark.skipif(compiler_problem() is not None, reason=str(compiler_problem()))

GOLDEN = [key for key in DISPATCH_TABLE if key.direction == "fwd" and key.split]
SEEDS = (0, 1, 2)
DEVICE = replace(SMALL_DEVICE, num_sms=5)

SPLIT_CASES = (
    CacheCase("one-query", ((1, 700), (1, 0), (1, 1), (1, 129), (1, 513)), 16),
    CacheCase("one-sequence", ((1, 1500),), 64, "heads"),
    CacheCase("some-queries", ((2, 300), (5, 640), (16, 16), (0, 50), (3, 0)), 128),
    CacheCase("several-tiles", ((70, 400), (1, 20), (130, 131)), 32),
    CacheCase("contiguous", ((5, 300), (2, 5), (1, 777)), padding=(3, 0, 20), batch_index=(4, 0, 2)),
    CacheCase("many-sequences", tuple((1, 7 * i % 150) for i in range(70)), 8),
)


def heads_of(key: DispatchKey) -> tuple[int, int]:
    return max(key.gqa_ratio, 2) * 2, 2


def run(key: DispatchKey, case: CacheCase, cache: Cache, num_splits: int, seed: int, sms: int = 5) -> Forward:
    called, _ = features(key, Lengths(case.name, case.pairs), heads_of(key)[0])
    inputs: dict[str, Any] = {"seed": seed, "program": program_of(key), "cached": True, "num_splits": num_splits}
    inputs["device"] = replace(DEVICE, num_sms=sms)
    return run_forward(Cell.of(key), cache.q, cache.k_cache, cache.v_cache, **inputs, **called, **cache.extras)


def make(key: DispatchKey, case: CacheCase) -> Cache:
    return case.make(np, np.random.default_rng(7), heads_of(key), key.head_dim, DTYPES[key.dtype])


@pytest.mark.parametrize("num_splits", [0, 2, 3, 7])
@pytest.mark.parametrize("case", SPLIT_CASES, ids=str)
@pytest.mark.parametrize("key", GOLDEN, ids=str)
def test_golden_cell(key: DispatchKey, case: CacheCase, num_splits: int) -> None:
    """Right, and bitwise the same whichever part comes last (a seed draws the order of the CTAs)."""
    cache = make(key, case)
    results = [run(key, case, cache, num_splits, seed) for seed in SEEDS]
    for result in results[1:]:
        assert result.out.tobytes() == results[0].out.tobytes() and result.lse.tobytes() == results[0].lse.tobytes()
    _, expected = features(key, Lengths(case.name, case.pairs), heads_of(key)[0])
    expected |= {"causal": key.causal, **cache.packed}
    check_forward(results[0].out, results[0].lse, cache.q, cache.k, cache.v, case=f"{key} {case} {num_splits}", **expected)


@pytest.mark.parametrize("key", GOLDEN, ids=str)
def test_a_fixed_number_of_parts_gives_a_sequence_the_same_bits_in_any_batch(key: DispatchKey) -> None:
    """And on any GPU."""
    case, alone = CacheCase("batch", ((1, 700), (3, 450)), 16), CacheCase("alone", ((1, 700),), 16)
    cache = make(key, case)
    tables = {"block_table": cache.extras["block_table"][:1], "cu_seqlens_q": np.array([0, 1], np.int32)}
    of_one = replace(cache, q=cache.q[:1], extras={**cache.extras, **tables, "seqused_k": cache.extras["seqused_k"][:1]})
    for sms in (3, 8):
        both, one = run(key, case, cache, 3, 0, sms), run(key, alone, of_one, 3, 1)
        assert both.out[:1].tobytes() == one.out.tobytes() and both.lse[:, :1].tobytes() == one.lse.tobytes()


@pytest.mark.parametrize("sms", [1, 2, 30])
def test_any_number_of_ctas(sms: int) -> None:
    key, case = GOLDEN[0], SPLIT_CASES[0]
    cache = make(key, case)
    result = run(key, case, cache, 0, 1, sms)
    check_forward(result.out, result.lse, cache.q, cache.k, cache.v, case=f"{key} {case} {sms}", causal=key.causal, **cache.packed)
