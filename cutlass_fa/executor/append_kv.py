"""The pass before attention over a KV cache on the CPU executor: NumPy arrays in, caches as the kernel left them out."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from ..arrays import library_of
from ..cell import Cell
from ..launches.append_kv import grid_of, pack_params
from ..problem_append import APPEND_NAMES, AppendProblem
from ..render import render
from .build import ExecutorKernel, Program
from .faults import ExecutorFault
from .launch import GlobalMemory, launch
from .outputs import POISON_BYTE, span


@dataclass(frozen=True)
class Appended:
    """k_cache, v_cache: in the shapes and the dtype of those given, as the kernel left them. seqlens_k: int32 (batch,). turned_q: like q,
    contiguous, None without rotary; rows that belong to no sequence hold NaN."""

    k_cache: np.ndarray
    v_cache: np.ndarray
    seqlens_k: np.ndarray
    turned_q: np.ndarray | None


def run_append(
    *,
    seed: int,
    arch: str = "sm_80",
    program: Program | None = None,
    cache_seqlens: np.ndarray | int,
    rotary_interleaved: bool = True,
    successive_queries: bool = False,
    **arrays: np.ndarray | None,
) -> Appended:
    """Run the pass on the CPU. arrays: those of AppendArrays by name, packed ones without a batch dimension, in any strides that a GPU's
    call accepts; the caches are copied. program: the kernel compiled already. cache_seqlens: an array, or one number for all sequences.

    Raises ExecutorFault where the kernel misbehaves (also when it writes outside the bytes that an array spans), ExecutorError and
    HostCompileError, and what AppendProblem.from_specs raises."""
    library = library_of(np.ndarray)
    given = {name: array for name, array in arrays.items() if array is not None}
    if isinstance(cache_seqlens, np.ndarray):
        given["cache_seqlens"] = cache_seqlens
    specs = {name: library.spec(given[name]) if name in given else None for name in APPEND_NAMES}
    problem = AppendProblem.from_specs(specs, arch=arch, rotary_interleaved=rotary_interleaved, successive_queries=successive_queries)
    cell, q = Cell.of(problem.dispatch_key()), given["q"]
    program = ExecutorKernel.build(render(cell)) if program is None else program
    memory = GlobalMemory()
    buffers = {name: memory.add(name, span(array), writable=name.endswith("_cache")) for name, array in given.items()}
    for name, size in (("seqlens_k", 4 * problem.batch), ("turned_q", q.size * q.itemsize)):
        buffers[name] = memory.add(name, np.full(size, POISON_BYTE, np.uint8), writable=True)
    if "cache_batch_idx" in buffers:
        buffers["block_table"] = buffers["cache_batch_idx"]  # a table of one page a sequence
    params = pack_params(problem, cell)
    params["num_cached"] = 0 if isinstance(cache_seqlens, np.ndarray) else cache_seqlens
    for field in cell.params:
        if field.is_address:
            params[field.name] = buffers[field.name].address if field.name in buffers else 0
    launch(program, grid_of(problem), [params.tobytes()], memory, seed=seed)
    k_cache, v_cache = (_written(given[name], buffers[name].data, name) for name in ("k_cache", "v_cache"))
    turned = buffers["turned_q"].data.view(q.dtype).reshape(q.shape) if problem.has_rotary else None
    return Appended(k_cache, v_cache, buffers["seqlens_k"].data.view(np.int32), turned)


def _written(array: np.ndarray, data: np.ndarray, name: str) -> np.ndarray:
    """The bytes that `array` spanned, seen as it is. Raises ExecutorFault where those between its elements changed."""
    expected = span(array).copy()
    written = _elements(array, data)
    _elements(array, expected)[...] = written
    if (expected != data).any():
        raise ExecutorFault("fault", f"fault: {name} was written between its elements, at byte {int((expected != data).argmax())}")
    return written


def _elements(array: np.ndarray, data: np.ndarray) -> np.ndarray:
    return np.lib.stride_tricks.as_strided(data.view(array.dtype), array.shape, array.strides)
