"""Tensor maps for the executor: the fields of executor/include/cutlass_fa_executor/door.hpp, in the driver's 128 bytes."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from ..tma import TensorMapGeometry
from .faults import ExecutorError

_MAGIC = 0x50414D54
_FIELDS = np.dtype(
    [
        ("magic", "u4"),
        ("rank", "u2"),
        ("element_bytes", "u2"),
        ("base", "u8"),
        ("strides", "u8", 4),
        ("extents", "u4", 5),
        ("box", "u2", 5),
        ("swizzle_bytes", "u2"),
    ]
)
_MAP_BYTES = 128
_MAX_BOX = 256


def encode(geometry: TensorMapGeometry, address: int) -> bytes:
    """What cutlass_fa.tma.encode asks of the driver. Raises ExecutorError where the driver would refuse."""
    return encode_tiled(
        address,
        geometry.element_bytes,
        extents=geometry.extents,
        strides=[stride * geometry.element_bytes for stride in geometry.strides],
        box=geometry.box,
        swizzle_bytes=geometry.swizzle_bytes,
    )


def encode_tiled(
    address: int, element_bytes: int, *, extents: Sequence[int], strides: Sequence[int], box: Sequence[int], swizzle_bytes: int
) -> bytes:
    """cuTensorMapEncodeTiled with element strides of 1, no interleave, zero fill. strides: bytes, of dimensions 1 and up.

    Raises ExecutorError where the driver would refuse (CUDA driver API, cuTensorMapEncodeTiled).
    """
    rank = len(extents)
    refusals = [
        (not 1 <= rank <= 5 or len(box) != rank or len(strides) != rank - 1, f"rank {rank}, box {box}, strides {strides}"),
        (address % 16 != 0, f"address {address:#x} is not a multiple of 16"),
        (any(stride % 16 or not 0 <= stride < 1 << 40 for stride in strides), f"strides {strides}: multiples of 16 below 2^40"),
        (any(not 1 <= extent <= 1 << 32 for extent in extents), f"extents {extents}"),
        (any(not 1 <= width <= _MAX_BOX for width in box), f"box {box}: each side 1 to {_MAX_BOX}"),
        (box[0] * element_bytes % 16 != 0, f"box of {box[0]} x {element_bytes} bytes: a multiple of 16 bytes"),
        (swizzle_bytes not in (0, 32, 64, 128), f"swizzle of {swizzle_bytes} bytes"),
        (
            swizzle_bytes != 0 and box[0] * element_bytes > swizzle_bytes,
            f"box of {box[0]} x {element_bytes} bytes, swizzle {swizzle_bytes}",
        ),
    ]
    for refused, reason in refusals:
        if refused:
            raise ExecutorError(f"cuTensorMapEncodeTiled would refuse: {reason}")
    fields = np.zeros(1, _FIELDS)
    row = fields[0]
    row["magic"], row["rank"], row["element_bytes"], row["base"], row["swizzle_bytes"] = _MAGIC, rank, element_bytes, address, swizzle_bytes
    row["strides"][: rank - 1], row["extents"][:rank], row["box"][:rank] = strides, extents, box
    return fields.tobytes().ljust(_MAP_BYTES, b"\0")
