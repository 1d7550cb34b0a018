"""The forward on a GPU, by the test rule (numerics.py) against float64."""

from __future__ import annotations

import threading
from dataclasses import dataclass
from typing import Any

import ml_dtypes
import numpy as np
import pytest

import cutlass_fa
from cutlass_fa import Persistent, errors
from tests.numerics import SEQLEN_PAIRS, check_forward, poisoned, random_qkv

pytestmark = pytest.mark.gpu

DTYPES = {"f16": np.dtype(np.float16), "bf16": np.dtype(ml_dtypes.bfloat16)}
HEADS = {"mha": (2, 2), "gqa4": (8, 2), "mqa": (3, 1), "gqa5": (10, 2), "gqa64": (64, 1)}


@dataclass(frozen=True)
class Case:
    """One call: shapes, dtype, mask, memory order."""

    dtype: str
    head_dim: int
    causal: bool
    heads: str = "mha"
    seqlens: tuple[int, int] = (113, 203)
    order: str = "bshd"
    batch: int = 2
    extra_strides: bool = False

    def __str__(self) -> str:
        mask = "causal" if self.causal else "full"
        return (
            f"{self.dtype}-d{self.head_dim}-{mask}-{self.heads}-{self.seqlens[0]}x{self.seqlens[1]}-{self.order}"
            + "-strided" * self.extra_strides
        )

    def arrays(self, seed: int | None = None) -> tuple[Any, Any, Any]:
        import cupy

        rng = cupy.random.default_rng(np.random.SeedSequence(seed).generate_state(1)[0])
        num_heads_q, num_heads_kv = HEADS[self.heads]
        return random_qkv(
            cupy,
            rng,
            batch=self.batch,
            seqlen_q=self.seqlens[0],
            seqlen_k=self.seqlens[1],
            num_heads_q=num_heads_q,
            num_heads_kv=num_heads_kv,
            head_dim=self.head_dim,
            dtype=DTYPES[self.dtype],
            memory_order=self.order,
            extra_strides=self.extra_strides,
        )

    def poisoned_out(self, q: Any) -> Any:
        import cupy

        if self.order == "bshd":
            return poisoned(cupy, q.shape, q.dtype)
        batch, seqlen, heads, head_dim = q.shape
        return poisoned(cupy, (batch, heads, seqlen, head_dim), q.dtype).swapaxes(1, 2)


def check(case: Case, **options: Any) -> None:
    q, k, v = case.arrays()
    out, lse = cutlass_fa.flash_attn_func(q, k, v, causal=case.causal, out=case.poisoned_out(q), return_lse=True, **options)
    scale = {"softmax_scale": options["softmax_scale"]} if "softmax_scale" in options else {}
    check_forward(out, lse, q, k, v, case=case, causal=case.causal, **scale)


@pytest.mark.parametrize("order", ["bshd", "bhsd"])
@pytest.mark.parametrize("seqlens", SEQLEN_PAIRS, ids=lambda p: f"{p[0]}x{p[1]}")
@pytest.mark.parametrize("heads", ["mha", "gqa4", "mqa"])
@pytest.mark.parametrize("causal", [False, True], ids=["full", "causal"])
@pytest.mark.parametrize("head_dim", [64, 80, 96, 128, 192, 256])
@pytest.mark.parametrize("dtype", list(DTYPES))
def test_forward(dtype: str, head_dim: int, causal: bool, heads: str, seqlens: tuple[int, int], order: str) -> None:
    check(Case(dtype, head_dim, causal, heads, seqlens, order))


@pytest.mark.parametrize("causal", [False, True], ids=["full", "causal"])
@pytest.mark.parametrize("head_dim", range(8, 257, 8))
def test_every_head_dim(head_dim: int, causal: bool) -> None:
    check(Case("bf16", head_dim, causal, "gqa4", (239, 321), extra_strides=True))


@pytest.mark.parametrize("seqlens", [(1, 300), (2, 2), (5, 513), (63, 200), (130, 400), (200, 70)], ids=lambda p: f"{p[0]}x{p[1]}")
@pytest.mark.parametrize("heads", ["gqa4", "mqa", "gqa5", "gqa64"])
@pytest.mark.parametrize("causal", [False, True], ids=["full", "causal"])
@pytest.mark.parametrize("head_dim", [64, 72, 128, 256])
def test_packed_heads(head_dim: int, causal: bool, heads: str, seqlens: tuple[int, int]) -> None:
    """Short queries: the heads of a group share tiles (a ratio of 5 leaves rows of the tile without a query)."""
    for order in ("bshd", "bhsd"):
        check(Case("bf16", head_dim, causal, heads, seqlens, order))


