"""The forward on the CPU executor: NumPy arrays in, what the kernel wrote out."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

import ml_dtypes
import numpy as np

from ..arrays import library_of
from ..cell import Cell
from ..cells.fa2_fwd import Fa2FwdCell
from ..cells.fa3_fwd import Fa3FwdCell
from ..cells.swizzled import SwizzledCell
from ..device import DeviceInfo
from ..extras import EXTRA_NAMES, ExtraSpecs
from ..launches import fa2_fwd, fa3_fwd
from ..launches.split import PartsWorkspace
from ..problem import Problem
from ..render import render
from ..request_parts import PersistentMode, Window
from ..requests_fp8 import Fp8Options
from .build import ExecutorKernel, Program
from .faults import ExecutorError, ExecutorFault
from .launch import DEFAULT_TIME_LIMIT_S, Buffer, GlobalMemory, launch
from .outputs import POISON_BYTE, Output, check_written, span
from .sequence_tiles import list_tiles
from .tensor_map import encode

# A GPU of few multiprocessors, so that persistent kernels have several tiles per CTA at small sizes; its L2 makes causal sections of a
# few heads.
OUT_DTYPES = {"bf16": ml_dtypes.bfloat16, "f16": np.float16, "float32": np.float32}
SMALL_DEVICE = DeviceInfo("sm_90a", num_sms=2, l2_bytes=1 << 18, name="CPU executor")


@dataclass(frozen=True)
class Forward:
    """out: (batch, seqlen_q, num_heads_q, head_dim) in q's dtype, or float32 where the cell writes that. lse: float32 (batch, num_heads_q,
    seqlen_q)."""

    out: np.ndarray
    lse: np.ndarray


def run_forward(
    cell: Cell,
    q: np.ndarray,
    k: np.ndarray,
    v: np.ndarray,
    *,
    seed: int,
    program: Program | None = None,
    softmax_scale: float | None = None,
    softcap: float = 0.0,
    dropout_p: float = 0.0,
    random_state: tuple[int, int] = (0, 0),
    window_size: tuple[int, int] = (-1, -1),
    sink_tokens: int = 0,
    q_offset: int | None = None,
    k_offset: int | None = None,
    persistent: PersistentMode | None = None,
    fp8: Fp8Options | None = None,
    out_like: np.ndarray | None = None,
    cached: bool = False,
    num_splits: int = 0,
    device: DeviceInfo = SMALL_DEVICE,
    time_limit_s: int = DEFAULT_TIME_LIMIT_S,
    **extras: np.ndarray | None,
) -> Forward:
    """Run `cell`'s kernel on the CPU.

    q: (batch, seqlen_q, num_heads_q, head_dim), k and v: (batch, seqlen_k, num_heads_kv, head_dim), or packed where the cell is of
    sequences (cu_seqlens_q and cu_seqlens_k among the extras), in the cell's dtype (bfloat16 through ml_dtypes); any strides that a call
    on the GPU accepts. head_dim at most the cell's.
    seed: the schedule. program: `cell` compiled already. softmax_scale: default 1 / sqrt(head_dim).
    softcap, dropout_p: positive where the cell has them, else 0. random_state: dropout's seed and offset.
    window_size: (left, right), with a bounded side where the cell has a window. sink_tokens: positive where it has them.
    q_offset, k_offset: positions of the first query and key, where the cell has offsets.
    persistent: default Persistent(), as the launcher's, in the family that has it.
    fp8: options of a cell of 8-bit numbers; None: the defaults.
    out_like: an array whose shape and strides the output has; default contiguous.
    cached: k and v are a KV cache, where the cell is of one; num_splits: parts of a sequence's keys, where the cell divides them.
    extras: those of ExtraSpecs that the cell has.

    Raises ExecutorFault where the kernel misbehaves (also when it writes around a strided output, or leaves some of an output unwritten),
    ExecutorError and HostCompileError, and what Problem.from_specs raises for bad arguments.
    """
    if program is None:
        program = ExecutorKernel.build(render(cell))
    mask = Window(*window_size, causal=cell.key.causal)
    options = {
        "mask": mask,
        "sink_tokens": sink_tokens,
        "extras": ExtraSpecs.of(library_of(np.ndarray), [extras.get(name) for name in EXTRA_NAMES]),
        "softmax_scale": softmax_scale,
        "softcap": softcap,
        "dropout_p": dropout_p,
        "q_offset": q_offset,
        "k_offset": k_offset,
        "float_out": cell.key.float_out,
        "persistent": persistent,
        "cached": cached,
        "num_splits": num_splits,
        "fp8": fp8,
    }
    problem = _problem(cell, q, k, v, out_like, options)
    memory = GlobalMemory()
    buffers = {name: memory.add(name, span(array)) for name, array in (("q", q), ("k", k), ("v", v))}
    buffers |= {name: memory.add(name, span(array)) for name, array in extras.items() if array is not None}
    out = Output.add(memory, problem.out)
    lse_shape = problem.lse_shape
    lse = memory.add("lse", np.full(4 * int(np.prod(lse_shape)), POISON_BYTE, np.uint8), writable=True)
    buffers |= {"o": out.buffer, "lse": lse}
    counters = _add_counters(problem, cell, buffers, memory, device)
    if cell.has_tile_list:
        buffers["tile_list"] = _list_tiles(problem, cell, buffers, memory, seed)
    grid, arguments = _arguments(problem, cell, buffers, random_state, device)
    launch(program, grid, arguments, memory, seed=seed, time_limit_s=time_limit_s)
    name = f"{program.source.name}, seed {seed}"
    if counters.data.any():
        raise ExecutorFault("fault", f"{name}: fault: {counters.name} is {counters.data.view(np.int32)} after the launch, not 0")
    out_dtype = np.dtype(OUT_DTYPES[problem.out.dtype])
    out_bits, lse_bits = out.values(name).reshape(problem.out_shape), lse.data.view(np.uint32).reshape(lse_shape)
    check_written(name, "out", out_bits)
    check_written(name, "lse", lse_bits)
    return Forward(out_bits.view(out_dtype), lse_bits.view(np.float32))


def _arguments(
    problem: Problem, cell: Cell, buffers: Mapping[str, Buffer], random_state: tuple[int, int], device: DeviceInfo
) -> tuple[int, list[bytes]]:
    """What the plan of the cell's family launches with: CTAs, and the kernel's arguments."""
    maps: list[bytes] = []
    if isinstance(cell, Fa3FwdCell):
        for name, geometries in zip("qkv", fa3_fwd.map_geometries(problem, cell), strict=True):
            maps.append(b"".join(encode(geometry, buffers[name].address) for geometry in geometries))
        params = fa3_fwd.pack_params(problem, cell, device)
        grid = fa3_fwd.grid_of(problem, cell, device)
    else:
        assert isinstance(cell, Fa2FwdCell)
        params = fa2_fwd.pack_params(problem, cell, device)
        grid = fa2_fwd.grid_of(problem, cell)
    for field in cell.params:
        if field.is_address:
            params[field.name] = buffers[field.name].address if field.name in buffers else 0
    if cell.has_dropout:
        params["dropout_seed"], params["dropout_offset"] = random_state
    return grid, [*maps, params.tobytes()]


def _add_counters(problem: Problem, cell: Cell, buffers: dict[str, Buffer], memory: GlobalMemory, device: DeviceInfo) -> Buffer:
    """What tiles or their parts are counted on, and the parts' workspace, which holds NaN."""
    if not (isinstance(cell, Fa3FwdCell) and cell.is_split):
        buffers["tile_counter"] = memory.add("tile_counter", np.zeros(4, np.uint8), writable=True)
        return buffers["tile_counter"]
    grid = fa3_fwd.grid_of(problem, cell, device)
    workspace = PartsWorkspace.of(problem, cell, grid)
    for name, floats in (("part_o", workspace.places * workspace.head_dim), ("part_rows", 2 * workspace.places)):
        buffers[name] = memory.add(name, np.full(4 * floats, POISON_BYTE, np.uint8), writable=True)
    buffers["part_counters"] = memory.add("part_counters", np.zeros(4 * grid, np.uint8), writable=True)
    return buffers["part_counters"]


def _list_tiles(problem: Problem, cell: Cell, buffers: Mapping[str, Buffer], memory: GlobalMemory, seed: int) -> Buffer:
    """The list of tiles of packed sequences, by its kernel."""
    assert isinstance(cell, SwizzledCell)
    addresses = {name: x.address for name, x in buffers.items()}
    return list_tiles(problem.request, "q", cell.queries_per_tile, cell.tile_n, addresses, memory, seed)


def _problem(cell: Cell, q: np.ndarray, k: np.ndarray, v: np.ndarray, out_like: np.ndarray | None, options: Mapping[str, Any]) -> Problem:
    """The call's problem. Raises ExecutorError where its options are not those that `cell` was made for."""
    spec: Any = library_of(np.ndarray).spec
    problem = Problem.from_specs(
        spec(q),
        spec(k),
        spec(v),
        None if out_like is None else spec(out_like),
        arch=cell.arch,
        family=cell.key.family,
        **options,
    )
    key = replace(problem.request.dispatch_key(), head_dim=cell.key.head_dim, gqa_ratio=cell.key.gqa_ratio, split=cell.key.split)
    if key != cell.key:
        raise ExecutorError(f"the call needs {key}, and the kernel is {cell.key}")
    return problem
