"""DispatchKey: what must be specialised, and nothing else; DISPATCH_TABLE: which keys have a kernel, and why the others have not.

Presence is in the key (a window, ALiBi slopes, a page table); values (the window's size, the slopes, every length and scale) are runtime
arguments, so no new value ever compiles anything.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass, replace
from itertools import product
from typing import Any

from .arch.limits import ARCH_LIMITS, arch_problem
from .errors import UnknownKey, UnsupportedCell

FAMILIES = ("fa2", "fa3")
DIRECTIONS = ("fwd", "bwd", "bwd_preprocess", "bwd_convert", "bwd_reduce", "sequence_tiles", "append_kv")
ARCHS = tuple(ARCH_LIMITS)  # those with tables; later ones are served too
DTYPES = ("f16", "bf16", "e4m3", "e5m2")
FP8_DTYPES = ("e4m3", "e5m2")
CELL_HEAD_DIMS = (64, 80, 96, 128, 192, 256)
FP8_HEAD_DIMS = (64, 96, 128, 192, 256)
SEQUENCE_TILES_OF = ("bf16", 64)  # dtype and head_dim in the key of a kernel that depends on neither
APPEND_KV_HEAD_DIM = 64  # in the key of a kernel to which it is a runtime number
MAX_GQA_RATIO = 64  # a warpgroup's rows: every warpgroup then holds whole queries

# Presence flags in the order in which they stand in a key's name: (field, word in the name).
FLAG_WORDS = (
    ("causal", "causal"),
    ("varlen", "varlen"),
    ("sliding_window", "window"),
    ("alibi", "alibi"),
    ("sink", "sink"),
    ("learnable_sink", "lsink"),
    ("paged", "paged"),
    ("k_tokens_inner", "kinner"),
    ("v_tokens_inner", "vinner"),
    ("position_offset", "offsets"),
    ("softcap", "softcap"),
    ("dropout", "dropout"),
    ("float_out", "f32out"),
    ("half_out", "f16out"),
    ("precise", "precise"),
    ("descale", "descale"),
    ("block_descale", "bdescale"),
    ("deterministic", "deterministic"),
    ("split", "split"),
    ("rotary", "rotary"),
)


@dataclass(frozen=True)
class DispatchKey:
    """The identity of one cell; hashable, printable, parseable (`DispatchKey.parse(str(key)) == key`).

    family: "fa2" (mma.sync + cp.async, sm_80 and later) or "fa3" (TMA + WGMMA, sm_90a).
    direction: "fwd", "bwd", or a pass beside them: "bwd_preprocess" before a backward, "bwd_convert" and "bwd_reduce" after it,
        "sequence_tiles" before what works on packed sequences, "append_kv" before what reads a KV cache.
    arch: NVRTC's name of the target, e.g. "sm_90a"; any from sm_80 on.
    dtype: element type of q and k: "f16", "bf16", "e4m3" or "e5m2".
    head_dim: the cell's head_dim, one of 64, 80, 96, 128, 192, 256 (`cell_head_dim` rounds up).
    causal, varlen, sliding_window, alibi, sink, learnable_sink, paged, k_tokens_inner, v_tokens_inner, position_offset, softcap, dropout,
        float_out, half_out, precise, descale, block_descale, deterministic, split, rotary: presence flags. sink is of sink tokens,
        learnable_sink of logits without a key. k_tokens_inner, v_tokens_inner: in a cache's memory the same column of a block's keys lies
        together, not a key's columns. position_offset: the call says where its first query and key stand. float_out: out is written in
        float32. Of fp8 alone: half_out: out is written in float16, not bfloat16; precise: sums of P V are kept in float32 (the hardware's
        own have fewer bits); descale: q, k and v have factors for each sequence and head; block_descale: k and v for each block of keys
        too. deterministic is the backward's: dq is summed in a fixed order. split: results are sums of parts that several CTAs make, a
        forward's out (on a KV cache), a backward's dk and dv. rotary: append_kv turns queries and new keys by their positions.
    gqa_ratio: query heads packed into a tile's rows; 1 where heads are not packed (the ratio is then a runtime number).
    v_dtype: element type of v; "" (the default) means that of q and k.
    """

    family: str
    direction: str
    arch: str
    dtype: str
    head_dim: int
    causal: bool = False
    varlen: bool = False
    sliding_window: bool = False
    alibi: bool = False
    sink: bool = False
    learnable_sink: bool = False
    paged: bool = False
    k_tokens_inner: bool = False
    v_tokens_inner: bool = False
    position_offset: bool = False
    softcap: bool = False
    dropout: bool = False
    float_out: bool = False
    half_out: bool = False
    precise: bool = False
    descale: bool = False
    block_descale: bool = False
    deterministic: bool = False
    split: bool = False
    rotary: bool = False
    gqa_ratio: int = 1
    v_dtype: str = ""

    def __post_init__(self) -> None:
        if not self.v_dtype:
            object.__setattr__(self, "v_dtype", self.dtype)
        _check_choice("family", self.family, FAMILIES)
        _check_choice("direction", self.direction, DIRECTIONS)
        problem = arch_problem(self.arch)
        if problem is not None:
            raise UnknownKey(problem)
        _check_choice("dtype", self.dtype, DTYPES)
        _check_choice("v_dtype", self.v_dtype, DTYPES)
        if self.head_dim < 1 or self.gqa_ratio < 1:
            raise UnknownKey(f"head_dim {self.head_dim} and gqa_ratio {self.gqa_ratio} must be positive")

    @property
    def features(self) -> frozenset[str]:
        """The presence flags that are set."""
        return frozenset(field for field, _ in FLAG_WORDS if getattr(self, field))

    def __str__(self) -> str:
        """E.g. "fa3_fwd_sm90a_bf16_hdim128_causal"; every part that is at its default is left out."""
        words = [self.family, self.direction, self.arch.replace("_", ""), self.dtype]
        if self.v_dtype != self.dtype:
            words.append(f"v{self.v_dtype}")
        words.append(f"hdim{self.head_dim}")
        words += [word for field, word in FLAG_WORDS if getattr(self, field)]
        if self.gqa_ratio != 1:
            words.append(f"gqa{self.gqa_ratio}")
        return "_".join(words)

    @classmethod
    def parse(cls, name: str) -> DispatchKey:
        """The key whose name this is. Raises UnknownKey, saying what a name looks like."""
        match = _NAME.fullmatch(name)
        if match is None:
            raise UnknownKey(f"{name!r} is not a key's name; one looks like 'fa3_fwd_sm90a_bf16_hdim128_causal' ({_NAME_HELP})")
        part = match.groupdict()
        return cls(
            family=part["family"],
            direction=part["direction"],
            arch="sm_" + part["arch"],
            dtype=part["dtype"],
            v_dtype=part["v_dtype"] or "",
            head_dim=int(part["head_dim"]),
            gqa_ratio=int(part["gqa_ratio"] or 1),
            **{field: part[field] is not None for field, _ in FLAG_WORDS},
        )


_NAME_HELP = "family_direction_arch_dtype[_vDTYPE]_hdimN then any of " + ", ".join(word for _, word in FLAG_WORDS) + ", gqaN in this order"
_NAME = re.compile(
    rf"(?P<family>{'|'.join(FAMILIES)})_(?P<direction>{'|'.join(DIRECTIONS)})"
    rf"_sm(?P<arch>\d+a?)_(?P<dtype>{'|'.join(DTYPES)})"
    rf"(?:_v(?P<v_dtype>{'|'.join(DTYPES)}))?_hdim(?P<head_dim>[1-9]\d*)"
    + "".join(rf"(?P<{field}>_{word})?" for field, word in FLAG_WORDS)
    + r"(?:_gqa(?P<gqa_ratio>[1-9]\d*))?"
)


def _check_choice(what: str, value: str, accepted: tuple[str, ...]) -> None:
    if value not in accepted:
        raise UnknownKey(f"{what} {value!r} is not one of {', '.join(accepted)}")


def cell_head_dim(head_dim: int, dtype: str = "bf16") -> int | None:
    """The smallest cell that holds rows of `head_dim` elements, or None when none does (not a multiple of 8, or above 256)."""
    if head_dim < 8 or head_dim % 8:
        return None
    return next((cell for cell in head_dims_of(dtype) if head_dim <= cell), None)


def head_dims_of(dtype: str) -> tuple[int, ...]:
    """The head_dims of cells whose q and k are of this type."""
    return FP8_HEAD_DIMS if dtype in FP8_DTYPES else CELL_HEAD_DIMS


class DispatchTable:
    """Which keys have a kernel. `registered` are the golden cells: committed under generated/, reviewed as text and run by the tests."""

    def __init__(self, registered: tuple[DispatchKey, ...]) -> None:
        self._registered = registered
        self._names = frozenset(registered)

    def __iter__(self) -> Iterator[DispatchKey]:
        return iter(self._registered)

    def __len__(self) -> int:
        return len(self._registered)

    def lookup(self, key: DispatchKey) -> DispatchKey:
        """`key` itself if a kernel can be generated for it. Raises UnsupportedCell with every reason if not."""
        reasons = self.why_not(key)
        if reasons:
            raise UnsupportedCell(str(key), reasons)
        return key

    def strict_lookup(self, key: DispatchKey) -> DispatchKey:
        """`key` itself if it is a registered (golden) cell. Raises UnknownKey if not, even where `lookup` would serve it."""
        if key not in self._names:
            raise UnknownKey(f"{key} is not a registered cell; registered: " + ", ".join(map(str, self._registered)))
        return key

    def why_not(self, key: DispatchKey) -> list[str]:
        """Every reason why no kernel serves `key`; empty when one does."""
        return _semantic_reasons(key) + _unbuilt_reasons(key)

    def valid_keys(self) -> Iterator[DispatchKey]:
        """Every key of the tables' architectures that `lookup` serves with gqa_ratio 1, in a fixed order; of fp8 those alone whose v is of
        q's type and which have no flag of FP8_FLAGS."""
        for (family, direction), flags in BUILT_FLAGS.items():
            archs = ARCHS if family == "fa2" else ("sm_90a",)
            presences: list[dict[str, Any]] = [dict(zip(flags, each, strict=True)) for each in product((False, True), repeat=len(flags))]
            example = DispatchKey(family, direction, archs[0], *SEQUENCE_TILES_OF)  # what it may not have, none may
            presences = [chosen for chosen in presences if not self.why_not(replace(example, **chosen))]
            for arch, dtype, head_dim in product(archs, DTYPES, CELL_HEAD_DIMS):
                for chosen in presences:
                    key = DispatchKey(family, direction, arch, dtype, head_dim, **chosen)
                    if not self.why_not(key):
                        yield key


