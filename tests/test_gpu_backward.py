"""The backward on a GPU, by the test rule (numerics.py) against float64; its kernels are compiled for the GPU that runs."""

from __future__ import annotations

from dataclasses import dataclass, replace
from itertools import product
from typing import Any

import numpy as np
import pytest

import cutlass_fa
from cutlass_fa import errors
from cutlass_fa.reference import Gradients, attention_forward
from tests.backward_cases import SOFTCAP, Case, Inputs
from tests.numerics import SEQLEN_PAIRS, check_backward, poisoned, random_array

pytestmark = pytest.mark.gpu

HEADS = {"mha": (2, 1), "gqa4": (2, 4), "mqa": (1, 3)}  # key heads, query heads of each
HEAD_DIMS = (64, 80, 96, 128, 192, 256)


@dataclass(frozen=True)
class Call:
    """One call of flash_attn_backward."""

    dtype: str
    head_dim: int
    causal: bool
    case: Case
    softcap: float = 0.0
    dropout_p: float = 0.0
    deterministic: bool = False

    def __str__(self) -> str:
        words = [self.dtype, f"d{self.head_dim}", "causal" if self.causal else "full", str(self.case)]
        words += ["softcap"] * (self.softcap > 0) + ["dropout"] * (self.dropout_p > 0) + ["deterministic"] * self.deterministic
        return "-".join(words)

    def inputs(self) -> Inputs:
        import cupy

        rng = cupy.random.default_rng(np.random.SeedSequence().generate_state(1)[0])
        flags: dict[str, Any] = {"causal": self.causal, "softcap": self.softcap, "dropout_p": self.dropout_p}
        return Inputs.of(self.case, cupy, rng, dtype=self.dtype, head_dim=self.head_dim, **flags)

    def gradients(self, inputs: Inputs, **more: Any) -> Gradients:
        """Of one call, written over NaN with the layout of q, k and v."""
        buffers = {name: poisoned_like(x) for name, x in (("dq", inputs.q), ("dk", inputs.k), ("dv", inputs.v))}
        if "learnable_sink" in inputs.call:
            buffers["dlearnable_sink"] = poisoned_like(inputs.call["learnable_sink"])
        arguments: dict[str, Any] = {**inputs.call, "deterministic": self.deterministic, "dlse": inputs.dlse, **buffers, **more}
        returned = cutlass_fa.flash_attn_backward(inputs.dout, inputs.q, inputs.k, inputs.v, inputs.out, inputs.lse, **arguments)
        assert all(given is None or got is given for given, got in zip((arguments[n] for n in buffers), returned, strict=True))
        return Gradients(*returned)

    def check(self, **more: Any) -> None:
        inputs = self.inputs()
        arrays = (inputs.dout, inputs.q, inputs.k, inputs.v)
        check_backward(self.gradients(inputs, **more), *arrays, case=self, dlse=inputs.dlse, **inputs.options)


