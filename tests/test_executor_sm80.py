"""mma.sync, ldmatrix, stmatrix and cp.async: on the executor against NumPy, misused, as machine code, and on a GPU beside the executor."""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping

import ml_dtypes
import numpy as np
import pytest

from cutlass_fa.executor import ExecutorFault, compiler_problem
from cutlass_fa.layouts import ldmatrix_coordinates, mma_a_coordinates, mma_accumulator_coordinates, mma_b_coordinates
from tests.executor_kernels import SmallKernel, words
from tests.needs import needs_nvdisasm, needs_nvrtc
from tests.primitive_cases import Arrays, Case, Memory

needs_compiler = pytest.mark.skipif(compiler_problem() is not None, reason=str(compiler_problem()))
DTYPES = {"bfloat16": np.dtype(ml_dtypes.bfloat16), "float16": np.dtype(np.float16)}

# ---- products ------------------------------------------------------------------------------------------------------------------------

STRIDE = 96  # elements of a row of the arrays; of them, a product's depth is used
COLUMNS = 32
DEPTHS = (32, 84)
ROWS = 61


def product(
    element: str = "bfloat16", *, mn_major: bool = False, pairs: bool = False, depth: int = 84, faults: Mapping[str, object] | None = None
) -> Case:
    """D (64, 32) = A B; rows 61 to 63 of A and what lies beyond `depth` exist in the arrays, and count as zero."""
    rng = np.random.default_rng(depth)
    dtype = DTYPES[element]
    arrays = {
        "a": rng.integers(-8, 9, (64, STRIDE)).astype(dtype),
        "b": rng.integers(-8, 9, (STRIDE, STRIDE) if mn_major else (COLUMNS, STRIDE)).astype(dtype),
        "d": np.full((128, COLUMNS // 2), np.nan, np.float32),
    }

    def arguments(memory: Memory) -> list[bytes]:
        return [words(*(memory.address(name) for name in arrays), np.array([ROWS, depth]))]

    shape = {"Element": element, "kColumns": COLUMNS, "kStride": STRIDE, "kMnMajorB": str(mn_major).lower(), "kPairs": str(pairs).lower()}
    return Case(SmallKernel("mma_product", 128, 16384), arrays, ("d",), arguments, {**shape, **(faults or {})})


def expected_product(case: Case, mn_major: bool, depth: int) -> np.ndarray:
    """(64, COLUMNS) in float32; small integers, so exact in any order."""
    a = case.arrays["a"].astype(np.float32)[:, :depth].copy()
    a[ROWS:] = 0
    b = case.arrays["b"].astype(np.float32)
    return a @ (b[:depth, :COLUMNS] if mn_major else b[:, :depth].T)


def product_of_registers(d: np.ndarray) -> np.ndarray:
    result = np.empty((64, COLUMNS), np.float32)
    for thread in range(128):
        for register in range(COLUMNS // 2):
            row, column = mma_accumulator_coordinates(thread % 32, register % 4)
            result[thread // 32 * 16 + row, register // 4 * 8 + column] = d[thread, register]
    return result


FORMS = [("bfloat16", False, False), ("bfloat16", True, False), ("float16", False, True), ("float16", True, True)]
forms = pytest.mark.parametrize(("element", "mn_major", "pairs"), FORMS)


@needs_compiler
@forms
def test_product_is_numpys(element: str, mn_major: bool, pairs: bool) -> None:
    for depth in DEPTHS:
        case = product(element, mn_major=mn_major, pairs=pairs, depth=depth)
        program = case.build()
        for seed in range(6):
            d = case.on_executor(seed, program)["d"]
            np.testing.assert_array_equal(product_of_registers(d), expected_product(case, mn_major, depth))


@pytest.mark.gpu
@needs_compiler
@forms
def test_product_on_the_gpu_is_the_executors(element: str, mn_major: bool, pairs: bool) -> None:
    for depth in DEPTHS:
        case = product(element, mn_major=mn_major, pairs=pairs, depth=depth)
        on_gpu = case.on_gpu()["d"]
        np.testing.assert_array_equal(on_gpu, case.on_executor()["d"])
        np.testing.assert_array_equal(product_of_registers(on_gpu), expected_product(case, mn_major, depth))


# Seen by the copy that overwrites, or by the other warp's read of what was overwritten, whichever comes first.
WITHOUT_BARRIER = r"cp_async to .* which warp \d may still be reading|load_matrix reads .*, written by a cp_async of thread"
PRODUCT_FAULTS: dict[str, tuple[dict[str, object], str]] = {
    "too few copies waited for": ({"kPending": 2}, r"load_matrix reads shared .*, written by a cp_async .* not know to have landed"),
    "no barrier after the wait": ({"kSyncLanded": "false"}, r"load_matrix reads .*(written by a cp_async of thread \d+ that|nobody wrote)"),
    "no barrier before the next copy": ({"kSyncUsed": "false"}, WITHOUT_BARRIER),
    "destination not aligned": ({"kShift": 8}, r"cp_async at shared byte \d+: must be a multiple of 16"),
    "source not aligned": ({"kSourceShift": 8}, r"cp_async from an address that is not a multiple of 16"),
    "source outside its buffer": ({"kStride": 104}, r"cp_async reads address .*, outside every buffer \(byte \d+ of buffer a"),
    "a lane left out of the product": ({"kMultipliers": 31}, r"meet in different acts|deadlock:(?s:.*)matrix instruction"),
    "copies in flight at the end": (
        {"kPending": 9, "kSyncLanded": "false", "kWaitAtEnd": "false"},
        r"load_matrix reads|of its cp_async are in flight",
    ),
}


@needs_compiler
@pytest.mark.parametrize("name", PRODUCT_FAULTS)
def test_misused_copies_and_products_are_reported(name: str) -> None:
    constants, report = PRODUCT_FAULTS[name]
    case = product(faults=constants)
    program = case.build()
    for seed in range(4):
        with pytest.raises(ExecutorFault) as caught:
            case.on_executor(seed, program)
        assert re.search(report, caught.value.report) and "mma_product.cu:" in caught.value.report, caught.value.report


@needs_nvrtc
@needs_nvdisasm
@pytest.mark.parametrize("arch", ["sm_80", "sm_89", "sm_90a"])
@forms
def test_product_is_the_expected_machine_code(arch: str, element: str, mn_major: bool, pairs: bool) -> None:
    case = product(element, mn_major=mn_major, pairs=pairs)
    code = case.machine_code(arch)
    assert ("HMMA.16816.F32.BF16" in code) == (element == "bfloat16")
    assert "HMMA.16816.F32" in code
    assert re.search(r"LDGSTS\.E\.BYPASS\.\w*\.?128", code) and "LDGDEPBAR" in code and "DEPBAR.LE SB0, 0x1" in code
    assert re.search(r"LDSM\.16\.M88\.4 ", code)
    b = ("LDSM.16.MT88" if mn_major else "LDSM.16.M88") + (".2" if pairs else ".4")
    assert b in code, sorted(set(re.findall(r"LDSM\S*", code)))
    assert not re.search(r"\b(LDL|STL)\b", code)


# ---- matrices in and out of shared memory --------------------------------------------------------------------------------------------


def transfer(matrices: int = 4, load: bool = False, store: bool = False, faults: Mapping[str, object] | None = None) -> Case:
    """load, store: whether that side transposes."""
    rng = np.random.default_rng(matrices)
    untouched = np.uint32(0xFFFFFFFF)
    arrays = {
        "in": rng.integers(0, 1 << 15, (2, 4, 8, 8)).astype(np.uint16),  # (warp, matrix, row, column)
        "loaded": np.full((2, 32, 4), untouched),
        "out": np.full((2, matrices, 8, 4), untouched).view(np.uint16),
        "again": np.full((2, 32, 4), untouched),
    }

    def arguments(memory: Memory) -> list[bytes]:
        return [words(*(memory.address(name) for name in arrays))]

    form = {"kMatrices": matrices, "kTransposedLoad": str(load).lower(), "kTransposedStore": str(store).lower()}
    return Case(SmallKernel("matrix_transfer", 64, 2048), arrays, ("loaded", "out", "again"), arguments, {**form, **(faults or {})})


def fragments(matrices: np.ndarray, transposed: bool) -> np.ndarray:
    """(lanes, words) of (matrices, 8, 8) 16-bit elements: word j holds row l / 4, columns 2 (l % 4) and the next, of matrix j."""
    whole = matrices.swapaxes(1, 2) if transposed else matrices
    return np.ascontiguousarray(whole).view(np.uint32).reshape(len(matrices), 32).T


def check_transfer(case: Case, results: Arrays, matrices: int, load: bool, store: bool) -> None:
    source = case.arrays["in"][:, :matrices]
    stored = source.swapaxes(2, 3) if load != store else source
    np.testing.assert_array_equal(results["out"], stored)
    for warp in range(2):
        np.testing.assert_array_equal(results["loaded"][warp, :, :matrices], fragments(source[warp], load))
        np.testing.assert_array_equal(results["again"][warp, :, :matrices], fragments(stored[1 - warp], load))


TRANSFERS = [(4, False, False), (4, True, False), (2, False, True), (2, True, True)]
transfers = pytest.mark.parametrize(("matrices", "load", "store"), TRANSFERS)


@needs_compiler
@transfers
def test_matrices_are_numpys(matrices: int, load: bool, store: bool) -> None:
    case = transfer(matrices, load, store)
    program = case.build()
    for seed in range(6):
        check_transfer(case, case.on_executor(seed, program), matrices, load, store)


@pytest.mark.gpu
@needs_compiler
@transfers
def test_matrices_on_the_gpu_are_the_executors(matrices: int, load: bool, store: bool) -> None:
    case = transfer(matrices, load, store)
    on_gpu, on_cpu = case.on_gpu(), case.on_executor()
    check_transfer(case, on_gpu, matrices, load, store)
    for name in case.outputs:
        np.testing.assert_array_equal(on_gpu[name], on_cpu[name])


TRANSFER_FAULTS: dict[str, tuple[dict[str, object], str]] = {
    "row not aligned": ({"kShift": 8}, r"load_matrix at shared byte \d+: must be a multiple of 16"),
    "rows that nobody wrote": ({"kWritten": 31}, r"load_matrix reads shared \[\d+, \d+\), which nobody wrote"),
    "no barrier after a store": (
        {"kSyncStored": "false"},
        r"load_matrix reads shared .*, (which no barrier separates from the store_matrix of warp \d|which nobody wrote)",
    ),
    "a store over what is being read": (
        {"kInPlace": "true"},
        r"store_matrix to .* which warp \d may still be reading|load_matrix reads .* no barrier separates from the store_matrix",
    ),
    "lanes left out of a store": (
        {"kStorers": 16},
        r"meet in different acts|deadlock:(?s:.*)wait in a shuffle, vote, warp_sync or matrix instruction",
    ),
}


@needs_compiler
@pytest.mark.parametrize("name", TRANSFER_FAULTS)
def test_misused_matrix_transfers_are_reported(name: str) -> None:
    constants, report = TRANSFER_FAULTS[name]
    case = transfer(faults=constants)
    program = case.build()
    for seed in range(4):
        with pytest.raises(ExecutorFault) as caught:
            case.on_executor(seed, program)
        assert re.search(report, caught.value.report) and "matrix_transfer.cu:" in caught.value.report, caught.value.report


@needs_nvrtc
@needs_nvdisasm
@transfers
def test_transfers_are_the_expected_machine_code(matrices: int, load: bool, store: bool) -> None:
    code = transfer(matrices, load, store).machine_code("sm_90a")
    assert f"LDSM.16.M{'T' * load}88.{matrices}" in code
    assert f"STSM.16.M{'T' * store}88.{matrices}" in code
    for arch in ("sm_80", "sm_89"):
        assert f"LDSM.16.M{'T' * load}88.{matrices}" in transfer(matrices, load, store, {"kStore": "false"}).machine_code(arch)


# ---- layouts -------------------------------------------------------------------------------------------------------------------------


def test_fragments_cover_each_element_once() -> None:
    lanes = range(32)
    d = [mma_accumulator_coordinates(lane, register) for lane in lanes for register in range(4)]
    a = [mma_a_coordinates(lane, register, half) for lane in lanes for register in range(4) for half in range(2)]
    b = [mma_b_coordinates(lane, register, half) for lane in lanes for register in range(2) for half in range(2)]
    assert sorted(d) == [(row, column) for row in range(16) for column in range(8)]
    assert sorted(a) == [(row, k) for row in range(16) for k in range(16)]
    assert sorted(b) == [(k, column) for k in range(16) for column in range(8)]


def test_packed_accumulators_are_the_next_a() -> None:
    """Registers 2 i and 2 i + 1 of block j of P are A register 2 j + i."""
    for lane in range(32):
        for block in range(2):
            for register in range(4):
                row, column = mma_accumulator_coordinates(lane, register)
                assert mma_a_coordinates(lane, 2 * block + register // 2, register % 2) == (row, 8 * block + column)


def test_loaded_matrices_are_fragments() -> None:
    """What ldmatrix gives from the rows that ldmatrix_coordinates names is the fragment of mma: A, and two blocks of B of either major."""
    numbers = np.arange(256).reshape(16, 16)

    def loaded(operand: str, transposed: bool) -> np.ndarray:
        """(lanes, registers, halves) of numbers, from rows of 8 of it."""
        rows = [ldmatrix_coordinates(operand, lane) for lane in range(32)]
        matrices = np.array([numbers[row, column : column + 8] for row, column in rows]).reshape(4, 8, 8)
        whole = matrices.swapaxes(1, 2) if transposed else matrices
        return whole.reshape(4, 32, 2).swapaxes(0, 1)

    a, b, b_transposed = loaded("a", False), loaded("b", False), loaded("b_mn_major", True)
    for lane in range(32):
        for half in range(2):
            for register in range(4):
                row, k = mma_a_coordinates(lane, register, half)
                assert a[lane, register, half] == numbers[row, k]
                k, column = mma_b_coordinates(lane, register % 2, half)
                assert b[lane, register, half] == numbers[8 * (register // 2) + column, k]
                assert b_transposed[lane, register, half] == numbers[k, 8 * (register // 2) + column]


@pytest.mark.parametrize(
    "call",
    [
        lambda: mma_accumulator_coordinates(32, 0),
        lambda: mma_accumulator_coordinates(0, 4),
        lambda: mma_a_coordinates(0, 4, 0),
        lambda: mma_a_coordinates(0, 0, 2),
        lambda: mma_b_coordinates(0, 2, 0),
        lambda: ldmatrix_coordinates("a", 32),
        lambda: ldmatrix_coordinates("c", 0),
    ],
)
def test_fragments_have_bounds(call: Callable[[], object]) -> None:
    with pytest.raises(ValueError, match="must be"):
        call()
