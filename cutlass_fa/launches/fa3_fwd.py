"""The launch of the fa3 forward: tensor maps of q, k and v, then Params."""

from __future__ import annotations

import threading
from collections.abc import Sequence
from typing import Any

import numpy as np

from ..arrays import ArraySpec
from ..cells.fa3_fwd import Fa3FwdCell
from ..device import DeviceInfo, device_info
from ..extras import extra_words
from ..kernels import Kernel
from ..kv_cache import KEY_GROUP
from ..launch import (
    KernelLaunch,
    alibi_values,
    grid_size,
    heads_per_section,
    keys_in_memory,
    pack,
    page_values,
    softmax_scales,
    tile_count,
    window_values,
)
from ..problem import Problem
from ..request_parts import Persistent
from ..requests import Fa3FwdRequest
from ..requests_fp8 import Fa3FwdFp8Request
from ..tile_counters import tile_counters
from ..tma import TensorMapGeometry, TensorMaps, page_steps
from .sequence_tiles import SequenceTilesLaunch, capacity
from .split import PartsWorkspace, num_splits_of, split_grid


class Fa3FwdPlan:
    """A forward by the Hopper kernel; see ForwardPlan."""

    def __init__(self, problem: Problem, kernel: Kernel, tiles_kernel: Kernel | None = None) -> None:
        cell = kernel.cell
        assert isinstance(cell, Fa3FwdCell)
        device = problem.q.device
        self.problem = problem
        self.kernel = kernel
        self._maps = TensorMaps(*map_geometries(problem, cell))
        grid = grid_of(problem, cell, device_info(device))
        launch = KernelLaunch(kernel, device, pack_params(problem, cell, device_info(device)), grid, num_maps=3)
        # The first words of Params: o, lse, and where there are any tile_counter, or part_counters, part_o and part_rows, and extra arrays.
        self._pointers, self._arguments = launch.params, launch.arguments
        self._go, self._address = launch.go, launch.address
        self.extra_words = extra_words(cell.params, problem.extras)
        self._tiles = None if tiles_kernel is None else SequenceTilesLaunch(problem, tiles_kernel, cell, cell.queries_per_tile)
        self._parts = PartsWorkspace.of(problem, cell, grid) if cell.is_split else None
        self.workspace_floats = 0 if self._tiles is None else self._tiles.list_floats
        if self._parts is not None:
            self.workspace_floats = self._parts.floats
        self._counters = tile_counters(device) if cell.has_queue else None
        self._num_counters = grid if cell.is_split else 1
        self._lock = threading.Lock()

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
        """See ForwardPlan. The kernel has no dropout."""
        arguments, pointers = self._arguments, self._pointers
        with self._lock:
            arguments[0], arguments[1], arguments[2] = self._maps[qkv]
            pointers[0] = out
            pointers[1] = lse
            if self._counters is not None:
                pointers[2] = self._counters.take(stream, self._num_counters)
            if self._parts is not None:
                pointers[3], pointers[4] = workspace, workspace + self._parts.part_rows_bytes
            if extras:
                for word, address in zip(self.extra_words.values(), extras, strict=True):
                    pointers[word] = address
            if self._tiles is not None:
                self._tiles.run(pointers, workspace, extras, stream)
            self._go(stream, self._address, 0)


def map_geometries(problem: Problem, cell: Fa3FwdCell) -> tuple[tuple[TensorMapGeometry, ...], ...]:
    """What the tensor maps of q, k and v describe: one each, or as many as there may be keys of a group in use."""
    if cell.is_packed:
        q = TensorMapGeometry.of_packed_rows(problem.q, cell.queries_per_tile, cell.gqa_ratio, cell.chunk_columns)
    else:
        q = TensorMapGeometry.of_rows(problem.q, cell.tile_m, cell.chunk_columns)
    k = _map_geometries_of_keys(problem, cell, problem.k, cell.has_k_tokens_inner)
    return (q,), k, _map_geometries_of_keys(problem, cell, problem.v, cell.has_v_tokens_inner)


