"""Requests, masks and Problem: what is refused, by which error, naming what; and what a request's key is."""

from __future__ import annotations

from dataclasses import replace
from types import SimpleNamespace

import numpy as np
import pytest

import cutlass_fa
from cutlass_fa import Causal, Fa3FwdRequest, Full, Persistent, PositionBias, SlidingCausal, SlidingFull, Window, errors
from cutlass_fa.arrays import ArraySpec, CupyArrays, TorchArrays, library_of
from cutlass_fa.extras import ExtraSpecs
from cutlass_fa.launch import alibi_values, window_values
from cutlass_fa.problem import Problem, check_pointers

REQUEST = Fa3FwdRequest(batch=2, seqlen_q=64, seqlen_k=128, num_heads_q=8, num_heads_kv=2, head_dim=128)


@pytest.mark.parametrize(
    ("change", "error", "words"),
    [
        ({"batch": 0}, errors.EmptyBatch, "batch=0"),
        ({"seqlen_q": 0}, errors.ZeroSeqlen, "seqlen_q=0"),
        ({"seqlen_k": 0}, errors.ZeroSeqlen, "seqlen_k=0"),
        ({"seqlen_k": 2**31}, errors.SeqlenOverflow, "seqlen_k=2147483648"),
        ({"num_heads_q": 6, "num_heads_kv": 4}, errors.InvalidGqaRatio, "num_heads_q=6"),
        ({"num_heads_kv": 0}, errors.InvalidGqaRatio, "num_heads_kv=0"),
        ({"head_dim": 100}, errors.UnsupportedHeadDim, "head_dim=100"),
        ({"head_dim": 264}, errors.UnsupportedHeadDim, "head_dim=264"),
        ({"head_dim": 0}, errors.UnsupportedHeadDim, "head_dim=0"),
        ({"dtype": "float32"}, errors.UnsupportedDtype, "float32"),
        ({"dtype": "e4m3"}, errors.Fp8MustUseFp8Request, "e4m3"),
        ({"arch": "sm_80"}, errors.Fa3RequiresHopper, "sm_80"),
        ({"arch": "hopper"}, errors.InvalidArgument, "hopper"),
        ({"sink_tokens": -1}, errors.InvalidArgument, "sink_tokens=-1"),
        ({"sink_tokens": 4}, errors.SinkWithoutMask, "sink_tokens=4"),
        ({"softmax_scale": 0.0}, errors.InvalidArgument, "softmax_scale"),
        ({"softmax_scale": -1.0}, errors.InvalidArgument, "softmax_scale"),
        ({"softmax_scale": float("nan")}, errors.InvalidArgument, "softmax_scale"),
        ({"q_offset": -1}, errors.InvalidArgument, "q_offset=-1"),
        ({"k_offset": 2.0}, errors.InvalidArgument, "k_offset is a float"),
        ({"k_offset": np.zeros(2, np.int32)}, errors.InvalidArgument, "k_offset is a ndarray: .* offsets of each sequence"),
        ({"k_offset": 2**31 - 1024 - 127}, errors.SeqlenOverflow, "k_offset=2147482497 and seqlen_k=128"),
        ({"q_offset": 2**31}, errors.SeqlenOverflow, "q_offset=2147483648"),
    ],
)
def test_request_refuses(change: dict[str, object], error: type[Exception], words: str) -> None:
    with pytest.raises(error, match=words) as caught:
        replace(REQUEST, **change)
    assert isinstance(caught.value, errors.FlashAttnError)


def test_masks() -> None:
    assert SlidingCausal(4) == Window(3, 0, causal=True)
    assert SlidingFull(4) == Window(3, 3)
    assert Window(-1, 5, causal=True) == Causal()
    assert Window(-1, -1) == Full()
    assert not Causal().is_sliding and SlidingFull(1).is_sliding
    for make in (SlidingCausal, SlidingFull):
        with pytest.raises(errors.ZeroWindow, match="window=0"):
            make(0)
    with pytest.raises(errors.InvalidArgument, match="-2"):
        Window(-2, 0)
    with pytest.raises(errors.InvalidArgument, match="num_sms=-1"):
        Persistent(-1)


