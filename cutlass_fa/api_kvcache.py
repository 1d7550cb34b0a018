"""The public function on KV caches: append, rotary and attention in one call."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import replace
from typing import Any

import numpy as np

from . import kernels
from .api import BACKENDS, OPTION_NAMES, forward, is_float32, mask_of, mask_options, plan_of, reference_library
from .arrays import ArrayLibrary, check_one_library, library_of, not_on_gpu
from .check_kvcache import check_cache_numbers
from .device import check_current_device, device_info
from .errors import InvalidArgument
from .extras import NO_DESCALES, ExtraSpecs
from .launches.append_kv import AppendPlan
from .problem import ALIGNMENT_BYTES, check_out
from .problem_append import APPEND_NAMES, AppendProblem, check_tables
from .request_parts import CumulativeSeqlens, PositionBias
from .requests import VarlenFwdRequest

_NUMBERS = (int, np.integer)


def flash_attn_with_kvcache(
    q: Any,
    k_cache: Any,
    v_cache: Any,
    k: Any = None,
    v: Any = None,
    *,
    rotary_cos: Any = None,
    rotary_sin: Any = None,
    cache_seqlens: Any = None,
    cache_batch_idx: Any = None,
    cache_leftpad: Any = None,
    block_table: Any = None,
    cu_seqlens_q: Any = None,
    cu_seqlens_k_new: Any = None,
    max_seqlen_q: int | None = None,
    rotary_seqlens: Any = None,
    softmax_scale: float | None = None,
    causal: bool = False,
    window_size: tuple[int, int] = (-1, -1),
    sink_tokens: int = 0,
    alibi_slopes: Any = None,
    learnable_sink: Any = None,
    softcap: float = 0.0,
    rotary_interleaved: bool = True,
    num_splits: int = 0,
    out: Any = None,
    out_dtype: Any = None,
    return_softmax_lse: bool = False,
    family: str | None = None,
    check: bool = False,
    backend: str = "cuda",
) -> Any:
    """Attention of new queries over a cache of keys and values, to which the new keys and values are first appended in place.

    q: (batch, seqlen_q, num_heads_q, head_dim), or packed (total_q, num_heads_q, head_dim) with cu_seqlens_q; float16 or bfloat16, CuPy or
        PyTorch, on the GPU.
    k_cache, v_cache: (batch_cache, seqlen_cache, num_heads_kv, head_dim), or with block_table (num_blocks, block_size, num_heads_kv,
        head_dim), block_size 8, 16, 32, 64, 128 or 256. Other orders in memory are strides: (num_blocks, num_heads_kv, block_size,
        head_dim) and (num_blocks, num_heads_kv, head_dim, block_size) go in as transposed views, each of the two as it lies.
    k, v: (batch, seqlen_new, num_heads_kv, head_dim), or packed (total_new, ...) with cu_seqlens_k_new: written to the cache at positions
        cache_seqlens[b], cache_seqlens[b] + 1 and so on. Rows without a place there (past the cache's or the block table's end, in blocks
        that do not exist) are dropped.
    cache_seqlens: int32 (batch,), or one int for all: keys in the cache before the call, cache_leftpad's included. None, without k: all
        that the cache has.
    cache_batch_idx: int32 (batch,): the row of a contiguous cache that is sequence b's; default b. Sequences that append to one row
        overwrite each other.
    cache_leftpad: int32 (batch,), of a contiguous cache: the position of a sequence's first key.
    block_table: int32 (batch, max_blocks): the blocks of each sequence in order (PagedAttention: Kwon et al. 2023).
    cu_seqlens_q, cu_seqlens_k_new: int32 (batch + 1,): first rows of packed sequences, and the end, on the GPU. Either without the other.
    max_seqlen_q: a length that no sequence of packed q exceeds; a hint, as flash_attn_varlen_func has it.
    rotary_cos, rotary_sin: (seqlen_rotary, rotary_dim / 2) in q's dtype, with k: new keys are turned (RoPE: Su et al. 2021) by the angles
        of their positions before they are written, and row i of q by that of cache_seqlens[b] + i where the mask is causal or a window,
        else all rows by that of cache_seqlens[b]. rotary_dim: a multiple of 16 up to head_dim. Positions past the tables take their last
        row. The arithmetic is float32, rounded once; q itself is not changed.
    rotary_seqlens: int32 (batch,): the positions that rotary begins at, instead of cache_seqlens.
    rotary_interleaved: pairs are columns 2i and 2i + 1; False: i and i + rotary_dim / 2 (GPT-NeoX).
    softmax_scale, causal, window_size, sink_tokens, alibi_slopes, learnable_sink, softcap, out, out_dtype, family: as flash_attn_func has
        them; the last query stands at the last key, and sink tokens are counted from a sequence's first key.
    num_splits: CTAs that share the keys of a sequence; 0 (the default): as many as the GPU is filled by; a fixed number gives equal bits
        whatever else is in the batch.
    return_softmax_lse: also return log-sum-exp (return_lse of the other functions, under flash-attn's name here), float32, natural
        logarithm: (batch, num_heads_q, seqlen_q), packed (num_heads_q, total_q).
    check: wait for the GPU and look at the numbers: lengths and what is appended fit the cache, block_table and cache_batch_idx name what
        exists, cu_seqlens begin at 0 and do not decrease. Without it wrong numbers give wrong results, but reach no memory outside.
    backend: "cuda", or "reference": NumPy arrays; the cache is written in place too.

    Returns out, or (out, lse). Lengths and tables are read on the device alone: nothing waits, and a captured call reads them anew at each
    replay (not a cache_seqlens that is an int). A refused call has not written to the cache.
    Raises InvalidArgument, UnsupportedDtype, UnsupportedHeadDim, InvalidGqaRatio, EmptyBatch, ZeroSeqlen, SeqlenOverflow, SinkWithoutMask,
    EmptyPagedCache, InvalidPagedBlockSize, PagedHeadDimMismatch for bad input, UnsupportedCell for a combination without a kernel, MockMode
    where there is no GPU, CompileError, CompileDisabled.
    """
    is_number = isinstance(cache_seqlens, _NUMBERS)
    num_cached = int(cache_seqlens) if is_number else 0
    lengths = None if is_number else cache_seqlens
    of_rows = (q, k_cache, v_cache, k, v, rotary_cos, rotary_sin)
    arrays = (*of_rows, lengths, cache_batch_idx, block_table, cu_seqlens_q, cu_seqlens_k_new, rotary_seqlens, cache_leftpad)
    check_tables(block_table is not None, cache_batch_idx is not None, cache_leftpad is not None)
    _check_arguments(cache_seqlens, k, cache_leftpad, num_splits, out_dtype)
    masks = mask_options(causal, window_size, sink_tokens, None, None)
    turns = (bool(rotary_interleaved), bool(causal or masks[1] != (-1, -1)))  # queries turn as the mask has them stand
    of_cache = (max_seqlen_q, None, True, num_splits, None, None)  # from max_seqlen_q on
    options = (softmax_scale, *masks, None, softcap, 0.0, is_float32(out_dtype), family, *of_cache)
    extras = (alibi_slopes, learnable_sink)
    if backend == "reference":
        return _reference(arrays, num_cached if is_number else None, turns, options, extras, out, return_softmax_lse, check)
    if backend != "cuda":
        raise InvalidArgument(f"backend={backend!r}: accepted are {', '.join(BACKENDS)}")
    library, before = library_of(type(q)), None
    if check:
        problem = _problem(library, arrays, turns, "sm_90a")
        named = dict(zip(APPEND_NAMES, arrays, strict=True))
        check_cache_numbers(library, problem, named, num_cached if is_number else None, max_seqlen_q)
    if is_number or not (k is v is cu_seqlens_k_new is rotary_cos is rotary_sin is rotary_seqlens is None):
        q, lengths, before = prepare_append(library, append_plan(library, arrays, turns), arrays, num_cached)
    caches, tables = (k_cache, v_cache), (lengths, block_table, cache_batch_idx, cache_leftpad, cu_seqlens_q)
    return paged_forward(q, caches, tables, options, extras, out, return_softmax_lse, before)


def paged_forward(
    q: Any,
    caches: tuple[Any, Any],
    tables: tuple[Any, Any, Any, Any, Any],
    options: tuple[Any, ...],
    extras: tuple[Any, Any],
    out: Any,
    return_lse: bool,
    before: Callable[[], None] | None,
) -> Any:
    """Attention over caches.

    q: as the caller has it, or turned. caches: k_cache, v_cache. tables: lengths (batch,) or None for whole caches, block_table,
    cache_batch_idx, cache_leftpad, cu_seqlens_q, each an array or None. options, extras: as api.forward has them. before: launches what
    comes first, to be called when nothing can be refused any more."""
    lengths, block_table, cache_batch_idx, cache_leftpad, cu_seqlens_q = tables
    pages = cache_batch_idx if block_table is None else block_table
    arrays = (*extras, cu_seqlens_q, None, None, lengths, pages, cache_leftpad, *NO_DESCALES)
    found = forward(q, *caches, out, return_lse, options, arrays, (0, 0), "cuda", before)
    if not return_lse or cu_seqlens_q is not None:
        return found
    out, lse = found
    return out, lse.reshape((lse.shape[0], q.shape[0], q.shape[1])).swapaxes(0, 1)


# ---- before attention ----------------------------------------------------------------------------------------------------------------

_plans: dict[tuple[Any, ...], AppendPlan] = {}


def append_plan(library: ArrayLibrary, arrays: tuple[Any, ...], turns: tuple[bool, bool]) -> AppendPlan:
    """The launch plan of what comes before attention. arrays: in the order of APPEND_NAMES, None where there is none. turns:
    rotary_interleaved, successive_queries."""
    return plan_of(_plans, _make_plan, library, APPEND_NAMES, arrays, turns)


def _make_plan(library: ArrayLibrary, arrays: tuple[Any, ...], turns: tuple[bool, bool], _extras: tuple[Any, ...]) -> AppendPlan:
    device = library.spec(arrays[0]).device
    # Shapes are checked for CPU arrays too, as for a Hopper GPU, before their place in memory is refused.
    problem = _problem(library, arrays, turns, device_info(device).arch if device >= 0 else "sm_90a")
    if device < 0:
        raise not_on_gpu(library)
    check_current_device(device)
    return AppendPlan(problem, kernels.get(problem.dispatch_key()))


def _problem(library: ArrayLibrary, arrays: tuple[Any, ...], turns: tuple[bool, bool], arch: str) -> AppendProblem:
    specs = {name: None if array is None else library.spec(array) for name, array in zip(APPEND_NAMES, arrays, strict=True)}
    return AppendProblem.from_specs(specs, arch=arch, rotary_interleaved=turns[0], successive_queries=turns[1])


def prepare_append(
    library: ArrayLibrary, plan: AppendPlan, arrays: tuple[Any, ...], num_cached: int
) -> tuple[Any, Any, Callable[[], None]]:
    """(q, lengths, launch): what attention is given, made when launch() has run: q turned where there is rotary, int32 (batch,) lengths.

    arrays: in the order of APPEND_NAMES. num_cached: keys of every sequence where they are no array. Raises InvalidArgument where it does
    not fit the cache, or an array is not aligned."""
    problem = plan.problem
    device = problem.arrays.q.device
    if arrays[_LENGTHS] is None:
        _check_number(problem, num_cached)
    lengths = library.empty((problem.batch,), "i32", device)
    q, results = arrays[0], [lengths]
    if problem.has_rotary:
        q = library.empty(tuple(q.shape), problem.arrays.q.dtype, device)
        results.append(q)
    stream = library.current_stream(device)
    library.retain(results, stream)
    addresses = library.pointers([*[arrays[i] for i in plan.arrays], *results])
    _check_alignment(plan, addresses)
    return q, lengths, lambda: plan.run(addresses, num_cached, stream)


def _check_number(problem: AppendProblem, num_cached: int) -> None:
    rows = problem.total_new // problem.batch if problem.arrays.cu_seqlens_k_new is None else 0  # of packed ones the device knows
    if not 0 <= num_cached <= problem.cache.capacity - rows:
        raise InvalidArgument(
            f"cache_seqlens={num_cached} and {rows} new rows: the cache has room for {problem.cache.capacity} keys of a sequence"
        )


_LENGTHS = APPEND_NAMES.index("cache_seqlens")


def _check_alignment(plan: AppendPlan, addresses: tuple[int, ...]) -> None:
    """Raises InvalidArgument, naming the array, unless rows begin at multiples of 16 bytes. Numbers are read one by one."""
    merged = 0
    for address in addresses[: plan.num_row_arrays]:
        merged |= address
    if merged % ALIGNMENT_BYTES == 0:
        return
    i, address = next(pair for pair in zip(plan.arrays, addresses, strict=False) if pair[1] % ALIGNMENT_BYTES)
    raise InvalidArgument(
        f"{APPEND_NAMES[i]} starts at address {address:#x}, not a multiple of {ALIGNMENT_BYTES} bytes; copy it to a fresh array"
    )


def _check_arguments(cache_seqlens: Any, k: Any, cache_leftpad: Any, num_splits: int, out_dtype: Any) -> None:
    if k is not None and cache_seqlens is None:
        raise InvalidArgument("cache_seqlens is None and k is given: it says where in the cache the new rows go")
    if cache_leftpad is not None and cache_seqlens is None:
        raise InvalidArgument("cache_leftpad is given and cache_seqlens is None: pass the lengths too, padding included")
    if num_splits < 0:
        raise InvalidArgument(f"num_splits={num_splits}: must be 0 (as many as fill the GPU) or a positive number of CTAs")
    if out_dtype is not None and not is_float32(out_dtype):
        raise InvalidArgument(f"out_dtype={out_dtype}: accepted are 'float32', the array library's float32, and None for q's dtype")


# ---- reference -----------------------------------------------------------------------------------------------------------------------


def _reference(
    arrays: tuple[Any, ...],
    num_cached: int | None,
    turns: tuple[bool, bool],
    options: tuple[Any, ...],
    extras: tuple[Any, Any],
    out: Any,
    return_lse: bool,
    check: bool,
) -> Any:
    """The same call on NumPy arrays, in float64, rounded where the kernels round: the cache, turned queries, the result."""
    from .reference_kvcache import cached_attention, prepare

    q, k_cache, v_cache, k = arrays[:4]
    library = reference_library(q)
    check_one_library((*APPEND_NAMES, *_EXTRA_NAMES, "out"), (*arrays, *extras, out))
    problem = _problem(library, arrays, turns, "sm_90a")
    if num_cached is not None:
        _check_number(problem, num_cached)
    given, call = dict(zip(APPEND_NAMES, arrays, strict=True)), dict(zip(OPTION_NAMES, options, strict=True))
    attention = _attention_options(library, problem, call, extras)
    dtype = "float32" if call["float_out"] else q.dtype
    if out is not None:
        like = library.spec(q)
        check_out(library.spec(out), replace(like, dtype="float32") if call["float_out"] else like)
    if check:
        check_cache_numbers(library, problem, given, num_cached, call["max_seqlen_q"])
    given["cache_seqlens"] = num_cached if num_cached is not None else given["cache_seqlens"]
    places = {name: given[name] for name in ("cache_batch_idx", "block_table", "cu_seqlens_q")}
    cache_leftpad = given.pop("cache_leftpad")
    ready = prepare(**given, rotary_interleaved=turns[0], successive_queries=turns[1])
    if k is not None:
        k_cache[...], v_cache[...] = ready.k_cache.astype(q.dtype), ready.v_cache.astype(q.dtype)
    turned = ready.q.astype(q.dtype)
    result, lse = cached_attention(turned, k_cache, v_cache, ready.seqlens_k, cache_leftpad=cache_leftpad, **places, **attention)
    if out is None:
        out = result.astype(dtype)
    else:
        out[...] = result.astype(dtype)
    return (out, lse.astype("float32")) if return_lse else out


_EXTRA_NAMES = ("alibi_slopes", "learnable_sink")


def _attention_options(library: ArrayLibrary, problem: AppendProblem, call: Mapping[str, Any], extras: tuple[Any, Any]) -> dict[str, Any]:
    """What the reference's attention is told, refused where the kernels would refuse it."""
    q, total, capacity = problem.arrays.q, problem.total_q, problem.cache.capacity
    own = {name: call[name] for name in ("softmax_scale", "sink_tokens", "softcap")}
    ExtraSpecs.of(library, extras).check(q, problem.batch, problem.arrays.k_cache.shape[2], capacity)
    VarlenFwdRequest(
        cu_seqlens=CumulativeSeqlens(total, problem.batch * capacity),
        batch=problem.batch,
        seqlen_q=total if call["max_seqlen_q"] is None else min(call["max_seqlen_q"], total),
        seqlen_k=capacity,
        num_heads_q=q.shape[2],
        num_heads_kv=problem.arrays.k_cache.shape[2],
        head_dim=q.shape[3],
        dtype=q.dtype,
        mask=mask_of(call["window_size"], call["causal"]),
        position_bias=PositionBias(extras[0] is not None),
        learnable_sink=extras[1] is not None,
        family=call["family"],
        **own,
    )
    return {**own, "causal": call["causal"], "window_size": call["window_size"], **dict(zip(_EXTRA_NAMES, extras, strict=True))}
