"""check=True of calls on KV caches: the numbers on the device, one by one."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from itertools import pairwise
from typing import Any

from .api_varlen import check_sequences
from .arrays import ArrayLibrary
from .errors import InvalidArgument
from .problem_append import AppendProblem


def check_cache_numbers(
    library: ArrayLibrary, problem: AppendProblem, arrays: Mapping[str, Any], num_cached: int | None, max_seqlen_q: int | None
) -> None:
    """Raises InvalidArgument or SeqlenOverflow, naming the first number that contradicts the others or the arrays. Waits for the GPU.

    arrays: by the names of APPEND_NAMES. num_cached: keys of every sequence where they are no array, else None."""
    rows_q = _rows(library, problem, arrays, "q", problem.total_q, max_seqlen_q)
    rows_new = _rows(library, problem, arrays, "k_new", problem.total_new, None)
    cached = _numbers(library, arrays["cache_seqlens"])
    if cached is None:
        cached = [problem.cache.capacity if num_cached is None else num_cached] * problem.batch
    lengths = [before + rows for before, rows in zip(cached, rows_new, strict=True)]
    for b, (before, length) in enumerate(zip(cached, lengths, strict=True)):
        if before < 0 or length > problem.cache.capacity:
            raise InvalidArgument(
                f"cache_seqlens[{b}]={before} and {length - before} new rows: the cache has room for {problem.cache.capacity} keys"
            )
    _check_places(library, problem, arrays, lengths)
    for b, (padding, before) in enumerate(zip(_numbers(library, arrays["cache_leftpad"]) or (), cached, strict=False)):
        if not 0 <= padding <= before:
            raise InvalidArgument(f"cache_leftpad[{b}]={padding}: the sequence has cache_seqlens[{b}]={before} keys, padding included")
    if problem.has_rotary:
        _check_angles(library, problem, arrays, cached, [max(pair) for pair in zip(rows_q, rows_new, strict=True)])


def _rows(
    library: ArrayLibrary, problem: AppendProblem, arrays: Mapping[str, Any], side: str, total: int, max_seqlen: int | None
) -> list[int]:
    """Of q or of k and v (side "k_new"), of each sequence."""
    starts = arrays[f"cu_seqlens_{side}"]
    if starts is None:
        return [total // problem.batch] * problem.batch
    check_sequences(side, starts, None, max_seqlen, total)
    return [end - start for start, end in pairwise(library.numbers(starts))]


def _check_places(library: ArrayLibrary, problem: AppendProblem, arrays: Mapping[str, Any], lengths: Sequence[int]) -> None:
    """Blocks and rows of the cache that the sequences have their keys in. lengths: keys of each after the call."""
    blocks, size = problem.cache.num_blocks, problem.cache.block_size
    for b, row in enumerate(_numbers(library, arrays["cache_batch_idx"]) or ()):
        if not 0 <= row < blocks:
            raise InvalidArgument(f"cache_batch_idx[{b}]={row}: the cache has {blocks} rows")
    for b, (entries, length) in enumerate(zip(_numbers(library, arrays["block_table"]) or (), lengths, strict=False)):
        for i, block in enumerate(entries[: -(-length // size)]):
            if not 0 <= block < blocks:
                raise InvalidArgument(f"block_table[{b}, {i}]={block}: the cache has {blocks} blocks, and the sequence {length} keys")


def _check_angles(
    library: ArrayLibrary, problem: AppendProblem, arrays: Mapping[str, Any], cached: Sequence[int], rows: Sequence[int]
) -> None:
    """Positions of the rows of q and k beside those that the tables have."""
    assert problem.arrays.rotary_cos is not None
    given, positions = _numbers(library, arrays["rotary_seqlens"]), problem.arrays.rotary_cos.shape[0]
    name = "cache_seqlens" if given is None else "rotary_seqlens"
    for b, (first, count) in enumerate(zip(given or cached, rows, strict=True)):
        if first < 0 or first + count > positions:
            raise InvalidArgument(f"{name}[{b}]={first} and {count} rows: rotary_cos has angles of {positions} positions")


def _numbers(library: ArrayLibrary, array: Any) -> list[Any] | None:
    return None if array is None else library.numbers(array)
