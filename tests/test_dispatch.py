"""DispatchKey and DISPATCH_TABLE: names parse back, refusals say why."""

from __future__ import annotations

from collections import Counter
from dataclasses import replace
from itertools import product

import pytest

from cutlass_fa.arch.limits import arch_problem, limits_of, table_arch
from cutlass_fa.dispatch import (
    ARCHS,
    BUILT_FLAGS,
    CELL_HEAD_DIMS,
    DIRECTIONS,
    DISPATCH_TABLE,
    DTYPES,
    FAMILIES,
    FLAG_WORDS,
    FP8_DTYPES,
    FP8_FLAGS,
    FP8_HEAD_DIMS,
    DispatchKey,
    cell_head_dim,
    family_of,
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
    full = DispatchKey("fa3", "fwd", "sm_90a", "e4m3", 64, gqa_ratio=4, v_dtype="e5m2", **{field: True for field, _ in FLAG_WORDS})
    words = (
        "causal_varlen_window_alibi_sink_lsink_paged_kinner_vinner_offsets_softcap_dropout_f32out_f16out_precise_descale_bdescale_"
        "deterministic_split_rotary"
    )
    assert str(full) == f"fa3_fwd_sm90a_e4m3_ve5m2_hdim64_{words}_gqa4"
    assert str(DispatchKey("fa2", "bwd_preprocess", "sm_80", "bf16", 128)) == "fa2_bwd_preprocess_sm80_bf16_hdim128"


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
        ({"family": "fa2", "direction": "bwd", "gqa_ratio": 2}, "heads are not packed"),
        ({"dropout": True}, "dropout is not built yet in the fa3 fwd"),
        ({"direction": "bwd"}, "backward"),
        ({"family": "fa2", "dtype": "e4m3", "v_dtype": "e4m3"}, "dtype e4m3 is not built yet in the fa2 fwd"),
        ({"family": "fa2", "arch": "sm_89", "dtype": "e4m3", "v_dtype": "e4m3"}, "fp8 needs sm_90a"),
        ({"dtype": "e4m3", "v_dtype": "e5m2", "head_dim": 80}, "head_dim 80"),
        ({"dtype": "e4m3", "v_dtype": "e5m2", "float_out": True, "half_out": True}, "in float32 or in float16"),
        ({"dtype": "e4m3", "v_dtype": "e5m2", "block_descale": True}, "set both"),
        ({"dtype": "e4m3", "v_dtype": "e4m3", "paged": True}, "paged is not built yet"),
        ({"precise": True}, "precise is of fp8 forwards"),
        ({"half_out": True}, "half_out is of fp8 forwards"),
        ({"descale": True}, "descale is of fp8 forwards"),
        ({"v_dtype": "f16"}, "must agree"),
        ({"v_dtype": "e4m3"}, "both 16-bit or both fp8"),
        ({"family": "fa2", "direction": "bwd_convert", "varlen": True, "split": True}, "leave out varlen"),
        ({"family": "fa2", "direction": "sequence_tiles"}, "one list of tiles serves all"),
        ({"family": "fa2", "direction": "append_kv"}, "one kernel appends rows of every head_dim"),
        ({"family": "fa2", "direction": "append_kv", "head_dim": 64, "dtype": "e4m3"}, "both 16-bit or both fp8"),
        ({"rotary": True}, "leave out rotary"),
        ({"sink": True}, "sink tokens need"),
        ({"sink": True, "causal": True}, "sink tokens need"),
        ({"paged": True}, "paged"),
        ({"position_offset": True, "softcap": True}, "no score depends on positions"),
        ({"family": "fa2", "direction": "bwd", "float_out": True}, "gradients are written in the element type"),
        ({"gqa_ratio": 128}, "gqa_ratio 128"),
        ({"family": "fa2", "gqa_ratio": 2, "dropout": True}, "heads are not packed with dropout"),
        ({"direction": "bwd", "dtype": "e4m3", "v_dtype": "e4m3"}, "no fp8 backward"),
        ({"direction": "bwd", "paged": True}, "no backward"),
        ({"k_tokens_inner": True, "varlen": True}, "only a cache may have its tokens innermost"),
        ({"v_tokens_inner": True, "paged": True}, "paged needs varlen"),
        ({"deterministic": True}, "every forward is"),
        ({"varlen": True, "split": True}, "split needs paged"),
        ({"direction": "bwd_convert"}, "bwd_convert is not built yet"),
        ({"family": "fa2", "direction": "bwd", "learnable_sink": True}, "the same with learnable_sink"),
        ({"family": "fa2", "direction": "bwd_convert", "learnable_sink": True}, "learnable_sink is not built yet in the fa2 bwd_convert"),
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
    reasons = DISPATCH_TABLE.why_not(replace(BASE, sink=True, dropout=True, paged=True))
    assert [any(word in reason for reason in reasons) for word in ("sink", "dropout", "paged")] == [True] * 3


def test_valid_keys_are_what_lookup_serves() -> None:
    valid = list(DISPATCH_TABLE.valid_keys())
    assert len(valid) == len(set(valid))
    combinations = 2 * len(CELL_HEAD_DIMS)  # dtypes x head_dims
    masks = 12 + 11  # causal, alibi, and a window, which may have sink tokens: each with offsets too, but for none of them
    counts = Counter((key.family, key.direction) for key in valid)
    fp8_combinations = len(FP8_DTYPES) * len(FP8_HEAD_DIMS)  # not on caches
    of_fa3 = 10 * combinations + 2 * fp8_combinations  # varlen and four caches, each split too
    assert counts["fa3", "fwd"] == of_fa3 * 2**3 * masks  # lsink, softcap, float_out
    assert counts["fa2", "fwd"] == combinations * 8 * 2**3 * masks * len(ARCHS)  # dropout or, with varlen, paged of 4 layouts; as fa3
    assert set(counts) == set(BUILT_FLAGS)
    assert all(DISPATCH_TABLE.lookup(key) is key for key in valid)
    plain = dict.fromkeys(FP8_FLAGS, False)
    assert {replace(key, gqa_ratio=1, v_dtype=key.dtype, **plain) for key in DISPATCH_TABLE} <= set(valid)
    assert all(DISPATCH_TABLE.lookup(key) is key for key in DISPATCH_TABLE)


def test_strict_lookup_serves_registered_cells_only() -> None:
    registered = next(iter(DISPATCH_TABLE))
    assert DISPATCH_TABLE.strict_lookup(registered) == registered
    unregistered = next(key for key in DISPATCH_TABLE.valid_keys() if key not in set(DISPATCH_TABLE))
    with pytest.raises(UnknownKey, match="not a registered cell"):
        DISPATCH_TABLE.strict_lookup(unregistered)


@pytest.mark.parametrize(
    ("arch", "words"),
    [("sm_75", "older than sm_80"), ("hopper", "not a GPU's name"), ("sm_90b", "not a GPU's name"), ("sm_", "not a GPU's name")],
)
def test_an_arch_is_refused_with_its_reason(arch: str, words: str) -> None:
    assert words in str(arch_problem(arch))
    with pytest.raises(UnknownKey, match=words):
        replace(BASE, arch=arch)


def test_an_arch_without_a_table_uses_the_nearest_older_one() -> None:
    nearest = {"sm_87": "sm_86", "sm_90": "sm_90a", "sm_103": "sm_100", "sm_110": "sm_100", "sm_121": "sm_120", "sm_200": "sm_120"}
    assert {arch: table_arch(arch) for arch in nearest} == nearest
    assert all(table_arch(arch) == arch and arch_problem(arch) is None for arch in ARCHS)
    assert limits_of("sm_121") == limits_of("sm_120") != limits_of("sm_110")
    key = replace(BASE, family="fa2", arch="sm_121")
    assert DispatchKey.parse(str(key)) == key and str(key) == "fa2_fwd_sm121_bf16_hdim128"


def test_family_of_a_call() -> None:
    assert family_of("sm_90a", "fwd") == "fa3"
    assert {family_of("sm_90a", "bwd"), family_of("sm_90a", "fwd", dropout=True), family_of("sm_103", "fwd")} == {"fa2"}


def test_cell_head_dim_rounds_up() -> None:
    served = {head_dim: cell_head_dim(head_dim) for head_dim in range(8, 257, 8)}
    assert all(cell in CELL_HEAD_DIMS and cell >= head_dim for head_dim, cell in served.items())
    assert served[8] == 64 and served[64] == 64 and served[72] == 80 and served[136] == 192 and served[200] == 256
    assert [cell_head_dim(head_dim) for head_dim in (0, 4, 100, 264, -8)] == [None] * 5
    assert cell_head_dim(72, "e4m3") == cell_head_dim(80, "e5m2") == 96 and cell_head_dim(264, "e4m3") is None
