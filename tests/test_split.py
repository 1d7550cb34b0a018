"""Which calls on KV caches divide keys among CTAs, and with what: keys, workspace, counters, refusals. Needs no GPU and no compiler."""

from __future__ import annotations

import threading
from dataclasses import replace
from typing import Any

import numpy as np
import pytest

from cutlass_fa import errors
from cutlass_fa.arrays import ArraySpec
from cutlass_fa.cell import Cell
from cutlass_fa.cells.fa3_fwd import Fa3FwdCell
from cutlass_fa.device import DeviceInfo
from cutlass_fa.explain import choice_notes
from cutlass_fa.extras import ExtraSpecs
from cutlass_fa.kv_cache import ContiguousKvCache, PagedKvCache
from cutlass_fa.launches.fa3_fwd import grid_of, pack_params
from cutlass_fa.launches.split import PartsWorkspace, blocks_at_most
from cutlass_fa.problem import Problem
from cutlass_fa.request_parts import Causal, CumulativeSeqlens, Grid, Persistent, SlidingCausal
from cutlass_fa.requests import Fa3FwdRequest, FwdRequest
from cutlass_fa.requests_cache import PagedAttentionRequest
from cutlass_fa.tile_counters import RESERVED, RING, TileCounters

H100 = DeviceInfo("sm_90a", num_sms=132, l2_bytes=50 << 20, name="H100")


def request(batch: int = 64, seqlen_q: int = 1, heads: tuple[int, int] = (32, 8), **options: Any) -> FwdRequest:
    cache = PagedKvCache(4096, 64, 64)
    sizes = {"batch": batch, "total_q": batch * seqlen_q, "seqlen_q": seqlen_q, "num_heads_q": heads[0], "num_heads_kv": heads[1]}
    return PagedAttentionRequest(**({"kv_cache": cache, "head_dim": 128, "mask": Causal()} | sizes | options))


@pytest.mark.parametrize(
    ("options", "split", "gqa_ratio"),
    [
        ({}, True, 4),
        ({"num_splits": 1}, False, 4),
        ({"num_splits": 5}, True, 4),
        ({"seqlen_q": 16}, True, 4),  # 64 rows: one small tile
        ({"seqlen_q": 17}, False, 4),
        ({"seqlen_q": 17, "batch": 2}, True, 4),  # 16 tiles: most multiprocessors would have none
        ({"seqlen_q": 2048, "batch": 1}, False, 1),
        ({"seqlen_q": 2048, "batch": 1, "num_splits": 2}, True, 1),
        ({"heads": (8, 8)}, True, 1),
        ({"heads": (64, 1)}, True, 64),
        ({"persistent": Grid()}, False, 4),
        ({"persistent": Persistent(20)}, True, 4),
        ({"mask": SlidingCausal(100)}, True, 4),
        ({"kv_cache": ContiguousKvCache(1 << 20, 1 << 20), "batch": 1 << 10}, True, 4),
    ],
    ids=str,
)
def test_which_calls_are_split(options: dict[str, Any], split: bool, gqa_ratio: int) -> None:
    asked = request(**options)
    key = asked.dispatch_key()
    assert (key.split, key.gqa_ratio) == (split, gqa_ratio)
    assert len(asked.dispatch_keys()) == (1 if split else 2), "a list of tiles comes before a kernel that does not find its work by itself"
    assert any("share the keys" in note for note in choice_notes(key)) == split


def test_splits_that_make_no_sense_are_refused() -> None:
    with pytest.raises(errors.InvalidArgument, match="num_splits=-1"):
        request(num_splits=-1)
    with pytest.raises(errors.InvalidArgument, match="Grid"):
        request(num_splits=2, persistent=Grid())
    with pytest.raises(errors.InvalidArgument, match="KV cache"):
        Fa3FwdRequest(batch=1, seqlen_q=1, seqlen_k=8, num_heads_q=1, num_heads_kv=1, head_dim=64, num_splits=2)
    key = request(num_splits=2, family="fa2").dispatch_key()
    with pytest.raises(errors.UnsupportedCell, match="split"):
        Cell.of(key)


def problem(batch: int = 64, pages: int = 64, **options: Any) -> tuple[Problem, Fa3FwdCell]:
    q = ArraySpec((batch, 1, 32, 128), (4096, 4096, 128, 1), "bf16", 0)
    k = ArraySpec((4096, 64, 8, 128), (65536, 1024, 128, 1), "bf16", 0)
    extras = ExtraSpecs(seqused_k=ArraySpec((batch,), (1,), "i32", 0), block_table=ArraySpec((batch, pages), (pages, 1), "i32", 0))
    extras = ExtraSpecs(**{name: replace(spec, dtype="int32") for name, spec in vars(extras).items() if spec is not None})
    made = Problem.from_specs(q, k, k, None, arch="sm_90a", mask=Causal(), extras=extras, cached=True, **options)
    cell = Cell.of(made.request.dispatch_key())
    assert isinstance(cell, Fa3FwdCell)
    return made, cell


def test_a_share_of_all_work_takes_two_tiles_of_workspace_a_cta() -> None:
    made, cell = problem()
    assert grid_of(made, cell, H100) == 132
    workspace = PartsWorkspace.of(made, cell, 132)
    assert workspace == PartsWorkspace(2 * 132 * 64, 128) and workspace.floats == workspace.places * 130
    assert workspace.part_rows_bytes % 16 == 0
    assert pack_params(made, cell, H100)["num_splits"][0] == 0


def test_a_fixed_number_of_parts_takes_as_many_times_the_rows_of_q() -> None:
    made, cell = problem(num_splits=3)
    assert PartsWorkspace.of(made, cell, 132).places == 3 * 64 * 32
    assert pack_params(made, cell, H100)["num_splits"][0] == 3
    made, cell = problem(num_splits=1000)
    assert pack_params(made, cell, H100)["num_splits"][0] == 32, "no more than a tile has blocks"


def test_no_more_ctas_than_blocks() -> None:
    made, cell = problem(batch=1, pages=2)
    assert blocks_at_most(made, cell) == 2 * 8 and grid_of(made, cell, H100) == 16


def test_more_blocks_than_32_bits_count_are_refused() -> None:
    made, cell = problem(batch=2, num_splits=2)
    many = replace(made.request, cu_seqlens=CumulativeSeqlens(1 << 27, 1 << 30), seqlen_k=1 << 29)
    with pytest.raises(errors.InvalidArgument, match="num_splits=1"):
        grid_of(replace(made, request=many), cell, H100)


class _Counters(TileCounters):
    """Without a GPU."""

    def __init__(self) -> None:
        self._address, self._eager, self._captured = 1 << 20, 0, 0
        self._lock = threading.Lock()
        self._is_capturing = lambda stream: stream == 7


def test_counters_of_a_launch_lie_together() -> None:
    counters = _Counters()
    first, second = counters.take(0), counters.take(0, 132)
    assert second == first + 4 and counters.take(0) == second + 4 * 132
    last = 0
    for _ in range(RING // 132 + 1):
        last = counters.take(0, 132)
        assert (1 << 20) <= last <= (1 << 20) + 4 * (RING - 132)
    taken = np.array([counters.take(7, 1000) for _ in range(RESERVED // 1000)])
    assert (np.diff(taken) == 4000).all() and taken[0] == (1 << 20) + 4 * RING
    with pytest.raises(errors.LaunchError, match="counters"):
        counters.take(7, 1000)
