"""The pass before attention over a KV cache on a GPU: caches bit by bit, turned queries by the test rule, lengths read on the device."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

from cutlass_fa.api_kvcache import append_plan, prepare_append
from cutlass_fa.arrays import library_of
from cutlass_fa.problem_append import APPEND_NAMES
from tests.append_cases import CASES, AppendCase, check_append, moved, naive_append

pytestmark = pytest.mark.gpu


def append(arrays: dict[str, Any], case: AppendCase, number: int = 0) -> tuple[Any, Any]:
    """(q, lengths) as attention gets them, on CuPy arrays; the caches are written in place."""
    library, given = library_of(type(arrays["q"])), tuple(arrays.get(name) for name in APPEND_NAMES)
    plan = append_plan(library, given, (case.rotary == "interleaved", case.successive))
    q, lengths, launch = prepare_append(library, plan, given, number)
    launch()
    return q, lengths


def host(x: Any) -> np.ndarray:
    """A CuPy array in NumPy, brain floats by their bits."""
    return x.view(np.uint16).get().view(x.dtype) if x.itemsize == 2 else x.get()


def left_behind(arrays: dict[str, Any], q: Any, lengths: Any) -> SimpleNamespace:
    caches = {name: host(arrays[name]) for name in ("k_cache", "v_cache")}
    return SimpleNamespace(**caches, seqlens_k=host(lengths), turned_q=host(q))


def fresh(case: AppendCase) -> tuple[dict[str, Any], dict[str, Any]]:
    """The arrays of a call on NumPy and on CuPy."""
    import cupy

    arrays = case.arrays(np.random.default_rng(np.random.SeedSequence().generate_state(1)[0]))
    return arrays, moved(cupy, arrays)


def expected_of(arrays: dict[str, Any], case: AppendCase) -> Any:
    return naive_append(arrays, case.rotary == "interleaved", case.successive)


LARGE = (
    AppendCase("decode64", tuple(range(900, 964)), (1,) * 64, page=16, capacity=1024, heads=(32, 8), head_dim=128, rotary="half",
               rotary_dim=128, seqlen_rotary=1024),
    AppendCase("prefill", (0, 37), (300, 300), page=64, capacity=384, heads=(8, 2), head_dim=128, rotary="interleaved", rotary_dim=64,
               k_layout="columns", v_layout="heads", seqlen_rotary=400),
    AppendCase("many", tuple(i % 60 for i in range(300)), tuple(i % 4 for i in range(300)), page=8, packed=True, heads=(2, 1),
               rotary="half"),
)  # fmt: skip


@pytest.mark.parametrize("case", [*CASES, *LARGE], ids=str)
def test_case(case: AppendCase) -> None:
    arrays, on_gpu = fresh(case)
    expected = expected_of(arrays, case)
    check_append(left_behind(on_gpu, *append(on_gpu, case)), case, arrays, expected, case.rotary != "none")


def test_queries_are_turned_into_an_array_of_their_own() -> None:
    case = AppendCase("own", (7, 30), (5, 5), page=16, rotary="half")
    arrays, on_gpu = fresh(case)
    q, _ = append(on_gpu, case)
    assert q.data.ptr != on_gpu["q"].data.ptr and (host(on_gpu["q"]).view(np.uint16) == arrays["q"].view(np.uint16)).all()


def test_one_length_for_all_changes_from_call_to_call() -> None:
    """A decode loop with cache_seqlens as an int: one plan, other places."""
    case = AppendCase("loop", (0, 0), (1, 1), page=8, rotary="half")
    arrays, on_gpu = fresh(case)
    del on_gpu["cache_seqlens"]
    for number in range(20):
        arrays["cache_seqlens"][:] = number
        expected = expected_of(arrays, case)
        left = left_behind(on_gpu, *append(on_gpu, case, number))
        check_append(left, f"step {number}", arrays, expected, True)
        arrays["k_cache"], arrays["v_cache"] = left.k_cache, left.v_cache


@pytest.mark.parametrize("page", [0, 16])
def test_numbers_that_point_nowhere_write_nothing(page: int) -> None:
    """For compute-sanitizer too: no access outside the arrays."""
    case = AppendCase("wild", (-2, 62, 2**31 - 1, -(2**31), 8, 62), (4,) * 6, page=page, rotary="half")
    arrays, _ = fresh(case)
    if page:
        arrays["block_table"][1, 3], arrays["block_table"][4] = arrays["k_cache"].shape[0], (-1, 2**31 - 1, -(2**31), 0)
    else:
        arrays["cache_batch_idx"][1], arrays["cache_batch_idx"][4] = -1, 2**31 - 1
    import cupy

    on_gpu = moved(cupy, arrays)
    check_append(left_behind(on_gpu, *append(on_gpu, case)), case, arrays, expected_of(arrays, case), True)


def test_a_captured_pass_reads_new_lengths_and_tables() -> None:
    """Numbers are read on the device at each replay, and what the pass makes stays the graph's."""
    import cupy

    case = AppendCase("captured", (3, 20, 40), (4, 4, 4), page=16, rotary="interleaved")
    arrays, on_gpu = fresh(case)
    append(on_gpu, case)
    stream = cupy.cuda.Stream(non_blocking=True)
    cupy.cuda.Device().synchronize()
    with stream:
        stream.begin_capture()
        q, lengths = append(on_gpu, case)
        graph = stream.end_capture()
    rng = np.random.default_rng(2)
    for _ in range(5):
        arrays["cache_seqlens"][:] = rng.integers(0, 64, 3)
        arrays["block_table"][:] = rng.permutation(arrays["k_cache"].shape[0])[:12].reshape(3, 4)
        for name in ("cache_seqlens", "block_table"):
            on_gpu[name].set(arrays[name])
        for name in ("k_cache", "v_cache"):
            arrays[name] = host(on_gpu[name])
        cupy.cuda.Device().synchronize()
        graph.launch(stream)
        stream.synchronize()
        check_append(left_behind(on_gpu, q, lengths), case, arrays, expected_of(arrays, case), True)


def test_repetitions_give_equal_bits() -> None:
    case = AppendCase("again", tuple(range(64)), (3,) * 64, page=16, capacity=96, heads=(8, 8), rotary="half")
    arrays, on_gpu = fresh(case)
    first = left_behind(on_gpu, *append(on_gpu, case))
    check_append(first, case, arrays, expected_of(arrays, case), True)
    for _ in range(200):
        q, _ = append(on_gpu, case)
        assert (host(q).view(np.uint16) == first.turned_q.view(np.uint16)).all()
    assert (host(on_gpu["k_cache"]).view(np.uint16) == first.k_cache.view(np.uint16)).all()


def test_torch_tensors() -> None:
    torch = pytest.importorskip("torch")
    if not torch.cuda.is_available():
        pytest.skip("PyTorch finds no GPU")
    case = AppendCase("torch", (3, 20), (4, 4), page=16, rotary="half", dtype="f16")
    arrays, _ = fresh(case)
    tensors = {name: torch.from_numpy(np.ascontiguousarray(array)).cuda() for name, array in arrays.items()}
    q, lengths = append(tensors, case)
    caches = {name: tensors[name].cpu().numpy() for name in ("k_cache", "v_cache")}
    left = SimpleNamespace(**caches, seqlens_k=lengths.cpu().numpy(), turned_q=q.cpu().numpy())
    check_append(left, case, arrays, expected_of(arrays, case), True)
