"""Golden cells on packed sequences on the CPU executor: the list of tiles and the kernel, by the test rule, under several schedules."""

from __future__ import annotations

import io
from collections.abc import Callable
from dataclasses import replace
from functools import lru_cache
from itertools import pairwise
from typing import Any

import numpy as np
import pytest

from cutlass_fa import VarlenFwdRequest
from cutlass_fa.cell import Cell
from cutlass_fa.dispatch import DISPATCH_TABLE, DispatchKey
from cutlass_fa.dropout import dropout_mask
from cutlass_fa.executor import ExecutorError, ExecutorKernel, Program, compiler_problem, run_backward, run_forward
from cutlass_fa.executor.launch import GlobalMemory
from cutlass_fa.executor.run import RunShape, run_key
from cutlass_fa.executor.sequence_tiles import list_tiles
from cutlass_fa.launches.sequence_tiles import Side
from cutlass_fa.reference import Gradients, attention_forward
from cutlass_fa.render import render
from cutlass_fa.request_parts import Causal, CumulativeSeqlens, MaskKind, SlidingFull
from cutlass_fa.requests import sequence_tiles_key
from tests import test_executor
from tests.backward_cases import DTYPES
from tests.numerics import check_backward, check_forward
from tests.varlen_cases import Lengths

pytestmark = pytest.mark.skipif(compiler_problem() is not None, reason=str(compiler_problem()))

GOLDEN = [key for key in DISPATCH_TABLE if key.direction == "fwd" and key.varlen and not key.paged]
SEEDS = (0, 1, 2, 3)
Build = Callable[[DispatchKey], Program]

LENGTHS = (
    Lengths("mixed", ((100, 100), (1, 9), (0, 50), (77, 0), (130, 200))),
    Lengths("used", ((20, 300), (150, 140)), used_q=(7, 133), used_k=(300, 131), behind=(150, 9)),
    Lengths("tail", ((40, 130),), used_k=(70,)),
    Lengths("empty", ((0, 0), (3, 3), (0, 0))),
)


@pytest.fixture(scope="session")
def build() -> Build:
    """The program of a cell, compiled once."""
    return lru_cache(maxsize=None)(lambda key: ExecutorKernel.build(render(Cell.of(key))))


def features(key: DispatchKey, lengths: Lengths, heads: int) -> tuple[dict[str, Any], dict[str, Any]]:
    """What a call of the key's features is given, and what the reference is told of it."""
    called: dict[str, Any] = {}
    if key.sliding_window:
        called["window_size"] = (40, 3)
    if key.sink:
        called["sink_tokens"] = 5
    if key.alibi:
        slopes = 0.7 * np.float32(2) ** -np.arange(lengths.batch * heads, dtype=np.float32)
        called["alibi_slopes"] = slopes.reshape(lengths.batch, heads)
    if key.learnable_sink:
        called["learnable_sink"] = np.linspace(-2, 3, heads, dtype=np.float32)
    if key.position_offset:
        called |= {"q_offset": 31, "k_offset": 2}
    if key.descale:
        factors = np.linspace(0.5, 2.0, lengths.batch, dtype=np.float32)[:, None]  # (batch, num_heads_kv = 1)
        called |= {"q_descale": factors, "k_descale": factors[::-1].copy(), "v_descale": 4 * factors}
    expected = dict(called)
    if key.dropout:
        called |= {"dropout_p": 0.17, "random_state": (3, 4)}
        expected |= {"dropout_p": 0.17, "dropout_mask": dropout_mask(3, 4, 0.17, lengths.batch, heads, *lengths.longest)}
    return called, expected


@pytest.mark.parametrize("lengths", LENGTHS, ids=str)
@pytest.mark.parametrize("key", GOLDEN, ids=str)
def test_golden_cell(build: Build, key: DispatchKey, lengths: Lengths) -> None:
    """Right under every schedule, and bitwise the same; keys that are not in use are NaN, and so are queries."""
    heads = max(key.gqa_ratio, 2), 1
    q, k, v = lengths.qkv(np, np.random.default_rng(7), heads, key.head_dim, test_executor.DTYPES[key.dtype])
    called, expected = features(key, lengths, heads[0])
    sequences, results = lengths.arrays(np), []
    for seed in SEEDS:
        results.append(run_forward(Cell.of(key), q, k, v, seed=seed, program=build(key), **called, **sequences))
        assert results[-1].out.tobytes() == results[0].out.tobytes() and (results[-1].lse == results[0].lse).all()
    q[~lengths.rows_in_use(0)] = 0  # the reference does not look at them; its rounding does
    expected |= {"causal": key.causal, **sequences}
    check_forward(results[0].out, results[0].lse, q, k, v, case=f"{key} {lengths}", **expected)
    assert not results[0].out[~lengths.rows_in_use(0)].astype(np.float32).any()


def blocks_of(lengths: Lengths, side: Side, block: int, mask: MaskKind) -> list[tuple[int, int]]:
    """(sequence, block) in the order of the list."""
    total_q, total_k = lengths.totals
    sizes = {"batch": lengths.batch, "num_heads_q": 1, "num_heads_kv": 1, "head_dim": 64}
    request = VarlenFwdRequest(cu_seqlens=CumulativeSeqlens(total_q, total_k), mask=mask, **sizes)
    memory = GlobalMemory()
    addresses = {name: memory.add(name, array).address for name, array in lengths.arrays(np).items()}
    numbers = list_tiles(request, side, block, block, addresses, memory, 0).data.view(np.int32)
    return [tuple(int(n) for n in numbers[2 + 2 * i : 4 + 2 * i]) for i in range(numbers[0])]  # type: ignore[misc]


