"""Tensor maps: the driver's descriptors of a global array and of the box that one TMA copy moves.

Encoding costs the driver some 13 us, so a map is encoded once per (address, shape, strides, box) and kept.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from .arrays import ArraySpec
from .errors import LaunchError

ELEMENT_BYTES = {"bf16": 2, "f16": 2, "e4m3": 1, "e5m2": 1}
SEQUENCE_EDGE = 1 << 30  # kSequenceEdge of the kernels
_MAX_MAPS = 1024  # addresses remembered per geometry: a caller that never reuses memory must not fill the host's


@dataclass(frozen=True)
class TensorMapGeometry:
    """Everything about a map but the address, dimensions innermost first as the driver counts them.

    extents, box: elements. strides: elements, of every dimension but the innermost, which is contiguous. The box is stored in shared
    memory with a swizzle as wide as its rows (box[0] * element_bytes).
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
        _, total, heads, head_dim = spec.shape
        _, by_row, by_head, _ = spec.strides
        element_bytes = ELEMENT_BYTES[spec.dtype]
        by_row = by_row if total > 1 else 16 // element_bytes
        extents = (head_dim, SEQUENCE_EDGE, heads, 2 * SEQUENCE_EDGE, 2 * SEQUENCE_EDGE)
        strides = (by_row, by_head, by_row, (1 << 34) // element_bytes - by_row)
        return cls._legal(extents, strides, (columns, rows, 1, 1, 1), spec.dtype)

    @classmethod
    def _legal(cls, extents: tuple[int, ...], strides: tuple[int, ...], box: tuple[int, ...], dtype: str) -> TensorMapGeometry:
        """A dimension of extent 1 gets a stride of 16 bytes: its own is never used and may be one that the driver refuses."""
        used = zip(strides, extents[1:], strict=True)
        return cls(extents, tuple(stride if extent > 1 else 16 // ELEMENT_BYTES[dtype] for stride, extent in used), box, dtype)


class TensorMaps:
    """The maps of a kernel's arrays, each of one geometry, by device address. Not thread-safe: its owner (a launch plan) holds a lock."""

    def __init__(self, *geometries: TensorMapGeometry) -> None:
        self._geometries = geometries
        self._maps: tuple[dict[int, Any], ...] = tuple({} for _ in geometries)
        self._host_addresses: dict[tuple[int, ...], tuple[int, ...]] = {}

    def host_addresses(self, pointers: tuple[int, ...]) -> tuple[int, ...]:
        """Where in host memory the maps for arrays at these device addresses lie, until the next call.

        Raises LaunchError when the driver refuses a geometry."""
        return self._host_addresses.get(pointers) or self._encoded(pointers)

    def _encoded(self, pointers: tuple[int, ...]) -> tuple[int, ...]:
        if len(self._host_addresses) >= _MAX_MAPS:
            self._host_addresses.clear()
            for maps in self._maps:
                maps.clear()
        for geometry, maps, pointer in zip(self._geometries, self._maps, pointers, strict=True):
            if pointer not in maps:
                maps[pointer] = encode(geometry, pointer)
        found = tuple(int(maps[pointer].getPtr()) for maps, pointer in zip(self._maps, pointers, strict=True))
        self._host_addresses[pointers] = found
        return found


def encode(geometry: TensorMapGeometry, pointer: int) -> Any:
    """A CUtensorMap; elements outside the array read as zero."""
    from cuda.bindings import driver

    u64, u32 = driver.cuuint64_t, driver.cuuint32_t
    types = driver.CUtensorMapDataType
    swizzles = driver.CUtensorMapSwizzle
    swizzle = {
        128: swizzles.CU_TENSOR_MAP_SWIZZLE_128B,
        64: swizzles.CU_TENSOR_MAP_SWIZZLE_64B,
        32: swizzles.CU_TENSOR_MAP_SWIZZLE_32B,
    }[geometry.box[0] * geometry.element_bytes]
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
    return tensor_map