# Of fp8 cells, beside those of 16 bits.
FP8_FLAGS = ("half_out", "precise", "descale", "block_descale")
_MASKS = ("causal", "varlen", "sliding_window", "alibi", "sink")
_CACHE = ("paged", "k_tokens_inner", "v_tokens_inner")
FP8_LACKS = (*_CACHE, "split")  # flags of fa3 forwards that fp8 cells do not have yet

# What has a template: (family, direction) -> the presence flags that it knows.
BUILT_FLAGS: dict[tuple[str, str], tuple[str, ...]] = {
    ("fa2", "fwd"): (*_MASKS, "learnable_sink", *_CACHE, "position_offset", "softcap", "dropout", "float_out"),
    ("fa3", "fwd"): (*_MASKS, "learnable_sink", *_CACHE, "position_offset", "softcap", "float_out", "split"),
    ("fa2", "bwd"): (*_MASKS, "position_offset", "softcap", "dropout", "deterministic", "split"),
    ("fa2", "bwd_preprocess"): ("varlen", "learnable_sink"),
    ("fa2", "bwd_convert"): ("varlen", "split"),
    ("fa2", "bwd_reduce"): (),
    ("fa2", "sequence_tiles"): (),
    ("fa2", "append_kv"): ("rotary",),
}


def family_of(arch: str, direction: str, *, dropout: bool = False) -> str:
    """The family that serves a call on `arch`: "fa3" a forward on sm_90a, unless it needs what fa3 lacks and fa2 has; else "fa2"."""
    return "fa3" if arch == "sm_90a" and direction == "fwd" and not dropout else "fa2"


