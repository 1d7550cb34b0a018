"""The forward of family fa2 on a GPU, which every GPU from sm_80 on runs, and softcap in both families; by the test rule."""

from __future__ import annotations

from dataclasses import dataclass, replace
from itertools import product
from typing import Any

import numpy as np
import pytest

import cutlass_fa
from cutlass_fa import Grid, Persistent, errors
from cutlass_fa.device import device_info
from cutlass_fa.dropout import dropout_mask
from tests.numerics import SEQLEN_PAIRS, check_forward, poisoned
from tests.test_gpu_forward import DTYPES, HEADS, Case

pytestmark = pytest.mark.gpu

HEAD_DIMS = (64, 80, 96, 128, 192, 256)


@dataclass(frozen=True)
class Features:
    """What a call asks for besides its case."""

    softcap: float = 0.0
    dropout_p: float = 0.0
    seed: int = 0x0123_4567_89AB_CDEF
    offset: int = (5 << 32) + 3

    def __str__(self) -> str:
        return f"softcap{self.softcap:g}-dropout{self.dropout_p:g}"

    def arguments(self) -> dict[str, Any]:
        return {"softcap": self.softcap, "dropout_p": self.dropout_p, "dropout_seed": self.seed, "dropout_offset": self.offset}

    def expected(self, case: Case) -> dict[str, Any]:
        """The reference's arguments."""
        if not self.dropout_p:
            return {"softcap": self.softcap}
        import cupy

        mask = dropout_mask(self.seed, self.offset, self.dropout_p, case.batch, HEADS[case.heads][0], *case.seqlens, xp=cupy)
        return {"softcap": self.softcap, "dropout_p": self.dropout_p, "dropout_mask": mask}


FEATURES = (Features(), Features(softcap=30.0), Features(dropout_p=0.17), Features(softcap=30.0, dropout_p=0.17))
PLAIN = FEATURES[0]


def call(case: Case, arrays: tuple[Any, Any, Any], features: Features = PLAIN, **options: Any) -> tuple[Any, Any]:
    out = options.pop("out", None)
    out = case.poisoned_out(arrays[0]) if out is None else out
    arguments = {"family": "fa2", **features.arguments(), **options}
    return cutlass_fa.flash_attn_func(*arrays, causal=case.causal, out=out, return_lse=True, **arguments)


def check(case: Case, features: Features = PLAIN, **options: Any) -> None:
    arrays = case.arrays()
    out, lse = call(case, arrays, features, **options)
    scale = {"softmax_scale": options["softmax_scale"]} if "softmax_scale" in options else {}
    check_forward(out, lse, *arrays, case=f"{case} {features}", causal=case.causal, **features.expected(case), **scale)


