"""The points of tools/bench.py: their FLOPs counted one by one, the mixes of lengths, and the calls that their inputs become."""

from __future__ import annotations

import inspect
from dataclasses import replace
from itertools import product
from types import SimpleNamespace
from typing import Any
from unittest.mock import MagicMock

import numpy as np
import pytest

import cutlass_fa
from cutlass_fa.demo import forward_flops
from cutlass_fa.reference import allowed_keys
from tools.bench_cache import CachePoint
from tools.bench_cases import CASES, case_points, last
from tools.bench_device import CupyDevice, TorchDevice
from tools.bench_inputs import Inputs, alibi_slopes, cumulative
from tools.bench_points import MIXES, Point, windowed_pairs

LENGTH_PAIRS = ((1, 1), (7, 7), (5, 12), (12, 5), (1, 9), (9, 1))


@pytest.mark.parametrize(("causal", "sink_tokens"), list(product((False, True), (0, 1, 3, 40))))
@pytest.mark.parametrize("window", [(0, 0), (2, 0), (0, 3), (3, 1), (-1, 2), (2, -1), (50, 50)])
def test_windowed_pairs_are_the_reference_s(window: tuple[int, int], causal: bool, sink_tokens: int) -> None:
    for seqlen_q, seqlen_k in LENGTH_PAIRS:
        seen = allowed_keys(seqlen_q, seqlen_k, causal=causal, window_size=window, sink_tokens=sink_tokens).sum()
        assert windowed_pairs(seqlen_q, seqlen_k, causal, window, sink_tokens) == seen, (seqlen_q, seqlen_k)


def test_flops_without_a_window_are_the_field_s() -> None:
    for causal, gqa_ratio in product((False, True), (1, 4)):
        point = Point("bf16", 128, 4096, causal, gqa_ratio)
        assert point.flops == forward_flops(4, 16, 4096, 4096, 128, causal)
        assert replace(point, alibi=True, learnable_sink=True).flops == point.flops
        assert replace(point, direction="bwd").flops == 2.5 * point.flops


def test_flops_of_windows_and_of_packed_sequences() -> None:
    window = Point("bf16", 64, 8192, True, window=last(1024), sink_tokens=4)
    for_each_batch = sum(min(position + 1, 1024 + min(4, max(0, position + 1 - 1024))) for position in range(8192))
    assert window.flops == 4 * 2 * 32 * 64 * for_each_batch
    packed = Point("bf16", 128, 16384, True, lengths="mix16")
    assert packed.flops == sum(forward_flops(1, 16, length, length, 128, True) for length in MIXES["mix16"])


def test_more_keys_before_a_fixed_window_are_no_more_work() -> None:
    points = CASES["seqlen_k"].points("bf16", 128)
    assert [point.seqlen_k for point in points] == [4096, 16384, 65536, 262144]
    assert len({point.flops for point in points}) == 1 and points[0].flops == 4 * 2048 * 16 * 1024 * 1028
    assert points[-1].q_shape == (16, 1024, 16, 128) and points[-1].kv_shape == (16, 262144, 16, 128)


def test_mix16_is_always_the_same() -> None:
    mix = (2243, 1662, 516, 294, 707, 489, 1818, 344, 627, 908, 2805, 691, 319, 1650, 1025, 286)
    assert MIXES["mix16"] == mix and sum(mix) == 16384 and min(mix) >= 128 and max(mix) <= 4096


def test_one_long_sequence_and_its_equal_lengths() -> None:
    """As much work and as much memory, within 1 part in 3000 and 2 in 100."""
    long, equal = MIXES["one_long"], MIXES["one_long_equal"]
    assert sorted(long) == [256] * 63 + [16384] and set(equal) == {8256} and 8256 % 64 == 0
    assert sum(n * n for n in equal) == pytest.approx(sum(n * n for n in long), rel=1 / 3000)
    assert sum(equal) == pytest.approx(sum(long), rel=0.02)


def test_baselines() -> None:
    sinks = Point("bf16", 128, 4096, True, window=last(1024), sink_tokens=4)
    assert sinks.baseline == ("without", replace(sinks, sink_tokens=0))
    alibi = Point("bf16", 64, 4096, True, alibi=True)
    assert alibi.baseline == ("without", Point("bf16", 64, 4096, True))
    long = Point("bf16", 128, sum(MIXES["one_long"]), False, lengths="one_long")
    assert long.baseline == ("equal", Point("bf16", 128, 33024, False, lengths="one_long_equal"))
    for point in (Point("bf16", 128, 4096, True, window=last(1024)), Point("bf16", 128, 16384, True, lengths="mix16")):
        assert point.baseline is None


