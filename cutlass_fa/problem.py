"""Problem: a request together with what its arrays look like, every argument checked.

A Problem holds no addresses: two calls with arrays of the same shapes, strides and dtypes are the same Problem.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

from .arrays import ArraySpec
from .dispatch import FP8_DTYPES
from .errors import Fp8MustUseFp8Request, InvalidArgument, PagedHeadDimMismatch, UnsupportedDtype
from .extras import NO_EXTRAS, ExtraSpecs, check_device
from .kv_cache import ContiguousKvCache, KvCache, PagedKvCache
from .request_parts import CumulativeSeqlens, MaskKind, PersistentMode, PositionBias
from .requests import DTYPES_16BIT, FwdRequest, forward_request
from .requests_fp8 import Fp8Options

ALIGNMENT_BYTES = 16  # of every address and stride: the granularity of TMA and of the kernels' stores
_ELEMENT_BYTES = {"float32": 4, "e4m3": 1, "e5m2": 1}  # of all others 2


@dataclass(frozen=True)
class Problem:
    """q (batch, seqlen_q, num_heads_q, head_dim), k and v (batch, seqlen_k, num_heads_kv, head_dim), out like q, or in float32; strides in
    elements. Of packed sequences all of them stand as one of total_q and total_k rows, in a batch of 1 (the request's batch counts the
    sequences). Of a KV cache k and v are its pages (num_blocks, block_size, num_heads_kv, head_dim); batch_shape: (batch, seqlen_q)
    where the caller's q and out have them as two dimensions."""

    request: FwdRequest
    q: ArraySpec
    k: ArraySpec
    v: ArraySpec
    out: ArraySpec
    extras: ExtraSpecs = NO_EXTRAS
    batch_shape: tuple[int, int] | None = None

    @property
    def lse_shape(self) -> tuple[int, ...]:
        """(batch, num_heads_q, seqlen_q), of packed sequences (num_heads_q, total_q)."""
        batch = () if self.request.cu_seqlens is not None else (self.request.batch,)
        return *batch, self.request.num_heads_q, self.request.rows_q

    @property
    def out_shape(self) -> tuple[int, ...]:
        """As the caller sees it: of packed sequences (total_q, num_heads_q, head_dim)."""
        if self.batch_shape is not None:
            return *self.batch_shape, *self.out.shape[2:]
        return self.out.shape if self.request.cu_seqlens is None else self.out.shape[1:]

    @classmethod
    def from_specs(
        cls,
        q: ArraySpec,
        k: ArraySpec,
        v: ArraySpec,
        out: ArraySpec | None,
        *,
        arch: str,
        mask: MaskKind,
        sink_tokens: int = 0,
        extras: ExtraSpecs = NO_EXTRAS,
        softmax_scale: float | None = None,
        softcap: float = 0.0,
        dropout_p: float = 0.0,
        q_offset: int | None = None,
        k_offset: int | None = None,
        float_out: bool = False,
        persistent: PersistentMode | None = None,
        family: str | None = None,
        max_seqlen_q: int | None = None,
        max_seqlen_k: int | None = None,
        cached: bool = False,
        num_splits: int = 0,
        fp8: Fp8Options | None = None,
    ) -> Problem:
        """Check the arrays of a forward call and describe it. out None: a fresh contiguous (batch, seqlen_q, num_heads_q, head_dim).
        family None: the one that serves the call. With cu_seqlens among the extras, q, k, v and out are packed, without the batch
        dimension, and max_seqlen_q, max_seqlen_k say how long sequences are at most (None: not known). cached: k and v are a KV cache,
        paged where block_table has two dimensions; q and out are packed where there is cu_seqlens_q, else as always. fp8: options of 8-bit
        q, k, v; None: the defaults.

        Raises InvalidArgument (rank, shape, stride, device, a mix of dtypes; names the argument), UnsupportedDtype, and everything
        that the request raises (EmptyBatch, ZeroSeqlen, InvalidGqaRatio, UnsupportedHeadDim ...).
        """
        packed = extras.cu_seqlens_q is not None if cached else extras.is_packed
        for name, spec in (("q", q), ("k", k), ("v", v)):
            check_rank(name, spec, packed and (name == "q" or not cached))
        batch_shape = (q.shape[0], q.shape[1]) if cached and not packed else None
        if packed:
            if out is not None:
                check_rank("out", out, packed)
                out = one_sequence(out)
            q = one_sequence(q)
            k, v = (k, v) if cached else (one_sequence(k), one_sequence(v))
        if batch_shape is not None:
            q, out = rows_of_batch("q", q), None if out is None else rows_of_batch("out", out)
        check_same_dtype(q, k, v)
        check_shapes(q, k, v, cached)
        num_heads_q, head_dim = q.shape[2:]
        if cached:
            sizes = cached_sizes_of(q, k, v, extras, max_seqlen_q, batch_shape)
        else:
            sizes = sizes_of(q, k, extras, max_seqlen_q, max_seqlen_k)
        request = forward_request(
            family,
            persistent,
            **sizes,
            num_heads_q=num_heads_q,
            num_heads_kv=k.shape[2],
            head_dim=head_dim,
            dtype=q.dtype,
            mask=mask,
            sink_tokens=sink_tokens,
            position_bias=PositionBias(extras.alibi_slopes is not None),
            learnable_sink=extras.learnable_sink is not None,
            softmax_scale=softmax_scale,
            softcap=softcap,
            dropout_p=dropout_p,
            q_offset=q_offset,
            k_offset=k_offset,
            float_out=float_out,
            num_splits=num_splits,
            arch=arch,
            **fp8_arguments(q, v, extras, fp8),
        )
        like = replace(q, dtype="float32" if float_out else request.out_dtype)
        if out is None:
            out = fresh_like(like)
            out = replace(out, strides=(0, *out.strides[1:])) if packed or cached else out
        if float_out and out.dtype != like.dtype:
            raise InvalidArgument(f"out has dtype {out.dtype}: expected float32, as out_dtype says")
        check_out(out, like)
        for name, spec in (("q", q), ("k", k), ("v", v), ("out", out)):
            check_strides(name, spec, cached and name in ("k", "v") and has_tokens_inner(spec))
            check_device(name, spec, q)
        extras.check(q, request.batch, request.num_heads_kv, request.seqlen_k)
        if request.kv_cache is not None:
            check_padding(request.kv_cache, extras)
        return cls(request, q, k, v, out, extras, batch_shape)