def test_request_key_says_presence_not_values() -> None:
    assert str(replace(REQUEST, seqlen_q=128).dispatch_key()) == "fa3_fwd_sm90a_bf16_hdim128"
    everything = replace(
        REQUEST, seqlen_q=192, mask=SlidingCausal(7), sink_tokens=3, position_bias=PositionBias(alibi=True), head_dim=72, dtype="f16"
    )
    assert str(everything.dispatch_key()) == "fa3_fwd_sm90a_f16_hdim80_causal_window_alibi_sink"
    assert str(replace(REQUEST, seqlen_q=128, learnable_sink=True).dispatch_key()) == "fa3_fwd_sm90a_bf16_hdim128_lsink"
    assert replace(everything, mask=SlidingCausal(9), sink_tokens=5, softmax_scale=3.0).dispatch_key() == everything.dispatch_key()
    causal = replace(everything, mask=Causal(), position_bias=PositionBias())
    assert causal.dispatch_key() == replace(causal, sink_tokens=0).dispatch_key(), "a causal mask alone shows sink tokens anyway"
    assert everything.dispatch_key().gqa_ratio == 1
    placed = replace(everything, q_offset=0, float_out=True)
    assert str(placed.dispatch_key()) == "fa3_fwd_sm90a_f16_hdim80_causal_window_alibi_sink_offsets_f32out"
    assert placed.dispatch_key() == replace(placed, q_offset=7, k_offset=9).dispatch_key()
    assert placed.position_shift == 0 and replace(placed, q_offset=None).position_shift == 128 - 192
    assert not replace(REQUEST, k_offset=5).dispatch_key().position_offset, "a full mask alone knows no positions"
    assert REQUEST.scale == pytest.approx(128**-0.5) and replace(REQUEST, softmax_scale=2.0).scale == 2.0


@pytest.mark.parametrize(
    ("seqlen_q", "gqa_ratio", "packed"),
    [(1, 8, 8), (64, 4, 4), (128, 4, 1), (4096, 4, 1), (1, 1, 1), (129, 8, 8), (1000, 8, 1), (1, 128, 1), (3, 5, 5)],
)
def test_heads_are_packed_where_queries_are_short(seqlen_q: int, gqa_ratio: int, packed: int) -> None:
    request = replace(REQUEST, seqlen_q=seqlen_q, num_heads_q=gqa_ratio * 2, num_heads_kv=2)
    assert request.dispatch_key().gqa_ratio == packed


def contiguous(shape: tuple[int, ...], dtype: str = "bf16", device: int = 0) -> ArraySpec:
    strides = [1]
    for extent in reversed(shape[1:]):
        strides.insert(0, strides[0] * extent)
    return ArraySpec(shape, tuple(strides), dtype, device)


Q = contiguous((2, 64, 8, 128))
KV = contiguous((2, 128, 2, 128))


def make(q: ArraySpec = Q, k: ArraySpec = KV, v: ArraySpec = KV, out: ArraySpec | None = None) -> Problem:
    return Problem.from_specs(q, k, v, out, arch="sm_90a", mask=Full())


def test_problem_describes_its_call() -> None:
    problem = make()
    assert problem.request == replace(REQUEST)
    assert problem.out == Q
    head_major = ArraySpec((2, 64, 8, 128), (64 * 8 * 128, 128, 64 * 128, 1), "bf16", 0)
    assert make(q=head_major, out=head_major).out.strides == head_major.strides


