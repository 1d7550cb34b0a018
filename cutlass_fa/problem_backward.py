"""BackwardProblem: a backward request together with what its arrays look like, every argument checked."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from .arrays import ArraySpec
from .errors import InvalidArgument
from .extras import NO_EXTRAS, ExtraSpecs, check_device, check_per_head
from .problem import (
    check_out,
    check_rank,
    check_same_dtype,
    check_shapes,
    check_strides,
    contiguous_strides,
    fresh_like,
    one_sequence,
    sizes_of,
)
from .request_parts import PositionBias
from .requests import Fa2BwdRequest

MAX_ROW_STRIDE = 2**31 - 1  # elements: the kernels multiply it as a 32-bit number


@dataclass(frozen=True)
class BackwardProblem:
    """q, out, dout, dq (batch, seqlen_q, num_heads_q, head_dim); k, v, dk, dv (batch, seqlen_k, num_heads_kv, head_dim); lse and dlse
    float32 (batch, num_heads_q, seqlen_q), dlse None where there is none; dlearnable_sink float32 (num_heads_q,), None without
    learnable_sink; strides in elements."""

    request: Fa2BwdRequest
    q: ArraySpec
    k: ArraySpec
    v: ArraySpec
    out: ArraySpec
    dout: ArraySpec
    lse: ArraySpec
    dlse: ArraySpec | None
    dq: ArraySpec
    dk: ArraySpec
    dv: ArraySpec
    dlearnable_sink: ArraySpec | None = None
    extras: ExtraSpecs = NO_EXTRAS

    def shape_of(self, spec: ArraySpec) -> tuple[int, ...]:
        """Of one of the arrays as the caller sees it: packed sequences have no batch dimension."""
        return spec.shape if self.request.cu_seqlens is None else spec.shape[1:]

    @classmethod
    def from_specs(
        cls,
        dout: ArraySpec,
        q: ArraySpec,
        k: ArraySpec,
        v: ArraySpec,
        out: ArraySpec | None,
        lse: ArraySpec | None,
        dlse: ArraySpec | None,
        gradients: tuple[ArraySpec | None, ArraySpec | None, ArraySpec | None],
        *,
        recompute: bool,
        dlearnable_sink: ArraySpec | None = None,
        extras: ExtraSpecs = NO_EXTRAS,
        max_seqlen_q: int | None = None,
        max_seqlen_k: int | None = None,
        **options: Any,
    ) -> BackwardProblem:
        """Check the arrays of a backward call and describe it. gradients: dq, dk, dv; None: a fresh contiguous array,
        as of dlearnable_sink where the call has learnable_sink.

        options: fields of Fa2BwdRequest that no array says. Raises InvalidArgument (rank, shape, stride, device, a mix of dtypes, out or
        lse missing; names the argument), UnsupportedDtype, and everything that Fa2BwdRequest raises.
        """
        packed = extras.is_packed
        dq, dk, dv = gradients
        named = {"q": q, "k": k, "v": v, "dout": dout, "out": out, "dq": dq, "dk": dk, "dv": dv}
        for name, spec in named.items():
            if spec is not None:
                check_rank(name, spec, packed)
        if packed:
            dout, q, k, v = (one_sequence(spec) for spec in (dout, q, k, v))
            out, dq, dk, dv = (None if spec is None else one_sequence(spec) for spec in (out, dq, dk, dv))
            lse, dlse = (None if spec is None else _one_sequence_per_row(spec) for spec in (lse, dlse))
        check_same_dtype(q, k, v)
        check_shapes(q, k, v)
        batch, seqlen_q, num_heads_q, head_dim = q.shape
        request = Fa2BwdRequest(
            **sizes_of(q, k, extras, max_seqlen_q, max_seqlen_k),
            num_heads_q=num_heads_q,
            num_heads_kv=k.shape[2],
            head_dim=head_dim,
            dtype=q.dtype,
            recompute=recompute,
            position_bias=PositionBias(extras.alibi_slopes is not None),
            learnable_sink=extras.learnable_sink is not None,
            **options,
        )
        lse_like = ArraySpec((batch, num_heads_q, seqlen_q), contiguous_strides((batch, num_heads_q, seqlen_q)), "float32", q.device)
        out, lse = _kept(out, fresh_like(q), "out", recompute), _kept(lse, lse_like, "lse", recompute)
        check_out(dout, q, "dout", allow_broadcast=True)
        check_out(out, q)
        dq, dk, dv = (spec or fresh_like(like) for spec, like in zip((dq, dk, dv), (q, k, v), strict=True))
        for name, spec, like in (("dq", dq, "q"), ("dk", dk, "k"), ("dv", dv, "v")):
            check_out(spec, q if like == "q" else k, name, like)
        for name, spec in (("q", q), ("k", k), ("v", v), ("out", out), ("dout", dout), ("dq", dq), ("dk", dk), ("dv", dv)):
            check_strides(name, spec)
            _check_row_stride(name, spec)
            check_device(name, spec, q)
        for name, per_row in (("lse", lse), ("dlse", dlse)):
            if per_row is not None:
                _check_per_row(name, per_row, lse_like)
                check_device(name, per_row, q)
        extras.check(q, request.batch, request.num_heads_kv, request.seqlen_k)
        dlearnable_sink = _sink_gradient(dlearnable_sink, extras.learnable_sink, q)
        return cls(request, q, k, v, out, dout, lse, dlse, dq, dk, dv, dlearnable_sink, extras)


def _one_sequence_per_row(spec: ArraySpec) -> ArraySpec:
    """(num_heads_q, total_q) as (1, num_heads_q, total_q)."""
    if len(spec.shape) != 2:
        raise InvalidArgument(f"lse or dlse has shape {spec.shape}: expected (num_heads_q, total_q) with cu_seqlens")
    return one_sequence(spec)


def _kept(spec: ArraySpec | None, fresh: ArraySpec, name: str, recompute: bool) -> ArraySpec:
    """out or lse of the forward: given, or to be made."""
    if (spec is None) != recompute:
        state = "is None" if spec is None else "is given"
        raise InvalidArgument(
            f"{name} {state} and recompute={recompute}: pass what the forward returned, or recompute=True and None for both"
        )
    return fresh if spec is None else spec


def _sink_gradient(spec: ArraySpec | None, learnable_sink: ArraySpec | None, q: ArraySpec) -> ArraySpec | None:
    """dlearnable_sink: given, or to be made, or None where there is nothing that it is the gradient by."""
    if learnable_sink is None:
        if spec is not None:
            raise InvalidArgument("dlearnable_sink is given and learnable_sink is None: there is no such gradient")
        return None
    if spec is not None:
        check_per_head("dlearnable_sink", spec, q.shape[2])
        check_device("dlearnable_sink", spec, q)
    return spec or ArraySpec((q.shape[2],), (1,), "float32", q.device)


def _check_row_stride(name: str, spec: ArraySpec) -> None:
    if spec.shape[1] > 1 and spec.strides[1] > MAX_ROW_STRIDE:
        raise InvalidArgument(f"{name} has {spec.strides[1]} elements from one row to the next: at most {MAX_ROW_STRIDE}; copy {name}")


def _check_per_row(name: str, spec: ArraySpec, expected: ArraySpec) -> None:
    if spec.shape != expected.shape:
        raise InvalidArgument(f"{name} has shape {spec.shape}: expected {expected.shape}, (batch, num_heads_q, seqlen_q)")
    if spec.dtype != "float32":
        raise InvalidArgument(f"{name} has dtype {spec.dtype}: expected float32")
    if spec.shape[2] > 1 and spec.strides[2] != 1:
        raise InvalidArgument(f"{name} has strides {spec.strides} (elements): the last dimension must be contiguous (stride 1)")
