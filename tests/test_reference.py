"""The reference against independent mathematics."""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from cutlass_fa.reference import (
    Gradients,
    allowed_keys,
    attention_backward,
    attention_forward,
    attention_paged_forward,
    attention_varlen_backward,
    attention_varlen_forward,
    gather_paged_kv,
    merge_states,
)
from tests.numerics import (
    poisoned,
)

# A warning (log of zero, -inf minus -inf) is the first sign of a NaN.
pytestmark = pytest.mark.filterwarnings("error")

Array = Any


@dataclass(frozen=True)
class Case:
    """One call of attention on tiny shapes, as (batch, seqlen_q, seqlen_k, num_heads_q, num_heads_kv)."""

    name: str
    shape: tuple[int, int, int, int, int] = (1, 3, 4, 2, 1)
    options: dict[str, Any] = field(default_factory=dict)

    def __str__(self) -> str:
        return self.name

    def arrays(self, head_dim: int = 3, head_dim_v: int = 2) -> tuple[Array, Array, Array]:
        batch, seqlen_q, seqlen_k, num_heads_q, num_heads_kv = self.shape
        rng = np.random.default_rng(len(self.name))
        q = rng.standard_normal((batch, seqlen_q, num_heads_q, head_dim))
        k = rng.standard_normal((batch, seqlen_k, num_heads_kv, head_dim))
        return q, k, rng.standard_normal((batch, seqlen_k, num_heads_kv, head_dim_v))


def _keep(*shape: int) -> Array:
    return np.random.default_rng(7).random(shape) > 0.3


SLOPES = np.array([0.5, 0.125], dtype=np.float32)
SINK = np.array([0.3, -1.2], dtype=np.float32)
CASES = [
    Case("plain"),
    Case("scale", options={"softmax_scale": 0.7}),
    Case("scale 0", options={"softmax_scale": 0.0}),
    Case("gqa", (2, 3, 4, 6, 2)),
    Case("causal", options={"causal": True}),
    Case("causal, empty rows", (1, 5, 3, 2, 2), {"causal": True}),
    Case("window", (1, 6, 6, 2, 1), {"window_size": (1, 2)}),
    Case(
        "window left, causal, sink tokens",
        (1, 7, 8, 2, 1),
        {"causal": True, "window_size": (1, -1), "sink_tokens": 2},
    ),
    Case("window left, sink tokens", (1, 7, 8, 2, 1), {"window_size": (1, 0), "sink_tokens": 2}),
    Case("softcap", options={"softcap": 0.8, "softmax_scale": 1.0}),
    Case("alibi", options={"alibi_slopes": SLOPES}),
    Case(
        "alibi per batch",
        (2, 3, 4, 2, 1),
        {"alibi_slopes": np.array([[0.5, 0.2], [0.1, 0.9]]), "causal": True},
    ),
    Case("learnable sink", options={"learnable_sink": SINK}),
    Case("learnable sink, empty rows", (1, 5, 3, 2, 1), {"learnable_sink": SINK, "causal": True}),
    Case("dropout", options={"dropout_mask": _keep(1, 2, 3, 4), "dropout_p": 0.3}),
    Case("offsets", options={"q_offset": 2, "k_offset": 1, "causal": True}),
    Case("q_offset", options={"q_offset": 1, "causal": True, "alibi_slopes": SLOPES}),
    Case("k_offset", options={"k_offset": -2, "causal": True}),
    Case("offsets per batch", (2, 3, 4, 2, 1), {"q_offset": np.array([0, 2]), "causal": True}),
    Case(
        "descale",
        (2, 3, 4, 4, 2),
        {"q_descale": 0.5, "k_descale": np.array([[2.0, 3.0], [0.5, 1.0]]), "v_descale": 1.5},
    ),
    Case(
        "seqused",
        (2, 3, 4, 2, 1),
        {"seqused_q": np.array([3, 2]), "seqused_k": np.array([2, 4]), "causal": True},
    ),
    Case("one key", (1, 4, 1, 2, 1), {"learnable_sink": SINK, "softcap": 2.0}),
    Case(
        "everything",
        (2, 5, 6, 4, 2),
        {
            "causal": True,
            "window_size": (2, -1),
            "sink_tokens": 1,
            "softcap": 1.5,
            "alibi_slopes": np.array([0.5, 0.3, 0.2, 0.1]),
            "learnable_sink": np.array([0.1, -0.5, 1.0, 0.0]),
            "dropout_mask": _keep(2, 4, 5, 6),
            "dropout_p": 0.25,
            "k_descale": np.array([[1.5, 0.5], [2.0, 1.0]]),
        },
    ),
]