@pytest.mark.parametrize("order", ["bshd", "bhsd"])
@pytest.mark.parametrize("dtype", list(DTYPES))
def test_strided_inputs(dtype: str, order: str) -> None:
    check(Case(dtype, 128, True, "gqa4", (301, 517), order, extra_strides=True))


@pytest.mark.parametrize("scale", [0.01, 1.0, 3.5])
def test_softmax_scale(scale: float) -> None:
    check(Case("bf16", 64, True, seqlens=(200, 300)), softmax_scale=scale)


@pytest.mark.parametrize("causal", [False, True], ids=["full", "causal"])
@pytest.mark.parametrize("num_sms", [1, 7, 0])
def test_persistent(num_sms: int, causal: bool) -> None:
    """Few CTAs walk many tiles, some of them without keys (seqlen_q > seqlen_k)."""
    check(Case("bf16", 128, causal, "gqa4", (1100, 300)), persistent=Persistent(num_sms))
    check(Case("f16", 64, causal, "gqa4", (700, 900)), persistent=Persistent(num_sms))


def test_more_queries_than_keys_gives_empty_rows() -> None:
    q, k, v = Case("bf16", 128, True, seqlens=(300, 40)).arrays()
    out, lse = cutlass_fa.flash_attn_func(q, k, v, causal=True, return_lse=True)
    assert not out[:, :260].any() and np.isneginf(lse[:, :, :260].get()).all()
    assert np.isfinite(lse[:, :, 260:].get()).all()


def test_large_scores() -> None:
    """Scores far outside exp's range: the running maximum must carry them."""
    q, k, v = Case("bf16", 128, False, seqlens=(128, 600)).arrays()
    q, k = (q.astype(np.float32) * 40).astype(q.dtype), (k.astype(np.float32) * 40).astype(k.dtype)
    out, lse = cutlass_fa.flash_attn_func(q, k, v, return_lse=True)
    check_forward(out, lse, q, k, v, case="large scores", causal=False)


def test_default_out_and_lse_only_on_request() -> None:
    q, k, v = Case("bf16", 128, True).arrays()
    out = cutlass_fa.flash_attn_func(q, k, v, causal=True)
    assert out.flags.c_contiguous and out.shape == q.shape and out.dtype == q.dtype
    check_forward(out, None, q, k, v, case="fresh out", causal=True)


@pytest.mark.parametrize("head_dim", [64, 72, 256])
def test_nothing_outside_out_is_written(head_dim: int) -> None:
    """out is a window of a larger buffer in every dimension; the frame around it keeps its bits."""
    import cupy

    q, k, v = Case("bf16", head_dim, True, seqlens=(77, 150)).arrays()
    frame = cupy.full((4, 77 + 30, 4, head_dim + 16), 7, np.uint16)
    inside = (slice(1, 3), slice(10, 87), slice(1, 3), slice(8, 8 + head_dim))
    expected = frame.copy()
    out = frame.view(q.dtype)[inside]
    cutlass_fa.flash_attn_func(q, k, v, causal=True, out=out)
    check_forward(out, None, q, k, v, case=f"framed d{head_dim}", causal=True)
    frame[inside] = 7
    assert (frame == expected).all()


def test_keys_after_the_end_are_never_used() -> None:
    """k and v are views of buffers that hold NaN after seqlen_k."""
    import cupy

    case = Case("bf16", 128, False, seqlens=(130, 300))
    q, k, v = case.arrays()
    long_k, long_v = (poisoned(cupy, (2, 400, 2, 128), q.dtype) for _ in range(2))
    long_k[:, :300], long_v[:, :300] = k, v
    out, lse = cutlass_fa.flash_attn_func(q, long_k[:, :300], long_v[:, :300], return_lse=True)
    check_forward(out, lse, q, k, v, case=case, causal=False)


def test_broadcast_keys() -> None:
    """One k and v for all sequences of the batch, by a stride of 0."""
    import cupy

    q, k, v = Case("f16", 64, True, seqlens=(100, 100)).arrays()
    k, v = (cupy.broadcast_to(x[:1], x.shape) for x in (k, v))
    out, lse = cutlass_fa.flash_attn_func(q, k, v, causal=True, return_lse=True)
    check_forward(out, lse, q, k, v, case="broadcast", causal=True)