def _semantic_reasons(key: DispatchKey) -> list[str]:
    """Combinations that make no sense on any hardware, or that this family's hardware rules out."""
    fp8 = key.dtype in FP8_DTYPES or key.v_dtype in FP8_DTYPES
    backward = key.direction != "fwd"
    head_dims = head_dims_of(key.dtype)
    checks = (
        (key.head_dim not in head_dims, f"head_dim {key.head_dim} is not a cell; cells are {', '.join(map(str, head_dims))}"),
        (key.family == "fa3" and key.arch != "sm_90a", f"family fa3 needs TMA and WGMMA of sm_90a, not {key.arch}; use family fa2"),
        (fp8 and key.arch != "sm_90a", f"fp8 needs sm_90a, not {key.arch}"),
        (fp8 and backward and key.direction != "append_kv", "there is no fp8 backward; use f16 or bf16"),
        ((key.dtype in FP8_DTYPES) != (key.v_dtype in FP8_DTYPES), f"q/k {key.dtype} with v {key.v_dtype}: both 16-bit or both fp8"),
        (not fp8 and key.v_dtype != key.dtype, f"q/k {key.dtype} with v {key.v_dtype}: 16-bit types must agree"),
        (key.sink and not key.sliding_window, "sink tokens need a sliding window: without one every query sees the first keys anyway"),
        (key.paged and backward, "a paged cache has no backward"),
        (key.paged and not key.varlen, "the sequences of a cache are of different lengths: paged needs varlen"),
        (key.paged and key.dropout, "dropout is of training, and a cache of inference"),
        (
            (key.k_tokens_inner or key.v_tokens_inner) and not key.paged,
            "only a cache may have its tokens innermost: k and v of other calls need a contiguous last dimension",
        ),
        (
            key.position_offset and not (key.causal or key.sliding_window or key.alibi),
            "offsets move a causal mask, a window or ALiBi; without one of them no score depends on positions",
        ),
        (key.float_out and backward, "gradients are written in the element type; float32 is the forward's out"),
        *((getattr(key, flag) and not fp8, f"{flag} is of fp8 forwards, not of {key.dtype}") for flag in FP8_FLAGS),
        (key.float_out and key.half_out, "out is written in float32 or in float16"),
        (key.block_descale and not key.descale, "block_descale is a kind of descale: set both"),
        (key.deterministic and not backward, "deterministic is a choice of the backward; every forward is"),
        (
            key.direction == "sequence_tiles" and (key.dtype, key.head_dim) != SEQUENCE_TILES_OF,
            "one list of tiles serves all: its key has dtype {} and head_dim {}".format(*SEQUENCE_TILES_OF),
        ),
        (
            key.direction == "append_kv" and key.head_dim != APPEND_KV_HEAD_DIM,
            f"one kernel appends rows of every head_dim: its key has head_dim {APPEND_KV_HEAD_DIM}",
        ),
        (key.rotary and key.direction != "append_kv", "attention reads queries and keys that append_kv has turned: leave out rotary"),
        (
            key.direction == "bwd_convert" and key.split and key.varlen,
            "parts of dk and dv are added up as of one sequence: leave out varlen",
        ),
        (key.split and not backward and not key.paged, "only keys of a cache are divided among the CTAs of a forward: split needs paged"),
        (
            key.learnable_sink and key.direction == "bwd",
            "a backward's main kernel is the same with learnable_sink, which lse holds: bwd_preprocess makes the gradient",
        ),
    )
    return [reason for refused, reason in checks if refused]


