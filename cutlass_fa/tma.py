"""Tensor maps: the driver's descriptors of a global array and of the box that one TMA copy moves.

Encoding costs the driver some 13 us, so a map is encoded once per (address, shape, strides, box) and kept.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from .arrays import ArraySpec
from .errors import LaunchError

_ELEMENT_BYTES = 2
_MAX_MAPS = 1024  # addresses remembered per geometry: a caller that never reuses memory must not fill the host's


@dataclass(frozen=True)
class TensorMapGeometry:
    """Everything about a map but the address: a (batch, rows, heads, columns) array, strides in elements, and boxes of box_rows x
    box_columns of one head, stored in shared memory with a swizzle as wide as the box (box_columns * 2 bytes)."""

    shape: tuple[int, ...]
    strides: tuple[int, ...]
    dtype: str
    box_rows: int
    box_columns: int

    @classmethod
    def of(cls, spec: ArraySpec, box_rows: int, box_columns: int) -> TensorMapGeometry:
        """The geometry of `spec`. A dimension of extent 1 gets a stride of 16 bytes: its own is never used and may be illegal."""
        legal = 16 // _ELEMENT_BYTES
        strides = tuple(stride if extent > 1 else legal for stride, extent in zip(spec.strides, spec.shape, strict=True))
        return cls(spec.shape, strides, spec.dtype, box_rows, box_columns)


class TensorMaps:
    """The maps of one geometry, by device address. Not thread-safe: its owner (a launch plan) holds a lock."""

    def __init__(self, geometry: TensorMapGeometry) -> None:
        self._geometry = geometry
        self._maps: dict[int, tuple[int, Any]] = {}

    def host_address(self, pointer: int) -> int:
        """Where in host memory the map for the array at device address `pointer` lies, until the next call.

        Raises LaunchError when the driver refuses the geometry."""
        found = self._maps.get(pointer)
        if found is None:
            if len(self._maps) >= _MAX_MAPS:
                self._maps.clear()
            tensor_map = encode(self._geometry, pointer)
            found = self._maps[pointer] = (int(tensor_map.getPtr()), tensor_map)
        return found[0]


def encode(geometry: TensorMapGeometry, pointer: int) -> Any:
    """A CUtensorMap of rank 4, innermost dimension first: (columns, rows, heads, batch); elements outside read as zero."""
    from cuda.bindings import driver

    batch, rows, heads, columns = geometry.shape
    stride_batch, stride_row, stride_head, _ = geometry.strides
    u64, u32 = driver.cuuint64_t, driver.cuuint32_t
    types = driver.CUtensorMapDataType
    swizzles = driver.CUtensorMapSwizzle
    swizzle = {
        128: swizzles.CU_TENSOR_MAP_SWIZZLE_128B,
        64: swizzles.CU_TENSOR_MAP_SWIZZLE_64B,
        32: swizzles.CU_TENSOR_MAP_SWIZZLE_32B,
    }[geometry.box_columns * _ELEMENT_BYTES]
    error, tensor_map = driver.cuTensorMapEncodeTiled(
        {"bf16": types.CU_TENSOR_MAP_DATA_TYPE_BFLOAT16, "f16": types.CU_TENSOR_MAP_DATA_TYPE_FLOAT16}[geometry.dtype],
        4,
        pointer,
        [u64(extent) for extent in (columns, rows, heads, batch)],
        [u64(stride * _ELEMENT_BYTES) for stride in (stride_row, stride_head, stride_batch)],
        [u32(extent) for extent in (geometry.box_columns, geometry.box_rows, 1, 1)],
        [u32(1)] * 4,
        driver.CUtensorMapInterleave.CU_TENSOR_MAP_INTERLEAVE_NONE,
        swizzle,
        driver.CUtensorMapL2promotion.CU_TENSOR_MAP_L2_PROMOTION_L2_256B,
        driver.CUtensorMapFloatOOBfill.CU_TENSOR_MAP_FLOAT_OOB_FILL_NONE,
    )
    if error != driver.CUresult.CUDA_SUCCESS:
        raise LaunchError(f"cuTensorMapEncodeTiled: {error.name} for {geometry} at address {pointer:#x}")
    return tensor_map
