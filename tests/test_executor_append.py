"""The pass before attention over a KV cache on the CPU executor: what it leaves in caches, bit by bit, under several schedules."""

from __future__ import annotations

import io
from collections.abc import Callable
from functools import lru_cache
from typing import Any

import numpy as np
import pytest

from cutlass_fa.cell import Cell
from cutlass_fa.dispatch import DISPATCH_TABLE, DispatchKey
from cutlass_fa.executor import ExecutorKernel, Program, compiler_problem
from cutlass_fa.executor.append_kv import run_append
from cutlass_fa.executor.run import RunShape, run_key
from cutlass_fa.render import render
from tests.append_cases import CASES, AppendCase, bits, check_append, naive_append

pytestmark = pytest.mark.skipif(compiler_problem() is not None, reason=str(compiler_problem()))

SEEDS = (0, 1, 2)
Build = Callable[[str, bool], Program]


@pytest.fixture(scope="session")
def build() -> Build:
    """The program of a dtype, with rotary or without, compiled once."""

    def built(dtype: str, rotary: bool) -> Program:
        return ExecutorKernel.build(render(Cell.of(DispatchKey("fa2", "append_kv", "sm_80", dtype, 64, rotary=rotary))))

    return lru_cache(maxsize=None)(built)


def run(build: Build, case: AppendCase, arrays: dict[str, Any], seed: int = 0) -> Any:
    program = build(case.dtype, case.rotary != "none")
    return run_append(seed=seed, program=program, **case.options, **arrays)


@pytest.mark.parametrize("case", CASES, ids=str)
def test_case(build: Build, case: AppendCase) -> None:
    """Right under every schedule, and bitwise the same."""
    arrays = case.arrays(np.random.default_rng(3))
    expected = naive_append(arrays, case.rotary == "interleaved", case.successive)
    results = [run(build, case, arrays, seed) for seed in SEEDS]
    for result in results:
        check_append(result, case, arrays, expected, case.rotary != "none")
        assert (bits(result.k_cache) == bits(results[0].k_cache)).all()


def test_one_length_for_all(build: Build) -> None:
    """cache_seqlens as a number."""
    case = AppendCase("number", (9, 9, 9), (2, 2, 2), page=8, rotary="half")
    arrays = case.arrays(np.random.default_rng(3))
    expected = naive_append(arrays, False, True)
    check_append(run(build, case, arrays | {"cache_seqlens": 9}), case, arrays, expected, True)


def test_lengths_alone(build: Build) -> None:
    """Nothing to append: the number becomes an array, no more than there is room for."""
    case = AppendCase("number", (9, 9), (2, 2), page=8)
    arrays = {name: array for name, array in case.arrays(np.random.default_rng(3)).items() if name not in ("k", "v")}
    for number, length in ((9, 9), (1000, 64)):
        result = run(build, case, arrays | {"cache_seqlens": number})
        assert result.seqlens_k.tolist() == [length] * 2
        assert (bits(result.k_cache) == bits(arrays["k_cache"])).all() and (bits(result.v_cache) == bits(arrays["v_cache"])).all()


@pytest.mark.parametrize("page", [0, 16])
def test_numbers_that_point_nowhere_write_nothing(build: Build, page: int) -> None:
    """Blocks that do not exist, lengths below 0 and beyond the cache: those rows are left out, all others written."""
    case = AppendCase("wild", (-2, 62, 2**31 - 1, -(2**31), 8, 62), (4,) * 6, page=page, rotary="half")
    arrays = case.arrays(np.random.default_rng(5))
    if page:
        arrays["block_table"][1, 3], arrays["block_table"][4] = arrays["k_cache"].shape[0], (-1, 2**31 - 1, -(2**31), 0)
    else:
        arrays["cache_batch_idx"][1], arrays["cache_batch_idx"][4] = -1, 2**31 - 1
    result, expected = run(build, case, arrays), naive_append(arrays, False, True)
    assert (~expected.untouched).sum() == 4, "two rows each of the first and the last sequence"
    check_append(result, case, arrays, expected, True)


@pytest.mark.parametrize("starts", [(0, 3, 2, 9), (-5, 3, 100, 9), (4, 4, 4, 4), (9, 0, 0, 9)], ids=str)
def test_starts_that_contradict_themselves_stay_inside(build: Build, starts: tuple[int, ...]) -> None:
    """The executor's guard pages see every access."""
    case = AppendCase("starts", (1, 2, 3), (3, 3, 3), packed=True, page=8, rotary="interleaved")
    arrays = case.arrays(np.random.default_rng(5))
    arrays["cu_seqlens_k_new"][:] = starts
    arrays["cu_seqlens_q"][:] = starts
    result = run(build, case, arrays)
    assert (result.seqlens_k >= 0).all() and (result.seqlens_k <= case.capacity).all()


def test_rows_behind_the_last_sequence_are_nobodys(build: Build) -> None:
    case = AppendCase("behind", (1, 2, 7, 9), (3, 2, 0, 1), packed=True, page=8, rotary="half")
    arrays = case.arrays(np.random.default_rng(5))
    expected = naive_append(arrays, False, True)
    more = {name: np.concatenate([arrays[name], np.full_like(arrays[name][:2], np.nan)]) for name in ("q", "k", "v")}
    result = run(build, case, arrays | more)
    assert (bits(result.turned_q[-2:]) == 0xFFFF).all()
    trimmed = type(result)(result.k_cache, result.v_cache, result.seqlens_k, result.turned_q[:-2])
    check_append(trimmed, case, arrays, expected, True)


@pytest.mark.parametrize("key", [key for key in DISPATCH_TABLE if key.direction == "append_kv"], ids=str)
def test_run_key(key: DispatchKey) -> None:
    stream = io.StringIO()
    assert run_key(key, stream, shape=RunShape(batch=2, seqlen_q=19, seqlen_k=40, head_dim=128), seed=2), stream.getvalue()
