"""Cell -> Source: the translation unit of one cell, rendered from templates/.

Templates use `${name}` for values and `//% statement` for control, both of which are harmless C++; an undefined name is an error.
"""

from __future__ import annotations

import hashlib
from dataclasses import dataclass
from functools import cached_property, lru_cache
from pathlib import Path
from typing import TYPE_CHECKING

from .cell import Cell

if TYPE_CHECKING:
    import jinja2

PACKAGE_DIR = Path(__file__).parent


@dataclass(frozen=True)
class Source:
    """A translation unit ready for NVRTC.

    name: the cell's name. arch: NVRTC's -arch. entry: the kernel's symbol. text: the CUDA C++. smem_bytes: dynamic shared memory of a
    launch. threads: threads of a CTA.
    """

    name: str
    arch: str
    entry: str
    text: str
    smem_bytes: int
    threads: int

    @cached_property
    def digest(self) -> str:
        """SHA-256 of the text, in hexadecimal."""
        return hashlib.sha256(self.text.encode()).hexdigest()


def include_dir() -> Path:
    """The directory that holds cutlass_fa/*.cuh, the headers a translation unit includes."""
    return PACKAGE_DIR / "include"


def template_dir() -> Path:
    """The directory of the templates."""
    return PACKAGE_DIR / "templates"


def render(cell: Cell) -> Source:
    """The translation unit of `cell`; the same cell always gives the same bytes."""
    text = environment().get_template("tu.cu.j2").render(cell=cell)
    return Source(cell.name, cell.arch, cell.entry, text, cell.smem_bytes, cell.threads)


@lru_cache(maxsize=1)
def environment() -> jinja2.Environment:
    """The Jinja environment all templates share. Jinja is imported here: a launch from a warm cache of kernels never needs it."""
    import jinja2

    return jinja2.Environment(
        loader=jinja2.FileSystemLoader(template_dir()),
        variable_start_string="${",
        variable_end_string="}",
        block_start_string="<%",
        block_end_string="%>",
        line_statement_prefix="//%",
        comment_start_string="<#",
        comment_end_string="#>",
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        keep_trailing_newline=True,
        autoescape=False,
    )
