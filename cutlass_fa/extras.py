"""Extra arrays: what a call may bring beside q, k, v, the gradients and the results. Each is None where a call has none.

The order of ExtraSpecs' fields is the order in which Params structs have their addresses. A new one is a field here, its check, a
ParamField of the same name, and an argument of the public functions.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, fields
from typing import Any

from .arrays import ArrayLibrary, ArraySpec
from .errors import EmptyBatch, InvalidArgument
from .params import ParamField


@dataclass(frozen=True)
class ExtraSpecs:
    """alibi_slopes: float32 (num_heads_q,) or (batch, num_heads_q). learnable_sink: float32 (num_heads_q,). cu_seqlens_q, cu_seqlens_k:
    int32 (batch + 1,) of packed sequences; seqused_q, seqused_k: int32 (batch,). Of a KV cache, whose keys have no cu_seqlens_k:
    block_table: int32 (batch, max_blocks), of a contiguous cache (batch,), the row of each sequence; cache_leftpad: int32 (batch,).
    q_descale, k_descale, v_descale: positive float32 (batch, num_heads_kv) or one number, the latter two also (batch, num_heads_kv,
    blocks of DESCALE_BLOCK keys); any strides."""

    alibi_slopes: ArraySpec | None = None
    learnable_sink: ArraySpec | None = None
    cu_seqlens_q: ArraySpec | None = None
    cu_seqlens_k: ArraySpec | None = None
    seqused_q: ArraySpec | None = None
    seqused_k: ArraySpec | None = None
    block_table: ArraySpec | None = None
    cache_leftpad: ArraySpec | None = None
    q_descale: ArraySpec | None = None
    k_descale: ArraySpec | None = None
    v_descale: ArraySpec | None = None

    @property
    def has_descale(self) -> bool:
        """Whether there are factors of fp8 q, k or v."""
        return any(getattr(self, name) is not None for name in DESCALE_NAMES)

    @property
    def has_block_descale(self) -> bool:
        """Whether some are for each block of keys."""
        return any(spec is not None and len(spec.shape) == 3 for spec in (self.k_descale, self.v_descale))

    @property
    def is_packed(self) -> bool:
        """Whether sequences are packed one after the other. Raises InvalidArgument where only some of what says so is given."""
        if (self.cu_seqlens_q is None) != (self.cu_seqlens_k is None):
            raise InvalidArgument("cu_seqlens_q and cu_seqlens_k go together: packed q needs packed k and v")
        if self.cu_seqlens_q is None and (self.seqused_q is not None or self.seqused_k is not None):
            raise InvalidArgument("seqused_q and seqused_k are of packed sequences: pass cu_seqlens_q and cu_seqlens_k")
        return self.cu_seqlens_q is not None

    @property
    def num_sequences(self) -> int:
        """Of packed ones. Raises EmptyBatch where cu_seqlens_q has less than two numbers."""
        assert self.cu_seqlens_q is not None
        numbers = self.cu_seqlens_q.shape[0] if len(self.cu_seqlens_q.shape) == 1 else 0
        if numbers < 2:
            raise EmptyBatch(f"cu_seqlens_q has shape {self.cu_seqlens_q.shape}: expected (batch + 1,) with at least one sequence")
        return numbers - 1

    @classmethod
    def of(cls, library: ArrayLibrary, extras: Sequence[Any]) -> ExtraSpecs:
        """extras: arrays or None in the order of EXTRA_NAMES."""
        return cls(*(None if array is None else library.spec(array) for array in extras))

    def num_cached_sequences(self, default: int) -> int:
        """Of a KV cache; `default` where no array says it. Raises InvalidArgument for cu_seqlens_k, EmptyBatch where there are none."""
        if self.cu_seqlens_k is not None:
            raise InvalidArgument("the keys of a cache have lengths (seqused_k), one for each sequence, and no cu_seqlens_k")
        if self.cu_seqlens_q is not None:
            return self.num_sequences
        spec = self.seqused_k or self.block_table
        batch = default if spec is None else (spec.shape or (0,))[0]
        if batch < 1:
            raise EmptyBatch("at least one sequence is needed: an array that has a number for each is empty")
        return batch

    def check(self, q: ArraySpec, batch: int, num_heads_kv: int, seqlen_k: int) -> None:
        """Raises InvalidArgument, naming the array, where one is not what it should be, or not where q (..., num_heads_q, head_dim) is.
        seqlen_k: keys of the longest sequence."""
        if self.alibi_slopes is not None:
            _check_slopes(self.alibi_slopes, batch, q.shape[-2])
        if self.learnable_sink is not None:
            check_per_head("learnable_sink", self.learnable_sink, q.shape[-2])
        for name, length in (
            ("cu_seqlens_q", batch + 1),
            ("cu_seqlens_k", batch + 1),
            ("seqused_q", batch),
            ("seqused_k", batch),
            ("cache_leftpad", batch),
        ):
            spec = getattr(self, name)
            if spec is not None:
                _check_lengths(name, spec, length)
        if self.block_table is not None:
            _check_table(self.block_table, batch)
        for name in DESCALE_NAMES:
            factors = getattr(self, name)
            if factors is not None:
                _check_factors(name, factors, (batch, num_heads_kv), -(-seqlen_k // DESCALE_BLOCK))
        for field in fields(self):
            spec = getattr(self, field.name)
            if spec is not None:
                check_device(field.name, spec, q)


DESCALE_BLOCK = 128  # keys that share a factor
DESCALE_NAMES = ("q_descale", "k_descale", "v_descale")
NO_DESCALES = (None, None, None)  # of a call's extra arrays
NO_EXTRAS = ExtraSpecs()
EXTRA_NAMES = tuple(field.name for field in fields(ExtraSpecs))


def extra_words(params: Sequence[ParamField], extras: ExtraSpecs) -> dict[int, int]:
    """Of the extra arrays that a call has and its kernel takes: place in EXTRA_NAMES -> 64-bit word of Params that holds the address."""
    words = {field.name: word for word, field in enumerate(params) if field.is_address}
    return {i: words[name] for i, name in enumerate(EXTRA_NAMES) if name in words and getattr(extras, name) is not None}


def check_device(name: str, spec: ArraySpec, q: ArraySpec) -> None:
    """Raises InvalidArgument unless the array is where q is."""
    if spec.device != q.device:
        raise InvalidArgument(f"{name} is on device {spec.device} and q on device {q.device}: all arrays must be on one GPU")


def check_per_head(name: str, spec: ArraySpec, num_heads_q: int) -> None:
    """Raises InvalidArgument, naming the array, unless it has one float32 for each query head."""
    if spec.shape != (num_heads_q,):
        raise InvalidArgument(f"{name} has shape {spec.shape}: expected ({num_heads_q},), a number a query head")
    check_numbers(name, spec, "float32")


def _check_slopes(slopes: ArraySpec, batch: int, num_heads_q: int) -> None:
    if slopes.shape not in ((num_heads_q,), (batch, num_heads_q)):
        raise InvalidArgument(
            f"alibi_slopes has shape {slopes.shape}: expected ({num_heads_q},) or ({batch}, {num_heads_q}), a slope a head"
        )
    check_numbers("alibi_slopes", slopes, "float32")


def _check_factors(name: str, factors: ArraySpec, heads: tuple[int, int], key_blocks: int) -> None:
    """heads: (batch, num_heads_kv)."""
    by_block = name != "q_descale" and len(factors.shape) == 3
    if factors.shape not in ((), (1,), heads) and not (by_block and factors.shape[:2] == heads and factors.shape[2] >= key_blocks):
        more = "" if name == "q_descale" else f" or {(*heads, key_blocks)}, a factor for each {DESCALE_BLOCK} keys"
        raise InvalidArgument(f"{name} has shape {factors.shape}: expected one factor, or {heads}, (batch, num_heads_kv){more}")
    if factors.dtype != "float32":
        raise InvalidArgument(f"{name} has dtype {factors.dtype}: expected float32; convert it with astype")


def _check_lengths(name: str, spec: ArraySpec, length: int) -> None:
    if spec.shape != (length,):
        meaning = "(batch + 1,)" if name.startswith("cu_seqlens") else "(batch,)"
        raise InvalidArgument(f"{name} has shape {spec.shape}: expected ({length},), {meaning} with the batch that cu_seqlens_q has")
    check_numbers(name, spec, "int32")


def _check_table(table: ArraySpec, batch: int) -> None:
    if len(table.shape) not in (1, 2) or table.shape[0] != batch:
        raise InvalidArgument(f"block_table has shape {table.shape}: expected ({batch}, max_blocks), a row of blocks a sequence")
    check_numbers("block_table", table, "int32")


def check_numbers(name: str, spec: ArraySpec, dtype: str) -> None:
    """Raises InvalidArgument, naming the array, unless it has that dtype and a contiguous last dimension."""
    if spec.dtype != dtype:
        raise InvalidArgument(f"{name} has dtype {spec.dtype}: expected {dtype}; convert it with astype")
    if spec.shape[-1] > 1 and spec.strides[-1] != 1:
        raise InvalidArgument(f"{name} has strides {spec.strides} (elements): the last dimension must be contiguous (stride 1)")
