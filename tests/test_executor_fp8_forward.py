"""The fp8 forward on the CPU executor beyond its golden cells' common cases: outliers, origins that move, factors far apart, and acts that
it alone has, whose absence must be noticed."""

from __future__ import annotations

import re
from dataclasses import replace
from typing import Any

import ml_dtypes
import numpy as np
import pytest

from cutlass_fa.cell import Cell
from cutlass_fa.dispatch import DISPATCH_TABLE, FP8_DTYPES, DispatchKey
from cutlass_fa.executor import ExecutorKernel, compiler_problem, run_forward
from cutlass_fa.reference import attention_forward
from cutlass_fa.render import render
from cutlass_fa.requests_fp8 import Fp8Options
from tests.numerics import check_forward, lowp_forward, random_outliers
from tests.test_executor import Act, Build, Case, build, features  # noqa: F401  (build is a fixture)
from tools import mutate

pytestmark = pytest.mark.skipif(compiler_problem() is not None, reason=str(compiler_problem()))

DTYPES = {"e4m3": np.dtype(ml_dtypes.float8_e4m3fn), "e5m2": np.dtype(ml_dtypes.float8_e5m2)}
GOLDEN = [key for key in DISPATCH_TABLE if key.dtype in FP8_DTYPES and not key.varlen]
SEEDS = (0, 1, 2)
SMALLEST = DispatchKey.parse("fa3_fwd_sm90a_e4m3_hdim64")


def arrays(key: DispatchKey, seqlens: tuple[int, int], *, scale: float = 1.0, seed: int = 4) -> tuple[np.ndarray, ...]:
    """q, k, v of two query heads and one key head; one number of 500 is ten times as large."""
    rng = np.random.default_rng(seed)
    shapes = ((1, seqlens[0], 2, key.head_dim), *[(1, seqlens[1], 1, key.head_dim)] * 2)
    q, k, v = (random_outliers(rng, shape) for shape in shapes)
    return (scale * q).astype(DTYPES[key.dtype]), k.astype(DTYPES[key.dtype]), v.astype(DTYPES[key.v_dtype])


@pytest.mark.parametrize("key", GOLDEN, ids=str)
def test_outliers(build: Build, key: DispatchKey) -> None:  # noqa: F811
    """By the test rule, and by relative RMS error no worse than 1.1 times the same mathematics without tiles."""
    q, k, v = arrays(key, (150, 600))
    cell = Cell.of(key)
    called, expected = features(cell, q, k, Case((150, 600)))
    expected["causal"] = key.causal
    exact, _ = attention_forward(q, k, v, **expected)
    for seed in SEEDS:
        result = run_forward(cell, q, k, v, seed=seed, program=build(key), **called)
        check_forward(result.out, result.lse, q, k, v, case=f"{key} outliers seed {seed}", **expected)
    low, _ = lowp_forward(q, k, v, out_dtype=result.out.dtype, **expected)
    own, lowp = (np.sqrt(((x.astype(np.float64) - exact) ** 2).mean()) for x in (result.out, low))
    assert 0 < own <= 1.1 * lowp


@pytest.mark.parametrize("scale", [0.05, 30.0, 2000.0])
def test_scores_of_any_size(build: Build, scale: float) -> None:  # noqa: F811
    """Hardly apart, and so far apart that one key has it all and origins move from block to block."""
    q, k, v = arrays(SMALLEST, (100, 700))
    result = run_forward(Cell.of(SMALLEST), q, k, v, seed=1, program=build(SMALLEST), softmax_scale=scale / 8)
    check_forward(result.out, result.lse, q, k, v, case=f"scale {scale}", softmax_scale=scale / 8)


