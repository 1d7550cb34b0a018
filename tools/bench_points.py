"""Points: what bench.py times, a shape and a mask each.

batch * seqlen is 16k and heads * head_dim 2048 at every point, packed sequences excepted, whose lengths are a named mix.
"""

from __future__ import annotations

import random
from dataclasses import dataclass, fields, replace

import numpy as np

from tools.bench_report import EQUAL, WITHOUT, Row

TOKENS = 16384  # batch * seqlen
WIDTH = 2048  # heads * head_dim
BACKWARD_FLOPS = 2.5  # times the forward's: five products for its two


# ---- mixes of packed sequences -------------------------------------------------------------------------------------------------------


def _log_uniform_lengths(count: int, shortest: int, longest: int, total: int) -> tuple[int, ...]:
    """`count` lengths drawn log-uniformly from [shortest, longest], always the same ones, brought to `total` by scaling; what rounding
    and the lower bound then leave over or short goes to the longest."""
    drawn = random.Random(0)
    lengths = [shortest * (longest / shortest) ** drawn.random() for _ in range(count)]
    scaled = [max(shortest, int(length * total / sum(lengths))) for length in lengths]
    scaled[scaled.index(max(scaled))] += total - sum(scaled)
    return tuple(scaled)


# Lengths of queries and keys. one_long has 32,512 tokens and a sum of squared lengths of 272,564,224, which four sequences of 8,256 (33,024
# tokens, 272,646,144) match in both: the same work and the same memory, without a long sequence among short ones.
MIXES: dict[str, tuple[int, ...]] = {
    "mix16": _log_uniform_lengths(16, 128, 4096, TOKENS),
    "one_long": (16384, *[256] * 63),
    "one_long_equal": (8256,) * 4,
}


# ---- points --------------------------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Point:
    """One case.

    seqlen: of queries, and of keys where seqlen_k is 0; of packed sequences, the rows of all. window: (left, right) as flash_attn_func has
    it. sink_tokens: first keys that stay visible. alibi, learnable_sink: with such an array. lengths: name in MIXES of the lengths of
    packed sequences, None: a batch of equal ones.
    """

    dtype: str
    head_dim: int
    seqlen: int
    causal: bool
    gqa_ratio: int = 1
    direction: str = "fwd"
    window: tuple[int, int] = (-1, -1)
    sink_tokens: int = 0
    alibi: bool = False
    learnable_sink: bool = False
    seqlen_k: int = 0
    lengths: str | None = None

    def __str__(self) -> str:
        """The fields that are not their defaults."""
        values = {field.name: getattr(self, field.name) for field in fields(self) if getattr(self, field.name) != field.default}
        return f"Point({', '.join(f'{name}={value!r}' for name, value in values.items())})"

    @property
    def batch(self) -> int:
        return max(1, TOKENS // self.seqlen) if self.lengths is None else len(MIXES[self.lengths])

    @property
    def num_heads_q(self) -> int:
        return WIDTH // self.head_dim

    @property
    def num_heads_kv(self) -> int:
        return self.num_heads_q // self.gqa_ratio

    @property
    def q_shape(self) -> tuple[int, ...]:
        """(batch, seqlen, num_heads_q, head_dim); of packed sequences (total, num_heads_q, head_dim)."""
        return *self._rows(self.seqlen), self.num_heads_q, self.head_dim

    @property
    def kv_shape(self) -> tuple[int, ...]:
        return *self._rows(self.seqlen_k or self.seqlen), self.num_heads_kv, self.head_dim

    def _rows(self, seqlen: int) -> tuple[int, ...]:
        return (self.batch, seqlen) if self.lengths is None else (seqlen,)

    @property
    def flops(self) -> float:
        """4 * heads * head_dim for each visible pair of a query and a key; a backward 2.5 times as many."""
        if self.lengths is None:
            pairs = self.batch * self._pairs(self.seqlen, self.seqlen_k or self.seqlen)
        else:
            pairs = sum(self._pairs(length, length) for length in MIXES[self.lengths])
        return 4.0 * pairs * self.num_heads_q * self.head_dim * (BACKWARD_FLOPS if self.direction == "bwd" else 1.0)

    def _pairs(self, seqlen_q: int, seqlen_k: int) -> float:
        if self.window == (-1, -1):  # half of all for a causal mask, as attention benchmarks count them
            return seqlen_q * seqlen_k * (0.5 if self.causal else 1.0)
        return windowed_pairs(seqlen_q, seqlen_k, self.causal, self.window, self.sink_tokens)

    @property
    def baseline(self) -> tuple[str, Point] | None:
        """What this library is timed at in the same turns, as one more peer: the point without its ALiBi and sinks, or a mix's equal
        lengths. None for other points."""
        if self.lengths == "one_long":
            return EQUAL, replace(self, seqlen=sum(MIXES["one_long_equal"]), lengths="one_long_equal")
        plain = replace(self, sink_tokens=0, alibi=False, learnable_sink=False)
        return None if plain == self else (WITHOUT, plain)

    def row(self, peer: str, milliseconds: float, remark: str = "") -> Row:
        """The result row of a call that took so long. A baseline's stands at this point, with its own FLOPs."""
        counted = self.baseline[1] if self.baseline is not None and self.baseline[0] == peer else self
        gqa = f"gqa{self.gqa_ratio}" if self.gqa_ratio != 1 else ""
        return Row(
            peer=peer,
            direction=self.direction,
            dtype=self.dtype,
            d=self.head_dim,
            b=self.batch,
            h=self.num_heads_q,
            hk=self.num_heads_kv,
            s=self.seqlen,
            causal=int(self.causal),
            extra=" ".join(filter(None, (gqa, remark))),
            ms=round(milliseconds, 5),
            tflops=round(counted.flops / milliseconds / 1e9, 1),
            sk=self.seqlen_k,
            window=self.window,
            sink_tokens=self.sink_tokens,
            alibi=int(self.alibi),
            learnable_sink=int(self.learnable_sink),
            lengths=self.lengths or "",
        )


def windowed_pairs(seqlen_q: int, seqlen_k: int, causal: bool, window: tuple[int, int], sink_tokens: int) -> int:
    """How many pairs of a query and a key a window leaves visible, sink tokens included (cutlass_fa/reference.py has the mask)."""
    position = np.arange(seqlen_q, dtype=np.int64) + seqlen_k - seqlen_q  # (seqlen_q,)
    left, right = window[0], 0 if causal else window[1]
    first = np.maximum(position - left, 0) if left >= 0 else np.zeros_like(position)
    end = np.clip(position + right + 1 if right >= 0 else seqlen_k, 0, seqlen_k)  # one past the last key of the window
    sinks = np.clip(position + 1, 0, sink_tokens) if causal else np.minimum(sink_tokens, seqlen_k)
    within = np.maximum(end - first, 0)
    both = np.maximum(np.minimum(end, sinks) - first, 0)  # sink tokens that the window holds too
    return int((within + sinks - both).sum())
