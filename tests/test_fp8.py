"""Calls on 8-bit numbers without a GPU: what is taken, what is refused and why, what becomes of it."""

from __future__ import annotations

import io
from dataclasses import replace
from typing import Any

import ml_dtypes
import numpy as np
import pytest

import cutlass_fa
from cutlass_fa import Fa2BwdRequest, Fa2FwdRequest, Fa3FwdFp8Request, Fa3FwdRequest, Fp8Options, SlidingCausal, VarlenFwdRequest, errors
from cutlass_fa.arrays import ArraySpec
from cutlass_fa.cell import Cell
from cutlass_fa.dispatch import DISPATCH_TABLE, DispatchKey
from cutlass_fa.executor import compiler_problem
from cutlass_fa.executor.forward import SMALL_DEVICE
from cutlass_fa.executor.run import run_key
from cutlass_fa.extras import ExtraSpecs
from cutlass_fa.launches.fa3_fwd import descale_strides, pack_params
from cutlass_fa.problem import Problem, contiguous_strides
from cutlass_fa.reference import attention_forward
from cutlass_fa.requests import CumulativeSeqlens, Full
from tests.numerics import random_qkv

E4M3, E5M2 = ml_dtypes.float8_e4m3fn, ml_dtypes.float8_e5m2
SIZES: dict[str, Any] = {"batch": 2, "seqlen_q": 64, "seqlen_k": 300, "num_heads_q": 8, "num_heads_kv": 2, "head_dim": 128}
REQUEST = Fa3FwdFp8Request(**SIZES)


def spec(shape: tuple[int, ...], dtype: str = "e4m3") -> ArraySpec:
    return ArraySpec(shape, contiguous_strides(shape), dtype, 0)


Q, KV = spec((2, 64, 8, 128)), spec((2, 300, 2, 128))


def problem(q: ArraySpec = Q, k: ArraySpec = KV, v: ArraySpec = KV, out: ArraySpec | None = None, **options: Any) -> Problem:
    return Problem.from_specs(q, k, v, out, **({"arch": "sm_90a", "mask": Full()} | options))


def arrays(head_dim: int = 64, dtype: Any = E4M3, v_dtype: Any = None) -> tuple[np.ndarray, ...]:
    sizes = {"batch": 2, "seqlen_q": 20, "seqlen_k": 150, "num_heads_q": 4, "num_heads_kv": 2, "head_dim": head_dim}
    return random_qkv(np, np.random.default_rng(0), dtype=dtype, v_dtype=v_dtype, **sizes)


# ---- requests and keys ---------------------------------------------------------------------------------------------------------------


def test_a_request_has_the_key_of_its_options() -> None:
    assert str(REQUEST.dispatch_key()) == "fa3_fwd_sm90a_e4m3_hdim128_gqa4"  # short queries: heads are packed
    long = replace(REQUEST, seqlen_q=4096)
    assert str(long.dispatch_key()) == "fa3_fwd_sm90a_e4m3_hdim128"
    assert str(replace(long, dtype="e5m2", v_dtype="e4m3", head_dim=80).dispatch_key()) == "fa3_fwd_sm90a_e5m2_ve4m3_hdim96"
    options = Fp8Options("precise", out_dtype="f16")
    key = replace(long, fp8=options, descale=True, block_descale=True, mask=SlidingCausal(9)).dispatch_key()
    assert str(key) == "fa3_fwd_sm90a_e4m3_hdim128_causal_window_f16out_precise_descale_bdescale"
    assert str(replace(long, fp8=options, float_out=True).dispatch_key()) == "fa3_fwd_sm90a_e4m3_hdim128_f32out_precise"
    packed = VarlenFwdRequest(cu_seqlens=CumulativeSeqlens(900, 900), batch=3, num_heads_q=2, num_heads_kv=2, head_dim=64, dtype="e5m2")
    assert isinstance(packed, Fa3FwdFp8Request) and str(packed.dispatch_keys()[1]) == "fa3_fwd_sm90a_e5m2_hdim64_varlen"


def test_numbers_fold_into_the_scales() -> None:
    options = Fp8Options(q_descale=0.5, k_descale=3.0, v_descale=7.0)
    for softcap, scale, prescale in ((0.0, 1.5 * 128**-0.5, None), (20.0, 20.0, 1.5 * 128**-0.5 / 20)):
        found = problem(fp8=options, softcap=softcap)
        params = pack_params(found, Cell.of(replace(found.request.dispatch_key(), gqa_ratio=1)), SMALL_DEVICE)
        assert params["softmax_scale_log2"] == pytest.approx(scale * np.log2(np.e)) and params["out_scale"] == 7.0
        assert prescale is None or params["softcap_prescale"] == pytest.approx(prescale)


def test_strides_of_factors() -> None:
    assert descale_strides(None) == (0, 0, 0, 1) and descale_strides(spec((), "float32")) == (0, 0, 0, 1)
    assert descale_strides(spec((1,), "float32")) == (0, 0, 0, 1)
    assert descale_strides(spec((2, 3), "float32")) == (3, 1, 0, 1) and descale_strides(spec((1, 3), "float32")) == (0, 1, 0, 1)
    assert descale_strides(spec((2, 3, 5), "float32")) == (15, 5, 1, 5)


