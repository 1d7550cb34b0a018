"""How far the CPU executor and the GPU are apart, cell by cell: collected from the tests' reports, wherever their processes were."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

PROPERTY = "agreement"  # of a test's report; pytest-xdist carries these from its workers


@dataclass(frozen=True)
class Agreement:
    """Largest differences of one cell's outputs. allowed_out, allowed_lse: what the test accepts."""

    key: str
    out: float
    lse: float
    allowed_out: float
    allowed_lse: float

    def __str__(self) -> str:
        return f"{self.key}: out {self.out:.2e} (allowed {self.allowed_out:.2e}), lse {self.lse:.2e} (allowed {self.allowed_lse:.2e})"

    def record(self, record_property: Callable[[str, object], None]) -> None:
        """Attach to the running test. record_property: pytest's fixture."""
        record_property(PROPERTY, asdict(self))


def collect(reports: Iterable[Any]) -> list[Agreement]:
    """What the tests behind `reports` (pytest's) recorded, by name."""
    found = (value for report in reports for name, value in getattr(report, "user_properties", ()) if name == PROPERTY)
    return sorted((Agreement(**value) for value in found), key=lambda each: each.key)


def lines(agreements: list[Agreement]) -> list[str]:
    """One line for each cell, and the largest of all."""
    largest = f"largest: out {max(each.out for each in agreements):.2e}, lse {max(each.lse for each in agreements):.2e}"
    return [*map(str, agreements), f"{len(agreements)} cells, {largest}"]


def write(path: Path, agreements: list[Agreement]) -> None:
    """As JSON, a list of objects with the fields of Agreement."""
    path.write_text(json.dumps([asdict(each) for each in agreements], indent=1) + "\n")
