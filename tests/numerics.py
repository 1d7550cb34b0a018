"""The rule that every number of this library is held to, and the inputs it is tried on.

A result passes when ``max|actual - reference| <= 2 * max|lowp - reference| + atol``. The reference is float64
(cutlass_fa/reference.py). lowp is the same mathematics in the result's own low precision, whole score
matrices, no tiles, every operation's result rounded: what an honest program without flash attention gets. The
rule and the order of lowp's operations are those of flash-attention's tests (``attention_ref(upcast=False,
reorder_ops=True)``), with one sharper edge: every 128 rows must keep the rule by themselves. Over all rows at
once, the rounding of a few large numbers (first rows of a causal mask) hides whole missing tiles elsewhere.

Works on NumPy and CuPy arrays alike. lowp computes in float32 and rounds by arithmetic, so that no array
library has to know the low-precision dtypes. fp8 values travel as ml_dtypes arrays (NumPy) or, where the
array module has no fp8 dtype (CuPy), as uint8 bits together with the dtype's name.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from functools import partial
from types import ModuleType
from typing import Any

import ml_dtypes
import numpy as np

from cutlass_fa.reference import (
    Array,
    AttentionOptions,
    Gradients,
    Head,
    array_module,
    as_float64,
    attention_backward,
    attention_forward,
    backward_by_head,
    forward_by_head,
)

# (seqlen_q, seqlen_k) that break kernels: one row, tails of tiles, more queries than keys, edges of tiles.
_SEQLENS_Q = (1, 64, 239, 799, 113, 128, 108, 384, 640, 1024, 1023, 2048, 4096)
_SEQLENS_K = (1, 128, 1, 3, 203, 217, 256, 256, 128, 1023, 1024, 2048, 4096)
SEQLEN_PAIRS = tuple(zip(_SEQLENS_Q, _SEQLENS_K, strict=True))

FP8_DTYPES = ("float8_e4m3fn", "float8_e5m2")
FP8_NAN_BITS = 0x7F  # NaN in both formats
BAND_ROWS = 128  # each so many rows keep the rule by themselves, the last ones with the tail
# An fp8 kernel rounds 256 * exp(s - max): the smaller probabilities stay above the format's smallest numbers.
FP8_PROBABILITY_SCALE = 256.0


@dataclass(frozen=True)
class Precision:
    """A binary floating-point format; ``round`` is to nearest, ties to even."""

    name: str
    mantissa_bits: int  # stored ones
    min_exponent: int  # of normal numbers
    largest: float
    saturates: bool  # above the largest number: to it, as CUDA's conversions to fp8 do, or to infinity

    def round(self, x: Array) -> Array:
        """The nearest numbers of this format, held in float32."""
        xp = array_module(x)
        if self.name == "float32":
            return x.astype(np.float32)
        exponent = xp.frexp(x)[1] - 1  # |x| in [2**exponent, 2**(exponent + 1))
        ulp_exponent = xp.maximum(exponent, self.min_exponent) - self.mantissa_bits
        rounded = xp.ldexp(xp.rint(xp.ldexp(x, -ulp_exponent)), ulp_exponent).astype(np.float32)
        beyond = xp.abs(rounded) > self.largest
        if self.saturates:
            return xp.where(beyond & xp.isfinite(x), xp.copysign(np.float32(self.largest), rounded), rounded)
        return xp.where(beyond, xp.copysign(np.float32(math.inf), rounded), rounded)


PRECISIONS = {
    precision.name: precision
    for precision in (
        Precision("float32", 23, -126, float(np.finfo(np.float32).max), saturates=False),
        Precision("float16", 10, -14, 65504.0, saturates=False),
        Precision("bfloat16", 7, -126, float(ml_dtypes.finfo(ml_dtypes.bfloat16).max), saturates=False),
        Precision("float8_e4m3fn", 3, -6, 448.0, saturates=True),
        Precision("float8_e5m2", 2, -14, 57344.0, saturates=True),
    )
}


def lowp_forward(
    q: Array,
    k: Array,
    v: Array,
    *,
    dtype: Any = None,
    v_dtype: Any = None,
    out_dtype: Any = None,
    **options: Any,
) -> tuple[Array, Array]:
    """``(out, lse)`` of the low precision that q's dtype names: out in that dtype, lse in float32.

    dtype and v_dtype name the formats of q and k, and of v, where the arrays themselves do not (uint8 bits of
    fp8). With fp8 inputs everything but the probabilities (in e4m3) is rounded to out_dtype, by default
    bfloat16. options: those of attention_forward.
    """
    dtype, v_dtype = _formats(q, v, dtype, v_dtype)
    low_dtype = _low_dtype(dtype, out_dtype)
    fp8_p = PRECISIONS["float8_e4m3fn"] if v_dtype.name in FP8_DTYPES else None
    compute = partial(_lowp_head_forward, low=PRECISIONS[low_dtype.name], fp8_p=fp8_p)
    q, k, v = decoded(q, dtype), decoded(k, dtype), decoded(v, v_dtype)
    out, lse = forward_by_head(compute, q, k, v, AttentionOptions(**options))
    return out.astype(np.float32).astype(low_dtype), lse.astype(np.float32)


def lowp_backward(dout: Array, q: Array, k: Array, v: Array, *, dlse: Array | None = None, **options: Any) -> Gradients:
    """Gradients in q's dtype (float16 or bfloat16): lowp_forward differentiated, operation by operation.

    The softmax takes its row sums from the rounded out, rowsum(dout * out), as every flash attention does.
    """
    compute = partial(_lowp_head_backward, low=PRECISIONS[q.dtype.name])
    exact = backward_by_head(compute, dout, dlse, q, k, v, AttentionOptions(**options))
    dq, dk, dv = (x.astype(np.float32).astype(q.dtype) for x in (exact.dq, exact.dk, exact.dv))
    dsink = exact.dlearnable_sink
    return Gradients(dq, dk, dv, None if dsink is None else dsink.astype(np.float32))


def check_forward(
    out: Array,
    lse: Array | None,
    q: Array,
    k: Array,
    v: Array,
    *,
    case: Any,
    dtype: Any = None,
    v_dtype: Any = None,
    **options: Any,
) -> None:
    """Hold a forward result, dense or packed, to the rule.

    q, k, v, dtype, v_dtype and options as lowp_forward's; ``case`` names the case in the message.
    """
    dtype, v_dtype = _formats(q, v, dtype, v_dtype)
    q, k, v = decoded(q, dtype), decoded(k, dtype), decoded(v, v_dtype)
    formats = {"dtype": dtype, "v_dtype": v_dtype, "out_dtype": out.dtype}
    low_out, low_lse = lowp_forward(q, k, v, **formats, **options)
    expected_out, expected_lse = attention_forward(q, k, v, **options)
    check_close("out", out, expected_out, low_out, case, rows_axis=-3)
    if lse is not None:
        check_close("lse", lse, expected_lse, low_lse, case, rows_axis=-1)


def check_backward(
    gradients: Gradients,
    dout: Array,
    q: Array,
    k: Array,
    v: Array,
    *,
    case: Any,
    dlse: Array | None = None,
    **options: Any,
) -> None:
    """Hold dq, dk, dv (and dlearnable_sink, where there is one) to the rule."""
    low = lowp_backward(dout, q, k, v, dlse=dlse, **options)
    expected = attention_backward(dout, q, k, v, dlse=dlse, **options)
    for name in ("dq", "dk", "dv"):
        check_close(name, getattr(gradients, name), getattr(expected, name), getattr(low, name), case, rows_axis=-3)
    if expected.dlearnable_sink is not None:
        spread, size = _sink_gradient_terms(dout, dlse, q, k, v, AttentionOptions(**options))
        # Rounding moves a number by a fifth of an ulp, as a standard deviation; out has the rounding of P in it too. And a sum in
        # float32 is off by some ulps of the size of its terms.
        slack = 2 * spread * 2.0 ** -PRECISIONS[q.dtype.name].mantissa_bits + 4 * size * 2.0 ** -PRECISIONS["float32"].mantissa_bits
        check_close("dlearnable_sink", gradients.dlearnable_sink, expected.dlearnable_sink, low.dlearnable_sink, case, slack=slack)


def _sink_gradient_terms(dout: Array, dlse: Array | None, q: Array, k: Array, v: Array, options: AttentionOptions) -> tuple[float, float]:
    """Of dlearnable_sink: how far it moves, as a standard deviation, when each number of out moves by its own size; and the sum of its
    terms' sizes. The largest of any head.

    A head has one such number, the sum of its rows' errors of either sign: lowp's may be near 0 by chance, and
    is then no measure.
    """

    def variance(head: Head, dout: Array, dlse: Array) -> Gradients:
        soft = _lowp_softmax(head, PRECISIONS["float32"])
        out = soft.exp / soft.row_sum * head.dropout @ soft.v
        return Gradients(0.0, 0.0, 0.0, (soft.sink**2 * ((dout * out) ** 2).sum(axis=1)).sum())

    def size(head: Head, dout: Array, dlse: Array) -> Gradients:
        soft = _lowp_softmax(head, PRECISIONS["float32"])
        out = soft.exp / soft.row_sum * head.dropout @ soft.v
        return Gradients(0.0, 0.0, 0.0, (soft.sink * (abs(dlse) + abs(dout * out).sum(axis=1))).sum())

    spread, terms = (backward_by_head(each, dout, dlse, q, k, v, options).dlearnable_sink for each in (variance, size))
    assert spread is not None and terms is not None
    return math.sqrt(float(spread.max())), float(terms.max())


def check_close(
    name: str, actual: Array, expected: Array, lowp: Array, case: Any = "", *, rows_axis: int | None = None, slack: float = 0.0
) -> None:
    """Raise AssertionError unless ``max|actual - expected| <= 2 * max|lowp - expected| + atol + slack``.

    atol is twice what adding and subtracting 0.3 in lowp's dtype does to expected: the floor of a case where
    lowp happens to be exact. Infinities and NaN must stand in the same places first. With rows_axis, each
    BAND_ROWS rows along that axis must keep the rule by themselves.
    """
    prefix = f"{case}: {name}" if case != "" else name
    if actual.shape != expected.shape or lowp.shape != expected.shape:
        shapes = f"{actual.shape}, expected {expected.shape}, low precision {lowp.shape}"
        raise AssertionError(f"{prefix}: shape {shapes}")
    low = PRECISIONS[lowp.dtype.name]
    actual, expected, lowp = (as_float64(x) for x in (actual, expected, lowp))
    _check_same_nonfinite(prefix, actual, expected)
    _check_same_nonfinite(f"{prefix} (low precision: the case proves nothing)", lowp, expected)
    xp = array_module(expected)
    finite = xp.isfinite(expected)
    actual, expected, lowp = (xp.where(finite, x, 0.0) for x in (actual, expected, lowp))
    for band in _bands(expected.shape, rows_axis):
        error = xp.abs(actual[band] - expected[band])
        lowp_error, atol = float(xp.abs(lowp[band] - expected[band]).max()), _atol(expected[band], low)
        allowed = 2.0 * lowp_error + atol + slack
        worst = _coordinate(error.argmax(), error.shape)
        if not float(error[worst]) <= allowed:
            where = tuple(i + part.start for i, part in zip(worst, band, strict=True))
            raise AssertionError(
                f"{prefix}: max error {float(error[worst]):.3e} > allowed {allowed:.3e} = 2 *"
                f" {lowp_error:.3e} + {atol + slack:.3e}, worst at {where}: {float(actual[where])}, expected"
                f" {float(expected[where])}; {int((error > allowed).sum())} of these {error.size} are out"
            )


def random_array(
    xp: ModuleType,
    rng: Any,
    shape: tuple[int, ...],
    dtype: Any,
    *,
    memory_order: str = "bshd",
    extra_strides: bool = False,
) -> Array:
    """Standard normal numbers of shape (..., seqlen, heads, head_dim), rounded to dtype.

    memory_order: "bshd" lies in memory as the shape says, "bhsd" has the heads outside the sequence.
    extra_strides: a slice of a larger buffer that is NaN elsewhere; head_dim stays contiguous, and addresses
        and strides stay multiples of 16 bytes where a head_dim vector is: a tensor map can describe it.
    rng: numpy.random.Generator, or a CuPy one to draw on the GPU. fp8 on CuPy comes as uint8 bits.
    """
    if memory_order not in ("bshd", "bhsd"):
        raise ValueError(f"memory_order={memory_order!r} is neither 'bshd' nor 'bhsd'")
    swapped = memory_order == "bhsd"
    in_memory = (*shape[:-3], shape[-2], shape[-3], shape[-1]) if swapped else shape
    values = encoded(xp.asarray(rng.standard_normal(in_memory, dtype=np.float32)), dtype)
    if extra_strides:
        row = in_memory[-1] + 32
        row += -row % (16 // np.dtype(dtype).itemsize)
        buffer = poisoned(xp, (*(extent + 2 for extent in in_memory[:-1]), row), dtype)
        inside = (*(slice(1, 1 + extent) for extent in in_memory[:-1]), slice(16, 16 + in_memory[-1]))
        buffer[inside] = values
        values = buffer[inside]
    return values.swapaxes(-3, -2) if swapped else values


def random_outliers(rng: np.random.Generator, shape: tuple[int, ...]) -> np.ndarray:
    """Standard normal numbers in float32, one of 500 ten times as large."""
    x = rng.standard_normal(shape, dtype=np.float32)
    return np.where(rng.random(shape) < 0.002, np.float32(10) * x, x)


def random_qkv(
    xp: ModuleType,
    rng: Any,
    *,
    batch: int,
    seqlen_q: int,
    seqlen_k: int,
    num_heads_q: int,
    num_heads_kv: int,
    head_dim: int,
    head_dim_v: int | None = None,
    dtype: Any,
    v_dtype: Any = None,
    memory_order: str = "bshd",
    extra_strides: bool = False,
) -> tuple[Array, Array, Array]:
    """Fresh dense q, k, v; memory_order and extra_strides as random_array's; v is as k by default."""
    draw = partial(random_array, xp, rng, memory_order=memory_order, extra_strides=extra_strides)
    q = draw((batch, seqlen_q, num_heads_q, head_dim), dtype)
    k = draw((batch, seqlen_k, num_heads_kv, head_dim), dtype)
    v = draw((batch, seqlen_k, num_heads_kv, head_dim_v or head_dim), v_dtype or dtype)
    return q, k, v


