"""The kernels: a class of cells for each (family, direction), imported when a call needs it."""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from ..cell import Cell

# (family, direction) -> module of this package, class
_CELL_CLASSES = {
    ("fa2", "fwd"): ("fa2_fwd", "Fa2FwdCell"),
    ("fa3", "fwd"): ("fa3_fwd", "Fa3FwdCell"),
    ("fa2", "bwd"): ("fa2_bwd", "Fa2BwdCell"),
    ("fa2", "bwd_preprocess"): ("fa2_bwd_passes", "Fa2BwdPreprocessCell"),
    ("fa2", "bwd_convert"): ("fa2_bwd_passes", "Fa2BwdConvertCell"),
    ("fa2", "bwd_reduce"): ("fa2_bwd_passes", "Fa2BwdReduceCell"),
    ("fa2", "sequence_tiles"): ("sequence_tiles", "SequenceTilesCell"),
    ("fa2", "append_kv"): ("append_kv", "AppendKvCell"),
}


def cell_class(family: str, direction: str) -> type[Cell]:
    """The class whose for_key makes the cells of these kernels. KeyError where there are none."""
    module, name = _CELL_CLASSES[family, direction]
    found: type[Cell] = getattr(import_module(f".{module}", __name__), name)
    return found