def _may_see(i: int, j: int, seqlen_q: int, seqlen_k: int, options: dict[str, Any]) -> bool:
    """The mask in words, for query row i and key row j of one sequence."""
    q_offset, k_offset = options.get("q_offset"), options.get("k_offset")
    if q_offset is None and k_offset is None:
        q_offset = seqlen_k - seqlen_q
    position, key = i + (q_offset or 0), j + (k_offset or 0)
    left, right = options.get("window_size", (-1, -1))
    if options.get("causal") and key > position:
        return False
    if key < options.get("sink_tokens", 0):
        return True
    if left != -1 and key < position - left:
        return False
    return not (right != -1 and key > position + right)


def _pick(option: Any, b: int, h: int, default: float) -> float:
    table = np.asarray(default if option is None else option)
    return float(table if table.ndim == 0 else table[h] if table.ndim == 1 else table[b, h])


def _direct(q: Array, k: Array, v: Array, options: dict[str, Any]) -> tuple[Array, Array]:
    """Attention number by number, with none of the reference's array code."""
    (batch, rows_q, num_heads_q, head_dim), rows_k, num_heads_kv = q.shape, k.shape[1], k.shape[2]
    out, lse = (
        np.zeros((batch, rows_q, num_heads_q, v.shape[-1])),
        np.full((batch, num_heads_q, rows_q), -math.inf),
    )
    seqused_q, seqused_k = (
        options.get("seqused_q", [rows_q] * batch),
        options.get("seqused_k", [rows_k] * batch),
    )
    scale, cap = options.get("softmax_scale"), options.get("softcap", 0.0)
    scale = 1 / math.sqrt(head_dim) if scale is None else scale
    for b, h in np.ndindex(batch, num_heads_q):
        kv = h * num_heads_kv // num_heads_q
        seqlen_q, seqlen_k = int(seqused_q[b]), int(seqused_k[b])
        of_sequence = {name: x[b] if np.ndim(x) else x for name, x in options.items() if name.endswith("offset")}
        factors = [_pick(options.get(f"{x}_descale"), b, kv, 1.0) for x in "qkv"]
        for i in range(seqlen_q):
            weights = {}
            for j in range(seqlen_k):
                if _may_see(i, j, seqlen_q, seqlen_k, {**options, **of_sequence}):
                    score = scale * factors[0] * factors[1] * sum(q[b, i, h, d] * k[b, j, kv, d] for d in range(head_dim))
                    score = cap * math.tanh(score / cap) if cap else score
                    q_offset = of_sequence.get("q_offset", 0 if "k_offset" in of_sequence else seqlen_k - seqlen_q)
                    distance = abs(i + q_offset - j - of_sequence.get("k_offset", 0))
                    weights[j] = math.exp(score - _pick(options.get("alibi_slopes"), b, h, 0.0) * distance)
            sink = options.get("learnable_sink")
            total = sum(weights.values()) + (0.0 if sink is None else math.exp(float(sink[h])))
            if total:
                lse[b, h, i] = math.log(total)
            for j, weight in weights.items():
                keep = 1.0 if "dropout_mask" not in options else options["dropout_mask"][b, h, i, j] / (1 - options["dropout_p"])
                out[b, i, h] += weight / total * keep * factors[2] * v[b, j, kv]
    return out, lse


@pytest.mark.parametrize("case", CASES, ids=str)
def test_forward_equals_a_direct_loop(case: Case) -> None:
    q, k, v = case.arrays()
    out, lse = attention_forward(q, k, v, **case.options)
    expected_out, expected_lse = _direct(q, k, v, case.options)
    assert out.dtype == lse.dtype == np.float64
    np.testing.assert_allclose(out, expected_out, rtol=1e-12, atol=1e-13)
    np.testing.assert_allclose(lse, expected_lse, rtol=1e-12, atol=1e-13)


