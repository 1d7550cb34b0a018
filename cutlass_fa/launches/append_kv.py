"""The launch before attention over a KV cache: new rows to the cache, rotary, lengths."""

from __future__ import annotations

import threading
from collections.abc import Sequence

import numpy as np

from ..arrays import ArraySpec
from ..cell import Cell
from ..kernels import Kernel
from ..launch import KernelLaunch, pack, tile_count
from ..problem_append import APPEND_NAMES, AppendProblem
from ..requests import MAX_SEQLEN

RESULTS = ("seqlens_k", "turned_q")  # what the pass writes beside the caches, the second with rotary alone


class AppendPlan:
    """The pass on one shape and device, ready to run on any arrays of that shape."""

    def __init__(self, problem: AppendProblem, kernel: Kernel) -> None:
        self.problem = problem
        self.kernel = kernel
        launch = KernelLaunch(kernel, problem.arrays.q.device, pack_params(problem, kernel.cell), grid_of(problem))
        self._launch = launch  # owns the memory that the driver is pointed to
        words = address_words(problem, kernel.cell)
        self._words = tuple(words.values())
        self.arrays = tuple(APPEND_NAMES.index(name) for name in words if name in APPEND_NAMES)
        self.num_row_arrays = sum(i < APPEND_NAMES.index("cache_seqlens") for i in self.arrays)  # they come first: rows of 16-bit elements
        self._num_cached = next(word for word, field in enumerate(kernel.cell.params) if field.name == "num_cached")
        self._lock = threading.Lock()

    def run(self, addresses: Sequence[int], num_cached: int, stream: int) -> None:
        """Launch on a CUstream. addresses: device addresses of the arrays of APPEND_NAMES that `self.arrays` counts, then of RESULTS.
        num_cached: keys of every sequence before the call where there is no array of them.

        Asynchronous; may be captured in a CUDA graph. The caller's current device must be the plan's. Raises the driver's error."""
        words = self._launch.params
        with self._lock:
            for word, address in zip(self._words, addresses, strict=True):
                words[word] = address
            words[self._num_cached] = num_cached
            self._launch.go(stream, self._launch.address, 0)


def address_words(problem: AppendProblem, cell: Cell) -> dict[str, int]:
    """Array that the call has and the kernel takes -> 64-bit word of Params that holds its address; the results come last."""
    words = {field.name: word for word, field in enumerate(cell.params) if field.is_address}
    words["cache_batch_idx"] = words["block_table"]  # a table of one page a sequence
    given = [name for name in APPEND_NAMES if name in words and getattr(problem.arrays, name) is not None]
    return {name: words[name] for name in (*given, *RESULTS) if name in words}


def pack_params(problem: AppendProblem, cell: Cell) -> np.ndarray:
    """The Params struct as a structured array of one element; addresses and num_cached left 0."""
    arrays, cache = problem.arrays, problem.cache
    table, cos, sin = arrays.block_table, arrays.rotary_cos, arrays.rotary_sin
    values = {
        "num_cached": 0,
        **_row_strides("q", arrays.q),
        **_row_strides("turned_q", problem.turned_q),
        **_row_strides("k", arrays.k),
        **_row_strides("v", arrays.v),
        **_cache_strides("k_cache", arrays.k_cache),
        **_cache_strides("v_cache", arrays.v_cache),
        "block_table_stride": 1 if table is None else table.strides[0],  # cache_batch_idx has one column
        "batch": problem.batch,
        "total_new": problem.total_new,
        "num_heads_kv": arrays.k_cache.shape[2],
        "head_dim": arrays.q.shape[3],
        "page_size": cache.block_size,
        "num_pages": cache.num_blocks,
        "capacity": min(cache.capacity, MAX_SEQLEN),
        "total_q": problem.total_q,
        "num_heads_q": arrays.q.shape[2],
        "rotary_interleaved": problem.rotary_interleaved,
        "query_step": problem.successive_queries,
    }
    if cos is not None and sin is not None:
        values |= {"rotary_cos_stride": cos.strides[0], "rotary_sin_stride": sin.strides[0]}
        values |= {"rotary_dim": 2 * cos.shape[1], "seqlen_rotary": cos.shape[0]}
    return pack(cell, values)


def grid_of(problem: AppendProblem) -> int:
    """CTAs: one for the lengths, one for each row of q with rotary, one for each new row of k and v."""
    return tile_count(1 + problem.total_q * problem.has_rotary + problem.total_new, 1, 1)


def _row_strides(name: str, spec: ArraySpec | None) -> dict[str, int]:
    """Of an array with a batch dimension; the stride of a dimension of one element may be any number, and is not looked at."""
    shape, strides = ((1, 1, 1), (0, 0, 0)) if spec is None else (spec.shape, spec.strides)
    kept = (stride if extent > 1 else 0 for extent, stride in zip(shape, strides, strict=True))
    return dict(zip((f"{name}_stride_{axis}" for axis in ("batch", "row", "head")), kept, strict=False))


def _cache_strides(name: str, spec: ArraySpec) -> dict[str, int]:
    return dict(zip((f"{name}_stride_{axis}" for axis in ("page", "row", "head", "column")), spec.strides, strict=True))
