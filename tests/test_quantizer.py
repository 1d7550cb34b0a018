"""The quantiser: numbers come back within half a step of the type, factors are the least that hold them, rotation keeps q k^T."""

from __future__ import annotations

from typing import Any

import ml_dtypes
import numpy as np
import pytest

from cutlass_fa import flash_attn_func, hadamard_rotate, quantize, quantize_qkv
from cutlass_fa.errors import InvalidArgument
from cutlass_fa.reference import attention_forward
from tests.numerics import PRECISIONS, random_outliers

LARGEST = {"float8_e4m3fn": 448.0, "float8_e5m2": 57344.0}
SHAPES = {"tensor": (1,), "head": (2, 3), "block": (2, 3, 3)}


def draw(xp: Any = np, heads: int = 3, seqlen: int = 300, head_dim: int = 96) -> Any:
    return xp.asarray(random_outliers(np.random.default_rng(3), (2, seqlen, heads, head_dim)))


def spread(descale: np.ndarray, shape: tuple[int, ...]) -> np.ndarray:
    """Factors beside the numbers that they are of."""
    if descale.shape == (1,):
        return np.broadcast_to(descale, shape)
    blocks = (
        np.repeat(descale, 128, axis=2)[..., : shape[1]]
        if descale.ndim == 3
        else np.broadcast_to(descale[..., None], (*descale.shape, shape[1]))
    )
    return np.repeat(blocks.transpose(0, 2, 1), shape[2] // descale.shape[1], axis=2)[..., None] * np.ones(shape, np.float32)


@pytest.mark.parametrize("dtype", LARGEST)
@pytest.mark.parametrize("granularity", SHAPES)
def test_numbers_are_the_nearest_and_factors_the_least(granularity: str, dtype: str) -> None:
    x = draw()
    stored, descale = quantize(x, dtype, granularity)
    assert stored.dtype.name == dtype and descale.shape == SHAPES[granularity] and descale.dtype == np.float32
    scaled = x / spread(descale, x.shape)
    np.testing.assert_array_equal(stored.astype(np.float32), PRECISIONS[dtype].round(scaled))
    held = np.abs(scaled)
    shared = {"tensor": held[None], "head": held.transpose(0, 2, 1, 3).reshape(6, -1)}
    for each in shared.get(granularity, [held[b, i : i + 128, h] for b in range(2) for h in range(3) for i in (0, 128, 256)]):
        assert each.max() == pytest.approx(LARGEST[dtype], rel=1e-6)


def test_ties_go_to_even_and_zeros_have_the_factor_one() -> None:
    numbers = np.arange(0x7F, dtype=np.uint8).view(ml_dtypes.float8_e4m3fn).astype(np.float32)
    x = np.concatenate([(numbers[:-1] + numbers[1:]) / 2, -numbers, [448.0] * 3]).astype(np.float32).reshape(1, 1, 1, -1)
    stored, descale = quantize(x)
    assert descale == 1 and (stored.view(np.uint8) == x.astype(ml_dtypes.float8_e4m3fn).view(np.uint8)).all()
    stored, descale = quantize(np.zeros((1, 5, 2, 16), np.float32), granularity="block")
    assert (descale == 1).all() and not stored.astype(np.float32).any()


def test_query_heads_of_a_group_share_a_factor() -> None:
    q = draw(heads=6)
    stored, descale = quantize(q, num_heads_kv=3)
    assert descale.shape == (2, 3)
    largest = np.abs(q).reshape(2, 300, 3, 2, 96).max(axis=(1, 3, 4))
    np.testing.assert_allclose(descale * 448, largest, rtol=1e-6)
    assert np.abs(stored.astype(np.float32) * spread(descale, q.shape) - q).max() <= descale.max() * 16


@pytest.mark.parametrize("head_dim", [64, 80, 96, 256])
def test_rotation_is_orthogonal_and_spreads(head_dim: int) -> None:
    q, k = draw(head_dim=head_dim), draw(head_dim=head_dim, seqlen=200)
    rotated_q, rotated_k = hadamard_rotate(q, 5), hadamard_rotate(k, 5)
    products = np.einsum("bqhd,bkhd->bhqk", q, k)
    np.testing.assert_allclose(np.einsum("bqhd,bkhd->bhqk", rotated_q, rotated_k), products, atol=2e-4 * np.abs(products).max())
    assert np.abs(rotated_q - hadamard_rotate(q, 6)).max() > 1
    one = np.zeros((1, 1, 1, head_dim), np.float32)
    one[..., 3] = 1
    width = head_dim & -head_dim
    assert sorted(np.abs(hadamard_rotate(one)).ravel())[-width:] == pytest.approx([width**-0.5] * width)


@pytest.mark.parametrize("granularity", SHAPES)
def test_attention_of_quantised_arrays_is_near(granularity: str) -> None:
    """Through the reference, factors and all; rotated q and k give no worse a result than it."""
    q, k, v = draw(heads=6), draw(), draw(seqlen=300)
    exact, _ = attention_forward(q, k, v, causal=True)
    errors = {}
    for rotate in (False, True):
        quantized = quantize_qkv(q, k, v, granularity=granularity, v_dtype="float8_e5m2", rotate=rotate)
        out = flash_attn_func(quantized.q, quantized.k, quantized.v, causal=True, backend="reference", **quantized.arguments)
        assert out.dtype == ml_dtypes.bfloat16
        errors[rotate] = np.sqrt(((out.astype(np.float64) - exact) ** 2).mean() / (exact**2).mean())
    assert 0.01 < errors[False] < 0.15 and errors[True] < 1.1 * errors[False], errors


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"granularity": "row"}, "granularity='row': accepted are tensor, head, block"),
        ({"dtype": "float16"}, "accepted are float8_e4m3fn, float8_e5m2"),
        ({"x": np.zeros((3, 4), np.float32)}, r"shape \(3, 4\)"),
    ],
)
def test_refusals(change: dict[str, Any], words: str) -> None:
    with pytest.raises(InvalidArgument, match=words):
        quantize(**({"x": draw()} | change))


@pytest.mark.gpu
@pytest.mark.parametrize("granularity", SHAPES)
def test_cupy_gives_numpys_bits(granularity: str) -> None:
    import cupy

    x = draw()
    (stored, descale), (bits, on_gpu) = quantize(x, granularity=granularity), quantize(cupy.asarray(x), granularity=granularity)
    assert bits.dtype == np.uint8 and (descale == on_gpu.get()).all()
    assert (stored.view(np.uint8) != bits.get()).mean() < 1e-5  # a quotient may be rounded another way
    np.testing.assert_allclose(hadamard_rotate(cupy.asarray(x)).get(), hadamard_rotate(x), atol=1e-5)
