"""`cutlass-fa run KEY --executor`: one kernel on this machine's CPU, its error against the reference, or its fault."""

from __future__ import annotations

import time
from dataclasses import dataclass, replace
from typing import Any, TextIO

import ml_dtypes
import numpy as np

from ..cell import Cell
from ..dispatch import FP8_DTYPES, DispatchKey
from ..dropout import dropout_mask
from ..extras import DESCALE_BLOCK
from ..reference import attention_backward, attention_forward
from ..reference_kvcache import prepare
from ..render import render
from ..requests_fp8 import Fp8Options
from .append_kv import run_append
from .backward import run_backward
from .build import ExecutorKernel
from .faults import ExecutorError, ExecutorFault
from .forward import run_forward

_DTYPES = {
    "bf16": np.dtype(ml_dtypes.bfloat16),
    "f16": np.dtype(np.float16),
    "e4m3": np.dtype(ml_dtypes.float8_e4m3fn),
    "e5m2": np.dtype(ml_dtypes.float8_e5m2),
}
_LSE_TOLERANCE = 1e-2
_SOFTCAP, _DROPOUT_P, _WINDOW, _SINK_TOKENS, _OFFSETS = 30.0, 0.17, (50, 20), 5, (60, 3)  # of cells that have them
_PAGE_SIZE = 16
_BACKWARD_ULPS = 6  # of the largest gradient: P, dS, out and the result are rounded, and dS is a difference of rounded numbers
_ULPS = 4  # of the largest output: P and out are rounded to the element type, each by half an ulp


@dataclass(frozen=True)
class RunShape:
    """What `run_key` computes attention on; head_dim 0 means the cell's own."""

    batch: int = 1
    seqlen_q: int = 77
    seqlen_k: int = 150
    num_heads_q: int = 2
    num_heads_kv: int = 1
    head_dim: int = 0


def run_key(key: DispatchKey, stream: TextIO, *, shape: RunShape = RunShape(), seed: int = 0) -> bool:
    """Run `key`'s kernel on standard normal numbers and report on `stream`; True when it is right. A backward's runs with the passes
    around it; a pass that only calls with learnable_sink have, with the plainest of them.

    seed: draws the numbers and the schedule. Raises UnsupportedCell, ExecutorError (no compiler; a pass, which runs with its backward),
    HostCompileError, and what a call on the GPU raises for a shape that makes no sense.
    """
    if key.direction == "append_kv":
        return _run_append_key(key, stream, shape, seed)
    if key.direction == "bwd":
        return _run_backward_key(key, stream, shape, seed)
    if key.direction != "fwd":
        main = replace(key, direction="bwd", split=False, learnable_sink=False)
        if key.learnable_sink or key.direction == "bwd_reduce":
            return _run_backward_key(main, stream, shape, seed, learnable_sink=True)
        if key.direction == "sequence_tiles":
            raise ExecutorError(f"{key} is the list of a packed call's tiles and runs with any kernel of packed sequences (..._varlen)")
        raise ExecutorError(f"{key} is a pass around a backward and runs with it: cutlass-fa run {main} --executor")
    cell = Cell.of(key)
    start = time.perf_counter()
    program = ExecutorKernel.build(render(cell))
    built = time.perf_counter()
    dtype = _DTYPES["e4m3" if cell.is_fp8 else key.dtype]  # of the probabilities, the coarsest numbers that are computed with
    q, k, v, _ = _arrays(key, shape, seed)
    print(f"{key}: {cell.summary}", file=stream)
    print(f"compiled for this CPU in {built - start:.1f} s; q {q.shape}, k and v {k.shape}, seed {seed}", file=stream)
    dropout_p = _DROPOUT_P * cell.has_dropout
    options = _features(key, shape, key.learnable_sink)
    try:
        called = {"dropout_p": dropout_p, "random_state": (seed, 0), "fp8": _fp8_options(key), **options}
        result = run_forward(cell, q, k, v, seed=seed, program=program, **called)
    except ExecutorFault as fault:
        print(fault.report, file=stream)
        return False
    print(f"ran in {time.perf_counter() - built:.2f} s", file=stream)
    mask = _dropout_mask(key, shape, seed, dropout_p)
    expected_out, expected_lse = attention_forward(q, k, v, causal=key.causal, dropout_mask=mask, dropout_p=dropout_p, **options)
    out_error = _max_error(result.out, expected_out)
    lse_error = _max_error(result.lse, expected_lse)
    allowed = _ULPS * float(ml_dtypes.finfo(dtype).eps) * float(np.abs(expected_out).max())
    right = out_error <= allowed and lse_error <= _LSE_TOLERANCE
    verdict = "ok" if right else "WRONG"
    print(f"max error against float64: out {out_error:.2e} (allowed {allowed:.2e}), lse {lse_error:.2e}: {verdict}", file=stream)
    return right