def poisoned(xp: ModuleType, shape: tuple[int, ...], dtype: Any) -> Array:
    """An array of NaN: what an output holds before a kernel writes it. fp8 on CuPy comes as uint8 bits."""
    if np.dtype(dtype).name in FP8_DTYPES:
        bits = xp.full(shape, FP8_NAN_BITS, dtype=np.uint8)
        return bits.view(dtype) if xp is np else bits
    return xp.full(shape, math.nan, dtype=np.float32).astype(dtype)


def encoded(values: Array, dtype: Any) -> Array:
    """float32 values rounded to dtype; fp8 on CuPy as uint8 bits."""
    xp, dtype = array_module(values), np.dtype(dtype)
    rounded = PRECISIONS[dtype.name].round(values)
    if xp is np or dtype.name not in FP8_DTYPES:
        return rounded.astype(dtype)
    return xp.asarray(rounded.get().astype(dtype).view(np.uint8))


def decoded(x: Array, dtype: Any) -> Array:
    """uint8 bits of an fp8 dtype as float32 values; any other array as it is."""
    if x.dtype != np.uint8:
        return x
    values = np.arange(256, dtype=np.uint8).view(np.dtype(dtype)).astype(np.float32)
    return array_module(x).asarray(values)[x]


def _formats(q: Array, v: Array, dtype: Any, v_dtype: Any) -> tuple[np.dtype[Any], np.dtype[Any]]:
    """The formats of q and v: those named, else the arrays' own; bits of v are by default as those of q."""
    dtype = q.dtype if dtype is None else dtype
    if v_dtype is None:
        v_dtype = dtype if v.dtype == np.uint8 else v.dtype
    return np.dtype(dtype), np.dtype(v_dtype)