@pytest.mark.parametrize(
    ("change", "error", "words"),
    [
        ({"q": contiguous((64, 8, 128))}, errors.InvalidArgument, r"q has shape \(64, 8, 128\)"),
        ({"k": contiguous((2, 128, 256))}, errors.InvalidArgument, "k has shape"),
        ({"v": contiguous((2, 127, 2, 128))}, errors.InvalidArgument, "v has shape"),
        ({"k": contiguous((2, 128, 4, 128))}, errors.InvalidArgument, "v has shape"),
        ({"k": contiguous((3, 128, 2, 128)), "v": contiguous((3, 128, 2, 128))}, errors.InvalidArgument, "k has batch 3"),
        ({"k": contiguous((2, 128, 2, 64)), "v": contiguous((2, 128, 2, 64))}, errors.InvalidArgument, "k has head_dim 64"),
        ({"k": contiguous((2, 128, 3, 128)), "v": contiguous((2, 128, 3, 128))}, errors.InvalidGqaRatio, "num_heads_kv=3"),
        ({"q": contiguous((2, 64, 8, 128), "float32")}, errors.UnsupportedDtype, "q has dtype float32"),
        ({"v": contiguous((2, 128, 2, 128), "f16")}, errors.InvalidArgument, "v has dtype f16"),
        ({"v": replace(KV, dtype="e4m3")}, errors.Fp8MustUseFp8Request, "v has dtype e4m3 and q has bf16"),
        ({"q": replace(Q, dtype="uint8")}, errors.UnsupportedDtype, "bits in uint8 with dtype="),
        ({"v": replace(KV, device=1)}, errors.InvalidArgument, "v is on device 1"),
        ({"q": replace(Q, strides=(8 * 64 * 256, 8 * 256, 256, 2))}, errors.InvalidArgument, "last dimension must be contiguous"),
        ({"k": replace(KV, strides=(128 * 2 * 132, 2 * 132, 132, 1))}, errors.InvalidArgument, "k has strides .* dimension 2"),
        ({"k": replace(KV, strides=(-32768, 256, 128, 1))}, errors.InvalidArgument, "dimension 0"),
        ({"out": contiguous((2, 64, 8, 64))}, errors.InvalidArgument, "out has shape"),
        ({"out": contiguous((2, 64, 8, 128), "f16")}, errors.InvalidArgument, "out has dtype f16"),
        ({"out": replace(Q, strides=(0, 1024, 128, 1))}, errors.InvalidArgument, "out has strides"),
    ],
)
def test_problem_refuses(change: dict[str, ArraySpec], error: type[Exception], words: str) -> None:
    with pytest.raises(error, match=words):
        make(**change)


def test_strides_of_single_elements_do_not_matter() -> None:
    q = ArraySpec((1, 64, 1, 128), (3, 128, 5, 1), "bf16", 0)
    assert make(q=q, k=q, v=q).request.batch == 1


def test_misaligned_address_is_refused_by_name() -> None:
    check_pointers((256, 512, 1024, 4096))
    with pytest.raises(errors.InvalidArgument, match="v starts at address 0x102"):
        check_pointers((256, 512, 258, 4096))


# ---- the public function, as far as a machine without a GPU can see --------------------------------------------------------------------


