"""Appending to KV caches without a GPU: the reference beside a loop of another form, what is refused and why, what a launch is given."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import ml_dtypes
import numpy as np
import pytest

import cutlass_fa
from cutlass_fa import errors
from cutlass_fa.arrays import library_of
from cutlass_fa.cell import Cell
from cutlass_fa.check_kvcache import check_cache_numbers
from cutlass_fa.launches.append_kv import AppendPlan, address_words, grid_of, pack_params
from cutlass_fa.problem_append import APPEND_NAMES, AppendProblem
from cutlass_fa.reference import attention_forward
from cutlass_fa.reference_kvcache import attention_with_kvcache, prepare
from tests.append_cases import CASES, AppendCase, bits, check_append, naive_append

PAGED = AppendCase("paged", (3, 20), (4, 4), page=16, rotary="half")
ROWS = AppendCase("rows", (3, 20), (4, 4), rotary="interleaved")
PACKED = AppendCase("packed", (3, 20, 0), (4, 0, 2), page=16, packed=True, rotary="half")


def arrays_of(case: AppendCase) -> dict[str, Any]:
    return case.arrays(np.random.default_rng(11))


def problem_of(arrays: dict[str, Any], **options: Any) -> AppendProblem:
    library = library_of(np.ndarray)
    specs = {name: None if arrays.get(name) is None else library.spec(arrays[name]) for name in APPEND_NAMES}
    return AppendProblem.from_specs(specs, arch="sm_90a", **options)


# ---- reference -----------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("case", CASES, ids=str)
def test_reference_appends_as_a_loop_does(case: AppendCase) -> None:
    arrays = arrays_of(case)
    before = {name: array.copy() for name, array in arrays.items()}
    expected = naive_append(arrays, case.rotary == "interleaved", case.successive)
    found = prepare(**arrays, **case.options)
    for name in ("k_cache", "v_cache", "q"):
        np.testing.assert_allclose(getattr(found, name).astype(np.float64), getattr(expected, name), rtol=1e-15, atol=1e-15)
    assert (found.seqlens_k == expected.seqlens_k).all()
    assert all((array.view(np.uint8) == before[name].view(np.uint8)).all() for name, array in arrays.items() if array.flags.c_contiguous)


@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize("case", [PAGED, ROWS, PACKED], ids=str)
def test_reference_attends_to_each_sequence_by_itself(case: AppendCase, causal: bool) -> None:
    arrays, options = arrays_of(case), {"causal": causal, "window_size": (9, -1), "softcap": 3.0, "learnable_sink": np.arange(4.0)}
    leftpad = {"cache_leftpad": np.array([2, 11], np.int32)} if case is ROWS else {}
    call = {"rotary_interleaved": case.rotary == "interleaved", **leftpad}
    out, lse, k_cache, _ = attention_with_kvcache(**arrays, **call, **options)
    expected = naive_append(arrays, case.rotary == "interleaved", True)
    np.testing.assert_allclose(k_cache, expected.k_cache, rtol=1e-15, atol=1e-15)
    size = k_cache.shape[1]
    for b, length in enumerate(expected.seqlens_k):
        first = leftpad["cache_leftpad"][b] if leftpad else 0
        table = arrays["block_table"][b] if "block_table" in arrays else [arrays["cache_batch_idx"][b]]
        keys, values = (
            np.stack([cache[table[position // size], position % size] for position in range(first, length)])[None]
            for cache in (expected.k_cache, expected.v_cache)
        )
        rows = slice(*arrays["cu_seqlens_q"][b : b + 2]) if case.packed else b
        one, one_lse = attention_forward(expected.q[rows][None], keys, values, **options)
        np.testing.assert_allclose(out[rows], one[0], rtol=1e-12, atol=1e-12)
        np.testing.assert_allclose(lse[:, rows] if case.packed else lse[rows], one_lse[0], rtol=1e-12, atol=1e-12)


def test_reference_names_keys_that_are_not_there() -> None:
    arrays = arrays_of(PAGED)
    arrays["block_table"][1, 1] = 99
    with pytest.raises(ValueError, match="sequence 1: its 24 keys are not all in the cache"):
        attention_with_kvcache(**arrays)


# ---- the public function -------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("case", [PAGED, ROWS, PACKED, AppendCase("plain", (3, 20), (4, 4), page=16, k_layout="columns")], ids=str)
def test_reference_backend_writes_the_cache_in_place(case: AppendCase) -> None:
    """And rounds where the kernels do: attention sees the turned queries and keys in the element type."""
    arrays = arrays_of(case)
    before = {name: arrays[name].copy() for name in ("k_cache", "v_cache", "q")}
    interleaved = case.rotary == "interleaved"
    expected = naive_append(arrays, interleaved, True)
    call = {"causal": True, "rotary_interleaved": interleaved, "backend": "reference", "check": True}
    out, lse = cutlass_fa.flash_attn_with_kvcache(**arrays, **call, return_softmax_lse=True)
    dtype = arrays["q"].dtype
    rounded_q = arrays["q"] if case.rotary == "none" else expected.q.astype(dtype)
    left = SimpleNamespace(k_cache=arrays["k_cache"], v_cache=arrays["v_cache"], seqlens_k=expected.seqlens_k, turned_q=rounded_q)
    check_append(left, case, {**arrays, **before}, expected, case.rotary != "none")
    assert (bits(arrays["q"]) == bits(before["q"])).all()
    places = {name: arrays.get(name) for name in ("block_table", "cache_batch_idx", "cu_seqlens_q")}
    again = cutlass_fa.flash_attn_with_kvcache(
        rounded_q, arrays["k_cache"], arrays["v_cache"], cache_seqlens=expected.seqlens_k.astype(np.int32), causal=True,
        return_softmax_lse=True, backend="reference", **places,
    )  # fmt: skip
    assert (bits(out) == bits(again[0])).all() and (lse == again[1]).all() and lse.dtype == np.float32
    assert out.dtype == dtype and lse.shape == ((4, len(out)) if case.packed else (2, 4, 4))


def test_reference_backend_takes_one_length_out_and_float32() -> None:
    arrays = arrays_of(AppendCase("number", (20, 20), (4, 4), page=16)) | {"cache_seqlens": 20}
    out = np.empty(arrays["q"].shape, np.float32)
    found = cutlass_fa.flash_attn_with_kvcache(**arrays, out=out, out_dtype="float32", backend="reference")
    exact = attention_with_kvcache(**arrays)[0]
    assert found is out
    np.testing.assert_array_equal(out, exact.astype(np.float32))


def test_no_lengths_are_the_whole_cache() -> None:
    arrays = {name: array for name, array in arrays_of(ROWS).items() if name in ("q", "k_cache", "v_cache")}
    out = cutlass_fa.flash_attn_with_kvcache(**arrays, backend="reference")
    exact, _ = attention_forward(arrays["q"], arrays["k_cache"][:2], arrays["v_cache"][:2])
    assert (out == exact.astype(out.dtype)).all()


@pytest.mark.parametrize(
    ("call", "words"),
    [
        ({"cache_seqlens": None}, "cache_seqlens is None and k is given"),
        ({"cache_seqlens": -1}, "cache_seqlens=-1 and 4 new rows: the cache has room for 64 keys"),
        ({"cache_seqlens": 61}, "cache_seqlens=61 and 4 new rows"),
        ({"cache_leftpad": np.zeros(2, np.int32)}, "begin each sequence with its first block"),
        ({"cache_batch_idx": np.zeros(2, np.int32)}, "cache_batch_idx and block_table are both given"),
        ({"num_splits": -1}, "num_splits=-1"),
        ({"out_dtype": "float16"}, "out_dtype=float16: accepted are .float32."),
        ({"backend": "cpu"}, "backend='cpu'"),
        ({"out": np.zeros((2, 4, 4, 32), ml_dtypes.bfloat16)}, "out has shape"),
        ({"learnable_sink": np.zeros(3, np.float32)}, "learnable_sink has shape"),
    ],
)
def test_calls_that_are_refused_leave_the_cache_alone(call: dict[str, Any], words: str) -> None:
    arrays = arrays_of(PAGED)
    before = {name: arrays[name].copy() for name in ("k_cache", "v_cache")}
    with pytest.raises(errors.InvalidArgument, match=words):
        cutlass_fa.flash_attn_with_kvcache(**({**arrays, "backend": "reference"} | call))
    assert all((bits(arrays[name]) == bits(array)).all() for name, array in before.items())


def test_other_refusals_of_attention() -> None:
    arrays = arrays_of(PAGED) | {"backend": "reference"}
    with pytest.raises(errors.SinkWithoutMask):
        cutlass_fa.flash_attn_with_kvcache(**arrays, sink_tokens=3)
    with pytest.raises(errors.InvalidGqaRatio):
        cutlass_fa.flash_attn_with_kvcache(**{**arrays, "q": arrays["q"][:, :, :3]})
    with pytest.raises((errors.MockMode, errors.InvalidArgument), match=r"no kernel can be launched here|CPU memory"):
        cutlass_fa.flash_attn_with_kvcache(**{**arrays, "backend": "cuda"})


# ---- problem -------------------------------------------------------------------------------------------------------------------------


def _bf16(*shape: int) -> np.ndarray:
    return np.zeros(shape, ml_dtypes.bfloat16)


def _caches(*shape: int) -> dict[str, np.ndarray]:
    return {"k_cache": _bf16(*shape), "v_cache": _bf16(*shape)}


def _new_rows(*shape: int) -> dict[str, np.ndarray]:
    return {"k": _bf16(*shape), "v": _bf16(*shape)}


NO_KEYS: dict[str, Any] = {"k": None, "v": None}
NO_ROTARY: dict[str, Any] = {"rotary_cos": None, "rotary_sin": None}


@pytest.mark.parametrize(
    ("change", "error", "words"),
    [
        (_caches(9, 12, 2, 64), errors.InvalidPagedBlockSize, "block_size=12: accepted are 8, 16"),
        (_caches(0, 16, 2, 64), errors.EmptyPagedCache, "num_blocks=0"),
        ({"k_cache": _bf16(9, 16, 2, 72)}, errors.PagedHeadDimMismatch, "k_cache has head_dim 72 and q has 64"),
        ({"v_cache": _bf16(9, 32, 2, 64)}, errors.InvalidArgument, "v_cache has shape"),
        ({"v_cache": None}, errors.InvalidArgument, "v_cache is None"),
        ({"k_cache": _bf16(9, 16, 64)}, errors.InvalidArgument, "other orders in memory are strides"),
        ({"k_cache": _bf16(9, 16, 2, 128)[..., ::2]}, errors.InvalidArgument, "or tokens"),
        ({"k_cache": np.broadcast_to(_bf16(1, 16, 2, 64), (9, 16, 2, 64))}, errors.InvalidArgument, "needs positive ones"),
        ({"k_cache": np.zeros((9, 16, 2, 64), np.float16)}, errors.InvalidArgument, "k_cache has dtype f16 and q has bf16"),
        ({"q": np.zeros((2, 4, 4, 64), np.float32)}, errors.UnsupportedDtype, "q has dtype float32"),
        ({"q": _bf16(0, 4, 4, 64)}, errors.EmptyBatch, "at least one sequence"),
        ({"q": _bf16(2, 0, 4, 64)}, errors.ZeroSeqlen, "at least one query"),
        ({"q": _bf16(2, 4, 4, 68), **_caches(9, 16, 2, 68)}, errors.UnsupportedHeadDim, "multiples of 8"),
        ({"q": _bf16(2, 4, 64)}, errors.InvalidArgument, "expected 4 dimensions"),
        ({"v": None}, errors.InvalidArgument, "k and v go together"),
        (_new_rows(3, 4, 2, 64), errors.InvalidArgument, "k has batch 3 and q has 2"),
        (_new_rows(2, 0, 2, 64), errors.ZeroSeqlen, "leave out k and v"),
        (_new_rows(2, 4, 1, 64), errors.InvalidArgument, "heads and columns"),
        ({"v": _bf16(2, 5, 2, 64)}, errors.InvalidArgument, "v has shape"),
        ({"k": _bf16(2, 4, 2, 128)[..., ::2]}, errors.InvalidArgument, "k has strides"),
        (NO_KEYS, errors.InvalidArgument, "pass k and v, or turn q beforehand"),
        ({**NO_KEYS, **NO_ROTARY, "cu_seqlens_k_new": np.zeros(3, np.int32)}, errors.InvalidArgument, "k is None"),
        ({"rotary_sin": None}, errors.InvalidArgument, "go together"),
        ({**NO_ROTARY, "rotary_seqlens": np.zeros(2, np.int32)}, errors.InvalidArgument, "rotary_seqlens is given"),
        ({"rotary_cos": _bf16(300, 4), "rotary_sin": _bf16(300, 4)}, errors.InvalidArgument, "rotary_dim is 8"),
        ({"rotary_cos": _bf16(300, 40), "rotary_sin": _bf16(300, 40)}, errors.InvalidArgument, "up to head_dim=64"),
        ({"rotary_sin": _bf16(299, 16)}, errors.InvalidArgument, "rotary_cos has shape"),
        ({"rotary_cos": _bf16(300, 20)[:, :16]}, errors.InvalidArgument, "rows a multiple of 8 apart"),
        ({"rotary_seqlens": np.zeros(3, np.int32)}, errors.InvalidArgument, r"rotary_seqlens has shape \(3,\)"),
        ({"cache_seqlens": np.zeros(2, np.int64)}, errors.InvalidArgument, "cache_seqlens has dtype int64"),
        ({"block_table": np.zeros((3, 4), np.int32)}, errors.InvalidArgument, "block_table has shape"),
        ({"block_table": np.zeros((2, 8), np.int32)[:, ::2]}, errors.InvalidArgument, "block_table has strides"),
        ({"block_table": None, **_caches(1, 64, 2, 64)}, errors.InvalidArgument, "1 rows for 2 sequences"),
        ({"cu_seqlens_q": np.zeros(1, np.int32), "q": _bf16(8, 4, 64)}, errors.EmptyBatch, "at least one sequence"),
        ({"cu_seqlens_k_new": np.zeros(4, np.int32), **_new_rows(8, 2, 64)}, errors.InvalidArgument, r"expected \(3,\)"),
    ],
)  # fmt: skip
def test_arrays_are_checked(change: dict[str, Any], error: type[Exception], words: str) -> None:
    with pytest.raises(error, match=words):
        problem_of({**arrays_of(PAGED), **change})


def test_a_launch_has_a_cta_for_each_row_and_the_addresses_of_what_is_there() -> None:
    problem = problem_of(arrays_of(PACKED))
    cell = Cell.of(problem.dispatch_key())
    assert str(problem.dispatch_key()) == "fa2_append_kv_sm90a_bf16_hdim64_rotary"
    assert grid_of(problem) == 1 + (5 + 1 + 3) + 6
    fields = [field.name for field in cell.params]
    words = address_words(problem, cell)
    assert all(fields[word] == name for name, word in words.items()) and list(words)[-2:] == ["seqlens_k", "turned_q"]
    assert "rotary_seqlens" not in words and "cache_batch_idx" not in words
    params = pack_params(problem, cell)[0]
    assert (params["batch"], params["total_q"], params["total_new"], params["capacity"]) == (3, 9, 6, 64)
    assert (params["page_size"], params["num_pages"], params["k_stride_batch"], params["rotary_dim"]) == (16, 13, 0, 32)


def test_rows_of_a_contiguous_cache_are_pages_of_its_length() -> None:
    problem = problem_of(arrays_of(ROWS), successive_queries=True)
    cell = Cell.of(problem.dispatch_key())
    params, words = pack_params(problem, cell)[0], address_words(problem, cell)
    assert (params["page_size"], params["num_pages"], params["capacity"], params["block_table_stride"]) == (64, 3, 64, 1)
    assert cell.params[words["cache_batch_idx"]].name == "block_table" and params["query_step"] == 1
    plain = {name: array for name, array in arrays_of(ROWS).items() if not name.startswith("rotary")}
    assert grid_of(problem_of(plain)) == 1 + 8 and not problem_of(plain).has_rotary


class RecordedLaunch:
    """KernelLaunch without a GPU: keeps Params as they are at each launch."""

    def __init__(self, kernel: Any, device: int, params: np.ndarray, grid: int) -> None:
        self.params, self.address = params.view(np.uint8).data.cast("Q"), 0
        self.launched: list[tuple[int, np.ndarray]] = []
        self.go = lambda stream, address, extra: self.launched.append((stream, params.copy()))


@pytest.mark.parametrize("case", [PAGED, ROWS, PACKED, AppendCase("plain", (3, 20), (4, 4), page=16)], ids=str)
def test_a_run_writes_every_address_where_the_kernel_reads_it(case: AppendCase, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("cutlass_fa.launches.append_kv.KernelLaunch", RecordedLaunch)
    arrays = arrays_of(case)
    problem = problem_of(arrays)
    cell = Cell.of(problem.dispatch_key())
    plan = AppendPlan(problem, SimpleNamespace(cell=cell))  # type: ignore[arg-type]
    given = [APPEND_NAMES[i] for i in plan.arrays]
    written = [*given, "seqlens_k", *(["turned_q"] if problem.has_rotary else [])]
    address = {name: 4096 * (place + 1) for place, name in enumerate(written)}
    plan.run(tuple(address.values()), 17, 5)
    ((stream, params),) = plan._launch.launched  # type: ignore[attr-defined]
    address["block_table"] = address.get("block_table", address.get("cache_batch_idx", 0))
    fields = {field.name for field in cell.params if field.is_address}
    assert stream == 5 and params["num_cached"] == 17
    assert {name: int(params[name][0]) for name in fields} == {name: address.get(name, 0) for name in fields}
    rows = [name for name in given if arrays[name].dtype != np.int32]
    assert given[: plan.num_row_arrays] == rows
    assert set(arrays) - set(given) == (set() if problem.has_rotary else {"q"}), "q is read where it is turned"
    assert params["batch"] == problem.batch, "numbers stay as they were packed"


# ---- numbers -------------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "place", "number", "words"),
    [
        ("cache_seqlens", 1, 61, r"cache_seqlens\[1\]=61 and 4 new rows: the cache has room for 64 keys"),
        ("cache_seqlens", 0, -1, r"cache_seqlens\[0\]=-1"),
        ("block_table", (1, 1), 9, r"block_table\[1, 1\]=9: the cache has 9 blocks, and the sequence 24 keys"),
        ("block_table", (0, 0), -1, r"block_table\[0, 0\]=-1"),
        ("rotary_seqlens", 1, 297, r"rotary_seqlens\[1\]=297 and 4 rows: rotary_cos has angles of 300 positions"),
    ],
)
def test_numbers_of_paged_caches_are_checked(name: str, place: Any, number: int, words: str) -> None:
    arrays = arrays_of(PAGED) | {"rotary_seqlens": np.zeros(2, np.int32)}
    arrays["block_table"][1, 2:], arrays["block_table"][0, 1:] = 1000, -1  # behind the sequences' ends
    named = {name: arrays.get(name) for name in APPEND_NAMES}
    check_cache_numbers(library_of(np.ndarray), problem_of(arrays), named, None, None)
    arrays[name][place] = number
    with pytest.raises(errors.InvalidArgument, match=words):
        check_cache_numbers(library_of(np.ndarray), problem_of(arrays), named, None, None)


@pytest.mark.parametrize(
    ("name", "numbers", "words"),
    [
        ("cache_batch_idx", (0, 3), r"cache_batch_idx\[1\]=3: the cache has 3 rows"),
        ("cache_leftpad", (0, 21), r"cache_leftpad\[1\]=21: the sequence has cache_seqlens\[1\]=20 keys"),
        ("cache_leftpad", (-1, 0), r"cache_leftpad\[0\]=-1"),
        ("cu_seqlens_k_new", (0, 5, 4), r"cu_seqlens_k_new\[2\]=4 is less than"),
        ("cu_seqlens_q", (0, 5, 9), "cu_seqlens_q ends with 9, and there are 8 rows"),
    ],
)
def test_numbers_of_contiguous_caches_are_checked(name: str, numbers: tuple[int, ...], words: str) -> None:
    arrays = arrays_of(ROWS) | {name: np.array(numbers, np.int32)}
    for array, starts in (("q", "cu_seqlens_q"), ("k", "cu_seqlens_k_new"), ("v", "cu_seqlens_k_new")):
        arrays[array] = arrays[array].reshape(-1, *arrays[array].shape[2:]) if starts in arrays else arrays[array]
    with pytest.raises(errors.InvalidArgument, match=words):
        cutlass_fa.flash_attn_with_kvcache(**arrays, check=True, backend="reference")