def _low_dtype(dtype: np.dtype[Any], out_dtype: Any) -> np.dtype[Any]:
    """The 16-bit dtype that lowp rounds to: that of the inputs, for fp8 that of the output."""
    if dtype.itemsize == 2:
        return dtype
    is_16_bit = out_dtype is not None and np.dtype(out_dtype).itemsize == 2
    return np.dtype(out_dtype if is_16_bit else ml_dtypes.bfloat16)


@dataclass(frozen=True, eq=False)
class _LowpSoftmax:
    """What lowp's forward and backward share, in float32; of low precision unless said otherwise."""

    q: Array
    scaled_k: Array
    v: Array
    tanh: Array | None  # of scores / softcap
    exp: Array  # exp(score - row_max), not rounded
    row_sum: Array  # (seqlen_q, 1) of exp and of the sink; 1 where empty
    sink: Array  # (seqlen_q,) probability of the sink, not rounded
    lse: Array  # (seqlen_q,), not rounded


def _lowp_softmax(head: Head, low: Precision) -> _LowpSoftmax:
    xp = array_module(head.q)
    stored = zip((head.q, head.k, head.v), head.descale, strict=True)
    q, k, v = (low.round(as_float64(x) * descale) for x, descale in stored)
    scaled_k = low.round(k * np.float32(head.softmax_scale))
    scores, tanh = low.round(q @ scaled_k.T), None
    if head.softcap:
        tanh = low.round(xp.tanh(low.round(scores / np.float32(head.softcap))))
        scores = low.round(tanh * np.float32(head.softcap))
    if head.alibi_slope:  # slopes are float32, and so is the sum
        scores = scores - np.float32(head.alibi_slope) * head.distance.astype(np.float32)
    scores = xp.where(head.allowed, scores, np.float32(-math.inf))
    sink = xp.full((scores.shape[0], 1), head.sink, dtype=np.float32)
    row_max = xp.concatenate([scores, sink], axis=1).max(axis=1, keepdims=True)
    row_max = xp.where(row_max == -math.inf, np.float32(0), row_max)
    exp, sink = xp.exp(scores - row_max), xp.exp(sink - row_max)
    row_sum = exp.sum(axis=1, keepdims=True) + sink
    empty = row_sum == 0
    row_sum = xp.where(empty, np.float32(1), row_sum)
    lse = xp.where(empty, np.float32(-math.inf), row_max + xp.log(row_sum))
    return _LowpSoftmax(q, scaled_k, v, tanh, exp, row_sum, (sink / row_sum)[:, 0], lse[:, 0])


