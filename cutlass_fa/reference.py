"""Attention in float64, straight from its definition: the oracle of the tests and ``backend="reference"``.

Written for reading, not for speed: one (sequence, query head) pair at a time, whole score matrices, no tiles.
Runs on the array module of its inputs, NumPy or CuPy. Inputs may have any floating dtype (float16,
``ml_dtypes.bfloat16``, fp8 of ml_dtypes, ...) and are converted to float64 first; every result is float64.

Shapes, everywhere in this module:
    dense   q (batch, seqlen_q, num_heads_q, head_dim), k (batch, seqlen_k, num_heads_kv, head_dim), v (batch,
            seqlen_k, num_heads_kv, head_dim_v), out as q but head_dim_v, lse (batch, num_heads_q, seqlen_q)
    packed  q (total_q, num_heads_q, head_dim), k, v (total_k, num_heads_kv, ...), lse (num_heads_q, total_q)
lse is in natural log. Query head h reads key head h // (num_heads_q // num_heads_kv). A row with no allowed
key has out 0 and lse -inf (or, with a learnable sink, lse equal to the sink's logit).
"""

from __future__ import annotations

import importlib
import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from types import ModuleType
from typing import Any, TypeAlias

import numpy as np

from .extras import DESCALE_BLOCK

Array: TypeAlias = Any  # numpy.ndarray or cupy.ndarray

_UNBOUNDED = 1 << 60  # a distance that no two positions have


@dataclass(frozen=True, eq=False)
class AttentionOptions:
    """The keyword arguments that every function of this module takes after its arrays.

    Attributes:
        softmax_scale: factor of q @ k.T; default 1 / sqrt(head_dim).
        causal: allow key j only where j <= position.
        window_size: (left, right): allow position - left <= j <= position + right; -1 is unbounded.
        sink_tokens: keys j < sink_tokens are allowed outside the window too, within the causal limit.
        softcap: scaled scores s become softcap * tanh(s / softcap), before bias and masks; 0 is off.
        alibi_slopes: (num_heads_q,) or (batch, num_heads_q); adds -slope * abs(position - j) to the scores.
        learnable_sink: (num_heads_q,); a logit that joins the softmax denominator and lse, with no value.
        q_offset, k_offset: int or (batch,); query i stands at i + q_offset, key j at j + k_offset. Given one,
            the other is 0. Given neither, the last query stands at the last key (bottom-right alignment).
        dropout_mask: bool (batch, num_heads_q, seqlen_q, seqlen_k), True = keep; shorter sequences use its
            top left corner. Kept probabilities are multiplied by 1 / (1 - dropout_p); lse does not change.
        dropout_p: what the mask was drawn with; dropout_p without a mask raises ValueError.
        q_descale, k_descale, v_descale: float or (batch, num_heads_kv); factors of the stored q, k, v. The latter
            two also (batch, num_heads_kv, blocks): a factor for each DESCALE_BLOCK keys of a sequence.
        cu_seqlens_q, cu_seqlens_k: int (batch + 1,), of packed arrays: sequence b owns rows cu_seqlens[b] to
            cu_seqlens[b + 1].
        seqused_q, seqused_k: int (batch,): only the first so many of a sequence's rows exist; by default all.
    """

    softmax_scale: float | None = None
    causal: bool = False
    window_size: tuple[int, int] = (-1, -1)
    sink_tokens: int = 0
    softcap: float = 0.0
    alibi_slopes: Array | None = None
    learnable_sink: Array | None = None
    q_offset: Array | int | None = None
    k_offset: Array | int | None = None
    dropout_mask: Array | None = None
    dropout_p: float = 0.0
    q_descale: Array | float | None = None
    k_descale: Array | float | None = None
    v_descale: Array | float | None = None
    cu_seqlens_q: Array | None = None
    cu_seqlens_k: Array | None = None
    seqused_q: Array | None = None
    seqused_k: Array | None = None

    def __post_init__(self) -> None:
        if self.dropout_p and self.dropout_mask is None:
            raise ValueError(f"dropout_p={self.dropout_p} needs dropout_mask: the reference draws no numbers")


