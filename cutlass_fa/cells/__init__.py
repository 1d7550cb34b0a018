"""The kernels: a class of cells for each (family, direction)."""

from __future__ import annotations

from ..cell import Cell
from .append_kv import AppendKvCell
from .fa2_bwd import Fa2BwdCell
from .fa2_bwd_passes import Fa2BwdConvertCell, Fa2BwdPreprocessCell, Fa2BwdReduceCell
from .fa2_fwd import Fa2FwdCell
from .fa3_fwd import Fa3FwdCell
from .sequence_tiles import SequenceTilesCell

CELL_CLASSES: dict[tuple[str, str], type[Cell]] = {
    ("fa2", "fwd"): Fa2FwdCell,
    ("fa3", "fwd"): Fa3FwdCell,
    ("fa2", "bwd"): Fa2BwdCell,
    ("fa2", "bwd_preprocess"): Fa2BwdPreprocessCell,
    ("fa2", "bwd_convert"): Fa2BwdConvertCell,
    ("fa2", "sequence_tiles"): SequenceTilesCell,
    ("fa2", "bwd_reduce"): Fa2BwdReduceCell,
    ("fa2", "append_kv"): AppendKvCell,
}
