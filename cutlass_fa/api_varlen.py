"""The public functions on packed sequences."""

from __future__ import annotations

from itertools import pairwise
from typing import Any

from .api import forward, is_float32, mask_options
from .api_backward import backward
from .api_fp8 import fp8_arguments
from .arrays import library_of
from .errors import InvalidArgument, SeqlenOverflow
from .extras import NO_DESCALES
from .request_parts import MAX_SEQLEN, PersistentMode


def flash_attn_varlen_func(
    q: Any,
    k: Any,
    v: Any,
    cu_seqlens_q: Any,
    cu_seqlens_k: Any,
    max_seqlen_q: int | None = None,
    max_seqlen_k: int | None = None,
    *,
    seqused_q: Any = None,
    seqused_k: Any = None,
    softmax_scale: float | None = None,
    causal: bool = False,
    window_size: tuple[int, int] = (-1, -1),
    sink_tokens: int = 0,
    alibi_slopes: Any = None,
    learnable_sink: Any = None,
    softcap: float = 0.0,
    dropout_p: float = 0.0,
    dropout_seed: int = 0,
    dropout_offset: int = 0,
    q_offset: int | None = None,
    k_offset: int | None = None,
    q_descale: Any = None,
    k_descale: Any = None,
    v_descale: Any = None,
    accumulate: str | None = None,
    dtype: Any = None,
    v_dtype: Any = None,
    out_dtype: Any = None,
    out: Any = None,
    return_lse: bool = False,
    persistent: PersistentMode | None = None,
    family: str | None = None,
    check: bool = False,
    backend: str = "cuda",
) -> Any:
    """flash_attn_func on sequences of different lengths, one after the other in arrays without a batch dimension.

    q: (total_q, num_heads_q, head_dim); k, v: (total_k, num_heads_kv, head_dim); dtypes, strides and all other arguments as flash_attn_func
        has them, alibi_slopes also (batch, num_heads_q); q_offset and k_offset are those of every sequence. Factors for each 128 keys are
        counted from each sequence's first key, as many as the longest (max_seqlen_k, or total_k) has.
    cu_seqlens_q, cu_seqlens_k: int32 (batch + 1,), on the GPU: sequence b owns rows cu_seqlens[b] to cu_seqlens[b + 1]. The first number is
        0. Sequences may be empty, in q, in k, or in both.
    max_seqlen_q, max_seqlen_k: lengths that no sequence exceeds. None (the default): not known. A hint for choosing a kernel, no more: the
        kernels find the lengths themselves, and nothing waits for the GPU.
    seqused_q, seqused_k: int32 (batch,): only the first so many of a sequence's rows are in use; default: all.
    check: wait for the GPU and look at the numbers: cu_seqlens begin at 0, do not decrease and end within the arrays, seqused are within
        the sequences, max_seqlen are not exceeded. Without it wrong numbers give wrong results, but reach no memory outside the arrays.

    Returns out like q, or (out, lse) with lse float32 (num_heads_q, total_q). Rows of q that are not in use, those after the last sequence
    included, get out 0 and lse -inf. Raises what flash_attn_func raises, and with check InvalidArgument and SeqlenOverflow for the numbers.
    """
    masks = mask_options(causal, window_size, sink_tokens, q_offset, k_offset)
    fp8 = fp8_arguments(accumulate, (q_descale, k_descale, v_descale), out_dtype, dtype, v_dtype)
    more = (max_seqlen_q, max_seqlen_k, False, 0, fp8.options, fp8.bits)
    options = (softmax_scale, *masks, persistent, softcap, dropout_p, is_float32(out_dtype), family, *more)
    _check_side("q", cu_seqlens_q, seqused_q, max_seqlen_q, q, check)
    _check_side("k", cu_seqlens_k, seqused_k, max_seqlen_k, k, check)
    extras = (alibi_slopes, learnable_sink, cu_seqlens_q, cu_seqlens_k, seqused_q, seqused_k, None, None, *fp8.factors)
    return forward(q, k, v, out, return_lse, options, extras, (dropout_seed, dropout_offset), backend)


