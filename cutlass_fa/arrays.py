"""Arrays of the libraries users bring: CuPy and PyTorch, each used only when the caller already has."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import Any, Protocol

from .device import gpu_problem
from .errors import InvalidArgument, MockMode

LEGACY_STREAM = 1  # cudaStreamLegacy, which 0 stands for too: it cannot be captured, and asking costs 0.7 us

# Names that NumPy, CuPy, ml_dtypes and PyTorch give the element types that a kernel may know.
DTYPE_NAMES = {
    "float16": "f16",
    "bfloat16": "bf16",
    "float8_e4m3fn": "e4m3",
    "float8_e5m2": "e5m2",
}


@dataclass(frozen=True)
class ArraySpec:
    """What an array looks like, without its address: shape, strides in elements, dtype ("bf16", or the library's name for what no
    kernel knows), CUDA device index (-1: CPU memory)."""

    shape: tuple[int, ...]
    strides: tuple[int, ...]
    dtype: str
    device: int


class ArrayLibrary(Protocol):
    """What the launcher needs of an array library."""

    name: str

    def signatures(self, arrays: Sequence[Any]) -> tuple[Any, ...]:
        """A cheap hashable that determines `spec(x)` of each array, and which are None. AttributeError where one is another library's."""

    def spec(self, x: Any) -> ArraySpec: ...

    def pointers(self, arrays: Sequence[Any]) -> tuple[int, ...]: ...

    def empty(self, shape: tuple[int, ...], dtype: str, device: int) -> Any: ...

    def retain(self, arrays: Sequence[Any], stream: int) -> None:
        """Arrays that a call on the current stream makes for itself alone: where the stream is being captured in a CUDA graph their memory
        stays the graph's, whose replays use it."""
        ...

    def current_stream(self, device: int) -> int: ...

    def numbers(self, x: Any) -> list[Any]:
        """An array's elements, of two dimensions as a list of rows; waits for the GPU."""
        ...


