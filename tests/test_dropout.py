"""Dropout's random numbers: known answers, the mapping from elements to numbers, and the device code's own words."""

from __future__ import annotations

import numpy as np
import pytest

from cutlass_fa.dropout import dropout_mask, keep_scale, keep_threshold, philox4x32
from cutlass_fa.executor import ExecutorKernel, GlobalMemory, compiler_problem, launch
from cutlass_fa.render import Source, environment

# Known-answer vectors of the authors' Random123 library (kat_vectors, philox 4 32, 10 rounds): counter, key, output.
KNOWN_ANSWERS = (
    ((0, 0, 0, 0), (0, 0), (0x6627E8D5, 0xE169C58D, 0xBC57AC4C, 0x9B00DBD8)),
    ((0xFFFFFFFF,) * 4, (0xFFFFFFFF,) * 2, (0x408F276D, 0x41C83B0E, 0xA20BC7C6, 0x6D5451FD)),
    (
        (0x243F6A88, 0x85A308D3, 0x13198A2E, 0x03707344),
        (0xA4093822, 0x299F31D0),
        (0xD16CFE09, 0x94FDCCEB, 0x5001E420, 0x24126EA1),
    ),
)


@pytest.mark.parametrize(("counter", "key", "expected"), KNOWN_ANSWERS)
def test_known_answers(counter: tuple[int, ...], key: tuple[int, int], expected: tuple[int, ...]) -> None:
    c0, c1, c2, c3 = (np.uint64(word) for word in counter)
    assert tuple(int(word) for word in philox4x32((c0, c1, c2, c3), key)) == expected


def test_mask_is_the_documented_function_of_its_arguments() -> None:
    """Element by element, from the docstring's words."""
    seed, offset, p, heads = 0x123456789ABCDEF0, 0x2_0000_0007, 0.3, 3
    mask = dropout_mask(seed, offset, p, 2, heads, 37, 50)
    assert mask.shape == (2, heads, 37, 50)
    for batch, head, row, column in ((0, 0, 0, 0), (1, 2, 36, 49), (0, 1, 8, 9), (1, 0, 23, 30), (1, 1, 31, 41), (0, 2, 12, 6)):
        counter = (4 * (column // 16) + column % 8 // 2, 8 * (row // 16) + row % 8, batch * heads + head, offset % 2**32)
        c0, c1, c2, c3 = (np.uint64(each) for each in counter)
        words = philox4x32((c0, c1, c2, c3), (seed % 2**32, seed // 2**32 ^ offset // 2**32))
        index = 4 * (row // 8 % 2) + 2 * (column // 8 % 2) + column % 2
        number = int(words[index // 2]) >> 16 * (index % 2) & 0xFFFF
        assert mask[batch, head, row, column] == (number < keep_threshold(p))


def test_mask_does_not_depend_on_the_shape_around_an_element() -> None:
    whole = dropout_mask(7, 9, 0.5, 2, 4, 100, 130)
    assert (dropout_mask(7, 9, 0.5, 1, 4, 33, 77) == whole[:1, :, :33, :77]).all()
    assert [(dropout_mask(*state, 0.5, 2, 4, 100, 130) != whole).mean() > 0.4 for state in ((8, 9), (7, 10), (7 + 2**40, 9))] == [True] * 3


@pytest.mark.parametrize("p", [0.0, 0.17, 0.5, 0.9])
def test_share_and_threshold(p: float) -> None:
    mask = dropout_mask(1, 2, p, 1, 2, 512, 512)
    assert abs(float(mask.mean()) - (1 - p)) < 5 * np.sqrt(0.25 / mask.size) + 2**-17
    assert keep_scale(p) == 1 / (1 - p)
    assert (keep_threshold(0.0), keep_threshold(0.5), keep_threshold(0.17)) == (65536, 32768, 54395)
    assert mask.all() == (p == 0)


_KERNEL = """#include <cutlass_fa/base.cuh>
#include <cutlass_fa/philox.cuh>
using namespace cutlass_fa;
struct Params {
  int* kept;
  uint64_t dropout_seed, dropout_offset;
  int batch_head, row, column;
  uint32_t keep_threshold;
};
constexpr int kTileN = 48;
%s
extern "C" __global__ void keep(const __grid_constant__ Params params) {
  int const lane = thread_index();
  int const row = params.row + lane / 4, column = params.column + lane %% 4 * 2;
  float acc[kTileN / 2];
  for (int i = 0; i < kTileN / 2; ++i) { acc[i] = 1.0f; }
  for (int block = 0; block < kTileN / 16; ++block) {
    drop_block(params, params.batch_head, row, column + 16 * block, *reinterpret_cast<float(*)[8]>(acc + 8 * block));
  }
  for (int i = 0; i < kTileN / 2; ++i) { params.kept[lane * (kTileN / 2) + i] = acc[i] != 0.0f; }
}
"""


@pytest.mark.skipif(compiler_problem() is not None, reason=str(compiler_problem()))
def test_device_code_drops_what_the_mask_says() -> None:
    """templates/pieces/dropout.j2 and philox.cuh on the CPU executor, from an accumulator's place to its element."""
    piece = environment().from_string(
        '//% from "pieces/dropout.j2" import dropout_numbers, drop_block\n${dropout_numbers(0)}\n${drop_block(0)}'
    )
    program = ExecutorKernel.build(Source("keep", "sm_80", "keep", _KERNEL % piece.render(), 1024, 32))
    seed, offset, p, row, column = 0xFEDCBA9876543210, 0x1_0000_0001, 0.4, 32, 96
    memory = GlobalMemory()
    kept = memory.add("kept", np.full(32 * 24 * 4, 0xFF, np.uint8), writable=True)
    head = np.array([kept.address, seed, offset], np.uint64).tobytes()
    launch(program, 1, [head + np.array([5, row, column, keep_threshold(p)], np.int32).tobytes()], memory, seed=0)
    found = kept.data.view(np.int32).reshape(8, 4, 3, 2, 2, 2)  # g, t, pair of 8-column blocks, upper, half, odd
    found = found.transpose(4, 0, 2, 3, 1, 5).reshape(16, 48)
    expected = dropout_mask(seed, offset, p, 2, 3, row + 16, column + 48)[1, 2, row:, column:]
    assert (found == expected).all() and 0 < found.mean() < 1
