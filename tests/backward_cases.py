"""Cases of the backward: arrays, the forward's results, and what the reference is told; on the CPU executor and on a GPU."""

from __future__ import annotations

from dataclasses import dataclass, field
from types import ModuleType
from typing import Any

import ml_dtypes
import numpy as np

from cutlass_fa.dropout import dropout_mask
from cutlass_fa.reference import attention_forward
from tests.numerics import random_array, random_qkv

DTYPES = {"f16": np.dtype(np.float16), "bf16": np.dtype(ml_dtypes.bfloat16)}
RANDOM_STATE = (0x9E3779B97F4A7C15, (5 << 32) | 9)  # seed and offset; both words of each count
SOFTCAP = 3.0  # of scores that are about 1 each: the tanh bends them


@dataclass(frozen=True)
class Case:
    """One call. groups: key heads, each with `ratio` query heads."""

    seqlens: tuple[int, int]
    batch: int = 1
    groups: int = 1
    ratio: int = 2
    order: str = "bshd"
    strided: bool = False
    narrower: int = 0  # than the cell's head_dim
    has_dlse: bool = False
    softmax_scale: float | None = None
    window: tuple[int, int] = (40, 3)  # of calls that have one; causal ones look at the left side only
    sinks: int = 5  # of calls that have them
    offsets: tuple[int | None, int | None] = (90, 20)  # of the first query and the first key, of calls that have them

    def __str__(self) -> str:
        words = [f"{self.seqlens[0]}x{self.seqlens[1]}", f"b{self.batch}", f"h{self.groups}x{self.ratio}", self.order]
        words += [word for word, on in (("strided", self.strided), (f"d-{self.narrower}", self.narrower), ("dlse", self.has_dlse)) if on]
        return "-".join(words)


def _slopes(xp: ModuleType, batch: int, heads: int) -> Any:
    """A batch of one shares its slopes, a larger one has some for each sequence; some are less than 0."""
    shape = (heads,) if batch == 1 else (batch, heads)
    return (0.7 * xp.float32(2) ** -xp.arange(np.prod(shape), dtype=np.float32) - np.float32(0.02)).astype(np.float32).reshape(shape)


def _sinks(xp: ModuleType, heads: int) -> Any:
    """Logits among the scores' log-sum-exp, and of a third head none."""
    return xp.asarray(np.resize(np.array([1.5, 4.0, -np.inf, -0.5], np.float32), heads))


@dataclass(frozen=True, eq=False)
class Inputs:
    """What flash_attn_backward takes; `call` are its options, `options` the same for the reference."""

    dout: Any
    q: Any
    k: Any
    v: Any
    out: Any
    lse: Any
    dlse: Any
    call: dict[str, Any] = field(default_factory=dict)
    options: dict[str, Any] = field(default_factory=dict)

    @classmethod
    def of(
        cls,
        case: Case,
        xp: ModuleType,
        rng: Any,
        *,
        dtype: str,
        head_dim: int,
        causal: bool = False,
        softcap: float = 0.0,
        dropout_p: float = 0.0,
        window: bool = False,
        sink: bool = False,
        alibi: bool = False,
        offset: bool = False,
        learnable_sink: bool = False,
    ) -> Inputs:
        """Fresh numbers; out and lse are the reference's, out rounded to the dtype as a forward's is."""
        heads, seqlens, element = case.groups * case.ratio, case.seqlens, DTYPES[dtype]
        layout: dict[str, Any] = {"memory_order": case.order, "extra_strides": case.strided}
        q, k, v = random_qkv(
            xp,
            rng,
            batch=case.batch,
            seqlen_q=seqlens[0],
            seqlen_k=seqlens[1],
            num_heads_q=heads,
            num_heads_kv=case.groups,
            head_dim=head_dim - case.narrower,
            dtype=element,
            **layout,
        )
        dout = random_array(xp, rng, q.shape, element, **layout)
        options: dict[str, Any] = {"causal": causal, "softcap": softcap}
        options |= {"window_size": case.window} if window else {}
        options |= {"sink_tokens": case.sinks} if sink else {}
        options |= {"alibi_slopes": _slopes(xp, case.batch, heads)} if alibi else {}
        options |= {"q_offset": case.offsets[0], "k_offset": case.offsets[1]} if offset else {}
        options |= {"learnable_sink": _sinks(xp, heads)} if learnable_sink else {}
        call = dict(options)
        if case.softmax_scale is not None:
            options["softmax_scale"] = call["softmax_scale"] = case.softmax_scale
        if dropout_p:
            call |= {"dropout_p": dropout_p, "dropout_seed": RANDOM_STATE[0], "dropout_offset": RANDOM_STATE[1]}
            options |= {"dropout_p": dropout_p, "dropout_mask": dropout_mask(*RANDOM_STATE, dropout_p, case.batch, heads, *seqlens, xp=xp)}
        exact_out, exact_lse = attention_forward(q, k, v, **options)
        lse = exact_lse.astype(np.float32)
        dlse = xp.asarray(rng.standard_normal(lse.shape, dtype=np.float32)) if case.has_dlse else None
        return cls(dout, q, k, v, exact_out.astype(np.float32).astype(element), lse, dlse, call, options)
