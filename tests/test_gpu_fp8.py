"""The fp8 forward on a GPU, by the test rule and by relative RMS error, both against float64 beside the same mathematics without tiles."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import ml_dtypes
import numpy as np
import pytest

import cutlass_fa
from cutlass_fa.device import device_info
from cutlass_fa.reference import attention_forward
from tests.covering import covering
from tests.numerics import SEQLEN_PAIRS, check_forward, decoded, encoded, lowp_forward, poisoned, random_outliers
from tests.varlen_cases import Lengths

pytestmark = pytest.mark.gpu

DTYPES = {"e4m3": np.dtype(ml_dtypes.float8_e4m3fn), "e5m2": np.dtype(ml_dtypes.float8_e5m2)}
MASKS: dict[str, dict[str, Any]] = {
    "full": {},
    "causal": {"causal": True},
    "window": {"window_size": (100, 30)},
    "causal-window-sink": {"causal": True, "window_size": (200, 0), "sink_tokens": 5},
}
HEADS = {"mha": (2, 2), "gqa4": (8, 2), "mqa": (3, 1)}
RMS_SLACK = 1.1  # no worse than so many times the error of the same mathematics without tiles


@pytest.fixture(autouse=True)
def _needs_hopper() -> None:
    import cupy

    if device_info(cupy.cuda.runtime.getDevice()).arch != "sm_90a":
        pytest.skip("fp8 needs sm_90a")


@dataclass(frozen=True)
class Case:
    """One call. outliers: one number of 500 is ten times as large."""

    dtype: str = "e4m3"
    v_dtype: str = "e4m3"
    head_dim: int = 128
    mask: str = "causal"
    heads: str = "mha"
    seqlens: tuple[int, int] = (239, 799)
    outliers: bool = False
    batch: int = 2

    def __str__(self) -> str:
        numbers = "outliers" if self.outliers else "normal"
        lengths = f"{self.seqlens[0]}x{self.seqlens[1]}"
        return f"{self.dtype}-{self.v_dtype}-d{self.head_dim}-{self.mask}-{self.heads}-{lengths}-{numbers}"

    @property
    def types(self) -> dict[str, Any]:
        """What the bits are, as calls and checks are told."""
        return {"dtype": DTYPES[self.dtype], "v_dtype": DTYPES[self.v_dtype]}

    def arrays(self, seed: int = 0) -> tuple[Any, Any, Any]:
        """Bits of fresh q, k and v on the GPU; (batch, seqlen, heads, head_dim) as a slice of a buffer of NaN."""
        import cupy

        rng = np.random.default_rng(seed)
        heads_q, heads_kv = HEADS[self.heads]
        found = []
        for seqlen, heads, dtype in zip(
            (self.seqlens[0], *(self.seqlens[1],) * 2), (heads_q, heads_kv, heads_kv), self._dtypes(), strict=True
        ):
            shape = (self.batch, seqlen, heads, self.head_dim)
            x = random_outliers(rng, shape) if self.outliers else rng.standard_normal(shape, dtype=np.float32)
            buffer = poisoned(cupy, (self.batch, seqlen + 1, heads, -(-self.head_dim // 16) * 16 + 16), DTYPES[dtype])
            view = buffer[:, 1:, :, 16 : 16 + self.head_dim]
            view[...] = encoded(cupy.asarray(x), DTYPES[dtype])
            found.append(view)
        return found[0], found[1], found[2]

    def _dtypes(self) -> tuple[str, str, str]:
        return self.dtype, self.dtype, self.v_dtype

    def poisoned_out(self, q: Any, dtype: Any = ml_dtypes.bfloat16) -> Any:
        import cupy

        return poisoned(cupy, q.shape, np.dtype(dtype))


def run(case: Case, *, out_dtype: Any = None, reference: dict[str, Any] | None = None, **options: Any) -> tuple[Any, Any]:
    """One call, held to the rule. options: the call's beside mask and types; reference: those that the reference has otherwise."""
    q, k, v = case.arrays()
    out = case.poisoned_out(q, out_dtype or ml_dtypes.bfloat16)
    called = {**case.types, **MASKS[case.mask], **options, "out_dtype": out_dtype}
    result, lse = cutlass_fa.flash_attn_func(q, k, v, out=out, return_lse=True, **called)
    expected = {name: value for name, value in options.items() if name != "accumulate"} | (reference or {})
    check_forward(result, lse, q, k, v, case=f"{case} {sorted(options)}", **case.types, **MASKS[case.mask], **expected)
    return result, lse


