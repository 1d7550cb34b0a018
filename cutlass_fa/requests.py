"""Requests: one kind of call described without arrays, so that a workload can be planned, explained and compiled with no GPU.

Requests and Problem are the only places that raise on user input.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field, fields, replace
from typing import Any, TypeAlias

from .arch.fa2_bwd import fa2_bwd_tile
from .arch.limits import arch_problem, limits_of
from .arch.sm90 import fa3_fwd_tile_of
from .dispatch import FAMILIES, FP8_DTYPES, MAX_GQA_RATIO, DispatchKey, cell_head_dim, family_of
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
    ZeroSeqlen,
    ZeroWindow,
)

MAX_SEQLEN = 2**31 - 1024  # positions, and positions plus one tile, are 32-bit signed integers
DTYPES_16BIT = ("f16", "bf16")


# ---- masks ---------------------------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class MaskKind:
    """Which keys a query may see. Query i stands at position i + seqlen_k - seqlen_q.

    causal: key j allowed when j <= position. window (left, right): position - left <= j <= position + right; -1 is unbounded.
    Use Full, Causal, SlidingCausal, SlidingFull or Window.
    """

    causal: bool
    window: tuple[int, int] = (-1, -1)

    @property
    def is_sliding(self) -> bool:
        """Whether a window bounds the keys on some side (causality alone does not count)."""
        return self.window != (-1, -1)


def Full() -> MaskKind:
    """Every query sees every key."""
    return MaskKind(causal=False)


def Causal() -> MaskKind:
    """Every query sees the keys up to its own position."""
    return MaskKind(causal=True)


def SlidingCausal(window: int) -> MaskKind:
    """The last `window` keys, the query's own position included. Raises ZeroWindow for window < 1."""
    _check_window(window)
    return MaskKind(causal=True, window=(window - 1, 0))


def SlidingFull(window: int) -> MaskKind:
    """`window` - 1 keys on either side of the query's own position. Raises ZeroWindow for window < 1."""
    _check_window(window)
    return MaskKind(causal=False, window=(window - 1, window - 1))


def Window(left: int, right: int, causal: bool = False) -> MaskKind:
    """flash-attn's window_size=(left, right), -1 unbounded; causal bounds the right side at 0. Raises InvalidArgument below -1."""
    if left < -1 or right < -1:
        raise InvalidArgument(f"window_size=({left}, {right}): each side must be -1 (unbounded) or a number of keys >= 0")
    if causal:
        return MaskKind(causal=True, window=(left, 0) if left != -1 else (-1, -1))
    return MaskKind(causal=False, window=(left, right))


def _check_window(window: int) -> None:
    if window < 1:
        raise ZeroWindow(f"window={window}: a sliding window holds at least the query's own position, so window must be >= 1")


# ---- other parts ---------------------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class PositionBias:
    """A bias on scores that depends on positions only: none, or ALiBi (Press et al. 2021; its slopes are a runtime array)."""

    alibi: bool = False


@dataclass(frozen=True)
class PersistentMode:
    """How CTAs get their tiles. persistent False: one CTA per tile. True: `num_sms` CTAs (0: one per multiprocessor) walk all tiles."""

    persistent: bool = False
    num_sms: int = 0

    def __post_init__(self) -> None:
        if self.num_sms < 0:
            raise InvalidArgument(f"num_sms={self.num_sms}: must be 0 (all) or a positive number of multiprocessors")


def Grid() -> PersistentMode:
    """One CTA per tile; the hardware hands tiles out in order."""
    return PersistentMode()


def Persistent(num_sms: int = 0) -> PersistentMode:
    """`num_sms` CTAs (0: as many as the GPU has multiprocessors) walk all tiles, leaving the other multiprocessors free."""
    return PersistentMode(True, num_sms)


# ---- requests ------------------------------------------------------------------------------------------------------------------------