@pytest.mark.parametrize("side", ["q", "k"])
@pytest.mark.parametrize("mask", [Causal(), SlidingFull(30)], ids=str)
@pytest.mark.parametrize("lengths", LENGTHS, ids=str)
def test_the_list_has_every_block_once_heavy_ones_first(lengths: Lengths, mask: MaskKind, side: Side) -> None:
    block, place = 16, "qk".index(side)
    found = blocks_of(lengths, side, block, mask)
    rows = [pair[place] for pair in lengths.pairs]
    rows.append(lengths.totals[place] - sum(rows))
    assert sorted(found) == [(b, i) for b, length in enumerate(rows) for i in range(-(-length // block))]
    work = [_work(lengths, place, block, mask, *entry) for entry in found]
    assert all(later <= earlier * 9 // 8 + 1 for earlier, later in pairwise(work)), work


def _work(lengths: Lengths, side: int, block: int, mask: MaskKind, sequence: int, index: int) -> int:
    """Blocks of columns that the block's rows see, by looking at each pair."""
    if sequence == lengths.batch:
        return 0
    own, other = ((lengths.used_q, lengths.used_k)[i] for i in (side, 1 - side))
    rows = own[sequence] if own else lengths.pairs[sequence][side]
    columns = other[sequence] if other else lengths.pairs[sequence][1 - side]
    left, right = (10**9 if bound < 0 else bound for bound in mask.window)
    seen = set()
    for row in range(index * block, min((index + 1) * block, rows)):
        for column in range(columns):
            query, key = (row, column) if side == 0 else (column, row)
            position = query + (columns - rows if side == 0 else rows - columns)
            if position - left <= key <= position + (0 if mask.causal else right):
                seen.add(column // block)
    return len(seen)


# ---- backward ------------------------------------------------------------------------------------------------------------------------

GOLDEN_BACKWARD = [key for key in DISPATCH_TABLE if key.direction == "bwd" and key.varlen]


@pytest.mark.parametrize("lengths", LENGTHS, ids=str)
@pytest.mark.parametrize("key", GOLDEN_BACKWARD, ids=str)
def test_golden_backward(build: Build, key: DispatchKey, lengths: Lengths) -> None:
    """Gradients by the rule; those of rows that are not in use are 0, whatever the rows hold."""
    rng, heads = np.random.default_rng(7), (2, 1)
    q, k, v = lengths.qkv(np, rng, heads, key.head_dim, DTYPES[key.dtype])
    dout = rng.standard_normal(q.shape, dtype=np.float32).astype(q.dtype)
    dlse = rng.standard_normal((heads[0], q.shape[0]), dtype=np.float32)
    called, expected = features(replace(key, learnable_sink=True), lengths, heads[0])
    expected |= {"causal": key.causal, **lengths.arrays(np)}
    exact_out, exact_lse = attention_forward(q, k, v, **expected)
    out, lse = exact_out.astype(q.dtype), exact_lse.astype(np.float32)
    out[~lengths.rows_in_use(0)], dout[~lengths.rows_in_use(0)] = np.nan, np.nan
    results = []
    for seed in SEEDS:
        more: dict[str, Any] = {"num_splits": 3 if key.split else 1, "num_copies": 2 if key.deterministic else 1, "dlse": dlse}
        results.append(run_backward(key, dout, q, k, v, out, lse, seed=seed, build=build, **called, **lengths.arrays(np), **more))
        if key.deterministic:
            assert (results[-1].dq.view(np.uint16) == results[0].dq.view(np.uint16)).all()
    for side, arrays in ((0, (q, dout)), (1, (k, v))):  # the reference does not look at them; its rounding does
        for array in arrays:
            array[~lengths.rows_in_use(side)] = 0
    for result in results:
        gradients = Gradients(result.dq, result.dk, result.dv, result.dlearnable_sink)
        check_backward(gradients, dout, q, k, v, case=f"{key} {lengths}", dlse=dlse, **expected)
        assert not result.dq[~lengths.rows_in_use(0)].astype(np.float32).any()
        assert not result.dk[~lengths.rows_in_use(1)].astype(np.float32).any()


@pytest.mark.parametrize(
    "name", ["fa3_fwd_sm90a_bf16_hdim64_causal_varlen", "fa2_fwd_sm80_f16_hdim64_varlen_dropout", "fa2_bwd_sm80_f16_hdim64_varlen"]
)
def test_run_key_runs_packed_sequences(name: str) -> None:
    stream = io.StringIO()
    assert run_key(DispatchKey.parse(name), stream, shape=RunShape(seqlen_q=70, seqlen_k=90), seed=5), stream.getvalue()


def test_run_key_says_what_the_list_runs_with() -> None:
    with pytest.raises(ExecutorError, match="runs with any kernel of packed sequences"):
        run_key(sequence_tiles_key("sm_80"), io.StringIO())
