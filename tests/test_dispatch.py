"""DispatchKey and DISPATCH_TABLE: names parse back, refusals say why."""

from __future__ import annotations

from dataclasses import replace
from itertools import product

import pytest

from cutlass_fa.dispatch import (
    ARCHS,
    CELL_HEAD_DIMS,
    DIRECTIONS,
    DISPATCH_TABLE,
    DTYPES,
    FAMILIES,
    FLAG_WORDS,
    DispatchKey,
    cell_head_dim,
)
from cutlass_fa.errors import DispatchError, UnknownKey, UnsupportedCell

BASE = DispatchKey("fa3", "fwd", "sm_90a", "bf16", 128)


def every_key() -> list[DispatchKey]:
    """Every base combination with no flag, with each flag, and with all flags together."""
    flags = [field for field, _ in FLAG_WORDS]
    choices = [{}, *({flag: True} for flag in flags), dict.fromkeys(flags, True)]
    return [
        DispatchKey(family, direction, arch, dtype, head_dim, gqa_ratio=gqa_ratio, v_dtype=v_dtype, **chosen)
        for family, direction, arch, dtype, v_dtype in product(FAMILIES, DIRECTIONS, ARCHS, DTYPES, DTYPES)
        for head_dim, gqa_ratio, chosen in product((64, 256), (1, 8), choices)
    ]


def test_names_parse_back_and_are_unique() -> None:
    keys = every_key()
    names = {str(key) for key in keys}
    assert len(names) == len(set(keys))
    assert all(DispatchKey.parse(str(key)) == key for key in keys)


def test_name_leaves_out_defaults() -> None:
    assert str(BASE) == "fa3_fwd_sm90a_bf16_hdim128"
    full = DispatchKey("fa3", "fwd", "sm_90a", "e4m3", 64, True, True, True, True, True, True, 4, "e5m2")
    assert str(full) == "fa3_fwd_sm90a_e4m3_ve5m2_hdim64_causal_varlen_window_alibi_sink_paged_gqa4"


@pytest.mark.parametrize(
    "name",
    ["", "fa3", "fa3_fwd_sm90a_bf16", "fa3_fwd_sm90a_bf16_hdim0", "fa4_fwd_sm90a_bf16_hdim128", "fa3_fwd_sm90a_bf16_hdim128_causal_causal",
     "fa3_fwd_sm90a_bf16_hdim128_varlen_causal", "fa3_fwd_sm90a_bf16_hdim128 ", "fa3_fwd_sm90a_bf16_hdim128_gqa0"],
)  # fmt: skip
def test_parse_refuses_what_is_no_name(name: str) -> None:
    with pytest.raises(UnknownKey, match="hdim"):
        DispatchKey.parse(name)


def test_key_refuses_unknown_words() -> None:
    with pytest.raises(UnknownKey, match="sm_70"):
        replace(BASE, arch="sm_70")


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"head_dim": 72}, "head_dim 72"),
        ({"arch": "sm_80"}, "sm_80"),
        ({"family": "fa2"}, "fa2"),
        ({"direction": "bwd"}, "backward"),
        ({"dtype": "e4m3", "v_dtype": "e4m3"}, "e4m3"),
        ({"v_dtype": "f16"}, "must agree"),
        ({"v_dtype": "e4m3"}, "both 16-bit or both fp8"),
        ({"varlen": True}, "varlen"),
        ({"sliding_window": True}, "sliding_window"),
        ({"alibi": True}, "alibi"),
        ({"sink": True}, "sink tokens need"),
        ({"paged": True}, "paged"),
        ({"gqa_ratio": 128}, "gqa_ratio 128"),
        ({"direction": "bwd", "dtype": "e4m3", "v_dtype": "e4m3"}, "no fp8 backward"),
        ({"direction": "bwd", "paged": True}, "no backward"),
    ],
)
def test_why_not_names_the_obstacle(change: dict[str, object], words: str) -> None:
    key = replace(BASE, **change)
    assert any(words in reason for reason in DISPATCH_TABLE.why_not(key))
    with pytest.raises(UnsupportedCell, match=words) as caught:
        DISPATCH_TABLE.lookup(key)
    assert isinstance(caught.value, DispatchError)
    assert caught.value.reasons == tuple(DISPATCH_TABLE.why_not(key))


def test_several_obstacles_are_all_named() -> None:
    reasons = DISPATCH_TABLE.why_not(replace(BASE, varlen=True, alibi=True, paged=True))
    assert [any(word in reason for reason in reasons) for word in ("varlen", "alibi", "paged")] == [True] * 3


def test_valid_keys_are_what_lookup_serves() -> None:
    valid = list(DISPATCH_TABLE.valid_keys())
    assert len(valid) == len(set(valid)) == 2 * len(CELL_HEAD_DIMS) * 2  # dtypes x head_dims x causal
    assert all(DISPATCH_TABLE.lookup(key) is key for key in valid)
    assert {replace(key, gqa_ratio=1) for key in DISPATCH_TABLE} <= set(valid)
    assert all(DISPATCH_TABLE.lookup(key) is key for key in DISPATCH_TABLE)


def test_strict_lookup_serves_registered_cells_only() -> None:
    registered = next(iter(DISPATCH_TABLE))
    assert DISPATCH_TABLE.strict_lookup(registered) == registered
    unregistered = next(key for key in DISPATCH_TABLE.valid_keys() if key not in set(DISPATCH_TABLE))
    with pytest.raises(UnknownKey, match="not a registered cell"):
        DISPATCH_TABLE.strict_lookup(unregistered)


def test_cell_head_dim_rounds_up() -> None:
    served = {head_dim: cell_head_dim(head_dim) for head_dim in range(8, 257, 8)}
    assert all(cell in CELL_HEAD_DIMS and cell >= head_dim for head_dim, cell in served.items())
    assert served[8] == 64 and served[64] == 64 and served[72] == 80 and served[136] == 192 and served[200] == 256
    assert [cell_head_dim(head_dim) for head_dim in (0, 4, 100, 264, -8)] == [None] * 5
