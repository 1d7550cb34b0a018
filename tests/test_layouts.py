"""cutlass_fa.layouts against CuTe's layouts, compiled on the host, and against the rules of TMA and wgmma."""

from __future__ import annotations

import importlib.util
import os
import shutil
import subprocess
from itertools import product
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pytest

from cutlass_fa.layouts import (
    KeyGroupTile,
    MatrixDescriptor,
    SwizzledTile,
    a_operand_coordinates,
    accumulator_coordinates,
    accumulator_register_of_a_operand,
    column_order,
    fp8_a_operand_coordinates,
    kv_order,
    mma_a_coordinates,
    mma_accumulator_coordinates,
    mma_b_coordinates,
)

CUTE_TILES = [
    SwizzledTile(rows, cols, swizzle_bytes)
    for cols, swizzle_bytes in [(64, 128), (128, 128), (192, 128), (256, 128), (96, 64), (64, 32)]
    for rows in (64, 80, 96, 112, 128, 144, 160, 176, 192)
]
Q_ROWS = (128, 192)  # Q tiles, which each warpgroup reads by 64 rows
HEAD_DIM_80_TILES = [SwizzledTile(rows, 80, 64) for rows in (64, 112, 128, 192)]
KEY_GROUP_TILES = [KeyGroupTile(keys, cols) for keys in (64, 128) for cols in (64, 80, 96, 128, 192, 256)]
ACCUMULATOR_COLS = (64, 80, 96, 112, 128, 144, 160, 176, 192, 256)
THREADS = range(128)
A_OPERAND_VALUES = [(register, half) for register in range(4) for half in range(2)]


def tile_id(tile: SwizzledTile) -> str:
    return f"{tile.rows}x{tile.cols}x{tile.element_bytes}B-sw{tile.swizzle_bytes}"


def offsets(tile: SwizzledTile) -> np.ndarray[Any, np.dtype[np.uint32]]:
    """(rows, padded_cols) byte offsets."""
    table = [[tile.byte_offset(row, col) for col in range(tile.padded_cols)] for row in range(tile.rows)]
    return np.array(table, np.uint32)


def group_offsets(tile: KeyGroupTile) -> np.ndarray[Any, np.dtype[np.uint32]]:
    """(keys, cols) byte offsets."""
    return np.array([[tile.byte_offset(key, col) for col in range(tile.cols)] for key in range(tile.keys)], np.uint32)


# What CuTe says


class Record(NamedTuple):
    """Key of one table that cute_layouts.cpp prints; extent is the M or N of a descriptor's operand."""

    kind: int
    rows: int
    cols: int
    swizzle_bytes: int = 0
    extent: int = 0


PLACEMENT_K, PLACEMENT_MN, DESCRIPTOR_K, DESCRIPTOR_MN, ACCUMULATOR, OPERAND_A, MMA_ACCUMULATOR, MMA_A, MMA_B = range(9)
CuteTables = dict[Record, np.ndarray[Any, np.dtype[np.uint32]]]


def include_dirs() -> list[Path]:
    """Headers of CUTLASS (wheel) and of one CUDA toolkit (wheels or installed); skips without them."""
    cutlass = importlib.util.find_spec("cutlass_library")
    if cutlass is None or cutlass.origin is None:
        pytest.skip("no CUTLASS headers: the nvidia-cutlass wheel is not installed")
    nvidia = importlib.util.find_spec("nvidia")
    bases = nvidia.submodule_search_locations if nvidia is not None else None
    toolkits = [include for base in bases or [] for include in sorted(Path(base).glob("*/include"))]
    homes = (os.environ.get("CUDA_HOME"), os.environ.get("CUDA_PATH"), "/usr/local/cuda")
    toolkits += [Path(home) / "include" for home in homes if home]
    for toolkit in toolkits:
        # The runtime wheel alone is not enough for a host compiler: crt/ comes in nvidia-cuda-crt.
        if all((toolkit / header).is_file() for header in ("cuda_runtime.h", "crt/host_defines.h")):
            return [Path(cutlass.origin).parent / "source" / "include", toolkit, toolkit / "cccl"]
    pytest.skip("no CUDA headers for a host compiler (nvidia-cuda-runtime, -crt, -cccl or a toolkit)")


