"""Merging attention over parts of the keys into attention over all of them: what ring and chunked engines and split-KV do."""

from __future__ import annotations

from importlib import import_module
from typing import Any

from .arrays import check_one_library, dtype_name, library_of
from .errors import InvalidArgument, UnsupportedDtype

_OUT_DTYPES = ("float16", "bfloat16", "float32")
_LSE_DTYPES = ("float32",)
_MODULES = {"CuPy": "cupy", "PyTorch": "torch", "NumPy": "numpy"}  # functions of the same names


def merge_attention_states(out_a: Any, lse_a: Any, out_b: Any, lse_b: Any, *, out: Any = None) -> tuple[Any, Any]:
    """(out, lse) over the union of two disjoint sets of keys, from the results over each (online softmax: Milakov and Gimelshein 2018).

    out_a, out_b: (batch, seqlen_q, num_heads_q, head_dim), or packed (total_q, num_heads_q, head_dim): of one shape, float16, bfloat16 or
        float32, each its own; CuPy, PyTorch or NumPy arrays. flash_attn_func(..., out_dtype="float32") gives float32.
    lse_a, lse_b: float32 (batch, num_heads_q, seqlen_q), or packed (num_heads_q, total_q); natural logarithm.
    out: where to write the result, of the same shape and any of these dtypes, and it may be out_a or out_b; default: a new float32 array.

    Returns (out, lse), lse float32 and new. The arithmetic is float32. A side whose lse is -inf has seen no key: the other side is the
    result, exactly, whatever out of the first holds (NaN too); where both are -inf, out is 0 and lse -inf. The order of merging changes the
    result by rounding alone, so any number of parts can be merged one after another. Made of the array library's own operations, on its
    current stream and device.
    Raises InvalidArgument for shapes that do not fit or arrays of several libraries, UnsupportedDtype for other dtypes.
    """
    check_one_library(("out_a", "lse_a", "out_b", "lse_b", "out"), (out_a, lse_a, out_b, lse_b, out))
    _check(out_a, lse_a, out_b, lse_b, out)
    xp = import_module(_MODULES[library_of(type(lse_a)).name])
    is_a, is_b = lse_a != -xp.inf, lse_b != -xp.inf  # has the side seen a key?
    largest = xp.maximum(lse_a, lse_b)
    base = xp.where(is_a | is_b, largest, xp.zeros_like(largest))  # -inf - -inf would be NaN
    weight_a, weight_b = xp.exp(lse_a - base), xp.exp(lse_b - base)  # (..., heads, rows): one of them is 1, the other at most 1
    total = weight_a + weight_b
    # log(1 + x) of the smaller weight keeps an lse exactly where the other side adds nothing; largest is -inf where both sides are.
    lse = largest + xp.log1p(xp.minimum(weight_a, weight_b))
    divisor = xp.where(is_a | is_b, total, xp.ones_like(total))
    parts = []
    for partial, weight, is_seen in ((out_a, weight_a, is_a), (out_b, weight_b, is_b)):
        values = _converted(partial, xp.float32)  # (..., rows, heads, head_dim)
        seen = xp.where(xp.swapaxes(is_seen, -1, -2)[..., None], values, xp.zeros_like(values))
        parts.append(seen * xp.swapaxes(weight / divisor, -1, -2)[..., None])
    merged = parts[0] + parts[1]
    if out is None:
        return merged, lse
    out[...] = _converted(merged, out.dtype)
    return out, lse


def _converted(x: Any, dtype: Any) -> Any:
    """`x` in another element type; PyTorch alone calls it otherwise."""
    return x.to(dtype) if hasattr(x, "to") else x.astype(dtype)


def _check(out_a: Any, lse_a: Any, out_b: Any, lse_b: Any, out: Any) -> None:
    shape = tuple(out_a.shape)
    if len(shape) not in (3, 4):
        raise InvalidArgument(
            f"out_a has shape {shape}: expected (batch, seqlen_q, num_heads_q, head_dim), or packed (total_q, num_heads_q, head_dim)"
        )
    lse_shape = (*shape[:-3], shape[-2], shape[-3])
    for name, array, expected in (("out_b", out_b, shape), ("out", out, shape), ("lse_a", lse_a, lse_shape), ("lse_b", lse_b, lse_shape)):
        if array is not None and tuple(array.shape) != expected:
            raise InvalidArgument(f"{name} has shape {tuple(array.shape)}: expected {expected}, by the shape of out_a")
    for name, array, accepted in (
        ("out_a", out_a, _OUT_DTYPES),
        ("out_b", out_b, _OUT_DTYPES),
        ("out", out, _OUT_DTYPES),
        ("lse_a", lse_a, _LSE_DTYPES),
        ("lse_b", lse_b, _LSE_DTYPES),
    ):
        if array is not None and dtype_name(array.dtype) not in accepted:
            raise UnsupportedDtype(f"{name} has dtype {dtype_name(array.dtype)}: accepted are {', '.join(accepted)}")
