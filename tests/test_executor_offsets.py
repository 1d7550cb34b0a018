"""Offsets on the CPU executor: parts of the keys merged are the whole, forward and backward; parts that no query sees, or that all do."""

from __future__ import annotations

from collections.abc import Callable
from functools import lru_cache
from typing import Any

import numpy as np
import pytest

from cutlass_fa.cell import Cell
from cutlass_fa.dispatch import DispatchKey
from cutlass_fa.executor import Backward, ExecutorKernel, Program, compiler_problem, run_backward, run_forward
from cutlass_fa.reference import Gradients, attention_forward
from cutlass_fa.render import render
from tests.numerics import check_backward, random_array
from tests.part_cases import PartCase, check_merged, merged

pytestmark = pytest.mark.skipif(compiler_problem() is not None, reason=str(compiler_problem()))

Build = Callable[[DispatchKey], Program]


@pytest.fixture(scope="session")
def build() -> Build:
    """The program of a cell, compiled once."""
    return lru_cache(maxsize=None)(lambda key: ExecutorKernel.build(render(Cell.of(key))))


CASES = (
    PartCase((70, 300), 230, 0, (100, 230), causal=True),
    PartCase((150, 200), 1000, 950, (50, 60), causal=True, alibi=True, groups=2),  # the last part is the future of the first queries
    PartCase((200, 260), 300, 100, (90,), causal=True, window=(70, 0), sinks=120),  # sink tokens are those of the whole sequence
    PartCase((90, 310), 150, 10, (1, 200), window=(60, 40), sinks=30),
    PartCase((130, 180), 40, 90, (64, 128), window=(-1, 20), alibi=True),  # the first queries see nothing at all
    PartCase((5, 400), 395, 0, (130, 300), causal=True, batch=2, ratio=4),
)


@pytest.mark.parametrize("family", ["fa2", "fa3"])
@pytest.mark.parametrize("case", CASES, ids=str)
def test_parts_merged_are_the_whole(build: Build, case: PartCase, family: str) -> None:
    arch = "sm_90a" if family == "fa3" else "sm_80"
    gqa_ratio = case.ratio if family == "fa3" and case.seqlens[0] < 10 else 1
    key = DispatchKey(family, "fwd", arch, "bf16", 64, **case.flags, float_out=True, gqa_ratio=gqa_ratio)
    cell = Cell.of(key)
    q, k, v = case.arrays(np, np.random.default_rng(3), "bf16", 64)

    def attend(k: np.ndarray, v: np.ndarray, **offsets: int) -> tuple[np.ndarray, np.ndarray]:
        result = run_forward(cell, q, k, v, seed=1, program=build(key), **offsets, **case.options(np))
        return result.out, result.lse

    check_merged(*merged(case, k, v, attend), q, k, v, case, **case.whole(np))


@pytest.mark.parametrize("key", ["fa3_fwd_sm90a_f16_hdim64_causal_offsets_f32out", "fa2_fwd_sm80_f16_hdim64_causal_offsets_f32out"])
def test_parts_in_the_past_and_in_the_future(build: Build, key: str) -> None:
    """k and v of the future hold NaN, which a block that was loaded and masked would make visible; all keys of the past are seen."""
    parsed = DispatchKey.parse(key)
    case = PartCase((100, 150), 2**31 - 2000, 0, (), causal=True)
    q, k, v = case.arrays(np, np.random.default_rng(4), "f16", 64)
    past = run_forward(Cell.of(parsed), q, k, v, seed=2, program=build(parsed), q_offset=case.q_offset)
    check_merged(past.out, past.lse, q, k, v, "past")
    k[...] = v[...] = np.nan
    future = run_forward(Cell.of(parsed), q, k, v, seed=2, program=build(parsed), q_offset=0, k_offset=2**31 - 2000)
    assert not future.out.any() and np.isneginf(future.lse).all()