def flash_attn_varlen_backward(
    dout: Any,
    q: Any,
    k: Any,
    v: Any,
    cu_seqlens_q: Any,
    cu_seqlens_k: Any,
    max_seqlen_q: int | None = None,
    max_seqlen_k: int | None = None,
    out: Any = None,
    lse: Any = None,
    *,
    seqused_q: Any = None,
    seqused_k: Any = None,
    softmax_scale: float | None = None,
    causal: bool = False,
    window_size: tuple[int, int] = (-1, -1),
    sink_tokens: int = 0,
    alibi_slopes: Any = None,
    learnable_sink: Any = None,
    softcap: float = 0.0,
    dropout_p: float = 0.0,
    dropout_seed: int = 0,
    dropout_offset: int = 0,
    q_offset: int | None = None,
    k_offset: int | None = None,
    deterministic: bool = False,
    dlse: Any = None,
    recompute: bool = False,
    dq: Any = None,
    dk: Any = None,
    dv: Any = None,
    dlearnable_sink: Any = None,
    check: bool = False,
    backend: str = "cuda",
) -> tuple[Any, ...]:
    """Gradients of flash_attn_varlen_func, as flash_attn_backward's.

    dout, out, dq: (total_q, num_heads_q, head_dim); dk, dv: (total_k, num_heads_kv, head_dim); lse, dlse: (num_heads_q, total_q).
    cu_seqlens, max_seqlen, seqused and check: as the forward had them. All other arguments as flash_attn_backward has them.

    Returns (dq, dk, dv), and dlearnable_sink where there is one; rows that are not in use get 0. Raises what flash_attn_backward raises,
    and with check InvalidArgument and SeqlenOverflow for the numbers.
    """
    masks = mask_options(causal, window_size, sink_tokens, q_offset, k_offset)
    options = (softmax_scale, *masks, softcap, dropout_p, deterministic, recompute, max_seqlen_q, max_seqlen_k)
    _check_side("q", cu_seqlens_q, seqused_q, max_seqlen_q, q, check)
    _check_side("k", cu_seqlens_k, seqused_k, max_seqlen_k, k, check)
    extras = (alibi_slopes, learnable_sink, cu_seqlens_q, cu_seqlens_k, seqused_q, seqused_k, None, None, *NO_DESCALES)
    arrays = (q, k, v, out, dout, lse, dlse, dq, dk, dv, dlearnable_sink)
    return backward(arrays, options, extras, (dropout_seed, dropout_offset), backend)


def _check_side(side: str, cu_seqlens: Any, seqused: Any, max_seqlen: int | None, rows: Any, check: bool) -> None:
    """Raises InvalidArgument where cu_seqlens is None, and with check what check_sequences raises. rows: q or k."""
    if cu_seqlens is None:
        raise InvalidArgument(
            f"cu_seqlens_{side} is None: packed sequences need to be told apart; flash_attn_func takes a batch of equal ones"
        )
    if check:
        check_sequences(side, cu_seqlens, seqused, max_seqlen, rows.shape[0])


def check_sequences(side: str, cu_seqlens: Any, seqused: Any, max_seqlen: int | None, total: int) -> None:
    """Raises InvalidArgument or SeqlenOverflow where the numbers contradict each other or the `total` rows. Waits for the GPU.

    side: "q" or "k"."""
    library = library_of(type(cu_seqlens))
    starts = [int(start) for start in library.numbers(cu_seqlens)]
    name = f"cu_seqlens_{side}"
    if not starts or starts[0] != 0:
        raise InvalidArgument(f"{name} begins with {starts[:1]}: expected 0")
    lengths = [end - start for start, end in pairwise(starts)]
    for sequence, length in enumerate(lengths):
        if length < 0:
            raise InvalidArgument(f"{name}[{sequence + 1}]={starts[sequence + 1]} is less than the number before it, {starts[sequence]}")
        if max_seqlen is not None and length > max_seqlen:
            raise InvalidArgument(f"sequence {sequence} of {name} has {length} rows, more than max_seqlen_{side}={max_seqlen}")
    if starts[-1] > MAX_SEQLEN:
        raise SeqlenOverflow(f"{name} ends with {starts[-1]}: positions are 31-bit; at most {MAX_SEQLEN}")
    if starts[-1] > total:
        raise InvalidArgument(f"{name} ends with {starts[-1]}, and there are {total} rows")
    for sequence, (used, length) in enumerate(zip([] if seqused is None else library.numbers(seqused), lengths, strict=False)):
        if not 0 <= used <= length:
            raise InvalidArgument(f"seqused_{side}[{sequence}]={used}: the sequence has {length} rows")
