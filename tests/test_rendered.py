"""rendered.py: a text found again is the text that would be rendered, and anything that could change it ends in rendering."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path

import pytest

from cutlass_fa import cache, kernels, render, rendered
from cutlass_fa.cache import RENDERED_DIR, SOURCE_FILE
from cutlass_fa.cell import Cell
from cutlass_fa.compile import Cubin
from cutlass_fa.dispatch import DISPATCH_TABLE, DispatchKey
from cutlass_fa.render import PACKAGE_DIR, Source
from cutlass_fa.rendered import recall, recipe_of
from cutlass_fa.toolchain import Toolchain, compile_options

KEY = DispatchKey.parse("fa3_fwd_sm90a_bf16_hdim128_causal")
CELL = Cell.of(KEY)


@pytest.fixture(autouse=True)
def directory(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """An empty cache, a compiler that costs nothing, and a package whose files are all older than its import."""
    monkeypatch.setenv("CUTLASS_FA_CACHE_DIR", str(tmp_path / "cache"))
    monkeypatch.delenv("CUTLASS_FA_PACK_DIRS", raising=False)
    monkeypatch.delenv("CUTLASS_FA_NO_COMPILE", raising=False)
    monkeypatch.setattr(rendered, "_IMPORTED_NS", 1 << 62)
    set_nvrtc(monkeypatch, "13.0")
    kernels.forget()
    yield tmp_path / "cache"
    kernels.forget()


@pytest.fixture
def package(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A copy of the package that may be edited, whose files the recipe is made of."""
    copy = shutil.copytree(PACKAGE_DIR, tmp_path / "package", ignore=shutil.ignore_patterns("__pycache__"))
    monkeypatch.setattr(render, "PACKAGE_DIR", copy)
    return copy


def set_nvrtc(monkeypatch: pytest.MonkeyPatch, version: str) -> None:
    tools = Toolchain(version, "4.2.0", ())

    def compile_source(source: Source, program_name: str, toolchain: Toolchain) -> Cubin:
        return Cubin(source.text.encode(), 168, 0, 0, 0.1, compile_options(source.arch), toolchain.nvrtc_version, "4.2.0", "")

    monkeypatch.setattr(kernels, "find_toolchain", lambda: tools)
    monkeypatch.setattr(kernels, "compile_source", compile_source)


def record(directory: Path) -> Path:
    (path,) = (directory / RENDERED_DIR).iterdir()
    return path


def text_of_the_entry(directory: Path) -> Path:
    return directory / json.loads(record(directory).read_bytes())["entry"] / SOURCE_FILE


def test_what_is_recalled_is_what_is_rendered() -> None:
    assert recall(CELL) is None
    first = kernels.get(KEY)
    assert recall(CELL) == first.source == render.render(CELL)
    kernels.forget()
    later = kernels.get(KEY)
    assert (later.origin, later.source, later.cubin) == ("disk", first.source, first.cubin)


def test_every_cell_has_its_own_recipe() -> None:
    cells = [Cell.of(key) for key in DISPATCH_TABLE]
    assert len({recipe_of(cell) for cell in cells}) == len(cells)
    assert recipe_of(replace(CELL, tile=replace(CELL.tile, stages=1))) != recipe_of(CELL)  # type: ignore[call-arg, attr-defined]


def test_a_warm_start_does_not_import_jinja() -> None:
    kernels.get(KEY)
    program = f"""
import sys
from cutlass_fa import rendered
from cutlass_fa.cell import Cell
from cutlass_fa.dispatch import DispatchKey
rendered._IMPORTED_NS = 1 << 62
assert rendered.recall(Cell.of(DispatchKey.parse({str(KEY)!r}))) is not None
assert not [name for name in sys.modules if name.split(".")[0] in ("jinja2", "cupy")]
"""
    subprocess.run([sys.executable, "-c", program], check=True, cwd=PACKAGE_DIR.parent)


# ---- what makes a recipe another one -----------------------------------------------------------------------------------------------------


def _edit_a_template(package: Path) -> None:
    path = package / "templates" / "pieces" / "mask.j2"
    before = path.stat()
    path.write_text(path.read_text().replace("8", "9", 1))  # as long as before
    os.utime(path, ns=(before.st_atime_ns, before.st_mtime_ns))  # and as old


def _edit_a_module(package: Path) -> None:
    (package / "cells" / "fa3_fwd.py").open("a").write("\n")


