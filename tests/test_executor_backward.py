"""Every golden backward on the CPU executor: the whole call, by the test rule, under several schedules; and against finite differences."""

from __future__ import annotations

import io
import re
from collections.abc import Callable
from dataclasses import replace
from functools import lru_cache
from typing import Any

import numpy as np
import pytest

from cutlass_fa.cell import Cell
from cutlass_fa.dispatch import DISPATCH_TABLE, DispatchKey
from cutlass_fa.executor import Backward, ExecutorError, ExecutorFault, ExecutorKernel, Program, compiler_problem, run_backward
from cutlass_fa.executor.run import RunShape, run_key
from cutlass_fa.reference import Gradients, attention_backward, attention_forward
from cutlass_fa.render import render
from tests.backward_cases import RANDOM_STATE, SOFTCAP, Case, Inputs
from tests.numerics import check_backward

pytestmark = pytest.mark.skipif(compiler_problem() is not None, reason=str(compiler_problem()))

DENSE = [key for key in DISPATCH_TABLE if not key.varlen]
GOLDEN = [key for key in DENSE if key.direction == "bwd" or (key.direction == "bwd_preprocess" and key.learnable_sink)]
SEEDS = (0, 1, 2, 3)  # every policy for landing copies, fair and unfair scheduling
Build = Callable[[DispatchKey], Program]


@pytest.fixture(scope="session")
def build() -> Build:
    """The program of a cell, compiled once."""
    return lru_cache(maxsize=None)(lambda key: ExecutorKernel.build(render(Cell.of(key))))


CASES = (
    Case((2, 3), batch=2, groups=2, offsets=(1, 0)),
    Case((77, 150), batch=2, order="bhsd", has_dlse=True),
    Case((200, 131), narrower=24, strided=True, window=(20, -1)),  # more queries than keys: with a causal mask, rows without keys
    Case((131, 330), groups=2, ratio=1, softmax_scale=0.3, window=(60, 60), sinks=70),  # with a window, keys that no query sees
    Case((70, 40), ratio=3, offsets=(None, 30)),
)


def main_of(key: DispatchKey) -> DispatchKey:
    """The main kernel of a call with `key`'s: itself, or of a preprocess with learnable_sink a causal one."""
    return key if key.direction == "bwd" else replace(key, direction="bwd", learnable_sink=False, causal=True)


def inputs_of(key: DispatchKey, case: Case, seed: int = 7, learnable_sink: bool = False) -> Inputs:
    flags: dict[str, Any] = {"softcap": SOFTCAP * key.softcap, "dropout_p": 0.17 * key.dropout}
    flags |= {"window": key.sliding_window, "sink": key.sink, "alibi": key.alibi, "offset": key.position_offset}
    flags |= {"learnable_sink": learnable_sink or key.learnable_sink}
    flags |= {"causal": main_of(key).causal}
    return Inputs.of(case, np, np.random.default_rng(seed), dtype=key.dtype, head_dim=key.head_dim, **flags)


def run(build: Build, key: DispatchKey, case: Case, inputs: Inputs, seed: int) -> Backward:
    """The gradients that the kernels wrote, held to the rule."""
    passed = ("softcap", "dropout_p", "window_size", "sink_tokens", "alibi_slopes", "learnable_sink", "q_offset", "k_offset")
    options: dict[str, Any] = {name: inputs.call[name] for name in passed if name in inputs.call}
    like = (inputs.q, inputs.k, inputs.v) if case.strided else (None, None, None)
    result = run_backward(
        main_of(key),
        *(inputs.dout, inputs.q, inputs.k, inputs.v, inputs.out, inputs.lse),
        seed=seed,
        build=build,
        softmax_scale=case.softmax_scale,
        random_state=RANDOM_STATE,
        dlse=inputs.dlse,
        gradients_like=like,
        num_splits=3 if key.split else 1,
        num_copies=2 if key.deterministic else 1,
        **options,
    )
    gradients = Gradients(result.dq, result.dk, result.dv, result.dlearnable_sink)
    arrays = (inputs.dout, inputs.q, inputs.k, inputs.v)
    check_backward(gradients, *arrays, case=f"{key} {case} seed {seed}", dlse=inputs.dlse, **inputs.options)
    return result


def golden_cases() -> list[tuple[DispatchKey, Case]]:
    """Every golden cell with every case; of a split one those that have a block of queries for each of the three splits."""
    return [(key, case) for key in GOLDEN for case in CASES if not key.split or case.seqlens[0] * case.ratio > 2 * Cell.of(key).tile_m]