def fp8_arguments(q: ArraySpec, v: ArraySpec, extras: ExtraSpecs, fp8: Fp8Options | None) -> dict[str, Any]:
    """What a request of 8-bit q, k and v is told beside what others are; nothing where they have 16 bits: InvalidArgument is raised where
    there are options or factors of 8-bit numbers then."""
    if q.dtype in FP8_DTYPES:
        return {"v_dtype": v.dtype, "fp8": fp8 or Fp8Options(), "descale": extras.has_descale, "block_descale": extras.has_block_descale}
    if fp8 is not None or extras.has_descale:
        raise InvalidArgument(f"q has dtype {q.dtype}: q_descale, k_descale, v_descale and accumulate are of fp8 q, k and v")
    return {}


def check_pointers(pointers: tuple[int, ...]) -> None:
    """Raises InvalidArgument, naming the array, unless the addresses of q, k, v and out are multiples of 16 bytes."""
    q, k, v, out = pointers
    if (q | k | v | out) % ALIGNMENT_BYTES == 0:
        return
    name, pointer = next(pair for pair in zip(("q", "k", "v", "out"), pointers, strict=True) if pair[1] % ALIGNMENT_BYTES)
    raise InvalidArgument(f"{name} starts at address {pointer:#x}, not a multiple of {ALIGNMENT_BYTES} bytes; copy it to a fresh array")


def sizes_of(q: ArraySpec, k: ArraySpec, extras: ExtraSpecs, max_seqlen_q: int | None, max_seqlen_k: int | None) -> dict[str, Any]:
    """How many sequences there are and how long: fields of a request. q, k: of packed sequences as one_sequence gives them."""
    if not extras.is_packed:
        return {"batch": q.shape[0], "seqlen_q": q.shape[1], "seqlen_k": k.shape[1]}
    assert extras.cu_seqlens_q is not None
    rows = CumulativeSeqlens(q.shape[1], k.shape[1])
    longest = (
        total if given is None else min(given, total) for given, total in ((max_seqlen_q, rows.total_q), (max_seqlen_k, rows.total_k))
    )
    return dict(zip(("seqlen_q", "seqlen_k"), longest, strict=True)) | {"batch": extras.num_sequences, "cu_seqlens": rows}