@pytest.mark.parametrize(
    ("make", "error", "words"),
    [
        (lambda: replace(REQUEST, arch="sm_80"), errors.Fp8RequiresHopper, "e4m3 on sm_80"),
        (lambda: replace(REQUEST, dtype="bf16"), errors.UnsupportedDtype, "use Fa3FwdRequest"),
        (lambda: replace(REQUEST, v_dtype="f16"), errors.UnsupportedDtype, "v_dtype=f16"),
        (lambda: replace(REQUEST, head_dim=264), errors.UnsupportedHeadDim, "264"),
        (lambda: Fa3FwdRequest(**SIZES, dtype="e4m3"), errors.Fp8MustUseFp8Request, "use Fa3FwdFp8Request"),
        (lambda: Fa2FwdRequest(**SIZES, dtype="e5m2"), errors.Fp8MustUseFp8Request, "use Fa3FwdFp8Request"),
        (lambda: Fa2BwdRequest(**SIZES, dtype="e4m3"), errors.Fp8BackwardUnsupported, "convert q, k, v, out and dout"),
        (lambda: Fp8Options("exact"), errors.InvalidArgument, "accepted are fast, precise"),
        (lambda: Fp8Options(v_descale=0.0), errors.InvalidArgument, "v_descale=0.0"),
        (lambda: Fp8Options(q_descale=float("inf")), errors.InvalidArgument, "q_descale=inf"),
        (lambda: Fp8Options(out_dtype="e4m3"), errors.InvalidArgument, "out_dtype='e4m3'"),
    ],
)
def test_requests_refuse(make: Any, error: type[Exception], words: str) -> None:
    with pytest.raises(error, match=words):
        make()


# ---- problems ------------------------------------------------------------------------------------------------------------------------


def test_out_is_of_sixteen_bits_unless_said_otherwise() -> None:
    assert problem().out.dtype == "bf16" and problem(fp8=Fp8Options(out_dtype="f16")).out.dtype == "f16"
    assert problem(float_out=True).out.dtype == "float32" and problem(v=replace(KV, dtype="e5m2")).out.dtype == "bf16"
    out = replace(Q, dtype="bf16")
    assert problem(out=out).out == out


@pytest.mark.parametrize(
    ("change", "error", "words"),
    [
        ({"k": replace(KV, dtype="e5m2")}, errors.Fp8MustUseFp8Request, "k has dtype e5m2 and q has e4m3"),
        ({"v": replace(KV, dtype="bf16")}, errors.Fp8MustUseFp8Request, "v has dtype bf16 and q has e4m3"),
        ({"arch": "sm_100"}, errors.Fp8RequiresHopper, "sm_100"),
        ({"family": "fa2"}, errors.Fp8MustUseFp8Request, "family='fa2'"),
        ({"out": Q}, errors.InvalidArgument, "out has dtype e4m3: expected bf16"),
        ({"k": replace(KV, strides=(300 * 2 * 136, 2 * 136, 136, 1))}, errors.InvalidArgument, r"multiple of 16 \(16 bytes\)"),
        ({"extras": ExtraSpecs(q_descale=spec((2, 8), "float32"))}, errors.InvalidArgument, r"q_descale has shape \(2, 8\): .* \(2, 2\)"),
        ({"extras": ExtraSpecs(q_descale=spec((2, 2, 3), "float32"))}, errors.InvalidArgument, "q_descale has shape"),
        ({"extras": ExtraSpecs(v_descale=spec((2, 2, 2), "float32"))}, errors.InvalidArgument, r"\(2, 2, 3\), a factor for each 128 keys"),
        ({"extras": ExtraSpecs(k_descale=spec((2, 2), "f16"))}, errors.InvalidArgument, "k_descale has dtype f16"),
        ({"extras": ExtraSpecs(k_descale=replace(spec((2, 2), "float32"), device=1))}, errors.InvalidArgument, "k_descale is on device 1"),
    ],
)
def test_problems_refuse(change: dict[str, Any], error: type[Exception], words: str) -> None:
    with pytest.raises(error, match=words):
        problem(**change)


def test_factors_and_options_of_sixteen_bits_are_refused() -> None:
    half = {"q": replace(Q, dtype="bf16"), "k": replace(KV, dtype="bf16"), "v": replace(KV, dtype="bf16")}
    for more in ({"fp8": Fp8Options()}, {"extras": ExtraSpecs(v_descale=spec((2, 2), "float32"))}):
        with pytest.raises(errors.InvalidArgument, match="are of fp8 q, k and v"):
            problem(**half, **more)