CASES = [
    Case(**chosen)
    for chosen in covering(
        {
            "dtype": tuple(DTYPES),
            "v_dtype": tuple(DTYPES),
            "head_dim": (64, 96, 128, 192, 256),
            "mask": tuple(MASKS),
            "heads": tuple(HEADS),
            "outliers": (False, True),
            "seqlens": SEQLEN_PAIRS[:-1],
        },
        2,
    )
]


@pytest.mark.parametrize("case", CASES, ids=str)
def test_every_two_choices(case: Case) -> None:
    run(case)


@pytest.mark.parametrize("mask", ["full", "causal"])
@pytest.mark.parametrize("head_dim", [64, 96, 128, 192, 256])
@pytest.mark.parametrize("v_dtype", list(DTYPES))
@pytest.mark.parametrize("dtype", list(DTYPES))
def test_every_pair_of_types(dtype: str, v_dtype: str, head_dim: int, mask: str) -> None:
    for accumulate in ("fast", "precise"):
        run(Case(dtype, v_dtype, head_dim, mask, "gqa4", (300, 1000)), accumulate=accumulate)


@pytest.mark.parametrize("outliers", [False, True], ids=["normal", "outliers"])
@pytest.mark.parametrize("accumulate", ["fast", "precise"])
@pytest.mark.parametrize("head_dim", [64, 128, 256])
def test_relative_rms_error(head_dim: int, accumulate: str, outliers: bool, record_property: Any) -> None:
    """tools/fp8_error.py has the table at longer sequences."""
    case = Case(head_dim=head_dim, mask="full", seqlens=(512, 2048), outliers=outliers, batch=1)
    q, k, v = case.arrays(seed=1)
    out = cutlass_fa.flash_attn_func(q, k, v, **case.types, accumulate=accumulate)
    values = [decoded(x, DTYPES["e4m3"]) for x in (q, k, v)]
    expected, _ = attention_forward(*values)
    low, _ = lowp_forward(*values, **case.types)
    own, lowp = (float(np.sqrt(((x.astype(np.float64) - expected) ** 2).mean() / (expected**2).mean())) for x in (out, low))
    record_property("relative_rms", f"{case} {accumulate}: {own:.4f}, without tiles {lowp:.4f}")
    print(f"{case} {accumulate}: relative RMS error {own:.4f}, without tiles {lowp:.4f}")
    assert 0 < own <= RMS_SLACK * lowp


@pytest.mark.parametrize("accumulate", ["fast", "precise"])
@pytest.mark.parametrize("head_dim", [64, 96, 128, 192, 256])
def test_factors(head_dim: int, accumulate: str) -> None:
    """Numbers, arrays of heads and of blocks of keys, strided and broadcast; q in heads of a group."""
    import cupy

    case = Case(head_dim=head_dim, heads="gqa4", seqlens=(300, 1000))
    rng = np.random.default_rng(5)

    def draw(*shape: int) -> Any:
        return cupy.asarray((2.0 ** rng.uniform(-2, 2, shape)).astype(np.float32))

    heads, blocks = draw(2, 2), draw(2, 2, 8)
    for factors in (
        {"q_descale": 0.3, "k_descale": 1.7, "v_descale": 40.0},
        {"q_descale": heads, "k_descale": draw(2, 2, 3)[..., 1], "v_descale": 9.0},
        {"q_descale": draw(1), "k_descale": blocks, "v_descale": draw(2, 2, 9)},
        {"k_descale": blocks, "v_descale": heads},
        {"v_descale": cupy.broadcast_to(blocks[:1, :1], (2, 2, 8))},
    ):
        run(case, accumulate=accumulate, **factors)


@pytest.mark.parametrize("out_dtype", [np.float16, ml_dtypes.bfloat16, np.float32], ids=lambda t: np.dtype(t).name)
@pytest.mark.parametrize("head_dim", [72, 128, 240])
def test_out_dtypes_and_other_head_dims(head_dim: int, out_dtype: Any) -> None:
    run(Case("e5m2", "e4m3", head_dim, seqlens=(130, 500)), out_dtype=out_dtype)