@pytest.mark.parametrize("case", CASES, ids=str)
def test_gradients_equal_finite_differences(case: Case) -> None:
    options = dict(case.options)
    arrays = dict(zip("qkv", case.arrays(), strict=True))
    if "learnable_sink" in options:
        arrays["learnable_sink"] = options.pop("learnable_sink").astype(np.float64)
    rng = np.random.default_rng(11)
    out, lse = attention_forward(**arrays, **options)
    dout, dlse = rng.standard_normal(out.shape), rng.standard_normal(lse.shape)

    def loss() -> float:
        out, lse = attention_forward(**arrays, **options)
        return float((out * dout).sum() + (np.where(np.isfinite(lse), lse, 0.0) * dlse).sum())

    gradients = attention_backward(dout, **arrays, **options, dlse=dlse)
    assert (gradients.dlearnable_sink is None) == ("learnable_sink" not in arrays)
    step = 1e-5
    for name, x in arrays.items():
        numeric = np.zeros_like(x)
        for index in np.ndindex(x.shape):
            value, losses = x[index], []
            for x[index] in (value + step, value - step):
                losses.append(loss())
            x[index] = value
            numeric[index] = (losses[0] - losses[1]) / (2 * step)
        np.testing.assert_allclose(getattr(gradients, f"d{name}"), numeric, rtol=1e-6, atol=1e-8, err_msg=name)


def test_gradient_without_dlse_takes_it_as_zero() -> None:
    q, k, v = CASES[0].arrays()
    dout = np.ones((1, 3, 2, 2))
    with_zeros = attention_backward(dout, q, k, v, dlse=np.zeros((1, 2, 3)))
    np.testing.assert_array_equal(attention_backward(dout, q, k, v).dq, with_zeros.dq)


@settings(max_examples=150, deadline=None)
@given(
    seqlen_q=st.integers(0, 9),
    seqlen_k=st.integers(0, 9),
    causal=st.booleans(),
    window_size=st.tuples(st.integers(-1, 10), st.integers(-1, 10)),
    sink_tokens=st.integers(0, 10),
    q_offset=st.none() | st.integers(-5, 12),
    k_offset=st.none() | st.integers(-5, 12),
)
def test_allowed_keys_equal_the_mask_in_words(seqlen_q: int, seqlen_k: int, **options: Any) -> None:
    mask = allowed_keys(seqlen_q, seqlen_k, **options)
    assert mask.shape == (seqlen_q, seqlen_k) and mask.dtype == bool
    for i, j in np.ndindex(seqlen_q, seqlen_k):
        assert mask[i, j] == _may_see(i, j, seqlen_q, seqlen_k, options), (i, j)


def test_causal_mask_is_bottom_right_aligned() -> None:
    np.testing.assert_array_equal(allowed_keys(2, 4, causal=True), [[1, 1, 1, 0], [1, 1, 1, 1]])
    np.testing.assert_array_equal(allowed_keys(4, 2, causal=True), [[0, 0], [0, 0], [1, 0], [1, 1]])


@pytest.mark.parametrize(("seqlen_q", "seqlen_k"), [(5, 2), (3, 0), (0, 3)])
def test_fully_masked_rows_are_zero_and_their_lse_minus_infinity(seqlen_q: int, seqlen_k: int) -> None:
    q, k, v = Case("", (2, seqlen_q, seqlen_k, 2, 1)).arrays()
    out, lse = attention_forward(q, k, v, causal=True)
    empty = max(0, seqlen_q - seqlen_k)
    assert (out[:, :empty] == 0).all() and (lse[:, :, :empty] == -math.inf).all()
    assert np.isfinite(lse[:, :, empty:]).all() and np.isfinite(out).all()
    gradients = attention_backward(np.ones_like(out), q, k, v, causal=True, dlse=np.ones_like(lse))
    assert (gradients.dq[:, :empty] == 0).all()
    assert all(np.isfinite(x).all() for x in (gradients.dq, gradients.dk, gradients.dv))


def test_fully_masked_row_with_a_learnable_sink_has_its_logit_as_lse() -> None:
    out, lse = attention_forward(*Case("", (1, 3, 0, 2, 1)).arrays(), learnable_sink=SINK)
    assert (out == 0).all()
    np.testing.assert_allclose(lse[0], np.broadcast_to(SINK[:, None], (2, 3)))


