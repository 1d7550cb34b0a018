"""The executor's own pieces: every primitive has its twin, TMA and WGMMA agree with layouts.py and NumPy, and misuse is reported."""

from __future__ import annotations

import re
from dataclasses import dataclass
from pathlib import Path

import ml_dtypes
import numpy as np
import pytest

from cutlass_fa.errors import FlashAttnError
from cutlass_fa.executor import ExecutorError, ExecutorFault, ExecutorKernel, GlobalMemory, HostCompileError, compiler_problem
from cutlass_fa.executor.build import EXECUTOR_DIR
from cutlass_fa.executor.tensor_map import encode_tiled
from cutlass_fa.layouts import SwizzledTile, a_operand_coordinates, accumulator_coordinates
from cutlass_fa.render import Source, include_dir
from tests.executor_kernels import SmallKernel, run, words

needs_compiler = pytest.mark.skipif(compiler_problem() is not None, reason=str(compiler_problem()))

DEVICE_HEADERS = sorted((include_dir() / "cutlass_fa").glob("*.cuh"))
TWINS = EXECUTOR_DIR / "include" / "cutlass_fa"
# What makes a header one of the hardware: PTX, intrinsics, or NVIDIA's own headers.
HARDWARE = re.compile(r"\basm\b|\b__\w+\(|\bthreadIdx\b|\batomic[A-Z]\w*\(|#include <(?:cute|cutlass|cuda)/")
FUNCTION = re.compile(r"^ *CUTLASS_FA_DEVICE (?!static)[^;{=()]*?\b(\w+)\(", re.MULTILINE)
TYPE = re.compile(r"^(?:struct|enum class)(?: alignas\(\d+\))? (\w+)", re.MULTILINE)
# The device's own machinery behind wgmma_ss, wgmma_rs, their forms for all steps and for fp8.
NOT_OF_THE_DOOR = {"WgmmaShape", "advance_four", "WgmmaFp8Shape"}


# ---- the door ------------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("header", DEVICE_HEADERS, ids=lambda path: path.name)
def test_every_primitive_has_its_host_twin(header: Path) -> None:
    """A new primitive without its twin fails here, by name."""
    twin = TWINS / header.name
    problems = twin_problems(header.name, header.read_text(), twin.read_text() if twin.exists() else None)
    assert not problems, "\n".join(problems)


def twin_problems(name: str, device: str, host: str | None) -> list[str]:
    """What is wrong between a header's device text and its host twin's; host None: there is none."""
    text = re.sub(r"//[^\n]*", "", device)
    twin = TWINS / name
    if not HARDWARE.search(text):
        return [f"{name} is plain C++: the executor takes the device's own text, which {twin} hides"] if host is not None else []
    if host is None:
        return [f"{name} touches the hardware: write its host twin {twin}"]
    if f"#include_next <cutlass_fa/{name}>" in host:
        return []  # the device's text itself, over host versions of its intrinsics: a missing one does not compile
    names = {*FUNCTION.findall(text), *TYPE.findall(text)} - NOT_OF_THE_DOOR
    return [f"{name}: {each} has no host twin in {twin}" for each in sorted(names) if not re.search(rf"\b{each}\b", host)]


def test_a_missing_twin_is_named() -> None:
    device, host = (include_dir() / "cutlass_fa" / "cluster.cuh").read_text(), (TWINS / "cluster.cuh").read_text()
    new = device.replace(
        "}  // namespace", 'CUTLASS_FA_DEVICE void new_act(int x) { asm volatile("new %0;" ::"r"(x)); }\n\n}  // namespace'
    )
    assert twin_problems("cluster.cuh", device, host) == []
    assert [re.sub(" in .*", "", each) for each in twin_problems("cluster.cuh", new, host)] == ["cluster.cuh: new_act has no host twin"]
    assert "write its host twin" in twin_problems("new.cuh", new, None)[0]
    assert "plain C++" in twin_problems("plain.cuh", "inline int two() { return 2; }", "anything")[0]


def test_twins_have_a_device_header() -> None:
    assert {path.name for path in TWINS.glob("*.cuh")} <= {path.name for path in DEVICE_HEADERS}


