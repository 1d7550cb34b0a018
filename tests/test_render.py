"""Cells, Params and templates: the structure's rules, held by a lint."""

from __future__ import annotations

import re
from itertools import product
from pathlib import Path

import jinja2
import numpy as np
import pytest

from cutlass_fa.arch.limits import limits_of
from cutlass_fa.arch.sm90 import FA3_FWD_CROWDED_TILES, FA3_FWD_FP8_TILES, FA3_FWD_PRECISE_TILES, FA3_FWD_TILES
from cutlass_fa.cell import Cell
from cutlass_fa.cells.fa3_fwd import Fa3FwdCell
from cutlass_fa.cells.fa3_fwd_fp8 import Fa3FwdFp8Cell
from cutlass_fa.dispatch import DISPATCH_TABLE, FLAG_WORDS, FP8_DTYPES, FP8_HEAD_DIMS, DispatchKey
from cutlass_fa.errors import UnsupportedCell
from cutlass_fa.params import fa3_fwd_params, params_dtype
from cutlass_fa.render import environment, include_dir, render, template_dir
from cutlass_fa.requests import DTYPES_16BIT
from tests.keys import line_limit, sampled_keys

KEYS = sampled_keys()
FA3_FWD_KEYS = [key for key in KEYS if (key.family, key.direction) == ("fa3", "fwd")]
TEMPLATES = sorted(template_dir().rglob("*.j2"))
HEADERS = sorted(include_dir().rglob("*.cuh"))


# ---- cells and params ----------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("key", KEYS, ids=str)
def test_every_valid_key_has_a_cell_that_fits(key: DispatchKey) -> None:
    cell = Cell.of(key)
    assert cell.smem_bytes <= limits_of(key.arch).smem_bytes and cell.threads % 32 == 0 and cell.misfits() == []
    assert cell.head_dim == key.head_dim and cell.arch == key.arch and str(cell.tile_m) in cell.summary