@dataclass(frozen=True, eq=False)
class Head:
    """One (sequence, query head) pair: its slices of the inputs, and its own numbers out of the options."""

    q: Array  # (seqlen_q, head_dim), as stored
    k: Array  # (seqlen_k, head_dim)
    v: Array  # (seqlen_k, head_dim_v)
    allowed: Array  # (seqlen_q, seqlen_k) bool
    distance: Array  # (seqlen_q, seqlen_k) int, abs(position - key)
    dropout: Array | float  # (seqlen_q, seqlen_k) factor of the probabilities: 0 or 1 / (1 - dropout_p)
    softmax_scale: float
    softcap: float  # 0 without
    alibi_slope: float  # 0 without
    sink: float  # logit of the learnable sink, -inf without
    descale: list[Array | float]  # factors of q, k, v: numbers, or (seqlen_k, 1)
    rows_q: slice  # where q lies in the packed queries
    rows_k: slice
    index: int  # of the query head
    kv_index: int


@dataclass(frozen=True, eq=False)
class Gradients:
    """Gradients with the shapes of q, k, v; dlearnable_sink (num_heads_q,), None without a learnable sink."""

    dq: Array
    dk: Array
    dv: Array
    dlearnable_sink: Array | None = None


def array_module(x: Array) -> ModuleType:
    """The module whose functions take ``x``: cupy for a CuPy array, otherwise numpy."""
    return importlib.import_module("cupy") if type(x).__module__.split(".")[0] == "cupy" else np


def allowed_keys(
    seqlen_q: int,
    seqlen_k: int,
    *,
    causal: bool = False,
    window_size: tuple[int, int] = (-1, -1),
    sink_tokens: int = 0,
    q_offset: int | None = None,
    k_offset: int | None = None,
    xp: ModuleType = np,
) -> Array:
    """Which keys each query may see: bool (seqlen_q, seqlen_k). The options are those of AttentionOptions."""
    position, key = _positions(seqlen_q, seqlen_k, q_offset, k_offset, xp)
    left, right = (side if side >= 0 else _UNBOUNDED for side in window_size)
    in_window = (key >= position - left) & (key <= position + right)
    in_sink = key < sink_tokens
    not_future = key <= position + (0 if causal else _UNBOUNDED)
    return (in_window | in_sink) & not_future


def attention_forward(q: Array, k: Array, v: Array, **options: Any) -> tuple[Array, Array]:
    """Attention of dense batches, ``(out, lse)``; shapes as in the module docstring.

    Raises ValueError where num_heads_q is not a multiple of num_heads_kv, TypeError for an unknown option.
    """
    return forward_by_head(_head_forward, q, k, v, AttentionOptions(**options))


def attention_backward(dout: Array, q: Array, k: Array, v: Array, *, dlse: Array | None = None, **options: Any) -> Gradients:
    """Exact gradients of ``sum(out * dout) + sum(lse * dlse)``; dlse has the shape of lse, None is 0.

    With descale factors, gradients are those of the stored q, k, v.
    """
    return backward_by_head(_head_backward, dout, dlse, q, k, v, AttentionOptions(**options))


def attention_varlen_forward(q: Array, k: Array, v: Array, cu_seqlens_q: Array, cu_seqlens_k: Array, **options: Any) -> tuple[Array, Array]:
    """Attention of packed sequences, ``(out, lse)``; rows that no sequence uses have out 0 and lse -inf."""
    return attention_forward(q, k, v, cu_seqlens_q=cu_seqlens_q, cu_seqlens_k=cu_seqlens_k, **options)


def attention_varlen_backward(
    dout: Array, q: Array, k: Array, v: Array, cu_seqlens_q: Array, cu_seqlens_k: Array, **options: Any
) -> Gradients:
    """Gradients of attention_varlen_forward, as attention_backward's; 0 in rows that no sequence uses."""
    return attention_backward(dout, q, k, v, cu_seqlens_q=cu_seqlens_q, cu_seqlens_k=cu_seqlens_k, **options)