@pytest.mark.parametrize("mask", list(MASKS))
@pytest.mark.parametrize("head_dim", [64, 128, 256])
def test_every_feature_of_scores(head_dim: int, mask: str) -> None:
    import cupy

    slopes = cupy.asarray(np.float32(2) ** -np.arange(1, 9, dtype=np.float32))
    sinks = cupy.linspace(-2, 8, 8, dtype=np.float32)
    factors = {"q_descale": cupy.full((2, 2), 0.5, np.float32), "v_descale": 3.0}
    case = Case(head_dim=head_dim, mask=mask, heads="gqa4", seqlens=(500, 900))
    run(case, softcap=15.0, **factors)
    run(case, alibi_slopes=slopes, learnable_sink=sinks)
    if mask != "full":
        run(case, alibi_slopes=slopes, softcap=15.0, learnable_sink=sinks, q_offset=300, k_offset=40, **factors)
    run(Case(head_dim=head_dim, mask=mask, heads="gqa4", seqlens=(3, 900)), alibi_slopes=slopes, **factors)  # heads packed


@pytest.mark.parametrize("accumulate", ["fast", "precise"])
@pytest.mark.parametrize("head_dim", [64, 128, 256])
def test_packed_sequences(head_dim: int, accumulate: str) -> None:
    import cupy

    lengths = Lengths("mixed", ((100, 100), (1, 900), (0, 50), (77, 0), (430, 200)), behind=(9, 5))
    dtype = DTYPES["e4m3"]
    q, k, v = (cupy.asarray(x.view(np.uint8)) for x in lengths.qkv(np, np.random.default_rng(7), (4, 2), head_dim, dtype))
    factors = cupy.linspace(0.5, 2, 10, dtype=np.float32).reshape(5, 2)
    options = {"causal": True, "k_descale": factors, "v_descale": factors, **lengths.arrays(cupy)}
    out, lse = cutlass_fa.flash_attn_varlen_func(q, k, v, dtype=dtype, return_lse=True, accumulate=accumulate, **options)
    q[cupy.asarray(~lengths.rows_in_use(0))] = 0
    check_forward(out, lse, q, k, v, case=f"packed {head_dim}", dtype=dtype, **options)


@pytest.mark.parametrize("head_dim", [64, 128, 256])
def test_equal_calls_give_equal_bits(head_dim: int) -> None:
    case = Case(head_dim=head_dim, heads="gqa4", seqlens=(700, 1500))
    q, k, v = case.arrays()
    first = cutlass_fa.flash_attn_func(q, k, v, causal=True, **case.types).view(np.uint16)
    for _ in range(1000):
        again = cutlass_fa.flash_attn_func(q, k, v, causal=True, **case.types, out=case.poisoned_out(q)).view(np.uint16)
        assert bool((again == first).all())


def test_torch_tensors_are_taken_as_they_are() -> None:
    torch = pytest.importorskip("torch")
    q, k, v = (torch.randn((1, 200, 2, 64), device="cuda").to(torch.float8_e4m3fn) for _ in range(3))
    factors = torch.full((1, 2), 2.0, device="cuda")
    out = cutlass_fa.flash_attn_func(q, k, v, causal=True, v_descale=factors)
    exact, _ = attention_forward(*(x.float().cpu().numpy() for x in (q, k, v)), causal=True, v_descale=2.0)
    assert out.dtype == torch.bfloat16
    assert np.abs(out.float().cpu().numpy() - exact).max() < 0.2
    assert cutlass_fa.flash_attn_func(q, k, v, out_dtype=torch.float16).dtype == torch.float16


def test_quantised_arrays() -> None:
    import cupy

    rng = np.random.default_rng(2)
    q, k, v = (random_outliers(rng, (2, 300, heads, 128)) for heads in (8, 2, 2))
    exact, _ = attention_forward(q, k, v, causal=True)
    for granularity in ("tensor", "head", "block"):
        for rotate in (False, True):
            quantized = cutlass_fa.quantize_qkv(*map(cupy.asarray, (q, k, v)), granularity=granularity, rotate=rotate)
            out = cutlass_fa.flash_attn_func(quantized.q, quantized.k, quantized.v, causal=True, **quantized.arguments)
            error = np.sqrt(((out.get().astype(np.float64) - exact) ** 2).mean() / (exact**2).mean())
            assert error < 0.15, (granularity, rotate, error)
