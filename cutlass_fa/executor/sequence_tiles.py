"""The list of tiles of packed sequences on the CPU executor."""

from __future__ import annotations

from collections.abc import Mapping
from functools import lru_cache

import numpy as np

from ..cell import Cell
from ..launches.sequence_tiles import Side, list_arrays, list_size, pack_list_params
from ..render import render
from ..requests import AttentionRequest, sequence_tiles_key
from .build import ExecutorKernel, Program
from .launch import Buffer, GlobalMemory, launch
from .outputs import POISON_BYTE


@lru_cache(maxsize=16)
def _program(arch: str) -> tuple[Cell, Program]:
    cell = Cell.of(sequence_tiles_key(arch))
    return cell, ExecutorKernel.build(render(cell))


def list_tiles(
    request: AttentionRequest,
    side: Side,
    block_rows: int,
    block_columns: int,
    addresses: Mapping[str, int],
    memory: GlobalMemory,
    seed: int,
) -> Buffer:
    """A buffer with the list. addresses: of the extra arrays that there are, by name. Raises as launch does."""
    cell, program = _program(request.arch)
    params = pack_list_params(cell, request, side, block_rows, block_columns)
    tiles = memory.add("tile_list", np.full(4 * list_size(request, side, block_rows), POISON_BYTE, np.uint8), writable=True)
    params["tile_list"] = tiles.address
    for name, array in list_arrays(side).items():
        params[name] = addresses.get(array, 0)
    launch(program, 1, [params.tobytes()], memory, seed=seed)
    return tiles