def gather_paged_kv(cache: Array, block_table: Array, seq_lens: Array) -> list[Array]:
    """The keys (or values) of each sequence of a paged cache, contiguous, in the cache's dtype.

    cache (num_blocks, block_size, num_heads_kv, head_dim), block_table int (num_seqs, max_blocks), seq_lens
    (num_seqs,) -> num_seqs arrays (seq_len, num_heads_kv, head_dim).
    """
    block_size, xp = cache.shape[1], array_module(cache)
    sequences = []
    for blocks, seq_len in zip(_host(block_table), _host(seq_lens), strict=True):
        empty = xp.zeros((0, *cache.shape[2:]), cache.dtype)
        used_blocks = blocks[: math.ceil(seq_len / block_size)]
        sequences.append(xp.concatenate([empty, *(cache[int(block)] for block in used_blocks)])[:seq_len])
    return sequences


def attention_paged_forward(
    q: Array, k_cache: Array, v_cache: Array, block_table: Array, seq_lens: Array, **options: Any
) -> tuple[Array, Array]:
    """Attention over a paged cache, ``(out, lse)``: gather_paged_kv, then packed attention.

    q is dense (num_seqs, seqlen_q, ...), or packed with cu_seqlens_q among the options; out and lse follow q.
    """
    xp = array_module(q)
    k, v = (xp.concatenate(gather_paged_kv(cache, block_table, seq_lens)) for cache in (k_cache, v_cache))
    cu_seqlens_k = [0, *np.cumsum(_host(seq_lens))]
    return attention_forward(q, k, v, cu_seqlens_k=cu_seqlens_k, **options)


def merge_states(out_a: Array, lse_a: Array, out_b: Array, lse_b: Array) -> tuple[Array, Array]:
    """``(out, lse)`` over the union of two disjoint sets of keys, from the results over each.

    A row whose lse is -inf has seen no key and adds nothing, whatever its out holds.
    """
    xp = array_module(lse_a)
    partial_lse = xp.stack([as_float64(lse_a), as_float64(lse_b)])
    lse = _logsumexp(partial_lse, axis=0)
    weights = xp.swapaxes(xp.exp(partial_lse - _zero_where_empty(lse)), -1, -2)[..., None]
    partial_out = xp.stack([as_float64(out_a), as_float64(out_b)])
    return xp.where(weights > 0, weights * partial_out, 0.0).sum(axis=0), lse


def _head_forward(head: Head) -> tuple[Array, Array]:
    """out (seqlen_q, head_dim_v), lse (seqlen_q,)."""
    q, k, v = _descaled(head)
    probability, _, lse = _softmax(head, _capped_scores(head, q, k))
    return (probability * head.dropout) @ v, lse


def _head_backward(head: Head, dout: Array, dlse: Array) -> Gradients:
    """dout (seqlen_q, head_dim_v), dlse (seqlen_q,), float64."""
    q, k, v = _descaled(head)
    capped = _capped_scores(head, q, k)
    probability, sink_probability, _ = _softmax(head, capped)
    dprobability = (dout @ v.T) * head.dropout
    # d softmax: dS = P * (dP - rowsum(P * dP)); d lse / dS = P. The sink is one more column, with dP = 0.
    row_term = dlse - (probability * dprobability).sum(axis=1)
    dscores = probability * (dprobability + row_term[:, None]) * head.softmax_scale
    if head.softcap:
        dscores *= 1.0 - (capped / head.softcap) ** 2
    return Gradients(
        dq=dscores @ k * head.descale[0],
        dk=dscores.T @ q * head.descale[1],
        dv=(probability * head.dropout).T @ dout * head.descale[2],
        dlearnable_sink=(sink_probability * row_term).sum(),
    )


def _descaled(head: Head) -> tuple[Array, ...]:
    stored = (head.q, head.k, head.v)
    return tuple(as_float64(x) * descale for x, descale in zip(stored, head.descale, strict=True))


def _capped_scores(head: Head, q: Array, k: Array) -> Array:
    """Scaled and capped scores (seqlen_q, seqlen_k), before bias and mask."""
    scores = head.softmax_scale * (q @ k.T)
    return head.softcap * array_module(q).tanh(scores / head.softcap) if head.softcap else scores


def _softmax(head: Head, capped_scores: Array) -> tuple[Array, Array, Array]:
    """Probabilities of the keys (seqlen_q, seqlen_k) and of the sink (seqlen_q,), and lse (seqlen_q,)."""
    xp = array_module(capped_scores)
    scores = xp.where(head.allowed, capped_scores - head.alibi_slope * head.distance, -math.inf)
    sink = xp.full((scores.shape[0], 1), head.sink)
    logits = xp.concatenate([scores, sink], axis=1)  # (seqlen_q, seqlen_k + 1)
    lse = _logsumexp(logits, axis=1)
    probability = xp.exp(logits - _zero_where_empty(lse)[:, None])
    return probability[:, :-1], probability[:, -1], lse


