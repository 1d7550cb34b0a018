"""Requests: one kind of call described without arrays, so that a workload can be planned, explained and compiled with no GPU.

Requests and Problem are the only places that raise on user input.
"""

from __future__ import annotations

import math
import numbers
from dataclasses import dataclass, field, fields, replace
from typing import Any, TypeAlias

from .arch.fa2_bwd import fa2_bwd_tile
from .arch.limits import arch_problem, limits_of
from .arch.sm80 import fa2_fwd_tile
from .arch.sm90 import fa3_fwd_tile_of
from .dispatch import FAMILIES, FP8_DTYPES, MAX_GQA_RATIO, SEQUENCE_TILES_OF, DispatchKey, cell_head_dim, family_of
from .errors import (
    EmptyBatch,
    Fa3RequiresHopper,
    Fp8BackwardUnsupported,
    Fp8MustUseFp8Request,
    InvalidArgument,
    InvalidGqaRatio,
    SeqlenOverflow,
    SinkWithoutMask,
    UnsupportedDtype,
    UnsupportedHeadDim,
)
from .kv_cache import KvCache
from .request_parts import MAX_SEQLEN, CumulativeSeqlens, Full, Grid, MaskKind, PersistentMode, PositionBias, check_rows

DTYPES_16BIT = ("f16", "bf16")


# ---- requests ------------------------------------------------------------------------------------------------------------------------


