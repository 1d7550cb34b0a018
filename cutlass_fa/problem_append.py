"""AppendProblem: what stands before attention over a KV cache, every argument checked: new rows for the cache, rotary, lengths."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, fields
from typing import Any

from .arrays import ArraySpec
from .dispatch import APPEND_KV_HEAD_DIM, DispatchKey, cell_head_dim
from .errors import EmptyBatch, InvalidArgument, PagedHeadDimMismatch, UnsupportedDtype, UnsupportedHeadDim, ZeroSeqlen
from .extras import check_device, check_numbers
from .kv_cache import ContiguousKvCache, KvCache, PagedKvCache
from .problem import ALIGNMENT_BYTES, check_rank, check_strides, fresh_like, one_sequence
from .requests import DTYPES_16BIT

ROTARY_MULTIPLE = 16  # of rotary_dim: every eight columns then turn with eight others, or among themselves


@dataclass(frozen=True)
class AppendArrays:
    """What each array of a call looks like; None where the call has none. Of packed sequences q, k and v have a batch dimension of 1.

    q (batch, seqlen_q, num_heads_q, head_dim); k, v (batch, seqlen_new, num_heads_kv, head_dim), to be appended to k_cache, v_cache
    (num_blocks, block_size, num_heads_kv, head_dim), of a contiguous cache (batch_cache, seqlen_cache, ...). rotary_cos, rotary_sin
    (seqlen_rotary, rotary_dim / 2). int32: cache_seqlens, cache_batch_idx, rotary_seqlens, cache_leftpad (batch,), block_table (batch,
    max_blocks), cu_seqlens_q, cu_seqlens_k_new (batch + 1,). Positions count the padding, so that appending does not look at it.
    """

    q: ArraySpec
    k_cache: ArraySpec
    v_cache: ArraySpec
    k: ArraySpec | None = None
    v: ArraySpec | None = None
    rotary_cos: ArraySpec | None = None
    rotary_sin: ArraySpec | None = None
    cache_seqlens: ArraySpec | None = None
    cache_batch_idx: ArraySpec | None = None
    block_table: ArraySpec | None = None
    cu_seqlens_q: ArraySpec | None = None
    cu_seqlens_k_new: ArraySpec | None = None
    rotary_seqlens: ArraySpec | None = None
    cache_leftpad: ArraySpec | None = None


APPEND_NAMES = tuple(field.name for field in fields(AppendArrays))
_OF_SEQUENCES = ("cache_seqlens", "cache_batch_idx", "rotary_seqlens", "cache_leftpad")


@dataclass(frozen=True)
class AppendProblem:
    """batch: sequences. cache: what k_cache and v_cache are. turned_q: the fresh array of q's shape that rotary writes. rotary_interleaved:
    pairs are columns 2i and 2i + 1, else i and i + rotary_dim / 2. successive_queries: row i of q stands at the position of the first
    plus i (causal or sliding attention), else all rows of a sequence at that of the first. arch: NVRTC's name of the target GPU."""

    arrays: AppendArrays
    batch: int
    cache: KvCache
    turned_q: ArraySpec
    rotary_interleaved: bool
    successive_queries: bool
    arch: str

    @property
    def has_rotary(self) -> bool:
        return self.arrays.rotary_cos is not None

    @property
    def total_q(self) -> int:
        """Rows of q of all sequences."""
        return self.arrays.q.shape[0] * self.arrays.q.shape[1]

    @property
    def total_new(self) -> int:
        """Rows of k and v of all sequences."""
        return 0 if self.arrays.k is None else self.arrays.k.shape[0] * self.arrays.k.shape[1]

    def dispatch_key(self) -> DispatchKey:
        """The kernel of the pass."""
        return DispatchKey("fa2", "append_kv", self.arch, self.arrays.q.dtype, APPEND_KV_HEAD_DIM, rotary=self.has_rotary)

    @classmethod
    def from_specs(
        cls, specs: Mapping[str, ArraySpec | None], *, arch: str, rotary_interleaved: bool = True, successive_queries: bool = False
    ) -> AppendProblem:
        """specs: by the names of APPEND_NAMES, as the caller has the arrays: packed ones without a batch dimension.

        Raises InvalidArgument (rank, shape, stride, dtype, device; names the argument), UnsupportedDtype, UnsupportedHeadDim, EmptyBatch,
        ZeroSeqlen, EmptyPagedCache, InvalidPagedBlockSize, PagedHeadDimMismatch.
        """
        arrays = _with_batch(specs)
        batch = _batch_of(arrays)
        _check_dtypes(arrays)
        check_tables(*(spec is not None for spec in (arrays.block_table, arrays.cache_batch_idx, arrays.cache_leftpad)))
        cache = _check_caches(arrays, batch)
        _check_new_rows(arrays, batch)
        _check_rotary(arrays)
        for name in _OF_SEQUENCES:
            _check_numbers(arrays, name, (batch,))
        for name in ("cu_seqlens_q", "cu_seqlens_k_new"):
            _check_numbers(arrays, name, (batch + 1,))
        for name, spec in vars(arrays).items():
            if spec is not None:
                check_device(name, spec, arrays.q)
        return cls(arrays, batch, cache, fresh_like(arrays.q), rotary_interleaved, successive_queries, arch)


