"""Every golden cell on the CPU executor: the unchanged translation unit, by the test rule, under several schedules; and its mutants."""

from __future__ import annotations

import io
import re
import subprocess
import sys
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import lru_cache
from typing import Any

import ml_dtypes
import numpy as np
import pytest

from cutlass_fa import Persistent
from cutlass_fa.cell import Cell
from cutlass_fa.cells.fa3_fwd import Fa3FwdCell
from cutlass_fa.dispatch import DISPATCH_TABLE, DispatchKey
from cutlass_fa.dropout import dropout_mask
from cutlass_fa.executor import ExecutorFault, ExecutorKernel, Program, compiler_problem, run_forward
from cutlass_fa.executor.run import RunShape, run_key
from cutlass_fa.render import render
from cutlass_fa.request_parts import PersistentMode
from cutlass_fa.requests_fp8 import Fp8Options
from tests.numerics import check_forward, poisoned, random_qkv
from tools import mutate

pytestmark = pytest.mark.skipif(compiler_problem() is not None, reason=str(compiler_problem()))

GOLDEN = [key for key in DISPATCH_TABLE if key.direction == "fwd" and not key.varlen]
DTYPES = {
    "f16": np.dtype(np.float16),
    "bf16": np.dtype(ml_dtypes.bfloat16),
    "e4m3": np.dtype(ml_dtypes.float8_e4m3fn),
    "e5m2": np.dtype(ml_dtypes.float8_e5m2),
}
SEEDS = (0, 1, 2, 3)  # every policy for landing copies, fair and unfair scheduling
Build = Callable[[DispatchKey], Program]


@pytest.fixture(scope="session")
def build() -> Build:
    """The program of a cell, compiled once."""
    return lru_cache(maxsize=None)(lambda key: ExecutorKernel.build(render(Cell.of(key))))