def test_a_baseline_s_row_counts_its_own_work() -> None:
    sinks = Point("bf16", 128, 16384, True, window=last(1024), sink_tokens=4)
    own, without = sinks.row("cutlass_fa", 0.1), sinks.row("without", 0.1)
    assert own.case == without.case and own.tflops == round(sinks.flops / 1e8, 1)
    assert without.tflops == round(replace(sinks, sink_tokens=0).flops / 1e8, 1) != own.tflops


def test_sets_of_points() -> None:
    found = list(case_points(["window", "sinks"], ["bf16", "f16"], None))
    assert len(found) == 2 * (4 + 4) and [point.dtype for point in found] == (["bf16"] * 4 + ["f16"] * 4) * 2
    assert [(p.seqlen, p.window, p.gqa_ratio) for p in found[:4]] == [
        *((16384, (1023, 0), 1), (16384, (4095, 0), 1)),
        *((8192, (1023, 0), 4), (8192, (-1, -1), 4)),
    ]
    assert {p.head_dim for p in found[:8]} == {128} and {p.head_dim for p in found[8:]} == {64, 128}
    assert [p.head_dim for p in case_points(["varlen"], ["bf16"], [256])] == [256] * 4
    assert all(p.gqa_ratio == 1 for p in case_points(["window"], ["bf16"], [96])), "4 does not divide 21 heads"
    assert all(p.causal and p.direction == "fwd" for name in CASES if name != "varlen" for p in case_points([name], ["bf16"], None))


def test_a_point_is_told_by_what_it_says() -> None:
    assert str(Point("bf16", 128, 4096, True)) == "Point(dtype='bf16', head_dim=128, seqlen=4096, causal=True)"
    assert str(Point("bf16", 64, 4096, True, alibi=True)).endswith("causal=True, alibi=True)")


# ---- inputs and calls ----------------------------------------------------------------------------------------------------------------


class HostDevice(CupyDevice):
    """NumPy in place of the GPU; q, k and v take no memory."""

    def __init__(self) -> None:
        pass

    def normal(self, shape: tuple[int, ...], dtype: str) -> Any:
        return np.broadcast_to(np.float16(0), shape)

    def asarray(self, values: np.ndarray) -> Any:
        return values

    def empty_like(self, x: Any) -> Any:
        return x


def test_alibi_slopes_are_the_paper_s() -> None:
    assert alibi_slopes(8).tolist() == [2.0**-i for i in range(1, 9)] and alibi_slopes(8).dtype == np.float32


def test_inputs_of_a_packed_point() -> None:
    point = Point("bf16", 128, sum(MIXES["one_long"]), True, gqa_ratio=4, lengths="one_long")
    inputs = HostDevice().inputs(point)
    assert inputs.q.shape == (32512, 16, 128) and inputs.k.shape == inputs.v.shape == (32512, 4, 128)
    assert inputs.cu_seqlens.dtype == np.int32 and inputs.cu_seqlens[[0, 1, 2, -1]].tolist() == [0, 16384, 16640, 32512]
    assert inputs.max_seqlen == 16384 and inputs.options == {"causal": True} and inputs.features == ["cu_seqlens"]


def test_a_baseline_without_features_takes_the_same_arrays() -> None:
    device, point = HostDevice(), Point("bf16", 64, 4096, True, window=last(1024), sink_tokens=4, learnable_sink=True)
    inputs = device.inputs(point)
    assert set(inputs.options) == {"causal", "window_size", "sink_tokens", "learnable_sink"} and inputs.learnable_sink.shape == (32,)
    assert point.baseline is not None
    plain = device.inputs(point.baseline[1], like=inputs)
    assert plain.q is inputs.q and plain.v is inputs.v and plain.options == {"causal": True, "window_size": (1023, 0)}
    assert device.inputs(Point("bf16", 64, 1024, True), like=inputs).q.shape == (16, 1024, 32, 64)


def test_eight_bit_inputs_say_what_their_bits_are() -> None:
    q = np.zeros((1, 2, 3, 64), np.uint8)
    assert Inputs(q, q, q, dtype="float8_e4m3fn").options == {"causal": False, "dtype": "float8_e4m3fn"}
    assert "dtype" not in Inputs(q, q, q).options


