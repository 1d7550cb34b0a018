"""TMA stores and reductions, cp.async for wgmma, additions to global memory: on the executor against NumPy, misused, as machine code, on a
GPU."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import replace

import ml_dtypes
import numpy as np
import pytest

from cutlass_fa.executor import ExecutorFault, compiler_problem
from cutlass_fa.layouts import SwizzledTile, accumulator_coordinates
from tests.executor_kernels import SmallKernel, words
from tests.needs import needs_nvdisasm, needs_nvrtc
from tests.primitive_cases import Arrays, Case, Memory

needs_compiler = pytest.mark.skipif(compiler_problem() is not None, reason=str(compiler_problem()))

# ---- TMA stores ----------------------------------------------------------------------------------------------------------------------

HEAD, BATCH = 2, 1
ROWS = 16  # of a box
STARTS = [(0, 0), (16, 24), (56, 90), (200, 200)]  # (column, row)


def stores(
    itemsize: int, swizzle_bytes: int, start: tuple[int, int], *, adds: bool = False, faults: Mapping[str, object] | None = None
) -> Case:
    """Two boxes of 16 rows, as wide as the swizzle (64 bytes without one), to rows `start` and 16 further of (batch, head, row, column)."""
    width = (swizzle_bytes or 64) // itemsize
    rng = np.random.default_rng(swizzle_bytes)
    dtype = np.dtype(np.float32 if itemsize == 4 else np.uint16)
    boxes = rng.integers(1, 1000, (2, ROWS, width)).astype(dtype)
    num_words = ROWS * width * itemsize // 4
    arrays = {
        "in": np.stack([_in_shared_memory(box, swizzle_bytes) for box in boxes]),
        "out": rng.integers(1, 1000, (2, 3, 100, 72)).astype(dtype),
        "seen": np.zeros(1, np.uint32),
        "boxes": boxes,
    }

    def arguments(memory: Memory) -> list[bytes]:
        row, column = (min(max(begin, 0), last) for begin, last in ((start[1], 99), (start[0], 70)))
        where = (((BATCH * 3 + HEAD) * 100 + row) * 72 + column) * itemsize // 4
        numbers = np.array([*start, HEAD, BATCH, where])
        params = words(memory.address("in"), memory.address("out"), memory.address("seen"), numbers)
        return [memory.tensor_map("out", (width, ROWS, 1, 1), swizzle_bytes), params]

    constants = {"kWords": num_words, "kAdds": str(adds).lower(), "kRowsApart": ROWS, **(faults or {})}
    return Case(SmallKernel("tma_store_box", 128, -(-num_words * 4 // 1024) * 1024), arrays, ("out", "seen"), arguments, constants)


def _in_shared_memory(box: np.ndarray, swizzle_bytes: int) -> np.ndarray:
    """The box's bytes where the tensor map's swizzle expects them."""
    if swizzle_bytes == 0:
        return box.reshape(-1).view(np.uint32)
    tile = SwizzledTile(box.shape[0], box.shape[1], swizzle_bytes, box.itemsize)
    placed = np.empty(box.size, box.dtype)
    for row in range(box.shape[0]):
        for column in range(box.shape[1]):
            placed[tile.byte_offset(row, column) // box.itemsize] = box[row, column]
    return placed.view(np.uint32)


def check_stores(case: Case, results: Arrays, start: tuple[int, int], adds: bool) -> None:
    expected = case.arrays["out"].copy()
    tensor = expected[BATCH, HEAD]
    for turn, box in enumerate(case.arrays["boxes"]):
        for r in range(ROWS):
            for c in range(box.shape[1]):
                row, column = start[1] + r + (0 if adds else turn * ROWS), start[0] + c
                if 0 <= row < tensor.shape[0] and 0 <= column < tensor.shape[1]:
                    tensor[row, column] = box[r, c] + (tensor[row, column] if adds else 0)
    np.testing.assert_array_equal(results["out"], expected)
    assert results["seen"][0] in expected.view(np.uint32)


FORMS = [(2, 0, False), (2, 32, False), (2, 128, False), (4, 64, False), (4, 0, True), (4, 128, True)]
forms = pytest.mark.parametrize(("itemsize", "swizzle_bytes", "adds"), FORMS)


@needs_compiler
@forms
def test_stored_boxes_are_numpys(itemsize: int, swizzle_bytes: int, adds: bool) -> None:
    program = stores(itemsize, swizzle_bytes, (0, 0), adds=adds).build()
    for seed, start in enumerate(STARTS):
        case = stores(itemsize, swizzle_bytes, start, adds=adds)
        check_stores(case, case.on_executor(seed, program), start, adds)


@pytest.mark.gpu
@needs_compiler
@forms
def test_stored_boxes_on_the_gpu_are_the_executors(itemsize: int, swizzle_bytes: int, adds: bool) -> None:
    for start in STARTS:
        case = stores(itemsize, swizzle_bytes, start, adds=adds)
        on_gpu, on_cpu = case.on_gpu(), case.on_executor()
        check_stores(case, on_gpu, start, adds)
        for name in case.outputs:
            np.testing.assert_array_equal(on_gpu[name], on_cpu[name])


STORE_FAULTS: dict[str, tuple[dict[str, object], str]] = {
    "no fence": ({"kFence": "false"}, r"{act} reads shared .*, written by plain stores that no fence_async_proxy has followed"),
    "source overwritten before the wait": (
        {"kWaitRead": "false"},
        r"a plain store to shared .*, which a tma_store of thread 0 may still be reading",
    ),
    "never committed": ({"kCommit": "false", "kTurns": 1}, r"a thread ends while 1 of its tma_stores"),
    "source not aligned": ({"kShift": 64}, r"{act} at shared byte 64: must be a multiple of 128|{act} of \d+ bytes at shared byte 64"),
    "copies over a source being read": (
        {"kWaitRead": "false", "kCopies": "true"},
        r"cp_async to .* which a tma_store of thread 0 may still be reading",
    ),
    "source that nobody wrote": ({"kWritten": 128}, r"{act} reads shared .*, which nobody wrote"),
}


@needs_compiler
@pytest.mark.parametrize("adds", [False, True])
@pytest.mark.parametrize("name", STORE_FAULTS)
def test_misused_stores_are_reported(name: str, adds: bool) -> None:
    constants, report = STORE_FAULTS[name]
    case = stores(4, 128, (0, 0), adds=adds, faults=constants)
    program = case.build()
    for seed in range(4):
        with pytest.raises(ExecutorFault) as caught:
            case.on_executor(seed, program)
        pattern = report.replace("{act}", "tma_reduce_add" if adds else "tma_store")
        assert re.search(pattern, caught.value.report) and "tma_store_box.cu:" in caught.value.report, caught.value.report


@needs_compiler
def test_store_outside_its_buffer_is_reported() -> None:
    """The tensor map claims two batches where the array has one."""
    case = stores(4, 128, (0, 90))

    def arguments(memory: Memory) -> list[bytes]:
        tensor_map, params = case.arguments(memory)
        fields = np.frombuffer(tensor_map, np.uint32).copy()
        fields[12 + 3] = 2  # executor::TensorMapFields::extents[3]
        return [fields.tobytes(), params]

    shorter = replace(case, arrays={**case.arrays, "out": case.arrays["out"][:1]}, arguments=arguments)
    with pytest.raises(ExecutorFault, match=r"tma_store writes address .*, outside every buffer(?s:.*)tma_store_box.cu:\d+"):
        shorter.on_executor()


@needs_compiler
def test_reduction_of_other_elements_is_reported() -> None:
    with pytest.raises(ExecutorFault, match="tma_reduce_add through a tensor map of 2-byte elements"):
        stores(2, 128, (0, 0), adds=True).on_executor()


def flat_sums(start: int, faults: Mapping[str, object] | None = None) -> Case:
    """Two boxes of 128 floats added to the same 128 of 300, from `start` on."""
    case = stores(4, 32, (start, 0), adds=True, faults={"kFlat": "true", "kCopies": "true", **(faults or {})})
    flat = np.random.default_rng(1).integers(1, 1000, (1, 1, 3, 100)).astype(np.float32)

    def arguments(memory: Memory) -> list[bytes]:
        numbers = np.array([start, 0, 0, 0, start])
        params = words(memory.address("in"), memory.address("out"), memory.address("seen"), numbers)
        return [memory.tensor_map("out", (4, 1, 1, 1)), params]

    plain = np.stack([box.reshape(-1) for box in case.arrays["boxes"]])
    return replace(case, arrays={**case.arrays, "in": plain.view(np.uint32), "out": flat}, arguments=arguments)


def check_flat_sums(case: Case, results: Arrays, start: int) -> None:
    expected = case.arrays["out"].copy().reshape(-1)
    expected[start : start + 128] += case.arrays["in"].view(np.float32).sum(0)
    np.testing.assert_array_equal(results["out"].reshape(-1), expected)
    assert results["seen"].view(np.float32)[0] == expected[start]


@needs_compiler
def test_flat_sums_are_numpys() -> None:
    program = flat_sums(0).build()
    for seed, start in enumerate((0, 4, 172)):
        case = flat_sums(start)
        check_flat_sums(case, case.on_executor(seed, program), start)


@pytest.mark.gpu
def test_flat_sums_on_the_gpu_are_numpys() -> None:
    for start in (0, 4, 172):
        case = flat_sums(start)
        check_flat_sums(case, case.on_gpu(), start)


@needs_compiler
@pytest.mark.parametrize(
    ("start", "faults", "report"),
    [
        (2, {}, "bulk_reduce_add of 512 bytes to address .*: both are multiples of 16"),
        (176, {}, "bulk_reduce_add writes address .*, outside every buffer"),
        (0, {"kFence": "false"}, "bulk_reduce_add reads shared .*, written by plain stores that no fence_async_proxy has followed"),
        (0, {"kShift": 8}, "bulk_reduce_add of 512 bytes at shared byte 8|bulk_reduce_add at shared byte 8: must be a multiple of 16"),
    ],
)
def test_misused_flat_sums_are_reported(start: int, faults: dict[str, object], report: str) -> None:
    with pytest.raises(ExecutorFault, match=report):
        flat_sums(start, faults).on_executor()


@needs_nvrtc
@needs_nvdisasm
def test_flat_sums_are_the_expected_machine_code() -> None:
    assert re.search(r"\bUBLKRED\S*ADD", flat_sums(0).machine_code("sm_90a"))


@needs_nvrtc
@needs_nvdisasm
@pytest.mark.parametrize("adds", [False, True])
def test_stores_are_the_expected_machine_code(adds: bool) -> None:
    code = stores(4, 128, (0, 0), adds=adds).machine_code("sm_90a")
    assert ("UTMAREDG.4D.ADD" if adds else "UTMASTG.4D") in code
    assert "UTMACMDFLUSH" in code and "FENCE.VIEW.ASYNC" in code and re.search(r"DEPBAR\.LE SB0, 0x0", code)


@needs_compiler
@pytest.mark.parametrize("adds", [False, True])
@pytest.mark.parametrize(("start", "report"), [((-8, 3), "coordinate -8 of dimension 0"), ((8, -3), "coordinate -3 of dimension 1")])
def test_a_store_before_the_tensors_start_is_reported(start: tuple[int, int], report: str, adds: bool) -> None:
    """An H100 ends such a kernel with an illegal instruction."""
    with pytest.raises(ExecutorFault, match=report):
        stores(4, 128, start, adds=adds).on_executor()


# ---- cp.async for wgmma ---------------------------------------------------------------------------------------------------------------


def operands(faults: Mapping[str, object] | None = None) -> Case:
    rng = np.random.default_rng(0)
    arrays: Arrays = {name: rng.integers(-8, 9, (64, 64)).astype(ml_dtypes.bfloat16) for name in ("a", "b")}
    arrays["d"] = np.full((128, 32), np.nan, np.float32)

    def arguments(memory: Memory) -> list[bytes]:
        return [words(*(memory.address(name) for name in arrays))]

    layout = f"{SwizzledTile(64, 64, 128).k_major_descriptor().bits:#x}ull"
    return Case(SmallKernel("cp_async_operands", 128, 17408), arrays, ("d",), arguments, {"kLayout": layout, **(faults or {})})


def check_operands(case: Case, d: np.ndarray) -> None:
    expected = case.arrays["a"].astype(np.float32) @ case.arrays["b"].astype(np.float32).T
    actual = [[expected[accumulator_coordinates(thread, register)] for register in range(32)] for thread in range(128)]
    np.testing.assert_array_equal(d, actual)


by_mbarrier = pytest.mark.parametrize("by_mbarrier", ["false", "true"])


@needs_compiler
@by_mbarrier
def test_copied_operands_give_numpys_product(by_mbarrier: str) -> None:
    case = operands({"kByMbarrier": by_mbarrier})
    program = case.build()
    for seed in range(6):
        check_operands(case, case.on_executor(seed, program)["d"])


@pytest.mark.gpu
@by_mbarrier
def test_copied_operands_give_numpys_product_on_the_gpu(by_mbarrier: str) -> None:
    case = operands({"kByMbarrier": by_mbarrier})
    check_operands(case, case.on_gpu()["d"])


@needs_compiler
@pytest.mark.parametrize(
    ("fault", "report"),
    [
        ("kWait", "no fence_async_proxy has followed|a cp_async of thread .* does not know to have landed|nobody wrote"),
        ("kFence", "wgmma reads operand . at .*, written by plain stores that no fence_async_proxy has followed"),
        ("kSync", "no fence_async_proxy has followed|a cp_async of thread .* does not know to have landed|nobody wrote"),
    ],
)
@by_mbarrier
def test_operands_copied_wrongly_are_reported(by_mbarrier: str, fault: str, report: str) -> None:
    if by_mbarrier == "true" and fault == "kSync":
        pytest.skip("each thread waits for everyone's copies at the mbarrier")
    case = operands({"kByMbarrier": by_mbarrier, fault: "false"})
    program = case.build()
    for seed in range(4):
        with pytest.raises(ExecutorFault) as caught:
            case.on_executor(seed, program)
        assert re.search(report, caught.value.report) and "cp_async_operands.cu:" in caught.value.report, caught.value.report


def copied_ring(steps: int, faults: Mapping[str, object] | None = None) -> Case:
    """steps: tiles that go round the ring of two buffers."""
    tiles = np.random.default_rng(steps).integers(0, 1 << 32, (steps, 8, 16)).astype(np.uint32)
    arrays = {"tiles": tiles, "out": np.zeros((32, 4), np.uint32)}

    def arguments(memory: Memory) -> list[bytes]:
        return [words(memory.address("tiles"), memory.address("out"), np.array([steps]))]

    return Case(SmallKernel("cp_async_ring", 64, 2048), arrays, ("out",), arguments, faults or {})


def check_copied_ring(case: Case, results: Arrays) -> None:
    sums = np.tile(np.arange(1, 5, dtype=np.uint32), (32, 1))
    lane = np.arange(32).reshape(-1, 1)
    for tile in case.arrays["tiles"]:
        sums = np.uint32(3) * sums + tile[lane // 4, 4 * np.arange(4) + lane % 4]
    np.testing.assert_array_equal(results["out"], sums)


@needs_compiler
@pytest.mark.parametrize("steps", [1, 2, 9])
def test_copies_that_arrive_at_mbarriers(steps: int) -> None:
    case = copied_ring(steps)
    program = case.build()
    for seed in range(6):
        check_copied_ring(case, case.on_executor(seed, program))


@pytest.mark.gpu
@needs_compiler
@pytest.mark.parametrize("steps", [1, 2, 9, 300])
def test_copies_that_arrive_at_mbarriers_on_the_gpu(steps: int) -> None:
    case = copied_ring(steps)
    on_cpu = case.on_executor()
    for _ in range(10):
        on_gpu = case.on_gpu()
        check_copied_ring(case, on_gpu)
        np.testing.assert_array_equal(on_gpu["out"], on_cpu["out"])


ARRIVAL_FAULTS: dict[str, tuple[dict[str, object], str]] = {
    "no arrival": ({"kArrive": "false"}, r"deadlock:(?s:.*)threads 32-63 wait in mbarrier wait .*32 of 32 arrivals"),
    "an arrival before the copy": (
        {"kArriveFirst": "true"},
        "load_matrix reads shared .* (cp_async of thread .* does not know to have landed|which nobody wrote)|a thread ends while 1 of its",
    ),
    "a plain arrival": ({"kArrivePlainly": "true"}, "load_matrix reads shared .* written by a cp_async of thread|a thread ends while"),
    "an arrival more than comes": ({"kArrivals": 33}, r"deadlock:(?s:.*)threads 32-63 wait in mbarrier wait .*1 of 33 arrivals"),
    "an arrival less than comes": ({"kArrivals": 31}, "load_matrix reads shared .* cp_async of thread|an arrival too many|nobody wrote"),
    "tile read too early": ({"kWaitFull": "false"}, "load_matrix reads shared .* (by a cp_async of thread|which nobody wrote)"),
    "buffer overwritten too early": (
        {"kWaitEmpty": "false"},
        r"cp_async to shared .*, (destination of a cp_async that|which warp 1 may still be reading)",
    ),
}


@needs_compiler
@pytest.mark.parametrize("name", ARRIVAL_FAULTS)
def test_misused_arrivals_are_reported(name: str) -> None:
    constants, report = ARRIVAL_FAULTS[name]
    case = copied_ring(9, constants)
    program = case.build()
    for seed in range(6):
        with pytest.raises(ExecutorFault) as caught:
            case.on_executor(seed, program)
        assert re.search(report, caught.value.report) and "cp_async_ring.cu:" in caught.value.report, caught.value.report


@needs_nvrtc
@needs_nvdisasm
def test_arrivals_of_copies_are_the_expected_machine_code() -> None:
    code = copied_ring(1).machine_code("sm_90a")
    assert re.search(r"ARRIVES\.LDGSTSBAR\.64", code) and "LDGSTS.E" in code


# ---- additions -----------------------------------------------------------------------------------------------------------------------


def additions(vector: bool, shift: int = 0) -> Case:
    terms = np.random.default_rng(0).integers(-100, 100, (128, 4)).astype(np.float32)

    def arguments(memory: Memory) -> list[bytes]:
        return [words(memory.address("sums"), memory.address("terms"))]

    arrays = {"sums": np.zeros(4, np.float32), "terms": terms}
    return Case(SmallKernel("atomic_adds", 128, 1024), arrays, ("sums",), arguments, {"kVector": str(vector).lower(), "kShift": shift})


@needs_compiler
@pytest.mark.parametrize("vector", [False, True])
def test_sums_are_numpys(vector: bool) -> None:
    case = additions(vector)
    program = case.build()
    for seed in range(3):
        np.testing.assert_array_equal(case.on_executor(seed, program)["sums"], case.arrays["terms"].sum(0))


@pytest.mark.gpu
@pytest.mark.parametrize("vector", [False, True])
def test_sums_on_the_gpu_are_numpys(vector: bool) -> None:
    case = additions(vector)
    np.testing.assert_array_equal(case.on_gpu()["sums"], case.arrays["terms"].sum(0))


@needs_compiler
@pytest.mark.parametrize(("vector", "shift"), [(False, 1), (True, 4), (True, 1)])
def test_additions_elsewhere_are_reported(vector: bool, shift: int) -> None:
    with pytest.raises(ExecutorFault, match=r"an atomic (outside every buffer|at an address that is not)(?s:.*)atomic_adds.cu:\d+"):
        additions(vector, shift).on_executor()


@needs_nvrtc
@needs_nvdisasm
def test_additions_are_the_expected_machine_code() -> None:
    for arch in ("sm_80", "sm_89", "sm_90a"):
        assert re.search(r"\bREDG?\.E\.ADD\.F32\S* ", additions(vector=False).machine_code(arch))
    assert re.search(r"\bREDG\.E\.ADD\.F32x4", additions(vector=True).machine_code("sm_90a"))
