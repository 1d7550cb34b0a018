"""The kernels: a class of cells for each (family, direction), and for the forward of 8-bit numbers, imported when a call needs it."""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING

from ..dispatch import FP8_DTYPES, DispatchKey

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
_FP8_CLASS = ("fa3_fwd_fp8", "Fa3FwdFp8Cell")


def cell_class(key: DispatchKey) -> type[Cell]:
    """The class whose for_key makes the cell of `key`. KeyError where there is none."""
    module, name = _FP8_CLASS if key.dtype in FP8_DTYPES else _CELL_CLASSES[key.family, key.direction]
    found: type[Cell] = getattr(import_module(f".{module}", __name__), name)
    return found
