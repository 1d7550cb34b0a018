"""Merging partial results: against float64, any number of parts in any order; what a side without keys may hold; what is refused."""

from __future__ import annotations

import math
from typing import Any

import ml_dtypes
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from cutlass_fa import errors, merge_attention_states
from cutlass_fa.reference import attention_forward, merge_states

SIZES = (2, 5, 3, 8)  # batch, seqlen_q, heads, head_dim


def state(seed: int, empty_share: float = 0.0, packed: bool = False) -> tuple[np.ndarray, np.ndarray]:
    """Random out and lse; where a row is empty, out holds NaN."""
    rng = np.random.default_rng(seed)
    shape = SIZES[1:] if packed else SIZES
    out = rng.standard_normal(shape, dtype=np.float32)
    lse = rng.normal(0, 20, (*shape[:-3], shape[-2], shape[-3])).astype(np.float32)
    empty = rng.random(lse.shape) < empty_share
    out[empty.swapaxes(-1, -2)] = math.nan
    lse[empty] = -math.inf
    return out, lse


@pytest.mark.parametrize("packed", [False, True])
def test_merging_is_the_references(packed: bool) -> None:
    a, b = state(0, 0.3, packed), state(1, 0.3, packed)
    out, lse = merge_attention_states(*a, *b)
    expected_out, expected_lse = merge_states(*a, *b)
    assert out.dtype == lse.dtype == np.float32
    np.testing.assert_allclose(out, expected_out, rtol=1e-6, atol=1e-6)
    np.testing.assert_allclose(lse, expected_lse, rtol=1e-6)


def test_a_side_without_keys_changes_nothing() -> None:
    out, lse = state(2)
    nothing = np.full_like(out, np.nan), np.full_like(lse, -np.inf)
    for merged in (merge_attention_states(out, lse, *nothing), merge_attention_states(*nothing, out, lse)):
        np.testing.assert_array_equal(merged[0], out)
        np.testing.assert_array_equal(merged[1], lse)
    none_out, none_lse = merge_attention_states(*nothing, *nothing)
    assert not none_out.any() and np.isneginf(none_lse).all()


def test_no_warning_and_nothing_lost_far_apart() -> None:
    with np.errstate(all="raise", under="ignore"):
        one, zero = np.ones((1, 1, 1, 8), np.float32), np.zeros((1, 1, 1), np.float32)
        out, lse = merge_attention_states(one, zero + 1e30, one * np.inf, zero - np.inf)
        assert (out == 1).all() and lse == np.float32(1e30)
        out, lse = merge_attention_states(one, zero - 3e4, one, zero - 3e4)
        assert (out == 1).all() and lse == np.float32(-3e4 + math.log(2))


@pytest.mark.parametrize("dtype", [np.float16, ml_dtypes.bfloat16, np.float32])
def test_dtypes_and_out(dtype: Any) -> None:
    (out_a, lse_a), b = state(3), state(4)
    low = out_a.astype(dtype)
    expected, lse = merge_attention_states(low.astype(np.float32), lse_a, *b)
    merged, _ = merge_attention_states(low, lse_a, *b)
    np.testing.assert_array_equal(merged, expected)
    given_out, given_lse = merge_attention_states(low, lse_a, *b, out=low)  # in place
    assert given_out is low
    np.testing.assert_array_equal(low, expected.astype(dtype))
    np.testing.assert_array_equal(given_lse, lse)