def cached_sizes_of(
    q: ArraySpec, k: ArraySpec, v: ArraySpec, extras: ExtraSpecs, max_seqlen_q: int | None, batch_shape: tuple[int, int] | None
) -> dict[str, Any]:
    """The same where k and v are a cache's pages and q one sequence of all rows."""
    batch, total_q = extras.num_cached_sequences(k.shape[0] if batch_shape is None else batch_shape[0]), q.shape[1]
    if batch_shape is not None:
        if batch != batch_shape[0]:
            raise InvalidArgument(f"q has batch {batch_shape[0]} and the cache's lengths or table have {batch} rows: they must agree")
        max_seqlen_q = batch_shape[1]
    cache = kv_cache_of(k, v, extras.block_table, batch)
    longest = total_q if max_seqlen_q is None else min(max_seqlen_q, total_q)
    rows = CumulativeSeqlens(total_q, batch * cache.capacity)
    return {"batch": batch, "seqlen_q": longest, "seqlen_k": cache.capacity, "cu_seqlens": rows, "kv_cache": cache}


def kv_cache_of(k: ArraySpec, v: ArraySpec, block_table: ArraySpec | None, batch: int) -> KvCache:
    """What a cache's pages are: those of a block table (batch, max_blocks), or whole sequences. Raises InvalidArgument,
    InvalidPagedBlockSize, EmptyPagedCache."""
    num_blocks, block_size = k.shape[:2]
    inner = {"k_tokens_inner": has_tokens_inner(k), "v_tokens_inner": has_tokens_inner(v)}
    if block_table is None and batch > num_blocks:
        raise InvalidArgument(f"k has {num_blocks} rows for {batch} sequences: one each is needed, or a table that says which")
    if block_table is None or len(block_table.shape) == 1:
        return ContiguousKvCache(num_blocks, block_size, **inner)
    return PagedKvCache(num_blocks, block_size, block_table.shape[1], **inner)


def has_tokens_inner(pages: ArraySpec) -> bool:
    """Whether the memory of a cache (num_blocks, block_size, num_heads_kv, head_dim) has tokens innermost, not the columns of one."""
    return pages.strides[3] != 1 and pages.strides[1] == 1


def check_padding(cache: KvCache, extras: ExtraSpecs) -> None:
    """Raises InvalidArgument for padding in front of keys where tokens are innermost."""
    if extras.cache_leftpad is not None and (cache.k_tokens_inner or cache.v_tokens_inner):
        raise InvalidArgument(
            "cache_leftpad with a cache whose tokens are innermost: kernels load its keys in groups of 8, which the first key must begin; "
            "move each sequence to the front of its cache, or keep the cache as (..., num_heads_kv, head_dim)"
        )


def rows_of_batch(name: str, spec: ArraySpec) -> ArraySpec:
    """(batch, seqlen, heads, head_dim) as one sequence of batch * seqlen rows. Raises InvalidArgument where they are unequally apart."""
    batch, seqlen, *others = spec.shape
    by_batch, by_row, *of_others = spec.strides
    step = by_batch if seqlen == 1 else by_row
    if batch > 1 and seqlen > 1 and by_batch != seqlen * by_row:
        raise InvalidArgument(
            f"{name} has strides {spec.strides} (elements): in a call on a cache sequences must follow each other, {seqlen} rows "
            f"of {by_row} elements apart; copy {name} to a contiguous array, or pass it packed with cu_seqlens_q"
        )
    return ArraySpec((1, batch * seqlen, *others), (0, step, *of_others), spec.dtype, spec.device)


def one_sequence(spec: ArraySpec) -> ArraySpec:
    """A batch dimension of 1 in front, e.g. (total, heads, head_dim) as (1, total, heads, head_dim)."""
    return replace(spec, shape=(1, *spec.shape), strides=(0, *spec.strides))


def check_rank(name: str, spec: ArraySpec, packed: bool = False) -> None:
    """Raises InvalidArgument unless there are four dimensions, or three of packed sequences."""
    if packed:
        if len(spec.shape) != 3:
            raise InvalidArgument(f"{name} has shape {spec.shape}: expected 3 dimensions (total, num_heads, head_dim) with cu_seqlens")
        return
    if len(spec.shape) != 4:
        raise InvalidArgument(
            f"{name} has shape {spec.shape}: expected 4 dimensions (batch, seqlen, num_heads, head_dim); "
            "a single sequence gets a batch dimension of 1"
        )