def _unbuilt_reasons(key: DispatchKey) -> list[str]:
    """What makes sense but has no template yet."""
    kernel = (key.family, key.direction)
    if kernel not in BUILT_FLAGS:
        built = ", ".join(f"{family} {direction}" for family, direction in BUILT_FLAGS)
        name = "backward" if key.direction == "bwd" else key.direction
        return [f"the {key.family} {name} is not built yet; built are: {built}"]
    fp8 = key.dtype in FP8_DTYPES
    checks = [(fp8 and kernel != ("fa3", "fwd"), f"dtype {key.dtype} is not built yet in the {key.family} {key.direction}; fa3 fwd has it")]
    checks += [
        (getattr(key, field), f"{field} is not built yet in the {key.family} {key.direction}")
        for field, _ in FLAG_WORDS
        if field not in (*BUILT_FLAGS[kernel], *FP8_FLAGS)
    ]
    checks += [(fp8 and getattr(key, flag), f"{flag} is not built yet for {key.dtype}") for flag in FP8_LACKS]
    is_forward = key.direction == "fwd"
    most = f"at most {MAX_GQA_RATIO} query heads are packed into a tile" if is_forward else "heads are not packed"
    packable = key.gqa_ratio == 1 or (is_forward and key.gqa_ratio <= MAX_GQA_RATIO)
    checks += [
        (not packable, f"gqa_ratio {key.gqa_ratio}: {most}; 1 serves every ratio"),
        (
            key.gqa_ratio > 1 and key.dropout and key.family == "fa2",
            "heads are not packed with dropout, whose numbers are drawn for one head at a time; gqa_ratio 1 serves every ratio",
        ),
    ]
    return [reason for refused, reason in checks if refused]


def _fa3_fwd(dtype: str, head_dim: int, **features: Any) -> DispatchKey:
    return DispatchKey("fa3", "fwd", "sm_90a", dtype, head_dim, **features)