def test_large_scores_do_not_overflow() -> None:
    q, k, v = Case("").arrays()
    out, lse = attention_forward(1e3 * q, 1e3 * k, v)
    assert np.isfinite(out).all() and np.isfinite(lse).all()


CU_SEQLENS_Q, CU_SEQLENS_K = (
    np.array([0, 3, 3, 8, 10], dtype=np.int32),
    np.array([0, 4, 6, 6, 12], dtype=np.int32),
)


@pytest.mark.parametrize("seqused", [False, True])
def test_varlen_equals_each_sequence_by_itself(seqused: bool) -> None:
    rng = np.random.default_rng(3)
    q, k, v = (rng.standard_normal((total, heads, 3)) for total, heads in ((11, 4), (13, 2), (13, 2)))
    dout, dlse = rng.standard_normal(q.shape), rng.standard_normal((4, 11))
    lengths_q, lengths_k = np.diff(CU_SEQLENS_Q), np.diff(CU_SEQLENS_K)
    used: dict[str, Any] = {}
    if seqused:
        lengths_q, lengths_k = np.array([2, 0, 5, 1]), np.array([4, 1, 0, 3])
        used = {"seqused_q": lengths_q, "seqused_k": lengths_k}
    expected_out, expected_lse = np.zeros(q.shape), np.full((4, 11), -math.inf)
    expected = Gradients(np.zeros(q.shape), np.zeros(k.shape), np.zeros(v.shape))
    slopes, keep = rng.random((4, 4)), rng.random((4, 4, 5, 6)) > 0.2
    unused_q, unused_k = np.ones(11, dtype=bool), np.ones(13, dtype=bool)
    for b, (start_q, start_k) in enumerate(zip(CU_SEQLENS_Q[:-1], CU_SEQLENS_K[:-1], strict=True)):
        rows_q, rows_k = slice(start_q, start_q + lengths_q[b]), slice(start_k, start_k + lengths_k[b])
        unused_q[rows_q], unused_k[rows_k] = False, False
        own = {"alibi_slopes": slopes[b], "dropout_mask": keep[b : b + 1, :, : lengths_q[b], : lengths_k[b]]}
        arrays = (q[None, rows_q], k[None, rows_k], v[None, rows_k])
        options: dict[str, Any] = {"causal": True, "dropout_p": 0.2, **own}
        out, lse = attention_forward(*arrays, **options)
        expected_out[rows_q], expected_lse[:, rows_q] = out[0], lse[0]
        part = attention_backward(dout[None, rows_q], *arrays, dlse=dlse[None, :, rows_q], **options)
        expected.dq[rows_q], expected.dk[rows_k], expected.dv[rows_k] = part.dq[0], part.dk[0], part.dv[0]
    q[unused_q], k[unused_k], v[unused_k] = math.nan, math.nan, math.nan
    packed = (q, k, v, CU_SEQLENS_Q, CU_SEQLENS_K)
    options = {"causal": True, "alibi_slopes": slopes, "dropout_mask": keep, "dropout_p": 0.2, **used}
    out, lse = attention_varlen_forward(*packed, **options)
    np.testing.assert_allclose(out, expected_out, atol=1e-14)
    np.testing.assert_allclose(lse, expected_lse, atol=1e-14)
    gradients = attention_varlen_backward(dout, *packed, dlse=dlse, **options)
    for name in ("dq", "dk", "dv"):
        np.testing.assert_allclose(getattr(gradients, name), getattr(expected, name), atol=1e-13, err_msg=name)


@pytest.mark.parametrize(
    "masks",
    [
        {},
        {"causal": True},
        {"window_size": (3, 1)},
        {"causal": True, "window_size": (2, -1), "sink_tokens": 2},
    ],
)
def test_merging_split_keys_equals_the_whole(masks: dict[str, Any]) -> None:
    case = Case("", (2, 6, 9, 4, 2))
    q, k, v = case.arrays()
    options = {**masks, "alibi_slopes": np.array([0.5, 0.3, 0.2, 0.1]), "softcap": 2.0}
    expected = attention_forward(q, k, v, **options)
    state = (poisoned(np, expected[0].shape, np.float32), np.full(expected[1].shape, -math.inf))
    for first, last in ((0, 2), (2, 7), (7, 9)):
        part = slice(first, last)
        state = merge_states(*state, *attention_forward(q, k[:, part], v[:, part], **options, q_offset=3, k_offset=first))
    np.testing.assert_allclose(state[0], expected[0], atol=1e-14)
    np.testing.assert_allclose(state[1], expected[1], atol=1e-14)


