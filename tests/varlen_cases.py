"""Packed sequences: lengths that break kernels, and arrays whose rows that are not in use hold NaN; on the CPU executor and on a GPU."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from types import ModuleType
from typing import Any

import numpy as np

from tests.numerics import random_array


@dataclass(frozen=True)
class Lengths:
    """Rows of q and k that each sequence owns; used_q, used_k: how many of them are in use (default: all); behind: rows after the last."""

    name: str
    pairs: tuple[tuple[int, int], ...]
    used_q: tuple[int, ...] | None = None
    used_k: tuple[int, ...] | None = None
    behind: tuple[int, int] = (0, 0)

    def __str__(self) -> str:
        return self.name

    @property
    def batch(self) -> int:
        return len(self.pairs)

    @property
    def longest(self) -> tuple[int, int]:
        return max(max(q for q, _ in self.pairs), 1), max(max(k for _, k in self.pairs), 1)

    @property
    def totals(self) -> tuple[int, int]:
        """At least one row: arrays without any are refused."""
        total_q, total_k = (sum(pair[side] for pair in self.pairs) + self.behind[side] for side in (0, 1))
        return max(total_q, 1), max(total_k, 1)

    def arrays(self, xp: ModuleType) -> dict[str, Any]:
        """cu_seqlens_q and so on, as a call and the reference take them."""
        found = {f"cu_seqlens_{side}": xp.asarray(_starts([pair[i] for pair in self.pairs])) for i, side in enumerate("qk")}
        used = (("seqused_q", self.used_q), ("seqused_k", self.used_k))
        return found | {name: xp.asarray(np.array(numbers, np.int32)) for name, numbers in used if numbers is not None}

    def rows_in_use(self, side: int) -> np.ndarray:
        """bool (total,) of q (side 0) or k."""
        in_use = np.zeros(self.totals[side], bool)
        starts = _starts([pair[side] for pair in self.pairs])
        used = (self.used_q, self.used_k)[side] or [pair[side] for pair in self.pairs]
        for start, length in zip(starts, used, strict=False):
            in_use[start : start + length] = True
        return in_use

    def qkv(self, xp: ModuleType, rng: Any, heads: tuple[int, int], head_dim: int, dtype: Any, **layout: Any) -> tuple[Any, Any, Any]:
        """Fresh packed q, k, v; NaN in every row that is not in use. heads: of q, and of k and v."""
        found = []
        for side, num_heads in ((0, heads[0]), (1, heads[1]), (1, heads[1])):
            x = random_array(xp, rng, (self.totals[side], num_heads, head_dim), dtype, **layout)
            x[xp.asarray(~self.rows_in_use(side))] = np.nan
            found.append(x)
        q, k, v = found
        return q, k, v


def _starts(lengths: Sequence[int]) -> np.ndarray:
    return np.concatenate([[0], np.cumsum(lengths)]).astype(np.int32)
