"""Arrays to 8-bit numbers and the factors that make them what they were; NumPy and CuPy.

quantized = quantize_qkv(q, k, v, granularity="block", rotate=True)
out = flash_attn_func(quantized.q, quantized.k, quantized.v, causal=True, **quantized.arguments)
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from functools import lru_cache
from types import ModuleType
from typing import Any

import numpy as np

from .arrays import DTYPE_NAMES, dtype_name
from .dispatch import FP8_DTYPES
from .errors import InvalidArgument
from .extras import DESCALE_BLOCK
from .reference import array_module

GRANULARITIES = ("tensor", "head", "block")
_NAMES = {short: name for name, short in DTYPE_NAMES.items() if short in FP8_DTYPES}


@dataclass(frozen=True, eq=False)
class QuantizedQkv:
    """q, k, v: 8-bit numbers, ml_dtypes' on NumPy and their bits in uint8 on CuPy. q_descale, k_descale, v_descale: float32, as
    flash_attn_func takes them. dtype, v_dtype: names of the types."""

    q: Any
    k: Any
    v: Any
    q_descale: Any
    k_descale: Any
    v_descale: Any
    dtype: str
    v_dtype: str

    @property
    def arguments(self) -> dict[str, Any]:
        """Of flash_attn_func beside q, k and v."""
        factors = {"q_descale": self.q_descale, "k_descale": self.k_descale, "v_descale": self.v_descale}
        return factors | {"dtype": self.dtype, "v_dtype": self.v_dtype}


def quantize_qkv(
    q: Any,
    k: Any,
    v: Any,
    *,
    dtype: Any = "float8_e4m3fn",
    v_dtype: Any = None,
    granularity: str = "head",
    rotate: bool = False,
    seed: int = 0,
) -> QuantizedQkv:
    """q (batch, seqlen_q, num_heads_q, head_dim), k and v (batch, seqlen_k, num_heads_kv, head_dim), of any floating type, in 8 bits.

    dtype: of q and k, v_dtype: of v (default: dtype); "float8_e4m3fn" or "float8_e5m2", or a library's type of that name.
    granularity: what shares a factor: "tensor", one for each array; "head" (the default), one for each key head of each sequence, which
        the query heads of its group share; "block", for k and v one for each 128 keys too.
    rotate: rotate q and k first (hadamard_rotate), which leaves q k^T as it is and spreads outliers; seed: of its signs.
    Raises InvalidArgument for another granularity, dtype or number of dimensions.
    """
    v_dtype = dtype if v_dtype is None else v_dtype
    if rotate:
        q, k = hadamard_rotate(q, seed), hadamard_rotate(k, seed)
    of_q = "head" if granularity == "block" else granularity
    quantized_q, q_descale = quantize(q, dtype, of_q, num_heads_kv=k.shape[-2])
    quantized_k, k_descale = quantize(k, dtype, granularity)
    quantized_v, v_descale = quantize(v, v_dtype, granularity)
    names = _NAMES[_short(dtype)], _NAMES[_short(v_dtype)]
    return QuantizedQkv(quantized_q, quantized_k, quantized_v, q_descale, k_descale, v_descale, *names)


def quantize(x: Any, dtype: Any = "float8_e4m3fn", granularity: str = "head", num_heads_kv: int | None = None) -> tuple[Any, Any]:
    """``(stored, descale)``: stored * descale is x, rounded; the largest number of those that share a factor becomes the type's largest.

    x: (batch, seqlen, heads, head_dim). num_heads_kv: key heads, where x has the query heads of each side by side; default: heads.
    Returns x's shape in 8 bits (ml_dtypes on NumPy, uint8 bits on CuPy) and float32 (1,), (batch, num_heads_kv) or (batch, num_heads_kv,
    ceil(seqlen / 128)) of the granularities "tensor", "head" and "block". Zeros have the factor 1.
    Raises InvalidArgument as quantize_qkv does.
    """
    if granularity not in GRANULARITIES:
        raise InvalidArgument(f"granularity={granularity!r}: accepted are {', '.join(GRANULARITIES)}")
    if len(x.shape) != 4:
        raise InvalidArgument(f"an array of shape {x.shape}: expected 4 dimensions (batch, seqlen, heads, head_dim)")
    xp, name = array_module(x), _short(dtype)
    x = x.astype(np.float32)
    largest = float(_positive_numbers(name)[-1])
    sizes = xp.abs(x).max(axis=3)  # (batch, seqlen, heads)
    descale = xp.maximum(_largest_of(sizes, granularity, num_heads_kv or x.shape[2], xp), np.float32(0)) / np.float32(largest)
    descale = xp.where(descale > 0, descale, np.float32(1)).astype(np.float32)
    return _rounded(x / _spread(descale, x.shape, granularity, xp), name, xp), descale


def hadamard_rotate(x: Any, seed: int = 0) -> Any:
    """x (..., head_dim) times an orthogonal matrix, float32: random signs, then a Hadamard transform of each 2^n columns, the largest power
    of 2 that divides head_dim. Equal seeds give equal matrices, so that q k^T of rotated q and k is what it was (QuaRot: Ashkboos et al.
    2024; FlashAttention-3's incoherent processing)."""
    xp, head_dim = array_module(x), x.shape[-1]
    signs = np.random.default_rng(seed).choice(np.array([-1.0, 1.0], np.float32), head_dim)
    width = head_dim & -head_dim
    rotated = x.astype(np.float32) * xp.asarray(signs)
    shape = rotated.shape
    for half in (1 << i for i in range(width.bit_length() - 1)):  # butterflies of numbers `half` columns apart
        pairs = rotated.reshape((*shape[:-1], head_dim // (2 * half), 2, half))
        rotated = xp.stack([pairs[..., 0, :] + pairs[..., 1, :], pairs[..., 0, :] - pairs[..., 1, :]], axis=-2).reshape(shape)
    return rotated * np.float32(1 / math.sqrt(width))


def _short(dtype: Any) -> str:
    name = DTYPE_NAMES.get(dtype_name(dtype), "")
    if name not in FP8_DTYPES:
        raise InvalidArgument(f"dtype={dtype}: accepted are {', '.join(_NAMES.values())}")
    return name


def _largest_of(sizes: Any, granularity: str, num_heads_kv: int, xp: ModuleType) -> Any:
    """The largest of what shares a factor. sizes: (batch, seqlen, heads)."""
    batch, seqlen, heads = sizes.shape
    if granularity == "tensor":
        return sizes.max().reshape((1,))
    sizes = sizes.reshape((batch, seqlen, num_heads_kv, heads // num_heads_kv)).max(axis=3)
    if granularity == "head":
        return sizes.max(axis=1)
    blocks = -(-seqlen // DESCALE_BLOCK)
    padded = xp.zeros((batch, blocks * DESCALE_BLOCK, num_heads_kv), np.float32)
    padded[:, :seqlen] = sizes
    return padded.reshape((batch, blocks, DESCALE_BLOCK, num_heads_kv)).max(axis=2).transpose((0, 2, 1))


def _spread(descale: Any, shape: tuple[int, ...], granularity: str, xp: ModuleType) -> Any:
    """The factors as an array that x of this shape can be divided by."""
    if granularity == "tensor":
        return descale
    by_key = descale[:, :, None] if granularity == "head" else xp.repeat(descale, DESCALE_BLOCK, axis=2)[:, :, : shape[1]]
    return xp.repeat(by_key.transpose((0, 2, 1)), shape[2] // descale.shape[1], axis=2)[..., None]


@lru_cache(maxsize=2)
def _positive_numbers(name: str) -> np.ndarray:
    """The finite numbers of a type from 0 up, in float32: number i has the bits i."""
    import ml_dtypes

    dtype = {"e4m3": ml_dtypes.float8_e4m3fn, "e5m2": ml_dtypes.float8_e5m2}[name]
    numbers = np.arange(128, dtype=np.uint8).view(dtype).astype(np.float32)
    return numbers[np.isfinite(numbers)]


def _rounded(x: Any, name: str, xp: ModuleType) -> Any:
    """To the nearest number of the type, ties to even, the largest at most; float32 in, 8 bits out. By search, because CuPy has no such
    type."""
    numbers = _positive_numbers(name)
    middles = (numbers[:-1] + numbers[1:]) / 2  # exact
    even = np.arange(middles.size) % 2 == 0
    starts = np.where(even, np.nextafter(middles, np.float32(np.inf)), middles)  # where number i + 1 begins: ties go to even bits
    bits = xp.searchsorted(xp.asarray(starts), xp.abs(x).ravel(), side="right").reshape(x.shape).astype(np.uint8)
    bits |= xp.signbit(x).astype(np.uint8) << np.uint8(7)
    if xp is not np:
        return bits
    import ml_dtypes

    return bits.view({"e4m3": ml_dtypes.float8_e4m3fn, "e5m2": ml_dtypes.float8_e5m2}[name])
