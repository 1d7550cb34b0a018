"""Cell -> Source without Jinja, where an earlier process rendered the same cell: a third of a warm start goes to importing and running it.

The text of a cell is a function of the cell, of this package's Python and templates, and of the interpreter, NumPy and Jinja. A record
`rendered/<name>-<first 16 hex digits of the recipe>` in the cache directory says, for the digest of all that (the recipe), which entry of
the cache holds the text, and the text's own checksum. It is no second way to a cubin: the text so found goes through the same content key,
tool versions and checks as a fresh one, and any doubt (no record, another recipe, another text) ends in rendering.
"""

from __future__ import annotations

import contextlib
import hashlib
import importlib.util
import json
import os
import secrets
import sys
from collections.abc import Iterator
from pathlib import Path

import numpy as np

from . import _IMPORTED_NS, render
from .cache import RENDERED_DIR, SOURCE_FILE
from .cell import Cell
from .render import Source
from .settings import cache_dir, pack_dirs


def recall(cell: Cell) -> Source | None:
    """The translation unit of `cell` as an earlier process left it in the cache, or None where it has to be rendered."""
    recipe = recipe_of(cell)
    if recipe is None:
        return None
    try:
        record = json.loads(_record_path(cell, recipe).read_bytes())
        if record["recipe"] != recipe:
            return None
        return _read_source(cell, str(record["entry"]), record["source_sha256"])
    except (OSError, ValueError, TypeError, KeyError):
        return None


def remember(cell: Cell, source: Source, entry: Path) -> None:
    """Record that `entry`, a directory of the cache or of a pack, holds the text of `cell`. A saving only: a failure is silent."""
    recipe = recipe_of(cell)
    if recipe is None:
        return
    path = _record_path(cell, recipe)
    temporary = path.with_name(f".{path.name}.{os.getpid()}-{secrets.token_hex(4)}.tmp")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        temporary.write_text(json.dumps({"recipe": recipe, "entry": entry.name, "source_sha256": source.digest}), encoding="utf-8")
        temporary.replace(path)
    except OSError:
        with contextlib.suppress(OSError):
            temporary.unlink()


def recipe_of(cell: Cell) -> str | None:
    """SHA-256, in hexadecimal, over everything that the text of `cell` is a function of. None where that cannot be known: no Jinja, or
    files of the package that changed after this process imported it, which may be running the code from before."""
    digest = hashlib.sha256()
    try:
        parts = [b"cutlass_fa 1", type(cell).__qualname__.encode(), repr(cell).encode(), sys.version.encode(), np.__version__.encode()]
        for part in (*parts, *_jinja_identity(), *_package_sources(render.PACKAGE_DIR)):
            digest.update(b"%d:" % len(part))
            digest.update(part)
    except OSError:
        return None
    return digest.hexdigest()


def _record_path(cell: Cell, recipe: str) -> Path:
    return cache_dir() / RENDERED_DIR / f"{cell.name}-{recipe[:16]}"


def _read_source(cell: Cell, entry: str, sha256: str) -> Source | None:
    if Path(entry).name != entry:
        return None
    for directory in (cache_dir(), *pack_dirs()):
        path = directory / entry / SOURCE_FILE
        if path.is_file():
            source = Source(cell.name, cell.arch, cell.entry, path.read_bytes().decode(), cell.smem_bytes, cell.threads)
            if source.digest == sha256:
                return source
    return None


def _package_sources(package: Path) -> Iterator[bytes]:
    """Name and bytes of every Python file and template. Raises OSError where one, or a directory of theirs, is younger than the import."""
    for directory, subdirectories, names in os.walk(package):
        subdirectories[:] = sorted(name for name in subdirectories if name != "__pycache__")
        sources = sorted(name for name in names if name.endswith((".py", ".j2")))
        for path in (directory, *(os.path.join(directory, name) for name in sources)):
            stat = os.stat(path)
            if max(stat.st_mtime_ns, stat.st_ctime_ns) >= _IMPORTED_NS:
                raise OSError(f"{path} changed since this process imported the package")
        for name in sources:
            yield os.path.relpath(os.path.join(directory, name), package).encode()
            with open(os.path.join(directory, name), "rb") as file:
                yield file.read()


def _jinja_identity() -> Iterator[bytes]:
    """Name, size and time of each of Jinja's files, which tell one installation from another without importing it."""
    spec = importlib.util.find_spec("jinja2")
    if spec is None or spec.origin is None:
        raise OSError("Jinja is not installed as files")
    with os.scandir(os.path.dirname(spec.origin)) as files:
        for file in sorted(files, key=lambda each: each.name):
            if file.name.endswith(".py"):
                yield f"{file.name} {file.stat().st_size} {file.stat().st_mtime_ns}".encode()