@pytest.mark.parametrize(("key", "case"), golden_cases(), ids=str)
def test_golden_cell(build: Build, key: DispatchKey, case: Case) -> None:
    """Right under every schedule, and bitwise the same; dq only where it is deterministic: its sum follows the order of the CTAs."""
    inputs = inputs_of(key, case)
    first = run(build, key, case, inputs, SEEDS[0])
    for seed in SEEDS[1:]:
        again = run(build, key, case, inputs, seed)
        for name in ("dq", "dk", "dv") if key.deterministic else ("dk", "dv"):
            assert (getattr(again, name).view(np.uint16) == getattr(first, name).view(np.uint16)).all(), f"{name}: seed {seed}"
        assert np.array_equal(again.dlearnable_sink, first.dlearnable_sink)


SMALL = DispatchKey.parse("fa2_bwd_sm90a_bf16_hdim64_causal")
EVERYTHING = DispatchKey.parse("fa2_bwd_sm86_f16_hdim192_causal_window_alibi_sink_offsets_softcap_dropout_deterministic_split")


@pytest.mark.parametrize(("arch", "head_dim"), [("sm_80", 80), ("sm_86", 96), ("sm_86", 192), ("sm_90a", 80), ("sm_90a", 192)])
def test_other_tiles(build: Build, arch: str, head_dim: int) -> None:
    """Rows of the tables whose warps share a block in another way than in the golden cells."""
    key, case = DispatchKey("fa2", "bwd", arch, "f16", head_dim, causal=True), Case((200, 131), narrower=8, strided=True)
    run(build, key, case, inputs_of(key, case), seed=1)


def test_all_features_together(build: Build) -> None:
    for seed in SEEDS:
        run(build, EVERYTHING, CASES[1], inputs_of(EVERYTHING, CASES[1], learnable_sink=True), seed)


def test_rows_without_keys_and_keys_without_rows(build: Build) -> None:
    """Causal, 40 keys for 200 queries: the first 160 see none; and 1 query that sees all keys but those of other batches."""
    case = Case((200, 40), batch=2)
    result = run(build, SMALL, case, inputs_of(SMALL, case), seed=2)
    assert not result.dq[:, :160].any() and result.dq[:, 160:].any()


@pytest.mark.parametrize("has_dlse", [False, True])
def test_learnable_sinks_of_rows_without_keys(build: Build, has_dlse: bool) -> None:
    """Such a row's lse is the logit itself, so that the gradient by lse is the logit's; without it the row adds nothing."""
    case = Case((200, 40), batch=2, ratio=4, has_dlse=has_dlse)
    result = run(build, SMALL, case, inputs_of(SMALL, case, learnable_sink=True), seed=2)
    assert result.dlearnable_sink is not None and result.dlearnable_sink[2] == 0, "its logit is -inf"
    assert not result.dq[:, :160].any() and result.dq[:, 160:].any()


FLAGS: tuple[dict[str, bool], ...] = (
    {},
    {"softcap": True},
    {"dropout": True},
    {"softcap": True, "dropout": True},
    {"sliding_window": True, "alibi": True, "softcap": True},
)


@pytest.mark.parametrize("learnable_sink", [False, True])
@pytest.mark.parametrize("flags", FLAGS, ids=str)
def test_gradients_are_finite_differences(build: Build, flags: dict[str, bool], learnable_sink: bool) -> None:
    """The reference's, to nine digits, and through it the kernels'."""
    key, case = replace(SMALL, **flags), Case((5, 9), narrower=48, has_dlse=True)
    inputs = inputs_of(key, case, learnable_sink=learnable_sink)
    sinks = inputs.options.get("learnable_sink", np.empty(0))
    wide = [x.astype(np.float64) for x in (inputs.q, inputs.k, inputs.v, sinks)]

    def loss(arrays: list[np.ndarray]) -> float:
        moved = {"learnable_sink": arrays[3]} if learnable_sink else {}
        out, lse = attention_forward(*arrays[:3], **inputs.options | moved)
        return float((out * inputs.dout.astype(np.float64)).sum() + (lse * inputs.dlse.astype(np.float64)).sum())

    exact = attention_backward(inputs.dout, inputs.q, inputs.k, inputs.v, dlse=inputs.dlse, **inputs.options)
    rng = np.random.default_rng(1)
    for index, gradient in enumerate((exact.dq, exact.dk, exact.dv, exact.dlearnable_sink)[: 3 + learnable_sink]):
        for place in rng.choice(gradient.size, min(12, gradient.size), replace=False):
            steps = []
            for step in (1e-6, -1e-6):
                moved = [x.copy() for x in wide]
                moved[index].reshape(-1)[place] += step
                steps.append(loss(moved))
            assert abs((steps[0] - steps[1]) / 2e-6 - gradient.reshape(-1)[place]) < 1e-7
    run(build, key, case, inputs, seed=0)


