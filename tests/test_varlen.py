"""Calls on packed sequences without a GPU: what is refused and why, the reference's answers, the kernels a request needs."""

from __future__ import annotations

from typing import Any

import ml_dtypes
import numpy as np
import pytest

import cutlass_fa
from cutlass_fa import CumulativeSeqlens, Fa2BwdRequest, VarlenFwdRequest, errors
from cutlass_fa.api_varlen import check_sequences
from cutlass_fa.arrays import ArraySpec
from cutlass_fa.extras import ExtraSpecs
from cutlass_fa.problem import Problem
from cutlass_fa.reference import attention_backward, attention_forward
from cutlass_fa.request_parts import Causal, Full
from cutlass_fa.requests import packed_gqa_ratio
from tests.varlen_cases import Lengths

LENGTHS = Lengths("mixed", ((5, 7), (0, 3), (6, 2)), used_q=(5, 0, 4), behind=(2, 1))


def arrays(seed: int = 0) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    rng = np.random.default_rng(seed)
    total_q, total_k = LENGTHS.totals
    shapes = ((total_q, 4, 16), (total_k, 2, 16), (total_k, 2, 16))
    q, k, v = (rng.standard_normal(shape, dtype=np.float32).astype(ml_dtypes.bfloat16) for shape in shapes)
    return q, k, v


def test_reference_backend_computes_each_sequence_by_itself() -> None:
    q, k, v = arrays()
    sequences = LENGTHS.arrays(np)
    out, lse = cutlass_fa.flash_attn_varlen_func(q, k, v, **sequences, causal=True, return_lse=True, check=True, backend="reference")
    assert out.shape == q.shape and lse.shape == (4, q.shape[0]) and lse.dtype == np.float32
    for (rows_q, rows_k), used, start_q, start_k in zip(LENGTHS.pairs, (5, 0, 4), (0, 5, 5), (0, 7, 10), strict=True):
        one, one_lse = attention_forward(*(x[None] for x in (q[start_q:][:used], k[start_k:][:rows_k], v[start_k:][:rows_k])), causal=True)
        assert (out[start_q : start_q + used] == one[0].astype(q.dtype)).all()
        np.testing.assert_array_equal(lse[:, start_q : start_q + used], one_lse[0].astype(np.float32))
        assert not out[start_q + used : start_q + rows_q].astype(np.float32).any()
    assert np.isneginf(lse[:, -2:]).all()


def test_reference_backend_backward() -> None:
    q, k, v = arrays()
    sequences, dout = LENGTHS.arrays(np), arrays(seed=1)[0]
    found = cutlass_fa.flash_attn_varlen_backward(dout, q, k, v, **sequences, recompute=True, backend="reference")
    exact = attention_backward(dout, q, k, v, **sequences)
    for gradient, expected in zip(found, (exact.dq, exact.dk, exact.dv), strict=True):
        assert (gradient == expected.astype(q.dtype)).all()


@pytest.mark.parametrize(
    ("starts", "seqused", "max_seqlen", "error", "words"),
    [
        ([1, 5], None, None, errors.InvalidArgument, "expected 0"),
        ([0, 5, 4], None, None, errors.InvalidArgument, r"cu_seqlens_q\[2\]=4 is less than"),
        ([0, 5, 11], None, None, errors.InvalidArgument, "ends with 11, and there are 10 rows"),
        ([0, 2**31 - 1], None, None, errors.SeqlenOverflow, "31-bit"),
        ([0, 5, 10], [5, 6], None, errors.InvalidArgument, r"seqused_q\[1\]=6"),
        ([0, 5, 10], [-1, 5], None, errors.InvalidArgument, r"seqused_q\[0\]=-1"),
        ([0, 4, 10], None, 5, errors.InvalidArgument, "sequence 1 of cu_seqlens_q has 6 rows, more than max_seqlen_q=5"),
    ],
)
def test_numbers_are_checked(
    starts: list[int], seqused: list[int] | None, max_seqlen: int | None, error: type[Exception], words: str
) -> None:
    used = None if seqused is None else np.array(seqused, np.int32)
    with pytest.raises(error, match=words):
        check_sequences("q", np.array(starts, np.int32), used, max_seqlen, 10)
    check_sequences("q", np.array([0, 5, 10], np.int32), np.array([5, 0], np.int32), 5, 10)


