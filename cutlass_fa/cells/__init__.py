"""The kernels: a class of cells for each (family, direction), and for the forward of 8-bit numbers."""

from __future__ import annotations

from ..cell import Cell
from ..dispatch import FP8_DTYPES, DispatchKey
from .fa2_bwd import Fa2BwdCell
from .fa2_bwd_passes import Fa2BwdConvertCell, Fa2BwdPreprocessCell, Fa2BwdReduceCell
from .fa2_fwd import Fa2FwdCell
from .fa3_fwd import Fa3FwdCell
from .fa3_fwd_fp8 import Fa3FwdFp8Cell
from .sequence_tiles import SequenceTilesCell

_CELL_CLASSES: dict[tuple[str, str], type[Cell]] = {
    ("fa2", "fwd"): Fa2FwdCell,
    ("fa3", "fwd"): Fa3FwdCell,
    ("fa2", "bwd"): Fa2BwdCell,
    ("fa2", "bwd_preprocess"): Fa2BwdPreprocessCell,
    ("fa2", "bwd_convert"): Fa2BwdConvertCell,
    ("fa2", "sequence_tiles"): SequenceTilesCell,
    ("fa2", "bwd_reduce"): Fa2BwdReduceCell,
}


def cell_class(key: DispatchKey) -> type[Cell]:
    """The class of the cell that serves `key`."""
    return Fa3FwdFp8Cell if key.dtype in FP8_DTYPES else _CELL_CLASSES[key.family, key.direction]
