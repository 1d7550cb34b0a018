"""What a kernel writes on the CPU executor: poisoned before, held to have been written whole and nowhere else after."""

from __future__ import annotations

import ctypes
from dataclasses import dataclass

import numpy as np

from ..arrays import ArraySpec
from .faults import ExecutorFault
from .launch import Buffer, GlobalMemory

FRAME_BYTE = 0xC3  # what lies around a strided output
POISON_BYTE = 0xFF  # NaN: what an output holds before the kernel writes it


def check_written(run: str, what: str, bits: np.ndarray) -> None:
    """Raises ExecutorFault where an element still holds POISON_BYTE throughout: a NaN, and not the one that kernels write."""
    untouched = bits == np.iinfo(bits.dtype).max
    if untouched.any():
        first = tuple(int(i) for i in np.argwhere(untouched)[0])
        raise ExecutorFault(
            "fault", f"{run}: fault: {int(untouched.sum())} of {bits.size} elements of {what} were never written, first {first}"
        )


@dataclass(frozen=True)
class Output:
    """The bytes that a strided output of 16 or 32 bits an element spans: NaN where its elements lie, FRAME_BYTE between them."""

    buffer: Buffer
    spec: ArraySpec

    @classmethod
    def add(cls, memory: GlobalMemory, spec: ArraySpec, name: str = "out") -> Output:
        data = np.full(_span_elements(spec) * _bits(spec).itemsize, FRAME_BYTE, np.uint8)
        _elements(data, spec)[...] = _repeated(POISON_BYTE, spec)
        return cls(memory.add(name, data, writable=True), spec)

    def values(self, run: str) -> np.ndarray:
        """The elements' bits as a contiguous array. Raises ExecutorFault where bytes between them changed."""
        frame = self.buffer.data.copy()
        values = _elements(frame, self.spec).copy()
        _elements(frame, self.spec)[...] = _repeated(FRAME_BYTE, self.spec)
        if (frame != FRAME_BYTE).any():
            raise ExecutorFault(
                "fault", f"{run}: fault: {self.buffer.name} was written between its elements, at byte {int((frame != FRAME_BYTE).argmax())}"
            )
        return values


def _span_elements(spec: ArraySpec) -> int:
    return 1 + sum((extent - 1) * stride for extent, stride in zip(spec.shape, spec.strides, strict=True))


def _bits(spec: ArraySpec) -> np.dtype:
    """The integers that hold the bits of an element."""
    return np.dtype(np.uint32 if spec.dtype == "float32" else np.uint16)


def _repeated(byte: int, spec: ArraySpec) -> int:
    """An element whose every byte is `byte`."""
    return int.from_bytes(bytes([byte]) * _bits(spec).itemsize, "little")


def _elements(data: np.ndarray, spec: ArraySpec) -> np.ndarray:
    bits = _bits(spec)
    return np.lib.stride_tricks.as_strided(data.view(bits), spec.shape, [bits.itemsize * stride for stride in spec.strides])


def span(array: np.ndarray) -> np.ndarray:
    """The bytes from an array's first element to its last, those between its rows included."""
    size = array.itemsize + sum((extent - 1) * stride for extent, stride in zip(array.shape, array.strides, strict=True))
    return np.frombuffer(ctypes.string_at(array.ctypes.data, size), np.uint8)