def numpy_qkv(**shape: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    size = {"batch": 1, "seqlen_q": 5, "seqlen_k": 7, "heads": 2, "head_dim": 64, **shape}
    rng = np.random.default_rng(0)
    q = rng.standard_normal((size["batch"], size["seqlen_q"], size["heads"], size["head_dim"])).astype(np.float16)
    k, v = (rng.standard_normal((size["batch"], size["seqlen_k"], size["heads"], size["head_dim"])).astype(np.float16) for _ in range(2))
    return q, k, v


@pytest.mark.parametrize(
    ("make_arrays", "error"),
    [
        (lambda: (numpy_qkv()[0][0], *numpy_qkv()[1:]), errors.InvalidArgument),
        (lambda: numpy_qkv(head_dim=100), errors.UnsupportedHeadDim),
        (lambda: numpy_qkv(head_dim=264), errors.UnsupportedHeadDim),
        (lambda: tuple(x.astype(np.float32) for x in numpy_qkv()), errors.UnsupportedDtype),
        (lambda: numpy_qkv(batch=0), errors.EmptyBatch),
        (lambda: numpy_qkv(seqlen_q=0), errors.ZeroSeqlen),
        (lambda: numpy_qkv(seqlen_k=0), errors.ZeroSeqlen),
        (lambda: tuple(x[..., ::2] for x in numpy_qkv(head_dim=128)), errors.InvalidArgument),
        (lambda: ([1.0], [1.0], [1.0]), errors.InvalidArgument),
    ],
)
@pytest.mark.parametrize("backend", ["cuda", "reference"])
def test_bad_input_of_the_public_function(make_arrays, error: type[Exception], backend: str) -> None:
    with pytest.raises(error):
        cutlass_fa.flash_attn_func(*make_arrays(), backend=backend)


def test_unknown_backend() -> None:
    with pytest.raises(errors.InvalidArgument, match="backend='tpu'"):
        cutlass_fa.flash_attn_func(*numpy_qkv(), backend="tpu")


def test_cpu_arrays_without_a_gpu_are_mock_mode(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("cutlass_fa.arrays.gpu_problem", lambda: "no GPU")
    with pytest.raises(errors.MockMode, match="backend='reference'"):
        cutlass_fa.flash_attn_func(*numpy_qkv())


def test_cpu_arrays_with_a_gpu_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("cutlass_fa.arrays.gpu_problem", lambda: None)
    with pytest.raises(errors.InvalidArgument, match="CPU memory"):
        cutlass_fa.flash_attn_func(*numpy_qkv())


def test_reference_backend_computes_attention() -> None:
    q, k, v = numpy_qkv()
    out, lse = cutlass_fa.flash_attn_func(q, k, v, backend="reference", return_lse=True)
    scores = np.einsum("bqhd,bkhd->bhqk", q.astype(np.float64), k.astype(np.float64)) / 8.0
    weights = np.exp(scores)
    expected = np.einsum("bhqk,bkhd->bqhd", weights / weights.sum(-1, keepdims=True), v.astype(np.float64))
    np.testing.assert_allclose(out.astype(np.float64), expected, atol=2e-3)
    np.testing.assert_allclose(lse, np.log(weights.sum(-1)), atol=1e-5)
    assert out.dtype == np.float16 and lse.dtype == np.float32
    given = np.full_like(q, np.nan)
    assert cutlass_fa.flash_attn_func(q, k, v, backend="reference", out=given) is given
    np.testing.assert_array_equal(given, out)


def test_float32_results() -> None:
    q, k, v = numpy_qkv()
    options = {"backend": "reference", "return_lse": True, "causal": True}
    for out_dtype in ("float32", np.float32, np.dtype(np.float32)):
        out, lse = cutlass_fa.flash_attn_func(q, k, v, out_dtype=out_dtype, **options)
        assert out.dtype == np.float32 and lse.dtype == np.float32
    rounded, _ = cutlass_fa.flash_attn_func(q, k, v, **options)
    np.testing.assert_array_equal(out.astype(np.float16), rounded)
    given = np.empty(q.shape, np.float32)
    assert cutlass_fa.flash_attn_func(q, k, v, out_dtype="float32", out=given, **options)[0] is given
    with pytest.raises(errors.InvalidArgument, match="out_dtype=float64: accepted are float32"):
        cutlass_fa.flash_attn_func(q, k, v, out_dtype="float64", **options)
    with pytest.raises(errors.InvalidArgument, match="out has dtype f16: expected float32"):
        cutlass_fa.flash_attn_func(q, k, v, out_dtype="float32", out=np.empty_like(q), **options)
    with pytest.raises(errors.InvalidArgument, match="out has dtype float32: expected f16"):
        cutlass_fa.flash_attn_func(q, k, v, out=given, **options)
    odd = np.empty((1, 5, 2, 66), np.float32)[..., :64]
    with pytest.raises(errors.InvalidArgument, match=r"out has strides .* multiple of 4 \(16 bytes\)"):
        cutlass_fa.flash_attn_func(q, k, v, out_dtype="float32", out=odd, **options)


@pytest.mark.parametrize("name", ["q_offset", "k_offset"])
def test_offsets_of_the_public_functions(name: str) -> None:
    q, k, v = numpy_qkv()
    for backend in ("cuda", "reference"):
        for function, arrays in ((cutlass_fa.flash_attn_func, (q, k, v)), (cutlass_fa.flash_attn_backward, (q, q, k, v, q))):
            with pytest.raises(errors.InvalidArgument, match=f"{name} is a ndarray: expected an int"):
                function(*arrays, causal=True, backend=backend, **{name: np.array([1], np.int32)})
    whole = cutlass_fa.flash_attn_func(q, k, v, causal=True, backend="reference")
    part = cutlass_fa.flash_attn_func(q[:, 2:], k, v, causal=True, q_offset=4, backend="reference")
    np.testing.assert_array_equal(part, whole[:, 2:])


@pytest.mark.parametrize("window_size", [(1,), (1, 2, 3)])
def test_window_size_has_two_sides(window_size: tuple[int, ...]) -> None:
    with pytest.raises(errors.InvalidArgument, match="window_size="):
        cutlass_fa.flash_attn_func(*numpy_qkv(), window_size=window_size, backend="reference")


def test_a_gradient_is_refused_rather_than_lost() -> None:
    """PyTorch's adapter over a stand-in for a tensor: a result without a gradient must not look like one with it."""
    library = object.__new__(TorchArrays)
    library._is_grad_enabled = lambda: True
    tensor = SimpleNamespace(requires_grad=True, shape=(1, 2), stride=lambda: (2, 1), dtype="torch.float16", get_device=lambda: 0)
    with pytest.raises(errors.InvalidArgument, match=r"torch\.no_grad"):
        library.signatures((tensor,))
    library._is_grad_enabled = lambda: False
    assert library.signatures((tensor, tensor)) == (((1, 2), (2, 1), "torch.float16", 0),) * 2


def test_what_a_captured_call_makes_for_itself_stays_the_graph_s() -> None:
    library = CupyArrays()
    library._is_capturing = lambda stream: stream == 77
    kept, freed = object(), object()
    library.retain((freed,), 0)
    library.retain((freed,), 5)
    library.retain((kept,), 77)
    assert library._of_graphs == [kept]


def test_library_of_refuses_by_type() -> None:
    assert library_of(np.ndarray).name == "NumPy"
    with pytest.raises(errors.InvalidArgument, match=r"builtins\.list"):
        library_of(list)


# ---- masks and slopes ------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("shape", "strides", "dtype", "device", "words"),
    [
        ((5,), (1,), "float32", 0, r"expected \(4,\) or \(2, 4\)"),
        ((4, 2), (2, 1), "float32", 0, "shape"),
        ((4,), (1,), "f16", 0, "dtype f16"),
        ((4,), (2,), "float32", 0, "contiguous"),
        ((2, 4), (4, 1), "float32", -1, "one GPU"),
    ],
)
def test_slopes_are_checked(shape: tuple[int, ...], strides: tuple[int, ...], dtype: str, device: int, words: str) -> None:
    q, k = (ArraySpec((2, 8, heads, 64), (8 * heads * 64, heads * 64, 64, 1), "bf16", 0) for heads in (4, 2))
    extras = ExtraSpecs(alibi_slopes=ArraySpec(shape, strides, dtype, device))
    with pytest.raises(errors.InvalidArgument, match=rf"alibi_slopes .*{words}"):
        Problem.from_specs(q, k, k, None, arch="sm_90a", mask=Full(), extras=extras)


@pytest.mark.parametrize(
    ("shape", "strides", "dtype", "device", "words"),
    [
        ((5,), (1,), "float32", 0, r"expected \(4,\), a number a query head"),
        ((2, 4), (4, 1), "float32", 0, "shape"),
        ((4,), (1,), "bf16", 0, "dtype bf16"),
        ((4,), (2,), "float32", 0, "contiguous"),
        ((4,), (1,), "float32", -1, "one GPU"),
    ],
)
def test_learnable_sinks_are_checked(shape: tuple[int, ...], strides: tuple[int, ...], dtype: str, device: int, words: str) -> None:
    q, k = (ArraySpec((2, 8, heads, 64), (8 * heads * 64, heads * 64, 64, 1), "bf16", 0) for heads in (4, 2))
    extras = ExtraSpecs(learnable_sink=ArraySpec(shape, strides, dtype, device))
    with pytest.raises(errors.InvalidArgument, match=rf"learnable_sink .*{words}"):
        Problem.from_specs(q, k, k, None, arch="sm_90a", mask=Full(), extras=extras)


def test_mask_values_that_are_packed() -> None:
    """Bounds and sink tokens are at most what the lengths make of them, so that no sum of positions leaves 32 bits."""
    spec = ArraySpec((2, 8, 4, 64), (2048, 256, 64, 1), "bf16", 0)
    slopes = ArraySpec((2, 4), (6, 1), "float32", 0)
    problem = Problem.from_specs(
        spec, spec, spec, None, arch="sm_90a", mask=Window(3, -1), sink_tokens=99, extras=ExtraSpecs(alibi_slopes=slopes), softcap=5.0
    )
    assert window_values(problem.request) == {"window_left": 3, "window_right": 8, "sink_tokens": 8, "position_shift": 0}
    assert alibi_values(problem.request, problem.extras.alibi_slopes) == {"alibi_stride_batch": 6, "alibi_scale": pytest.approx(1 / 5.0)}
    assert alibi_values(problem.request, ArraySpec((4,), (1,), "float32", 0))["alibi_stride_batch"] == 0
    far = replace(problem.request, mask=Window(2**31 - 1, 2**31 - 1))
    assert window_values(far) == {"window_left": 8, "window_right": 8, "sink_tokens": 8, "position_shift": 0}
    ahead = replace(far, q_offset=100, k_offset=96)
    assert window_values(ahead) == {"window_left": 12, "window_right": 4, "sink_tokens": 3, "position_shift": 4}
    behind = replace(far, k_offset=2**31 - 1024 - 8)
    assert window_values(behind) == {"window_left": 0, "window_right": 2**31 - 1024, "sink_tokens": 0, "position_shift": 8 + 1024 - 2**31}


# ---- KV caches -----------------------------------------------------------------------------------------------------------------------


def cached_problem(block_size: int, order_k: str, order_v: str, *, paged: bool = True, leftpad: bool = False) -> Problem:
    """Two sequences of one query each against a cache of 6 blocks whose memory has its dimensions in this order, outermost first."""
    extents = {"b": 6, "s": block_size, "h": 2, "d": 64}

    def pages(order: str) -> ArraySpec:
        memory = np.empty([extents[axis] for axis in order], np.float16)
        return library_of(np.ndarray).spec(memory.transpose([order.index(axis) for axis in "bshd"]))

    q = ArraySpec((2, 1, 4, 64), (256, 256, 64, 1), "f16", 0)
    numbers = ArraySpec((2,), (1,), "int32", 0)
    table = ArraySpec((2, 3), (3, 1), "int32", 0) if paged else None
    extras = ExtraSpecs(seqused_k=numbers, block_table=table, cache_leftpad=numbers if leftpad else None)
    k, v = (replace(pages(order), device=0) for order in (order_k, order_v))
    return Problem.from_specs(q, k, v, None, arch="sm_90a", mask=Causal(), extras=extras, cached=True)


@pytest.mark.parametrize(("k", "k_inner"), [("bshd", False), ("bhsd", False), ("bhds", True), ("hbds", True)])
@pytest.mark.parametrize(("v", "v_inner"), [("bshd", False), ("bhds", True)])
@pytest.mark.parametrize("paged", [True, False])
def test_a_cache_with_tokens_innermost_is_known_by_its_strides(k: str, k_inner: bool, v: str, v_inner: bool, paged: bool) -> None:
    request = cached_problem(16, k, v, paged=paged).request
    assert request.kv_cache is not None
    assert (request.kv_cache.k_tokens_inner, request.kv_cache.v_tokens_inner) == (k_inner, v_inner)
    key = request.dispatch_key()
    assert (key.k_tokens_inner, key.v_tokens_inner) == (k_inner, v_inner) and key.paged


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ((16, "bsdh", "bshd"), r"k has strides .* last dimension must be contiguous"),
        ((16, "bshd", "bdhs"), None),
        ((16, "bhds", "dbsh"), r"v has strides .* last dimension must be contiguous"),
    ],
)
def test_strides_of_caches(arguments: tuple[int, str, str], words: str | None) -> None:
    if words is None:
        assert cached_problem(*arguments).request.dispatch_key().v_tokens_inner
        return
    with pytest.raises(errors.InvalidArgument, match=words):
        cached_problem(*arguments)


def test_a_contiguous_cache_with_tokens_innermost_is_loaded_in_groups_of_8() -> None:
    with pytest.raises(errors.InvalidArgument, match="multiple of 8"):
        cached_problem(12, "bshd", "bhds", paged=False)
    assert cached_problem(24, "bshd", "bhds", paged=False).request.dispatch_key().v_tokens_inner


def test_tokens_innermost_have_no_padding_in_front() -> None:
    with pytest.raises(errors.InvalidArgument, match=r"cache_leftpad .* move each sequence to the front"):
        cached_problem(16, "bhds", "bshd", leftpad=True)
