"""Masks, biases and learnable sinks on a GPU, the forward of both families and the backward, by the test rule against float64."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import pytest

import cutlass_fa
from cutlass_fa.device import device_info
from cutlass_fa.reference import Gradients
from tests.backward_cases import SOFTCAP, Inputs
from tests.covering import covering
from tests.numerics import SEQLEN_PAIRS, check_backward, check_forward
from tests.test_gpu_backward import Call, case_of
from tests.test_gpu_forward import Case

pytestmark = pytest.mark.gpu

FAMILIES = ("fa2", "fa3")
# Distances of every size against the tiles': none, less than a block, some blocks, unbounded on one side or the other.
WINDOWS = ((0, 0), (5, 70), (128, 0), (300, 33), (700, -1), (-1, 100), (1000, 1000))


@dataclass(frozen=True)
class Masks:
    """What a call's mask is made of, beside causality, and whether rows have a logit without a key."""

    window: tuple[int, int] = (-1, -1)
    sink: int = 0
    softcap: float = 0.0
    alibi: str = "none"  # or "heads": slopes of each head; "batch": of each sequence's heads
    learnable_sink: bool = False

    def __str__(self) -> str:
        words = f"window{self.window[0]}.{self.window[1]}-sink{self.sink}-softcap{self.softcap:g}-alibi.{self.alibi}"
        return words + "-lsink" * self.learnable_sink

    def arguments(self, q: Any) -> dict[str, Any]:
        """The call's, which are the reference's too."""
        options = {"window_size": self.window, "sink_tokens": self.sink, "softcap": self.softcap, "alibi_slopes": self.slopes(q)}
        return options | ({"learnable_sink": learnable_sinks(q.shape[2])} if self.learnable_sink else {})

    def slopes(self, q: Any) -> Any:
        import cupy

        batch, _, heads, _ = q.shape
        if self.alibi == "none":
            return None
        return cupy.random.uniform(-0.05, 1, (heads,) if self.alibi == "heads" else (batch, heads), np.float32)


def learnable_sinks(heads: int) -> Any:
    """Fresh logits, of which some outweigh all keys and some none; the last head of several has none."""
    import cupy

    sinks = cupy.random.uniform(-6, 9, heads, np.float32)
    sinks[1:][-1:] = -np.inf
    return sinks


def check(case: Case, masks: Masks, family: str) -> tuple[Any, Any]:
    if family == "fa3" and device_info(0).arch != "sm_90a":
        pytest.skip("family fa3 needs sm_90a")
    q, k, v = case.arrays()
    options = {"causal": case.causal, **masks.arguments(q)}
    out, lse = cutlass_fa.flash_attn_func(q, k, v, out=case.poisoned_out(q), return_lse=True, family=family, **options)
    check_forward(out, lse, q, k, v, case=f"{family} {case} {masks}", **options)
    return out, lse


def covering_cases() -> list[Any]:
    factors = {
        "family": FAMILIES,
        "dtype": ("f16", "bf16"),
        "head_dim": (64, 80, 96, 128, 192, 256),
        "causal": (False, True),
        "heads": ("mha", "gqa4", "mqa"),
        "seqlens": SEQLEN_PAIRS,
        "window": ((-1, -1), *WINDOWS),
        "sink": (0, 4, 200),
        "softcap": (0.0, 20.0),
        "alibi": ("none", "heads", "batch"),
        "learnable_sink": (False, True),
        "order": ("bshd", "bhsd"),
    }
    cases = []
    for chosen in covering(factors, 2):
        family, masks = (
            chosen.pop("family"),
            Masks(*(chosen.pop(name) for name in ("window", "sink", "softcap", "alibi", "learnable_sink"))),
        )
        if masks.window == (-1, -1) and not chosen["causal"]:
            masks = replace(masks, sink=0)  # refused: every key is visible
        case = Case(**chosen)
        cases.append(pytest.param(case, masks, family, id=f"{family}-{case}-{masks}"))
    return cases


