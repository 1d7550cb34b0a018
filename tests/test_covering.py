"""The covering arrays of the GPU tests cover."""

from __future__ import annotations

from itertools import combinations, product

import pytest

from tests.covering import covering


@pytest.mark.parametrize("strength", [2, 3])
def test_every_choice_meets_every_other(strength: int) -> None:
    factors = {"a": "xyz", "b": (1, 2), "c": (None, True), "d": "pqrst"}
    cases = covering(factors, strength)
    for names in combinations(factors, strength):
        met = {tuple(case[name] for name in names) for case in cases}
        assert met == set(product(*(factors[name] for name in names)))
    assert len(cases) < 3 * 2 * 2 * 5


def test_equal_arguments_give_equal_cases() -> None:
    assert covering({"a": "xy", "b": "zw"}, 2) == covering({"a": "xy", "b": "zw"}, 2)