@pytest.mark.parametrize("rise", [0.5, 2.0, 6.0])
def test_scores_that_rise_from_block_to_block(build: Build, rise: float) -> None:  # noqa: F811
    """Blocks are taken from the last key to the first, each with scores `rise` above those before: every block moves the origins. Rows are
    all alike, so that the rule has no spread to go by for lse, whose rounding is allowed for by itself."""
    q, k, v = (np.zeros((1, n, 1, 64), np.float32) for n in (64, 640, 640))
    q[..., 0], k[0, :, 0, 0] = 1.0, (-rise * (np.arange(640) // 160)).round(3)
    v[...] = np.random.default_rng(0).standard_normal(v.shape)
    q, k, v = (x.astype(DTYPES["e4m3"]) for x in (q, k, v))
    for seed in SEEDS:
        result = run_forward(Cell.of(SMALLEST), q, k, v, seed=seed, program=build(SMALLEST), softmax_scale=1.0)
        check_forward(result.out, None, q, k, v, case=f"rise {rise}", softmax_scale=1.0)
        np.testing.assert_allclose(result.lse, attention_forward(q, k, v, softmax_scale=1.0)[1], rtol=1e-6)


@pytest.mark.parametrize("precise", [False, True], ids=["fast", "precise"])
def test_factors_of_blocks_far_apart(build: Build, precise: bool) -> None:  # noqa: F811
    """v's factors differ by 2^40, so that what one block adds is nothing or everything; equal ones rescale nothing."""
    key = DispatchKey("fa3", "fwd", "sm_90a", "e4m3", 64, precise=precise, descale=True, block_descale=True)
    q, k, v = arrays(key, (70, 600))
    options = Fp8Options("precise" if precise else "fast")
    for exponents in ([0, 20, -20, 3, 3], [-20, 20, 20, 20, 0], [5] * 5, [30, 0, -10, 0, 30]):
        factors: dict[str, Any] = {"v_descale": np.float32(2) ** np.array([[exponents]], np.float32)}
        factors["k_descale"] = np.array([[[1, 0.25, 3, 0.5, 2]]], np.float32)
        result = run_forward(Cell.of(key), q, k, v, seed=2, program=build(key), fp8=options, **factors)
        check_forward(result.out, result.lse, q, k, v, case=f"factors 2^{exponents}", **factors)


def test_no_array_is_a_factor_of_one(build: Build) -> None:  # noqa: F811
    key = replace(SMALLEST, descale=True)
    q, k, v = arrays(key, (70, 300))
    plain = run_forward(Cell.of(SMALLEST), q, k, v, seed=0, program=build(SMALLEST))
    result = run_forward(Cell.of(key), q, k, v, seed=0, program=build(key), k_descale=np.ones((1, 1), np.float32))
    assert (result.out.view(np.uint16) == plain.out.view(np.uint16)).all() and (result.lse == plain.lse).all()


ACTS = (
    Act("drop a call", "v_rows_full.*wait", "ldmatrix|nobody wrote|in flight|has not waited|another phase|deadlock", "transpose_v"),
    Act("drop a call", "v_empty.*wait", "may still be reading|a store|arrival too many", "transpose_v"),
    Act("drop a call", "fence_async_proxy", "plain stores that no fence_async_proxy has followed", "transpose_v"),
    Act(
        "drop a call",
        "v_rows_empty.*wait",
        "tma_load to .* (may still be reading|in flight|to have landed)|arrival too many|race",
        "produce",
    ),
    Act("drop a call", "v_rows_empty.*arrive", "deadlock", "transpose_v"),
    Act("drop a call", "v_full.*arrive", "deadlock", "transpose_v"),
    Act("drop a call", "v_rows_full.*arrive", "deadlock", "produce"),
    Act("another descriptor: swizzle", "kVLayout", "wrong numbers|reads operand B"),
)


@pytest.mark.parametrize("act", ACTS, ids=str)
def test_a_missing_act_is_noticed(act: Act) -> None:
    cell = Cell.of(SMALLEST)
    chosen = [
        m
        for m in mutate.mutants(render(cell))
        if m.operator == act.operator and re.search(act.line, m.before) and re.search(act.function, m.function)
    ]
    assert chosen, "no such act in the kernel: the list is out of date"
    for mutant in chosen:
        noticed = mutate.caught(cell, mutant, seeds=4)
        assert noticed is not None and re.search(act.report, noticed), f"{mutant}: {noticed}"


def test_sums_in_registers_of_their_own_are_used(build: Build) -> None:  # noqa: F811
    """The precise cell without the addition of its parts gives wrong numbers: the test sees what it is for."""
    key = DispatchKey.parse("fa3_fwd_sm90a_e4m3_hdim128_precise_descale")
    source = render(Cell.of(key))
    wrong = source.text.replace("+= part_o[i];", "= part_o[i];")
    assert wrong != source.text
    q, k, v = arrays(key, (64, 600))
    result = run_forward(
        Cell.of(key),
        q,
        k,
        v,
        seed=0,
        program=ExecutorKernel.build(replace(source, text=wrong)),
        fp8=Fp8Options("precise"),
        v_descale=np.array(2.0, np.float32),
    )
    with pytest.raises(AssertionError, match="max error"):
        check_forward(result.out, result.lse, q, k, v, case="wrong", v_descale=2.0)