@pytest.mark.parametrize(("case", "masks", "family"), covering_cases())
def test_forward(case: Case, masks: Masks, family: str) -> None:
    check(case, masks, family)


@pytest.mark.parametrize("seqlens", SEQLEN_PAIRS, ids=lambda p: f"{p[0]}x{p[1]}")
@pytest.mark.parametrize("window", WINDOWS, ids=lambda w: f"{w[0]}.{w[1]}")
@pytest.mark.parametrize("causal", [False, True], ids=["full", "causal"])
@pytest.mark.parametrize("family", FAMILIES)
def test_every_window_with_every_pair_of_lengths(family: str, causal: bool, window: tuple[int, int], seqlens: tuple[int, int]) -> None:
    check(Case("bf16", 128, causal, "gqa4", seqlens), Masks(window), family)


@pytest.mark.parametrize("seqlens", [(1, 3000), (113, 203), (300, 40), (640, 2048), (1023, 1024)], ids=lambda p: f"{p[0]}x{p[1]}")
@pytest.mark.parametrize("sink", [1, 4, 64, 129, 5000])
@pytest.mark.parametrize("causal", [False, True], ids=["full", "causal"])
@pytest.mark.parametrize("family", FAMILIES)
def test_sink_tokens(family: str, causal: bool, sink: int, seqlens: tuple[int, int]) -> None:
    for window in ((0, 0), (128, 0), (300, 33)):
        check(Case("bf16", 64, causal, "gqa4", seqlens), Masks(window, sink), family)


@pytest.mark.parametrize("seqlens", SEQLEN_PAIRS, ids=lambda p: f"{p[0]}x{p[1]}")
@pytest.mark.parametrize("alibi", ["heads", "batch"])
@pytest.mark.parametrize("causal", [False, True], ids=["full", "causal"])
@pytest.mark.parametrize("family", FAMILIES)
def test_alibi(family: str, causal: bool, alibi: str, seqlens: tuple[int, int]) -> None:
    check(Case("bf16", 128, causal, "gqa4", seqlens), Masks(alibi=alibi), family)


@pytest.mark.parametrize("seqlens", SEQLEN_PAIRS, ids=lambda p: f"{p[0]}x{p[1]}")
@pytest.mark.parametrize("window", [(-1, -1), (128, 0)], ids=lambda w: f"{w[0]}.{w[1]}")
@pytest.mark.parametrize("causal", [False, True], ids=["full", "causal"])
@pytest.mark.parametrize("family", FAMILIES)
def test_learnable_sinks(family: str, causal: bool, window: tuple[int, int], seqlens: tuple[int, int]) -> None:
    check(Case("bf16", 64, causal, "gqa4", seqlens), Masks(window, learnable_sink=True), family)


@pytest.mark.parametrize("family", FAMILIES)
def test_learnable_sinks_far_from_the_scores(family: str) -> None:
    """300 queries, 40 keys, causal: the first 260 rows see none, and their lse is the logit, bit by bit."""
    import cupy

    q, k, v = Case("bf16", 64, True, "gqa5", (300, 40)).arrays()
    sinks = cupy.resize(cupy.asarray([2000.0, -2000.0, 1e30, -1e30, -np.inf], np.float32), q.shape[2])
    options = {"causal": True, "learnable_sink": sinks}
    out, lse = cutlass_fa.flash_attn_func(q, k, v, return_lse=True, family=family, **options)
    check_forward(out, lse, q, k, v, case=family, **options)
    assert (lse[:, :, :260] == sinks[:, None]).all() and not out[:, :260].any()


@pytest.mark.parametrize("family", FAMILIES)
def test_learnable_sinks_may_change_without_a_new_kernel_or_plan(family: str) -> None:
    case = Case("bf16", 128, True, "gqa4", (640, 1000))
    for _ in range(3):
        check(case, Masks(learnable_sink=True), family)
        check(case, Masks(), family)