def covering_cases() -> list[Any]:
    """Every dtype, head_dim, mask, head layout and pair of lengths, with features and a memory order so drawn that every two of all these
    meet."""
    factors = (list(DTYPES), HEAD_DIMS, (False, True), ("mha", "gqa4", "mqa"), SEQLEN_PAIRS)
    cases = []
    for indices in product(*(range(len(factor)) for factor in factors)):
        dtype, head_dim, causal, heads, seqlens = (factor[i] for factor, i in zip(factors, indices, strict=True))
        features = FEATURES[sum(indices) % len(FEATURES)]
        case = Case(dtype, head_dim, causal, heads, seqlens, ("bshd", "bhsd")[sum(indices) // len(FEATURES) % 2])
        cases.append(pytest.param(case, features, id=f"{case}-{features}"))
    return cases


@pytest.mark.parametrize(("case", "features"), covering_cases())
def test_forward(case: Case, features: Features) -> None:
    check(case, features)


@pytest.mark.parametrize("features", FEATURES[1:], ids=str)
@pytest.mark.parametrize("causal", [False, True], ids=["full", "causal"])
@pytest.mark.parametrize("head_dim", HEAD_DIMS)
@pytest.mark.parametrize("dtype", list(DTYPES))
def test_features(dtype: str, head_dim: int, causal: bool, features: Features) -> None:
    check(Case(dtype, head_dim, causal, "gqa4", (233, 331)), features)


@pytest.mark.parametrize("causal", [False, True], ids=["full", "causal"])
@pytest.mark.parametrize("head_dim", range(8, 257, 8))
def test_every_head_dim(head_dim: int, causal: bool) -> None:
    check(Case("bf16", head_dim, causal, "gqa4", (239, 321), extra_strides=True), FEATURES[head_dim // 8 % 4])


@pytest.mark.parametrize("order", ["bshd", "bhsd"])
@pytest.mark.parametrize("dtype", list(DTYPES))
def test_strided_inputs(dtype: str, order: str) -> None:
    check(Case(dtype, 128, True, "gqa4", (301, 517), order, extra_strides=True))


@pytest.mark.parametrize("scale", [0.01, 1.0, 3.5])
@pytest.mark.parametrize("features", FEATURES[:2], ids=str)
def test_softmax_scale(scale: float, features: Features) -> None:
    check(Case("bf16", 64, True, seqlens=(200, 300)), features, softmax_scale=scale)


@pytest.mark.parametrize("head_dim", [64, 128, 256])
def test_more_queries_than_keys_gives_empty_rows(head_dim: int) -> None:
    case = Case("bf16", head_dim, True, seqlens=(300, 40))
    out, lse = call(case, case.arrays())
    assert not out[:, :260].any() and np.isneginf(lse[:, :, :260].get()).all()
    assert np.isfinite(lse[:, :, 260:].get()).all()


@pytest.mark.parametrize("head_dim", [64, 128])
def test_large_scores(head_dim: int) -> None:
    """Scores far outside exp's range: the rows' origins must carry them."""
    case = Case("bf16", head_dim, False, seqlens=(128, 600))
    q, k, v = case.arrays()
    q, k = (q.astype(np.float32) * 40).astype(q.dtype), (k.astype(np.float32) * 40).astype(k.dtype)
    out, lse = call(case, (q, k, v))
    check_forward(out, lse, q, k, v, case="large scores", causal=False)


@pytest.mark.parametrize("head_dim", [64, 72, 256])
def test_nothing_outside_out_is_written(head_dim: int) -> None:
    """out is a window of a larger buffer in every dimension; the frame around it keeps its bits."""
    import cupy

    case = Case("bf16", head_dim, True, seqlens=(77, 150))
    q, k, v = case.arrays()
    frame = cupy.full((4, 77 + 30, 4, head_dim + 16), 7, np.uint16)
    inside = (slice(1, 3), slice(10, 87), slice(1, 3), slice(8, 8 + head_dim))
    expected = frame.copy()
    out = frame.view(q.dtype)[inside]
    call(case, (q, k, v), out=out)
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
    out, lse = call(case, (q, long_k[:, :300], long_v[:, :300]))
    check_forward(out, lse, q, k, v, case=case, causal=False)


def test_broadcast_keys() -> None:
    """One k and v for all sequences of the batch, by a stride of 0."""
    import cupy

    case = Case("f16", 64, True, seqlens=(100, 100))
    q, k, v = case.arrays()
    k, v = (cupy.broadcast_to(x[:1], x.shape) for x in (k, v))
    out, lse = call(case, (q, k, v))
    check_forward(out, lse, q, k, v, case="broadcast", causal=True)


def test_offsets_beyond_32_bits() -> None:
    """Sequences 2^31 elements apart, inputs and output in one 13 GB buffer."""
    import cupy

    apart = 2**31
    case = Case("bf16", 64, True, seqlens=(130, 130))
    small = case.arrays()
    buffer = cupy.empty(apart + 2**20, np.uint16).view(small[0].dtype)
    strides = (apart * 2, 2 * 64 * 2, 64 * 2, 2)
    views = [cupy.ndarray(small[0].shape, small[0].dtype, buffer.data + offset * 2, strides=strides) for offset in (0, 2**17, 2**18, 2**19)]
    for view, values in zip(views[:3], small, strict=True):
        view[...] = values
    views[3][...] = np.nan
    call(case, tuple(views[:3]), out=views[3])
    check_forward(views[3], None, *small, case="64-bit offsets", causal=True)


# ---- dropout, element by element -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("seed", "offset"), [(0, 0), (2**64 - 1, 2**64 - 1), (1 << 40, 7), (12345, 9 << 32)])
@pytest.mark.parametrize("p", [0.1, 0.5, 0.93])
@pytest.mark.parametrize("head_dim", HEAD_DIMS)
def test_dropout_mask_is_exact(head_dim: int, p: float, seed: int, offset: int) -> None:
    """q = 0 makes all probabilities equal, and v, the unit matrix in some of the keys, shows what became of each."""
    import cupy

    batch, seqlen_q, seqlen_k, heads = 2, 150, head_dim + 70, 3
    q, k = (cupy.zeros((batch, seqlen, heads, head_dim), np.float16) for seqlen in (seqlen_q, seqlen_k))
    expected = dropout_mask(seed, offset, p, batch, heads, seqlen_q, seqlen_k, xp=cupy)
    for first in (0, 70):
        v = cupy.zeros_like(k)
        v[:, first : first + head_dim] = cupy.eye(head_dim, dtype=np.float16)[:, None] * 256
        out = cutlass_fa.flash_attn_func(q, k, v, dropout_p=p, dropout_seed=seed, dropout_offset=offset, family="fa2")
        kept = out.transpose(0, 2, 1, 3) != 0
        assert (kept == expected[:, :, :, first : first + head_dim]).all()
        assert cupy.allclose(out.max(), 256 / seqlen_k / (1 - p), rtol=2e-3)


def test_a_new_seed_needs_no_new_kernel_and_no_new_plan() -> None:
    from cutlass_fa import api

    case = Case("bf16", 64, False)
    arrays, features = case.arrays(), Features(dropout_p=0.5)
    first, lse = call(case, arrays, features)
    plans = len(api._plans)
    second, same_lse = call(case, arrays, replace(features, seed=features.seed + 1))
    again, _ = call(case, arrays, features)
    assert len(api._plans) == plans and (lse == same_lse).all()
    assert (first.view(np.uint16) == again.view(np.uint16)).all() and (first != second).any()


def test_dropout_on_any_gpu_uses_this_family() -> None:
    case = Case("bf16", 128, True)
    features = Features(dropout_p=0.17)
    check(case, features, family=None)


# ---- repeatability and refusals --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("case", "features"),
    [
        (Case("bf16", 128, True, "gqa4", (640, 1000)), PLAIN),
        (Case("f16", 64, False, "mha", (1000, 1000)), FEATURES[3]),
        (Case("bf16", 256, True, "mqa", (500, 700)), FEATURES[2]),
    ],
    ids=str,
)
def test_thousand_runs_are_bitwise_equal(case: Case, features: Features) -> None:
    import cupy

    arrays = case.arrays()
    first, first_lse = call(case, arrays, features)
    check_forward(first, first_lse, *arrays, case=case, causal=case.causal, **features.expected(case))
    out, different = case.poisoned_out(arrays[0]), cupy.zeros((), np.int64)
    for _ in range(1000):
        out.fill(np.nan)
        _, lse = call(case, arrays, features, out=out)
        different += (out.view(np.uint16) != first.view(np.uint16)).sum() + (lse != first_lse).sum()
    assert int(different) == 0


def test_refusals() -> None:
    case = Case("f16", 64, False)
    arrays = case.arrays()
    for options, error in (
        ({"persistent": Persistent(7)}, errors.InvalidArgument),
        ({"family": "fa4"}, errors.InvalidArgument),
        ({"softcap": -1.0}, errors.InvalidArgument),
        ({"dropout_p": 1.0}, errors.InvalidArgument),
        ({"dropout_p": 0.1, "dropout_seed": -1}, errors.InvalidArgument),
        ({"dropout_p": 0.1, "dropout_offset": 1 << 64}, errors.InvalidArgument),
    ):
        with pytest.raises(error):
            call(case, arrays, **options)
    call(case, arrays, persistent=Grid())
    if device_info(0).arch == "sm_90a":
        with pytest.raises(errors.UnsupportedCell, match="dropout is not built yet"):
            call(case, arrays, Features(dropout_p=0.1), family="fa3")


# ---- softcap of the Hopper family ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("softcap", [5.0, 30.0])
@pytest.mark.parametrize("seqlens", [(1, 300), (113, 203), (384, 256), (1023, 1024)], ids=lambda p: f"{p[0]}x{p[1]}")
@pytest.mark.parametrize("causal", [False, True], ids=["full", "causal"])
@pytest.mark.parametrize("head_dim", HEAD_DIMS)
@pytest.mark.parametrize("dtype", list(DTYPES))
def test_softcap_of_the_hopper_family(dtype: str, head_dim: int, causal: bool, seqlens: tuple[int, int], softcap: float) -> None:
    if device_info(0).arch != "sm_90a":
        pytest.skip("family fa3 needs sm_90a")
    check(Case(dtype, head_dim, causal, "gqa4", seqlens), Features(softcap=softcap), family="fa3")