def test_bad_arrays_are_named() -> None:
    (out, lse), b = state(5), state(6)
    with pytest.raises(errors.InvalidArgument, match=r"lse_a has shape \(2, 5, 3\): expected \(2, 3, 5\)"):
        merge_attention_states(out, lse.swapaxes(1, 2), *b)
    with pytest.raises(errors.InvalidArgument, match="out_b has shape"):
        merge_attention_states(out, lse, b[0][:1], b[1])
    with pytest.raises(errors.InvalidArgument, match="out has shape"):
        merge_attention_states(out, lse, *b, out=out[0])
    with pytest.raises(errors.InvalidArgument, match=r"out_a has shape .* packed"):
        merge_attention_states(out[0, 0], lse, *b)
    with pytest.raises(errors.UnsupportedDtype, match="lse_b has dtype float64"):
        merge_attention_states(out, lse, b[0], b[1].astype(np.float64))
    with pytest.raises(errors.UnsupportedDtype, match="out_a has dtype int32"):
        merge_attention_states(out.astype(np.int32), lse, *b)
    with pytest.raises(errors.InvalidArgument, match="list"):
        merge_attention_states(out, lse, [1.0], b[1])


def test_torch_tensors() -> None:
    torch = pytest.importorskip("torch")
    a, b = state(7, 0.3), state(8, 0.3)
    expected, expected_lse = merge_attention_states(*a, *b)
    tensors = [torch.from_numpy(x) for x in (*a, *b)]
    out, lse = merge_attention_states(*tensors)
    assert out.dtype == lse.dtype == torch.float32
    np.testing.assert_allclose(out.numpy(), expected, rtol=1e-6, atol=1e-7)
    np.testing.assert_allclose(lse.numpy(), expected_lse, rtol=1e-6)
    low = tensors[0].to(torch.bfloat16)
    assert merge_attention_states(low, *tensors[1:], out=low)[0] is low and low.dtype == torch.bfloat16


@st.composite
def split_attention(draw: st.DrawFn) -> dict[str, Any]:
    seqlen_q, seqlen_k = draw(st.integers(1, 7)), draw(st.integers(2, 12))
    cuts = draw(st.lists(st.integers(1, seqlen_k - 1), max_size=4, unique=True))
    options: dict[str, Any] = {"causal": draw(st.booleans()), "q_offset": draw(st.integers(0, 12))}
    sides = st.integers(-1, 6)
    options["window_size"] = (draw(sides), draw(sides))
    options["sink_tokens"] = draw(st.integers(0, 4))
    if draw(st.booleans()):
        options["alibi_slopes"] = np.array([0.5, 0.1])
    return {
        "sizes": (seqlen_q, seqlen_k),
        "bounds": sorted({0, *cuts, seqlen_k}),
        "order": draw(st.permutations(range(len(set(cuts)) + 1))),
        "k_offset": draw(st.integers(0, 8)),
        "options": options,
        "seed": draw(st.integers(0, 2**32 - 1)),
    }


@settings(deadline=None, max_examples=200)
@given(split_attention())
def test_any_split_of_the_keys_merged_in_any_order_is_the_whole(case: dict[str, Any]) -> None:
    rng = np.random.default_rng(case["seed"])
    (seqlen_q, seqlen_k), bounds, k_offset = case["sizes"], case["bounds"], case["k_offset"]
    q, k, v = (rng.standard_normal((1, rows, heads, 4)) for rows, heads in ((seqlen_q, 2), (seqlen_k, 1), (seqlen_k, 1)))
    expected_out, expected_lse = attention_forward(q, k, v, k_offset=k_offset, **case["options"])
    merged = np.full(expected_out.shape, np.nan, np.float32), np.full(expected_lse.shape, -np.inf, np.float32)
    for index in case["order"]:
        part = slice(bounds[index], bounds[index + 1])
        out, lse = attention_forward(q, k[:, part], v[:, part], k_offset=k_offset + part.start, **case["options"])
        merged = merge_attention_states(*merged, out.astype(np.float32), lse.astype(np.float32))
    # Five merges at most, each of which rounds a number of about its size five times.
    np.testing.assert_allclose(merged[0], expected_out, rtol=0, atol=25 * 2.0**-24 * (1 + np.abs(v).max()))
    np.testing.assert_allclose(merged[1], expected_lse, rtol=25 * 2.0**-24, atol=25 * 2.0**-24)