def _add_a_template(package: Path) -> None:
    (package / "templates" / "new.j2").write_text("")


def _rename_a_module(package: Path) -> None:
    (package / "layouts.py").rename(package / "layout.py")


@pytest.mark.parametrize("edit", [_edit_a_template, _edit_a_module, _add_a_template, _rename_a_module])
def test_an_edited_package_renders_again(edit: Callable[[Path], None], package: Path, directory: Path) -> None:
    kernels.get(KEY)
    assert recall(CELL) is not None
    edit(package)
    assert recall(CELL) is None


def test_an_edited_template_gets_a_kernel_of_its_own(package: Path) -> None:
    old = kernels.get(KEY)
    template = package / "templates" / "sm90" / "fwd.cu.j2"
    template.write_text(template.read_text() + "// edited\n")
    render.environment.cache_clear()
    kernels.forget()
    new = kernels.get(KEY)
    render.environment.cache_clear()
    assert new.origin == "compiled" and new.source.text != old.source.text and b"// edited" in new.cubin.image


def test_another_jinja_renders_again(monkeypatch: pytest.MonkeyPatch) -> None:
    kernels.get(KEY)
    monkeypatch.setattr(rendered, "_jinja_identity", lambda: iter([b"environment.py 1 1"]))
    assert recall(CELL) is None


def test_another_nvrtc_compiles_the_recalled_text_again(monkeypatch: pytest.MonkeyPatch) -> None:
    old = kernels.get(KEY)
    kernels.forget()
    set_nvrtc(monkeypatch, "13.1")
    monkeypatch.setattr(kernels, "render", None)  # not called
    new = kernels.get(KEY)
    assert (new.origin, new.source, new.cubin.nvrtc_version) == ("compiled", old.source, "13.1") and new.path != old.path


def test_a_package_that_changed_under_a_process_is_not_trusted(package: Path, directory: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The process may run modules that are no longer those on disk, so it neither reads nor writes records."""
    newest = max(path.stat().st_ctime_ns for path in package.rglob("*"))
    monkeypatch.setattr(rendered, "_IMPORTED_NS", newest + 1)
    assert recipe_of(CELL) is not None
    monkeypatch.setattr(rendered, "_IMPORTED_NS", newest)
    assert recipe_of(CELL) is None
    kernels.get(KEY)
    assert not (directory / RENDERED_DIR).exists()


# ---- damage ------------------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("content", [b"", b"[]", b"{}", b'{"recipe": 1', b"\xff"])
def test_a_damaged_record_is_replaced(content: bytes, directory: Path) -> None:
    kernels.get(KEY)
    whole = record(directory).read_bytes()
    record(directory).write_bytes(content)
    assert recall(CELL) is None
    kernels.forget()
    assert kernels.get(KEY).origin == "disk"
    assert record(directory).read_bytes() == whole


def test_another_recipes_record_is_not_used(directory: Path) -> None:
    kernels.get(KEY)
    fields = json.loads(record(directory).read_bytes())
    record(directory).write_text(json.dumps({**fields, "recipe": fields["recipe"][:16] + "0" * 48}))
    assert recall(CELL) is None


def test_a_record_names_no_file_outside_the_cache(directory: Path) -> None:
    kernels.get(KEY)
    fields = json.loads(record(directory).read_bytes())
    record(directory).write_text(json.dumps({**fields, "entry": f"../{directory.name}/{fields['entry']}"}))
    assert recall(CELL) is None


def test_a_damaged_or_missing_text_is_rendered_again(directory: Path) -> None:
    text = kernels.get(KEY).source.text
    path = text_of_the_entry(directory)
    path.write_text(text + " ")
    assert recall(CELL) is None
    kernels.forget()
    with pytest.warns(cache.CacheWarning):
        assert kernels.get(KEY).source.text == text == path.read_text()
    assert recall(CELL) is not None
    assert cache.clear() == 1 and not (directory / RENDERED_DIR).exists()
    assert recall(CELL) is None


def test_a_text_from_a_pack_is_recalled(directory: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    kernels.get(KEY)
    monkeypatch.setenv("CUTLASS_FA_PACK_DIRS", str(directory.rename(tmp_path / "pack")))
    kernels.forget()
    assert kernels.get(KEY).origin == "pack" and [path.name for path in directory.iterdir()] == [RENDERED_DIR]
    assert recall(CELL) is not None