def _lowp_head_forward(head: Head, low: Precision, fp8_p: Precision | None) -> tuple[Array, Array]:
    soft = _lowp_softmax(head, low)
    if fp8_p is not None:  # normalised after the product, as probabilities below 2**-10 would vanish in e4m3
        probability = fp8_p.round(soft.exp * np.float32(FP8_PROBABILITY_SCALE)) * head.dropout
        normaliser = soft.row_sum * np.float32(FP8_PROBABILITY_SCALE)
        return low.round((probability.astype(np.float32) @ soft.v) / normaliser), soft.lse
    probability = low.round(low.round(soft.exp / soft.row_sum) * head.dropout)
    return low.round(probability @ soft.v), soft.lse


def _lowp_head_backward(head: Head, dout: Array, dlse: Array, low: Precision) -> Gradients:
    soft, dout = _lowp_softmax(head, low), low.round(dout)
    probability = low.round(soft.exp / soft.row_sum)
    dropped = low.round(probability * head.dropout)
    out = low.round(dropped @ soft.v)
    dprobability = low.round(low.round(dout @ soft.v.T) * head.dropout)
    row_term = dlse.astype(np.float32) - (dout * out).sum(axis=1)
    dscores = low.round(probability * (dprobability + row_term[:, None]))
    if soft.tanh is not None:
        dscores = low.round(dscores * low.round(1.0 - soft.tanh**2))
    return Gradients(
        dq=low.round(dscores @ soft.scaled_k),
        dk=low.round(low.round(dscores.T @ soft.q) * np.float32(head.softmax_scale)),
        dv=low.round(dropped.T @ dout),
        dlearnable_sink=(soft.sink * row_term).sum(),
    )


