"""WGMMA on 8-bit floats: on the executor against ml_dtypes, misused, as machine code, and on a GPU beside the executor."""

from __future__ import annotations

import re
from collections.abc import Mapping

import ml_dtypes
import numpy as np
import pytest

from cutlass_fa.executor import ExecutorFault, compiler_problem
from cutlass_fa.layouts import SwizzledTile, accumulator_coordinates
from tests.executor_kernels import SmallKernel, words
from tests.needs import needs_nvdisasm, needs_nvrtc
from tests.primitive_cases import Arrays, Case, Memory

needs_compiler = pytest.mark.skipif(compiler_problem() is not None, reason=str(compiler_problem()))

DTYPES = {"e4m3": np.dtype(ml_dtypes.float8_e4m3fn), "e5m2": np.dtype(ml_dtypes.float8_e5m2)}


def product(
    a_type: str, b_type: str, columns: int, depth: int, *, registers: bool, exact: bool = True, faults: Mapping[str, object] | None = None
) -> Case:
    """exact: small integers; otherwise A runs through all finite numbers of its type, and B is a unit matrix scaled by 1 or 2."""
    rng = np.random.default_rng(columns)
    if exact:
        a, b = (rng.integers(-4, 5, (rows, depth)).astype(np.float32) for rows in (64, columns))
    else:
        numbers = np.arange(256, dtype=np.uint8).view(DTYPES[a_type]).astype(np.float32)
        a = np.resize(numbers[np.isfinite(numbers)], (64, depth))
        b = np.eye(columns, depth, dtype=np.float32) * rng.integers(1, 3, (columns, 1))
    arrays: Arrays = {
        "a": a.astype(DTYPES[a_type]).view(np.uint8).reshape(1, 1, 64, depth),
        "b": b.astype(DTYPES[b_type]).view(np.uint8).reshape(1, 1, columns, depth),
        "d": np.full((128, columns // 2), np.nan, np.float32),
    }
    arrays["operand"] = _operand_registers(arrays["a"][0, 0])

    def arguments(memory: Memory) -> list[bytes]:
        maps = [memory.tensor_map(name, (depth, rows, 1, 1), depth) for name, rows in (("a", 64), ("b", columns))]
        return [*maps, words(memory.address("d"), memory.address("operand"))]

    constants = {
        "ElementA": f"float8_{a_type}",
        "ElementB": f"float8_{b_type}",
        "kColumns": columns,
        "kDepth": depth,
        "kFromRegisters": str(registers).lower(),
        "kLayoutA": f"{SwizzledTile(64, depth, depth, 1).k_major_descriptor().bits:#x}ull",
        "kLayoutB": f"{SwizzledTile(columns, depth, depth, 1).k_major_descriptor().bits:#x}ull",
        **(faults or {}),
    }
    smem_bytes = (64 + columns) * depth + 1024
    return Case(SmallKernel("wgmma_fp8_product", 128, -(-smem_bytes // 1024) * 1024), arrays, ("d",), arguments, constants)


def _operand_registers(a: np.ndarray) -> np.ndarray:
    """(128 threads, registers, 4 bytes) of A (64, depth): PTX ISA, "Register fragments for wgmma.mma_async.m64nNk32"."""
    thread, register, byte = np.ogrid[:128, : a.shape[1] // 8, :4]
    step, i = register // 4, register % 4
    return a[thread // 32 * 16 + thread % 32 // 4 + 8 * (i % 2), 32 * step + 16 * (i // 2) + 4 * (thread % 4) + byte]


def check_product(case: Case, a_type: str, b_type: str, d: np.ndarray) -> None:
    a, b = (case.arrays[name][0, 0].view(DTYPES[dtype]).astype(np.float32) for name, dtype in (("a", a_type), ("b", b_type)))
    actual = np.empty((64, d.shape[1] * 2), np.float32)
    for thread in range(128):
        for register in range(d.shape[1]):
            actual[accumulator_coordinates(thread, register)] = d[thread, register]
    np.testing.assert_array_equal(actual, a @ b.T)


PRODUCTS = [
    ("e4m3", "e4m3", 128, 128, False),
    ("e4m3", "e5m2", 64, 64, True),
    ("e5m2", "e4m3", 224, 32, False),
    ("e5m2", "e5m2", 96, 128, True),
]
products = pytest.mark.parametrize(("a_type", "b_type", "columns", "depth", "registers"), PRODUCTS)


@needs_compiler
@products
def test_product_is_numpys(a_type: str, b_type: str, columns: int, depth: int, registers: bool) -> None:
    program = product(a_type, b_type, columns, depth, registers=registers).build()
    for seed in range(4):
        case = product(a_type, b_type, columns, depth, registers=registers, exact=seed % 2 == 0)
        check_product(case, a_type, b_type, case.on_executor(seed, program)["d"])


@pytest.mark.gpu
@needs_compiler
@products
def test_product_on_the_gpu_is_the_executors(a_type: str, b_type: str, columns: int, depth: int, registers: bool) -> None:
    for exact in (True, False):
        case = product(a_type, b_type, columns, depth, registers=registers, exact=exact)
        on_gpu = case.on_gpu()["d"]
        check_product(case, a_type, b_type, on_gpu)
        np.testing.assert_array_equal(on_gpu, case.on_executor()["d"])


FAULTS: dict[str, tuple[Mapping[str, object], str]] = {
    "operands that have not landed": ({"kWaitLanded": "false"}, r"wgmma reads .*(copy in flight|has not waited for|nobody wrote)"),
    "A that was not pinned": ({"kPinned": "false"}, r"A registers of a wgmma never went through pin_registers"),
}


@needs_compiler
@pytest.mark.parametrize("name", FAULTS)
def test_misused_products_are_reported(name: str) -> None:
    constants, report = FAULTS[name]
    case = product("e4m3", "e5m2", 64, 64, registers=True, faults=constants)
    program = case.build()
    for seed in range(3):
        with pytest.raises(ExecutorFault) as caught:
            case.on_executor(seed, program)
        assert re.search(report, caught.value.report) and "wgmma_fp8_product.cu:" in caught.value.report, caught.value.report


@needs_nvrtc
@needs_nvdisasm
@products
def test_product_is_the_expected_machine_code(a_type: str, b_type: str, columns: int, depth: int, registers: bool) -> None:
    code = product(a_type, b_type, columns, depth, registers=registers).machine_code("sm_90a")
    assert f"QGMMA.64x{columns}x32.F32.{a_type.upper()}.{b_type.upper()}" in code, set(re.findall(r"QGMMA\S*", code))