def _map_geometries_of_keys(problem: Problem, cell: Fa3FwdCell, keys: ArraySpec, tokens_inner: bool) -> tuple[TensorMapGeometry, ...]:
    cache = problem.request.kv_cache
    if cache is None:
        geometry = TensorMapGeometry.of_sequences if cell.is_varlen else TensorMapGeometry.of_rows
        return (geometry(keys, cell.tile_n, cell.chunk_columns),)
    if tokens_inner:
        return tuple(TensorMapGeometry.of_key_groups(keys, used, cell.head_dim) for used in range(1, KEY_GROUP + 1))
    return (TensorMapGeometry.of_pages(keys, cache.rows_of_box(cell.tile_n), cell.chunk_columns),)


def pack_params(problem: Problem, cell: Fa3FwdCell, device: DeviceInfo) -> np.ndarray:
    """The Params struct as a structured array of one element, addresses left 0."""
    request = problem.request
    work_heads = request.num_heads_q // cell.gqa_ratio
    return pack(
        cell,
        {
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
            "total_q": request.rows_q,
            "total_k": request.rows_k,
            "num_m_blocks": -(-request.seqlen_q // cell.queries_per_tile),
            "num_tiles": num_tiles_of(problem, cell),
            **fp8_values(problem),
            **softmax_scales(request),
            **window_values(request),
            **alibi_values(request, problem.extras.alibi_slopes),
            "heads_per_section": heads_per_section(keys_in_memory(problem), work_heads, device),
            "num_splits": num_splits_of(problem, cell),
            **cache_values(problem, cell.tile_n),
        },
    )


def cache_values(problem: Problem, tile_n: int) -> dict[str, int]:
    """Where the pages of a KV cache lie, where k and v are one."""
    cache = problem.request.kv_cache
    if cache is None:
        return {}
    arrays = {"k": (problem.k, cache.k_tokens_inner), "v": (problem.v, cache.v_tokens_inner)}
    steps = {
        f"{name}_{of}_step": step
        for name, (pages, tokens_inner) in arrays.items()
        if not tokens_inner
        for of, step in zip(("page", "row"), page_steps(pages), strict=True)
    }
    return {**page_values(problem), "rows_of_box": cache.rows_of_box(tile_n), **steps}


def fp8_values(problem: Problem) -> dict[str, Any]:
    """The fields that 8-bit q, k and v add; none for others."""
    request = problem.request
    if not isinstance(request, Fa3FwdFp8Request):
        return {}
    values: dict[str, Any] = {"out_scale": request.fp8.v_descale}
    for x in "qkv":
        strides = descale_strides(getattr(problem.extras, f"{x}_descale"))
        values |= {
            f"{x}_descale_{name}": value
            for name, value in zip(("stride_batch", "stride_head", "stride_block", "blocks"), strides, strict=True)
        }
    return values


def descale_strides(factors: ArraySpec | None) -> tuple[int, int, int, int]:
    """Elements from one sequence, head and block of keys to the next, 0 along what is alike for all, and how many blocks there are."""
    if factors is None:
        return 0, 0, 0, 1
    shape, strides = (*factors.shape, 1, 1, 1)[:3], (*factors.strides, 0, 0, 0)[:3]
    by_batch, by_head, by_block = (stride if extent > 1 else 0 for stride, extent in zip(strides, shape, strict=True))
    return by_batch, by_head, by_block, shape[2]


def num_tiles_of(problem: Problem, cell: Fa3FwdCell) -> int:
    """Tiles of a call, of packed sequences as many as there may be."""
    request = problem.request
    work_heads = request.num_heads_q // cell.gqa_ratio
    if cell.is_varlen:
        return tile_count(capacity(request, "q", cell.queries_per_tile), work_heads, 1)
    return tile_count(-(-request.seqlen_q // cell.queries_per_tile), work_heads, request.batch)


def grid_of(problem: Problem, cell: Fa3FwdCell, device: DeviceInfo) -> int:
    """CTAs of a launch, by the request's persistent mode."""
    assert isinstance(problem.request, Fa3FwdRequest)
    mode = problem.request.persistent or Persistent()
    if cell.is_split:
        return split_grid(problem, cell, mode, device)
    return grid_size(mode, num_tiles_of(problem, cell), device)
