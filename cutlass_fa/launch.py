"""Launch: what the launches of all kernels share. A plan of launches/ packs a kernel's arguments once per shape, and each run writes what
has changed (addresses, host addresses of tensor maps, a random state) and calls the driver.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import replace
from functools import lru_cache, partial
from typing import Any, Protocol

import numpy as np

from .arrays import ArraySpec
from .cell import Cell
from .device import DeviceInfo
from .errors import InvalidArgument, LaunchError
from .kernels import Kernel
from .params import params_dtype
from .problem import Problem
from .request_parts import PersistentMode
from .requests import AttentionRequest
from .tma import ELEMENT_BYTES

MAX_TILES = 2**31 - 1


class ForwardPlan(Protocol):
    """One forward kernel on one shape and device, ready to run on any arrays of that shape."""

    problem: Problem
    kernel: Kernel

    extra_words: dict[int, int]  # of the extra arrays that a run is given: extras.extra_words
    workspace_floats: int  # float32 that a run needs besides, contents of no matter

    def run(
        self,
        qkv: tuple[int, ...],
        out: int,
        lse: int,
        stream: int,
        random_state: tuple[int, int] = (0, 0),
        extras: Sequence[int] = (),
        workspace: int = 0,
    ) -> None:
        """Launch on the device addresses of q, k and v, of out, and of lse (0: not written), on a CUstream. Asynchronous; may be captured
        in a CUDA graph. random_state: seed and offset of dropout, each a 64-bit number, not looked at by a kernel without; extras: device
        addresses in the order of extra_words; workspace: the address of workspace_floats numbers.

        The caller's current device must be the plan's. Raises LaunchError or the driver's error."""


class KernelLaunch:
    """One kernel on one device with its packed arguments.

    arguments: the kernel's arguments as 64-bit words, each a host address: num_maps tensor maps, which a run writes, and Params.
    params: the words of Params, whose first are the device addresses that a run writes. Items of a memoryview are cheaper to set than
    NumPy's. go(stream, address, 0) launches; a plan holds its lock between writing the words and the driver's copy of them.
    """

    def __init__(self, kernel: Kernel, device: int, params: np.ndarray, grid: int, num_maps: int = 0) -> None:
        from cupy_backends.cuda.api import driver

        words = np.zeros(num_maps + 1, np.uint64)
        words[num_maps] = params.ctypes.data
        self.address = words.ctypes.data
        self.arguments = _words(words)
        self.params = _words(params)
        function = _function_on(kernel, device)
        cell = kernel.cell
        self.go = partial(driver.launchKernel, function, grid, 1, 1, cell.threads, 1, 1, cell.smem_bytes)


def pack(cell: Cell, values: Mapping[str, Any]) -> np.ndarray:
    """The Params struct of `cell` as a structured array of one element. values: of every field that is no address; addresses are left 0."""
    packed = np.zeros(1, params_dtype(cell.params))
    for field in cell.params:
        if not field.is_address:
            packed[field.name] = values[field.name]
    return packed


def softmax_scales(request: AttentionRequest) -> dict[str, float]:
    """What turns products q k^T into exponents of 2. With a softcap: the tanh's argument, and the factor of its result."""
    if request.softcap > 0:
        return {"softcap_prescale": request.score_scale / request.softcap, "softmax_scale_log2": request.softcap * math.log2(math.e)}
    return {"softmax_scale_log2": request.score_scale * math.log2(math.e)}


def window_values(request: AttentionRequest) -> dict[str, int]:
    """Where queries stand among the keys, sink tokens among the keys, and a window's bounds: unbounded is a distance that no key exceeds,
    and none is larger, so that positions stay 32-bit."""
    left, right = request.mask.window
    farthest_left = max(request.rows_q + request.position_shift, 0)  # of the last query's position to the first key
    farthest_right = max(request.rows_k - request.position_shift, 0)
    return {
        "window_left": farthest_left if left == -1 else min(left, farthest_left),
        "window_right": farthest_right if right == -1 else min(right, farthest_right),
        "sink_tokens": min(max(request.sink_tokens - (request.k_offset or 0), 0), request.rows_k),
        "position_shift": request.position_shift,
    }


def alibi_values(request: AttentionRequest, slopes: ArraySpec | None) -> dict[str, float]:
    """Where a sequence's slopes lie, and what makes them slopes of scores before the softmax's scale."""
    own = slopes is not None and len(slopes.shape) == 2 and slopes.shape[0] > 1
    scale = math.log2(math.e) / softmax_scales(request)["softmax_scale_log2"]
    return {"alibi_stride_batch": slopes.strides[0] if slopes is not None and own else 0, "alibi_scale": scale}


def tile_count(num_m_blocks: int, heads: int, batch: int) -> int:
    """CTAs' pieces of work. Raises InvalidArgument where a 32-bit number does not count them."""
    num_tiles = num_m_blocks * heads * batch
    if num_tiles > MAX_TILES:
        raise InvalidArgument(
            f"{num_m_blocks} query blocks * {heads} heads * batch {batch} = {num_tiles} tiles: at most {MAX_TILES}; split the batch"
        )
    return num_tiles


def heads_per_section(k: ArraySpec, work_heads: int, device: DeviceInfo) -> int:
    """How many (batch, head) pairs of the work list fit K and V into two thirds of the L2 cache; whole groups of a key head if one fits."""
    batch, seqlen_k, num_heads_kv, head_dim = k.shape
    group = work_heads // num_heads_kv
    kv_bytes = 2 * seqlen_k * head_dim * ELEMENT_BYTES[k.dtype]
    return min(batch * work_heads, max(1, device.l2_bytes * 2 // 3 // kv_bytes) * group)


def keys_in_memory(problem: Problem) -> ArraySpec:
    """k as heads_per_section takes it: of a KV cache all keys as one sequence, since nobody knows here how many are in use; under a window
    those that the tiles at work on a head see."""
    request, (batch, seqlen_k, num_heads_kv, head_dim) = problem.request, problem.k.shape
    if request.kv_cache is not None:
        batch, seqlen_k = 1, min(batch * seqlen_k, request.rows_k)
    left, right = request.mask.window
    if left >= 0 and (right >= 0 or request.mask.causal):
        seqlen_k = min(seqlen_k, left + max(right, 0) + 1 + _QUERIES_AT_WORK)
    return replace(problem.k, shape=(batch, seqlen_k, num_heads_kv, head_dim))


# Of a head under a window, about: a multiprocessor's tile each, and few heads at work. More heads at once also read their sink tokens less
# often at the same time.
_QUERIES_AT_WORK = 1024


def page_values(problem: Problem) -> dict[str, int]:
    """What the pages of a KV cache are, where k and v are one."""
    cache, table = problem.request.kv_cache, problem.extras.block_table
    if cache is None:
        return {}
    stride = 0 if table is None else table.strides[0]
    return {"block_table_stride": stride, "num_pages": cache.num_blocks, "page_size": cache.block_size}


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