@dataclass(frozen=True, kw_only=True)
class AttentionRequest:
    """What every call on dense arrays has: q (batch, seqlen_q, num_heads_q, head_dim); k, v (batch, seqlen_k, num_heads_kv, head_dim).

    dtype: "f16" or "bf16". softmax_scale: default 1 / sqrt(head_dim). softcap: scores become softcap * tanh(score / softcap); 0 (the
    default): as they are. learnable_sink: whether each row's denominator has a logit without a key (the logits are a runtime array).
    dropout_p: the share of probabilities set to 0, in [0, 1). arch: NVRTC's name of the target GPU.
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
    position_bias: PositionBias = PositionBias()
    learnable_sink: bool = False
    softmax_scale: float | None = None
    softcap: float = 0.0
    dropout_p: float = 0.0
    arch: str = "sm_90a"

    def __post_init__(self) -> None:
        self._check_sizes()
        if self.dtype in FP8_DTYPES:
            raise Fp8MustUseFp8Request(f"dtype={self.dtype}: {type(self).__name__} takes f16 and bf16, not fp8; convert the arrays")
        if self.dtype not in DTYPES_16BIT:
            raise UnsupportedDtype(f"dtype={self.dtype}: accepted are f16 and bf16; convert the arrays")
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

    def _check_sizes(self) -> None:
        if self.batch < 1:
            raise EmptyBatch(f"batch={self.batch}: q, k and v need at least one sequence")
        for name in ("seqlen_q", "seqlen_k"):
            seqlen = getattr(self, name)
            if seqlen < 1:
                raise ZeroSeqlen(f"{name}={seqlen}: at least one token is needed")
            if seqlen > MAX_SEQLEN:
                raise SeqlenOverflow(f"{name}={seqlen}: positions are 31-bit; at most {MAX_SEQLEN}")
        if self.num_heads_kv < 1 or self.num_heads_q < 1 or self.num_heads_q % self.num_heads_kv:
            raise InvalidGqaRatio(
                f"num_heads_q={self.num_heads_q}, num_heads_kv={self.num_heads_kv}: num_heads_q must be a positive multiple of num_heads_kv"
            )
        if cell_head_dim(self.head_dim) is None:
            raise UnsupportedHeadDim(f"head_dim={self.head_dim}: accepted are multiples of 8 from 8 to 256; pad the last dimension")

    @property
    def scale(self) -> float:
        """softmax_scale with its default filled in."""
        return self.softmax_scale if self.softmax_scale is not None else 1.0 / math.sqrt(self.head_dim)

    def _key(self, family: str, direction: str) -> DispatchKey:
        """The key of this request, heads not packed."""
        head_dim = cell_head_dim(self.head_dim)
        assert head_dim is not None  # checked when the request was made
        return DispatchKey(
            family,
            direction,
            self.arch,
            self.dtype,
            head_dim,
            causal=self.mask.causal,
            sliding_window=self.mask.is_sliding,
            alibi=self.position_bias.alibi,
            sink=self.sink_tokens > 0 and self.mask.is_sliding,  # a causal mask alone shows them anyway
            learnable_sink=self.learnable_sink,
            softcap=self.softcap > 0,
            dropout=self.dropout_p > 0,
        )


@dataclass(frozen=True, kw_only=True)
class Fa3FwdRequest(AttentionRequest):
    """A 16-bit forward by the Hopper family (TMA + WGMMA). Raises Fa3RequiresHopper off sm_90a.

    persistent: how CTAs get their tiles; None: Persistent(), which measured faster than Grid() for every cell."""

    persistent: PersistentMode | None = None

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.arch != "sm_90a":
            raise Fa3RequiresHopper(f"arch={self.arch}: family fa3 uses TMA and WGMMA, which only sm_90a has")

    def dispatch_key(self) -> DispatchKey:
        """The cell this request needs; whether it exists is DISPATCH_TABLE's to say."""
        key = self._key("fa3", "fwd")
        tile_m = fa3_fwd_tile_of(key.head_dim, key.features).tile_m
        return replace(key, gqa_ratio=packed_gqa_ratio(self.seqlen_q, self.num_heads_q // self.num_heads_kv, tile_m))


@dataclass(frozen=True, kw_only=True)
class Fa2FwdRequest(AttentionRequest):
    """A 16-bit forward by the family of sm_80's instructions (mma.sync, ldmatrix, cp.async), which every GPU from sm_80 on runs."""

    def dispatch_key(self) -> DispatchKey:
        """The cell this request needs; whether it exists is DISPATCH_TABLE's to say."""
        return self._key("fa2", "fwd")


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
        """Every kernel of the call in the order of the launches: the forward's where it recomputes, preprocess, main, convert, the parts'
        convert where it is split, reduce where it has learnable_sink."""
        main = self.dispatch_key()
        plain = DispatchKey("fa2", "bwd", self.arch, self.dtype, main.head_dim)
        preprocess = replace(plain, direction="bwd_preprocess", learnable_sink=self.learnable_sink)
        passes = (preprocess, main, replace(plain, direction="bwd_convert"))
        parts = (replace(plain, direction="bwd_convert", split=True),) * main.split
        sums = (replace(plain, direction="bwd_reduce"),) * self.learnable_sink
        return (*((self.forward().dispatch_key(),) if self.recompute else ()), *passes, *parts, *sums)

    def forward(self) -> FwdRequest:
        """The forward that this is the backward of."""
        names = (each.name for each in fields(AttentionRequest))
        return forward_request(None, None, **{name: getattr(self, name) for name in names})

    @property
    def blocks(self) -> tuple[int, int]:
        """Blocks of queries of one head, and of keys."""
        key = self._key("fa2", "bwd")
        tile = fa2_bwd_tile(key.arch, key.head_dim, key.features)
        return -(-self.seqlen_q // tile.tile_m), -(-self.seqlen_k // tile.tile_n)

    @property
    def splits(self) -> int:
        """CTAs that share the queries of a block of keys: more than one where most multiprocessors would have none."""
        heads, m_blocks, n_blocks = self.num_heads_kv * self.batch, *self.blocks
        query_blocks = m_blocks * (self.num_heads_q // self.num_heads_kv)
        if self.num_splits is not None:
            return min(self.num_splits, query_blocks)
        wanted = -(-self._sms // (self.copies * heads)) if self.deterministic else self._sms // (n_blocks * heads)
        return max(1, min(wanted, query_blocks // LEAST_BLOCKS_OF_A_SPLIT))

    @property
    def copies(self) -> int:
        """Accumulators of dq: one, or, where their order is fixed, as many as keep the multiprocessors busy with a CTA a query head."""
        if not self.deterministic:
            return 1
        return min(self.blocks[1], self.num_copies or -(-self._sms // (self.num_heads_q * self.batch)))

    @property
    def _sms(self) -> int:
        return self.num_sms or limits_of(self.arch).num_sms


FwdRequest: TypeAlias = Fa2FwdRequest | Fa3FwdRequest

LEAST_BLOCKS_OF_A_SPLIT = 4  # blocks of queries: fewer do not pay for the loads of K and V and the parts of dK and dV


def forward_request(family: str | None, persistent: PersistentMode | None, **arguments: Any) -> FwdRequest:
    """The request of `family`, or of the one that serves the call (`family_of`). arguments: of AttentionRequest.

    Raises InvalidArgument for another family, or for persistent CTAs of the fa2 family, whose CTAs have one tile each.
    """
    if family is None:
        family = family_of(arguments["arch"], "fwd", dropout=arguments["dropout_p"] > 0)
    if family == "fa3":
        return Fa3FwdRequest(persistent=persistent, **arguments)
    if family != "fa2":
        raise InvalidArgument(f"family={family!r}: accepted are {', '.join(FAMILIES)}, and None for the one that serves the call")
    if persistent is not None and persistent.persistent:
        raise InvalidArgument(f"persistent={persistent}: a forward of family fa2 runs one CTA for each tile; use Grid() or None")
    return Fa2FwdRequest(**arguments)


PACKING_GAIN = 0.9  # heads are packed when whole tiles of single heads would use less than this share of what packed tiles use


def packed_gqa_ratio(seqlen_q: int, gqa_ratio: int, tile_m: int) -> int:
    """How many query heads of a group to pack into one tile's rows: all of them where that fills tiles much better, else 1.

    Short queries leave most of a tile empty; a group's heads share their keys, so one tile can serve them all (FlashAttention-3's rule).
    """
    if gqa_ratio == 1 or gqa_ratio > MAX_GQA_RATIO:
        return 1
    tiles = -(-seqlen_q // tile_m)
    packed_tiles = -(-seqlen_q // (tile_m // gqa_ratio))
    filled = seqlen_q / (tiles * tile_m)
    packed_filled = seqlen_q * gqa_ratio / (packed_tiles * tile_m)
    return gqa_ratio if filled < PACKING_GAIN * packed_filled else 1