@dataclass(frozen=True)
class Case:
    """One launch. groups: key heads; each has the cell's gqa_ratio, or `ratio` where heads are not packed, of query heads."""

    seqlens: tuple[int, int]
    batch: int = 1
    groups: int = 1
    ratio: int = 2
    narrower: int = 0  # than the cell's head_dim
    order: str = "bshd"
    strided: bool = False
    persistent: PersistentMode | None = None
    sharpness: int = 1  # q is so many times a standard normal: row maxima then move far from block to block
    window: tuple[int, int] = (40, 3)  # of cells that have one; causal ones look at the left side only
    sinks: int = 5  # of cells that have them
    offsets: tuple[int | None, int | None] = (90, 20)  # of the first query and the first key, of cells that have them

    def __str__(self) -> str:
        words = [f"{self.seqlens[0]}x{self.seqlens[1]}", self.order]
        words += [word for word, on in (("strided", self.strided), (f"d-{self.narrower}", self.narrower), ("few", self.persistent)) if on]
        return "-".join(words)

    def arrays(self, cell: Cell, seed: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        ratio = self.ratio if cell.key.gqa_ratio == 1 else cell.key.gqa_ratio
        q, k, v = random_qkv(
            np,
            np.random.default_rng(seed),
            batch=self.batch,
            seqlen_q=self.seqlens[0],
            seqlen_k=self.seqlens[1],
            num_heads_q=self.groups * ratio,
            num_heads_kv=self.groups,
            head_dim=cell.head_dim - self.narrower,
            dtype=DTYPES[cell.key.dtype],
            v_dtype=DTYPES[cell.key.v_dtype],
            memory_order=self.order,
            extra_strides=self.strided,
        )
        if self.sharpness != 1:
            q = (q.astype(np.float32) * self.sharpness).astype(q.dtype)
        return q, k, v

    def out_like(self, q: np.ndarray, dtype: Any = None) -> np.ndarray:
        """The output's layout: the memory order of q, and a frame around each row where strided. dtype: default q's."""
        dtype = dtype or q.dtype
        batch, seqlen, heads, head_dim = q.shape
        frame = 16 * self.strided
        if self.order == "bshd":
            return poisoned(np, (batch, seqlen, heads, head_dim + frame), dtype)[..., :head_dim]
        return poisoned(np, (batch, heads, seqlen, head_dim + frame), dtype)[..., :head_dim].swapaxes(1, 2)


CASES = (
    Case((1, 1), window=(0, 0), offsets=(3, 3)),
    Case((77, 150), batch=2, order="bhsd"),
    Case((200, 131), narrower=24, strided=True, window=(20, -1), offsets=(None, 70)),  # the first rows' windows end before the first key
    Case((130, 70), groups=2, persistent=Persistent(1), window=(0, 50), sinks=69, offsets=(50, None)),
    # More key blocks than the ring holds, in every cell.
    Case((260, 710), ratio=1, sharpness=8, window=(450, 130), sinks=150, offsets=(500, 100)),
)


def run(cell: Cell, program: Program, case: Case, seed: int) -> tuple[np.ndarray, np.ndarray]:
    """The kernel's out and lse, held to the rule."""
    q, k, v = case.arrays(cell, seed=7)
    called, expected = features(cell, q, k, case)
    persistent = case.persistent if cell.key.family == "fa3" else None  # a CTA of the other family has one tile
    like = case.out_like(q, out_dtype(cell))
    result = run_forward(cell, q, k, v, seed=seed, program=program, persistent=persistent, out_like=like, **called)
    check_forward(result.out, result.lse, q, k, v, case=f"{cell.name} {case} seed {seed}", causal=cell.is_causal, **expected)
    return result.out, result.lse


def out_dtype(cell: Cell) -> np.dtype:
    return np.dtype(np.float32) if cell.has_float_out else DTYPES[{"float16": "f16", "bfloat16": "bf16"}[cell.element]]


def descales(cell: Cell, q: np.ndarray, k: np.ndarray) -> dict[str, np.ndarray]:
    """Factors of each key head, where the cell has them of each block of keys too; q's are the same for all, v's are strided."""
    rng = np.random.default_rng(11)
    heads = (q.shape[0], k.shape[2])
    blocks = (-(-k.shape[1] // 128),) if cell.key.block_descale else ()
    draw = lambda *shape: (2.0 ** rng.uniform(-1, 1, shape)).astype(np.float32)  # noqa: E731
    return {"q_descale": draw(1), "k_descale": draw(*heads, *blocks), "v_descale": 8 * draw(*heads, *blocks, 2)[..., 0]}


def alibi_slopes(q: np.ndarray) -> np.ndarray:
    """A batch of one shares its slopes, a larger one has some for each sequence; one is 0, one less than 0."""
    batch, _, heads, _ = q.shape
    shape = (heads,) if batch == 1 else (batch, heads)
    return (0.7 * np.float32(2) ** -np.arange(np.prod(shape), dtype=np.float32) - np.float32(0.0875)).reshape(shape)


def learnable_sinks(heads: int) -> np.ndarray:
    """A logit among the scores, none, one above them all, one below."""
    return np.resize(np.array([1.5, -np.inf, 20.0, -9.0], np.float32), heads)


def features(cell: Cell, q: np.ndarray, k: np.ndarray, case: Case) -> tuple[dict[str, Any], dict[str, Any]]:
    """What a call of the cell's features is given, and what the reference is told of it."""
    called: dict[str, Any] = {}
    expected: dict[str, Any] = {}
    if cell.has_window:
        called["window_size"] = expected["window_size"] = case.window
    if cell.has_sink:
        called["sink_tokens"] = expected["sink_tokens"] = case.sinks
    if cell.has_alibi:
        called["alibi_slopes"] = expected["alibi_slopes"] = alibi_slopes(q)
    if cell.has_offset:
        called |= {"q_offset": case.offsets[0], "k_offset": case.offsets[1]}
        expected |= called
    if cell.has_learnable_sink:
        called["learnable_sink"] = expected["learnable_sink"] = learnable_sinks(q.shape[2])
    if cell.has_softcap:
        called["softcap"] = expected["softcap"] = 5.0
    if cell.is_fp8:
        accumulate = "precise" if cell.key.precise else "fast"
        called["fp8"] = Fp8Options(accumulate, out_dtype="f16" if cell.key.half_out else "bf16")
    if cell.key.descale:
        called |= descales(cell, q, k)
        expected |= descales(cell, q, k)
    if cell.has_dropout:
        called |= {"dropout_p": 0.17, "random_state": (0x1234_5678_9ABC_DEF0, 3 << 32 | 5)}
        mask = dropout_mask(*called["random_state"], 0.17, q.shape[0], q.shape[2], q.shape[1], k.shape[1])
        expected |= {"dropout_p": 0.17, "dropout_mask": mask}
    return called, expected


@pytest.mark.parametrize("case", CASES, ids=str)
@pytest.mark.parametrize("key", GOLDEN, ids=str)
def test_golden_cell(build: Build, key: DispatchKey, case: Case) -> None:
    """Right under every schedule, and bitwise the same: nothing that is computed depends on who comes first."""
    cell = Cell.of(key)
    first, first_lse = run(cell, build(key), case, SEEDS[0])
    for seed in SEEDS[1:]:
        out, lse = run(cell, build(key), case, seed)
        assert (out.view(np.uint8) == first.view(np.uint8)).all() and (lse == first_lse).all(), f"seed {seed} differs from {SEEDS[0]}"


SMALLEST = DispatchKey.parse(mutate.DEFAULT_KEY)


def test_softmax_scale_and_large_scores(build: Build) -> None:
    cell = Cell.of(SMALLEST)
    q, k, v = Case((100, 300), sharpness=1600).arrays(cell, seed=1)
    result = run_forward(cell, q, k, v, seed=1, program=build(SMALLEST), softmax_scale=0.5)
    check_forward(result.out, result.lse, q, k, v, case="large scores", causal=True, softmax_scale=0.5)


def test_broadcast_keys(build: Build) -> None:
    cell = Cell.of(SMALLEST)
    q, k, v = Case((70, 100), batch=2).arrays(cell, seed=2)
    k, v = (np.broadcast_to(x[:1], x.shape) for x in (k, v))
    result = run_forward(cell, q, k, v, seed=2, program=build(SMALLEST))
    check_forward(result.out, result.lse, q, k, v, case="broadcast", causal=True)


SINKS = [key for key in GOLDEN if key.learnable_sink]


@pytest.mark.parametrize("key", SINKS, ids=str)
def test_learnable_sinks_far_from_the_scores(build: Build, key: DispatchKey) -> None:
    """No overflow to infinity or NaN on either side; a row without keys (the first 70) has the logit as lse, and -inf is no logit."""
    sinks = np.array([2000.0, -2000.0, 1e30, -1e30, 3e-39, -np.inf], np.float32)
    cell = Cell.of(key)
    q, k, v = Case((200, 130), ratio=6, sharpness=4).arrays(cell, seed=3)
    options: dict[str, Any] = {"learnable_sink": sinks} | ({"window_size": (40, 0)} if key.sliding_window else {})
    for seed in SEEDS:
        result = run_forward(cell, q, k, v, seed=seed, program=build(key), **options)
        check_forward(result.out, result.lse, q, k, v, case=f"{key} seed {seed}", causal=key.causal, **options)
        assert (result.lse[0, :, :70] == sinks[:, None]).all() and not result.out[:, :70].any()
        assert (result.lse[0, (0, 2)] == sinks[[0, 2], None]).all() and not result.out[:, :, (0, 2)].any()


@pytest.mark.parametrize("key", SINKS, ids=str)
def test_a_learnable_sink_of_minus_infinity_is_none(build: Build, key: DispatchKey) -> None:
    """The bits of the kernel without."""
    plain = replace(key, learnable_sink=False)
    q, k, v = Case((100, 300), ratio=2).arrays(Cell.of(key), seed=3)
    options: dict[str, Any] = {"window_size": (40, 0)} if key.sliding_window else {}
    sinks = np.full(2, -np.inf, np.float32)
    result = run_forward(Cell.of(key), q, k, v, seed=0, program=build(key), learnable_sink=sinks, **options)
    expected = run_forward(Cell.of(plain), q, k, v, seed=0, program=build(plain), **options)
    ulp = float(ml_dtypes.finfo(q.dtype).eps) * float(np.abs(expected.out.astype(np.float32)).max())
    assert float(np.abs(result.out.astype(np.float32) - expected.out.astype(np.float32)).max()) <= ulp
    assert float(np.abs(result.lse - expected.lse).max()) <= 1e-6


@pytest.mark.parametrize(
    "key",
    [
        "fa3_fwd_sm90a_f16_hdim128_causal_window_alibi_sink_lsink_softcap_gqa3",
        "fa2_fwd_sm90a_bf16_hdim96_window_alibi_sink_lsink_softcap_dropout",
    ],
)
def test_learnable_sinks_with_everything_else(build: Build, key: str) -> None:
    parsed = DispatchKey.parse(key)
    for seed in SEEDS:
        run(Cell.of(parsed), build(parsed), Case((50, 200), batch=2, groups=2, ratio=2), seed)


LINEAR_BIASES = (
    "fa3_fwd_sm90a_f16_hdim64_causal_alibi",
    "fa3_fwd_sm90a_bf16_hdim64_alibi",
    "fa3_fwd_sm90a_f16_hdim128_alibi_softcap",
    "fa3_fwd_sm90a_bf16_hdim128_window_alibi_sink",
)


@pytest.mark.parametrize("sharpness", [1, 8, 60])
@pytest.mark.parametrize("key", LINEAR_BIASES)
def test_rows_that_share_an_origin_and_rows_that_cannot(build: Build, key: str, sharpness: int) -> None:
    """The two rows of a thread have one term for the bias of a column where their scores are near each other (biased_softmax.cuh). Sharp
    scores keep them apart; keys lie before and after the positions, and slopes are steep, gentle, zero and less than zero."""
    parsed = DispatchKey.parse(key)
    cell = Cell.of(parsed)
    q, k, v = Case((330, 500), ratio=5, sharpness=sharpness).arrays(cell, seed=11)
    options: dict[str, Any] = {"alibi_slopes": np.array([2.5, 0.3, 0.01, 0.0, -0.04], np.float32)}
    options |= {"window_size": (150, 90)} if cell.has_window else {}
    options |= {"sink_tokens": 3} if cell.has_sink else {}
    options |= {"softcap": 15.0} if cell.has_softcap else {}
    for seed in SEEDS[:2]:
        result = run_forward(cell, q, k, v, seed=seed, program=build(parsed), **options)
        check_forward(result.out, result.lse, q, k, v, case=f"{key} sharpness {sharpness}", causal=parsed.causal, **options)


SHORT_BLOCKS = (
    "fa3_fwd_sm90a_bf16_hdim128_causal_window_sink",
    "fa3_fwd_sm90a_f16_hdim64_window_alibi_sink_softcap",
    "fa3_fwd_sm90a_bf16_hdim96_causal_window_sink_offsets_gqa3",
    "fa3_fwd_sm90a_f16_hdim64_causal_window_alibi_sink_gqa4",
)


@pytest.mark.parametrize(("seqlens", "sinks"), [((330, 700), 16), ((330, 700), 130), ((70, 420), 1), ((70, 420), 17)], ids=str)
@pytest.mark.parametrize("key", SHORT_BLOCKS)
def test_sink_tokens_far_before_the_windows(build: Build, key: str, seqlens: tuple[int, int], sinks: int) -> None:
    """The last of them in a short block, the others in whole ones; some warpgroups have no rows and let it pass."""
    parsed = DispatchKey.parse(key)
    cell = Cell.of(parsed)
    case = Case(seqlens, batch=2, groups=2, ratio=2, window=(40, 3), sinks=sinks, offsets=(90, None))
    q, k, v = case.arrays(cell, seed=12)
    called, expected = features(cell, q, k, case)
    for seed in SEEDS[:2]:
        result = run_forward(cell, q, k, v, seed=seed, program=build(parsed), **called)
        check_forward(result.out, result.lse, q, k, v, case=f"{key} {sinks} sinks", causal=parsed.causal, **expected)


@pytest.mark.parametrize("ratio", [3, 5])
def test_packed_heads_that_do_not_fill_a_tile(build: Build, ratio: int) -> None:
    key = DispatchKey.parse(f"fa3_fwd_sm90a_bf16_hdim64_causal_gqa{ratio}")
    for seed in SEEDS:
        run(Cell.of(key), build(key), Case((50, 200), batch=2, groups=2), seed)


@pytest.mark.parametrize(
    "key",
    [
        "fa3_fwd_sm90a_bf16_hdim64_causal",
        "fa3_fwd_sm90a_bf16_hdim64_causal_window_sink",
        "fa3_fwd_sm90a_bf16_hdim96_causal_alibi_offsets",
        "fa3_fwd_sm90a_f16_hdim128_causal",
        "fa3_fwd_sm90a_f16_hdim64_causal_gqa5",
    ],
)
def test_tiles_that_begin_before_the_first_query(build: Build, key: str) -> None:
    """Under a causal mask tiles end with the last query; each warpgroup's rows are missing whole, in part and not at all."""
    parsed = DispatchKey.parse(key)
    cell = Cell.of(parsed)
    assert isinstance(cell, Fa3FwdCell) and cell.has_tiles_from_end
    for seed, seqlen_q in enumerate((1, 63, 65, 130, 191, 193, 239)):
        for seqlen_k in (seqlen_q - seqlen_q // 3, seqlen_q + 150):
            run(cell, build(parsed), Case((seqlen_q, seqlen_k), batch=2, ratio=1, window=(70, 0)), seed)


def test_many_tiles_that_end_with_the_last_query(build: Build) -> None:
    for seed in SEEDS:
        run(Cell.of(SMALLEST), build(SMALLEST), Case((1023, 1023), ratio=1), seed)


def test_equal_seeds_give_equal_runs() -> None:
    """A fault's report is the same each time, to the last waiting thread."""
    found = mutate.mutants(render(Cell.of(SMALLEST)))
    mutant = next(m for m in found if m.operator == "drop a call" and re.search(r"empty.*arrive", m.before))
    program = ExecutorKernel.build(mutant.source)
    q, k, v = Case((77, 700)).arrays(Cell.of(SMALLEST), seed=3)
    reports = []
    for _ in range(3):
        with pytest.raises(ExecutorFault) as caught:
            run_forward(Cell.of(SMALLEST), q, k, v, seed=4, program=program)
        reports.append(caught.value.report)
    assert len(set(reports)) == 1


@pytest.mark.parametrize(
    ("before", "after", "report"),
    [
        ("params.lse != nullptr", "params.lse == nullptr", r"200 of 200 elements of lse were never written, first \(0, 0, 0\)"),
        ("column < params.head_dim", "column < params.head_dim - 8", r"of out were never written, first \(0, 0, 0, 32\)"),
        ("column < params.head_dim", "column < kHeadDim", r"an access to address .* of buffer out of"),
        ("column < params.head_dim", "column < (query == 0 ? kHeadDim : params.head_dim)", "out was written between its elements"),
    ],
)
def test_outputs_are_written_whole_and_nothing_else_is(before: str, after: str, report: str) -> None:
    cell = Cell.of(SMALLEST)
    source = render(cell)
    assert before in source.text
    program = ExecutorKernel.build(replace(source, text=source.text.replace(before, after)))
    case = Case((100, 131), narrower=24, strided=True)
    q, k, v = case.arrays(cell, seed=5)
    with pytest.raises(ExecutorFault, match=report):
        run_forward(cell, q, k, v, seed=0, program=program, out_like=case.out_like(q))


# ---- the check of the checker --------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Act:
    """An act whose absence (or change) must be noticed, and what the report must say of it."""

    operator: str
    line: str
    report: str
    function: str = ""

    def __str__(self) -> str:
        return f"{self.operator}: {self.line}"


ACTS = (
    Act("drop a call", "q_full.*wait", r"wgmma reads operand A at .* copy in flight|wgmma reads .* has not waited for"),
    Act("drop a call", "k_full.*wait", r"wgmma reads operand B at .* copy in flight|wgmma reads .* has not waited for", "attend"),
    Act("drop a call", "v_full.*wait", r"wgmma reads operand B at .* copy in flight|wgmma reads .* has not waited for", "attend"),
    Act("drop a call", "k_empty.*wait", r"tma_load to .* (may still be reading|in flight|to have landed)|arrival too many"),
    Act("drop a call", "empty.*arrive", "deadlock", "release"),
    Act("drop a call", "fence_mbarrier_init", "without fence_mbarrier_init"),
    Act("drop a call", "block_sync", "no barrier separates|not initialised"),
    Act("drop a call", "wgmma_fence", "wgmma_fence", "issue_pv"),
    Act("drop a call", "wgmma_commit", "in flight|were written between the issue|may still be reading", "issue_pv"),
    Act("drop a call", "wait_turn", "twice before it has opened"),
    Act("drop a call", "grow_registers_to", "kept its .* registers"),
    Act("drop a call", "pin_registers.p", "never went through pin_registers"),
    Act("drop a call", "rescale_rows", "wrong numbers"),
    Act("wait<0> to wait<1>", "wgmma_wait<0>", "in flight|before pin_registers|may still be reading|wrong numbers", "attend"),
    Act("expect too few bytes", "arrive_and_expect", "bytes more land than|too few bytes were expected"),
    Act("expect too many bytes", "arrive_and_expect", "deadlock"),
    Act("signal from one warp only", "lane == 0", "deadlock"),
    Act("another descriptor: swizzle", "kKLayout", "wrong numbers|reads operand B"),
    Act("min to max", "key_end", "wrong numbers"),
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
    noticed = mutate.caught(cell, chosen[0], seeds=6)
    assert noticed is not None and re.search(act.report, noticed), f"{chosen[0]}: {noticed}"


def test_a_sample_of_all_mutants_is_caught() -> None:
    """tools/mutate.py tries them all."""
    cell = Cell.of(SMALLEST)
    sample = list(mutate.mutants(render(cell)))[5 :: 2 * mutate.QUICK_STEP]
    survivors = [str(m) for m in sample if m.equivalent is None and mutate.caught(cell, m, seeds=3) is None]
    assert len(survivors) <= len(sample) * (1 - mutate.REQUIRED_SCORE) + 1, survivors


def test_equivalents_are_still_in_the_kernel() -> None:
    """An entry that matches no mutant any more explains nothing."""
    found = list(mutate.mutants(render(Cell.of(SMALLEST))))
    for entry in mutate.EQUIVALENT:
        assert any(re.fullmatch(entry.operator, m.operator) and re.search(entry.line, m.before) for m in found), entry


# ---- the command line's part ------------------------------------------------------------------------------


def test_run_key_reports_the_error() -> None:
    stream = io.StringIO()
    assert run_key(SMALLEST, stream, shape=RunShape(seqlen_q=40, seqlen_k=90), seed=5)
    assert re.search(r"max error against float64: out \d\.\d+e-\d+ .*: ok", stream.getvalue())


def test_the_package_does_not_import_the_executor() -> None:
    check = "import cutlass_fa, cutlass_fa.launch, sys; sys.exit(any(name.startswith('cutlass_fa.executor') for name in sys.modules))"
    assert subprocess.run([sys.executable, "-c", check]).returncode == 0
