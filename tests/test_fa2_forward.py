"""The fa2 forward without a GPU: its requests and keys, Params, tile tables, the softcap's tanh, and the reference's dropout."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest

import cutlass_fa
from cutlass_fa import Causal, Fa2FwdRequest, Fa3FwdRequest, Full, Grid, Persistent, errors
from cutlass_fa.arch.limits import ARCH_LIMITS
from cutlass_fa.arrays import ArraySpec
from cutlass_fa.cell import Cell
from cutlass_fa.cells.fa2_fwd import Fa2FwdCell
from cutlass_fa.dispatch import CELL_HEAD_DIMS, DISPATCH_TABLE, DispatchKey
from cutlass_fa.dropout import dropout_mask, keep_threshold
from cutlass_fa.executor import ExecutorKernel, GlobalMemory, compiler_problem, launch
from cutlass_fa.executor.forward import SMALL_DEVICE
from cutlass_fa.explain import choice_notes
from cutlass_fa.launches.fa2_fwd import grid_of, pack_params
from cutlass_fa.params import fa2_fwd_params, params_dtype
from cutlass_fa.problem import Problem, contiguous_strides
from cutlass_fa.render import Source

REQUEST = Fa2FwdRequest(batch=2, seqlen_q=200, seqlen_k=300, num_heads_q=8, num_heads_kv=2, head_dim=128, arch="sm_80")


def problem_of(arch: str, *, head_dim: int = 128, seqlen_q: int = 200, **options: object) -> Problem:
    def spec(seqlen: int, heads: int) -> ArraySpec:
        shape = (2, seqlen, heads, head_dim)
        return ArraySpec(shape, contiguous_strides(shape), "bf16", 0)

    mask = options.pop("mask", Full())
    return Problem.from_specs(spec(seqlen_q, 8), spec(300, 2), spec(300, 2), None, arch=arch, mask=mask, **options)


# ---- requests and the choice of a family -----------------------------------------------------------------------------------------------


def test_keys() -> None:
    assert str(REQUEST.dispatch_key()) == "fa2_fwd_sm80_bf16_hdim128"
    changed = replace(REQUEST, arch="sm_121", head_dim=72, mask=Causal(), softcap=30.0, dropout_p=0.1, seqlen_q=1)
    assert str(changed.dispatch_key()) == "fa2_fwd_sm121_bf16_hdim80_causal_softcap_dropout"
    assert replace(changed, softcap=5.0, dropout_p=0.5).dispatch_key() == changed.dispatch_key()
    assert str(replace(REQUEST, arch="sm_90a").dispatch_key()) == "fa2_fwd_sm90a_bf16_hdim128"


@pytest.mark.parametrize(
    ("seqlen_q", "gqa_ratio", "packed"),
    [(1, 8, 8), (16, 8, 8), (1, 1, 1), (3, 5, 5), (1, 64, 64), (1, 128, 1), (64, 4, 4), (65, 4, 1), (200, 4, 1), (4096, 4, 1)],
)
def test_heads_are_packed_where_queries_are_few(seqlen_q: int, gqa_ratio: int, packed: int) -> None:
    """From 65 queries on 4 heads fill more tiles of 64 rows packed than of 128 rows each."""
    request = replace(REQUEST, seqlen_q=seqlen_q, num_heads_q=gqa_ratio * 2, num_heads_kv=2)
    assert request.dispatch_key().gqa_ratio == packed
    assert replace(request, dropout_p=0.1).dispatch_key().gqa_ratio == 1


def test_packed_heads_are_one_tile_of_a_key_head() -> None:
    problem = problem_of("sm_80", seqlen_q=5)
    cell = Cell.of(problem.request.dispatch_key())
    assert isinstance(cell, Fa2FwdCell) and (cell.gqa_ratio, cell.queries_per_tile, cell.tile_m) == (4, 16, 64)
    packed = pack_params(problem, cell, SMALL_DEVICE)[0]
    assert (packed["num_heads_kv"], packed["num_m_blocks"]) == (2, 1) and grid_of(problem, cell) == 2 * 2
    assert any("4 query heads" in note for note in choice_notes(cell.key))


@pytest.mark.parametrize(
    ("arch", "options", "expected"),
    [
        ("sm_90a", {}, Fa3FwdRequest),
        ("sm_90a", {"softcap": 30.0}, Fa3FwdRequest),
        ("sm_90a", {"dropout_p": 0.1}, Fa2FwdRequest),
        ("sm_90a", {"family": "fa2"}, Fa2FwdRequest),
        ("sm_90a", {"family": "fa3", "dropout_p": 0.1}, Fa3FwdRequest),
        ("sm_80", {}, Fa2FwdRequest),
        ("sm_121", {"persistent": Grid()}, Fa2FwdRequest),
    ],
)
def test_family_of_a_problem(arch: str, options: dict[str, object], expected: type) -> None:
    assert type(problem_of(arch, **options).request) is expected


@pytest.mark.parametrize(
    ("arch", "options", "error", "words"),
    [
        ("sm_80", {"family": "fa3"}, errors.Fa3RequiresHopper, "sm_80"),
        ("sm_80", {"family": "fa1"}, errors.InvalidArgument, "family='fa1'"),
        ("sm_80", {"persistent": Persistent(3)}, errors.InvalidArgument, "persistent="),
        ("sm_70", {}, errors.InvalidArgument, "sm_70"),
        ("sm_80", {"softcap": -1.0}, errors.InvalidArgument, "softcap=-1"),
        ("sm_80", {"softcap": float("inf")}, errors.InvalidArgument, "softcap=inf"),
        ("sm_80", {"dropout_p": 1.0}, errors.InvalidArgument, r"dropout_p=1\.0"),
        ("sm_80", {"dropout_p": float("nan")}, errors.InvalidArgument, "dropout_p=nan"),
    ],
)
def test_problem_refuses(arch: str, options: dict[str, object], error: type[Exception], words: str) -> None:
    with pytest.raises(error, match=words):
        problem_of(arch, **options)


def test_dropout_asked_of_the_hopper_family_is_refused_with_its_reason() -> None:
    key = problem_of("sm_90a", family="fa3", dropout_p=0.1).request.dispatch_key()
    assert DISPATCH_TABLE.why_not(key) == ["dropout is not built yet in the fa3 fwd"]


def test_notes_say_what_was_chosen() -> None:
    (note,) = choice_notes(replace(REQUEST, arch="sm_121").dispatch_key())
    assert "no table for sm_121" in note and "sm_120" in note
    assert "which has dropout" in choice_notes(replace(REQUEST, arch="sm_90a", dropout_p=0.1).dispatch_key())[0]
    assert choice_notes(REQUEST.dispatch_key()) == ()


# ---- tables and Params -----------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("head_dim", CELL_HEAD_DIMS)
@pytest.mark.parametrize("arch", ARCH_LIMITS)
def test_every_cell_fits_its_architecture(arch: str, head_dim: int) -> None:
    flags = ("causal", "softcap", "dropout", "sliding_window", "alibi")
    for chosen in np.ndindex((2,) * len(flags)):
        key = DispatchKey("fa2", "fwd", arch, "bf16", head_dim, **dict(zip(flags, map(bool, chosen), strict=True)))
        cell = Cell.of(key)
        assert isinstance(cell, Fa2FwdCell) and cell.misfits() == []
        together = cell.ctas_per_sm * (cell.smem_bytes + 1024)
        assert together <= ARCH_LIMITS[arch].sm_smem_bytes and cell.ctas_per_sm * cell.threads * cell.accumulator_registers < 65536


def test_a_misfit_is_named() -> None:
    cell = Cell.of(REQUEST.dispatch_key())
    assert isinstance(cell, Fa2FwdCell)
    for change, words in (
        ({"warp_rows": 24}, "warp_rows 24"),
        ({"tile_n": 40}, "tile_n 40"),
        ({"stages": 1}, "1 stages"),
        ({"ctas_per_sm": 9}, "shared memory for 9 CTAs"),
        ({"tile_n": 256}, "registers of"),
    ):
        misfit = replace(cell, tile=replace(cell.tile, **change))
        assert any(words in reason for reason in misfit.misfits())
        with pytest.raises(AssertionError, match="does not fit"):
            misfit.check_limits()


@pytest.mark.parametrize(
    ("flags", "tile", "words"),
    [
        ({}, {"tile_n": 256}, "64 rows of a block for 32 lanes"),
        ({"k_tokens_inner": True}, {"tile_n": 48}, "48 is no multiple of the 32 keys of a swizzled row"),
    ],
)
def test_a_misfit_of_pages_is_named(flags: dict[str, bool], tile: dict[str, int], words: str) -> None:
    key = DispatchKey("fa2", "fwd", "sm_80", "bf16", 64, varlen=True, paged=True, **flags)
    cell = Cell.of(key)
    assert isinstance(cell, Fa2FwdCell)
    assert any(words in reason for reason in replace(cell, tile=replace(cell.tile, **tile)).misfits())


@pytest.mark.parametrize("tokens_inner", [(False, False), (True, False), (False, True), (True, True)])
@pytest.mark.parametrize("gqa_ratio", [1, 4])
@pytest.mark.parametrize("head_dim", CELL_HEAD_DIMS)
@pytest.mark.parametrize("arch", ARCH_LIMITS)
def test_every_cell_of_a_cache_fits_its_architecture(arch: str, head_dim: int, gqa_ratio: int, tokens_inner: tuple[bool, bool]) -> None:
    flags = {"k_tokens_inner": tokens_inner[0], "v_tokens_inner": tokens_inner[1], "varlen": True, "paged": True}
    for alibi in (False, True):
        key = DispatchKey("fa2", "fwd", arch, "bf16", head_dim, alibi=alibi, gqa_ratio=gqa_ratio, **flags)
        cell = Cell.of(key)
        fields = fa2_fwd_params(key)
        offsets = [params_dtype(fields).fields[field.name][1] for field in fields]
        assert offsets == np.cumsum([0, *(field.size_bytes for field in fields)])[:-1].tolist()
        for array, inner in zip("kv", tokens_inner, strict=True):
            steps = {field.name for field in fields if field.name.startswith(f"{array}_stride_")}
            assert steps == {f"{array}_stride_{axis}" for axis in ("batch", "column" if inner else "row", "head")}
        assert isinstance(cell, Fa2FwdCell) and cell.tile_m // gqa_ratio == cell.queries_per_tile


@pytest.mark.parametrize("features", list(np.ndindex((2,) * 8)), ids=str)
def test_params_have_no_holes(features: tuple[int, ...]) -> None:
    names = ("causal", "softcap", "dropout", "sliding_window", "sink", "alibi", "learnable_sink", "position_offset")
    flags = dict(zip(names, map(bool, features), strict=True))
    fields = fa2_fwd_params(DispatchKey("fa2", "fwd", "sm_80", "bf16", 128, **flags))
    dtype = params_dtype(fields)
    offsets = [dtype.fields[field.name][1] for field in fields]
    expected = np.cumsum([0, *(field.size_bytes for field in fields)])
    assert offsets == expected[:-1].tolist() and dtype.itemsize == -(-expected[-1] // 8) * 8
    written = ["q", "k", "v", "o", "lse"] + ["alibi_slopes"] * features[5] + ["learnable_sink"] * features[6]
    written += ["dropout_seed", "dropout_offset"] * features[2]
    assert [field.name for field in fields[: len(written)]] == written, "the words that a run writes, in this order"


def test_packed_params() -> None:
    problem = problem_of("sm_80", mask=Causal(), softcap=20.0, dropout_p=0.25, softmax_scale=0.5)
    cell = Cell.of(problem.request.dispatch_key())
    assert isinstance(cell, Fa2FwdCell)
    packed = pack_params(problem, cell, SMALL_DEVICE)[0]
    assert (packed["q_stride_row"], packed["k_stride_row"], packed["o_stride_head"]) == (8 * 128, 2 * 128, 128)
    assert packed["softcap_prescale"] == np.float32(0.5 / 20) and packed["softmax_scale_log2"] == np.float32(20 * np.log2(np.e))
    assert packed["keep_threshold"] == keep_threshold(0.25) == 49152 and packed["keep_scale"] == np.float32(1 / 0.75)
    assert packed["heads_per_kv_head"] == 4 and packed["num_m_blocks"] == -(-200 // cell.tile_m)
    assert grid_of(problem, cell) == -(-200 // cell.tile_m) * 8 * 2


# ---- numbers ---------------------------------------------------------------------------------------------------------------------------

_TANH = """#include <cutlass_fa/math.cuh>
using namespace cutlass_fa;
struct Params {
  float* values;
  int count;
};
extern "C" __global__ void tanh_of_all(const __grid_constant__ Params params) {
  for (int i = thread_index(); i < params.count; i += 32) { params.values[i] = tanh_approx(params.values[i]); }
}
"""


@pytest.mark.skipif(compiler_problem() is not None, reason=str(compiler_problem()))
def test_tanh_is_as_close_as_its_comment_says() -> None:
    x = np.concatenate([np.linspace(-12, 12, 20001), np.geomspace(1e-8, 100, 2000), [0.0, 1e30, -1e30]]).astype(np.float32)
    program = ExecutorKernel.build(Source("tanh_of_all", "sm_80", "tanh_of_all", _TANH, 1024, 32))
    memory = GlobalMemory()
    values = memory.add("values", x.view(np.uint8), writable=True)
    launch(program, 1, [np.uint64(values.address).tobytes() + np.array([x.size, 0], np.int32).tobytes()], memory, seed=0)
    error = np.abs(values.data.view(np.float32) - np.tanh(x.astype(np.float64)))
    assert error.max() < 3e-7


def test_reference_backend_has_softcap_and_the_kernels_dropout() -> None:
    rng = np.random.default_rng(0)
    q, k, v = (rng.standard_normal((2, 40, heads, 64)).astype(np.float16) for heads in (4, 2, 2))
    options = {"softcap": 2.0, "dropout_p": 0.3, "dropout_seed": 5, "dropout_offset": 7}
    out, lse = cutlass_fa.flash_attn_func(q, k, v, backend="reference", return_lse=True, **options)
    scores = 2.0 * np.tanh(np.einsum("bqhd,bkhd->bhqk", q.astype(np.float64), np.repeat(k, 2, 2).astype(np.float64)) / 8.0 / 2.0)
    weights = np.exp(scores)
    kept = dropout_mask(5, 7, 0.3, 2, 4, 40, 40) / 0.7
    expected = np.einsum("bhqk,bkhd->bqhd", kept * weights / weights.sum(-1, keepdims=True), np.repeat(v, 2, 2).astype(np.float64))
    np.testing.assert_allclose(out.astype(np.float64), expected, atol=4e-3)
    np.testing.assert_allclose(lse, np.log(weights.sum(-1)), atol=1e-5)


@pytest.mark.parametrize(("name", "value"), [("dropout_seed", -1), ("dropout_offset", 1 << 64)])
def test_random_state_is_64_bit(name: str, value: int) -> None:
    arrays = [np.zeros((1, 8, 1, 64), np.float16)] * 3
    with pytest.raises(errors.InvalidArgument, match=name):
        cutlass_fa.flash_attn_func(*arrays, dropout_p=0.5, backend="reference", **{name: value})
