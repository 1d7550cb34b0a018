"""Launch: a Problem and its Kernel become a LaunchPlan, which turns addresses into one kernel launch.

Everything that depends on shapes only is computed when the plan is made; a run writes five addresses and calls the driver.
"""

from __future__ import annotations

import math
import threading
from functools import lru_cache
from typing import Any

import numpy as np

from .arrays import ArraySpec
from .cell import Cell
from .device import DeviceInfo, device_info
from .errors import InvalidArgument, LaunchError
from .kernels import Kernel
from .params import params_dtype
from .problem import Problem
from .requests import Persistent, PersistentMode
from .tile_counters import tile_counters
from .tma import TensorMapGeometry, TensorMaps

MAX_TILES = 2**31 - 1


class LaunchPlan:
    """One kernel on one shape and device, ready to run on any arrays of that shape."""

    def __init__(self, problem: Problem, kernel: Kernel) -> None:
        from cupy_backends.cuda.api import driver

        device = problem.q.device
        cell = kernel.cell
        self.kernel = kernel
        self.problem = problem
        self._function = _function_on(kernel, device)
        self._launch_kernel = driver.launchKernel
        self._maps_q, self._maps_k, self._maps_v = map(TensorMaps, map_geometries(problem, cell))
        self._params = pack_params(problem, cell, device_info(device))
        # The first words of Params: o, lse, and tile_counter where there is one. Items of a memoryview are cheaper to set than NumPy's.
        self._pointers = _words(self._params)
        self._counters = tile_counters(device) if cell.has_dynamic_scheduler else None
        arguments = np.zeros(4, np.uint64)  # host addresses: maps of q, k, v, and params
        arguments[3] = self._params.ctypes.data
        self._arguments_address = arguments.ctypes.data
        self._arguments = _words(arguments)
        mode = problem.request.persistent or Persistent()
        self._grid = grid_size(mode, int(self._params["num_tiles"][0]), device_info(device))
        self._threads = cell.threads
        self._smem_bytes = cell.smem_bytes
        self._lock = threading.Lock()  # between writing the arguments and the driver's copy of them

    def run(self, qkvo: tuple[int, int, int, int], lse: int, stream: int) -> None:
        """Launch on the device addresses of q, k, v, out and lse (0: not written) and a CUstream. Asynchronous; may be captured in a
        CUDA graph.

        The caller's current device must be the plan's. Raises LaunchError or the driver's error."""
        q, k, v, out = qkvo
        arguments, pointers = self._arguments, self._pointers
        with self._lock:
            arguments[0] = self._maps_q.host_address(q)
            arguments[1] = self._maps_k.host_address(k)
            arguments[2] = self._maps_v.host_address(v)
            pointers[0] = out
            pointers[1] = lse
            if self._counters is not None:
                pointers[2] = self._counters.take(stream)
            self._launch_kernel(self._function, self._grid, 1, 1, self._threads, 1, 1, self._smem_bytes, stream, self._arguments_address, 0)


def map_geometries(problem: Problem, cell: Cell) -> tuple[TensorMapGeometry, TensorMapGeometry, TensorMapGeometry]:
    """What the tensor maps of q, k and v describe."""
    if cell.is_packed:
        q = TensorMapGeometry.of_packed_rows(problem.q, cell.queries_per_tile, cell.gqa_ratio, cell.chunk_columns)
    else:
        q = TensorMapGeometry.of_rows(problem.q, cell.tile_m, cell.chunk_columns)
    k, v = (TensorMapGeometry.of_rows(spec, cell.tile_n, cell.chunk_columns) for spec in (problem.k, problem.v))
    return q, k, v


def pack_params(problem: Problem, cell: Cell, device: DeviceInfo) -> np.ndarray:
    """The Params struct as a structured array of one element, addresses left 0."""
    request = problem.request
    work_heads = request.num_heads_q // cell.gqa_ratio
    num_m_blocks = -(-request.seqlen_q // cell.queries_per_tile)
    num_tiles = num_m_blocks * work_heads * request.batch
    if num_tiles > MAX_TILES:
        raise InvalidArgument(
            f"{num_m_blocks} query blocks * {work_heads} heads * batch {request.batch} = {num_tiles} tiles: at most {MAX_TILES}; "
            "split the batch"
        )
    values = {
        "o": 0,
        "lse": 0,
        "tile_counter": 0,
        "o_stride_batch": problem.out.strides[0],
        "o_stride_row": problem.out.strides[1],
        "o_stride_head": problem.out.strides[2],
        "batch": request.batch,
        "seqlen_q": request.seqlen_q,
        "seqlen_k": request.seqlen_k,
        "num_heads_q": request.num_heads_q,
        "num_heads_kv": request.num_heads_kv,
        "heads_per_kv_head": request.num_heads_q // request.num_heads_kv,
        "head_dim": request.head_dim,
        "num_m_blocks": num_m_blocks,
        "num_tiles": num_tiles,
        "softmax_scale_log2": request.scale * math.log2(math.e),
        "heads_per_section": heads_per_section(problem.k, work_heads, device),
    }
    packed = np.zeros(1, params_dtype(cell.params))
    for field in cell.params:
        packed[field.name] = values[field.name]
    return packed


def heads_per_section(k: ArraySpec, work_heads: int, device: DeviceInfo) -> int:
    """How many (batch, head) pairs of the work list fit K and V into two thirds of the L2 cache; whole groups of a key head if one fits."""
    batch, seqlen_k, num_heads_kv, head_dim = k.shape
    group = work_heads // num_heads_kv
    kv_bytes = 2 * seqlen_k * head_dim * 2
    return min(batch * work_heads, max(1, device.l2_bytes * 2 // 3 // kv_bytes) * group)


def grid_size(mode: PersistentMode, num_tiles: int, device: DeviceInfo) -> int:
    """CTAs of a launch: one per tile, or as many as the persistent mode allows."""
    return min(num_tiles, mode.num_sms or device.num_sms) if mode.persistent else num_tiles


def _words(array: np.ndarray) -> memoryview:
    """The array's bytes as 64-bit words, through which they can be set."""
    return array.view(np.uint8).data.cast("Q")


@lru_cache(maxsize=4096)
def _function_on(kernel: Kernel, device: int) -> int:
    """The CUfunction of `kernel` on `device` (the caller's current device), its shared memory allowed. The module is never unloaded."""
    import cupy
    from cuda.bindings import driver

    module = cupy.cuda.function.Module()
    module.load(kernel.cubin.image)
    function = module.get_function(kernel.source.entry)
    _loaded_modules.append(module)
    attribute = driver.CUfunction_attribute.CU_FUNC_ATTRIBUTE_MAX_DYNAMIC_SHARED_SIZE_BYTES
    (error,) = driver.cuFuncSetAttribute(driver.CUfunction(function.ptr), attribute, kernel.cell.smem_bytes)
    if error != driver.CUresult.CUDA_SUCCESS:
        raise LaunchError(f"{kernel.key}: {error.name} when asking for {kernel.cell.smem_bytes} bytes of shared memory")
    return int(function.ptr)


_loaded_modules: list[Any] = []