def _fa2_fwd(arch: str, dtype: str, head_dim: int, **features: Any) -> DispatchKey:
    return DispatchKey("fa2", "fwd", arch, dtype, head_dim, **features)


def _fa2_bwd(arch: str, dtype: str, head_dim: int, **features: Any) -> DispatchKey:
    return DispatchKey("fa2", "bwd", arch, dtype, head_dim, **features)


_SINK_WINDOW = {"sliding_window": True, "sink": True}
_BLOCK_DESCALE = {"descale": True, "block_descale": True}

# The golden cells: one base cell per (family, direction) and architecture and one per flip; never the cross product.
DISPATCH_TABLE = DispatchTable(
    (
        _fa3_fwd("bf16", 128),
        _fa3_fwd("bf16", 128, causal=True),
        _fa3_fwd("f16", 128, causal=True),
        _fa3_fwd("bf16", 128, causal=True, gqa_ratio=4),
        _fa3_fwd("bf16", 128, causal=True, softcap=True),
        _fa3_fwd("bf16", 64),
        _fa3_fwd("bf16", 64, causal=True),
        _fa3_fwd("bf16", 80),
        _fa3_fwd("bf16", 96, causal=True),
        _fa3_fwd("bf16", 192),
        _fa3_fwd("bf16", 256),
        _fa3_fwd("bf16", 256, causal=True),
        _fa3_fwd("bf16", 128, causal=True, sliding_window=True),
        _fa3_fwd("bf16", 128, causal=True, sliding_window=True, sink=True),
        _fa3_fwd("bf16", 128, causal=True, alibi=True),
        _fa3_fwd("bf16", 64, sliding_window=True),
        _fa3_fwd("bf16", 128, varlen=True),
        _fa3_fwd("bf16", 128, causal=True, varlen=True),
        _fa3_fwd(
            "bf16", 64, varlen=True, alibi=True, learnable_sink=True, float_out=True, **_SINK_WINDOW, position_offset=True, gqa_ratio=4
        ),
        _fa3_fwd("bf16", 128, causal=True, alibi=True, position_offset=True, float_out=True),
        _fa3_fwd("bf16", 64, causal=True, sliding_window=True, learnable_sink=True),
        _fa3_fwd("bf16", 128, causal=True, varlen=True, paged=True, gqa_ratio=4),
        _fa3_fwd("bf16", 128, causal=True, varlen=True, paged=True, k_tokens_inner=True, v_tokens_inner=True),
        _fa3_fwd("bf16", 128, causal=True, varlen=True, paged=True, split=True, gqa_ratio=4),
        _fa3_fwd(
            "bf16", 64, causal=True, varlen=True, paged=True, alibi=True, learnable_sink=True, float_out=True, split=True, **_SINK_WINDOW
        ),
        _fa3_fwd("e4m3", 128),
        _fa3_fwd("e4m3", 128, causal=True),
        _fa3_fwd("e4m3", 64),
        _fa3_fwd("e5m2", 64, causal=True, half_out=True),
        _fa3_fwd("e4m3", 96, v_dtype="e5m2"),
        _fa3_fwd("e5m2", 192, v_dtype="e4m3"),
        _fa3_fwd("e4m3", 256),
        _fa3_fwd("e4m3", 256, causal=True),
        _fa3_fwd("e4m3", 128, precise=True, descale=True),
        _fa3_fwd("e4m3", 256, precise=True, softcap=True, **_BLOCK_DESCALE),
        _fa3_fwd("e4m3", 128, causal=True, alibi=True, **_BLOCK_DESCALE),
        _fa3_fwd("e4m3", 128, causal=True, varlen=True, descale=True),
        _fa3_fwd("e4m3", 64, varlen=True, alibi=True, learnable_sink=True, float_out=True, **_SINK_WINDOW, descale=True, gqa_ratio=4),
        _fa2_fwd("sm_80", "bf16", 128),
        _fa2_fwd("sm_80", "bf16", 128, causal=True),
        _fa2_fwd("sm_80", "f16", 128, causal=True),
        _fa2_fwd("sm_80", "bf16", 128, softcap=True),
        _fa2_fwd("sm_80", "bf16", 128, causal=True, dropout=True),
        _fa2_fwd("sm_80", "bf16", 128, causal=True, sliding_window=True),
        _fa2_fwd("sm_80", "bf16", 128, alibi=True),
        _fa2_fwd("sm_80", "bf16", 64, sliding_window=True),
        _fa2_fwd("sm_80", "bf16", 64, sliding_window=True, sink=True),
        _fa2_fwd("sm_80", "bf16", 64, sliding_window=True, sink=True, position_offset=True, float_out=True),
        _fa2_fwd("sm_80", "bf16", 64, causal=True),
        _fa2_fwd("sm_80", "bf16", 64, varlen=True, alibi=True, learnable_sink=True, dropout=True, **_SINK_WINDOW),
        _fa2_fwd("sm_90a", "bf16", 128, causal=True, varlen=True),
        _fa2_fwd("sm_80", "bf16", 64, causal=True, learnable_sink=True),
        _fa2_fwd("sm_80", "bf16", 128, causal=True, varlen=True, paged=True),
        _fa2_fwd("sm_80", "bf16", 128, causal=True, varlen=True, paged=True, gqa_ratio=4, **_SINK_WINDOW),
        _fa2_fwd("sm_80", "bf16", 128, causal=True, varlen=True, paged=True, k_tokens_inner=True, v_tokens_inner=True),
        _fa2_fwd("sm_80", "f16", 80, varlen=True, paged=True, k_tokens_inner=True, gqa_ratio=8),
        _fa2_fwd("sm_80", "f16", 64, gqa_ratio=4),
        _fa2_fwd("sm_80", "bf16", 96),
        _fa2_fwd("sm_86", "bf16", 256, causal=True),
        _fa2_fwd("sm_89", "bf16", 128, causal=True),
        _fa2_fwd("sm_90a", "bf16", 128, causal=True),
        _fa2_fwd("sm_90a", "bf16", 256),
        _fa2_fwd("sm_100", "bf16", 128, causal=True),
        _fa2_fwd("sm_120", "bf16", 128, causal=True),
        _fa2_bwd("sm_80", "bf16", 128, causal=True),
        _fa2_bwd("sm_80", "f16", 64),
        _fa2_bwd("sm_80", "bf16", 128, dropout=True),
        _fa2_bwd("sm_80", "bf16", 128, causal=True, sliding_window=True),
        _fa2_bwd("sm_80", "f16", 64, sliding_window=True, alibi=True, sink=True),
        _fa2_bwd("sm_80", "bf16", 128, varlen=True),
        _fa2_bwd("sm_90a", "bf16", 128, causal=True, varlen=True),
        _fa2_bwd("sm_90a", "f16", 64, causal=True, varlen=True, alibi=True, position_offset=True, dropout=True, split=True, **_SINK_WINDOW),
        _fa2_bwd("sm_90a", "bf16", 64, causal=True, varlen=True, deterministic=True),
        _fa2_bwd("sm_80", "bf16", 64, causal=True, position_offset=True),
        _fa2_bwd("sm_86", "bf16", 256),
        _fa2_bwd("sm_89", "bf16", 64, causal=True),
        _fa2_bwd("sm_90a", "bf16", 128, causal=True),
        _fa2_bwd("sm_90a", "bf16", 256, softcap=True),
        _fa2_bwd("sm_90a", "bf16", 64, causal=True, deterministic=True),
        _fa2_bwd("sm_90a", "bf16", 128, split=True),
        _fa2_bwd("sm_100", "bf16", 128),
        _fa2_bwd("sm_120", "bf16", 128),
        DispatchKey("fa2", "sequence_tiles", "sm_80", *SEQUENCE_TILES_OF),
        DispatchKey("fa2", "append_kv", "sm_80", "bf16", APPEND_KV_HEAD_DIM),
        DispatchKey("fa2", "append_kv", "sm_80", "bf16", APPEND_KV_HEAD_DIM, rotary=True),
        DispatchKey("fa2", "append_kv", "sm_90a", "f16", APPEND_KV_HEAD_DIM, rotary=True),
        DispatchKey("fa2", "bwd_preprocess", "sm_80", "bf16", 128),
        DispatchKey("fa2", "bwd_preprocess", "sm_80", "bf16", 128, varlen=True, learnable_sink=True),
        DispatchKey("fa2", "bwd_preprocess", "sm_80", "bf16", 128, learnable_sink=True),
        DispatchKey("fa2", "bwd_convert", "sm_80", "bf16", 128),
        DispatchKey("fa2", "bwd_convert", "sm_80", "bf16", 128, varlen=True),
        DispatchKey("fa2", "bwd_convert", "sm_90a", "bf16", 128),
        DispatchKey("fa2", "bwd_convert", "sm_90a", "bf16", 128, split=True),
        DispatchKey("fa2", "bwd_reduce", "sm_80", "bf16", 128),
    )
)
