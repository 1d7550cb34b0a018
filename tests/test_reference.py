"""The reference against independent mathematics, and the test rule against right and wrong results."""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import ml_dtypes
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from cutlass_fa.reference import (
    AttentionOptions,
    Gradients,
    Head,
    allowed_keys,
    attention_backward,
    attention_forward,
    attention_paged_forward,
    attention_varlen_backward,
    attention_varlen_forward,
    forward_by_head,
    gather_paged_kv,
    merge_states,
)
from tests.numerics import (
    BAND_ROWS,
    PRECISIONS,
    SEQLEN_PAIRS,
    check_backward,
    check_close,
    check_forward,
    decoded,
    encoded,
    lowp_backward,
    lowp_forward,
    poisoned,
    random_array,
    random_qkv,
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


# The rule of tests/numerics.py


@pytest.mark.parametrize("dtype", ["float16", "bfloat16", "float8_e4m3fn", "float8_e5m2"])
def test_rounding_equals_ml_dtypes(dtype: str) -> None:
    precision = PRECISIONS[dtype]
    bits = np.random.default_rng(0).integers(0, 1 << 32, 200_000, dtype=np.uint32)
    every = np.arange(1 << 8 * np.dtype(dtype).itemsize).astype(f"u{np.dtype(dtype).itemsize}").view(np.dtype(dtype))
    every = every.astype(np.float32)
    every = every[np.isfinite(every)]
    with np.errstate(invalid="ignore", over="ignore"):  # signalling NaN, overflow to infinity
        halfway = (np.sort(every)[1:] + np.sort(every)[:-1]) / 2
        values = np.concatenate([bits.view(np.float32), every, halfway, [math.inf, -math.inf, 0.0]]).astype(np.float32)
        values = values[~np.isnan(values)]
        expected = values.astype(np.dtype(dtype)).astype(np.float32)
        if precision.saturates:
            clipped = np.clip(values, -precision.largest, precision.largest).astype(np.dtype(dtype)).astype(np.float32)
            expected = np.where(np.isfinite(values), clipped, values)
        np.testing.assert_array_equal(precision.round(values), expected)
    assert np.isnan(precision.round(np.array([math.nan], dtype=np.float32))[0])
    np.testing.assert_array_equal(decoded(encoded(every, dtype), dtype).astype(np.float32), every)


def _flash(head: Head, *, dtype: str, tile: int = 128, missing: int | None = None, rows: slice = slice(None)) -> tuple[Array, Array]:
    """A right low-precision attention, tile by tile; ``missing``: first key of a tile to skip in ``rows``."""
    low, fp8 = PRECISIONS[dtype], PRECISIONS.get(head.v.dtype.name)
    p_low, p_scale = (fp8, np.float32(256)) if fp8 and fp8.saturates else (low, np.float32(1))
    q, k, v = (x.astype(np.float32) for x in (head.q, head.k, head.v))
    scale = np.float32(head.softmax_scale * head.descale[0] * head.descale[1])
    row_max = np.full((q.shape[0], 1), head.sink, dtype=np.float32)
    row_sum = np.full((q.shape[0], 1), 0.0 if head.sink == -math.inf else 1.0, dtype=np.float32)
    acc = np.zeros((q.shape[0], v.shape[1]), dtype=np.float32)
    for n in reversed(range(0, k.shape[0], tile)):
        keys = slice(n, n + tile)
        s = scale * (q @ k[keys].T)
        s = head.softcap * np.tanh(s / np.float32(head.softcap)) if head.softcap else s
        s = np.where(head.allowed[:, keys], s - np.float32(head.alibi_slope) * head.distance[:, keys], -np.inf)
        if n == missing:
            s[rows] = -np.inf
        new_max = np.maximum(row_max, s.max(axis=1, keepdims=True))
        safe_max = np.where(new_max == -np.inf, 0, new_max)
        p, correction = np.exp(s - safe_max), np.exp(row_max - safe_max)
        acc = acc * correction + p_low.round(p_scale * p) @ v[keys]
        row_sum, row_max = row_sum * correction + p.sum(axis=1, keepdims=True), new_max
    empty = row_sum == 0
    out = low.round(acc * np.float32(head.descale[2]) / (p_scale * np.where(empty, 1, row_sum)))
    lse = np.where(empty, -np.inf, np.where(empty, 0, row_max) + np.log(np.where(empty, 1, row_sum)))
    return out, lse[:, 0]


def _result(q: Array, k: Array, v: Array, dtype: str, options: dict[str, Any], **fault: Any) -> tuple[Array, Array]:
    compute = partial(_flash, dtype=dtype, **fault)
    out, lse = forward_by_head(compute, q, k, v, AttentionOptions(**options))
    return out.astype(np.dtype(dtype)), lse.astype(np.float32)


RIGHT_RESULTS = [
    *({"pair": pair} for pair in SEQLEN_PAIRS[:8]),
    *({"pair": pair, "causal": True} for pair in SEQLEN_PAIRS[:9]),
    {"pair": (384, 256), "dtype": "float16", "causal": True},
    {"pair": (256, 256), "window_size": (40, 0), "sink_tokens": 4, "causal": True},
    {"pair": (256, 384), "window_size": (40, 17), "softcap": 5.0},
    {"pair": (200, 300), "alibi_slopes": [0.5, 0.1], "causal": True},
    {"pair": (200, 300), "learnable_sink": [0.5, 2.0], "causal": True},
    {
        "pair": (200, 300),
        "qkv_dtype": "float8_e4m3fn",
        "q_descale": 0.5,
        "k_descale": 2.0,
        "v_descale": [[3.0]],
    },
    {"pair": (200, 900), "qkv_dtype": "float8_e5m2", "causal": True},
    {"pair": (200, 300), "qkv_dtype": "float8_e4m3fn", "dtype": "float16"},
]


def _inputs(right: dict[str, Any]) -> tuple[Array, Array, Array, str, dict[str, Any]]:
    """Fresh q, k, v, the dtype of the result and the options of attention_forward."""
    options = dict(right)
    (seqlen_q, seqlen_k), dtype = options.pop("pair"), options.pop("dtype", "bfloat16")
    shape: dict[str, Any] = {"batch": 1, "num_heads_q": 2, "num_heads_kv": 1, "head_dim": 64}
    qkv_dtype = options.pop("qkv_dtype", dtype)
    rng = np.random.default_rng(1)
    qkv = random_qkv(np, rng, seqlen_q=seqlen_q, seqlen_k=seqlen_k, **shape, dtype=qkv_dtype)
    return (*qkv, dtype, options)


@pytest.mark.parametrize("right", RIGHT_RESULTS, ids=str)
def test_rule_accepts_a_right_result(right: dict[str, Any]) -> None:
    q, k, v, dtype, options = _inputs(right)
    out, lse = _result(q, k, v, dtype, options)
    check_forward(out, lse, q, k, v, case=right, **options)


@pytest.fixture(scope="module", params=["full", "causal"])
def sound(request: pytest.FixtureRequest) -> dict[str, Any]:
    """Inputs and their right result; 768 rows, so that a causal mask has quiet rows to hide a fault in."""
    shape: dict[str, Any] = {
        "batch": 1,
        "seqlen_q": 768,
        "seqlen_k": 768,
        "num_heads_q": 1,
        "num_heads_kv": 1,
        "head_dim": 64,
    }
    q, k, v = random_qkv(np, np.random.default_rng(2), **shape, dtype="bfloat16")
    options = {"causal": request.param == "causal"}
    out, lse = _result(q, k, v, "bfloat16", options)
    check_forward(out, lse, q, k, v, case="the case", **options)
    return {"qkv": (q, k, v), "options": options, "out": out, "lse": lse}


def _refused(sound: dict[str, Any], match: str, out: Array | None = None, lse: Array | None = None) -> None:
    out, lse = sound["out"] if out is None else out, sound["lse"] if lse is None else lse
    q, k, v = sound["qkv"]
    with pytest.raises(AssertionError, match=match):
        check_forward(out, lse, q, k, v, case="the case", **sound["options"])


def test_rule_rejects_wrong_out(sound: dict[str, Any]) -> None:
    out = sound["out"]
    _refused(sound, "the case: out: max error", out=np.zeros_like(out))
    _refused(sound, "the case: out: max error", out=np.roll(out, 1, axis=1))
    _refused(sound, "the case: out: max error", out=np.roll(out, 1, axis=-1))
    _refused(sound, "the case: out: max error", out=(out.astype(np.float32) * 1.03).astype(out.dtype))
    unwritten = out.copy()
    unwritten[0, 700, 0, 13] = math.nan
    _refused(
        sound,
        r"out: 1 of 49152 elements differ in being finite, first at \(0, 700, 0, 13\): nan",
        out=unwritten,
    )
    _refused(sound, "out: shape", out=out[:, :-1])


def test_rule_rejects_one_missing_tile(sound: dict[str, Any]) -> None:
    q, k, v = sound["qkv"]
    fault: dict[str, Any] = {"missing": 128, "rows": slice(704, 768)}
    missing_out, missing_lse = _result(q, k, v, "bfloat16", sound["options"], **fault)
    _refused(sound, r"out: .* worst at \(0, 7\d\d, 0, \d+\)", out=missing_out)
    _refused(sound, r"lse: .* worst at \(0, 0, 7\d\d\)", lse=missing_lse)


def test_rule_rejects_wrong_lse(sound: dict[str, Any]) -> None:
    lse = sound["lse"]
    _refused(sound, "lse: max error", lse=lse * np.float32(math.log2(math.e)))
    _refused(sound, "lse: max error", lse=lse + np.float32(0.1))
    _refused(sound, "lse: .* differ in being finite", lse=np.full_like(lse, -math.inf))


def test_rule_rejects_small_errors_in_quiet_rows(sound: dict[str, Any]) -> None:
    """Errors that the first rows of a causal mask would hide, were the rule held to all rows at once."""
    out, lse = sound["out"].astype(np.float32), sound["lse"].copy()
    out[:, 384:640] += 0.012
    lse[..., 384:640] += 0.004
    _refused(sound, r"out: .* worst at \(0, [3-6]\d\d, 0, \d+\)", out=out.astype(sound["out"].dtype))
    _refused(sound, r"lse: .* worst at \(0, 0, [3-6]\d\d\)", lse=lse)


@pytest.mark.parametrize("right", RIGHT_RESULTS, ids=str)
def test_low_precision_is_near_the_reference(right: dict[str, Any]) -> None:
    """A lowp that strays would let the rule accept anything."""
    q, k, v, dtype, options = _inputs(right)
    out, lse = lowp_forward(q, k, v, out_dtype=dtype, **options)
    expected_out, expected_lse = attention_forward(q, k, v, **options)
    assert out.dtype == np.dtype(dtype) and lse.dtype == np.float32
    finite, low = np.isfinite(expected_lse), PRECISIONS[v.dtype.name]
    np.testing.assert_array_equal(np.isfinite(lse), finite)
    ulp, lse_ulp = 2.0**-low.mantissa_bits, 2.0 ** -PRECISIONS[dtype].mantissa_bits
    assert np.abs(out.astype(np.float64) - expected_out).max() <= 2 * ulp * np.abs(expected_out).max()
    assert np.abs(lse[finite] - expected_lse[finite]).max(initial=0.0) <= 4 * lse_ulp


def test_atol_is_the_floor_where_low_precision_is_exact() -> None:
    expected = np.ones(3)  # 1 + 0.3 - 0.3 in bfloat16 is 0.99609375
    lowp = expected.astype(ml_dtypes.bfloat16)
    check_close("out", expected + 0.0078, expected, lowp)
    with pytest.raises(AssertionError, match=r"allowed 7.812e-03"):
        check_close("out", expected + 0.0079, expected, lowp)


def test_bands_find_what_the_whole_hides() -> None:
    expected = np.full((1, 2 * BAND_ROWS + 5, 1, 4), 1e-3)
    expected[:, 0] = 4.3
    lowp = expected.astype(ml_dtypes.bfloat16)
    check_close("out", expected, expected, lowp, rows_axis=1)
    actual = expected.copy()
    actual[0, 2 * BAND_ROWS + 4, 0, 2] = 0.0
    check_close("out", actual, expected, lowp)
    with pytest.raises(AssertionError, match=rf"worst at \(0, {2 * BAND_ROWS + 4}, 0, 2\): 0.0, expected 0.001; 1 of"):
        check_close("out", actual, expected, lowp, rows_axis=1)


def test_rule_refuses_a_low_precision_that_proves_nothing() -> None:
    expected = np.ones(3)
    with pytest.raises(AssertionError, match="proves nothing"):
        check_close("out", expected, expected, np.array([1.0, math.inf, 1.0], dtype=np.float32))


def test_infinities_must_agree_in_sign() -> None:
    expected = np.array([-math.inf, 1.0])
    check_close("lse", expected, expected, expected.astype(np.float32))
    with pytest.raises(AssertionError, match=r"first at \(0,\): inf, expected -inf"):
        check_close("lse", -expected, expected, expected.astype(np.float32))


@pytest.mark.parametrize("dtype", ["float16", "bfloat16"])
def test_rule_for_gradients(dtype: str) -> None:
    shape: dict[str, Any] = {
        "batch": 1,
        "seqlen_q": 150,
        "seqlen_k": 130,
        "num_heads_q": 2,
        "num_heads_kv": 1,
        "head_dim": 64,
    }
    rng = np.random.default_rng(4)
    q, k, v = random_qkv(np, rng, **shape, dtype=dtype)
    dout, dlse = random_array(np, rng, q.shape, dtype), rng.standard_normal((1, 2, 150), dtype=np.float32)
    options: dict[str, Any] = {"causal": True, "softcap": 3.0, "learnable_sink": SINK, "dlse": dlse}
    options |= {"dropout_mask": _keep(1, 2, 150, 130), "dropout_p": 0.3}
    low = lowp_backward(dout, q, k, v, **options)
    check_backward(low, dout, q, k, v, case="lowp itself", **options)
    exact = attention_backward(dout, q, k, v, **options)
    check_backward(exact, dout, q, k, v, case="exact", **options)
    for name in ("dq", "dk", "dv", "dlearnable_sink"):
        wrong = {each: getattr(exact, each) for each in ("dq", "dk", "dv", "dlearnable_sink")}
        wrong[name] = wrong[name] * 1.05
        with pytest.raises(AssertionError, match=f"wrong: {name}: max error"):
            check_backward(Gradients(**wrong), dout, q, k, v, case="wrong", **options)


@pytest.mark.parametrize("dtype", ["float16", "bfloat16", "float8_e4m3fn"])
@pytest.mark.parametrize("memory_order", ["bshd", "bhsd"])
@pytest.mark.parametrize("extra_strides", [False, True])
def test_random_arrays_have_the_asked_layout(dtype: str, memory_order: str, extra_strides: bool) -> None:
    layout: dict[str, Any] = {"memory_order": memory_order, "extra_strides": extra_strides}
    x = random_array(np, np.random.default_rng(0), (2, 5, 3, 64), dtype, **layout)
    assert x.shape == (2, 5, 3, 64) and x.dtype == np.dtype(dtype)
    assert x.strides[-1] == x.itemsize and all(stride % 16 == 0 for stride in x.strides[:-1])
    assert (x.strides[1] < x.strides[2]) == (memory_order == "bhsd")
    assert x.swapaxes(1, 2).flags.c_contiguous == (memory_order == "bhsd" and not extra_strides)
    values = x.astype(np.float32)
    assert np.isfinite(values).all() and 0.8 < values.std() < 1.2
    if extra_strides:
        around = x.base
        while around.base is not None:
            around = around.base
        assert np.isnan(around.view(x.dtype).astype(np.float32)).sum() == around.size - x.size


def test_poison_and_bits() -> None:
    for dtype in PRECISIONS:
        assert np.isnan(poisoned(np, (2, 3), dtype).astype(np.float32)).all()
    for dtype in ("float8_e4m3fn", "float8_e5m2"):
        q, k, v = random_qkv(
            np,
            np.random.default_rng(0),
            batch=1,
            seqlen_q=3,
            seqlen_k=5,
            num_heads_q=2,
            num_heads_kv=1,
            head_dim=16,
            dtype=dtype,
        )
        out, lse = lowp_forward(q, k, v)
        from_bits = lowp_forward(*(x.view(np.uint8) for x in (q, k, v)), dtype=dtype)
        np.testing.assert_array_equal(from_bits[0], out)
        np.testing.assert_array_equal(from_bits[1], lse)
        assert out.dtype == ml_dtypes.bfloat16 and lse.dtype == np.float32
