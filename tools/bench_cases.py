"""The named sets of points that bench.py's --cases takes."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from itertools import product

from tools.bench_cache import chunk_points, decode_points
from tools.bench_points import MIXES, Point


@dataclass(frozen=True)
class CaseSet:
    """Points of a dtype and a head_dim, and the head_dims that they are timed at unless others are asked for."""

    points: Callable[[str, int], list[Point]]
    head_dims: tuple[int, ...] = (128,)


def last(keys: int) -> tuple[int, int]:
    """The causal window of that many keys, the query's own position included."""
    return keys - 1, 0


def window_points(dtype: str, head_dim: int) -> list[Point]:
    """Causal windows at 16k, and grouped heads at 8k with a window and without."""
    long, grouped = Point(dtype, head_dim, 16384, True), Point(dtype, head_dim, 8192, True, gqa_ratio=4)
    return [replace(long, window=last(1024)), replace(long, window=last(4096)), replace(grouped, window=last(1024)), grouped]


def packed_points(dtype: str, head_dim: int) -> list[Point]:
    """A mix of lengths, and one long sequence among short ones, whose baseline is equal lengths; full and causal."""
    return [Point(dtype, head_dim, sum(MIXES[mix]), causal, lengths=mix) for mix in ("mix16", "one_long") for causal in (False, True)]


def alibi_points(dtype: str, head_dim: int) -> list[Point]:
    return [Point(dtype, head_dim, seqlen, True, alibi=True) for seqlen in (4096, 16384)]


def sink_points(dtype: str, head_dim: int) -> list[Point]:
    return [Point(dtype, head_dim, seqlen, True, window=last(1024), sink_tokens=4) for seqlen in (4096, 16384)]


def learnable_sink_points(dtype: str, head_dim: int) -> list[Point]:
    return [Point(dtype, head_dim, seqlen, True, learnable_sink=True) for seqlen in (4096, 16384)]


def seqlen_k_points(dtype: str, head_dim: int) -> list[Point]:
    """A fixed window with sink tokens before more and more keys: the visible pairs do not change. The longest keys and values take 16 GiB
    each."""
    point = Point(dtype, head_dim, 1024, True, window=last(1024), sink_tokens=4)
    return [replace(point, seqlen_k=seqlen_k) for seqlen_k in (4096, 16384, 65536, 262144)]


CASES: dict[str, CaseSet] = {
    "window": CaseSet(window_points),
    "varlen": CaseSet(packed_points),
    "alibi": CaseSet(alibi_points, (64, 128)),
    "sinks": CaseSet(sink_points, (64, 128)),
    "learnable_sink": CaseSet(learnable_sink_points, (64, 128)),
    "seqlen_k": CaseSet(seqlen_k_points),
    "decode": CaseSet(decode_points),
    "chunk": CaseSet(chunk_points),
}


def case_points(names: Sequence[str], dtypes: Sequence[str], head_dims: Sequence[int] | None) -> Iterator[Point]:
    """The points of those sets, in order; a GQA ratio that does not divide the number of heads is left out. head_dims: None, each set's
    own."""
    for name, dtype in product(names, dtypes):
        for head_dim in CASES[name].head_dims if head_dims is None else head_dims:
            yield from (point for point in CASES[name].points(dtype, head_dim) if point.num_heads_q % point.gqa_ratio == 0)
