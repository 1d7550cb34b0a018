"""The backward without a GPU: requests, keys, arrays checked by name, launches and workspace, the tiles' layout, the reference backend."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import ml_dtypes
import numpy as np
import pytest

import cutlass_fa
from cutlass_fa import Causal, Fa2BwdRequest, errors
from cutlass_fa.arch.fa2_bwd import FA2_BWD_OWN_P_TILES, FA2_BWD_TILES, fa2_bwd_tile
from cutlass_fa.arch.limits import ARCH_LIMITS
from cutlass_fa.arrays import ArraySpec
from cutlass_fa.cell import Cell
from cutlass_fa.cells.fa2_bwd import Fa2BwdCell, fa2_bwd_params
from cutlass_fa.dispatch import CELL_HEAD_DIMS, DISPATCH_TABLE, DispatchKey
from cutlass_fa.dropout import dropout_mask
from cutlass_fa.explain import keys_of
from cutlass_fa.extras import ExtraSpecs
from cutlass_fa.launches.fa2_bwd import Workspace, launches_of
from cutlass_fa.layouts import PaddedTile, ldmatrix_coordinates, mma_a_coordinates
from cutlass_fa.params import params_dtype
from cutlass_fa.problem_backward import BackwardProblem
from cutlass_fa.reference import attention_backward
from cutlass_fa.request_parts import Full
from tests.keys import sampled_keys

REQUEST = Fa2BwdRequest(batch=2, seqlen_q=1000, seqlen_k=2000, num_heads_q=8, num_heads_kv=2, head_dim=128)
BWD_KEYS = [key for key in sampled_keys() if key.direction == "bwd"]


# ---- requests ------------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("change", "error", "words"),
    [
        ({"dtype": "e4m3"}, errors.Fp8BackwardUnsupported, "dtype=e4m3: gradients do not fit fp8"),
        ({"num_sms": 0}, errors.InvalidArgument, "num_sms=0"),
        ({"num_splits": -1}, errors.InvalidArgument, "num_splits=-1"),
        ({"num_copies": 2}, errors.InvalidArgument, "num_copies=2: only a deterministic backward"),
        ({"dropout_p": 1.0}, errors.InvalidArgument, "dropout_p=1.0"),
        ({"head_dim": 264}, errors.UnsupportedHeadDim, "head_dim=264"),
    ],
)
def test_request_refuses(change: dict[str, Any], error: type[Exception], words: str) -> None:
    with pytest.raises(error, match=words):
        replace(REQUEST, **change)


def test_a_call_names_every_kernel() -> None:
    names = [str(key) for key in replace(REQUEST, mask=Causal(), softcap=5.0, deterministic=True, num_splits=1).dispatch_keys()]
    assert names == [
        "fa2_bwd_preprocess_sm90a_bf16_hdim128",
        "fa2_bwd_sm90a_bf16_hdim128_causal_softcap_deterministic",
        "fa2_bwd_convert_sm90a_bf16_hdim128",
    ]
    split = replace(REQUEST, num_splits=3)
    assert [str(key) for key in split.dispatch_keys()][-1] == "fa2_bwd_convert_sm90a_bf16_hdim128_split" and split.dispatch_key().split
    with_sinks = replace(split, recompute=True, learnable_sink=True, mask=Causal())
    assert [str(key) for key in with_sinks.dispatch_keys()] == [
        "fa3_fwd_sm90a_bf16_hdim128_causal_lsink",
        "fa2_bwd_preprocess_sm90a_bf16_hdim128_lsink",
        "fa2_bwd_sm90a_bf16_hdim128_causal_split",
        "fa2_bwd_convert_sm90a_bf16_hdim128",
        "fa2_bwd_convert_sm90a_bf16_hdim128_split",
        "fa2_bwd_reduce_sm90a_bf16_hdim128",
    ]
    with_forward = replace(REQUEST, recompute=True, mask=Causal(), num_splits=1)
    assert str(with_forward.dispatch_keys()[0]).startswith("fa3_fwd_sm90a_bf16_hdim128_causal")
    assert str(replace(with_forward, dropout_p=0.1).dispatch_keys()[0]) == "fa2_fwd_sm90a_bf16_hdim128_causal_dropout"
    assert keys_of(split) == split.dispatch_keys() and keys_of(names[1]) == (DispatchKey.parse(names[1]),)
    for each in (*with_forward.dispatch_keys(), *split.dispatch_keys(), *with_sinks.dispatch_keys()):
        assert DISPATCH_TABLE.why_not(each) == []


@pytest.mark.parametrize("heads", [(16, 16), (16, 1), (64, 8), (1, 1)])
@pytest.mark.parametrize("seqlens", [(64, 64), (4096, 4096), (16384, 512), (100000, 1)])
def test_splits_and_copies_fill_the_gpu_and_no_more(heads: tuple[int, int], seqlens: tuple[int, int]) -> None:
    plain = Fa2BwdRequest(batch=1, seqlen_q=seqlens[0], seqlen_k=seqlens[1], num_heads_q=heads[0], num_heads_kv=heads[1], head_dim=128)
    m_blocks, n_blocks = plain.blocks
    assert plain.copies == 1 and plain.splits * n_blocks * heads[1] <= max(plain._sms, n_blocks * heads[1])
    assert 1 <= plain.splits <= max(1, m_blocks * heads[0] // heads[1] // 4)
    ordered = replace(plain, deterministic=True)
    assert 1 <= ordered.copies <= n_blocks and ordered.copies * heads[0] < plain._sms + heads[0]
    assert ordered.splits <= max(1, m_blocks * heads[0] // heads[1] // 4)


# ---- arrays --------------------------------------------------------------------------------------------------------------------------


def spec(*shape: int, dtype: str = "bf16", strides: tuple[int, ...] | None = None, device: int = 0) -> ArraySpec:
    contiguous = tuple(int(np.prod(shape[i + 1 :])) for i in range(len(shape)))
    return ArraySpec(shape, strides or contiguous, dtype, device)


def problem(**changes: Any) -> BackwardProblem:
    q, k = spec(2, 100, 8, 64), spec(2, 150, 2, 64)
    lse = spec(2, 8, 100, dtype="float32")
    arguments: dict[str, Any] = {"dout": q, "q": q, "k": k, "v": k, "out": q, "lse": lse, "dlse": None, "gradients": (None, None, None)}
    arguments |= {"recompute": False, "arch": "sm_90a", "mask": Full(), **changes}
    return BackwardProblem.from_specs(**arguments)


SINKS = spec(8, dtype="float32")
WITH_SINKS = ExtraSpecs(learnable_sink=SINKS)


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"dout": spec(2, 100, 8, 72)}, "dout has shape"),
        ({"dout": spec(2, 100, 8, 64, dtype="f16")}, "dout has dtype f16"),
        ({"out": None}, "out is None and recompute=False"),
        ({"recompute": True}, "out is given and recompute=True"),
        ({"lse": spec(2, 8, 101, dtype="float32")}, r"lse has shape \(2, 8, 101\): expected \(2, 8, 100\)"),
        ({"lse": spec(2, 8, 100, dtype="f16")}, "lse has dtype f16: expected float32"),
        ({"lse": spec(2, 8, 100, dtype="float32", strides=(1600, 200, 2))}, "lse has strides"),
        ({"dlse": spec(2, 8, 99, dtype="float32")}, "dlse has shape"),
        ({"dlse": spec(2, 8, 100, dtype="float32", device=1)}, "dlse is on device 1"),
        ({"gradients": (spec(2, 100, 2, 64), None, None)}, r"dq has shape .* the shape of q"),
        ({"gradients": (None, spec(2, 150, 8, 64), None)}, r"dk has shape .* the shape of k"),
        ({"gradients": (None, None, spec(2, 150, 2, 64, dtype="f16"))}, "dv has dtype f16"),
        ({"gradients": (None, spec(2, 150, 2, 64, strides=(0, 128, 64, 1)), None)}, "dk has strides .* stride of 0"),
        ({"gradients": (None, None, spec(2, 150, 2, 64, strides=(20000, 129, 64, 1)))}, "dv has strides .* dimension 1"),
        ({"q": spec(2, 100, 8, 64, strides=(2**40, 2**31, 64, 1))}, "q has 2147483648 elements from one row to the next"),
        ({"out": spec(2, 100, 8, 64, device=1)}, "out is on device 1"),
        ({"dlearnable_sink": SINKS}, "dlearnable_sink is given and learnable_sink is None"),
        ({"extras": ExtraSpecs(learnable_sink=spec(2, 8, dtype="float32"))}, r"learnable_sink has shape \(2, 8\): expected \(8,\)"),
        ({"extras": WITH_SINKS, "dlearnable_sink": spec(4, dtype="float32")}, r"dlearnable_sink has shape \(4,\)"),
        ({"extras": WITH_SINKS, "dlearnable_sink": spec(8)}, "dlearnable_sink has dtype bf16"),
        ({"extras": WITH_SINKS, "dlearnable_sink": spec(8, dtype="float32", strides=(0,))}, "dlearnable_sink has strides"),
        ({"extras": WITH_SINKS, "dlearnable_sink": spec(8, dtype="float32", device=1)}, "dlearnable_sink is on device 1"),
    ],
)
def test_arrays_are_checked_by_name(change: dict[str, Any], words: str) -> None:
    with pytest.raises(errors.InvalidArgument, match=words):
        problem(**change)


def test_a_broadcast_dout_is_read_and_fresh_gradients_are_contiguous() -> None:
    made = problem(dout=spec(2, 100, 8, 64, strides=(0, 0, 0, 1)), out=None, lse=None, recompute=True)
    assert made.dq == made.q and made.dk == made.k and made.lse.strides == (800, 100, 1)


# ---- launches ------------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("options", [{}, {"deterministic": True, "num_copies": 2}, {"num_splits": 5}, {"extras": WITH_SINKS}], ids=str)
def test_workspace_parts_do_not_overlap_and_hold_what_kernels_write(options: dict[str, Any]) -> None:
    made = problem(**options)
    request = made.request
    cell = Cell.of(request.dispatch_key())
    assert isinstance(cell, Fa2BwdCell)
    rows = 2 * 8 * request.blocks[0] * cell.tile_m
    parts = request.splits * 2 * 2 * 150 * 64 if request.splits > 1 else 0
    workspace = Workspace.of(made, cell)
    places = [*workspace.places.values(), 4 * workspace.floats]
    needed = [4 * size for size in (rows, rows, request.copies * rows * 64, parts, parts, rows // cell.tile_m * request.learnable_sink, 0)]
    assert all(start % 256 == 0 and start + size <= end for start, size, end in zip(places[:-1], needed, places[1:], strict=True))


def test_launches_cover_every_block() -> None:
    made = problem(num_splits=5)
    cells = {key: Cell.of(key) for key in made.request.dispatch_keys()}
    m_blocks, n_blocks = made.request.blocks
    assert m_blocks * 8 // 2 >= made.request.splits == 5 or made.request.splits == m_blocks * 4
    launches = launches_of(made, cells)
    assert [each.key.direction for each in launches] == ["bwd_preprocess", "bwd", "bwd_convert", "bwd_convert", "bwd_convert"]
    assert launches[0].grid == launches[2].grid == m_blocks * 8 * 2 and launches[1].grid == n_blocks * 2 * 2 * made.request.splits
    assert launches[3].addresses == ("dk", "dk_parts") and launches[4].addresses == ("dv", "dv_parts")
    assert float(launches[3].params["scale"][0]) == pytest.approx(0.125) and float(launches[4].params["scale"][0]) == 1.0
    assert launches[3].grid * cells[launches[3].key].threads * 4 >= 2 * 2 * 150 * 64


def test_the_gradient_of_learnable_sinks_is_reduced_last() -> None:
    made = problem(num_splits=5, extras=WITH_SINKS)
    assert made.dlearnable_sink == SINKS and problem().dlearnable_sink is None
    cells = {key: Cell.of(key) for key in made.request.dispatch_keys()}
    first, *_, last = launches_of(made, cells)
    assert first.addresses[-2:] == ("learnable_sink", "learnable_sink_parts")
    assert last.addresses == ("learnable_sink_parts", "dlearnable_sink") and last.grid == 8
    assert last.params["num_parts"] * last.grid == first.grid, "one part of each CTA"


def test_a_stride_of_one_element_may_be_any_number() -> None:
    """NumPy and CuPy give a dimension of one element whatever stride."""
    q, lse = spec(1, 1, 1, 64, strides=(2**50, 2**40, 2**45, 1)), spec(1, 1, 1, dtype="float32")
    made = problem(q=q, dout=q, out=q, k=spec(1, 1, 1, 64), v=spec(1, 1, 1, 64), lse=lse)
    cells = {key: Cell.of(key) for key in made.request.dispatch_keys()}
    assert int(launches_of(made, cells)[1].params["q_stride_row"][0]) == 0


@pytest.mark.parametrize("key", BWD_KEYS[:: 7 * len(ARCH_LIMITS)], ids=str)
def test_params_have_no_holes(key: DispatchKey) -> None:
    fields = fa2_bwd_params(key)
    dtype = params_dtype(fields)
    offsets = [dtype.fields[field.name][1] for field in fields]
    assert offsets == np.cumsum([0, *(field.size_bytes for field in fields)])[:-1].tolist()


# ---- tiles ---------------------------------------------------------------------------------------------------------------------------


def test_every_architecture_has_every_head_dim() -> None:
    assert set(FA2_BWD_TILES) == set(ARCH_LIMITS) and all(set(rows) == set(CELL_HEAD_DIMS) for rows in FA2_BWD_TILES.values())


@pytest.mark.parametrize("arch", ARCH_LIMITS)
def test_passes_serve_tiles_with_and_without_a_second_p(arch: str) -> None:
    for head_dim in FA2_BWD_OWN_P_TILES.get(arch, {}):
        plain, own = fa2_bwd_tile(arch, head_dim), fa2_bwd_tile(arch, head_dim, {"softcap"})
        assert plain != own and (plain.tile_m, plain.dq_warps_m) == (own.tile_m, own.dq_warps_m)
        assert own == fa2_bwd_tile(arch, head_dim, {"dropout"})


@pytest.mark.parametrize("cols", [32, 64, 80, 96, 128, 192, 256])
def test_padded_tiles_have_no_bank_conflicts(cols: int) -> None:
    """Of eight neighbouring rows, the units at one column take all eight places of the banks' 128 bytes; and so do the 32 words that a
    warp writes of a fragment: 8 rows, 4 words each."""
    tile = PaddedTile(128, cols)
    for row in range(0, 121):
        places = {tile.byte_offset(row + i, 0) % 128 for i in range(8)}
        assert places == set(range(0, 128, 16))
    words = {tile.byte_offset(8 + lane // 4, 16 + 2 * (lane % 4)) // 4 % 32 for lane in range(32)}
    assert len(words) == 32
    assert tile.size_bytes == 128 * tile.pitch_bytes and tile.pitch_bytes // 16 % 2 == 1
    with pytest.raises(ValueError, match="multiple of 16"):
        PaddedTile(64, 72)
    with pytest.raises(ValueError, match="row"):
        tile.byte_offset(128, 0)


def test_transposed_a_operand() -> None:
    """Lane l's address names row l % 8 of matrix l / 8; a transposed word holds (column, rows) of it."""
    tile = np.arange(256).reshape(16, 16)  # (k, row of A)
    for lane in range(32):
        for register in range(4):
            for half in range(2):
                first, column = ldmatrix_coordinates("a_mn_major", 8 * register + lane % 4 * 2 + half)
                row, k = mma_a_coordinates(lane, register, half)
                assert tile[first, column + lane // 4] == tile[k, row]


@pytest.mark.parametrize("pitch", [144, 272])
def test_lane_offsets_are_those_of_layouts(pitch: int) -> None:
    """The two formulas of warp_product.cuh."""
    for lane in range(32):
        down = lane % 16 * pitch + lane // 16 * 16
        along = (lane % 8 + lane // 16 * 8) * pitch + lane // 8 % 2 * 16
        for operand, offset in (("a", down), ("b_mn_major", down), ("b", along), ("a_mn_major", along)):
            row, column = ldmatrix_coordinates(operand, lane)
            assert row * pitch + 2 * column == offset, operand


# ---- the reference backend -----------------------------------------------------------------------------------------------------------


def arrays(dtype: Any = ml_dtypes.bfloat16) -> dict[str, np.ndarray]:
    rng = np.random.default_rng(0)
    shapes = {"dout": (2, 7, 4, 16), "q": (2, 7, 4, 16), "k": (2, 9, 2, 16), "v": (2, 9, 2, 16)}
    return {name: rng.standard_normal(shape, dtype=np.float32).astype(dtype) for name, shape in shapes.items()}


def test_reference_backend() -> None:
    given = arrays()
    out, lse = cutlass_fa.flash_attn_func(given["q"], given["k"], given["v"], causal=True, return_lse=True, backend="reference")
    into = {"dq": np.zeros_like(given["q"]), "dv": np.zeros_like(given["v"])}
    dlse = np.ones_like(lse)
    options: dict[str, Any] = {"causal": True, "softcap": 2.0, "dropout_p": 0.25, "dropout_seed": 3, "dropout_offset": 1 << 40}
    result = cutlass_fa.flash_attn_backward(*given.values(), out, lse, dlse=dlse, backend="reference", **options, **into)
    assert result[0] is into["dq"] and result[2] is into["dv"]
    mask = dropout_mask(3, 1 << 40, 0.25, 2, 4, 7, 9)
    exact = attention_backward(*given.values(), dlse=dlse, causal=True, softcap=2.0, dropout_mask=mask, dropout_p=0.25)
    for got, expected in zip(result, (exact.dq, exact.dk, exact.dv), strict=True):
        assert got.dtype == given["q"].dtype and (got == expected.astype(got.dtype)).all()
    again = cutlass_fa.flash_attn_backward(*given.values(), recompute=True, dlse=dlse, backend="reference", **options)
    assert all((a == b).all() for a, b in zip(result, again, strict=True))


def test_reference_backend_with_learnable_sinks() -> None:
    given = arrays()
    sinks, into = np.array([0.5, -np.inf, 3.0, -1.0], np.float32), np.zeros(4, np.float32)
    options: dict[str, Any] = {"causal": True, "learnable_sink": sinks, "backend": "reference"}
    out, lse = cutlass_fa.flash_attn_func(given["q"], given["k"], given["v"], return_lse=True, **options)
    assert (lse >= sinks[:, None]).all()
    result = cutlass_fa.flash_attn_backward(*given.values(), out, lse, dlearnable_sink=into, **options)
    exact = attention_backward(*given.values(), causal=True, learnable_sink=sinks)
    assert exact.dlearnable_sink is not None and len(result) == 4 and result[3] is into
    assert (into == exact.dlearnable_sink.astype(np.float32)).all() and into[1] == 0
    again = cutlass_fa.flash_attn_backward(*given.values(), recompute=True, **options)
    assert all((a == b).all() for a, b in zip(result, again, strict=True)) and again[3].dtype == np.float32
    with pytest.raises(errors.InvalidArgument, match="dlearnable_sink is given and learnable_sink is None"):
        cutlass_fa.flash_attn_backward(*given.values(), recompute=True, dlearnable_sink=into, backend="reference")


def test_calls_that_cannot_be_served_say_why() -> None:
    given = arrays()
    with pytest.raises(errors.InvalidArgument, match="backend='cpu'"):
        cutlass_fa.flash_attn_backward(*given.values(), recompute=True, backend="cpu")
    with pytest.raises((errors.MockMode, errors.InvalidArgument), match="backend='reference'"):
        cutlass_fa.flash_attn_backward(*given.values(), recompute=True)
    with pytest.raises(errors.Fp8BackwardUnsupported, match="e4m3"):
        cutlass_fa.flash_attn_backward(*arrays(ml_dtypes.float8_e4m3fn).values(), recompute=True, backend="reference")
    with pytest.raises(errors.InvalidArgument, match="v is None"):
        cutlass_fa.flash_attn_backward(given["dout"], given["q"], given["k"], None, recompute=True)
    with pytest.raises(errors.InvalidArgument, match="dropout_seed=-1"):
        cutlass_fa.flash_attn_backward(*given.values(), recompute=True, dropout_p=0.1, dropout_seed=-1, backend="reference")