class CupyArrays:
    """cupy.ndarray."""

    name = "CuPy"

    def __init__(self) -> None:
        import cupy
        import ml_dtypes
        import numpy as np

        self._ndarray = cupy.ndarray
        self._current_stream = cupy.cuda.get_current_stream
        self._is_capturing = cupy.cuda.runtime.streamIsCapturing
        self._of_graphs: list[Any] = []
        self._dtypes = {
            "f16": np.dtype(np.float16),
            "bf16": np.dtype(ml_dtypes.bfloat16),
            "f32": np.dtype(np.float32),
            "i32": np.dtype(np.int32),
        }

    def signatures(self, arrays: Sequence[Any]) -> tuple[Any, ...]:
        return tuple([None if x is None else (x.shape, x.strides, x.dtype, x.data.device_id) for x in arrays])

    def spec(self, x: Any) -> ArraySpec:
        strides = tuple(stride // x.itemsize if stride % x.itemsize == 0 else -1 for stride in x.strides)
        return ArraySpec(tuple(x.shape), strides, DTYPE_NAMES.get(x.dtype.name, x.dtype.name), x.data.device_id)

    def pointers(self, arrays: Sequence[Any]) -> tuple[int, ...]:
        return tuple([x.data.ptr for x in arrays])

    def empty(self, shape: tuple[int, ...], dtype: str, device: int) -> Any:
        return self._ndarray(shape, self._dtypes[dtype])

    def retain(self, arrays: Sequence[Any], stream: int) -> None:
        if stream > LEGACY_STREAM and self._is_capturing(stream):
            self._of_graphs.extend(arrays)  # CuPy's pool knows nothing of graphs, and would give the memory to others

    def current_stream(self, device: int) -> int:
        return self._current_stream().ptr

    def numbers(self, x: Any) -> list[Any]:
        return list(x.get().tolist())


class TorchArrays:
    """torch.Tensor on a CUDA device."""

    name = "PyTorch"

    def __init__(self) -> None:
        import torch

        self._empty = torch.empty
        self._is_grad_enabled = torch.is_grad_enabled
        self._current_stream = torch.cuda.current_stream
        self._dtypes = {"f16": torch.float16, "bf16": torch.bfloat16, "f32": torch.float32, "i32": torch.int32}

    def signatures(self, arrays: Sequence[Any]) -> tuple[Any, ...]:
        if any([x is not None and x.requires_grad for x in arrays]) and self._is_grad_enabled():
            raise InvalidArgument(
                "a tensor requires a gradient, which would be lost: call under torch.no_grad(), or pass x.detach(); "
                "flash_attn_backward computes gradients"
            )
        return tuple([None if x is None else (x.shape, x.stride(), x.dtype, x.get_device()) for x in arrays])

    def spec(self, x: Any) -> ArraySpec:
        name = str(x.dtype).removeprefix("torch.")
        return ArraySpec(tuple(x.shape), tuple(x.stride()), DTYPE_NAMES.get(name, name), x.get_device())

    def pointers(self, arrays: Sequence[Any]) -> tuple[int, ...]:
        return tuple([x.data_ptr() for x in arrays])

    def empty(self, shape: tuple[int, ...], dtype: str, device: int) -> Any:
        return self._empty(shape, dtype=self._dtypes[dtype], device=f"cuda:{device}")

    def retain(self, arrays: Sequence[Any], stream: int) -> None:
        pass  # PyTorch's allocator gives a graph a pool of its own

    def current_stream(self, device: int) -> int:
        return self._current_stream(device).cuda_stream

    def numbers(self, x: Any) -> list[Any]:
        return list(x.tolist())


class NumpyArrays:
    """numpy.ndarray: CPU memory, described so that its shape is checked like any other's, and never launched on."""

    name = "NumPy"

    def signatures(self, arrays: Sequence[Any]) -> tuple[Any, ...]:
        return tuple([None if x is None else (x.shape, x.strides, x.dtype, -1) for x in arrays])

    def spec(self, x: Any) -> ArraySpec:
        strides = tuple(stride // x.itemsize for stride in x.strides)
        return ArraySpec(x.shape, strides, DTYPE_NAMES.get(x.dtype.name, x.dtype.name), -1)

    def pointers(self, arrays: Sequence[Any]) -> tuple[int, ...]:
        raise not_on_gpu(self)

    def empty(self, shape: tuple[int, ...], dtype: str, device: int) -> Any:
        raise not_on_gpu(self)

    def retain(self, arrays: Sequence[Any], stream: int) -> None:
        raise not_on_gpu(self)

    def current_stream(self, device: int) -> int:
        raise not_on_gpu(self)

    def numbers(self, x: Any) -> list[Any]:
        return list(x.tolist())


_ACCEPTED = {
    ("cupy", "ndarray"): CupyArrays,
    ("torch", "Tensor"): TorchArrays,
    ("torch", "Parameter"): TorchArrays,
    ("numpy", "ndarray"): NumpyArrays,
}


_libraries: dict[type, ArrayLibrary] = {}


def library_of(array_type: type) -> ArrayLibrary:
    """The library an array type belongs to. Raises InvalidArgument for a type of no known library."""
    known = _libraries.get(array_type)
    if known is not None:
        return known
    for base in array_type.__mro__:
        library = _ACCEPTED.get((base.__module__.partition(".")[0], base.__name__))
        if library is not None:
            return _libraries.setdefault(array_type, _instance(library))
    raise InvalidArgument(
        f"arrays of type {array_type.__module__}.{array_type.__qualname__}: accepted are cupy.ndarray and torch.Tensor on a CUDA device "
        "(others convert without a copy through cupy.from_dlpack), or numpy.ndarray with backend='reference'"
    )


def dtype_name(dtype: Any) -> str:
    """The name of an element type: of NumPy's (a class or a dtype), CuPy's, ml_dtypes' and PyTorch's, and of a name itself."""
    return dtype if isinstance(dtype, str) else getattr(dtype, "name", getattr(dtype, "__name__", str(dtype))).removeprefix("torch.")


def check_one_library(names: Sequence[str], arrays: Sequence[Any]) -> None:
    """Raises InvalidArgument, naming the argument, where an array is of another library than the first."""
    library = library_of(type(arrays[0]))
    for name, array in zip(names, arrays, strict=True):
        if array is not None and library_of(type(array)) is not library:
            raise InvalidArgument(
                f"{name} is a {library_of(type(array)).name} array and {names[0]} a {library.name} one: bring all from one library"
            )


@lru_cache(maxsize=8)
def _instance(library: type) -> Any:
    return library()


def not_on_gpu(library: ArrayLibrary) -> MockMode | InvalidArgument:
    """The refusal of arrays in CPU memory, which on a machine without a GPU is that machine's refusal."""
    problem = gpu_problem()
    if problem is not None:
        return MockMode(
            f"no kernel can be launched here: {problem}. What works on this machine: backend='reference' computes on NumPy arrays, "
            "`cutlass-fa explain` and `cutlass-fa precompile` generate and compile kernels for any GPU"
        )
    return InvalidArgument(
        f"q, k, v are {library.name} arrays in CPU memory: accepted are cupy.ndarray and torch.Tensor on a CUDA device; copy them with "
        "cupy.asarray or .cuda(), or pass backend='reference' to compute NumPy arrays in float64"
    )