def test_calls_name_the_arguments_of_the_public_functions(monkeypatch: pytest.MonkeyPatch) -> None:
    called: list[dict[str, Any]] = []
    for name in ("flash_attn_func", "flash_attn_varlen_func"):
        signature = inspect.signature(getattr(cutlass_fa, name))
        monkeypatch.setattr(cutlass_fa, name, lambda *a, _bind=signature.bind, **kw: called.append(_bind(*a, **kw).arguments))
    device = HostDevice()
    device.family = "fa3"
    for point in case_points(["sinks", "alibi", "varlen"], ["bf16"], [64]):
        device.own_call(device.inputs(point))()
    sinks, _, alibi, _, packed, *_ = called
    assert (sinks["window_size"], sinks["sink_tokens"], sinks["family"]) == ((1023, 0), 4, "fa3") and "alibi_slopes" not in sinks
    assert alibi["alibi_slopes"].shape == (32,) and alibi["causal"] is True and alibi["out"] is alibi["q"]
    assert packed["cu_seqlens_q"].tolist() == cumulative(MIXES["mix16"]).tolist() and packed["max_seqlen_k"] == 2805


def fa3_arguments(point: Point) -> dict[str, Any]:
    """What FlashAttention-3's operator is called with at a point. Raises NotImplementedError where it has no call for it."""
    called: list[dict[str, Any]] = []
    device = object.__new__(TorchDevice)
    operator = SimpleNamespace(fwd=lambda q, k, v, **options: called.append(options) or [q])
    device._torch = SimpleNamespace(ops=SimpleNamespace(flash_attn_3=operator))
    device._fa3_call(HostDevice().inputs(point))()
    return called[0]


def test_flash_attention_3_gets_windows_and_packed_sequences() -> None:
    plain = Point("bf16", 64, 4096, True)
    assert fa3_arguments(plain) == {"softmax_scale": 0.125, "is_causal": True}
    window = fa3_arguments(replace(plain, window=last(1024)))
    assert window == {"softmax_scale": 0.125, "is_causal": True, "window_size_left": 1023, "window_size_right": 0}
    packed = fa3_arguments(Point("bf16", 64, 16384, False, lengths="mix16"))
    assert packed["softmax_scale"] == 0.125 and packed["is_causal"] is False
    assert packed["max_seqlen_q"] == packed["max_seqlen_k"] == 2805 and packed["cu_seqlens_q"][-1] == 16384


@pytest.mark.parametrize("lacks", ["alibi", "sink_tokens", "learnable_sink"])
def test_flash_attention_3_is_not_timed_at_what_it_lacks(lacks: str) -> None:
    with pytest.raises(NotImplementedError, match=f"it has no {lacks}"):
        fa3_arguments(replace(Point("bf16", 64, 4096, True, window=last(1024)), **{lacks: True}))


def test_scaled_dot_product_attention_is_not_timed_with_features() -> None:
    device = object.__new__(TorchDevice)
    device._torch, device._attention = MagicMock(), MagicMock()
    q = np.zeros((1, 1, 1, 8), np.float16)
    for prepare in (device._sdpa("cudnn"), device._sdpa_backward("cudnn")):
        for inputs, name in (
            (Inputs(q, q, q, window_size=(1, 0)), "window_size"),
            (Inputs(q, q, q, cu_seqlens=cumulative([1])), "cu_seqlens"),
        ):
            with pytest.raises(NotImplementedError, match=f"it has no {name}"):
                prepare(inputs)


def test_points_on_caches_count_what_a_causal_mask_shows() -> None:
    decode, chunk = CASES["decode"].points("bf16", 128), CASES["chunk"].points("bf16", 128)
    assert {point.page for point in decode if isinstance(point, CachePoint)} == {0, 16, 64, 256} and len(decode) == 16
    for point in (*decode, *chunk):
        assert isinstance(point, CachePoint)
        seen = point.seqlen * point.seqlen_k - point.seqlen * (point.seqlen - 1) // 2
        assert point.flops == 4 * point.batch * 32 * 128 * seen
        assert point.kv_shape[0] * point.kv_shape[1] == point.batch * point.seqlen_k
        assert point.row("x", 1.0).gbs == round(point.kv_bytes / 1e6, 1)
    table = decode[1].cache_arrays()["block_table"] if isinstance(decode[1], CachePoint) else np.zeros(0)
    assert sorted(table.ravel()) == list(range(1024)) and table.shape == (1, 1024)
    assert chunk[0].baseline is not None and chunk[0].baseline[1].kv_shape == (4, 16384, 8, 128) and decode[0].baseline is None