def _with_batch(specs: Mapping[str, ArraySpec | None]) -> AppendArrays:
    """Ranks checked; packed arrays get a batch dimension of 1."""
    named: dict[str, Any] = dict(specs)
    for name in ("q", "k_cache", "v_cache"):
        if named[name] is None:
            raise InvalidArgument(f"{name} is None: q, k_cache and v_cache are needed")
    for name, starts in (("q", "cu_seqlens_q"), ("k", "cu_seqlens_k_new"), ("v", "cu_seqlens_k_new")):
        if named[name] is None:
            continue
        packed = named[starts] is not None
        check_rank(name, named[name], packed)
        named[name] = one_sequence(named[name]) if packed else named[name]
    return AppendArrays(**named)


def _batch_of(arrays: AppendArrays) -> int:
    """Sequences of the call. Raises EmptyBatch, ZeroSeqlen."""
    starts = arrays.cu_seqlens_q
    batch = arrays.q.shape[0] if starts is None else (starts.shape or (0,))[0] - 1
    if batch < 1:
        raise EmptyBatch(f"q has shape {arrays.q.shape} and cu_seqlens_q {starts and starts.shape}: at least one sequence is needed")
    if arrays.q.shape[1] < 1:
        raise ZeroSeqlen(f"q has shape {arrays.q.shape}: at least one query is needed")
    return batch


def _check_dtypes(arrays: AppendArrays) -> None:
    q = arrays.q
    if q.dtype not in DTYPES_16BIT:
        raise UnsupportedDtype(f"q has dtype {q.dtype}: accepted are float16 and bfloat16; convert with astype")
    for name in ("k_cache", "v_cache", "k", "v", "rotary_cos", "rotary_sin"):
        spec = getattr(arrays, name)
        if spec is not None and spec.dtype != q.dtype:
            raise InvalidArgument(f"{name} has dtype {spec.dtype} and q has {q.dtype}: they must have the same dtype")
    if cell_head_dim(q.shape[3]) is None:
        raise UnsupportedHeadDim(f"head_dim={q.shape[3]}: accepted are multiples of 8 from 8 to 256; pad the last dimension")
    check_strides("q", q)


def _check_caches(arrays: AppendArrays, batch: int) -> KvCache:
    """What the caches are."""
    k_cache, v_cache = arrays.k_cache, arrays.v_cache
    for name, spec in (("k_cache", k_cache), ("v_cache", v_cache)):
        if len(spec.shape) != 4:
            raise InvalidArgument(
                f"{name} has shape {spec.shape}: expected (batch_cache, seqlen_cache, num_heads_kv, head_dim), or with block_table "
                "(num_blocks, block_size, num_heads_kv, head_dim); other orders in memory are strides (transposed views)"
            )
        if spec.shape[3] != arrays.q.shape[3]:
            raise PagedHeadDimMismatch(f"{name} has head_dim {spec.shape[3]} and q has {arrays.q.shape[3]}: they must be equal")
    if k_cache.shape != v_cache.shape:
        raise InvalidArgument(f"v_cache has shape {v_cache.shape} and k_cache has {k_cache.shape}: they must be equal")
    cache = _kv_cache(arrays, batch)
    check_cache_strides("k_cache", k_cache)
    check_cache_strides("v_cache", v_cache)
    return cache


def _kv_cache(arrays: AppendArrays, batch: int) -> KvCache:
    (num_blocks, block_size), table = arrays.k_cache.shape[:2], arrays.block_table
    if table is None:
        if arrays.cache_batch_idx is None and num_blocks < batch:
            raise InvalidArgument(f"k_cache has {num_blocks} rows for {batch} sequences: one each is needed, or cache_batch_idx")
        return ContiguousKvCache(num_blocks, block_size)
    if len(table.shape) != 2 or table.shape[0] != batch:
        raise InvalidArgument(f"block_table has shape {table.shape}: expected ({batch}, max_blocks), a row for each sequence")
    check_numbers("block_table", table, "int32")
    return PagedKvCache(num_blocks, block_size, table.shape[1])


