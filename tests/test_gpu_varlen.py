"""Packed sequences on a GPU, both families, by the test rule against float64; rows that are not in use hold NaN."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

import ml_dtypes
import numpy as np
import pytest

import cutlass_fa
from cutlass_fa import errors
from cutlass_fa.device import device_info
from cutlass_fa.dropout import dropout_mask
from cutlass_fa.reference import Gradients
from tests.backward_cases import DTYPES, RANDOM_STATE
from tests.covering import covering
from tests.numerics import check_backward, check_forward, poisoned
from tests.varlen_cases import Lengths

pytestmark = pytest.mark.gpu

FAMILIES = ("fa2", "fa3")
HEADS = {"mha": (3, 3), "gqa4": (8, 2), "mqa": (5, 1)}
LENGTHS = (
    Lengths("equal", ((256, 256),) * 4),
    Lengths("pairs", ((1, 1), (64, 128), (239, 1), (799, 3), (113, 203), (128, 217), (0, 17), (128, 0), (384, 256), (1023, 1024))),
    Lengths("one_long", ((1500, 1500), *((33, 33),) * 20)),
    Lengths("decode", ((1, 1000), (1, 3), (1, 130), (1, 0), (4, 517), (1, 64))),
    Lengths("used", ((300, 400), (50, 60), (200, 513)), used_q=(129, 50, 0), used_k=(333, 1, 512), behind=(200, 77)),
    Lengths("empty", ((0, 0), (5, 5), (0, 3), (2, 0))),
    Lengths("many", tuple((i % 7, i % 11) for i in range(1, 301))),
)


@dataclass(frozen=True)
class Call:
    """One forward call on packed sequences."""

    lengths: Lengths
    dtype: str = "bf16"
    head_dim: int = 128
    causal: bool = False
    heads: str = "gqa4"
    window: tuple[int, int] = (-1, -1)
    sink: int = 0
    softcap: float = 0.0
    alibi: str = "none"
    dropout_p: float = 0.0
    family: str = "fa3"
    order: str = "bshd"
    learnable_sink: bool = False
    offsets: tuple[int, int] | None = None
    out_dtype: str | None = None

    def __str__(self) -> str:
        words = [self.family, str(self.lengths), self.dtype, f"d{self.head_dim}", "causal" * self.causal, self.heads, self.order]
        words += [f"w{self.window[0]}.{self.window[1]}", f"s{self.sink}", f"c{self.softcap:g}", f"a.{self.alibi}", f"p{self.dropout_p:g}"]
        words += ["lsink" * self.learnable_sink, self.out_dtype or ""]
        words += [] if self.offsets is None else [f"o{self.offsets[0]}.{self.offsets[1]}"]
        return "-".join(word for word in words if word)

    def options(self) -> tuple[dict[str, Any], dict[str, Any]]:
        """What a call is given of the features, and what the reference is told of them."""
        import cupy

        options: dict[str, Any] = {"causal": self.causal, "window_size": self.window, "sink_tokens": self.sink, "softcap": self.softcap}
        if self.alibi != "none":
            shape = (HEADS[self.heads][0],) if self.alibi == "heads" else (self.lengths.batch, HEADS[self.heads][0])
            options["alibi_slopes"] = cupy.random.uniform(-0.05, 1, shape, np.float32)
        if self.learnable_sink:
            options["learnable_sink"] = cupy.random.uniform(-2, 3, (HEADS[self.heads][0],), np.float32)
        if self.offsets is not None:
            options |= {"q_offset": self.offsets[0], "k_offset": self.offsets[1]}
        call = dict(options)
        if self.dropout_p:
            call |= {"dropout_p": self.dropout_p, "dropout_seed": RANDOM_STATE[0], "dropout_offset": RANDOM_STATE[1]}
            mask = dropout_mask(*RANDOM_STATE, self.dropout_p, self.lengths.batch, HEADS[self.heads][0], *self.lengths.longest, xp=cupy)
            options |= {"dropout_p": self.dropout_p, "dropout_mask": mask}
        return call, options

    def drawn(self) -> tuple[Any, Any]:
        """A generator with a new seed, and q, k and v that it drew."""
        import cupy

        rng = cupy.random.default_rng(np.random.SeedSequence().generate_state(1)[0])
        layout: dict[str, Any] = {"memory_order": self.order, "extra_strides": self.order == "bhsd"}
        return rng, self.lengths.qkv(cupy, rng, HEADS[self.heads], self.head_dim, DTYPES[self.dtype], **layout)

    def check(self) -> None:
        import cupy

        if self.family == "fa3" and device_info(0).arch != "sm_90a":
            pytest.skip("family fa3 needs sm_90a")
        _, (q, k, v) = self.drawn()
        call, options = self.options()
        sequences = self.lengths.arrays(cupy)
        call |= {"family": self.family, "return_lse": True, "check": True}
        call |= {"out": poisoned(cupy, q.shape, self.out_dtype or q.dtype), "out_dtype": self.out_dtype}
        out, lse = cutlass_fa.flash_attn_varlen_func(q, k, v, **sequences, **call)
        q[cupy.asarray(~self.lengths.rows_in_use(0))] = 0
        check_forward(out, lse, q, k, v, case=self, **options, **sequences)


def covering_calls() -> list[Call]:
    factors = {
        "family": FAMILIES,
        "lengths": LENGTHS,
        "dtype": ("f16", "bf16"),
        "head_dim": (64, 80, 96, 128, 192, 256),
        "causal": (False, True),
        "heads": tuple(HEADS),
        "window": ((-1, -1), (5, 70), (128, 0), (700, -1), (-1, 100)),
        "sink": (0, 4, 200),
        "softcap": (0.0, 20.0),
        "alibi": ("none", "heads", "batch"),
        "dropout_p": (0.0, 0.17),
        "order": ("bshd", "bhsd"),
        "learnable_sink": (False, True),
        "offsets": (None, (70, 0), (0, 200), (4, 1000)),
        "out_dtype": (None, "float32"),
    }
    calls = []
    for chosen in covering(factors, 2):
        call = Call(**chosen)
        call = replace(call, dropout_p=0.0) if call.family == "fa3" else call
        calls.append(replace(call, sink=0) if call.window == (-1, -1) and not call.causal else call)
    return calls


@pytest.mark.parametrize("call", covering_calls(), ids=str)
def test_forward(call: Call) -> None:
    call.check()


@pytest.mark.parametrize("lengths", LENGTHS, ids=str)
@pytest.mark.parametrize("heads", tuple(HEADS))
@pytest.mark.parametrize("causal", [False, True], ids=["full", "causal"])
@pytest.mark.parametrize("head_dim", [64, 128, 256])
@pytest.mark.parametrize("family", FAMILIES)
def test_every_mix_of_lengths(family: str, head_dim: int, causal: bool, heads: str, lengths: Lengths) -> None:
    Call(lengths, head_dim=head_dim, causal=causal, heads=heads, family=family).check()


@pytest.mark.parametrize("family", FAMILIES)
def test_equal_lengths_are_the_dense_batch(family: str) -> None:
    """The same tiles in another order: bit for bit."""
    import cupy

    q, k, v = (cupy.random.standard_normal((4, 300, heads, 128), dtype=np.float32).astype(ml_dtypes.bfloat16) for heads in (8, 2, 2))
    starts = cupy.arange(0, 1201, 300, dtype=np.int32)
    dense = cutlass_fa.flash_attn_func(q, k, v, causal=True, family=family)
    packed = cutlass_fa.flash_attn_varlen_func(
        *(x.reshape(1200, -1, 128) for x in (q, k, v)), starts, starts, 300, 300, causal=True, family=family
    )
    assert (packed.view(np.uint16) == dense.reshape(1200, 8, 128).view(np.uint16)).all()


@pytest.mark.parametrize("family", FAMILIES)
def test_thousand_runs_are_bitwise_equal(family: str) -> None:
    import cupy

    lengths = LENGTHS[1]
    q, k, v = lengths.qkv(cupy, cupy.random.default_rng(3), (8, 2), 128, DTYPES["bf16"])
    call: dict[str, Any] = {**lengths.arrays(cupy), "causal": True, "family": family, "return_lse": True}
    first, first_lse = cutlass_fa.flash_attn_varlen_func(q, k, v, **call)
    different = cupy.zeros((), np.int64)
    for _ in range(1000):
        out, lse = cutlass_fa.flash_attn_varlen_func(q, k, v, **call)
        different += (out.view(np.uint16) != first.view(np.uint16)).sum() + (lse != first_lse).sum()
    assert int(different) == 0


@pytest.mark.parametrize("family", FAMILIES)
def test_wrong_numbers_reach_no_other_memory(family: str) -> None:
    """And with check they are refused."""
    import cupy

    q, k, v = (cupy.random.standard_normal((500, 2, 64), dtype=np.float32).astype(np.float16) for _ in range(3))
    good = cupy.array([0, 200, 500], np.int32)
    for bad in ([0, 2**30, 500], [0, -5, 500], [400, 3, 2**31 - 1], [0, 499, 2]):
        starts = cupy.array(bad, np.int32)
        cutlass_fa.flash_attn_varlen_func(q, k, v, starts, starts, family=family)
        cupy.cuda.get_current_stream().synchronize()
        with pytest.raises((errors.InvalidArgument, errors.SeqlenOverflow)):
            cutlass_fa.flash_attn_varlen_func(q, k, v, starts, good, family=family, check=True)
    out = cutlass_fa.flash_attn_varlen_func(q, k, v, good, good, family=family)
    assert bool(np.isfinite(out.astype(np.float32)).all())


@pytest.mark.parametrize("family", FAMILIES)
def test_a_captured_call_reads_new_lengths(family: str) -> None:
    """Lengths are read on the device at each replay."""
    import cupy

    q, k, v = (cupy.random.standard_normal((600, 4, 64), dtype=np.float32).astype(np.float16) for _ in range(3))
    starts = cupy.array([0, 100, 600], np.int32)
    out = cupy.empty_like(q)

    def attend() -> None:
        cutlass_fa.flash_attn_varlen_func(q, k, v, starts, starts, causal=True, out=out, family=family)

    attend()
    stream = cupy.cuda.Stream(non_blocking=True)
    with stream:
        stream.begin_capture()
        attend()
        graph = stream.end_capture()
    for middle in (1, 250, 600):
        starts[1] = middle
        expected = cutlass_fa.flash_attn_varlen_func(q, k, v, starts, starts, causal=True, family=family)
        cupy.cuda.Device().synchronize()
        graph.launch(stream)
        stream.synchronize()
        assert (out.view(np.uint16) == expected.view(np.uint16)).all()


@pytest.mark.parametrize("recompute", [False, True])
def test_memory_of_a_captured_backward_is_the_graph_s(recompute: bool) -> None:
    """Arrays that are made after the capture, as large as what the call made for itself, do not change when the graph runs."""
    import cupy

    q, k, v = (cupy.random.standard_normal((600, 4, 64), dtype=np.float32).astype(np.float16) for _ in range(3))
    starts = cupy.array([0, 100, 600], np.int32)
    out, lse = cutlass_fa.flash_attn_varlen_func(q, k, v, starts, starts, return_lse=True)
    kept: dict[str, Any] = {"recompute": True} if recompute else {"out": out, "lse": lse}
    gradients = {name: cupy.empty_like(q) for name in ("dq", "dk", "dv")}

    def differentiate() -> None:
        cutlass_fa.flash_attn_varlen_backward(q, q, k, v, starts, starts, **kept, **gradients)

    differentiate()
    expected = [gradient.copy() for gradient in gradients.values()]
    stream = cupy.cuda.Stream(non_blocking=True)
    with stream:
        stream.begin_capture()
        differentiate()
        graph = stream.end_capture()
        others = [cupy.full(size, 7, np.uint8) for size in range(1 << 10, 1 << 21, 40000)]
        graph.launch(stream)
        stream.synchronize()
    assert all(bool((other == 7).all()) for other in others)
    assert all(np.allclose(x.get(), y.get(), atol=2e-3) for x, y in zip(gradients.values(), expected, strict=True))


# ---- backward: of family fa2, on every GPU -----------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class BackwardCall(Call):
    """One backward call on packed sequences; out and lse are the forward's own."""

    deterministic: bool = False
    recompute: bool = False

    def __str__(self) -> str:
        words = (super().__str__(), "deterministic" * self.deterministic, "recompute" * self.recompute)
        return "-".join(word for word in words if word)

    def check(self) -> None:
        import cupy

        rng, (q, k, v) = self.drawn()
        dout = cupy.asarray(rng.standard_normal(q.shape, dtype=np.float32)).astype(q.dtype)
        dlse = cupy.asarray(rng.standard_normal((q.shape[1], q.shape[0]), dtype=np.float32))
        call, options = self.options()
        sequences = self.lengths.arrays(cupy)
        out, lse = cutlass_fa.flash_attn_varlen_func(q, k, v, **sequences, **call, return_lse=True)
        kept: dict[str, Any] = {"recompute": True} if self.recompute else {"out": out, "lse": lse}
        gradients = {name: poisoned(cupy, x.shape, x.dtype) for name, x in (("dq", q), ("dk", k), ("dv", v))}
        arrays = (dout, q, k, v)
        options_of_backward = {**call, **kept, **gradients, "deterministic": self.deterministic, "dlse": dlse}
        found = Gradients(*cutlass_fa.flash_attn_varlen_backward(*arrays, **sequences, **options_of_backward))
        for side, touched in ((0, (q, dout)), (1, (k, v))):
            for array in touched:
                array[cupy.asarray(~self.lengths.rows_in_use(side))] = 0
        check_backward(found, *arrays, case=self, dlse=dlse, **options, **sequences)