@needs_compiler
def test_all_headers_compile_together() -> None:
    includes = "".join(f"#include <cutlass_fa/{path.name}>\n" for path in DEVICE_HEADERS)
    ExecutorKernel.build(Source("headers", "sm_90a", "nothing", includes + '\nextern "C" __global__ void nothing() {}\n', 1024, 32))


@needs_compiler
def test_a_refused_text_is_an_error_with_its_log() -> None:
    with pytest.raises(HostCompileError, match="no_such_act") as caught:
        ExecutorKernel.build(Source("bad", "sm_90a", "bad", 'extern "C" void bad() { no_such_act(); }', 1024, 32))
    assert "bad.cu:1" in caught.value.log


def test_no_compiler_is_an_error(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("CXX", "no-such-compiler")
    assert "no-such-compiler" in str(compiler_problem())
    with pytest.raises(ExecutorError, match="no-such-compiler"):
        ExecutorKernel.build(Source("x", "sm_90a", "x", "int missing_compiler;", 1024, 32), tmp_path)


# ---- TMA -----------------------------------------------------------------------------------------------------------------------------

TMA_BOX = SmallKernel("tma_box", 128, 33792)


@needs_compiler
@pytest.mark.parametrize("swizzle_bytes", [32, 64, 128])
@pytest.mark.parametrize("start", [(0, 0), (16, 24), (-8, -3), (64, 90), (200, 200)], ids=str)
def test_box_lands_where_layouts_say(swizzle_bytes: int, start: tuple[int, int]) -> None:
    """Every element of the box at SwizzledTile.byte_offset, zeros outside the tensor."""
    tile = SwizzledTile(rows=40, cols=swizzle_bytes // 2, swizzle_bytes=swizzle_bytes)
    rng = np.random.default_rng(0)
    array = rng.integers(1, 1 << 16, (2, 100, 3, 72), np.uint16)  # (batch, row, head, column)
    memory = GlobalMemory()
    source = memory.add("array", array)
    out = memory.add("out", np.zeros(tile.size_bytes, np.uint8), writable=True)
    tensor_map = encode_tiled(
        source.address,
        2,
        extents=(72, 100, 3, 2),
        strides=(3 * 72 * 2, 72 * 2, 100 * 3 * 72 * 2),
        box=(tile.chunk_cols, tile.rows, 1, 1),
        swizzle_bytes=swizzle_bytes,
    )
    column, row = start
    run(TMA_BOX.build(), memory, [tensor_map, words(out.address, np.array([tile.size_bytes, column, row, 2, 1]))])
    expected = np.zeros(tile.size_bytes // 2, np.uint16)
    for r in range(tile.rows):
        for c in range(tile.chunk_cols):
            if 0 <= row + r < 100 and 0 <= column + c < 72:
                expected[tile.byte_offset(r, c) // 2] = array[1, row + r, 2, column + c]
    np.testing.assert_array_equal(out.data.view(np.uint16), expected)


@needs_compiler
def test_tensor_map_beyond_its_buffer_is_a_fault() -> None:
    memory = GlobalMemory()
    source = memory.add("array", np.zeros((99, 64), np.uint16))
    out = memory.add("out", np.zeros(5120, np.uint8), writable=True)
    tensor_map = encode_tiled(source.address, 2, extents=(64, 100, 1, 1), strides=(128, 16, 16), box=(64, 40, 1, 1), swizzle_bytes=128)
    with pytest.raises(ExecutorFault, match=r"reads address .* of buffer array of 12672 bytes(?s:.*)tma_box.cu:\d+"):
        run(TMA_BOX.build(), memory, [tensor_map, words(out.address, np.array([5120, 0, 80, 0, 0]))])


@pytest.mark.parametrize(
    "change",
    [{"strides": (136, 16, 16)}, {"box": (64, 257, 1, 1)}, {"box": (128, 8, 1, 1)}, {"swizzle_bytes": 48}, {"extents": (64, 0, 1, 1)}],
    ids=lambda change: next(iter(change)),
)
def test_tensor_map_that_the_driver_refuses(change: dict[str, tuple[int, ...]]) -> None:
    fields = {"extents": (64, 100, 1, 1), "strides": (128, 16, 16), "box": (64, 8, 1, 1), "swizzle_bytes": 128}
    with pytest.raises(FlashAttnError, match="would refuse"):
        encode_tiled(1 << 20, 2, **{**fields, **change})  # type: ignore[arg-type]


# ---- WGMMA ---------------------------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Product:
    """D (64, columns) = A (64, depth) B (depth, columns)."""

    dtype: str
    columns: int
    b_is_mn_major: bool
    swizzle_bytes: int
    from_registers: bool
    depth: int = 96

    def __str__(self) -> str:
        major, form = ("mn" if self.b_is_mn_major else "k"), ("rs" if self.from_registers else "ss")
        return f"{self.dtype}-n{self.columns}-{major}-{self.swizzle_bytes}B-{form}"


PRODUCTS = [Product("bfloat16", n, bool(mn), swizzle, bool(rs)) for n, swizzle in ((64, 128), (176, 64)) for mn in (0, 1) for rs in (0, 1)]
PRODUCTS += [Product("float16", 256, True, 128, True), Product("float16", 16, False, 32, False), Product("bfloat16", 96, True, 32, False)]


@needs_compiler
@pytest.mark.parametrize("product", PRODUCTS, ids=str)
def test_product_is_numpys(product: Product) -> None:
    check_product(product)


@needs_compiler
def test_plain_writes_need_a_proxy_fence() -> None:
    check_product(PRODUCTS[0], kNegateA="true")
    with pytest.raises(ExecutorFault, match=r"plain stores that no fence_async_proxy has followed(?s:.*)wgmma_product.cu:\d+"):
        check_product(PRODUCTS[0], kNegateA="true", kFence="false")


def check_product(product: Product, **constants: str) -> None:
    dtype = np.dtype(np.float16 if product.dtype == "float16" else ml_dtypes.bfloat16)
    rng = np.random.default_rng(1)
    a = rng.integers(-8, 9, (64, product.depth)).astype(dtype)
    b = rng.integers(-8, 9, (product.depth, product.columns)).astype(dtype)
    stored_b = b if product.b_is_mn_major else np.ascontiguousarray(b.T)
    tile_a = SwizzledTile(64, product.depth, product.swizzle_bytes)
    tile_b = SwizzledTile(stored_b.shape[0], stored_b.shape[1], product.swizzle_bytes)
    memory = GlobalMemory()
    maps = [
        encode_tiled(
            memory.add(name, array).address,
            2,
            extents=(array.shape[1], array.shape[0], 1, 1),
            strides=(array.shape[1] * 2, 16, 16),
            box=(tile.chunk_cols, tile.rows, 1, 1),
            swizzle_bytes=product.swizzle_bytes,
        )
        for name, array, tile in (("a", a, tile_a), ("b", stored_b, tile_b))
    ]
    d = memory.add("d", np.zeros(128 * product.columns * 2, np.uint8), writable=True)
    operand = memory.add("operand", _operand_registers(a))
    layout_b = tile_b.mn_major_descriptor() if product.b_is_mn_major else tile_b.k_major_descriptor()
    kernel = SmallKernel("wgmma_product", 128, -(-(tile_a.size_bytes + 1024 + tile_b.size_bytes + 8) // 1024) * 1024)
    program = kernel.build(
        Element=product.dtype,
        kColumns=product.columns,
        kDepth=product.depth,
        kFromRegisters=str(product.from_registers).lower(),
        kMajorB="Major::kMn" if product.b_is_mn_major else "Major::kK",
        kChunkColumns=tile_a.chunk_cols,
        kChunkBytesA=tile_a.chunk_bytes,
        kChunkBytesB=tile_b.chunk_bytes,
        kChunksA=tile_a.num_chunks,
        kChunksB=tile_b.num_chunks,
        kLayoutA=f"{tile_a.k_major_descriptor().bits:#x}ull",
        kLayoutB=f"{layout_b.bits:#x}ull",
        kStepBytesB=tile_b.mn_major_step_bytes(1) if product.b_is_mn_major else 0,
        **constants,
    )
    run(program, memory, [*maps, words(d.address, operand.address)], seed=2)
    registers = d.data.view(np.float32).reshape(128, product.columns // 2)
    actual = np.empty((64, product.columns), np.float32)
    for thread in range(128):
        for register in range(product.columns // 2):
            actual[accumulator_coordinates(thread, register)] = registers[thread, register]
    sign = -1 if "kNegateA" in constants else 1
    np.testing.assert_array_equal(actual, sign * (a.astype(np.float32) @ b.astype(np.float32)))  # small integers: exact


def _operand_registers(a: np.ndarray) -> np.ndarray:
    """(128 threads, depth / 16 * 4 registers, 2 halves) of A."""
    steps = a.shape[1] // 16
    registers = np.empty((128, steps * 4, 2), a.dtype)
    for thread in range(128):
        for step in range(steps):
            for register in range(4):
                for half in range(2):
                    row, k = a_operand_coordinates(thread, register, half)
                    registers[thread, 4 * step + register, half] = a[row, 16 * step + k]
    return registers


# ---- misuse --------------------------------------------------------------------------------------------------------------------------

FAULTS = SmallKernel("faults", 512, 1024)
MISUSES = {
    0: "barrier 3 is used with (128|256) threads while (128|256) are expected",
    1: "comes to barrier 3 twice",
    2: r"deadlock:(?s:.*)threads 0-127 wait in named_barrier_sync 3, 128 of 256 threads there at faults.cu:\d+",
    3: "an arrival too many",
    4: "is not initialised",
    5: "no barrier separates from its initialisation|is not initialised",
    6: r"deadlock:(?s:.*)threads 201-511 wait in mbarrier wait .* parity 0; 0 phases ended, 1 of 2 arrivals",
    7: "deadlock:(?s:.*)threads 0-199 wait in block_sync, 200 of 512 threads there",
    8: "ids are 0 to 14",
    9: "initialised twice",
    10: "was overwritten",
    20: "deadlock:(?s:.*)threads 0-15, 32-47.* wait in a shuffle",
    21: "meet in different acts",
    22: "deadlock:(?s:.*)grow_registers_to",
    23: "kept its 128 registers",
    40: r"an access to address .* \(byte 2048 of buffer out of 2048 bytes\)(?s:.*)faults.cu:\d+",
    41: r"buffer out was written at byte -4|an access to address",
    42: r"array index out of bounds(?s:.*)faults.cu:\d+",
    43: "an atomic outside every buffer",
    44: "timeout:",
}


@needs_compiler
@pytest.mark.parametrize("which", list(MISUSES))
@pytest.mark.parametrize("seed", [0, 1, 2])
def test_misuse_is_reported(which: int, seed: int) -> None:
    if which == 44 and seed:
        pytest.skip("one second of waiting is enough")
    memory = GlobalMemory()
    out = memory.add("out", np.zeros(2048, np.uint8), writable=True)
    with pytest.raises(ExecutorFault) as caught:
        run(FAULTS.build(), memory, [words(out.address, np.array([which]))], seed=seed, time_limit_s=1 if which == 44 else 20)
    assert re.search(MISUSES[which], caught.value.report), caught.value.report
    assert re.search(r"CTA 0", caught.value.report) and f"seed {seed}" in caught.value.report


@needs_compiler
def test_no_misuse_is_not_reported() -> None:
    memory = GlobalMemory()
    out = memory.add("out", np.zeros(2048, np.uint8), writable=True)
    run(FAULTS.build(), memory, [words(out.address, np.array([99]))])
    np.testing.assert_array_equal(out.data.view(np.int32), np.arange(512))


@needs_compiler
def test_arguments_must_have_the_kernels_sizes() -> None:
    memory = GlobalMemory()
    for arguments in ([b"\0" * 8], [b"\0" * 16, b"\0" * 4]):
        with pytest.raises(ExecutorError, match="argument"):
            run(FAULTS.build(), memory, arguments)