@pytest.fixture(scope="session")
def cute(tmp_path_factory: pytest.TempPathFactory) -> CuteTables:
    """The tables of cute_layouts.cpp, compiled and run once (about 25 s)."""
    compiler = shutil.which(os.environ.get("CXX", "g++"))
    if compiler is None:
        pytest.skip("no host C++ compiler")
    program = tmp_path_factory.mktemp("cute") / "cute_layouts"
    includes = [f"-isystem{directory}" for directory in include_dirs()]
    source = Path(__file__).with_name("cute_layouts.cpp")
    command = [compiler, "-std=c++17", "-O0", *includes, str(source), "-o", str(program)]
    compiled = subprocess.run(command, capture_output=True, text=True, timeout=600)
    assert compiled.returncode == 0, compiled.stderr[-4000:]
    words = np.frombuffer(subprocess.run([program], stdout=subprocess.PIPE, check=True).stdout, np.uint32)
    tables: CuteTables = {}
    position = 0
    while position < len(words):
        *key, count = map(int, words[position : position + 6])
        tables[Record(*key)] = words[position + 6 : position + 6 + count]
        position += 6 + count
    return tables


def test_cute_prints_exactly_the_tables_compared_here(cute: CuteTables) -> None:
    expected = {Record(ACCUMULATOR, 64, cols) for cols in ACCUMULATOR_COLS} | {Record(OPERAND_A, 64, 16)}
    expected |= {Record(MMA_ACCUMULATOR, 16, 8), Record(MMA_A, 16, 16), Record(MMA_B, 8, 16)}
    for tile in CUTE_TILES:
        shape = (tile.rows, tile.cols, tile.swizzle_bytes)
        expected |= {Record(PLACEMENT_K, *shape), Record(PLACEMENT_MN, *shape)}
        expected |= {Record(DESCRIPTOR_K, *shape, tile.rows), Record(DESCRIPTOR_MN, *shape, tile.cols)}
        if tile.rows in Q_ROWS:
            expected.add(Record(DESCRIPTOR_K, *shape, 64))
    for group_tile in KEY_GROUP_TILES:
        shape = (group_tile.cols, group_tile.keys, 0)
        expected |= {Record(PLACEMENT_K, *shape), Record(PLACEMENT_MN, *shape)}
        expected |= {Record(DESCRIPTOR_K, *shape, group_tile.cols), Record(DESCRIPTOR_MN, *shape, group_tile.keys)}
        if group_tile.cols in Q_ROWS:
            expected.add(Record(DESCRIPTOR_K, *shape, 64))
    assert set(cute) == expected


@pytest.mark.parametrize("tile", CUTE_TILES, ids=tile_id)
def test_placement_is_cutes(cute: CuteTables, tile: SwizzledTile) -> None:
    one_stage = offsets(tile)
    expected = np.stack([one_stage, one_stage + tile.size_bytes])
    for kind in (PLACEMENT_K, PLACEMENT_MN):
        table = cute[Record(kind, tile.rows, tile.cols, tile.swizzle_bytes)]
        np.testing.assert_array_equal(table.reshape(expected.shape), expected)


@pytest.mark.parametrize("tile", HEAD_DIM_80_TILES, ids=tile_id)
def test_head_dim_80_is_the_first_80_columns_of_cutes_96(cute: CuteTables, tile: SwizzledTile) -> None:
    """CuTe cannot tile 2.5 chunks."""
    whole = cute[Record(PLACEMENT_K, tile.rows, 96, 64)].reshape(2, tile.rows, 96)
    np.testing.assert_array_equal(whole[0], offsets(tile))
    padded = SwizzledTile(tile.rows, 96, 64)
    assert tile.padded_cols == 96 and tile.size_bytes == padded.size_bytes
    assert tile.k_major_descriptor() == padded.k_major_descriptor()
    assert tile.mn_major_descriptor() == padded.mn_major_descriptor()
    steps = [tile.k_major_step_bytes(step) for step in range(tile.num_k_major_steps)]
    assert steps == [padded.k_major_step_bytes(step) for step in range(5)]