def check_tables(has_block_table: bool, has_batch_idx: bool, has_leftpad: bool) -> None:
    """Raises InvalidArgument where a paged cache comes with what only a contiguous one has."""
    if has_block_table and has_batch_idx:
        raise InvalidArgument("cache_batch_idx and block_table are both given: rows of a block table say where a sequence's blocks lie")
    if has_block_table and has_leftpad:
        raise InvalidArgument(
            "cache_leftpad and block_table are both given: a paged cache needs no padding; begin each sequence with its first block"
        )


def check_cache_strides(name: str, spec: ArraySpec) -> None:
    """Raises InvalidArgument unless columns are neighbours and all else steps by multiples of 16 bytes, or tokens are neighbours."""
    extents = zip(spec.shape, spec.strides, strict=True)
    if any(stride <= 0 and extent > 1 for extent, stride in extents):
        raise InvalidArgument(f"{name} has strides {spec.strides} (elements): a cache that is written needs positive ones")
    if spec.strides[3] == 1:
        return check_strides(name, spec)
    if spec.strides[1] != 1 and spec.shape[1] > 1:
        raise InvalidArgument(
            f"{name} has strides {spec.strides} (elements): columns (the last dimension) or tokens (the second) must be contiguous"
        )
    return None


def _check_new_rows(arrays: AppendArrays, batch: int) -> None:
    k, v = arrays.k, arrays.v
    if (k is None) != (v is None):
        raise InvalidArgument("k and v go together: one of them is None")
    if k is None or v is None:
        if arrays.cu_seqlens_k_new is not None:
            raise InvalidArgument("cu_seqlens_k_new is given and k is None: it says where the sequences of k and v begin")
        return
    if k.shape != v.shape:
        raise InvalidArgument(f"v has shape {v.shape} and k has {k.shape}: they must be equal")
    if arrays.cu_seqlens_k_new is None and k.shape[0] != batch:
        raise InvalidArgument(f"k has batch {k.shape[0]} and q has {batch}: they must be equal")
    if k.shape[1] < 1:
        raise ZeroSeqlen(f"k has shape {k.shape}: at least one new row is needed; leave out k and v where there is none")
    if k.shape[2:] != arrays.k_cache.shape[2:]:
        raise InvalidArgument(f"k has {k.shape[2:]} heads and columns and k_cache has {arrays.k_cache.shape[2:]}: they must be equal")
    check_strides("k", k)
    check_strides("v", v)


def _check_rotary(arrays: AppendArrays) -> None:
    cos, sin, q = arrays.rotary_cos, arrays.rotary_sin, arrays.q
    if (cos is None) != (sin is None):
        raise InvalidArgument("rotary_cos and rotary_sin go together: one of them is None")
    if cos is None or sin is None:
        if arrays.rotary_seqlens is not None:
            raise InvalidArgument("rotary_seqlens is given and rotary_cos is None: there is no position that it could replace")
        return
    if arrays.k is None:
        raise InvalidArgument("rotary_cos is given and k is None: rotary turns q and the new keys; pass k and v, or turn q beforehand")
    if len(cos.shape) != 2 or cos.shape != sin.shape or cos.shape[0] < 1:
        raise InvalidArgument(f"rotary_cos has shape {cos.shape} and rotary_sin {sin.shape}: expected (seqlen_rotary, rotary_dim / 2)")
    rotary_dim = 2 * cos.shape[1]
    if rotary_dim % ROTARY_MULTIPLE or not 0 < rotary_dim <= q.shape[3]:
        raise InvalidArgument(
            f"rotary_cos has {cos.shape[1]} columns, so rotary_dim is {rotary_dim}: accepted are multiples of {ROTARY_MULTIPLE} up to "
            f"head_dim={q.shape[3]}"
        )
    step = ALIGNMENT_BYTES // 2
    for name, spec in (("rotary_cos", cos), ("rotary_sin", sin)):
        if spec.strides[1] != 1 or (spec.shape[0] > 1 and (spec.strides[0] < 0 or spec.strides[0] % step)):
            raise InvalidArgument(
                f"{name} has strides {spec.strides} (elements): columns must be contiguous and rows a multiple of {step} apart; copy it"
            )


def _check_numbers(arrays: AppendArrays, name: str, shape: tuple[int, ...]) -> None:
    spec = getattr(arrays, name)
    if spec is None:
        return
    if spec.shape != shape:
        raise InvalidArgument(f"{name} has shape {spec.shape}: expected {shape}, by the number of sequences of q")
    check_numbers(name, spec, "int32")
