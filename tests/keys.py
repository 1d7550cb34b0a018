"""A sample of the keys that have a kernel, in which every three choices of flags, dtype, head_dim and architecture meet."""

from __future__ import annotations

from collections.abc import Iterator
from functools import lru_cache
from typing import Any

from cutlass_fa.dispatch import (
    APPEND_KV_HEAD_DIM,
    ARCHS,
    BUILT_FLAGS,
    CELL_HEAD_DIMS,
    DISPATCH_TABLE,
    FLAG_WORDS,
    FP8_DTYPES,
    FP8_FLAGS,
    FP8_HEAD_DIMS,
    FP8_LACKS,
    SEQUENCE_TILES_OF,
    DispatchKey,
)
from tests.covering import covering

_MAX_LINES = 485  # of a translation unit with one feature
_MORE_LINES = 25  # for each further one, of which 8-bit numbers are one
_SHORT_BLOCK_LINES = 75  # sink tokens in a Hopper forward have a step of their own
_PAGES_LINES = 15  # of a Hopper forward, whose pages two warps load
_TWO_LAYOUTS_LINES = 15  # K and V of a cache are loaded in two ways


def line_limit(key: DispatchKey) -> int:
    """How many lines the translation unit of a key may have."""
    is_fp8 = key.dtype in FP8_DTYPES
    features = sum(bool(getattr(key, field)) for field, _ in FLAG_WORDS) + is_fp8
    has_short_block = key.sink and (key.family, key.direction) == ("fa3", "fwd") and not is_fp8
    has_pages = key.paged and key.family == "fa3"
    has_two_layouts = key.k_tokens_inner != key.v_tokens_inner
    more = _SHORT_BLOCK_LINES * has_short_block + _TWO_LAYOUTS_LINES * has_two_layouts + _PAGES_LINES * has_pages
    return _MAX_LINES + _MORE_LINES * max(features - 1, 0) + more


def _fp8_keys() -> Iterator[DispatchKey]:
    """The forwards of 8-bit numbers, whose flags meet those of 16 bits by twos."""
    factors: dict[str, Any] = {"dtype": FP8_DTYPES, "v_dtype": FP8_DTYPES, "head_dim": FP8_HEAD_DIMS}
    flags = [flag for flag in (*BUILT_FLAGS["fa3", "fwd"], *FP8_FLAGS) if flag not in FP8_LACKS]
    for chosen in covering(factors | {flag: (False, True) for flag in flags}, 2):
        chosen["sliding_window"] |= chosen["sink"]
        chosen["causal"] |= chosen["position_offset"]
        chosen["descale"] |= chosen["block_descale"]
        chosen["half_out"] &= not chosen["float_out"]
        yield DispatchKey("fa3", "fwd", "sm_90a", **chosen)


@lru_cache(maxsize=1)
def sampled_keys() -> tuple[DispatchKey, ...]:
    """Those of each (family, direction), and every golden one. Sink tokens without a window, and offsets without a mask that
    they move, which no kernel has, get the window and the mask, tokens innermost the cache that they are of; other combinations that no
    kernel has get, or lose, what makes them one."""
    keys = set(DISPATCH_TABLE)
    for (family, direction), flags in BUILT_FLAGS.items():
        factors: dict[str, Any] = {"arch": ARCHS if family == "fa2" else ("sm_90a",), "dtype": ("f16", "bf16"), "head_dim": CELL_HEAD_DIMS}
        for chosen in covering(factors | {flag: (False, True) for flag in flags}, 3):
            chosen["sliding_window"] = chosen.get("sliding_window", False) or chosen.get("sink", False)
            if chosen.get("position_offset", False) and not (chosen["sliding_window"] or chosen["alibi"]):
                chosen["causal"] = True
            if chosen.get("k_tokens_inner", False) or chosen.get("v_tokens_inner", False):
                chosen["paged"] = True
            if direction == "fwd" and chosen.get("split", False):
                chosen["paged"] = True
            if chosen.get("paged", False):
                chosen["varlen"] = True
                if "dropout" in chosen:
                    chosen["dropout"] = False
            if direction == "sequence_tiles":  # one kernel serves all
                chosen["dtype"], chosen["head_dim"] = SEQUENCE_TILES_OF
            if direction == "append_kv":
                chosen["head_dim"] = APPEND_KV_HEAD_DIM
            if direction == "bwd_convert" and chosen["split"]:
                chosen["varlen"] = False
            keys.add(DispatchKey(family, direction, **chosen))
    keys |= set(_fp8_keys())
    assert not [key for key in keys if DISPATCH_TABLE.why_not(key)]
    return tuple(sorted(keys, key=str))