def _spec(*shape: int, dtype: str = "bf16") -> ArraySpec:
    strides = tuple(int(np.prod(shape[axis + 1 :])) for axis in range(len(shape)))
    return ArraySpec(shape, strides, dtype, 0)


STARTS = _spec(4, dtype="int32")


@pytest.mark.parametrize(
    ("change", "error", "words"),
    [
        ({"cu_seqlens_k": None}, errors.InvalidArgument, "go together"),
        ({"cu_seqlens_q": None, "cu_seqlens_k": None, "seqused_k": _spec(3, dtype="int32")}, errors.InvalidArgument, "are of packed"),
        ({"cu_seqlens_q": _spec(1, dtype="int32")}, errors.EmptyBatch, "at least one sequence"),
        ({"cu_seqlens_k": _spec(5, dtype="int32")}, errors.InvalidArgument, r"cu_seqlens_k has shape \(5,\): expected \(4,\)"),
        ({"seqused_q": _spec(4, dtype="int32")}, errors.InvalidArgument, r"seqused_q has shape \(4,\): expected \(3,\)"),
        ({"cu_seqlens_q": _spec(4, dtype="int64")}, errors.InvalidArgument, "cu_seqlens_q has dtype int64: expected int32"),
        ({"alibi_slopes": _spec(2, 4, dtype="float32")}, errors.InvalidArgument, r"expected \(4,\) or \(3, 4\)"),
    ],
)
def test_extra_arrays_are_checked(change: dict[str, Any], error: type[Exception], words: str) -> None:
    extras = ExtraSpecs(**({"cu_seqlens_q": STARTS, "cu_seqlens_k": STARTS} | change))
    with pytest.raises(error, match=words):
        Problem.from_specs(_spec(100, 4, 64), _spec(80, 2, 64), _spec(80, 2, 64), None, arch="sm_90a", mask=Full(), extras=extras)


def test_a_batch_dimension_is_refused() -> None:
    q = np.zeros((1, 10, 2, 64), np.float16)
    starts = np.array([0, 10], np.int32)
    with pytest.raises(errors.InvalidArgument, match="expected 3 dimensions"):
        cutlass_fa.flash_attn_varlen_func(q, q, q, starts, starts, backend="reference")
    with pytest.raises(errors.InvalidArgument, match="cu_seqlens_k is None"):
        cutlass_fa.flash_attn_varlen_func(q[0], q[0], q[0], starts, None, backend="reference")


def test_problem_of_packed_sequences() -> None:
    extras = ExtraSpecs(cu_seqlens_q=STARTS, cu_seqlens_k=STARTS)
    problem = Problem.from_specs(
        _spec(100, 4, 64), _spec(80, 2, 64), _spec(80, 2, 64), None, arch="sm_90a", mask=Causal(), extras=extras, max_seqlen_q=40
    )
    request = problem.request
    assert (request.batch, request.seqlen_q, request.seqlen_k, request.rows_q, request.rows_k) == (3, 40, 80, 100, 80)
    assert problem.lse_shape == (4, 100) and problem.out_shape == (100, 4, 64) and problem.out.strides[0] == 0


def test_requests_name_every_kernel() -> None:
    rows = CumulativeSeqlens(total_q=4096, total_k=8192)
    sizes: dict[str, Any] = {"batch": 16, "num_heads_q": 8, "num_heads_kv": 2, "head_dim": 128, "mask": Causal()}
    tiles, main = VarlenFwdRequest(cu_seqlens=rows, **sizes).dispatch_keys()
    assert str(tiles) == "fa2_sequence_tiles_sm90a_bf16_hdim64"
    ratio = packed_gqa_ratio(4096 // 16, 4, 128)  # the mean length says whether heads are packed
    assert str(main) == "fa3_fwd_sm90a_bf16_hdim128_causal_varlen" + (f"_gqa{ratio}" if ratio > 1 else "")
    backward = Fa2BwdRequest(cu_seqlens=rows, seqlen_q=4096, seqlen_k=8192, **sizes)
    assert [key.direction for key in backward.dispatch_keys()] == ["sequence_tiles", "bwd_preprocess", "bwd", "bwd_convert"]
    assert backward.dispatch_key().varlen and backward.blocks == (4096 // 64 + 17, 8192 // 128 + 17)
    with pytest.raises(errors.ZeroSeqlen, match="total_k=0"):
        CumulativeSeqlens(5, 0)