@pytest.mark.parametrize("sinks", [0, 40])
@pytest.mark.parametrize("arch", ["sm_80", "sm_90a"])
def test_windows_that_begin_beyond_the_last_key(build: Build, arch: str, sinks: int) -> None:
    """Only sink tokens are seen, or nothing; keys behind the sink tokens' block hold NaN."""
    family = "fa3" if arch == "sm_90a" else "fa2"
    flags = {"causal": True, "sliding_window": True, "sink": sinks > 0, "position_offset": True, "float_out": True}
    key = DispatchKey(family, "fwd", arch, "bf16", 64, **flags)
    case = PartCase((100, 384), 2**30, 30, (), causal=True, window=(200, 0), sinks=sinks)
    q, k, v = case.arrays(np, np.random.default_rng(5), "bf16", 64)
    k[:, 128:] = v[:, 128:] = np.nan
    offsets = {"q_offset": case.q_offset, "k_offset": case.k_offset}
    result = run_forward(Cell.of(key), q, k, v, seed=3, program=build(key), **offsets, **case.options(np))
    if sinks:
        check_merged(result.out, result.lse, q, k[:, :10], v[:, :10], case)  # positions 30 to 39
    else:
        assert not result.out.any() and np.isneginf(result.lse).all()


# ---- backward ------------------------------------------------------------------------------------------------------------------------


def backward_of_parts(build: Build, case: PartCase, dtype: str, has_dlse: bool, **flags: bool) -> None:
    """Each part's backward with the lse and out of the whole: dk and dv are slices of the whole gradients, and dq adds up."""
    rng = np.random.default_rng(6)
    q, k, v = case.arrays(np, rng, dtype, 64)
    dout, options = random_array(np, rng, q.shape, q.dtype), case.whole(np)
    exact_out, exact_lse = attention_forward(q, k, v, **options)
    out, lse = exact_out.astype(np.float32).astype(q.dtype), exact_lse.astype(np.float32)
    dlse = rng.standard_normal(lse.shape, dtype=np.float32) if has_dlse else None
    key = DispatchKey("fa2", "bwd", "sm_80", dtype, 64, **case.flags, **flags)
    more: dict[str, Any] = {"num_splits": 2 if key.split else 1, "num_copies": 2 if key.deterministic else 1, **case.options(np)}
    dq = np.zeros(q.shape)
    results: list[Backward] = []
    for part in case.parts:
        offsets = {"q_offset": case.q_offset, "k_offset": case.k_offset + part.start}
        arrays = (dout, q, k[:, part], v[:, part], out, lse)
        results.append(run_backward(key, *arrays, seed=1, build=build, dlse=dlse, **offsets, **more))
        dq += results[-1].dq.astype(np.float64)
    gradients = Gradients(dq, *(np.concatenate([getattr(each, name) for each in results], axis=1) for name in ("dk", "dv")))
    check_backward(gradients, dout, q, k, v, case=case, dlse=dlse, **options)


@pytest.mark.parametrize("case", CASES, ids=str)
def test_gradients_of_parts_are_those_of_the_whole(build: Build, case: PartCase) -> None:
    backward_of_parts(build, case, "bf16", has_dlse=True)


@pytest.mark.parametrize("flags", [{"split": True}, {"deterministic": True}, {"split": True, "deterministic": True}], ids=str)
@pytest.mark.parametrize("index", [1, 2, 4])
def test_split_and_ordered_gradients_of_parts(build: Build, index: int, flags: dict[str, bool]) -> None:
    backward_of_parts(build, CASES[index], "f16", has_dlse=False, **flags)


@pytest.mark.parametrize("split", [False, True])
def test_gradients_of_a_part_in_the_future_are_zero(build: Build, split: bool) -> None:
    key = DispatchKey("fa2", "bwd", "sm_80", "bf16", 64, causal=True, position_offset=True, split=split)
    rng = np.random.default_rng(7)
    q, k, v = PartCase((200, 140), 0, 0, ()).arrays(np, rng, "bf16", 64)
    lse = np.zeros((1, 2, 200), np.float32)
    result = run_backward(key, q, q, k, v, q, lse, seed=0, build=build, q_offset=100, k_offset=300, num_splits=3 if split else 1)
    assert not any(getattr(result, name).any() for name in ("dq", "dk", "dv"))