@dataclass(frozen=True, kw_only=True)
class AttentionRequest:
    """What every call has: q (batch, seqlen_q, num_heads_q, head_dim); k, v (batch, seqlen_k, num_heads_kv, head_dim); or, with
    cu_seqlens, q (total_q, num_heads_q, head_dim); k, v (total_k, num_heads_kv, head_dim) and at most seqlen_q and seqlen_k of a sequence.

    dtype: "f16" or "bf16". softmax_scale: default 1 / sqrt(head_dim). softcap: scores become softcap * tanh(score / softcap); 0 (the
    default): as they are. learnable_sink: whether each row's denominator has a logit without a key (the logits are a runtime array).
    dropout_p: the share of probabilities set to 0, in [0, 1). q_offset, k_offset: positions of the first query and of the first key, for
    mask and bias; given one, the other is 0; given neither, the last query stands at the last key. arch: NVRTC's name of the target GPU.
    kv_cache: k and v are a cache's (num_blocks, block_size, num_heads_kv, head_dim); seqlen_k is then the most that a sequence may
    have, and cu_seqlens.total_k that of all sequences together (requests_cache.py).
    Raises EmptyBatch, ZeroSeqlen, SeqlenOverflow, InvalidGqaRatio, UnsupportedHeadDim, UnsupportedDtype, SinkWithoutMask, InvalidArgument.
    """

    batch: int
    seqlen_q: int
    seqlen_k: int
    num_heads_q: int
    num_heads_kv: int
    head_dim: int
    dtype: str = "bf16"
    mask: MaskKind = field(default_factory=Full)
    sink_tokens: int = 0
    position_bias: PositionBias = field(default_factory=PositionBias)
    learnable_sink: bool = False
    softmax_scale: float | None = None
    softcap: float = 0.0
    dropout_p: float = 0.0
    q_offset: int | None = None
    k_offset: int | None = None
    arch: str = "sm_90a"
    cu_seqlens: CumulativeSeqlens | None = None
    kv_cache: KvCache | None = None

    def __post_init__(self) -> None:
        self._check_sizes()
        check_offsets(self.q_offset, self.k_offset)
        for name, offset, seqlen in (("q", self.q_offset, self.seqlen_q), ("k", self.k_offset, self.seqlen_k)):
            if (offset or 0) + seqlen > MAX_SEQLEN:
                raise SeqlenOverflow(
                    f"{name}_offset={offset} and seqlen_{name}={seqlen}: positions are 31-bit; together at most {MAX_SEQLEN}"
                )
        self._check_dtype()
        problem = arch_problem(self.arch)
        if problem is not None:
            raise InvalidArgument(problem)
        if self.sink_tokens < 0:
            raise InvalidArgument(f"sink_tokens={self.sink_tokens}: must be >= 0")
        if self.sink_tokens and not (self.mask.causal or self.mask.is_sliding):
            raise SinkWithoutMask(f"sink_tokens={self.sink_tokens} with a full mask: every key is visible; use causal or window_size")
        if self.softmax_scale is not None and not (math.isfinite(self.softmax_scale) and self.softmax_scale > 0):
            raise InvalidArgument(f"softmax_scale={self.softmax_scale}: must be a positive finite number")
        if not (math.isfinite(self.softcap) and self.softcap >= 0):
            raise InvalidArgument(f"softcap={self.softcap}: must be 0 (off) or a positive finite number")
        if not 0 <= self.dropout_p < 1:
            raise InvalidArgument(f"dropout_p={self.dropout_p}: the share of probabilities that are dropped, at least 0 and below 1")

    def _check_dtype(self) -> None:
        if self.dtype in FP8_DTYPES:
            raise Fp8MustUseFp8Request(
                f"dtype={self.dtype}: {type(self).__name__} takes f16 and bf16; use Fa3FwdFp8Request, a forward on sm_90a, or convert "
                "the arrays"
            )
        if self.dtype not in DTYPES_16BIT:
            raise UnsupportedDtype(f"dtype={self.dtype}: accepted are f16 and bf16; convert the arrays")

    def _check_sizes(self) -> None:
        if self.batch < 1:
            raise EmptyBatch(f"batch={self.batch}: q, k and v need at least one sequence")
        for name in ("seqlen_q", "seqlen_k"):
            check_rows(name, getattr(self, name))
        if self.num_heads_kv < 1 or self.num_heads_q < 1 or self.num_heads_q % self.num_heads_kv:
            raise InvalidGqaRatio(
                f"num_heads_q={self.num_heads_q}, num_heads_kv={self.num_heads_kv}: num_heads_q must be a positive multiple of num_heads_kv"
            )
        if cell_head_dim(self.head_dim, self.dtype) is None:
            raise UnsupportedHeadDim(f"head_dim={self.head_dim}: accepted are multiples of 8 from 8 to 256; pad the last dimension")

    @property
    def rows_q(self) -> int:
        """Rows of q in one go: of a sequence, or of all packed ones."""
        return self.seqlen_q if self.cu_seqlens is None else self.cu_seqlens.total_q

    @property
    def rows_k(self) -> int:
        """Rows of k in one go."""
        return self.seqlen_k if self.cu_seqlens is None else self.cu_seqlens.total_k

    @property
    def scale(self) -> float:
        """softmax_scale with its default filled in."""
        return self.softmax_scale if self.softmax_scale is not None else 1.0 / math.sqrt(self.head_dim)

    @property
    def score_scale(self) -> float:
        """What products of stored numbers q k^T are multiplied by."""
        return self.scale

    @property
    def position_shift(self) -> int:
        """Query i stands at the index i + position_shift of the keys."""
        if self.q_offset is None and self.k_offset is None:
            return self.rows_k - self.rows_q  # of packed sequences no one sequence's, but as far as positions can be apart
        return (self.q_offset or 0) - (self.k_offset or 0)

    @property
    def _has_offset(self) -> bool:
        """Whether offsets are given and something depends on positions."""
        given = self.q_offset is not None or self.k_offset is not None
        return given and (self.mask.causal or self.mask.is_sliding or self.position_bias.alibi)

    def _key(self, family: str, direction: str) -> DispatchKey:
        """The key of this request, heads not packed."""
        head_dim = cell_head_dim(self.head_dim, self.dtype)
        assert head_dim is not None  # checked when the request was made
        return DispatchKey(
            family,
            direction,
            self.arch,
            self.dtype,
            head_dim,
            causal=self.mask.causal,
            varlen=self.cu_seqlens is not None,
            paged=self.kv_cache is not None,
            k_tokens_inner=self.kv_cache is not None and self.kv_cache.k_tokens_inner,
            v_tokens_inner=self.kv_cache is not None and self.kv_cache.v_tokens_inner,
            sliding_window=self.mask.is_sliding,
            alibi=self.position_bias.alibi,
            sink=self.sink_tokens > 0 and self.mask.is_sliding,  # a causal mask alone shows them anyway
            position_offset=self._has_offset,
            learnable_sink=self.learnable_sink,
            softcap=self.softcap > 0,
            dropout=self.dropout_p > 0,
        )


def check_offsets(q_offset: Any, k_offset: Any) -> None:
    """Raises InvalidArgument, naming the argument, unless each is None or one whole number of at least 0."""
    for name, offset in (("q_offset", q_offset), ("k_offset", k_offset)):
        if offset is None:
            continue
        if not isinstance(offset, numbers.Integral):
            raise InvalidArgument(
                f"{name} is a {type(offset).__name__}: expected an int, which all sequences of the call share; offsets of each sequence "
                "are not built yet, call once for each"
            )
        if offset < 0:
            raise InvalidArgument(f"{name}={offset}: a position, at least 0")