def test_a_call_that_needs_another_kernel_is_refused(build: Build) -> None:
    inputs = inputs_of(SMALL, CASES[0])
    arrays = (inputs.dout, inputs.q, inputs.k, inputs.v, inputs.out, inputs.lse)
    with pytest.raises(ExecutorError, match="causal_softcap"):
        run_backward(SMALL, *arrays, seed=0, build=build, softcap=1.0)


def test_run_key_runs_the_whole_call_of_a_pass_that_only_learnable_sinks_need() -> None:
    for name in ("fa2_bwd_preprocess_sm90a_bf16_hdim64_lsink", "fa2_bwd_reduce_sm90a_bf16_hdim64"):
        stream = io.StringIO()
        assert run_key(DispatchKey.parse(name), stream, shape=RunShape(seqlen_q=70, seqlen_k=90), seed=5)
        assert re.search(r"dlearnable_sink \d\.\d+e-\d+ .*: ok", stream.getvalue())


def test_run_key_runs_the_whole_call() -> None:
    stream = io.StringIO()
    assert run_key(SMALL, stream, shape=RunShape(seqlen_q=70, seqlen_k=90), seed=5)
    assert re.search(r"max error against float64: dq \d\.\d+e-\d+ .*: ok", stream.getvalue())
    with pytest.raises(ExecutorError, match="run fa2_bwd_sm80_bf16_hdim128 --executor"):
        run_key(DispatchKey.parse("fa2_bwd_convert_sm80_bf16_hdim128_split"), stream)


# ---- the check of the checker --------------------------------------------------------------------------------------------------------

ACTS = (  # an act of the main kernel, what stands in its place, and what the report must say
    ("cp_async_wait<0>();\n    group_sync(self);", "group_sync(self);", r"not know to have landed|written by a cp_async"),
    ("named_barrier_sync(kDoutReady + step % 2, kThreads);", "", r"not know to have landed|nobody wrote|twice before it has opened"),
    (
        "named_barrier_sync(kPReady + step % 2, kThreads);",
        "",
        r"not know to have landed|nobody wrote|max error|finite|twice before it has opened",
    ),
    ("named_barrier_sync(kDsReady + (step - 1) % 2, kThreads);", "", r"nobody wrote|max error|finite|twice before it has opened"),
    ("group_sync(self);  // the group's other warps have written their dS", "", r"nobody wrote|max error|finite"),
    ("if (is_masked(params, work, block)) { mask_scores(self, params, work, block, acc_s); }", "", r"max error|finite"),
    ("if (lse != negative_infinity()) { lse_log2 = lse / kLn2; }", "lse_log2 = lse / kLn2;", r"finite|never written"),
    ("cp_async_wait_all();", "", r"of its cp_async are in flight"),
)
SINK_ACTS = (  # of calls with learnable sinks
    (
        "params.lse_log2[first_place + row]) * params.dpsum[first_place + row]",
        "params.lse_log2[first_place + row])",
        r"dlearnable_sink: max error",
    ),
    ("head * parts_per_head + batch * params.num_m_blocks + m_block", "head * parts_per_head + batch", r"dlearnable_sink: |never written"),
    (
        "  sum = warp_sum(sum);\n  if (thread_index() == 0) { params.sums",
        "  if (thread_index() == 0) { params.sums",
        r"dlearnable_sink: max error",
    ),
)


@pytest.mark.parametrize(("before", "after", "report"), ACTS + SINK_ACTS, ids=[act[0].split("\n")[0] for act in ACTS + SINK_ACTS])
def test_a_missing_act_is_noticed(before: str, after: str, report: str) -> None:
    mutated = 0

    def mutate(key: DispatchKey) -> Program:
        nonlocal mutated
        source = render(Cell.of(key))
        mutated += before in source.text
        return ExecutorKernel.build(replace(source, text=source.text.replace(before, after)))

    program = lru_cache(maxsize=None)(mutate)
    key = replace(SMALL, split="wait_all" in before)  # only a split may have no block of queries at all
    cases = (Case((260, 150)), Case((250, 200)), Case((200, 140)), Case((240, 300)), Case((300, 30)))
    learnable_sink = (before, after, report) in SINK_ACTS
    reports = []
    for seed in range(6):
        for case in cases:
            try:
                run(program, key, case, inputs_of(key, case, learnable_sink=learnable_sink), seed)
            except (ExecutorFault, AssertionError) as error:
                reports.append(str(error))
        if reports:
            break
    assert mutated, "no such act in the kernels: the list is out of date"
    assert reports and re.search(report, reports[0]), reports[:1]