def test_offsets_beyond_32_bits() -> None:
    """Sequences 2^31 elements apart, inputs and output in one 13 GB buffer."""
    import cupy

    apart = 2**31
    small = Case("bf16", 64, True, seqlens=(130, 130)).arrays()
    buffer = cupy.empty(apart + 2**20, np.uint16).view(small[0].dtype)
    strides = (apart * 2, 2 * 64 * 2, 64 * 2, 2)
    views = [cupy.ndarray(small[0].shape, small[0].dtype, buffer.data + offset * 2, strides=strides) for offset in (0, 2**17, 2**18, 2**19)]
    for view, values in zip(views[:3], small, strict=True):
        view[...] = values
    views[3][...] = np.nan
    cutlass_fa.flash_attn_func(*views[:3], causal=True, out=views[3])
    check_forward(views[3], None, *small, case="64-bit offsets", causal=True)


def test_runs_on_the_current_stream() -> None:
    """The inputs are written late on a side stream: a launch anywhere else would read what was there before."""
    import cupy

    case = Case("bf16", 128, False, seqlens=(512, 512))
    q, k, v = case.arrays()
    late = [cupy.zeros_like(x) for x in (q, k, v)]
    busy = cupy.ones((4096, 4096), np.float32)
    cutlass_fa.flash_attn_func(*late)
    stream = cupy.cuda.Stream(non_blocking=True)
    cupy.cuda.Device().synchronize()
    with stream:
        for _ in range(20):
            busy = busy @ busy * 1e-4
        for target, source in zip(late, (q, k, v), strict=True):
            target[...] = source
        out = cutlass_fa.flash_attn_func(*late)
    stream.synchronize()
    check_forward(out, None, q, k, v, case=case, causal=False)


def test_cuda_graph_replays_with_new_inputs() -> None:
    import cupy

    case = Case("bf16", 128, True, "gqa4", seqlens=(300, 400))
    q, k, v = case.arrays()
    out = case.poisoned_out(q)
    stream = cupy.cuda.Stream(non_blocking=True)
    with stream:
        cutlass_fa.flash_attn_func(q, k, v, causal=True, out=out)  # compile and load before the capture
        stream.begin_capture()
        cutlass_fa.flash_attn_func(q, k, v, causal=True, out=out)
        graph = stream.end_capture()
        for _ in range(3):
            for target, source in zip((q, k, v), case.arrays(), strict=True):
                target[...] = source
            out[...] = np.nan
            graph.launch(stream)
            stream.synchronize()
            check_forward(out, None, q, k, v, case=case, causal=True)