@pytest.mark.parametrize("seqlens", [(1, 300), (5, 513), (63, 200), (130, 400)], ids=lambda p: f"{p[0]}x{p[1]}")
@pytest.mark.parametrize("heads", ["gqa4", "gqa5", "gqa64"])
@pytest.mark.parametrize("causal", [False, True], ids=["full", "causal"])
def test_windows_of_packed_heads(causal: bool, heads: str, seqlens: tuple[int, int]) -> None:
    for window in WINDOWS[:4]:
        check(Case("bf16", 128, causal, heads, seqlens), Masks(window), "fa3")
        check(Case("bf16", 128, causal, heads, seqlens), Masks(window, sink=3, alibi="batch"), "fa3")
        check(Case("bf16", 128, causal, heads, seqlens), Masks(window, learnable_sink=True), "fa3")


@pytest.mark.parametrize("family", FAMILIES)
def test_rows_whose_window_holds_no_key(family: str) -> None:
    """More queries than keys: the first rows stand before the first key, and some of their windows do not reach it."""
    out, lse = check(Case("bf16", 128, False, seqlens=(300, 40)), Masks((7, 100)), family)
    assert not out[:, :160].any() and np.isneginf(lse[:, :, :160].get()).all()
    assert np.isfinite(lse[:, :, 160:].get()).all()


@pytest.mark.parametrize("sink", [0, 7])
@pytest.mark.parametrize("family", FAMILIES)
def test_keys_outside_the_window_are_never_loaded(family: str, sink: int) -> None:
    """k and v hold NaN outside every window of the queries: a block that was loaded and masked would make NaN of its probabilities' 0."""
    case = Case("bf16", 64, True, seqlens=(100, 2000))
    q, k, v = case.arrays()
    options = {"causal": True, "window_size": (200, 0), "sink_tokens": sink}
    out, lse = cutlass_fa.flash_attn_func(q, k, v, return_lse=True, family=family, **options)
    first = (2000 - 100 - 200) // 192 * 192  # no tile has more keys in a block
    kept = 192 * (sink > 0)
    k[:, kept:first], v[:, kept:first] = np.nan, np.nan
    again, again_lse = cutlass_fa.flash_attn_func(q, k, v, return_lse=True, family=family, **options)
    assert (out.view(np.uint16) == again.view(np.uint16)).all() and (lse == again_lse).all()


@pytest.mark.parametrize("family", FAMILIES)
def test_thousand_runs_are_bitwise_equal(family: str) -> None:
    import cupy

    case, masks = Case("bf16", 128, True, "gqa4", (640, 1000)), Masks((260, 0), sink=4, alibi="heads", learnable_sink=True)
    check(case, masks, family)
    q, k, v = case.arrays(seed=1)
    options = {"causal": True, "family": family, "return_lse": True, **masks.arguments(q)}
    first, first_lse = cutlass_fa.flash_attn_func(q, k, v, **options)
    different = cupy.zeros((), np.int64)
    for _ in range(1000):
        out, lse = cutlass_fa.flash_attn_func(q, k, v, **options)
        different += (out.view(np.uint16) != first.view(np.uint16)).sum() + (lse != first_lse).sum()
    assert int(different) == 0


# ---- backward: of family fa2, on every GPU ---------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class MaskedCall(Call):
    """A backward under what `masks` names: "window", "sink" (which needs a window), "alibi", "learnable_sink"."""

    masks: tuple[str, ...] = ()

    def __str__(self) -> str:
        return "-".join((super().__str__(), f"{self.case.window[0]}.{self.case.window[1]}", f"sinks{self.case.sinks}", *self.masks))

    def inputs(self) -> Inputs:
        import cupy

        rng = cupy.random.default_rng(np.random.SeedSequence().generate_state(1)[0])
        flags: dict[str, Any] = {"causal": self.causal, "softcap": self.softcap, "dropout_p": self.dropout_p}
        flags |= {name: name in self.masks for name in ("window", "sink", "alibi", "learnable_sink")}
        return Inputs.of(self.case, cupy, rng, dtype=self.dtype, head_dim=self.head_dim, **flags)