def _logsumexp(x: Array, axis: int) -> Array:
    xp = array_module(x)
    largest = _zero_where_empty(x.max(axis=axis))
    with np.errstate(divide="ignore"):  # log(0) = -inf is the right answer for an empty sum
        return largest + xp.log(xp.exp(x - xp.expand_dims(largest, axis)).sum(axis=axis))


def _zero_where_empty(log_value: Array) -> Array:
    """-inf replaced by 0, so that exp(-inf - log_value) is 0 and not NaN."""
    return array_module(log_value).where(log_value == -math.inf, 0.0, log_value)


def forward_by_head(
    compute: Callable[[Head], tuple[Array, Array]], q: Array, k: Array, v: Array, options: AttentionOptions
) -> tuple[Array, Array]:
    """``(out, lse)`` in float64 with ``compute(head) -> (out, lse)`` doing the arithmetic of every Head.

    q is dense (4 dimensions) or packed (3), and so are k and v, apart from q. A ``compute`` other than this
    module's gives the same attention in another arithmetic.
    """
    xp = array_module(q)
    total_q, num_heads_q = math.prod(q.shape[:-2]), q.shape[-2]
    out = xp.zeros((total_q, num_heads_q, v.shape[-1]))
    lse = xp.full((num_heads_q, total_q), -math.inf)
    for head in _heads(q, k, v, options):
        out[head.rows_q, head.index], lse[head.index, head.rows_q] = compute(head)
    if q.ndim == 4:
        lse = lse.reshape((num_heads_q, *q.shape[:2])).swapaxes(0, 1)
    return out.reshape((*q.shape[:-1], v.shape[-1])), lse


def backward_by_head(
    compute: Callable[[Head, Array, Array], Gradients],
    dout: Array,
    dlse: Array | None,
    q: Array,
    k: Array,
    v: Array,
    options: AttentionOptions,
) -> Gradients:
    """Gradients in float64 with ``compute(head, dout, dlse)``; query heads add up in their key head."""
    xp = array_module(q)
    dout, num_heads_q = _packed(as_float64(dout)), q.shape[-2]
    dlse = xp.zeros((num_heads_q, dout.shape[0])) if dlse is None else as_float64(dlse)
    if dlse.ndim == 3:  # dense: (batch, num_heads_q, seqlen_q)
        dlse = dlse.swapaxes(0, 1).reshape((num_heads_q, dout.shape[0]))
    dq, dk, dv, dsink = (*(xp.zeros(_packed(x).shape) for x in (q, k, v)), xp.zeros(num_heads_q))
    for head in _heads(q, k, v, options):
        h, kv = head.index, head.kv_index
        gradients = compute(head, dout[head.rows_q, h], dlse[h, head.rows_q])
        dq[head.rows_q, h] = gradients.dq
        dk[head.rows_k, kv] += gradients.dk
        dv[head.rows_k, kv] += gradients.dv
        dsink[h] += gradients.dlearnable_sink
    dsink = None if options.learnable_sink is None else dsink
    return Gradients(dq.reshape(q.shape), dk.reshape(k.shape), dv.reshape(v.shape), dsink)


def as_float64(x: Array) -> Array:
    """``x`` in float64, in its own array module."""
    return array_module(x).asarray(x).astype(np.float64)


def _heads(q: Array, k: Array, v: Array, options: AttentionOptions) -> Iterator[Head]:
    """Every (sequence, query head) pair of dense or packed arrays."""
    if q.shape[-2] % k.shape[-2]:
        raise ValueError(f"num_heads_q={q.shape[-2]} is not a multiple of num_heads_kv={k.shape[-2]}")
    rows_q = _rows(q, options.cu_seqlens_q, options.seqused_q)
    rows_k = _rows(k, options.cu_seqlens_k, options.seqused_k)
    q, k, v = _packed(q), _packed(k), _packed(v)
    for sequence, rows in enumerate(zip(rows_q, rows_k, strict=True)):
        yield from _sequence_heads(q, k, v, sequence, *rows, options)


