"""Few cases in which every few choices meet: covering arrays, by a greedy search (as in AETG: Cohen, Dalal, Fredman and Patton 1997)."""

from __future__ import annotations

import random
from collections.abc import Mapping, Sequence
from itertools import combinations, product
from typing import Any

_TRIES = 20  # candidates for each case: the one that covers most is taken


def covering(factors: Mapping[str, Sequence[Any]], strength: int, seed: int = 0) -> list[dict[str, Any]]:
    """Cases, each with a choice of every factor, such that every choices of any `strength` factors stand together in some case."""
    rng = random.Random(seed)
    names = list(factors)
    missing = {
        tuple(zip(group, chosen, strict=True))
        for group in combinations(names, strength)
        for chosen in product(*(range(len(factors[name])) for name in group))
    }
    order = sorted(missing)
    rng.shuffle(order)
    cases = []
    for wanted in order:
        if wanted not in missing:
            continue
        candidates = [{name: rng.randrange(len(factors[name])) for name in names} | dict(wanted) for _ in range(_TRIES)]
        best = max(candidates, key=lambda case: len(_covered(case, strength) & missing))
        missing -= _covered(best, strength)
        cases.append({name: factors[name][i] for name, i in best.items()})
    return cases


def _covered(case: Mapping[str, int], strength: int) -> set[tuple[tuple[str, int], ...]]:
    return set(combinations(case.items(), strength))
