"""V^T in shared memory and conversions to E4M3: on the executor against layouts.py and ml_dtypes, as machine code, on a GPU."""

from __future__ import annotations

import ml_dtypes
import numpy as np
import pytest

from cutlass_fa.executor import compiler_problem
from cutlass_fa.layouts import SwizzledTile, column_order, kv_order
from tests.executor_kernels import SmallKernel, words
from tests.needs import needs_nvdisasm, needs_nvrtc
from tests.primitive_cases import Arrays, Case, Memory

needs_compiler = pytest.mark.skipif(compiler_problem() is not None, reason=str(compiler_problem()))

# (keys, columns, swizzle_bytes) of the tile table's shapes.
SHAPES = [(160, 64, 64), (128, 96, 128), (192, 128, 128), (160, 192, 64), (128, 256, 128), (32, 64, 32)]
shapes = pytest.mark.parametrize(("keys", "columns", "swizzle_bytes"), SHAPES)


def case_of(keys: int, columns: int, swizzle_bytes: int) -> Case:
    rng = np.random.default_rng(keys + columns)
    tile = SwizzledTile(keys, columns, swizzle_bytes, 1)
    arrays: Arrays = {
        "rows": rng.integers(0, 256, tile.size_bytes, np.uint8),
        "columns": np.zeros(keys * columns, np.uint8),
        "numbers": numbers().reshape(64, 4),
        "packed": np.zeros(64, np.uint32),
    }

    def arguments(memory: Memory) -> list[bytes]:
        return [words(*(memory.address(name) for name in ("rows", "columns", "numbers", "packed")))]

    constants = {"kKeys": keys, "kColumns": columns, "kSwizzleBytes": swizzle_bytes, "kRowsBytes": tile.size_bytes}
    smem_bytes = -(-tile.size_bytes // 1024) * 1024 + -(-keys * columns // 1024) * 1024
    return Case(SmallKernel("transpose_fp8", 64, smem_bytes), arrays, ("columns", "packed"), arguments, constants)


def numbers() -> np.ndarray:
    """Float32 numbers on both sides of what E4M3 tells apart: ties, its smallest and largest, beyond them, and none."""
    exact = np.arange(0x7F, dtype=np.uint8).view(ml_dtypes.float8_e4m3fn).astype(np.float32)
    ties = (exact[:-1] + exact[1:]) / 2
    special = np.array([448, 463.9, 465, 1e30, np.inf, -np.inf, np.nan, -0.0, 2.0**-10, 2.0**-10.01, -1e-30, -449], np.float32)
    return np.resize(np.concatenate([special, ties, np.nextafter(ties, np.float32(0)), -np.nextafter(ties, np.float32(999))]), 256)


def check(case: Case, keys: int, columns: int, swizzle_bytes: int, found: Arrays) -> None:
    rows, transposed = SwizzledTile(keys, columns, swizzle_bytes, 1), SwizzledTile(columns, keys, 32, 1)
    for row in range(columns):
        for place in range(keys):
            expected = case.arrays["rows"][rows.byte_offset(kv_order(place), column_order(row))]
            assert found["columns"][transposed.byte_offset(row, place)] == expected, (row, place)
    x = case.arrays["numbers"].ravel()
    with np.errstate(invalid="ignore"):
        expected = np.clip(x, -448, 448).astype(ml_dtypes.float8_e4m3fn).view(np.uint8)
    actual = found["packed"].view(np.uint8)
    assert (actual == np.where(np.isnan(x), 0x7F, expected)).all(), (x[actual != expected], actual[actual != expected])


@needs_compiler
@shapes
def test_block_is_transposed_and_numbers_are_rounded(keys: int, columns: int, swizzle_bytes: int) -> None:
    case = case_of(keys, columns, swizzle_bytes)
    program = case.build()
    for seed in range(3):
        check(case, keys, columns, swizzle_bytes, case.on_executor(seed, program))


@pytest.mark.gpu
@shapes
def test_on_a_gpu_too(keys: int, columns: int, swizzle_bytes: int) -> None:
    case = case_of(keys, columns, swizzle_bytes)
    check(case, keys, columns, swizzle_bytes, case.on_gpu())


@needs_nvrtc
@needs_nvdisasm
def test_machine_code_has_a_matrix_in_and_out_for_32_keys() -> None:
    code = case_of(192, 128, 128).machine_code("sm_90a")
    counts = {name: code.count(name) for name in ("LDSM.16.MT88.4", "STSM.16.M88.4", "PRMT", "F2FP.SATFINITE.E4M3")}
    assert counts["LDSM.16.MT88.4"] == counts["STSM.16.M88.4"] == 192 // 32 and counts["PRMT"] >= 4 * 6, counts
    assert counts["F2FP.SATFINITE.E4M3"] == 2, counts
