"""Write generated/: the translation unit of every registered (golden) cell, so that a change of a template is reviewed as CUDA.

    python tools/regenerate_kernels.py            write what changed, remove what is no longer registered
    python tools/regenerate_kernels.py KEY ...    only these cells; nothing is removed
    python tools/regenerate_kernels.py --check    write nothing; show what would change and exit with 1 if anything would

Needs no GPU and no compiler.
"""

from __future__ import annotations

import argparse
import difflib
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))  # this checkout's package, whatever is installed

from cutlass_fa.cell import Cell
from cutlass_fa.dispatch import DISPATCH_TABLE, DispatchKey
from cutlass_fa.errors import FlashAttnError
from cutlass_fa.render import render

REPOSITORY = Path(__file__).resolve().parent.parent
GENERATED = REPOSITORY / "generated"
DIFF_LINES = 40  # shown of each file by --check


def main(argv: Sequence[str] | None = None) -> int:
    """Returns the exit status: 0, 1 where --check finds a difference, 2 for a name that is no registered cell's."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("keys", nargs="*", metavar="KEY", help="names of registered cells (default: all)")
    parser.add_argument("--check", action="store_true", help="show differences and exit with 1 if there are any")
    arguments = parser.parse_args(argv)
    try:
        keys = [DISPATCH_TABLE.strict_lookup(DispatchKey.parse(name)) for name in arguments.keys]
    except FlashAttnError as error:
        parser.error(str(error))
    wanted = {GENERATED / f"{key}.cu": render(Cell.of(key)).text for key in keys or DISPATCH_TABLE}
    stale = [] if keys else stale_files()
    return check(wanted, stale) if arguments.check else write(wanted, stale)


def stale_files() -> list[Path]:
    """Files of generated/ that belong to no registered cell."""
    names = {f"{key}.cu" for key in DISPATCH_TABLE}
    return sorted(path for path in GENERATED.glob("*.cu") if path.name not in names)


def write(wanted: dict[Path, str], stale: Sequence[Path]) -> int:
    """Make generated/ hold the wanted texts; a file that holds its text already is not touched."""
    GENERATED.mkdir(exist_ok=True)
    changed = [path for path, text in wanted.items() if read(path) != text]
    for path in changed:
        path.write_bytes(wanted[path].encode())
    for path in stale:
        path.unlink()
    for verb, paths in (("wrote", changed), ("removed", stale)):
        for path in paths:
            print(f"{verb} {path.relative_to(REPOSITORY)}")
    print(f"{len(wanted)} cells, {len(changed)} written, {len(stale)} removed")
    return 0


def check(wanted: dict[Path, str], stale: Sequence[Path]) -> int:
    """Print what `write` would do."""
    differing = [path for path, text in wanted.items() if read(path) != text]
    for path in differing:
        print("\n".join(short_diff(path, wanted[path])))
    for path in stale:
        print(f"{path.relative_to(REPOSITORY)} belongs to no registered cell")
    if differing or stale:
        print(f"{len(differing)} of {len(wanted)} files differ, {len(stale)} are stale: run python tools/regenerate_kernels.py")
        return 1
    return 0


def short_diff(path: Path, text: str) -> Iterator[str]:
    """A unified diff from the file to `text`, at most DIFF_LINES lines and a count of the rest."""
    name = path.relative_to(REPOSITORY).as_posix()
    old = read(path)
    old_name = f"a/{name}" if old is not None else "/dev/null"
    lines = list(difflib.unified_diff((old or "").splitlines(), text.splitlines(), old_name, f"b/{name}", lineterm=""))
    yield from lines[:DIFF_LINES]
    if len(lines) > DIFF_LINES:
        yield f"... {len(lines) - DIFF_LINES} more lines"


def read(path: Path) -> str | None:
    """The file's text, line ends as they are; None where there is no file."""
    return path.read_bytes().decode() if path.is_file() else None


if __name__ == "__main__":
    sys.exit(main())
