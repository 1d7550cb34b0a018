"""The launch before a kernel on packed sequences: the list of their blocks, heaviest first, made where the lengths are known."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, Literal, TypeAlias

import numpy as np

from ..cell import Cell
from ..cells.sequence_tiles import LIST_HEADER
from ..extras import EXTRA_NAMES, extra_words
from ..kernels import Kernel
from ..launch import KernelLaunch, pack
from ..problem import Problem
from ..requests import AttentionRequest, max_blocks

Side: TypeAlias = Literal["q", "k"]  # whose rows the blocks are of


class SequenceTilesLaunch:
    """Lists blocks of `block_rows` query rows for a forward kernel. list_floats: 4-byte numbers of the list."""

    def __init__(self, problem: Problem, kernel: Kernel, main: Cell, block_rows: int) -> None:
        self.list_floats = list_size(problem.request, "q", block_rows)
        params = pack_list_params(kernel.cell, problem.request, "q", block_rows, main.tile_n)
        self._launch = KernelLaunch(kernel, problem.q.device, params, grid=1)
        self._main_word = next(word for word, field in enumerate(main.params) if field.name == "tile_list")
        own = {field.name: word for word, field in enumerate(kernel.cell.params) if field.is_address}
        # place among a run's extra arrays -> word of the list's Params
        names = [EXTRA_NAMES[i] for i in extra_words(main.params, problem.extras)]
        self._words = {names.index(array): own[name] for name, array in list_arrays("q").items() if array in names}

    def run(self, main_words: memoryview, workspace: int, extras: Sequence[int], stream: int) -> None:
        """Launch on a CUstream, and tell the main kernel's Params. workspace: address of the list. The caller holds the plan's lock."""
        main_words[self._main_word] = workspace
        own = self._launch.params
        own[0] = workspace
        for place, word in self._words.items():
            own[word] = extras[place]
        self._launch.go(stream, self._launch.address, 0)


def list_arrays(side: Side) -> dict[str, str]:
    """Which extra array each address of the list's Params is."""
    rows, columns = ("q", "k") if side == "q" else ("k", "q")
    sides = (("rows", rows), ("columns", columns))
    return {f"{name}_{place}": f"{name}_{own}" for place, own in sides for name in ("cu_seqlens", "seqused")}


def capacity(request: AttentionRequest, side: Side, block_rows: int) -> int:
    """Blocks that there are at most."""
    return max_blocks(request.rows_q if side == "q" else request.rows_k, request.batch, block_rows)


def list_size(request: AttentionRequest, side: Side, block_rows: int) -> int:
    """4-byte numbers of the list."""
    return LIST_HEADER + 2 * capacity(request, side, block_rows)


def pack_list_params(cell: Cell, request: AttentionRequest, side: Side, block_rows: int, block_columns: int) -> np.ndarray:
    """The Params of the list, addresses 0. block_columns: what counts as one piece of a block's work."""
    unbounded = request.rows_q + request.rows_k
    left, right = (min(bound, unbounded) if bound >= 0 else unbounded for bound in request.mask.window)
    right = 0 if request.mask.causal else right
    totals, sight = (request.rows_q, request.rows_k), (left, right)
    if side == "k":  # a key is seen by the queries that stand as far behind it as they see ahead, and the other way round
        totals, sight = totals[::-1], sight[::-1]
    values: Mapping[str, Any] = {
        "batch": request.batch,
        "total_rows": totals[0],
        "total_columns": totals[1],
        "block_rows": block_rows,
        "block_columns": block_columns,
        "left": min(sight[0], _MAX_SIGHT),
        "right": min(sight[1], _MAX_SIGHT),
        "capacity": capacity(request, side, block_rows),
    }
    return pack(cell, values)


_MAX_SIGHT = 2**31 - 1  # of a 32-bit number; no sequence is longer