@pytest.mark.parametrize("key", FA3_FWD_KEYS, ids=str)
def test_fa3_fwd_cell(key: DispatchKey) -> None:
    cell = Cell.of(key)
    assert isinstance(cell, Fa3FwdCell) and cell.is_fp8 == isinstance(cell, Fa3FwdFp8Cell)
    assert cell.threads == 128 * (cell.tile_m // 64 + 1)
    assert cell.padded_columns >= cell.head_dim and cell.q_tile.rows == cell.tile_m and cell.kv_tile.rows == cell.tile_n


@pytest.mark.parametrize("key", FA3_FWD_KEYS, ids=str)
def test_template_steps_through_k_as_layouts_says(key: DispatchKey) -> None:
    """The one formula of placement that the template spells out (column_step_bytes), beside layouts.py's."""
    cell = Cell.of(key)
    assert isinstance(cell, Fa3FwdCell)
    for tile, chunk_bytes in ((cell.q_tile, cell.q_chunk_bytes), (cell.kv_tile, cell.kv_chunk_bytes)):
        columns = range(0, cell.head_dim, cell.mma_k)
        steps = [column // cell.chunk_columns * chunk_bytes + column % cell.chunk_columns * cell.element_bytes for column in columns]
        assert steps == [tile.k_major_step_bytes(step) for step in range(len(columns))]
    assert cell.consumers == 1 or cell.warpgroup_q_bytes == cell.q_tile.byte_offset(64, 0)


def test_tile_table_has_no_row_without_a_cell() -> None:
    keys = [key for key in DISPATCH_TABLE.valid_keys() if (key.family, key.direction) == ("fa3", "fwd")]
    for tiles, dtypes in ((FA3_FWD_TILES, DTYPES_16BIT), (FA3_FWD_FP8_TILES, FP8_DTYPES)):
        assert {(key.head_dim, key.causal or key.sliding_window) for key in keys if key.dtype in dtypes} == set(tiles)
    assert set(FA3_FWD_PRECISE_TILES) == set(FP8_HEAD_DIMS) >= set(FA3_FWD_CROWDED_TILES)


def test_invalid_key_has_no_cell() -> None:
    with pytest.raises(UnsupportedCell):
        Cell.of(DispatchKey("fa3", "fwd", "sm_90a", "bf16", 128, paged=True))


@pytest.mark.parametrize("dynamic_scheduler", [False, True])
@pytest.mark.parametrize("packed", [False, True])
@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize("window", [False, True])
@pytest.mark.parametrize(("alibi", "learnable_sink", "offset"), list(product([False, True], repeat=3)))
def test_params_have_no_holes(
    alibi: bool, learnable_sink: bool, offset: bool, window: bool, causal: bool, packed: bool, dynamic_scheduler: bool
) -> None:
    flags = {"causal": causal, "sliding_window": window, "sink": window and causal, "alibi": alibi}
    flags |= {"learnable_sink": learnable_sink, "position_offset": offset}
    key = DispatchKey("fa3", "fwd", "sm_90a", "bf16", 128, **flags, gqa_ratio=4 if packed else 1)
    fields = fa3_fwd_params(key, dynamic_scheduler)
    dtype = params_dtype(fields)
    offsets = [dtype.fields[field.name][1] for field in fields]
    expected = np.cumsum([0, *(field.size_bytes for field in fields)])
    assert offsets == expected[:-1].tolist()
    assert dtype.itemsize == -(-expected[-1] // 8) * 8
    written = ["o", "lse"] + ["tile_counter"] * dynamic_scheduler  # the words that a run writes, in this order
    written += ["alibi_slopes"] * alibi + ["learnable_sink"] * learnable_sink
    assert [field.name for field in fields[: len(written)]] == written and not any(field.is_address for field in fields[len(written) :])


# ---- rendered text -------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("key", KEYS, ids=str)
def test_rendered_text(key: DispatchKey) -> None:
    text = render(Cell.of(key)).text
    lines = text.splitlines()
    assert len(lines) <= line_limit(key)
    assert max(map(len, lines)) <= 170
    assert not any(mark in text for mark in ("${", "//%", "<#", "#>", "\t", "asm", "\n\n\n"))
    assert f"// cell: {key} " in lines[1]
    assert text == render(Cell.of(key)).text


@pytest.mark.parametrize("key", KEYS, ids=str)
def test_feature_off_leaves_no_word(key: DispatchKey) -> None:
    words = {"fp8"} - {"fp8" * (key.dtype in FP8_DTYPES)} | {word for flag in FLAG_WORDS if not getattr(key, flag[0]) for word in flag} - {
        "causal"
    }
    text = render(Cell.of(key)).text.lower()
    for own in (word for flag in FLAG_WORDS if getattr(key, flag[0]) for word in flag):
        if any(word in own for word in words):  # "sink" in "learnable_sink"
            text = text.replace(own, "")
    assert not [word for word in words if re.search(rf"\b\w*{word}\w*\b", text)]


def test_one_flip_changes_few_lines() -> None:
    base = render(Cell.of(DispatchKey("fa3", "fwd", "sm_90a", "bf16", 192))).text.splitlines()
    flipped = render(Cell.of(DispatchKey("fa3", "fwd", "sm_90a", "bf16", 192, causal=True))).text.splitlines()
    assert 0 < len(set(base) ^ set(flipped)) <= 40


# ---- template rules ------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("path", TEMPLATES, ids=lambda p: str(p.relative_to(template_dir())))
def test_template_rules(path: Path) -> None:
    """anchors of the house: conditions test one named boolean, no logic or string building, nesting <= 2, an opening statement of needs."""
    text = path.read_text()
    assert len(text.splitlines()) <= 350
    assert text.startswith("<#") and "Needs of cell" in text.split("#>")[0]
    assert "asm" not in re.findall(r"\w+", text)
    depth = 0
    for number, line in enumerate(text.splitlines(), 1):
        statement = re.match(r"\s*//%\s*(.*)", line)
        where = f"{path.name}:{number}"
        if statement:
            words = statement.group(1)
            keyword = words.split()[0]
            assert keyword in {"if", "else", "endif", "for", "endfor", "macro", "endmacro", "from", "include"}, where
            if keyword == "if":
                assert re.fullmatch(r"if cell\.(is|has)_\w+", words), f"{where}: a condition tests one named boolean"
            depth += {"if": 1, "for": 1, "endif": -1, "endfor": -1}.get(keyword, 0)
            assert 0 <= depth <= 2, where
        for expression in re.findall(r"\$\{(.*?)\}", line):
            assert re.fullmatch(r"(cell|field)\.\w+|\w+\(cell\)", expression), f"{where}: {expression}: no arithmetic or filters in a value"
    assert depth == 0


def test_undefined_name_is_an_error() -> None:
    with pytest.raises(jinja2.UndefinedError):
        environment().from_string("${cell.no_such_name}").render(cell=Cell.of(KEYS[0]))


@pytest.mark.parametrize("path", HEADERS, ids=lambda p: p.name)
def test_header_rules(path: Path) -> None:
    """Headers are plain CUDA C++: no Jinja, no feature flags, SPDX first, one include guard."""
    text = path.read_text()
    assert text.startswith("// SPDX-License-Identifier: BSD-3-Clause\n// ") and text.count("#pragma once") == 1
    assert "${" not in text and "//%" not in text
    assert not re.search(r"^\s*#\s*if", text, re.M)
    assert len(text.splitlines()) <= 350