def poisoned_like(x: Any) -> Any:
    """NaN with the shape and the strides of x, the memory between its rows included."""
    import cupy

    span = 1 + sum((extent - 1) * (stride // x.itemsize) for extent, stride in zip(x.shape, x.strides, strict=True))
    return cupy.lib.stride_tricks.as_strided(poisoned(cupy, (span,), x.dtype), x.shape, x.strides)


def case_of(heads: str, seqlens: tuple[int, int], **more: Any) -> Case:
    groups, ratio = HEADS[heads]
    # One row and one key: dq is rounding alone, which a larger sample measures better.
    return Case(seqlens, batch=16 if seqlens == (1, 1) else 2, groups=groups, ratio=ratio, **more)


def covering_calls() -> list[Call]:
    """dtype x head_dim x mask x heads x lengths x dropout x softcap x deterministic: every pair of head_dim, mask, heads and lengths with
    each other; the rest takes turns so that any two values of any two factors meet."""
    rest = list(product((0.0, 0.17), (0.0, SOFTCAP), (False, True), ("bf16", "f16")))
    calls = []
    for index, (head_dim, causal, heads, seqlens) in enumerate(product(HEAD_DIMS, (False, True), HEADS, SEQLEN_PAIRS)):
        dropout_p, softcap, deterministic, dtype = rest[index * 7 % len(rest)]
        order = ("bshd", "bhsd")[index % 2]
        calls.append(Call(dtype, head_dim, causal, case_of(heads, seqlens, order=order), softcap, dropout_p, deterministic))
    return calls


@pytest.mark.parametrize("call", covering_calls(), ids=str)
def test_backward(call: Call) -> None:
    call.check()


@pytest.mark.parametrize("seqlens", [(113, 203), (640, 128), (1023, 1024)], ids=lambda p: f"{p[0]}x{p[1]}")
@pytest.mark.parametrize("flags", product((0.0, SOFTCAP), (0.0, 0.17), (False, True)), ids=str)
@pytest.mark.parametrize("causal", [False, True], ids=["full", "causal"])
@pytest.mark.parametrize("head_dim", [64, 128, 256])
def test_every_combination_of_features(head_dim: int, causal: bool, flags: tuple[float, float, bool], seqlens: tuple[int, int]) -> None:
    softcap, dropout_p, deterministic = flags
    Call("bf16", head_dim, causal, case_of("gqa4", seqlens), softcap, dropout_p, deterministic).check()


@pytest.mark.parametrize("head_dim", range(8, 257, 8))
def test_every_head_dim(head_dim: int) -> None:
    Call("bf16", head_dim, True, case_of("gqa4", (239, 321), strided=True)).check()


@pytest.mark.parametrize("order", ["bshd", "bhsd"])
@pytest.mark.parametrize("dtype", ["bf16", "f16"])
def test_strides_and_the_gradient_of_lse(dtype: str, order: str) -> None:
    Call(dtype, 128, True, case_of("gqa4", (301, 517), order=order, strided=True, has_dlse=True)).check()
    Call(dtype, 64, False, case_of("mha", (301, 517), order=order, strided=True, has_dlse=True), deterministic=True).check()


def test_nothing_around_a_strided_gradient_is_written() -> None:
    import cupy

    call = Call("bf16", 128, True, case_of("gqa4", (130, 200)))
    inputs = call.inputs()
    whole = {name: poisoned(cupy, (*x.shape[:-1], 160), x.dtype) for name, x in (("dq", inputs.q), ("dk", inputs.k), ("dv", inputs.v))}
    call.gradients(inputs, **{name: x[..., 16:144] for name, x in whole.items()})
    for x in whole.values():
        assert np.isnan(x[..., :16].astype(np.float32).get()).all() and np.isnan(x[..., 144:].astype(np.float32).get()).all()
        assert np.isfinite(x[..., 16:144].astype(np.float32).get()).all()


@pytest.mark.parametrize("heads", ["mha", "gqa4", "mqa"])
@pytest.mark.parametrize("scale", [0.01, 0.7])
def test_softmax_scale(scale: float, heads: str) -> None:
    Call("bf16", 64, True, case_of(heads, (200, 300), softmax_scale=scale)).check()


@pytest.mark.parametrize("heads", ["mha", "mqa"])
@pytest.mark.parametrize("seqlens", [(4096, 64), (3000, 300), (64, 4096)], ids=lambda p: f"{p[0]}x{p[1]}")
@pytest.mark.parametrize("deterministic", [False, True])
def test_few_keys_are_shared_by_many_ctas(seqlens: tuple[int, int], heads: str, deterministic: bool) -> None:
    """Blocks of keys too few for the multiprocessors: several CTAs share one, and their sums are added afterwards."""
    for causal in (False, True):
        Call("bf16", 128, causal, replace(case_of(heads, seqlens), batch=1), deterministic=deterministic).check()


@pytest.mark.parametrize("options", [{}, {"causal": True}, {"softcap": 5.0}, {"dropout_p": 0.3, "causal": True}], ids=str)
def test_recompute_is_the_backward_of_the_forward(options: dict[str, Any]) -> None:
    """out and lse made by the call are those of the forward kernel: equal bits of dk and dv."""
    case = case_of("gqa4", (301, 517))
    call = Call(
        "bf16", 128, options.get("causal", False), case, options.get("softcap", 0.0), options.get("dropout_p", 0.0), deterministic=True
    )
    inputs = call.inputs()
    out, lse = cutlass_fa.flash_attn_func(inputs.q, inputs.k, inputs.v, return_lse=True, **inputs.call)
    given = call.gradients(replace(inputs, out=out, lse=lse))
    made = call.gradients(replace(inputs, out=None, lse=None), recompute=True)
    for name in ("dq", "dk", "dv"):
        assert (getattr(given, name).view(np.uint16) == getattr(made, name).view(np.uint16)).all(), name
    arrays = (inputs.dout, inputs.q, inputs.k, inputs.v)
    check_backward(made, *arrays, case=call, **inputs.options)


def test_rows_without_keys_and_unseen_keys() -> None:
    call = Call("bf16", 128, True, case_of("gqa4", (300, 40)))
    inputs = call.inputs()
    gradients = call.gradients(inputs)
    assert np.isneginf(inputs.lse.get()[:, :, :260]).all() and not gradients.dq[:, :260].any()
    check_backward(gradients, inputs.dout, inputs.q, inputs.k, inputs.v, case=call, **inputs.options)


def test_large_scores() -> None:
    call = Call("bf16", 128, False, case_of("mha", (128, 600)))
    inputs = call.inputs()
    q, k = ((x.astype(np.float32) * 6).astype(x.dtype) for x in (inputs.q, inputs.k))
    out, lse = attention_forward(q, k, inputs.v)
    inputs = replace(inputs, q=q, k=k, out=out.astype(np.float32).astype(q.dtype), lse=lse.astype(np.float32))
    check_backward(call.gradients(inputs), inputs.dout, q, k, inputs.v, case="large scores")


@pytest.mark.parametrize(("softcap", "dropout_p"), [(0.0, 0.0), (2.0, 0.0), (0.0, 0.3), (2.0, 0.3)])
def test_finite_differences(softcap: float, dropout_p: float) -> None:
    """Gradients of f16 kernels against differences of the float64 forward, at places drawn by chance: no reference gradient between."""
    call = Call("f16", 16, True, Case((5, 9), has_dlse=True, ratio=2), softcap, dropout_p)
    inputs = call.inputs()
    gradients = call.gradients(inputs)
    host = {name: getattr(inputs, name).get().astype(np.float64) for name in ("q", "k", "v", "dout", "dlse")}
    options = {**inputs.options}
    if dropout_p:
        options["dropout_mask"] = options["dropout_mask"].get()
    rng = np.random.default_rng(3)
    for name, gradient in (("q", gradients.dq), ("k", gradients.dk), ("v", gradients.dv)):
        values = gradient.astype(np.float64).get().reshape(-1)
        for place in rng.choice(values.size, 20, replace=False):
            losses = []
            for step in (1e-5, -1e-5):
                moved = {**host, name: host[name].copy()}
                moved[name].reshape(-1)[place] += step
                out, lse = attention_forward(moved["q"], moved["k"], moved["v"], **options)
                losses.append(float((out * host["dout"]).sum() + (lse * host["dlse"]).sum()))
            difference = (losses[0] - losses[1]) / 2e-5
            assert abs(difference - values[place]) < 1e-2, f"d{name} at {place}: {values[place]}, difference {difference}"


@pytest.mark.parametrize("head_dim", [64, 128, 256])
@pytest.mark.parametrize("heads", ["mha", "mqa"])
def test_deterministic_is_bitwise_reproducible(head_dim: int, heads: str) -> None:
    """1,000 repetitions in all, each over fresh poison, beside other work on the GPU."""
    import cupy

    call = Call("bf16", head_dim, True, case_of(heads, (1023, 1024)), deterministic=True)
    inputs = call.inputs()
    first = call.gradients(inputs)
    other = cupy.cuda.Stream(non_blocking=True)
    noise = cupy.ones((1 << 24,), np.float32)
    for repetition in range(1000 // 6 + 1):
        with other:
            noise *= 1.0001  # so that CTAs come to their multiprocessors in changing order
        again = call.gradients(inputs)
        for name in ("dq", "dk", "dv"):
            same = getattr(again, name).view(np.uint16) == getattr(first, name).view(np.uint16)
            assert bool(same.all()), f"{name}: {int((~same).sum())} elements differ in repetition {repetition}"


def test_default_mode_repeats_dk_and_dv() -> None:
    """Atomics add to dq alone."""
    call = Call("bf16", 128, True, case_of("gqa4", (1023, 1024)))
    inputs = call.inputs()
    first = call.gradients(inputs)
    for _ in range(50):
        again = call.gradients(inputs)
        for name in ("dk", "dv"):
            assert bool((getattr(again, name).view(np.uint16) == getattr(first, name).view(np.uint16)).all()), name


def test_torch_tensors_and_cuda_graph() -> None:
    torch = pytest.importorskip("torch")
    q, k, v, dout = (torch.randn(2, 300, 4, 64, device="cuda", dtype=torch.bfloat16) for _ in range(4))
    out, lse = cutlass_fa.flash_attn_func(q, k, v, causal=True, return_lse=True)
    expected = cutlass_fa.flash_attn_backward(dout, q, k, v, out, lse, causal=True, deterministic=True)
    buffers = [torch.empty_like(x) for x in (q, k, v)]
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        cutlass_fa.flash_attn_backward(
            dout, q, k, v, out, lse, causal=True, deterministic=True, dq=buffers[0], dk=buffers[1], dv=buffers[2]
        )
    for buffer in buffers:
        buffer.fill_(float("nan"))
    graph.replay()
    torch.cuda.synchronize()
    assert all(torch.equal(a, b) for a, b in zip(buffers, expected, strict=True))
    qkv = [x.detach().float().requires_grad_() for x in (q, k, v)]
    scores = torch.einsum("bihd,bjhd->bhij", qkv[0], qkv[1]) / 8
    scores = scores.masked_fill(torch.ones(300, 300, device="cuda").triu(1).bool(), float("-inf"))
    torch.einsum("bhij,bjhd->bihd", scores.softmax(-1), qkv[2]).backward(dout.float())
    for got, x in zip(expected, qkv, strict=True):
        assert (got.float() - x.grad).abs().max() < 0.05


def test_arguments_are_named_in_errors() -> None:
    import cupy

    call = Call("bf16", 64, False, case_of("mha", (100, 100)))
    inputs = call.inputs()
    with pytest.raises(errors.InvalidArgument, match="lse is None and recompute=False"):
        call.gradients(replace(inputs, lse=None))
    with pytest.raises(errors.InvalidArgument, match="lse has dtype float64"):
        call.gradients(replace(inputs, lse=inputs.lse.astype(np.float64)))
    with pytest.raises(errors.InvalidArgument, match="dk has shape"):
        call.gradients(inputs, dk=cupy.empty((1, 1, 1, 64), inputs.k.dtype))


def test_a_gqa_group_is_the_sum_of_its_heads() -> None:
    """dk and dv of a shared key head are the sums over its query heads, each run as a head of its own."""
    import cupy

    call = Call("f16", 128, True, case_of("gqa4", (200, 333)))
    inputs = call.inputs()
    grouped = call.gradients(inputs)
    k, v = (cupy.repeat(x, 4, axis=2) for x in (inputs.k, inputs.v))
    apart = call.gradients(replace(inputs, k=k, v=v))
    for name in ("dk", "dv"):
        expected = getattr(apart, name).astype(np.float32).reshape(2, 333, 2, 4, 128).sum(axis=3)
        assert float(cupy.abs(getattr(grouped, name).astype(np.float32) - expected).max()) < 2e-2


def test_broadcast_dout() -> None:
    """The gradient of a sum: every row of dout is one row in memory."""
    import cupy

    call = Call("bf16", 64, True, case_of("mha", (100, 100)))
    inputs = call.inputs()
    row = random_array(cupy, cupy.random.default_rng(3), (1, 1, 1, 64), inputs.q.dtype)
    dout = cupy.broadcast_to(row, inputs.q.shape)
    check_backward(call.gradients(replace(inputs, dout=dout)), dout, inputs.q, inputs.k, inputs.v, case=call, **inputs.options)