def test_chunks_of_queries_at_their_offsets_equal_the_whole() -> None:
    q, k, v = Case("", (2, 7, 9, 2, 1)).arrays()
    options: dict[str, Any] = {
        "causal": True,
        "window_size": (3, -1),
        "sink_tokens": 1,
        "alibi_slopes": SLOPES,
    }
    out, lse = attention_forward(q, k, v, **options)
    for chunk in (slice(0, 3), slice(3, 7)):
        part_out, part_lse = attention_forward(q[:, chunk], k, v, **options, q_offset=chunk.start + 2)
        np.testing.assert_allclose(part_out, out[:, chunk], atol=1e-14)
        np.testing.assert_allclose(part_lse, lse[:, :, chunk], atol=1e-14)


def test_paged_equals_dense() -> None:
    rng = np.random.default_rng(5)
    block_size, seq_lens = 4, np.array([9, 0, 4], dtype=np.int32)
    block_table = np.array([[5, 0, 3], [1, 1, 1], [2, 1, 1]], dtype=np.int32)
    k_cache, v_cache = (np.full((6, block_size, 2, d), math.nan, dtype=np.float32) for d in (3, 5))
    k, v = (rng.standard_normal((3, 9, 2, d)).astype(np.float32) for d in (3, 5))
    for sequence, row in ((s, r) for s in range(3) for r in range(seq_lens[s])):
        block = block_table[sequence, row // block_size]
        k_cache[block, row % block_size], v_cache[block, row % block_size] = (
            k[sequence, row],
            v[sequence, row],
        )
    gathered = gather_paged_kv(k_cache, block_table, seq_lens)
    assert [x.shape for x in gathered] == [(9, 2, 3), (0, 2, 3), (4, 2, 3)]
    assert gathered[0].dtype == np.float32 and (gathered[0] == k[0]).all() and (gathered[2] == k[2, :4]).all()
    q = rng.standard_normal((3, 2, 4, 3))
    expected_out, expected_lse = attention_forward(q, k, v, causal=True, seqused_k=seq_lens)
    out, lse = attention_paged_forward(q, k_cache, v_cache, block_table, seq_lens, causal=True)
    np.testing.assert_allclose(out, expected_out, atol=1e-14)
    np.testing.assert_allclose(lse, expected_lse, atol=1e-14)
    packed = attention_paged_forward(q.reshape(6, 4, 3), k_cache, v_cache, block_table, seq_lens, causal=True, cu_seqlens_q=[0, 2, 4, 6])
    np.testing.assert_allclose(packed[0].reshape(out.shape), expected_out, atol=1e-14)


@pytest.mark.parametrize("dtype", ["float16", "bfloat16", "float8_e4m3fn", "float8_e5m2"])
def test_low_precision_inputs_are_their_values(dtype: str) -> None:
    stored = [x.astype(np.dtype(dtype)) for x in Case("").arrays()]
    out, lse = attention_forward(*stored, causal=True)
    expected_out, expected_lse = attention_forward(*(x.astype(np.float64) for x in stored), causal=True)
    np.testing.assert_array_equal(out, expected_out)
    np.testing.assert_array_equal(lse, expected_lse)


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"dropout_p": 0.1}, ValueError, "dropout_mask"),
        ({"cu_seqlens_k": [0, 4]}, ValueError, "cu_seqlens"),
        ({"window": (1, 1)}, TypeError, "window"),
    ],
)
def test_wrong_options_are_refused(options: dict[str, Any], error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        attention_forward(*Case("").arrays(), **options)


def test_heads_that_do_not_divide_are_refused() -> None:
    with pytest.raises(ValueError, match="num_heads_q=3"):
        attention_forward(*Case("", (1, 3, 4, 3, 2)).arrays())
