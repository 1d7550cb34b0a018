"""Attention over parts of the keys, each at its place, merged: cases, and how far the merged result may be from float64."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from itertools import pairwise
from types import ModuleType
from typing import Any

import ml_dtypes
import numpy as np

from cutlass_fa.merge import merge_attention_states
from cutlass_fa.reference import array_module, as_float64, attention_forward
from tests.numerics import random_qkv

DTYPES = {"f16": np.dtype(np.float16), "bf16": np.dtype(ml_dtypes.bfloat16)}
# What rounding a probability to the element type changes it by at most, in shares of itself.
ROUNDOFF = {"float16": 2.0**-11, "bfloat16": 2.0**-8}
FLOAT_ROUNDOFF = 2.0**-12  # of everything else: scores, biases of some thousands, exponentials and sums in float32
F16_SMALLEST = 2.0**-25  # half of float16's smallest number: what a probability near 0 is changed by at most
LSE_ROUNDOFF = 2.0**-16  # of lse + 1: lse comes from probabilities that are not rounded


@dataclass(frozen=True)
class PartCase:
    """Queries at q_offset against seqlens[1] keys that begin at k_offset, cut into parts at `cuts`."""

    seqlens: tuple[int, int]
    q_offset: int
    k_offset: int
    cuts: tuple[int, ...]
    causal: bool = False
    window: tuple[int, int] = (-1, -1)
    sinks: int = 0
    alibi: bool = False
    batch: int = 1
    groups: int = 1
    ratio: int = 2

    def __str__(self) -> str:
        words = [f"{self.seqlens[0]}x{self.seqlens[1]}", f"at{self.q_offset}.{self.k_offset}", "cut" + ".".join(map(str, self.cuts))]
        words += ["causal"] * self.causal + [f"window{self.window[0]}.{self.window[1]}"] * (self.window != (-1, -1))
        return "-".join(words + [f"sinks{self.sinks}"] * (self.sinks > 0) + ["alibi"] * self.alibi)

    @property
    def flags(self) -> dict[str, bool]:
        """Of the key of each part's kernels."""
        sliding = replace_right(self).window != (-1, -1)
        return {
            "causal": self.causal,
            "sliding_window": sliding,
            "sink": sliding and self.sinks > 0,
            "alibi": self.alibi,
            "position_offset": True,
        }

    @property
    def parts(self) -> list[slice]:
        bounds = (0, *self.cuts, self.seqlens[1])
        return [slice(begin, end) for begin, end in pairwise(bounds)]

    def arrays(self, xp: ModuleType, rng: Any, dtype: str, head_dim: int) -> tuple[Any, Any, Any]:
        sizes = {"batch": self.batch, "seqlen_q": self.seqlens[0], "seqlen_k": self.seqlens[1], "head_dim": head_dim}
        heads = {"num_heads_q": self.groups * self.ratio, "num_heads_kv": self.groups}
        return random_qkv(xp, rng, **sizes, **heads, dtype=DTYPES[dtype])

    def options(self, xp: ModuleType) -> dict[str, Any]:
        """Masks and bias, for a call and for the reference, causality and offsets apart."""
        heads = self.groups * self.ratio
        slopes = xp.asarray(np.float32(0.5) ** np.arange(1, heads + 1, dtype=np.float32)) if self.alibi else None
        return {"window_size": self.window, "sink_tokens": self.sinks, "alibi_slopes": slopes}

    def whole(self, xp: ModuleType) -> dict[str, Any]:
        """What the reference is told of the attention over all keys."""
        return {"causal": self.causal, "q_offset": self.q_offset, "k_offset": self.k_offset, **self.options(xp)}


def replace_right(case: PartCase) -> PartCase:
    """The case as causality has it: a window without a left side is then none."""
    return replace(case, window=(-1, -1)) if case.causal and case.window[0] == -1 else case


def merged(case: PartCase, k: Any, v: Any, attend: Callable[..., tuple[Any, Any]]) -> tuple[Any, Any]:
    """The results of attend(k, v, q_offset=, k_offset=) -> (out, lse) over each part, merged one after another."""
    state: tuple[Any, Any] | None = None
    for part in case.parts:
        result = attend(k[:, part], v[:, part], q_offset=case.q_offset, k_offset=case.k_offset + part.start)
        state = result if state is None else merge_attention_states(*state, *result)
    assert state is not None
    return state


def check_merged(out: Any, lse: Any, q: Any, k: Any, v: Any, case: Any, **options: Any) -> None:
    """Hold float32 results to what kernels round: a probability once, to the element type, and nothing after it but in float32.

    An element of out is a mean of v with weights that are off by that share of themselves, so that it is off by at most the same share
    of the mean of |v|; merging weighs both alike."""
    xp = array_module(out)
    assert out.dtype == np.float32 and lse.dtype == np.float32
    exact_out, exact_lse = attention_forward(q, k, v, **options)
    mean_size, _ = attention_forward(q, k, xp.abs(as_float64(v)), **options)
    seen = exact_lse != -np.inf
    assert bool(((lse != -np.inf) == seen).all()), f"{case}: other rows than expected see a key"
    out_error = xp.abs(out - exact_out)
    smallest = F16_SMALLEST * k.shape[1] * float(xp.abs(as_float64(v)).max()) * (q.dtype == np.float16)
    worst = float((out_error - (ROUNDOFF[q.dtype.name] + FLOAT_ROUNDOFF) * mean_size).max())
    assert worst <= smallest, f"{case}: out is {worst:.2e} further from float64 than rounding explains"
    lse, exact_lse = (xp.where(seen, x, 0.0) for x in (lse, exact_lse))
    lse_error = xp.abs(lse - exact_lse) / (1 + xp.abs(exact_lse))
    assert float(lse_error.max()) <= LSE_ROUNDOFF, f"{case}: lse is off by {float(lse_error.max()):.2e} of its size"