def _sequence_heads(q: Array, k: Array, v: Array, sequence: int, rows_q: slice, rows_k: slice, options: AttentionOptions) -> Iterator[Head]:
    """The heads of one sequence of packed arrays; they share its mask and distances."""
    xp, num_heads_q, num_heads_kv = array_module(q), q.shape[1], k.shape[1]
    seqlens = (rows_q.stop - rows_q.start, rows_k.stop - rows_k.start)
    q_offset, k_offset = (_entry(x, None, sequence) for x in (options.q_offset, options.k_offset))
    position, key = _positions(*seqlens, q_offset, k_offset, xp)
    distance = xp.abs(position - key)
    mask: dict[str, Any] = {name: getattr(options, name) for name in ("causal", "window_size", "sink_tokens")}
    allowed = allowed_keys(*seqlens, **mask, q_offset=q_offset, k_offset=k_offset, xp=xp)
    scale = 1.0 / math.sqrt(q.shape[-1]) if options.softmax_scale is None else options.softmax_scale
    descales = (options.q_descale, options.k_descale, options.v_descale)
    dropout: Array | float = 1.0
    for h in range(num_heads_q):
        kv = h // (num_heads_q // num_heads_kv)
        if options.dropout_mask is not None:
            kept = options.dropout_mask[sequence, h, : seqlens[0], : seqlens[1]]
            dropout = xp.asarray(kept) / (1.0 - options.dropout_p)
        yield Head(
            q=q[rows_q, h],
            k=k[rows_k, kv],
            v=v[rows_k, kv],
            allowed=allowed,
            distance=distance,
            dropout=dropout,
            softmax_scale=scale,
            softcap=options.softcap,
            alibi_slope=_entry(options.alibi_slopes, 0.0, sequence, h),
            sink=_entry(options.learnable_sink, -math.inf, sequence, h),
            descale=[_factor(x, seqlens[1], xp, sequence, kv) for x in descales],
            rows_q=rows_q,
            rows_k=rows_k,
            index=h,
            kv_index=kv,
        )


def _positions(seqlen_q: int, seqlen_k: int, q_offset: int | None, k_offset: int | None, xp: ModuleType) -> tuple[Array, Array]:
    """Where the queries (seqlen_q, 1) and the keys (1, seqlen_k) stand."""
    if q_offset is None and k_offset is None:
        q_offset = seqlen_k - seqlen_q
    return xp.arange(seqlen_q)[:, None] + (q_offset or 0), xp.arange(seqlen_k)[None, :] + (k_offset or 0)


def _packed(x: Array) -> Array:
    return x.reshape((math.prod(x.shape[:-2]), *x.shape[-2:]))


def _rows(x: Array, cu_seqlens: Array | None, seqused: Array | None) -> list[slice]:
    """The packed rows that each sequence uses: all that it owns, or the first seqused of them."""
    if (x.ndim == 4) != (cu_seqlens is None):
        raise ValueError(f"packed arrays need cu_seqlens and dense ones take none; got shape {x.shape}")
    # A dense batch is a packed one of equal lengths.
    starts = np.arange(x.shape[0] + 1) * x.shape[1] if cu_seqlens is None else _host(cu_seqlens)
    lengths = np.diff(starts) if seqused is None else _host(seqused)
    return [slice(int(row), int(row + length)) for row, length in zip(starts[:-1], lengths, strict=True)]


def _entry(option: Array | float | None, default: Any, *index: int) -> Any:
    """The number of an option at (sequence, head) or (sequence,); its array may lack the leading axes."""
    if option is None:
        return default
    table = _host(option)
    return table[index[len(index) - table.ndim :]].item()


def _factor(option: Array | float | None, seqlen_k: int, xp: ModuleType, sequence: int, kv: int) -> Any:
    """The factor of a key head, or of each of its keys: (seqlen_k, 1)."""
    table = _host(1.0 if option is None else option)
    if table.ndim == 3:
        return xp.asarray(np.repeat(table[sequence, kv], DESCALE_BLOCK)[:seqlen_k, None])
    return table.item() if table.size == 1 else _entry(table, 1.0, sequence, kv)


def _host(x: Array) -> Any:
    return x.get() if hasattr(x, "get") else np.asarray(x)