def _features(key: DispatchKey, shape: RunShape, learnable_sink: bool) -> dict[str, Any]:
    """What a call is given of the key's features and of learnable_sink, dropout apart; the reference takes the same."""
    return {
        "softcap": _SOFTCAP * key.softcap,
        "q_offset": _OFFSETS[0] if key.position_offset else None,
        "k_offset": _OFFSETS[1] if key.position_offset else None,
        "window_size": _WINDOW if key.sliding_window else (-1, -1),
        "sink_tokens": _SINK_TOKENS * key.sink,
        "alibi_slopes": np.float32(2) ** -np.arange(1, 1 + shape.num_heads_q, dtype=np.float32) if key.alibi else None,
        "learnable_sink": np.linspace(-1, 3, shape.num_heads_q, dtype=np.float32) if learnable_sink else None,
        **(_sequences(shape) if key.varlen else {}),
        **(_descales(key, shape) if key.descale else {}),
    }


def _fp8_options(key: DispatchKey) -> Fp8Options | None:
    if key.dtype not in FP8_DTYPES:
        return None
    return Fp8Options("precise" if key.precise else "fast", out_dtype="f16" if key.half_out else "bf16")


def _descales(key: DispatchKey, shape: RunShape) -> dict[str, np.ndarray]:
    """Factors from 0.5 to 2 of each sequence's key heads, and of blocks of keys."""
    heads = (shape.batch * (2 if key.varlen else 1), shape.num_heads_kv)
    blocks = (*heads, -(-shape.seqlen_k // DESCALE_BLOCK)) if key.block_descale else heads
    shapes = {"q_descale": heads, "k_descale": blocks, "v_descale": blocks}
    return {name: np.geomspace(0.5, 2, int(np.prod(each)), dtype=np.float32).reshape(each) for name, each in shapes.items()}


def _lengths(shape: RunShape) -> tuple[list[int], list[int]]:
    """Of packed sequences, in q and in k: each of the shape's in two parts, of which one has more queries and the other more keys."""
    third_q, third_k = shape.seqlen_q // 3, shape.seqlen_k // 3
    return [third_q, shape.seqlen_q - third_q] * shape.batch, [shape.seqlen_k - third_k, third_k] * shape.batch


def _sequences(shape: RunShape) -> dict[str, np.ndarray]:
    starts = (np.concatenate([[0], np.cumsum(lengths)]).astype(np.int32) for lengths in _lengths(shape))
    return dict(zip(("cu_seqlens_q", "cu_seqlens_k"), starts, strict=True))


def _dropout_mask(key: DispatchKey, shape: RunShape, seed: int, dropout_p: float) -> np.ndarray | None:
    if not dropout_p:
        return None
    sizes = (shape.batch, shape.num_heads_q, shape.seqlen_q, shape.seqlen_k)
    if key.varlen:
        lengths_q, lengths_k = _lengths(shape)
        sizes = (len(lengths_q), shape.num_heads_q, max(lengths_q), max(lengths_k))
    return dropout_mask(seed, 0, dropout_p, *sizes)


def _arrays(key: DispatchKey, shape: RunShape, seed: int) -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]:
    """q, k, v and dout: standard normal numbers; packed ones without the batch dimension."""
    head_dim, rng = shape.head_dim or key.head_dim, np.random.default_rng(seed)
    q_shape = (shape.batch, shape.seqlen_q, shape.num_heads_q, head_dim)
    kv_shape = (shape.batch, shape.seqlen_k, shape.num_heads_kv, head_dim)
    drawn = ((q_shape, key.dtype), (kv_shape, key.dtype), (kv_shape, key.v_dtype), (q_shape, key.dtype))
    q, k, v, dout = (rng.standard_normal(each, dtype=np.float32).astype(_DTYPES[dtype]) for each, dtype in drawn)
    if key.varlen:
        q, k, v, dout = (x.reshape(-1, *x.shape[2:]) for x in (q, k, v, dout))
    return q, k, v, dout


def _run_backward_key(key: DispatchKey, stream: TextIO, shape: RunShape, seed: int, learnable_sink: bool = False) -> bool:
    """As run_key, of a whole backward call; out and lse are the reference's."""
    q, k, v, dout = _arrays(key, shape, seed)
    features, dropout_p = _features(key, shape, learnable_sink), _DROPOUT_P * key.dropout
    mask = _dropout_mask(key, shape, seed, dropout_p)
    options: dict[str, Any] = {"causal": key.causal, "dropout_mask": mask, "dropout_p": dropout_p, **features}
    out, lse = attention_forward(q, k, v, **options)
    print(f"{key}: {Cell.of(key).summary}\nq {q.shape}, k and v {k.shape}, seed {seed}", file=stream)
    start = time.perf_counter()
    arrays = (dout, q, k, v, out.astype(q.dtype), lse.astype(np.float32))
    more: dict[str, Any] = {**features, "dropout_p": dropout_p, "random_state": (seed, 0)}
    more |= {"num_splits": 2 if key.split else 1, "num_copies": 2 if key.deterministic else 1}
    try:
        result = run_backward(key, *arrays, seed=seed, **more)
    except ExecutorFault as fault:
        print(fault.report, file=stream)
        return False
    print(f"compiled for this CPU and ran in {time.perf_counter() - start:.1f} s", file=stream)
    expected = attention_backward(dout, q, k, v, **options)
    right, errors = True, []
    for name in ("dq", "dk", "dv") + ("dlearnable_sink",) * learnable_sink:
        exact = getattr(expected, name)
        allowed = _BACKWARD_ULPS * float(ml_dtypes.finfo(q.dtype).eps) * float(np.abs(exact).max())
        error = _max_error(getattr(result, name), exact)
        right &= error <= allowed
        errors.append(f"{name} {error:.2e} (allowed {allowed:.2e})")
    print(f"max error against float64: {', '.join(errors)}: {'ok' if right else 'WRONG'}", file=stream)
    return right


def _run_append_key(key: DispatchKey, stream: TextIO, shape: RunShape, seed: int) -> bool:
    """As run_key: seqlen_q new rows for each sequence of a paged cache, behind seqlen_k keys, with rotary where the key has
    it."""
    q, k, v, _ = _arrays(replace(key, varlen=False), replace(shape, seqlen_k=shape.seqlen_q), seed)
    rng, dtype = np.random.default_rng(seed), q.dtype
    pages = -(-(shape.seqlen_q + shape.seqlen_k) // _PAGE_SIZE)
    cache_shape = (shape.batch * pages, _PAGE_SIZE, *k.shape[2:])
    arrays: dict[str, Any] = {"q": q, "k": k, "v": v, "cache_seqlens": np.full(shape.batch, shape.seqlen_k, np.int32)}
    arrays |= {name: rng.standard_normal(cache_shape, dtype=np.float32).astype(dtype) for name in ("k_cache", "v_cache")}
    arrays["block_table"] = rng.permutation(cache_shape[0]).astype(np.int32).reshape(shape.batch, pages)
    if key.rotary:
        angles = rng.uniform(0, 2 * np.pi, (pages * _PAGE_SIZE, q.shape[3] // 16 * 8))
        arrays |= {"rotary_cos": np.cos(angles).astype(dtype), "rotary_sin": np.sin(angles).astype(dtype), "successive_queries": True}
    print(f"{key}: {Cell.of(key).summary}\nk and v {k.shape}, caches {cache_shape}, seed {seed}", file=stream)
    start = time.perf_counter()
    try:
        result = run_append(seed=seed, arch=key.arch, **arrays)
    except ExecutorFault as fault:
        print(fault.report, file=stream)
        return False
    print(f"compiled for this CPU and ran in {time.perf_counter() - start:.1f} s", file=stream)
    expected, eps = prepare(**arrays), float(ml_dtypes.finfo(dtype).eps)
    pairs = {"k_cache": (result.k_cache, expected.k_cache), "v_cache": (result.v_cache, expected.v_cache)}
    if result.turned_q is not None:
        pairs["q"] = (result.turned_q, expected.q)
    errors = {name: _max_error(*pair) / (eps * float(np.abs(pair[1]).max())) for name, pair in pairs.items()}
    right = max(errors.values()) <= 0.5 and bool((result.seqlens_k == expected.seqlens_k).all())
    told = ", ".join(f"{name} {error:.2f} ulps of the largest" for name, error in errors.items())
    print(f"max error against float64: {told}: {'ok' if right else 'WRONG'}", file=stream)
    return right


def _max_error(actual: np.ndarray, expected: np.ndarray) -> float:
    """The largest difference; NaN or an infinity in another place than expected counts as infinite."""
    actual = actual.astype(np.float64)
    same = actual == expected  # infinities
    difference = np.abs(np.where(same, 0.0, actual - np.where(same, 0.0, expected)))
    return float(np.where(np.isfinite(difference), difference, np.inf).max())