def test_threads_share_a_plan() -> None:
    """Eight threads launch the same shape on their own arrays and streams."""
    import cupy

    case = Case("bf16", 64, True, seqlens=(256, 256))
    inputs = [case.arrays() for _ in range(8)]
    outs: list[Any] = [None] * 8

    def work(i: int) -> None:
        with cupy.cuda.Stream(non_blocking=True) as stream:
            for _ in range(50):
                outs[i] = cutlass_fa.flash_attn_func(*inputs[i], causal=True)
            stream.synchronize()

    cupy.cuda.Device().synchronize()
    threads = [threading.Thread(target=work, args=(i,)) for i in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    for out, arrays in zip(outs, inputs, strict=True):
        check_forward(out, None, *arrays, case=case, causal=True)


@pytest.mark.parametrize("dtype", ["float16", "bfloat16"])
def test_torch_tensors(dtype: str) -> None:
    torch = pytest.importorskip("torch")
    import cupy

    q, k, v = (torch.randn(2, 130, heads, 128, device="cuda", dtype=getattr(torch, dtype)) for heads in (8, 2, 2))
    out, lse = cutlass_fa.flash_attn_func(q, k, v, causal=True, return_lse=True)
    assert isinstance(out, torch.Tensor) and out.dtype == q.dtype and lse.dtype == torch.float32
    torch.cuda.synchronize()
    check_forward(*(cupy.from_dlpack(x) for x in (out, lse, q, k, v)), case=f"torch {dtype}", causal=True)


@pytest.mark.parametrize(
    "case",
    [Case("bf16", 128, True, "gqa4", (640, 1000)), Case("f16", 64, False, "mha", (1000, 1000)), Case("bf16", 256, True, "mqa", (500, 700))],
    ids=str,
)
def test_thousand_runs_are_bitwise_equal(case: Case) -> None:
    assert_repeats_bitwise(case, 1000)


def assert_repeats_bitwise(case: Case, repetitions: int) -> None:
    """Every repetition gives the bits of the first, which are checked."""
    import cupy

    q, k, v = case.arrays()
    first, first_lse = cutlass_fa.flash_attn_func(q, k, v, causal=case.causal, return_lse=True)
    check_forward(first, first_lse, q, k, v, case=case, causal=case.causal)
    out, different = case.poisoned_out(q), cupy.zeros((), np.int64)
    for _ in range(repetitions):
        out.fill(np.nan)
        _, lse = cutlass_fa.flash_attn_func(q, k, v, causal=case.causal, return_lse=True, out=out)
        different += (out.view(np.uint16) != first.view(np.uint16)).sum() + (lse != first_lse).sum()
    assert int(different) == 0


def keep_busy(stop: threading.Event) -> None:
    """Launch unrelated kernels of changing size on another stream, until told to stop."""
    import cupy

    with cupy.cuda.Stream(non_blocking=True) as stream:
        arrays = [cupy.ones((size, size), np.float32) for size in (64, 700, 1500)]
        while not stop.is_set():
            for array in arrays:
                cupy.matmul(array, array)
            stream.synchronize()


@pytest.mark.parametrize("case", [Case("bf16", 64, True, "mha", (1000, 1000)), Case("bf16", 128, False, "gqa4", (640, 700))], ids=str)
def test_ten_thousand_runs_beside_a_busy_stream(case: Case) -> None:
    """Multiprocessors come and go while the persistent kernels run: a race in the schedule or in the rings shows here."""
    stop = threading.Event()
    busy = threading.Thread(target=keep_busy, args=(stop,))
    busy.start()
    try:
        assert_repeats_bitwise(case, 10_000)
    finally:
        stop.set()
        busy.join()


# ---- refusals: the right error, and nothing launched -----------------------------------------------------------------------------------


def test_refusals_launch_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    import cupy

    monkeypatch.setattr("cutlass_fa.launches.fa3_fwd.Fa3FwdPlan.run", lambda *_: pytest.fail("launched"))
    q, k, v = Case("f16", 64, False).arrays()
    flat = cupy.zeros(q.size + 1, np.float16)[1:].reshape(q.shape)
    attend = cutlass_fa.flash_attn_func
    for arrays, error in (
        ((q[0], k, v), errors.InvalidArgument),
        ((q, k[:, :, :1], v), errors.InvalidArgument),
        ((cupy.concatenate([q, q, q[:, :, :1]], 2), k, v), errors.InvalidGqaRatio),
        (tuple(cupy.zeros((1, 8, 2, d), np.float16) for d in (100, 100, 100)), errors.UnsupportedHeadDim),
        (tuple(cupy.zeros((1, 8, 2, d), np.float16) for d in (264, 264, 264)), errors.UnsupportedHeadDim),
        (tuple(x.astype(np.float32) for x in (q, k, v)), errors.UnsupportedDtype),
        (tuple(x.get() for x in (q, k, v)), errors.InvalidArgument),
        ((q, k.get(), v), errors.InvalidArgument),
        ((q[:0], k[:0], v[:0]), errors.EmptyBatch),
        ((q[:, :0], k, v), errors.ZeroSeqlen),
        ((q, k[:, :0], v[:, :0]), errors.ZeroSeqlen),
        (tuple(cupy.zeros((1, 8, 2, 128), np.float16)[..., ::2] for _ in range(3)), errors.InvalidArgument),
        ((flat, k, v), errors.InvalidArgument),
    ):
        with pytest.raises(error):
            attend(*arrays)
    for out in (q[:1], q.astype(np.float32), q.get(), flat):
        with pytest.raises(errors.InvalidArgument):
            attend(q, k, v, out=out)
    for slopes in (cupy.zeros(3, np.float32), cupy.zeros(2, np.float16), cupy.zeros(4, np.float32)[::2], np.zeros(2, np.float32)):
        with pytest.raises(errors.InvalidArgument, match="alibi_slopes"):
            attend(q, k, v, alibi_slopes=slopes)
    for sinks in (cupy.zeros(3, np.float32), cupy.zeros(2, np.float16), cupy.zeros((1, 2), np.float32), np.zeros(2, np.float32)):
        with pytest.raises(errors.InvalidArgument, match="learnable_sink"):
            attend(q, k, v, learnable_sink=sinks)
    with pytest.raises(errors.UnsupportedCell, match="not built yet"):
        attend(q, k, v, dropout_p=0.1, family="fa3")
