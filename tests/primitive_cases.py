"""One small kernel on given arrays: on the CPU executor, on a GPU through CuPy, or as machine code only."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol

import numpy as np

from cutlass_fa.compile import Cubin, compile_source
from cutlass_fa.disassembly import disassemble
from cutlass_fa.executor import GlobalMemory, Program
from cutlass_fa.executor.tensor_map import encode_tiled
from tests.executor_kernels import SmallKernel, run

Arrays = dict[str, np.ndarray]


class Memory(Protocol):
    """Where the arrays of a case lie, and tensor maps of them."""

    def address(self, name: str) -> int: ...

    def tensor_map(self, name: str, box: Sequence[int], swizzle_bytes: int = 0) -> bytes: ...


@dataclass(frozen=True)
class Case:
    """arrays: by name, inputs and outputs; `outputs` are the names of those that the kernel writes. arguments: the bytes of each."""

    kernel: SmallKernel
    arrays: Mapping[str, np.ndarray]
    outputs: tuple[str, ...]
    arguments: Callable[[Memory], list[bytes]]
    constants: Mapping[str, object] = field(default_factory=dict)

    def build(self) -> Program:
        return self.kernel.build(**self.constants)

    def on_executor(self, seed: int = 0, program: Program | None = None) -> Arrays:
        """What the outputs hold afterwards. Raises ExecutorFault."""
        memory = GlobalMemory()
        buffers = {name: memory.add(name, array, writable=name in self.outputs) for name, array in self.arrays.items()}
        arguments = self.arguments(_HostMemory(self.arrays, {name: buffer.address for name, buffer in buffers.items()}))
        run(program or self.build(), memory, arguments, grid=self.kernel.grid, seed=seed)
        return {name: buffers[name].data.view(self.arrays[name].dtype).reshape(self.arrays[name].shape) for name in self.outputs}

    def on_gpu(self) -> Arrays:
        """The same on the current device."""
        import cupy

        major, minor = divmod(int(cupy.cuda.Device().compute_capability), 10)
        cubin = self.cubin(f"sm_{major}{minor}" + ("a" if major >= 9 else ""))
        on_device = {name: cupy.asarray(np.ascontiguousarray(array).view(np.uint8)) for name, array in self.arrays.items()}
        memory = _DeviceMemory(self.arrays, {name: int(array.data.ptr) for name, array in on_device.items()})
        _launch(cubin, self.kernel, self.arguments(memory))
        return {name: on_device[name].get().view(self.arrays[name].dtype).reshape(self.arrays[name].shape) for name in self.outputs}

    def cubin(self, arch: str) -> Cubin:
        source = self.kernel.source(arch, self.constants)
        return compile_source(source, f"{self.kernel.name}.cu")

    def machine_code(self, arch: str) -> str:
        return disassemble(self.cubin(arch).image)


def _strides(array: np.ndarray) -> list[int]:
    """Bytes from one element to the next, innermost dimension first, that one left out."""
    return [array.itemsize * int(np.prod(array.shape[-depth:])) for depth in range(1, array.ndim)]


@dataclass(frozen=True)
class _HostMemory:
    arrays: Mapping[str, np.ndarray]
    addresses: Mapping[str, int]

    def address(self, name: str) -> int:
        return self.addresses[name]

    def tensor_map(self, name: str, box: Sequence[int], swizzle_bytes: int = 0) -> bytes:
        array = self.arrays[name]
        return encode_tiled(
            self.addresses[name],
            array.itemsize,
            extents=array.shape[::-1],
            strides=_strides(array),
            box=box,
            swizzle_bytes=swizzle_bytes,
        )


@dataclass(frozen=True)
class _DeviceMemory:
    arrays: Mapping[str, np.ndarray]
    addresses: Mapping[str, int]

    def address(self, name: str) -> int:
        return self.addresses[name]

    def tensor_map(self, name: str, box: Sequence[int], swizzle_bytes: int = 0) -> bytes:
        """cutlass_fa.tma.encode knows 16-bit elements and swizzled rows only; kernels of one primitive need others."""
        import ctypes

        from cuda.bindings import driver

        array = self.arrays[name]
        types, swizzles = driver.CUtensorMapDataType, driver.CUtensorMapSwizzle
        dtype = {1: types.CU_TENSOR_MAP_DATA_TYPE_UINT8, 2: types.CU_TENSOR_MAP_DATA_TYPE_UINT16, 4: types.CU_TENSOR_MAP_DATA_TYPE_FLOAT32}
        swizzle = "NONE" if swizzle_bytes == 0 else f"{swizzle_bytes}B"
        error, tensor_map = driver.cuTensorMapEncodeTiled(
            dtype[array.itemsize],
            array.ndim,
            self.addresses[name],
            [driver.cuuint64_t(extent) for extent in array.shape[::-1]],
            [driver.cuuint64_t(stride) for stride in _strides(array)],
            [driver.cuuint32_t(extent) for extent in box],
            [driver.cuuint32_t(1)] * array.ndim,
            driver.CUtensorMapInterleave.CU_TENSOR_MAP_INTERLEAVE_NONE,
            getattr(swizzles, f"CU_TENSOR_MAP_SWIZZLE_{swizzle}"),
            driver.CUtensorMapL2promotion.CU_TENSOR_MAP_L2_PROMOTION_NONE,
            driver.CUtensorMapFloatOOBfill.CU_TENSOR_MAP_FLOAT_OOB_FILL_NONE,
        )
        assert error == driver.CUresult.CUDA_SUCCESS, error
        return ctypes.string_at(int(tensor_map.getPtr()), 128)


def _launch(cubin: Cubin, kernel: SmallKernel, arguments: list[bytes]) -> None:
    """As cutlass_fa/launch.py launches; the arguments' bytes lie in host memory until the driver has copied them."""
    import cupy
    from cuda.bindings import driver as bindings
    from cupy_backends.cuda.api import driver

    module: Any = cupy.cuda.function.Module()
    module.load(cubin.image)
    function = module.get_function(kernel.name)
    attribute = bindings.CUfunction_attribute.CU_FUNC_ATTRIBUTE_MAX_DYNAMIC_SHARED_SIZE_BYTES
    (error,) = bindings.cuFuncSetAttribute(bindings.CUfunction(function.ptr), attribute, kernel.smem_bytes)
    assert error == bindings.CUresult.CUDA_SUCCESS, error
    holders = [np.frombuffer(argument, np.uint8).copy() for argument in arguments]
    pointers = np.array([holder.ctypes.data for holder in holders], np.uint64)
    driver.launchKernel(function.ptr, kernel.grid, 1, 1, kernel.threads, 1, 1, kernel.smem_bytes, 0, pointers.ctypes.data, 0)
    cupy.cuda.Device().synchronize()