@dataclass(frozen=True, kw_only=True)
class ForwardRequest(AttentionRequest):
    """What every forward has beside: float_out, whether out is written in float32 rather than in q's dtype; num_splits, of a KV cache:
    parts that the keys of a sequence are divided into, by which CTAs share them. 0: as many as keep the GPU busy; 1: one; more: as many
    whatever else is in the batch, so that equal sequences have equal results. Raises InvalidArgument for splits without a cache."""

    float_out: bool = False
    num_splits: int = 0

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.num_splits < 0:
            raise InvalidArgument(f"num_splits={self.num_splits}: must be 0 (as many as fill the GPU) or a positive number of parts")
        if self.num_splits > 1 and self.kv_cache is None:
            raise InvalidArgument(f"num_splits={self.num_splits}: only calls on a KV cache divide keys among CTAs; leave it out")

    @property
    def out_dtype(self) -> str:
        """Of out, where float_out does not say otherwise."""
        return self.dtype

    def _forward_key(self, family: str) -> DispatchKey:
        return replace(self._key(family, "fwd"), float_out=self.float_out, split=self.num_splits > 1)

    @property
    def _usual_seqlen_q(self) -> int:
        """Of packed sequences the mean, since the lengths are not known here."""
        return self.seqlen_q if self.cu_seqlens is None else min(self.seqlen_q, -(-self.cu_seqlens.total_q // self.batch))


@dataclass(frozen=True, kw_only=True)
class Fa3FwdRequest(ForwardRequest):
    """A 16-bit forward by the Hopper family (TMA + WGMMA). Raises Fa3RequiresHopper off sm_90a.

    persistent: how CTAs get their tiles; None: Persistent(), which measured faster than Grid() for every cell."""

    persistent: PersistentMode | None = None

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.arch != "sm_90a":
            raise Fa3RequiresHopper(f"arch={self.arch}: family fa3 uses TMA and WGMMA, which only sm_90a has")

        if self.num_splits > 1 and self.persistent == Grid():
            raise InvalidArgument(
                f"num_splits={self.num_splits} with persistent=Grid(): CTAs that share keys take several tiles; leave it out"
            )

    def dispatch_key(self) -> DispatchKey:
        """The cell this request needs; whether it exists is DISPATCH_TABLE's to say."""
        key = self._packed(self._forward_key("fa3"))
        return self._packed(replace(key, split=True)) if self._gains_by_splits(key) else key

    def _packed(self, key: DispatchKey) -> DispatchKey:
        """The same with as many heads in a tile's rows as its tile is filled by."""
        return replace(key, gqa_ratio=packed_gqa_ratio(self._usual_seqlen_q, self.num_heads_q // self.num_heads_kv, _fa3_tile_m(key)))

    def _gains_by_splits(self, key: DispatchKey) -> bool:
        """Whether CTAs should share keys where the call does not say so: the queries of a sequence fit the smaller tile, or tiles of `key`
        are so few that half of the multiprocessors would have none."""
        if self.kv_cache is None or self.num_splits != 0 or self.persistent == Grid():
            return False
        own = self._packed(replace(key, split=True))
        if self._usual_seqlen_q * own.gqa_ratio <= _fa3_tile_m(own):
            return True
        queries = _fa3_tile_m(key) // key.gqa_ratio
        tiles = self.batch * -(-self._usual_seqlen_q // queries) * (self.num_heads_q // key.gqa_ratio)
        return 2 * tiles <= limits_of(self.arch).num_sms

    def dispatch_keys(self) -> tuple[DispatchKey, ...]:
        """Every kernel of the call in the order of the launches."""
        return with_sequence_tiles(self.dispatch_key())


@dataclass(frozen=True, kw_only=True)
class Fa2FwdRequest(ForwardRequest):
    """A 16-bit forward by the family of sm_80's instructions (mma.sync, ldmatrix, cp.async), which every GPU from sm_80 on runs."""

    def dispatch_key(self) -> DispatchKey:
        """The cell this request needs; whether it exists is DISPATCH_TABLE's to say. Heads are not packed with dropout."""
        key = self._forward_key("fa2")
        if key.dropout:
            return key
        rows, packed_rows = (
            fa2_fwd_tile(key.arch, key.head_dim, causal=key.causal, features=key.features, packed=packed).tile_m for packed in (False, True)
        )
        ratio = packed_gqa_ratio(self._usual_seqlen_q, self.num_heads_q // self.num_heads_kv, rows, packed_rows)
        return replace(key, gqa_ratio=ratio)

    def dispatch_keys(self) -> tuple[DispatchKey, ...]:
        """Every kernel of the call in the order of the launches."""
        return with_sequence_tiles(self.dispatch_key())


@dataclass(frozen=True, kw_only=True)
class Fa2BwdRequest(AttentionRequest):
    """A 16-bit backward: dq, dk, dv of dout, by sm_80's instructions on every GPU.

    deterministic: dq is summed in a fixed order, so that equal calls give equal bits; dk and dv always are. recompute: the call makes out
    and lse itself, so that nothing but q, k, v and dout need be kept for it. num_sms: multiprocessors of the GPU; default: those of the
    largest product of the architecture. num_splits: CTAs that share the queries of a block of keys; num_copies: accumulators of dq, more
    than one only where deterministic; default: as keeps the multiprocessors busy.
    """

    deterministic: bool = False
    recompute: bool = False
    num_sms: int | None = None
    num_splits: int | None = None
    num_copies: int | None = None

    def __post_init__(self) -> None:
        if self.dtype in FP8_DTYPES:
            raise Fp8BackwardUnsupported(
                f"dtype={self.dtype}: gradients do not fit fp8; convert q, k, v, out and dout to bfloat16 or float16"
            )
        super().__post_init__()
        for name in ("num_sms", "num_splits", "num_copies"):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise InvalidArgument(f"{name}={value}: must be positive")
        if (self.num_copies or 1) > 1 and not self.deterministic:
            raise InvalidArgument(f"num_copies={self.num_copies}: only a deterministic backward has copies of dq")

    def dispatch_key(self) -> DispatchKey:
        """The main kernel; whether it exists is DISPATCH_TABLE's to say."""
        key = replace(self._key("fa2", "bwd"), learnable_sink=False)  # lse, which it is given, holds the logits
        return replace(key, deterministic=self.deterministic, split=self.splits > 1)

    def dispatch_keys(self) -> tuple[DispatchKey, ...]:
        """Every kernel of the call: the forward's where it recomputes, the list of key blocks of packed sequences (not where it is
        deterministic), preprocess, main, convert, the parts' convert where it is split, reduce where it has learnable_sink."""
        main = self.dispatch_key()
        plain = DispatchKey("fa2", "bwd", self.arch, self.dtype, main.head_dim)
        preprocess = replace(plain, direction="bwd_preprocess", varlen=main.varlen, learnable_sink=self.learnable_sink)
        passes = (preprocess, main, replace(plain, direction="bwd_convert", varlen=main.varlen))
        parts = (replace(plain, direction="bwd_convert", split=True),) * main.split
        sums = (replace(plain, direction="bwd_reduce"),) * self.learnable_sink
        tiles = (sequence_tiles_key(self.arch),) * (main.varlen and not main.deterministic)
        return (*(self.forward().dispatch_keys() if self.recompute else ()), *tiles, *passes, *parts, *sums)

    def forward(self) -> FwdRequest:
        """The forward that this is the backward of."""
        names = (each.name for each in fields(AttentionRequest))
        return forward_request(None, None, **{name: getattr(self, name) for name in names})

    @property
    def blocks(self) -> tuple[int, int]:
        """Blocks of queries of one head, and of keys; of packed sequences the places for those of all."""
        key = self._key("fa2", "bwd")
        tile = fa2_bwd_tile(key.arch, key.head_dim, key.features)
        if self.cu_seqlens is not None:
            rows = self.cu_seqlens
            return max_blocks(rows.total_q, self.batch, tile.tile_m), max_blocks(rows.total_k, self.batch, tile.tile_n)
        return -(-self.seqlen_q // tile.tile_m), -(-self.seqlen_k // tile.tile_n)

    @property
    def splits(self) -> int:
        """CTAs that share the queries of a block of keys: more than one where most multiprocessors would have none."""
        m_blocks, n_blocks = self.blocks
        query_blocks = m_blocks * (self.num_heads_q // self.num_heads_kv)
        if self.num_splits is not None:
            return min(self.num_splits, query_blocks)
        if self.deterministic:
            wanted = -(-self._sms // (self.copies * self.num_heads_kv * self.batch))
        else:
            wanted = self._sms // (n_blocks * self.num_heads_kv * self.batches_of_blocks)
        return max(1, min(wanted, query_blocks // LEAST_BLOCKS_OF_A_SPLIT))

    @property
    def batches_of_blocks(self) -> int:
        """How many times there are `blocks` of a head: packed sequences are counted in them already."""
        return self.batch if self.cu_seqlens is None else 1

    @property
    def copies(self) -> int:
        """Accumulators of dq: one, or, where their order is fixed, as many as keep the multiprocessors busy with a CTA a query head."""
        if not self.deterministic:
            return 1
        return min(self.blocks[1], self.num_copies or -(-self._sms // (self.num_heads_q * self.batch)))

    @property
    def _sms(self) -> int:
        return self.num_sms or limits_of(self.arch).num_sms


def max_blocks(rows: int, sequences: int, block_rows: int) -> int:
    """Blocks that packed sequences have at most: a last one that is not full in each, and in the rows after them."""
    return rows // block_rows + sequences + 1


FwdRequest: TypeAlias = Fa2FwdRequest | Fa3FwdRequest

LEAST_BLOCKS_OF_A_SPLIT = 4  # blocks of queries: fewer do not pay for the loads of K and V and the parts of dK and dV


def forward_request(family: str | None, persistent: PersistentMode | None, **arguments: Any) -> FwdRequest:
    """The request of `family`, or of the one that serves the call (`family_of`). arguments: of ForwardRequest.

    Raises InvalidArgument for another family, or for persistent CTAs of the fa2 family, whose CTAs have one tile each.
    """
    if arguments.get("dtype") in FP8_DTYPES:
        from .requests_fp8 import Fa3FwdFp8Request  # here, because it is made from this module's

        if family not in (None, "fa3"):
            raise Fp8MustUseFp8Request(f"family={family!r} with dtype={arguments['dtype']}: fp8 is of family fa3; leave family out")
        return Fa3FwdFp8Request(persistent=persistent, **arguments)
    if family is None:
        family = family_of(arguments["arch"], "fwd", dropout=arguments["dropout_p"] > 0)
    if family == "fa3":
        return Fa3FwdRequest(persistent=persistent, **arguments)
    if family != "fa2":
        raise InvalidArgument(f"family={family!r}: accepted are {', '.join(FAMILIES)}, and None for the one that serves the call")
    if persistent is not None and persistent.persistent:
        raise InvalidArgument(f"persistent={persistent}: a forward of family fa2 runs one CTA for each tile; use Grid() or None")
    return Fa2FwdRequest(**arguments)


def VarlenFwdRequest(
    *, cu_seqlens: CumulativeSeqlens, family: str | None = None, persistent: PersistentMode | None = None, **arguments: Any
) -> FwdRequest:
    """A forward on packed sequences. arguments: those of AttentionRequest; seqlen_q, seqlen_k: of the longest sequence, by default (where
    it is not known) as many as there are rows; arch and dropout_p as there. Raises as forward_request does."""
    sizes = {"seqlen_q": cu_seqlens.total_q, "seqlen_k": cu_seqlens.total_k, "arch": "sm_90a", "dropout_p": 0.0}
    return forward_request(family, persistent, cu_seqlens=cu_seqlens, **(sizes | arguments))


def with_sequence_tiles(key: DispatchKey) -> tuple[DispatchKey, ...]:
    """`key`, and before it the list of tiles where it works on packed sequences and does not find its work by itself."""
    if not key.varlen or key.split:
        return (key,)
    return sequence_tiles_key(key.arch), key


def sequence_tiles_key(arch: str) -> DispatchKey:
    """The kernel that lists the blocks of packed sequences."""
    return DispatchKey("fa2", "sequence_tiles", arch, *SEQUENCE_TILES_OF)


PACKING_GAIN = 0.9  # heads are packed when whole tiles of single heads would use less than this share of what packed tiles use


def _fa3_tile_m(key: DispatchKey) -> int:
    """Rows of a tile of family fa3."""
    return fa3_fwd_tile_of(key.head_dim, key.features, fp8=key.dtype in FP8_DTYPES).tile_m


def packed_gqa_ratio(seqlen_q: int, gqa_ratio: int, tile_m: int, packed_tile_m: int | None = None) -> int:
    """How many query heads of a group to pack into one tile's rows: all of them where that fills tiles much better, else 1.

    Short queries leave most of a tile empty; a group's heads share their keys, so one tile can serve them all (FlashAttention-3's rule).
    packed_tile_m: rows of a packed tile, by default tile_m; lower tiles never pay where there are more of them, since each reads all keys.
    """
    if gqa_ratio == 1 or gqa_ratio > MAX_GQA_RATIO:
        return 1
    packed_tile_m = packed_tile_m or tile_m
    tiles = -(-seqlen_q // tile_m)
    packed_tiles = -(-seqlen_q // (packed_tile_m // gqa_ratio))
    filled = seqlen_q / (tiles * tile_m)
    packed_filled = seqlen_q * gqa_ratio / (packed_tiles * packed_tile_m)
    if packed_tile_m < tile_m and packed_tiles > tiles * gqa_ratio:
        return 1
    return gqa_ratio if filled < PACKING_GAIN * packed_filled else 1
