"""Offsets, float32 results and their merging on a GPU: random parts of the keys against float64 over all of them, forward and backward."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

import cutlass_fa
from cutlass_fa import errors
from cutlass_fa.device import device_info
from cutlass_fa.reference import Gradients, attention_forward
from tests.covering import covering
from tests.numerics import check_backward, poisoned, random_array
from tests.part_cases import PartCase, check_merged, merged

pytestmark = pytest.mark.gpu

FAMILIES = ("fa2", "fa3")
HEADS = {"mha": (2, 1), "gqa4": (2, 4), "mqa": (1, 3)}  # key heads, query heads of each
SEQLENS = ((1, 1000), (64, 700), (239, 130), (300, 2048), (1023, 1024), (2048, 512))


def needs(family: str) -> None:
    if family == "fa3" and device_info(0).arch != "sm_90a":
        pytest.skip("family fa3 needs sm_90a")


def random_case(rng: np.random.Generator, chosen: dict[str, Any]) -> PartCase:
    """A case of the chosen factors: up to five parts, and queries anywhere from before the first key to far after the last."""
    seqlen_q, seqlen_k = chosen["seqlens"]
    k_offset = int(rng.integers(0, 400))
    last = {"end": seqlen_k, "inside": seqlen_k // 2, "before": 0, "after": seqlen_k + seqlen_q + 300}[chosen["place"]]
    q_offset = max(0, k_offset + last - seqlen_q)
    cuts = np.unique(rng.integers(1, seqlen_k, rng.integers(1, 5))).tolist()
    groups, ratio = HEADS[chosen["heads"]]
    masks = {name: chosen[name] for name in ("causal", "window", "sinks", "alibi")}
    if not masks["causal"] and masks["window"] == (-1, -1):
        masks["sinks"] = 0  # refused: every key is visible
    return PartCase((seqlen_q, seqlen_k), q_offset, k_offset, tuple(cuts), batch=2, groups=groups, ratio=ratio, **masks)


MASKS = {
    "causal": (False, True),
    "window": ((-1, -1), (0, 0), (128, 40), (700, 0), (-1, 33)),
    "sinks": (0, 3, 500),
    "alibi": (False, True),
    "heads": tuple(HEADS),
    "seqlens": SEQLENS,
    "place": ("end", "inside", "before", "after"),
    "head_dim": (64, 80, 96, 128, 192, 256),
    "dtype": ("bf16", "f16"),
}


def forward_cases() -> list[Any]:
    rng = np.random.default_rng(11)
    chosen = covering({"family": FAMILIES, **MASKS}, 2)
    return [pytest.param(random_case(rng, each), each["family"], each["dtype"], each["head_dim"]) for each in chosen]


@pytest.mark.parametrize(("case", "family", "dtype", "head_dim"), forward_cases(), ids=str)
def test_parts_merged_are_the_whole(case: PartCase, family: str, dtype: str, head_dim: int) -> None:
    import cupy

    needs(family)
    q, k, v = case.arrays(cupy, cupy.random.default_rng(), dtype, head_dim)

    def attend(k: Any, v: Any, **offsets: int) -> tuple[Any, Any]:
        options = {"causal": case.causal, **case.options(cupy), **offsets}
        out = poisoned(cupy, q.shape, np.float32)
        return cutlass_fa.flash_attn_func(q, k, v, out=out, out_dtype="float32", return_lse=True, family=family, **options)

    check_merged(*merged(case, k, v, attend), q, k, v, case, **case.whole(cupy))


@pytest.mark.parametrize("head_dim", range(8, 257, 8))
@pytest.mark.parametrize("family", FAMILIES)
def test_float32_results_of_every_head_dim(family: str, head_dim: int) -> None:
    """Into a strided out, whose frame stays as it was."""
    import cupy

    needs(family)
    case = PartCase((130, 200), 70, 0, (), causal=True)
    q, k, v = case.arrays(cupy, cupy.random.default_rng(), "bf16", head_dim)
    frame = poisoned(cupy, (*q.shape[:-1], head_dim + 8), np.float32)
    options = {"causal": True, "out": frame[..., 4:-4], "out_dtype": np.float32, "return_lse": True, "family": family}
    out, lse = cutlass_fa.flash_attn_func(q, k, v, **options)
    check_merged(out, lse, q, k, v, f"{family} head_dim {head_dim}", causal=True)
    assert bool(cupy.isnan(frame[..., :4]).all()) and bool(cupy.isnan(frame[..., -4:]).all())


@pytest.mark.parametrize("gqa_ratio", [1, 4, 5])
@pytest.mark.parametrize("family", FAMILIES)
def test_a_part_in_the_future_is_never_loaded(family: str, gqa_ratio: int) -> None:
    """Its keys are NaN, and so is the out of a part that sees none before it is written: the merge is the other part, bit by bit."""
    import cupy

    needs(family)
    case = PartCase((40, 300), 0, 0, (), causal=True, batch=2, ratio=gqa_ratio)
    q, k, v = case.arrays(cupy, cupy.random.default_rng(), "bf16", 128)
    options = {"causal": True, "q_offset": 2**30, "out_dtype": "float32", "return_lse": True, "family": family}
    past = cutlass_fa.flash_attn_func(q, k, v, **options)
    check_merged(*past, q, k, v, "past")
    k[...] = v[...] = np.nan
    future = cutlass_fa.flash_attn_func(q, k, v, k_offset=2**31 - 5000, **options)
    assert not bool(future[0].any()) and bool(cupy.isneginf(future[1]).all())
    both = cutlass_fa.merge_attention_states(*future, *past)
    assert bool((both[0] == past[0]).all()) and bool((both[1] == past[1]).all())


def test_torch_tensors() -> None:
    torch = pytest.importorskip("torch")
    q, k, v = (torch.randn(2, 300, 4, 64, device="cuda", dtype=torch.bfloat16) for _ in range(3))
    options = {"causal": True, "return_lse": True}
    out, lse = cutlass_fa.flash_attn_func(q, k, v, **options)
    parts = [
        cutlass_fa.flash_attn_func(q, k[:, a:b], v[:, a:b], q_offset=0, k_offset=a, out_dtype=torch.float32, **options)
        for a, b in ((0, 100), (100, 300))
    ]
    merged_out, merged_lse = cutlass_fa.merge_attention_states(*parts[0], *parts[1])
    assert merged_out.dtype == torch.float32 and torch.allclose(merged_lse, lse, atol=1e-4)
    assert torch.allclose(merged_out, out.float(), atol=0.02)
    with pytest.raises(errors.InvalidArgument, match="q_offset is a Tensor"):
        cutlass_fa.flash_attn_func(q, k, v, q_offset=torch.zeros(2, dtype=torch.int32), **options)


# ---- backward: of family fa2, on every GPU ---------------------------------------------------------------------------------------------


def backward_cases() -> list[Any]:
    rng = np.random.default_rng(12)
    chosen = covering({"deterministic": (False, True), **MASKS}, 2, seed=1)
    return [pytest.param(random_case(rng, each), each["deterministic"], each["dtype"], each["head_dim"]) for each in chosen]


@pytest.mark.parametrize(("case", "deterministic", "dtype", "head_dim"), backward_cases(), ids=str)
def test_gradients_of_parts_are_those_of_the_whole(case: PartCase, deterministic: bool, dtype: str, head_dim: int) -> None:
    """As a ring of GPUs computes them: every part with the lse and the out of all keys."""
    import cupy

    rng = cupy.random.default_rng()
    q, k, v = case.arrays(cupy, rng, dtype, head_dim)
    dout, options = random_array(cupy, rng, q.shape, q.dtype), case.whole(cupy)
    exact_out, exact_lse = attention_forward(q, k, v, **options)
    out, lse = exact_out.astype(np.float32).astype(q.dtype), exact_lse.astype(np.float32)
    dq, dk, dv = cupy.zeros(q.shape), poisoned(cupy, k.shape, k.dtype), poisoned(cupy, v.shape, v.dtype)
    for part in case.parts:
        passed = {"causal": case.causal, "q_offset": case.q_offset, "k_offset": case.k_offset + part.start, **case.options(cupy)}
        passed |= {"deterministic": deterministic, "dk": dk[:, part], "dv": dv[:, part]}
        part_dq, _, _ = cutlass_fa.flash_attn_backward(dout, q, k[:, part], v[:, part], out, lse, **passed)
        dq += part_dq.astype(np.float64)
    check_backward(Gradients(dq, dk, dv), dout, q, k, v, case=case, **options)


def test_a_ring_of_four() -> None:
    """Causal self-attention over four ranks' sequences, forward and backward, each rank's queries against every rank's keys in turn."""
    import cupy

    rng, ranks, rows = cupy.random.default_rng(), 4, 500
    whole = PartCase((ranks * rows, ranks * rows), 0, 0, tuple(range(rows, ranks * rows, rows)), causal=True, groups=2, ratio=2)
    q, k, v = whole.arrays(cupy, rng, "bf16", 128)
    dout = random_array(cupy, rng, q.shape, q.dtype)
    gradients = Gradients(*(cupy.zeros(x.shape) for x in (q, k, v)))
    outs, lses = [], []
    for rank, own in enumerate(whole.parts):
        state: Any = None
        for step in range(ranks):
            other = (rank - step) % ranks
            keys, places = whole.parts[other], {"q_offset": rank * rows, "k_offset": other * rows}
            options = {"causal": True, "out_dtype": "float32", "return_lse": True, **places}
            result = cutlass_fa.flash_attn_func(q[:, own], k[:, keys], v[:, keys], **options)
            state = result if state is None else cutlass_fa.merge_attention_states(*state, *result)
        outs.append(state[0])
        lses.append(state[1])
        for other, keys in enumerate(whole.parts):
            arrays = (dout[:, own], q[:, own], k[:, keys], v[:, keys], state[0].astype(q.dtype), state[1])
            dq, dk, dv = cutlass_fa.flash_attn_backward(*arrays, causal=True, q_offset=rank * rows, k_offset=other * rows)
            gradients.dq[:, own] += dq.astype(np.float64)
            gradients.dk[:, keys] += dk.astype(np.float64)
            gradients.dv[:, keys] += dv.astype(np.float64)
    check_merged(cupy.concatenate(outs, axis=1), cupy.concatenate(lses, axis=2), q, k, v, "ring", causal=True)
    check_backward(gradients, dout, q, k, v, case="ring", causal=True)


@pytest.mark.parametrize("family", FAMILIES)
def test_thousand_runs_are_bitwise_equal(family: str) -> None:
    import cupy

    needs(family)
    case = PartCase((640, 1000), 700, 100, (), causal=True, window=(260, 0), sinks=120, alibi=True)
    q, k, v = case.arrays(cupy, cupy.random.default_rng(), "bf16", 128)
    options = {**case.whole(cupy), "out_dtype": "float32", "return_lse": True, "family": family}
    first, first_lse = cutlass_fa.flash_attn_func(q, k, v, **options)
    check_merged(first, first_lse, q, k, v, case, **case.whole(cupy))
    different = cupy.zeros((), np.int64)
    for _ in range(1000):
        out, lse = cutlass_fa.flash_attn_func(q, k, v, **options)
        different += (out != first).sum() + (lse != first_lse).sum()
    assert int(different) == 0
