"""Print a cell's kernel as one file: its translation unit with this package's headers inlined, each where it is first included.

    python tools/flatten.py fa3_fwd_sm90a_bf16_hdim128_causal > kernel.cu

What is left to include is CUTLASS's and CUDA's. For reading a kernel whole, and for handing it to somebody else's compiler.
"""

from __future__ import annotations

import argparse
import re
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))  # this checkout's package, whatever is installed

from cutlass_fa.cell import Cell
from cutlass_fa.dispatch import DispatchKey
from cutlass_fa.errors import FlashAttnError
from cutlass_fa.render import include_dir, render

_OWN_INCLUDE = re.compile(r"\s*#\s*include\s*<(cutlass_fa/[^>]+)>\s*")
_ONCE = re.compile(r"\s*#\s*pragma\s+once\s*")


def flatten(text: str, include_directory: Path) -> str:
    """`text` with every `#include <cutlass_fa/...>` replaced: the first of each header by its lines, the others by nothing."""
    return "\n".join(_flattened(text, include_directory, set())) + "\n"


def _flattened(text: str, include_directory: Path, seen: set[str]) -> Iterator[str]:
    for line in text.splitlines():
        match = _OWN_INCLUDE.fullmatch(line)
        if match is None:
            if not _ONCE.fullmatch(line):
                yield line
        elif match[1] not in seen:
            seen.add(match[1])
            yield f"// ==== {match[1]} ===="
            yield from _flattened((include_directory / match[1]).read_text(encoding="utf-8"), include_directory, seen)
            yield f"// ==== end of {match[1]} ===="


def main(argv: Sequence[str] | None = None) -> int:
    """Returns the exit status: 0, or 2 for a key without a kernel."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("key", metavar="KEY", help="a cell's name")
    arguments = parser.parse_args(argv)
    try:
        source = render(Cell.of(DispatchKey.parse(arguments.key)))
    except FlashAttnError as error:
        parser.error(str(error))
    sys.stdout.write(flatten(source.text, include_dir()))
    return 0


if __name__ == "__main__":
    sys.exit(main())