@pytest.mark.parametrize("tile", CUTE_TILES, ids=tile_id)
def test_k_major_descriptors_are_cutes(cute: CuteTables, tile: SwizzledTile) -> None:
    descriptor = tile.k_major_descriptor()
    for extent in {tile.rows, 64} if tile.rows in Q_ROWS else {tile.rows}:
        expected = [
            descriptor.at(tile.byte_offset(row, 0) + tile.k_major_step_bytes(step))
            for step in range(tile.num_k_major_steps)
            for row in range(0, tile.rows, extent)
        ]
        table = cute[Record(DESCRIPTOR_K, tile.rows, tile.cols, tile.swizzle_bytes, extent)]
        assert table.view(np.uint64).tolist() == expected


@pytest.mark.parametrize("tile", CUTE_TILES, ids=tile_id)
def test_mn_major_descriptors_are_cutes(cute: CuteTables, tile: SwizzledTile) -> None:
    descriptor = tile.mn_major_descriptor()
    if tile.num_chunks == 1:  # CuTe leaves the stride between chunks zero where there is one chunk
        descriptor = MatrixDescriptor(0, descriptor.stride_byte_offset, tile.swizzle_bytes)
    expected = [descriptor.at(tile.mn_major_step_bytes(step)) for step in range(tile.num_mn_major_steps)]
    table = cute[Record(DESCRIPTOR_MN, tile.rows, tile.cols, tile.swizzle_bytes, tile.cols)]
    assert table.view(np.uint64).tolist() == expected


@pytest.mark.parametrize("tile", KEY_GROUP_TILES, ids=str)
def test_placement_of_key_groups_is_cutes(cute: CuteTables, tile: KeyGroupTile) -> None:
    one_stage = group_offsets(tile).T
    expected = np.stack([one_stage, one_stage + tile.size_bytes])
    for kind in (PLACEMENT_K, PLACEMENT_MN):
        np.testing.assert_array_equal(cute[Record(kind, tile.cols, tile.keys)].reshape(expected.shape), expected)