MASKS: tuple[tuple[str, ...], ...] = (("window",), ("alibi",), ("window", "sink"), ("window", "alibi"), ("window", "sink", "alibi"))
MASKS += (("learnable_sink",), ("window", "learnable_sink"), ("window", "sink", "alibi", "learnable_sink"))


def covering_backward_calls() -> list[MaskedCall]:
    factors = {
        "dtype": ("f16", "bf16"),
        "head_dim": (64, 80, 96, 128, 192, 256),
        "causal": (False, True),
        "heads": ("mha", "gqa4", "mqa"),
        "seqlens": SEQLEN_PAIRS,
        "window": WINDOWS,
        "sinks": (1, 4, 200),
        "masks": MASKS,
        "softcap": (0.0, SOFTCAP),
        "dropout_p": (0.0, 0.17),
        "deterministic": (False, True),
        "has_dlse": (False, True),
    }
    calls = []
    for chosen in covering(factors, 2):
        of_case = {name: chosen.pop(name) for name in ("window", "sinks", "has_dlse")}
        case = case_of(chosen.pop("heads"), chosen.pop("seqlens"), **of_case)
        if chosen["causal"] and case.window[0] == -1:
            case = replace(case, window=(50, 0))  # unbounded on the left it would be the causal mask alone
        calls.append(MaskedCall(case=case, **chosen))
    return calls


@pytest.mark.parametrize("call", covering_backward_calls(), ids=str)
def test_backward(call: MaskedCall) -> None:
    call.check()


@pytest.mark.parametrize("masks", MASKS, ids="-".join)
@pytest.mark.parametrize("causal", [False, True], ids=["full", "causal"])
def test_backward_that_recomputes(causal: bool, masks: tuple[str, ...]) -> None:
    call = MaskedCall("bf16", 128, causal, case_of("gqa4", (301, 517), window=(100, 40), has_dlse=True), masks=masks)
    inputs = call.inputs()
    options = {**inputs.call, "dlse": inputs.dlse}
    arrays = (inputs.dout, inputs.q, inputs.k, inputs.v)
    gradients = Gradients(*cutlass_fa.flash_attn_backward(*arrays, recompute=True, **options))
    check_backward(gradients, *arrays, case=call, dlse=inputs.dlse, **inputs.options)


@pytest.mark.parametrize("seqlens", SEQLEN_PAIRS, ids=lambda p: f"{p[0]}x{p[1]}")
@pytest.mark.parametrize("flags", [(False, 0.0), (True, 0.17)], ids=["plain", "deterministic-dropout"])
@pytest.mark.parametrize("causal", [False, True], ids=["full", "causal"])
def test_backward_of_learnable_sinks(causal: bool, flags: tuple[bool, float], seqlens: tuple[int, int]) -> None:
    """More queries than keys under a causal mask: rows without keys, whose gradient by lse is the logit's."""
    case = case_of("gqa4", seqlens, has_dlse=True)
    MaskedCall("bf16", 64, causal, case, dropout_p=flags[1], deterministic=flags[0], masks=("learnable_sink",)).check()


def test_the_gradient_of_learnable_sinks_has_equal_bits_every_time() -> None:
    import cupy

    call = MaskedCall("bf16", 128, True, case_of("gqa4", (1023, 1024), has_dlse=True), masks=("learnable_sink",))
    inputs = call.inputs()
    first = call.gradients(inputs).dlearnable_sink
    different = cupy.zeros((), np.int64)
    for _ in range(100):
        different += (call.gradients(inputs).dlearnable_sink != first).sum()
    assert int(different) == 0
