"""The launches of the fa2 backward: preprocess, main kernel, conversions, on one workspace of float32."""

from __future__ import annotations

import threading
from collections.abc import Mapping
from dataclasses import dataclass
from itertools import accumulate
from typing import Any

import numpy as np

from ..arrays import ArraySpec
from ..cell import Cell
from ..cells.fa2_bwd import Fa2BwdCell
from ..dispatch import DispatchKey
from ..dropout import keep_scale, keep_threshold
from ..errors import InvalidArgument
from ..kernels import Kernel
from ..launch import MAX_TILES, KernelLaunch, alibi_values, pack, softmax_scales, tile_count, window_values
from ..problem_backward import BackwardProblem
from .sequence_tiles import list_arrays, list_size, pack_list_params

WORKSPACE_ALIGNMENT = 64  # floats: 256 bytes


@dataclass(frozen=True)
class Workspace:
    """Where things lie in one buffer of float32, in bytes from its start; `floats` is its size. Parts are of size 0 where the call
    has none."""

    lse_log2: int
    dpsum: int
    dq_acc: int
    dk_parts: int
    dv_parts: int
    learnable_sink_parts: int
    tile_list: int
    floats: int

    @classmethod
    def of(cls, problem: BackwardProblem, cell: Fa2BwdCell) -> Workspace:
        request = problem.request
        batches = request.batches_of_blocks
        rows = batches * request.num_heads_q * request.blocks[0] * cell.tile_m
        parts = request.splits * batches * request.num_heads_kv * request.rows_k * cell.head_dim if cell.is_split else 0
        sink_parts = batches * request.num_heads_q * request.blocks[0] * request.learnable_sink
        tiles = list_size(request, "k", cell.tile_n) if cell.has_key_block_list else 0
        sizes = (rows, rows, request.copies * rows * cell.head_dim, parts, parts, sink_parts, tiles)
        ends = list(accumulate(-(-size // WORKSPACE_ALIGNMENT) * WORKSPACE_ALIGNMENT for size in sizes))
        lse_log2, dpsum, dq_acc, dk_parts, dv_parts, learnable_sink_parts, tile_list = (4 * start for start in (0, *ends[:-1]))
        return cls(lse_log2, dpsum, dq_acc, dk_parts, dv_parts, learnable_sink_parts, tile_list, floats=ends[-1])

    @property
    def places(self) -> dict[str, int]:
        """Name -> bytes from the buffer's start."""
        return {name: place for name, place in vars(self).items() if name != "floats"}


@dataclass(frozen=True)
class PassLaunch:
    """One launch: key of its kernel, grid, Params with addresses 0, and the addresses' names in the order of the struct."""

    key: DispatchKey
    grid: int
    params: np.ndarray
    addresses: tuple[str, ...]


def launches_of(problem: BackwardProblem, cells: Mapping[DispatchKey, Any]) -> tuple[PassLaunch, ...]:
    """Every launch of a call in order. cells: of `problem.request.dispatch_keys()`; the forward's is not looked at."""
    request = problem.request
    keys = [key for key in request.dispatch_keys() if key in cells and key.direction != "fwd"]
    first = next(i for i, key in enumerate(keys) if key.direction == "bwd_preprocess")
    preprocess, main, convert = keys[first : first + 3]
    m_blocks = tile_count(request.blocks[0], request.num_heads_q, request.batches_of_blocks)
    tile_count(request.copies, m_blocks, 1)
    values = _values(problem)
    made = [
        *(_list_pass(tiles, cells, problem, cells[main]) for tiles in keys[:first]),
        _pass(preprocess, cells, m_blocks, values),
        _pass(main, cells, _main_grid(problem), values),
        _pass(convert, cells, m_blocks, {**values, "scale": request.scale}),
    ]
    for each in keys[first + 3 :]:
        if each.direction == "bwd_reduce":
            names = {"parts": "learnable_sink_parts", "sums": "dlearnable_sink"}
            made.append(_pass(each, cells, request.num_heads_q, {"num_parts": request.blocks[0] * request.batches_of_blocks}, names))
            continue
        for name, spec, scale in (("dk", problem.dk, request.scale), ("dv", problem.dv, keep_scale(request.dropout_p))):
            made.append(_parts_pass(each, cells, problem, {**values, "scale": scale}, name, spec))
    return tuple(made)


def _pass(
    key: DispatchKey, cells: Mapping[DispatchKey, Any], grid: int, values: Mapping[str, Any], names: Mapping[str, str] | None = None
) -> PassLaunch:
    """names: of the addresses whose fields are called otherwise."""
    cell, names = cells[key], names or {}
    addresses = tuple(names.get(field.name, field.name) for field in cell.params if field.is_address)
    return PassLaunch(key, grid, pack(cell, values), addresses)


def _list_pass(key: DispatchKey, cells: Mapping[DispatchKey, Any], problem: BackwardProblem, main: Cell) -> PassLaunch:
    """The list of the blocks of keys of packed sequences."""
    params = pack_list_params(cells[key], problem.request, "k", main.tile_n, main.tile_m)
    names = {"tile_list": "tile_list", **list_arrays("k")}
    return PassLaunch(key, 1, params, tuple(names[field.name] for field in cells[key].params if field.is_address))


def _parts_pass(
    key: DispatchKey, cells: Mapping[DispatchKey, Any], problem: BackwardProblem, values: Mapping[str, Any], name: str, spec: ArraySpec
) -> PassLaunch:
    """The conversion of dk or dv, which share a kernel."""
    request, cell = problem.request, cells[key]
    part_size = request.batches_of_blocks * request.num_heads_kv * request.rows_k * cell.head_dim
    own = {"part_size": part_size, "num_parts": request.splits, "seqlen_k": request.rows_k, **_strides("gradient", spec)}
    grid = tile_count(-(-part_size // (4 * cell.threads)), 1, 1)
    return _pass(key, cells, grid, {**values, **own}, {"gradient": name, "parts": f"{name}_parts"})


def _main_grid(problem: BackwardProblem) -> int:
    """CTAs: one for each block of keys and split, or for each copy and split."""
    request = problem.request
    if request.cu_seqlens is not None and not request.deterministic:
        return tile_count(request.blocks[1] * request.splits, request.num_heads_kv, 1)
    if request.cu_seqlens is not None:  # each sequence, and the rows that belong to none
        return tile_count(request.copies * request.splits, request.num_heads_kv, request.batch + 1)
    per_head = (request.copies if request.deterministic else request.blocks[1]) * request.splits
    return tile_count(per_head, request.num_heads_kv, request.batch)


def _values(problem: BackwardProblem) -> dict[str, Any]:
    """What the Params of all passes hold, addresses apart."""
    request = problem.request
    m_blocks, n_blocks = request.blocks
    if m_blocks * (request.num_heads_q // request.num_heads_kv) > MAX_TILES:
        raise InvalidArgument(f"seqlen_q={request.seqlen_q}: {m_blocks} blocks of queries for each query head of a group are too many")
    values: dict[str, Any] = {
        "softmax_scale": request.scale,
        **softmax_scales(request),
        **window_values(request),
        **alibi_values(request, problem.extras.alibi_slopes),
        "dropout_seed": 0,
        "dropout_offset": 0,
        "keep_threshold": keep_threshold(request.dropout_p),
        "keep_scale": keep_scale(request.dropout_p),
        "heads_per_kv_head": request.num_heads_q // request.num_heads_kv,
        "num_m_blocks": m_blocks,
        "num_n_blocks": n_blocks,
        "num_splits": request.splits,
        "num_copies": request.copies,
        "total_q": request.rows_q,
        "total_k": request.rows_k,
        "blocks_per_head": m_blocks,
        **dict.fromkeys(("rows_k", "first_k", "first_block"), 0),  # a sequence's: the kernel finds them
    }
    for name in ("batch", "seqlen_q", "seqlen_k", "num_heads_q", "num_heads_kv", "head_dim"):
        values[name] = getattr(request, name)
    for name in ("q", "k", "v", "out", "dout", "dq", "dk", "dv"):
        values |= _strides(name, getattr(problem, name))
    for name in ("lse", "dlse"):
        spec = getattr(problem, name) or problem.lse
        values |= {f"{name}_stride_batch": spec.strides[0] if spec.shape[0] > 1 else 0, f"{name}_stride_head": spec.strides[1]}
    return values


def _strides(name: str, spec: ArraySpec) -> dict[str, int]:
    """The stride of a dimension of one element is not looked at and may be any number, which the field might not hold."""
    strides = (stride if extent > 1 else 0 for stride, extent in zip(spec.strides, spec.shape, strict=True))
    return dict(zip((f"{name}_stride_{axis}" for axis in ("batch", "row", "head")), strides, strict=False))


class Fa2BwdPlan:
    """A backward on one shape and device, ready to run on any arrays of that shape. workspace: what a run needs besides."""

    def __init__(self, problem: BackwardProblem, kernels: Mapping[DispatchKey, Kernel]) -> None:
        main = kernels[problem.request.dispatch_key()].cell
        assert isinstance(main, Fa2BwdCell)
        device = problem.q.device
        self.problem = problem
        self.kernels = kernels
        self.workspace = Workspace.of(problem, main)
        passes = launches_of(problem, {key: kernel.cell for key, kernel in kernels.items()})
        self._launches = [(each, KernelLaunch(kernels[each.key], device, each.params, each.grid)) for each in passes]
        self._has_dropout = main.has_dropout
        self._lock = threading.Lock()  # between writing the arguments and the driver's copies of them

    def run(self, addresses: Mapping[str, int], workspace: int, stream: int, random_state: tuple[int, int] = (0, 0)) -> None:
        """Launch every pass on a CUstream. addresses: device addresses of q, k, v, out, dout, lse, dq, dk, dv, dlse, dlearnable_sink and
        of the extra arrays by name, 0 for those that the call has not. workspace: the device address of `self.workspace.floats` float32,
        contents of no matter.

        Asynchronous; may be captured in a CUDA graph. random_state: seed and offset of the forward's dropout. The caller's current device
        must be the plan's. Raises LaunchError or the driver's error."""
        address = {name: workspace + place for name, place in self.workspace.places.items()}
        address |= addresses
        with self._lock:
            for each, launch in self._launches:
                words = launch.params
                for place, name in enumerate(each.addresses):
                    words[place] = address[name]
                if self._has_dropout and each.key.direction == "bwd":
                    words[len(each.addresses)], words[len(each.addresses) + 1] = random_state
                launch.go(stream, launch.address, 0)
