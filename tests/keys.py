"""A sample of the keys that have a kernel, in which every three choices of flags, dtype, head_dim and architecture meet."""

from __future__ import annotations

from collections.abc import Iterator
from functools import lru_cache
from typing import Any

from cutlass_fa.dispatch import (
    ARCHS,
    BUILT_FLAGS,
    CELL_HEAD_DIMS,
    DISPATCH_TABLE,
    FP8_DTYPES,
    FP8_FLAGS,
    FP8_HEAD_DIMS,
    SEQUENCE_TILES_OF,
    DispatchKey,
)
from tests.covering import covering


def _fp8_keys() -> Iterator[DispatchKey]:
    """The forwards of 8-bit numbers, whose flags meet those of 16 bits by twos."""
    factors: dict[str, Any] = {"dtype": FP8_DTYPES, "v_dtype": FP8_DTYPES, "head_dim": FP8_HEAD_DIMS}
    for chosen in covering(factors | {flag: (False, True) for flag in (*BUILT_FLAGS["fa3", "fwd"], *FP8_FLAGS)}, 2):
        chosen["sliding_window"] |= chosen["sink"]
        chosen["causal"] |= chosen["position_offset"]
        chosen["descale"] |= chosen["block_descale"]
        chosen["half_out"] &= not chosen["float_out"]
        yield DispatchKey("fa3", "fwd", "sm_90a", **chosen)


@lru_cache(maxsize=1)
def sampled_keys() -> tuple[DispatchKey, ...]:
    """Those of each (family, direction), and every golden one. Sink tokens without a window, and offsets without a mask that
    they move, which no kernel has, get the window and the mask; other combinations that no kernel has get what it has."""
    keys = set(DISPATCH_TABLE)
    for (family, direction), flags in BUILT_FLAGS.items():
        factors: dict[str, Any] = {"arch": ARCHS if family == "fa2" else ("sm_90a",), "dtype": ("f16", "bf16"), "head_dim": CELL_HEAD_DIMS}
        for chosen in covering(factors | {flag: (False, True) for flag in flags}, 3):
            chosen["sliding_window"] = chosen.get("sliding_window", False) or chosen.get("sink", False)
            if chosen.get("position_offset", False) and not (chosen["sliding_window"] or chosen["alibi"]):
                chosen["causal"] = True
            if direction == "sequence_tiles":  # one kernel serves all
                chosen["dtype"], chosen["head_dim"] = SEQUENCE_TILES_OF
            if direction == "bwd_convert" and chosen["split"]:
                chosen["varlen"] = False
            keys.add(DispatchKey(family, direction, **chosen))
    keys |= set(_fp8_keys())
    assert not [key for key in keys if DISPATCH_TABLE.why_not(key)]
    return tuple(sorted(keys, key=str))