def covering_backward_calls() -> list[BackwardCall]:
    factors = {
        "lengths": LENGTHS,
        "dtype": ("f16", "bf16"),
        "head_dim": (64, 80, 96, 128, 192, 256),
        "causal": (False, True),
        "heads": tuple(HEADS),
        "window": ((-1, -1), (5, 70), (128, 0), (700, -1), (-1, 100)),
        "sink": (0, 4, 200),
        "softcap": (0.0, 20.0),
        "alibi": ("none", "heads", "batch"),
        "dropout_p": (0.0, 0.17),
        "order": ("bshd", "bhsd"),
        "deterministic": (False, True),
        "recompute": (False, True),
        "learnable_sink": (False, True),
        "offsets": (None, (70, 0), (0, 200), (4, 1000)),
    }
    calls = [BackwardCall(family="fa2", **chosen) for chosen in covering(factors, 2)]
    return [replace(call, sink=0) if call.window == (-1, -1) and not call.causal else call for call in calls]


@pytest.mark.parametrize("call", covering_backward_calls(), ids=str)
def test_backward(call: BackwardCall) -> None:
    call.check()


@pytest.mark.parametrize("lengths", LENGTHS, ids=str)
@pytest.mark.parametrize("heads", tuple(HEADS))
@pytest.mark.parametrize("deterministic", [False, True], ids=["atomic", "deterministic"])
@pytest.mark.parametrize("head_dim", [64, 128])
def test_backward_of_every_mix_of_lengths(head_dim: int, deterministic: bool, heads: str, lengths: Lengths) -> None:
    BackwardCall(lengths, head_dim=head_dim, causal=True, heads=heads, family="fa2", deterministic=deterministic).check()


def test_thousand_deterministic_backwards_are_bitwise_equal() -> None:
    import cupy

    lengths = LENGTHS[1]
    q, k, v = lengths.qkv(cupy, cupy.random.default_rng(3), (8, 2), 64, DTYPES["bf16"])
    dout = cupy.random.standard_normal(q.shape, dtype=np.float32).astype(q.dtype)
    call: dict[str, Any] = {**lengths.arrays(cupy), "causal": True, "deterministic": True}
    out, lse = cutlass_fa.flash_attn_varlen_func(q, k, v, **lengths.arrays(cupy), causal=True, return_lse=True)
    first = cutlass_fa.flash_attn_varlen_backward(dout, q, k, v, out=out, lse=lse, **call)
    different = cupy.zeros((), np.int64)
    for _ in range(1000):
        again = cutlass_fa.flash_attn_varlen_backward(dout, q, k, v, out=out, lse=lse, **call)
        different += sum((x.view(np.uint16) != y.view(np.uint16)).sum() for x, y in zip(again, first, strict=True))
    assert int(different) == 0