# ---- the public functions ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("v_dtype", [E4M3, E5M2])
def test_bits_are_what_the_types_are(v_dtype: Any) -> None:
    q, k, v = arrays(v_dtype=v_dtype)
    name = np.dtype(v_dtype).name
    expected = cutlass_fa.flash_attn_func(q, k, v, backend="reference", causal=True)
    assert expected.dtype == ml_dtypes.bfloat16
    bits = [x.view(np.uint8) for x in (q, k, v)]
    for named in ({"dtype": "float8_e4m3fn", "v_dtype": name}, {"dtype": E4M3, "v_dtype": np.dtype(v_dtype)}):
        np.testing.assert_array_equal(cutlass_fa.flash_attn_func(*bits, backend="reference", causal=True, **named), expected)
    np.testing.assert_array_equal(cutlass_fa.flash_attn_func(q, k, v, dtype=E4M3, v_dtype=name, backend="reference", causal=True), expected)
    with pytest.raises(errors.InvalidArgument, match="q has dtype e4m3, and e5m2 is named"):
        cutlass_fa.flash_attn_func(q, k, v, dtype="float8_e5m2", backend="reference")
    with pytest.raises(errors.InvalidArgument, match="dtype=uint8: what uint8 arrays hold"):
        cutlass_fa.flash_attn_func(*bits, dtype="uint8", backend="reference")
    with pytest.raises(errors.UnsupportedDtype, match="bits in uint8 with dtype="):
        cutlass_fa.flash_attn_func(*bits, backend="reference")


def test_numbers_and_arrays_are_the_same_factors() -> None:
    q, k, v = arrays()
    numbers = {"q_descale": 0.5, "k_descale": np.float32(3.0), "v_descale": 7}
    expected, expected_lse = attention_forward(q, k, v, q_descale=0.5, k_descale=3.0, v_descale=7.0)
    blocks = {
        "q_descale": np.full((2, 2), 0.5, np.float32),
        "k_descale": np.full((2, 2, 2), 3, np.float32),
        "v_descale": np.array(7, np.float32),
    }
    for factors in (numbers, blocks, numbers | {"k_descale": blocks["k_descale"]}):
        out, lse = cutlass_fa.flash_attn_func(q, k, v, out_dtype="float32", return_lse=True, backend="reference", **factors)
        np.testing.assert_array_equal(out, expected.astype(np.float32))
        np.testing.assert_allclose(lse, expected_lse, rtol=1e-6)


def test_out_dtypes() -> None:
    q, k, v = arrays()
    for out_dtype, expected in (
        (None, ml_dtypes.bfloat16),
        ("float16", np.float16),
        (ml_dtypes.bfloat16, ml_dtypes.bfloat16),
        (np.float32, np.float32),
    ):
        assert cutlass_fa.flash_attn_func(q, k, v, out_dtype=out_dtype, backend="reference").dtype == expected
    half = [x.astype(np.float16) for x in (q, k, v)]
    for options in ({"out_dtype": "float16"}, {"accumulate": "fast"}, {"q_descale": 2.0}, {"k_descale": np.ones((2, 2), np.float32)}):
        with pytest.raises(errors.InvalidArgument, match="are of fp8 q, k and v"):
            cutlass_fa.flash_attn_func(*half, backend="reference", **options)


def test_packed_sequences_and_what_has_no_kernel() -> None:
    q, k, v = (x[0] for x in arrays())
    starts_q, starts_k = np.array([0, 5, 20], np.int32), np.array([0, 100, 150], np.int32)
    factors = np.array([[[1.0], [2.0]], [[3.0], [0.5]]], np.float32)
    out = cutlass_fa.flash_attn_varlen_func(
        q, k, v, starts_q, starts_k, 15, 100, k_descale=factors, accumulate="precise", backend="reference", out_dtype="float32"
    )
    expected, _ = attention_forward(q, k, v, cu_seqlens_q=starts_q, cu_seqlens_k=starts_k, k_descale=factors[..., 0])
    np.testing.assert_array_equal(out, expected.astype(np.float32))
    with pytest.raises(errors.InvalidArgument, match=r"k_descale has shape \(2, 2, 1\)"):  # the longest sequence may have 150 keys
        cutlass_fa.flash_attn_varlen_func(q, k, v, starts_q, starts_k, k_descale=factors, backend="reference")
    with pytest.raises(errors.Fp8BackwardUnsupported):
        cutlass_fa.flash_attn_varlen_backward(q, q, k, v, starts_q, starts_k, recompute=True, backend="reference")
    key = DispatchKey("fa3", "fwd", "sm_90a", "e4m3", 128, dropout=True)
    assert DISPATCH_TABLE.why_not(key) == ["dropout is not built yet in the fa3 fwd"]


@pytest.mark.skipif(compiler_problem() is not None, reason=str(compiler_problem()))
@pytest.mark.parametrize(
    "name", ["fa3_fwd_sm90a_e4m3_ve5m2_hdim64_varlen_descale", "fa3_fwd_sm90a_e5m2_hdim96_causal_precise_descale_bdescale"]
)
def test_run_key_draws_what_a_cell_has(name: str) -> None:
    stream = io.StringIO()
    assert run_key(DispatchKey.parse(name), stream, seed=2), stream.getvalue()
