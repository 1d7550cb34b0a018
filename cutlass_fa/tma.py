"""Tensor maps: the driver's descriptors of a global array and of the box that one TMA copy moves.

Encoding costs the driver some 13 us, so a map is encoded once per (address, shape, strides, box) and kept.
"""

from __future__ import annotations

import ctypes
import math
from dataclasses import dataclass

from .arrays import ArraySpec
from .errors import InvalidArgument, LaunchError
from .kv_cache import KEY_GROUP

_MAP_BYTES = 128
ELEMENT_BYTES = {"bf16": 2, "f16": 2, "e4m3": 1, "e5m2": 1}
SEQUENCE_EDGE = 1 << 30  # kSequenceEdge of sequences.cuh
_MAX_MAPS = 1024  # addresses remembered per geometry: a caller that never reuses memory must not fill the host's


@dataclass(frozen=True)
class TensorMapGeometry:
    """Everything about a map but the address, dimensions innermost first as the driver counts them.

    extents, box: elements. strides: elements, of every dimension but the innermost, which is contiguous. The box is stored in shared
    memory with a swizzle as wide as its rows (box[0] * element_bytes), or none where they are 16 bytes.
    """

    extents: tuple[int, ...]
    strides: tuple[int, ...]
    box: tuple[int, ...]
    dtype: str

    @property
    def element_bytes(self) -> int:
        return ELEMENT_BYTES[self.dtype]

    @classmethod
    def of_rows(cls, spec: ArraySpec, rows: int, columns: int) -> TensorMapGeometry:
        """(batch, seqlen, heads, head_dim) in boxes of `rows` rows of one head: dimensions (column, row, head, batch)."""
        batch, seqlen, heads, head_dim = spec.shape
        by_batch, by_row, by_head, _ = spec.strides
        return cls._legal((head_dim, seqlen, heads, batch), (by_row, by_head, by_batch), (columns, rows, 1, 1), spec.dtype)

    @classmethod
    def of_packed_rows(cls, spec: ArraySpec, queries: int, gqa_ratio: int, columns: int) -> TensorMapGeometry:
        """The same array in boxes of `queries` rows of the gqa_ratio heads of a group: dimensions (column, head, row, group, batch)."""
        batch, seqlen, heads, head_dim = spec.shape
        by_batch, by_row, by_head, _ = spec.strides
        extents = (head_dim, gqa_ratio, seqlen, heads // gqa_ratio, batch)
        return cls._legal(extents, (by_head, by_row, by_head * gqa_ratio, by_batch), (columns, gqa_ratio, queries, 1, 1), spec.dtype)

    @classmethod
    def of_sequences(cls, spec: ArraySpec, rows: int, columns: int) -> TensorMapGeometry:
        """Packed sequences (1, total, heads, head_dim) in boxes of `rows` rows of one head, zeros behind the end of any sequence.

        Dimensions (column, row, head, end, wrap): row counts so that a sequence's last row is SEQUENCE_EDGE - 1, the last there is; `end`
        is the row of the array where the sequence ends; `wrap`, always SEQUENCE_EDGE, takes SEQUENCE_EDGE rows off the address, because
        2^30 times its stride of 2^34 bytes less a row is a multiple of 2^64 less as many rows (the trick is Triton's: ragged_tma.py).
        """
        return cls.of_pages(spec, rows, columns)  # of one page, whose unit is a row

    @classmethod
    def of_pages(cls, spec: ArraySpec, rows: int, columns: int) -> TensorMapGeometry:
        """Pages (num_pages, page_size, heads, head_dim) in boxes of `rows` rows of one head, zeros behind a row that a copy names.

        Dimensions as of_sequences has them, but `end` counts units of which a row has row_step and a page page_step (`page_steps`).
        """
        _, _, heads, head_dim = spec.shape
        _, by_row, by_head, _ = spec.strides
        unit = _page_unit(spec)
        extents = (head_dim, SEQUENCE_EDGE, heads, 2 * SEQUENCE_EDGE, 2 * SEQUENCE_EDGE)
        by_row = by_row if spec.shape[1] > 1 else unit
        strides = (by_row, by_head, unit, (1 << 34) // ELEMENT_BYTES[spec.dtype] - by_row)
        return cls._legal(extents, strides, (columns, rows, 1, 1, 1), spec.dtype)

    @classmethod
    def of_key_groups(cls, spec: ArraySpec, keys: int, columns: int) -> TensorMapGeometry:
        """Pages (num_pages, page_size, heads, head_dim) whose tokens are innermost, in boxes of 8 keys of one head, of which all behind the
        first `keys` arrive as zeros: the array seems to end there in each group. Dimensions (key in group, column, group, head, page)."""
        num_pages, page_size, heads, head_dim = spec.shape
        by_page, _, by_head, by_column = spec.strides
        extents = (keys, head_dim, page_size // KEY_GROUP, heads, num_pages)
        return cls._legal(extents, (by_column, KEY_GROUP, by_head, by_page), (KEY_GROUP, columns, 1, 1, 1), spec.dtype)

    @property
    def swizzle_bytes(self) -> int:
        """Of the box in shared memory."""
        row_bytes = self.box[0] * self.element_bytes
        return row_bytes if row_bytes > 16 else 0

    @classmethod
    def _legal(cls, extents: tuple[int, ...], strides: tuple[int, ...], box: tuple[int, ...], dtype: str) -> TensorMapGeometry:
        """A dimension of extent 1 gets a stride of 16 bytes: its own is never used and may be one that the driver refuses."""
        used = zip(strides, extents[1:], strict=True)
        return cls(extents, tuple(stride if extent > 1 else 16 // ELEMENT_BYTES[dtype] for stride, extent in used), box, dtype)


def page_steps(spec: ArraySpec) -> tuple[int, int]:
    """From one page (num_pages, page_size, heads, head_dim) to the next, and from one row to the next, in units of of_pages' `end`.

    Raises InvalidArgument where the map's 31 bits do not reach the last page."""
    num_pages, page_size, _, _ = spec.shape
    by_page, by_row, _, _ = spec.strides
    unit = _page_unit(spec)
    steps = by_page // unit if num_pages > 1 else 0, by_row // unit if page_size > 1 else 1
    if num_pages * steps[0] + page_size * steps[1] >= 2 * SEQUENCE_EDGE:
        raise InvalidArgument(
            f"a cache of shape {spec.shape} and strides {spec.strides} (elements) is too large for one tensor map: "
            "its pages and rows must be multiples of a larger number of elements apart"
        )
    return steps


def _page_unit(spec: ArraySpec) -> int:
    """Elements of which both a page's and a row's stride are multiples."""
    apart = [stride for stride, extent in zip(spec.strides[:2], spec.shape[:2], strict=True) if extent > 1]
    return math.gcd(*apart) or 16 // ELEMENT_BYTES[spec.dtype]


class TensorMaps(dict[tuple[int, ...], tuple[int, ...]]):
    """The maps of a kernel's arrays, of one or several geometries each: device addresses of the arrays -> host addresses of the maps, an
    array's one after the other, encoded where they are first asked for and valid until the next question. Raises LaunchError when the
    driver refuses a geometry.

    A dict, because every launch asks. Not thread-safe: its owner (a launch plan) holds a lock."""

    def __init__(self, *geometries: tuple[TensorMapGeometry, ...]) -> None:
        super().__init__()
        self._geometries = geometries
        self._maps: tuple[dict[int, ctypes.Array[ctypes.c_char]], ...] = tuple({} for _ in geometries)

    def __missing__(self, pointers: tuple[int, ...]) -> tuple[int, ...]:
        if len(self) >= _MAX_MAPS:
            self.clear()
            for maps in self._maps:
                maps.clear()
        for geometries, maps, pointer in zip(self._geometries, self._maps, pointers, strict=True):
            if pointer not in maps:
                encoded = b"".join(encode(geometry, pointer) for geometry in geometries)
                maps[pointer] = ctypes.create_string_buffer(encoded, len(encoded))
        found = tuple(ctypes.addressof(maps[pointer]) for maps, pointer in zip(self._maps, pointers, strict=True))
        self[pointers] = found
        return found


def encode(geometry: TensorMapGeometry, pointer: int) -> bytes:
    """The 128 bytes of a CUtensorMap; elements outside the array read as zero."""
    from cuda.bindings import driver

    u64, u32 = driver.cuuint64_t, driver.cuuint32_t
    types = driver.CUtensorMapDataType
    swizzles = driver.CUtensorMapSwizzle
    swizzle = {
        128: swizzles.CU_TENSOR_MAP_SWIZZLE_128B,
        64: swizzles.CU_TENSOR_MAP_SWIZZLE_64B,
        32: swizzles.CU_TENSOR_MAP_SWIZZLE_32B,
        0: swizzles.CU_TENSOR_MAP_SWIZZLE_NONE,
    }[geometry.swizzle_bytes]
    error, tensor_map = driver.cuTensorMapEncodeTiled(
        {"bf16": types.CU_TENSOR_MAP_DATA_TYPE_BFLOAT16, "f16": types.CU_TENSOR_MAP_DATA_TYPE_FLOAT16}.get(
            geometry.dtype, types.CU_TENSOR_MAP_DATA_TYPE_UINT8
        ),
        len(geometry.extents),
        pointer,
        [u64(extent) for extent in geometry.extents],
        [u64(stride * geometry.element_bytes) for stride in geometry.strides],
        [u32(extent) for extent in geometry.box],
        [u32(1)] * len(geometry.box),
        driver.CUtensorMapInterleave.CU_TENSOR_MAP_INTERLEAVE_NONE,
        swizzle,
        driver.CUtensorMapL2promotion.CU_TENSOR_MAP_L2_PROMOTION_L2_256B,
        driver.CUtensorMapFloatOOBfill.CU_TENSOR_MAP_FLOAT_OOB_FILL_NONE,
    )
    if error != driver.CUresult.CUDA_SUCCESS:
        raise LaunchError(f"cuTensorMapEncodeTiled: {error.name} for {geometry} at address {pointer:#x}")
    return ctypes.string_at(int(tensor_map.getPtr()), _MAP_BYTES)
