"""Cell: everything a template needs to know about one kernel, as a pure function of its DispatchKey.

What every kernel has is here; the classes of cells/ add what their own template asks for.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass
from typing import ClassVar

from .arch.limits import limits_of
from .cells import cell_class
from .dispatch import DISPATCH_TABLE, FP8_DTYPES, DispatchKey
from .params import ParamField, params_dtype

_ELEMENTS = {"bf16": "bfloat16", "f16": "float16"}


@dataclass(frozen=True)
class Cell(ABC):
    """One kernel. template: its file under templates/. entry: its symbol."""

    key: DispatchKey

    template: ClassVar[str]
    entry: ClassVar[str]

    @staticmethod
    def of(key: DispatchKey) -> Cell:
        """The cell that serves `key`. Raises UnsupportedCell with every reason when there is none."""
        DISPATCH_TABLE.lookup(key)
        cell = cell_class(key).for_key(key)
        cell.check_limits()
        return cell

    @classmethod
    @abstractmethod
    def for_key(cls, key: DispatchKey) -> Cell:
        """The cell of a key of this class's family and direction, by the tables."""

    @abstractmethod
    def misfits(self) -> list[str]:
        """Why this kernel's tile does not fit the machine, shared memory apart."""

    def check_limits(self) -> None:
        """A tile table row must fit the machine; a row that does not is a defect of the table."""
        limit = limits_of(self.arch).smem_bytes
        misfits = self.misfits()
        if self.smem_bytes > limit:
            misfits.append(f"{self.smem_bytes} B of shared memory, {limit} on {self.arch}")
        if misfits:
            raise AssertionError(f"{self.name} ({self.summary}) does not fit: {'; '.join(misfits)}")

    # ---- identity ----------------------------------------------------------------------------------------------------------------

    @property
    def name(self) -> str:
        return str(self.key)

    @property
    def arch(self) -> str:
        return self.key.arch

    @property
    def summary(self) -> str:
        return f"tile {self.tile_m}x{self.tile_n}, {self.stages} stages, {self.threads} threads, smem {self.smem_bytes} B"

    # ---- sizes -------------------------------------------------------------------------------------------------------------------

    @property
    def element(self) -> str:
        return _ELEMENTS[self.key.dtype]

    @property
    def head_dim(self) -> int:
        return self.key.head_dim

    @property
    @abstractmethod
    def tile_m(self) -> int:
        """Query rows of a CTA's tile."""

    @property
    def tile_n(self) -> int:
        """Keys of a block; 0 in a kernel without keys."""
        return 0

    @property
    def stages(self) -> int:
        """Blocks in flight; 0 in a kernel without a ring."""
        return 0

    @property
    @abstractmethod
    def threads(self) -> int:
        """Of a CTA."""

    @property
    @abstractmethod
    def smem_bytes(self) -> int:
        """Dynamic shared memory of a CTA."""

    # ---- named booleans ----------------------------------------------------------------------------------------------------------

    @property
    def is_causal(self) -> bool:
        return self.key.causal

    @property
    def is_packed(self) -> bool:
        return self.key.gqa_ratio > 1

    @property
    def is_varlen(self) -> bool:
        return self.key.varlen

    @property
    def is_paged(self) -> bool:
        return self.key.paged

    @property
    def has_packed_keys(self) -> bool:
        """Whether k and v hold sequences one after the other, where they do not lie in a cache's pages."""
        return self.is_varlen and not self.is_paged

    @property
    def is_split(self) -> bool:
        """Of a forward: whether the keys of a tile may be divided among CTAs; of a backward: whether the queries of a block of keys are."""
        return self.key.split

    @property
    def has_tile_list(self) -> bool:
        """Whether tiles come from the list of all sequences' blocks that a pass before the kernel makes."""
        return self.is_varlen and not self.is_split

    @property
    def has_batch(self) -> bool:
        """Whether arrays have a batch dimension: sequences are equally long."""
        return not self.is_varlen

    @property
    def has_window(self) -> bool:
        return self.key.sliding_window

    @property
    def has_sink(self) -> bool:
        return self.key.sink

    @property
    def sink_blocks(self) -> str:
        """How many key blocks sink tokens take."""
        return "(params.sink_tokens + kTileN - 1) / kTileN"

    @property
    def has_learnable_sink(self) -> bool:
        return self.key.learnable_sink

    @property
    def has_alibi(self) -> bool:
        return self.key.alibi

    @property
    def has_offset(self) -> bool:
        return self.key.position_offset

    @property
    def shift_words(self) -> str:
        """How far position 0 of the queries is from that of the keys, as comments call it."""
        return "position_shift" if self.has_offset else "seqlen_k - seqlen_q"

    @property
    def position_shift(self) -> str:
        """What a query's index is added to, which gives its position among the keys' indices."""
        return "params.position_shift" if self.has_offset else "params.seqlen_k - params.seqlen_q"

    @property
    def minus_position_shift(self) -> str:
        """What follows a position, which gives the query's index."""
        return "- params.position_shift" if self.has_offset else "- params.seqlen_k + params.seqlen_q"

    @property
    def keys_of_block(self) -> str:
        """Where the keys of a listed block's sequence lie, and how many there are."""
        if self.is_paged:
            return "cached_keys(params, block.sequence)"
        return "sequence_of(params.cu_seqlens_k, params.seqused_k, params.batch, params.total_k, block.sequence)"

    @property
    def has_whole_range(self) -> bool:
        """Whether a tile's key blocks are all those from the first on."""
        return not self.has_window

    @property
    def key_block(self) -> str:
        """The key block that the index of a template's loop, n_block, stands for: of a window, an entry of a list."""
        return "blocks.at(n_block)" if self.has_window else "n_block"

    @property
    def has_softcap(self) -> bool:
        return self.key.softcap

    @property
    def has_dropout(self) -> bool:
        return self.key.dropout

    @property
    def is_fp8(self) -> bool:
        """Whether q, k and v are of 8 bits."""
        return self.key.dtype in FP8_DTYPES

    @property
    def has_float_out(self) -> bool:
        return self.key.float_out

    # ---- Params ------------------------------------------------------------------------------------------------------------------

    @property
    @abstractmethod
    def params(self) -> tuple[ParamField, ...]:
        """The fields of the kernel's Params struct, widest first."""

    @property
    def params_bytes(self) -> int:
        return params_dtype(self.params).itemsize


def round_up(value: int, multiple: int) -> int:
    return (value + multiple - 1) // multiple * multiple
