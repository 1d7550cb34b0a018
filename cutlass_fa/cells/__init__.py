"""The kernels: a class of cells for each (family, direction)."""

from __future__ import annotations

from ..cell import Cell
from .fa3_fwd import Fa3FwdCell

CELL_CLASSES: dict[tuple[str, str], type[Cell]] = {
    ("fa3", "fwd"): Fa3FwdCell,
}
