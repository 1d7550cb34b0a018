"""The test rule (numerics.py) against right and wrong results."""

from __future__ import annotations

import math
from functools import partial
from typing import Any

import ml_dtypes
import numpy as np
import pytest

from cutlass_fa.reference import (
    AttentionOptions,
    Gradients,
    Head,
    attention_backward,
    attention_forward,
    forward_by_head,
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
    options: dict[str, Any] = {"causal": True, "softcap": 3.0, "learnable_sink": np.array([0.3, -1.2], dtype=np.float32), "dlse": dlse}
    options |= {"dropout_mask": np.random.default_rng(9).random((1, 2, 150, 130)) < 0.7, "dropout_p": 0.3}
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