def check_same_dtype(q: ArraySpec, k: ArraySpec, v: ArraySpec) -> None:
    """Raises UnsupportedDtype for what no kernel knows, InvalidArgument for a mix."""
    for name, spec in (("q", q), ("k", k), ("v", v)):
        if spec.dtype not in (*DTYPES_16BIT, *FP8_DTYPES):
            raise UnsupportedDtype(
                f"{name} has dtype {spec.dtype}: accepted are float16 and bfloat16, and on Hopper float8_e4m3fn and float8_e5m2 (bits in "
                "uint8 with dtype=); convert with astype"
            )
        if name == "v" and {spec.dtype, q.dtype} <= set(FP8_DTYPES):
            continue  # v may have the other fp8 type
        if spec.dtype != q.dtype:
            error = Fp8MustUseFp8Request if q.dtype in FP8_DTYPES or spec.dtype in FP8_DTYPES else InvalidArgument
            raise error(
                f"{name} has dtype {spec.dtype} and q has {q.dtype}: q, k and v must have the same dtype, or be fp8, where v may have the "
                "other"
            )


def check_shapes(q: ArraySpec, k: ArraySpec, v: ArraySpec, cached: bool = False) -> None:
    """Raises InvalidArgument where the shapes of q, k and v contradict each other."""
    if v.shape != k.shape:
        raise InvalidArgument(f"v has shape {v.shape} and k has {k.shape}: they must be equal (batch, seqlen_k, num_heads_kv, head_dim)")
    if not cached and k.shape[0] != q.shape[0]:
        raise InvalidArgument(f"k has batch {k.shape[0]} and q has {q.shape[0]}: they must be equal")
    if k.shape[3] != q.shape[3] and cached:
        raise PagedHeadDimMismatch(f"the cache has head_dim {k.shape[3]} and q has {q.shape[3]}: they must be equal")
    if k.shape[3] != q.shape[3]:
        raise InvalidArgument(f"k has head_dim {k.shape[3]} and q has {q.shape[3]}: they must be equal")


def check_out(out: ArraySpec, q: ArraySpec, name: str = "out", like: str = "q", allow_broadcast: bool = False) -> None:
    """Raises InvalidArgument unless `out` can take a result of the shape and dtype of q. name, like: what the two are called.
    allow_broadcast: it is only read, so a stride may be 0."""
    if out.shape != q.shape:
        raise InvalidArgument(f"{name} has shape {out.shape}: expected {q.shape}, the shape of {like}")
    if out.dtype != q.dtype:
        raise InvalidArgument(f"{name} has dtype {out.dtype}: expected {q.dtype}, the dtype of {like}")
    if not allow_broadcast and any(stride == 0 and extent > 1 for stride, extent in zip(out.strides, out.shape, strict=True)):
        raise InvalidArgument(f"{name} has strides {out.strides}: a stride of 0 would have several results written to one place")


def check_strides(name: str, spec: ArraySpec, tokens_inner: bool = False) -> None:
    """Raises InvalidArgument unless the last dimension, or with tokens_inner that of tokens, is contiguous and the others step by multiples
    of 16 bytes."""
    if spec.strides[3] != 1 and not tokens_inner:
        raise InvalidArgument(f"{name} has strides {spec.strides} (elements): the last dimension must be contiguous (stride 1)")
    step = ALIGNMENT_BYTES // _ELEMENT_BYTES.get(spec.dtype, 2)
    contiguous = 1 if tokens_inner else 3
    for axis, (stride, extent) in enumerate(zip(spec.strides, spec.shape, strict=True)):
        if axis != contiguous and extent > 1 and (stride < 0 or stride % step):
            raise InvalidArgument(
                f"{name} has strides {spec.strides} (elements): the stride of dimension {axis} must be a non-negative multiple of {step} "
                f"({ALIGNMENT_BYTES} bytes); copy {name} to a contiguous array"
            )


def fresh_like(like: ArraySpec) -> ArraySpec:
    """A contiguous array of the same shape, dtype and device."""
    return ArraySpec(like.shape, contiguous_strides(like.shape), like.dtype, like.device)


def contiguous_strides(shape: tuple[int, ...]) -> tuple[int, ...]:
    """Strides, in elements, of a contiguous array."""
    strides = [1] * len(shape)
    for axis in range(len(shape) - 2, -1, -1):
        strides[axis] = strides[axis + 1] * shape[axis + 1]
    return tuple(strides)
