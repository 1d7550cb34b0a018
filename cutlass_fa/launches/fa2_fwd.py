"""The launch of the fa2 forward: Params alone, with every pointer and stride in it."""

from __future__ import annotations

import threading
from collections.abc import Sequence

import numpy as np

from ..cells.fa2_fwd import Fa2FwdCell
from ..device import DeviceInfo, device_info
from ..dropout import keep_scale, keep_threshold
from ..extras import extra_words
from ..kernels import Kernel
from ..launch import KernelLaunch, alibi_values, heads_per_section, pack, softmax_scales, tile_count, window_values
from ..problem import Problem
from .sequence_tiles import SequenceTilesLaunch, capacity


class Fa2FwdPlan:
    """A forward by the kernel of sm_80's instructions; see ForwardPlan."""

    def __init__(self, problem: Problem, kernel: Kernel, tiles_kernel: Kernel | None = None) -> None:
        cell = kernel.cell
        assert isinstance(cell, Fa2FwdCell)
        device = problem.q.device
        self.problem = problem
        self.kernel = kernel
        launch = KernelLaunch(kernel, device, pack_params(problem, cell, device_info(device)), grid_of(problem, cell))
        self._launch = launch  # owns the memory that the driver is pointed to
        # The first words of Params: q, k, v, o, lse, and the extra arrays and the random state where there are any.
        self._words = launch.params
        self._go, self._address = launch.go, launch.address
        self.extra_words = extra_words(cell.params, problem.extras)
        self._tiles = None if tiles_kernel is None else SequenceTilesLaunch(problem, tiles_kernel, cell, cell.tile_m)
        self.workspace_floats = 0 if self._tiles is None else self._tiles.list_floats
        self._random_word = next((word for word, field in enumerate(cell.params) if field.name == "dropout_seed"), None)
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
        """See ForwardPlan."""
        words = self._words
        with self._lock:
            words[0], words[1], words[2] = qkv
            words[3] = out
            words[4] = lse
            if extras:
                for word, address in zip(self.extra_words.values(), extras, strict=True):
                    words[word] = address
            if self._tiles is not None:
                self._tiles.run(words, workspace, extras, stream)
            if self._random_word is not None:
                words[self._random_word], words[self._random_word + 1] = random_state
            self._go(stream, self._address, 0)


def pack_params(problem: Problem, cell: Fa2FwdCell, device: DeviceInfo) -> np.ndarray:
    """The Params struct as a structured array of one element; addresses and the random state left 0."""
    request = problem.request
    arrays = {"q": problem.q, "k": problem.k, "v": problem.v, "o": problem.out}
    strides = {f"{name}_stride_{axis}": spec.strides[i] for name, spec in arrays.items() for i, axis in enumerate(("batch", "row", "head"))}
    return pack(
        cell,
        {
            **strides,
            **softmax_scales(request),
            **window_values(request),
            **alibi_values(request, problem.extras.alibi_slopes),
            "dropout_seed": 0,
            "dropout_offset": 0,
            "batch": request.batch,
            "seqlen_q": request.seqlen_q,
            "seqlen_k": request.seqlen_k,
            "num_heads_q": request.num_heads_q,
            "head_dim": request.head_dim,
            "total_q": request.rows_q,
            "total_k": request.rows_k,
            "num_m_blocks": -(-request.seqlen_q // cell.tile_m),
            "heads_per_kv_head": request.num_heads_q // request.num_heads_kv,
            "heads_per_section": heads_per_section(problem.k, request.num_heads_q, device),
            "keep_threshold": keep_threshold(request.dropout_p),
            "keep_scale": keep_scale(request.dropout_p),
        },
    )


def grid_of(problem: Problem, cell: Fa2FwdCell) -> int:
    """CTAs of a launch: one for each tile, of packed sequences for each that there may be."""
    request = problem.request
    if cell.is_varlen:
        return tile_count(capacity(request, "q", cell.tile_m), request.num_heads_q, 1)
    return tile_count(-(-request.seqlen_q // cell.tile_m), request.num_heads_q, request.batch)