@pytest.mark.parametrize("tile", KEY_GROUP_TILES, ids=str)
def test_descriptors_of_key_groups_are_cutes(cute: CuteTables, tile: KeyGroupTile) -> None:
    k_major, mn_major = tile.k_major_descriptor(), tile.mn_major_descriptor()
    table = cute[Record(DESCRIPTOR_K, tile.cols, tile.keys, 0, tile.cols)].view(np.uint64)
    assert table.tolist() == [k_major.at(step * tile.key_step_bytes) for step in range(tile.keys // 16)]
    table = cute[Record(DESCRIPTOR_MN, tile.cols, tile.keys, 0, tile.keys)].view(np.uint64)
    assert table.tolist() == [mn_major.at(step * tile.column_step_bytes) for step in range(tile.cols // 16)]


@pytest.mark.parametrize("cols", ACCUMULATOR_COLS)
def test_accumulator_ownership_is_cutes(cute: CuteTables, cols: int) -> None:
    coordinates = [accumulator_coordinates(thread, i) for thread in THREADS for i in range(cols // 2)]
    assert cute[Record(ACCUMULATOR, 64, cols)].tolist() == [row + 64 * col for row, col in coordinates]
    assert len(set(coordinates)) == 64 * cols


def test_a_operand_ownership_is_cutes(cute: CuteTables) -> None:
    coordinates = [a_operand_coordinates(thread, *value) for thread in THREADS for value in A_OPERAND_VALUES]
    assert cute[Record(OPERAND_A, 64, 16)].tolist() == [row + 64 * k for row, k in coordinates]
    assert len(set(coordinates)) == 64 * 16


def test_mma_ownership_is_cutes(cute: CuteTables) -> None:
    lanes = range(32)
    d = [mma_accumulator_coordinates(lane, register) for lane in lanes for register in range(4)]
    a = [mma_a_coordinates(lane, *value) for lane in lanes for value in A_OPERAND_VALUES]
    b = [mma_b_coordinates(lane, register, half) for lane in lanes for register in range(2) for half in range(2)]
    assert cute[Record(MMA_ACCUMULATOR, 16, 8)].tolist() == [row + 16 * col for row, col in d]
    assert cute[Record(MMA_A, 16, 16)].tolist() == [row + 16 * k for row, k in a]
    assert cute[Record(MMA_B, 8, 16)].tolist() == [col + 8 * k for k, col in b]


# What TMA and wgmma say, with no compiler

RULE_TILES = [
    SwizzledTile(8, 64, 128),
    SwizzledTile(176, 128, 128),
    SwizzledTile(80, 96, 64),
    SwizzledTile(48, 64, 32),
    SwizzledTile(64, 256, 128, element_bytes=1),
    SwizzledTile(64, 40, 64, element_bytes=4),
    *HEAD_DIM_80_TILES,
]


@pytest.mark.parametrize("tile", RULE_TILES, ids=tile_id)
def test_byte_offset_is_a_bijection(tile: SwizzledTile) -> None:
    assert sorted(offsets(tile).ravel().tolist()) == list(range(0, tile.size_bytes, tile.element_bytes))
    assert tile.size_bytes % tile.alignment == 0


@pytest.mark.parametrize("tile", RULE_TILES, ids=tile_id)
def test_byte_offset_follows_the_tma_swizzle(tile: SwizzledTile) -> None:
    """16-byte unit u of row r of a box goes to unit u XOR r % 8, r / 2 % 4 or r / 4 % 2 of the row."""
    rows_of_unit = {128: lambda row: row % 8, 64: lambda row: row // 2 % 4, 32: lambda row: row // 4 % 2}
    for row in range(tile.rows):
        for col in range(tile.padded_cols):
            unit, byte = divmod(col % tile.chunk_cols * tile.element_bytes, 16)
            unit ^= rows_of_unit[tile.swizzle_bytes](row)
            box = col // tile.chunk_cols * tile.rows * tile.swizzle_bytes
            assert tile.byte_offset(row, col) == box + row * tile.swizzle_bytes + 16 * unit + byte


class Operand(NamedTuple):
    """A descriptor taken apart as the hardware does, by the bit positions of PTX's format."""

    start: int
    leading: int
    stride: int
    swizzle_bytes: int

    @classmethod
    def decode(cls, bits: int) -> Operand:
        start, leading, stride = (16 * (bits >> shift & 0x3FFF) for shift in (0, 16, 32))
        assert bits >> 46 & 0xFFFF == 0  # base offset and reserved bits
        return cls(start, leading, stride, {1: 128, 2: 64, 3: 32}[bits >> 62])

    def address(self, outer: int, inner: int, leading_index: int) -> int:
        """Address of byte `inner` of line `outer`: lines of swizzle_bytes, 8 to a stride; swizzled."""
        linear = self.start + leading_index * self.leading + outer // 8 * self.stride
        linear += outer % 8 * self.swizzle_bytes + inner
        return linear ^ (linear >> 7 & {128: 7, 64: 3, 32: 1}[self.swizzle_bytes]) << 4


OPERAND_TILES = [
    SwizzledTile(64, 64, 128),
    SwizzledTile(176, 128, 128),
    SwizzledTile(80, 96, 64),
    SwizzledTile(48, 64, 32),
    *HEAD_DIM_80_TILES,
]


@pytest.mark.parametrize("tile", [*OPERAND_TILES, SwizzledTile(64, 256, 128, element_bytes=1)], ids=tile_id)
def test_k_major_operand_reads_the_elements_that_tma_wrote(tile: SwizzledTile) -> None:
    base = 3 * tile.alignment
    group = 32 // tile.element_bytes
    for first_row in range(0, tile.rows, 16):
        for step in range(tile.num_k_major_steps):
            start = base + tile.byte_offset(first_row, 0) + tile.k_major_step_bytes(step)
            operand = Operand.decode(tile.k_major_descriptor().at(start))
            for row in range(min(16, tile.rows - first_row)):
                for k in range(group):
                    expected = base + tile.byte_offset(first_row + row, step * group + k)
                    assert operand.address(row, k * tile.element_bytes, 0) == expected


@pytest.mark.parametrize("tile", OPERAND_TILES, ids=tile_id)
def test_mn_major_operand_reads_the_elements_that_tma_wrote(tile: SwizzledTile) -> None:
    base = 5 * tile.alignment
    for step in range(tile.num_mn_major_steps):
        operand = Operand.decode(tile.mn_major_descriptor().at(base + tile.mn_major_step_bytes(step)))
        for k in range(16):
            for col in range(tile.cols):
                chunk, chunk_col = divmod(col, tile.chunk_cols)
                expected = base + tile.byte_offset(16 * step + k, col)
                assert operand.address(k, 2 * chunk_col, chunk) == expected


@pytest.mark.parametrize("tile", KEY_GROUP_TILES, ids=str)
def test_key_groups_are_boxes_and_operands(tile: KeyGroupTile) -> None:
    """A TMA box of (columns, 8 keys) without swizzle is packed; 8 x 8 blocks, at the strides that PTX gives operands without swizzle, hold
    what each operand's rows and columns are."""
    table = group_offsets(tile)
    for group in range(tile.keys // 8):
        box = table[8 * group : 8 * group + 8].T  # (columns, keys), innermost last
        assert (box.ravel() == group * tile.group_bytes + 2 * np.arange(8 * tile.cols)).all()
    i, j = np.arange(8)[:, None], np.arange(8)[None]
    for key in range(0, tile.keys, 8):
        for col in range(0, tile.cols, 8):
            block = table[key : key + 8, col : col + 8]  # [key, column]
            d = tile.k_major_descriptor()  # summed over keys: lines of 8 keys, one for each column
            start = key // 8 * d.leading_byte_offset + col // 8 * d.stride_byte_offset
            assert (block == start + 16 * j + 2 * i).all()
            d = tile.mn_major_descriptor()  # summed over columns: lines of 8 keys, one for each column
            assert (block == col // 8 * d.leading_byte_offset + key // 8 * d.stride_byte_offset + 16 * j + 2 * i).all()
    assert tile.key_step_bytes == table[16, 0] and tile.column_step_bytes == table[0, 16]
    assert sorted(table.ravel().tolist()) == list(range(0, tile.size_bytes, 2))


MMA_TILES = [SwizzledTile(rows, cols, 128 if cols % 64 == 0 else 64) for rows in (32, 48, 128) for cols in (64, 80, 96, 128, 192, 256)]
BLOCKS_OF_16 = [(row, col) for row in (0, 16) for col in range(0, 256, 16)]


@pytest.mark.parametrize("tile", MMA_TILES, ids=str)
@pytest.mark.parametrize("operand", ["a", "b", "b_mn_major"])
def test_ldmatrix_meets_no_bank_twice(tile: SwizzledTile, operand: str) -> None:
    """Each of the four matrices takes its eight rows from eight different sets of four banks."""
    for row, col in BLOCKS_OF_16:
        if col < tile.cols:
            units = [tile.ldmatrix_offset(operand, lane, row, col) // 16 % 8 for lane in range(32)]
            assert all(len(set(units[first : first + 8])) == 8 for first in range(0, 32, 8))


@pytest.mark.parametrize("tile", MMA_TILES, ids=str)
@pytest.mark.parametrize("operand", ["a", "b", "b_mn_major"])
def test_ldmatrix_offset_is_what_the_sm80_template_computes(tile: SwizzledTile, operand: str) -> None:
    """Beside the template's words: swizzled(), make_lane(), operand_of() and block_at()."""
    pitch = tile.swizzle_bytes

    def swizzled(offset: int) -> int:
        return offset ^ (offset >> 3 & (pitch - 16))

    for lane in range(32):
        if operand == "b":
            lane_offset = swizzled((lane % 8 + lane // 16 * 8) * pitch + lane // 8 % 2 * 16)
        else:
            lane_offset = swizzled(lane % 16 * pitch + lane // 16 * 16)
        for row, col in BLOCKS_OF_16:
            if col < tile.cols:
                pointer = lane_offset ^ 32 * (col % tile.chunk_cols // 16)
                expected = pointer + (col // tile.chunk_cols * tile.rows + row) * pitch
                assert tile.ldmatrix_offset(operand, lane, row, col) == expected


@pytest.mark.parametrize(
    ("threads", "tile"), [(n, tile) for n in (128, 256) for tile in MMA_TILES if tile.rows % (n * 16 // tile.swizzle_bytes) == 0], ids=str
)
def test_copier_fills_the_tile_without_bank_conflicts(threads: int, tile: SwizzledTile) -> None:
    """Beside pieces/tile_copier.j2: every 16 bytes of a tile are written by one thread, eight neighbouring threads write to all banks."""
    units = tile.swizzle_bytes // 16
    rows_per_pass = threads // units
    written = []
    for first in range(0, tile.rows, rows_per_pass):
        for chunk in range(tile.num_chunks):
            places = []
            for thread in range(threads):
                row, unit = divmod(thread, units)
                offset = row * tile.swizzle_bytes + unit * 16
                offset ^= offset >> 3 & (tile.swizzle_bytes - 16)
                place = chunk * tile.rows * tile.swizzle_bytes + first * tile.swizzle_bytes + offset
                assert place == tile.byte_offset(first + row, chunk * tile.chunk_cols + unit * 8)
                places.append(place)
            assert all(len({place // 16 % 8 for place in places[i : i + 8]}) == 8 for i in range(0, threads, 8))
            written += places
    assert sorted(written) == list(range(0, tile.size_bytes, 16))


def test_k_step_count_stops_at_the_columns_in_use() -> None:
    tile = SwizzledTile(64, 80, 64)
    assert tile.num_k_major_steps == 5 and tile.num_mn_major_steps == 4
    assert [tile.k_major_step_bytes(step) for step in range(5)] == [0, 32, 4096, 4128, 8192]
    assert [tile.mn_major_step_bytes(step) for step in range(4)] == [0, 1024, 2048, 3072]


def test_converted_accumulator_is_the_a_operand() -> None:
    order = []
    for step in range(16):
        for value in A_OPERAND_VALUES:
            source = accumulator_register_of_a_operand(step, *value)
            order.append(source)
            for thread in THREADS:
                row, k = a_operand_coordinates(thread, *value)
                assert accumulator_coordinates(thread, source) == (row, 16 * step + k)
    assert order == list(range(128))  # pairwise: registers 2 i and 2 i + 1 become 32-bit register i


# What is refused


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ((64, 64, 16), "swizzle_bytes"),
        ((64, 64, 256), "swizzle_bytes"),
        ((0, 64, 128), "rows"),
        ((-8, 64, 128), "rows"),
        ((60, 64, 128), "rows"),
        ((264, 64, 128), "rows"),
        ((64, 0, 128), "cols"),
        ((64, -8, 128), "cols"),
        ((64, 68, 128), "cols"),
        ((64, 64, 128, 3), "element_bytes"),
    ],
)
def test_impossible_tiles_are_refused(arguments: tuple[int, ...], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        SwizzledTile(*arguments)


@pytest.mark.parametrize(("keys", "cols"), [(8, 64), (0, 64), (72, 64), (64, 72), (64, 0), (64, 272)])
def test_impossible_key_groups_are_refused(keys: int, cols: int) -> None:
    with pytest.raises(ValueError, match=r"keys must|cols must"):
        KeyGroupTile(keys, cols)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ((8, 1024, 128), "leading_byte_offset"),
        ((16, 1 << 18, 128), "stride_byte_offset"),
        ((16, -16, 128), "stride_byte_offset"),
        ((16, 1024, 16), "swizzle_bytes"),
    ],
)
def test_impossible_descriptors_are_refused(arguments: tuple[int, int, int], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        MatrixDescriptor(*arguments)


def test_indices_outside_the_tile_are_refused() -> None:
    tile = SwizzledTile(64, 80, 64)
    for row, col in [(-1, 0), (64, 0), (0, -1), (0, 96)]:
        with pytest.raises(ValueError, match=r"row|col"):
            tile.byte_offset(row, col)
    for step in (-1, 5):
        with pytest.raises(ValueError, match="step"):
            tile.k_major_step_bytes(step)
    for step in (-1, 4):
        with pytest.raises(ValueError, match="step"):
            tile.mn_major_step_bytes(step)
    for address in (-16, 8):
        with pytest.raises(ValueError, match="address"):
            tile.k_major_descriptor().at(address)


def test_operands_that_wgmma_cannot_read_are_refused() -> None:
    with pytest.raises(ValueError, match="multiple of 32 bytes"):
        _ = SwizzledTile(64, 72, 64).num_k_major_steps
    with pytest.raises(ValueError, match="16 rows"):
        SwizzledTile(72, 64, 128).mn_major_descriptor()
    with pytest.raises(ValueError, match="16-bit"):
        SwizzledTile(64, 128, 128, element_bytes=1).mn_major_descriptor()


@pytest.mark.parametrize("indices", [(-1, 0), (128, 0), (0, -1), (0, 128)])
def test_accumulator_indices_outside_the_fragment_are_refused(indices: tuple[int, int]) -> None:
    with pytest.raises(ValueError, match=r"thread|register"):
        accumulator_coordinates(*indices)


@pytest.mark.parametrize("indices", [(128, 0, 0), (0, 4, 0), (0, -1, 0), (0, 0, 2)])
def test_a_operand_indices_outside_the_fragment_are_refused(indices: tuple[int, int, int]) -> None:
    with pytest.raises(ValueError, match=r"thread|register|half"):
        a_operand_coordinates(*indices)
    if indices[0] == 0:
        with pytest.raises(ValueError, match=r"register|half"):
            accumulator_register_of_a_operand(*indices)


def test_fp8_probabilities_are_where_the_operand_wants_them() -> None:
    """softmax_fp8.cuh packs accumulator registers 8 (i / 2) + 2 (i % 2) + 0, 1, 4, 5 into register i: keys in kv_order."""
    for thread in range(128):
        for i in range(8):  # two steps of 32
            for byte, offset in enumerate((0, 1, 4, 5)):
                row, key = accumulator_coordinates(thread, i // 2 * 8 + i % 2 * 2 + offset)
                operand_row, k = fp8_a_operand_coordinates(thread, i % 4, byte)
                assert (row, key) == (operand_row, kv_order(32 * (i // 4) + k))


def test_fp8_orders_are_permutations_of_16() -> None:
    for order in (kv_order, column_order):
        assert sorted(map(order, range(16))) == list(range(16)) and [order(i + 16) for i in range(16)] == [order(i) + 16 for i in range(16)]


def test_fp8_output_has_four_neighbouring_columns_a_thread() -> None:
    """output_fp8.cuh: numbers 8 g, 8 g + 4, 8 g + 1 and 8 g + 5 of a thread's row."""
    for thread, group in product(range(128), range(4)):
        columns = [column_order(accumulator_coordinates(thread, 8 * group + i)[1]) for i in (0, 4, 1, 5)]
        assert columns == [16 * group + thread % 4 * 4 + i for i in range(4)]