def _check_same_nonfinite(prefix: str, actual: Array, expected: Array) -> None:
    """Infinities of the same sign and NaN in the same places."""
    xp = array_module(expected)
    both_nan = xp.isnan(actual) & xp.isnan(expected)
    differs = ~(xp.isfinite(actual) & xp.isfinite(expected)) & ~both_nan & (actual != expected)
    if bool(differs.any()):
        first = _coordinate(differs.argmax(), differs.shape)
        raise AssertionError(
            f"{prefix}: {int(differs.sum())} of {differs.size} elements differ in being finite, first at"
            f" {first}: {float(actual[first])}, expected {float(expected[first])}"
        )


def _coordinate(flat_index: Array, shape: tuple[int, ...]) -> tuple[int, ...]:
    return tuple(int(i) for i in np.unravel_index(int(flat_index), shape))


def _bands(shape: tuple[int, ...], rows_axis: int | None) -> list[tuple[slice, ...]]:
    """Slices of BAND_ROWS rows along an axis, the tail in the last; all at once where rows_axis is None."""
    if math.prod(shape) == 0:
        return []
    axis, everything = rows_axis or 0, [slice(0, extent) for extent in shape]
    starts = [0] if rows_axis is None else range(0, max(1, shape[axis] - BAND_ROWS + 1), BAND_ROWS)
    bands = []
    for start, stop in zip(starts, [*starts[1:], shape[axis]], strict=True):
        everything[axis] = slice(start, stop)
        bands.append(tuple(everything))
    return bands


def _atol(expected: Array, low: Precision) -> float:
    """Twice max|(x + 0.3 - 0.3) - x|, each step rounded to the low precision."""
    shift = np.float32(0.3)
    x = low.round(expected)
    return 2.0 * float(array_module(x).abs(low.round(low.round(x + shift) - shift) - x).max())
