"""The command line, `cutlass-fa` or `python -m cutlass_fa`: demo, explain, precompile, cache.

Results go to stdout, progress and complaints to stderr. Exit status: 0, 1 for a failure, 2 for a wrong command line or a combination that
has no kernel, 130 for Ctrl-C. An error of this package is one line, never a traceback.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import sys
import time
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import TextIO

from . import cache
from .arch.limits import arch_problem
from .dispatch import DISPATCH_TABLE, DTYPES, FAMILIES, DispatchKey, cell_head_dim, family_of
from .errors import DispatchError, FlashAttnError
from .settings import SETTINGS, cache_dir

EXAMPLE_KEY = "fa3_fwd_sm90a_bf16_hdim128_causal"

# explain's presence flags: (field of DispatchKey, what the kernel then does).
_PRESENCE_FLAGS = (
    ("causal", "causal mask"),
    ("varlen", "packed sequences of varying length"),
    ("sliding_window", "a window around each query's position"),
    ("sink", "sink tokens"),
    ("learnable_sink", "a learned logit without a key in each row"),
    ("alibi", "ALiBi bias"),
    ("paged", "K and V in a paged cache"),
    ("k_tokens_inner", "a cache of K whose tokens lie innermost in memory"),
    ("v_tokens_inner", "a cache of V whose tokens lie innermost in memory"),
    ("softcap", "scores capped by a tanh"),
    ("dropout", "dropout of probabilities"),
    ("position_offset", "positions of the first query and key, as the call gives them"),
    ("float_out", "out in float32, to be merged with others"),
    ("half_out", "out of fp8 q, k and v in float16 (default: bfloat16)"),
    ("precise", "sums of fp8 probabilities times values in float32"),
    ("descale", "factors of fp8 q, k and v in arrays"),
    ("block_descale", "factors of each 128 keys too"),
    ("deterministic", "a backward whose sums are taken in a fixed order"),
)


class UsageError(FlashAttnError):
    """A command line that parses and still makes no sense."""


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command; argv without the program's name, by default this process's. Returns the exit status."""
    parser = make_parser()
    arguments = parser.parse_args(argv)
    run: Callable[[argparse.Namespace], int] = arguments.run
    try:
        status = run(arguments)
        sys.stdout.flush()
        return status
    except FlashAttnError as error:
        _complain(str(error))
        return 2 if isinstance(error, DispatchError | UsageError) else 1
    except KeyboardInterrupt:
        _complain("interrupted")
        return 130
    except BrokenPipeError:
        # The reader of stdout left (`cutlass-fa cache list | head`); keep Python from flushing into the closed pipe at exit.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 1


def _complain(message: str) -> None:
    print("cutlass-fa: " + " ".join(message.split()), file=sys.stderr)


# ---- the command line ----------------------------------------------------------------------------------------------------------------


def make_parser() -> argparse.ArgumentParser:
    """The parser of all commands; each sets `run`, a function of the parsed arguments that returns the exit status."""
    from . import __version__

    parser = argparse.ArgumentParser(
        prog="cutlass-fa",
        description="FlashAttention kernels generated from templates, compiled by NVRTC at first use and cached.",
        epilog=_environment_table(),
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--version", action="version", version=f"cutlass-fa {__version__}")
    commands = parser.add_subparsers(title="commands", metavar="COMMAND", required=True)

    demo = commands.add_parser("demo", help="attention on real shapes, checked and timed; without a GPU, what can be shown there")
    demo.set_defaults(run=_demo)
    _add_explain(commands.add_parser("explain", help="what a cell is made of: tile, registers, machine code; or why it does not exist"))
    _add_precompile(commands.add_parser("precompile", help="compile cells into the cache before they are needed"))
    _add_cache(commands.add_parser("cache", help="look at, check or empty the cache of compiled kernels"))
    _add_run(commands.add_parser("run", help="run one kernel on the CPU, by the executor, and compare it with the reference"))
    return parser


def _environment_table() -> str:
    lines = ["environment variables:"]
    for setting in SETTINGS:
        lines += [f"  {setting.name} (default: {setting.default})", f"      {setting.meaning}"]
    return "\n".join(lines)


def _add_explain(parser: argparse.ArgumentParser) -> None:
    parser.description = "Compile a cell (or find it in the cache) and report on it. Needs no GPU."
    parser.add_argument("key", nargs="?", help=f"a cell's name, e.g. {EXAMPLE_KEY}; or describe it with the options")
    parser.add_argument("--arch", type=_arch, metavar="ARCH", help="target GPU, e.g. sm_80 (default: sm_90a)")
    parser.add_argument("--family", choices=FAMILIES, help="kernel family (default: the one that serves such a call)")
    parser.add_argument("--dtype", choices=DTYPES, help="element type of q and k (default: bf16)")
    parser.add_argument("--v-dtype", choices=DTYPES, help="element type of v (default: that of q and k)")
    parser.add_argument("--head-dim", type=int, metavar="N", help="columns of q, k and v; rounded up to the next cell")
    for field, meaning in _PRESENCE_FLAGS:
        parser.add_argument("--" + field.replace("_", "-"), action="store_true", default=None, help=meaning)
    parser.add_argument("--gqa-ratio", type=_positive, metavar="N", help="query heads packed into a tile (default: 1, which serves all)")
    parser.add_argument("--backward", action="store_true", default=None, help="the gradient's kernel")
    parser.add_argument("--json", action="store_true", help="print one JSON object")
    parser.set_defaults(run=_explain)


def _add_precompile(parser: argparse.ArgumentParser) -> None:
    parser.description = "Compile cells into the cache, several processes at a time. Needs no GPU."
    parser.add_argument("keys", nargs="*", metavar="KEY", help="a cell's name, or @FILE with one name a line (# starts a comment)")
    parser.add_argument("--file", action="append", default=[], metavar="FILE", help="a file of names, as @FILE")
    parser.add_argument("--golden", action="store_true", help=f"the {len(DISPATCH_TABLE)} cells registered under generated/")
    parser.add_argument("--all", action="store_true", help="every cell there is")
    parser.add_argument("--arch", type=_arch, metavar="ARCH", help="keep only the cells of this target")
    parser.add_argument("--jobs", type=_positive, metavar="N", help="processes (default: one per processor)")
    parser.set_defaults(run=_precompile)


def _add_cache(parser: argparse.ArgumentParser) -> None:
    commands = parser.add_subparsers(title="commands", metavar="COMMAND", required=True)
    for name, run, meaning in (
        ("info", _cache_info, "where the cache is and how much it holds"),
        ("list", _cache_list, "every entry, of the cache directory and of the packs"),
        ("verify", _cache_verify, "check every entry's checksums; exit status 1 if one fails"),
        ("clear", _cache_clear, "remove every entry of the cache directory; packs stay"),
    ):
        commands.add_parser(name, help=meaning, description=meaning.capitalize() + ".").set_defaults(run=run)


def _positive(text: str) -> int:
    value = int(text)
    if value < 1:
        raise argparse.ArgumentTypeError(f"{text} is not a positive number")
    return value


def _arch(text: str) -> str:
    problem = arch_problem(text)
    if problem is not None:
        raise argparse.ArgumentTypeError(problem)
    return text


# ---- demo and explain ----------------------------------------------------------------------------------------------------------------


def _add_run(parser: argparse.ArgumentParser) -> None:
    parser.description = (
        "Compile a cell's translation unit with the host's C++ compiler and run it on the CPU at a small shape, every asynchronous act "
        "as early or as late as the GPU might. Needs g++ and no GPU; docs/executor.md says what it checks."
    )
    parser.add_argument("key", help=f"a cell's name, e.g. {EXAMPLE_KEY}")
    parser.add_argument("--executor", action="store_true", required=True, help="on the CPU executor, so far the only way to run one cell")
    parser.add_argument("--seed", type=int, default=0, metavar="N", help="draws the inputs and the schedule (default: 0)")
    for name, default in (("batch", 1), ("seqlen-q", 77), ("seqlen-k", 150), ("kv-heads", 1)):
        parser.add_argument(f"--{name}", type=_positive, default=default, metavar="N", help=f"default: {default}")
    parser.add_argument("--head-dim", type=_positive, metavar="N", help="default: the cell's own")
    parser.set_defaults(run=_run)


def _run(arguments: argparse.Namespace) -> int:
    from .executor.run import RunShape, run_key

    key = DispatchKey.parse(arguments.key)
    group = key.gqa_ratio if key.gqa_ratio > 1 else 2
    shape = RunShape(
        batch=arguments.batch,
        seqlen_q=arguments.seqlen_q,
        seqlen_k=arguments.seqlen_k,
        num_heads_q=arguments.kv_heads * group,
        num_heads_kv=arguments.kv_heads,
        head_dim=arguments.head_dim or 0,
    )
    return 0 if run_key(key, sys.stdout, shape=shape, seed=arguments.seed) else 1


def _demo(arguments: argparse.Namespace) -> int:
    from .demo import demo

    return 0 if demo(sys.stdout) else 1


def _explain(arguments: argparse.Namespace) -> int:
    from .explain import Refusal, explain, rounding_notes

    try:
        key = _described_key(arguments) if arguments.key is None else _named_key(arguments)
        notes = [] if arguments.head_dim is None else _head_dim_notes(arguments.head_dim) + list(rounding_notes(arguments.head_dim, key))
        report = explain(key, notes)
    except DispatchError as error:  # no key at all: a name that does not parse
        if not arguments.json or arguments.key is None:
            raise
        report = Refusal(arguments.key, (str(error),))
    if arguments.json:
        print(json.dumps(report.as_dict(), indent=2))
    else:
        for name, value in report.as_dict().items():
            _print_field(name, value)
    return 0 if report.supported else 2


def _named_key(arguments: argparse.Namespace) -> DispatchKey:
    options = ("arch", "family", "dtype", "v_dtype", "head_dim", "gqa_ratio", "backward", *(field for field, _ in _PRESENCE_FLAGS))
    given = [name for name in options if getattr(arguments, name) is not None]
    if given:
        raise UsageError(
            f"explain takes a cell's name or options that describe one, not both: {arguments.key} and --{given[0].replace('_', '-')}"
        )
    return DispatchKey.parse(arguments.key)


def _described_key(arguments: argparse.Namespace) -> DispatchKey:
    if arguments.head_dim is None:
        raise UsageError(f"explain needs a cell's name (such as {EXAMPLE_KEY}) or at least --head-dim")
    arch = arguments.arch or "sm_90a"
    direction = "bwd" if arguments.backward else "fwd"
    dtype = arguments.dtype or "bf16"
    return DispatchKey(
        arguments.family or family_of(arch, direction, dropout=bool(arguments.dropout)),
        direction,
        arch,
        dtype,
        cell_head_dim(arguments.head_dim, dtype) or arguments.head_dim,
        gqa_ratio=arguments.gqa_ratio or 1,
        v_dtype=arguments.v_dtype or dtype,
        **{field: bool(getattr(arguments, field)) for field, _ in _PRESENCE_FLAGS},
    )


def _head_dim_notes(head_dim: int) -> list[str]:
    return [] if cell_head_dim(head_dim) else [f"head_dim {head_dim} fits no cell: multiples of 8 up to 256 run in the next larger one"]


def _print_field(name: str, value: object) -> None:
    """`name  value`; a list or a table takes a line for each of its items."""
    items: list[object]
    if isinstance(value, dict):
        items = [f"{count} x {kind}" for kind, count in value.items()]
    else:
        items = list(value) if isinstance(value, list) else [value]
    if value is None or items == []:
        return
    for index, item in enumerate(items):
        print(f"{name if index == 0 else '':26} {item}")


# ---- precompile ----------------------------------------------------------------------------------------------------------------------

_STATE_WORDS = {
    "compiled": "compiled in",
    "disk": "found in the cache in",
    "pack": "found in a pack in",
    "unsupported": "is not supported, after",
    "failed": "failed after",
}


def _precompile(arguments: argparse.Namespace) -> int:
    from .precompile import precompile

    keys = [key for key in _chosen_keys(arguments) if arguments.arch in (None, key.arch)]
    keys = list(dict.fromkeys(keys))
    if not keys:
        chosen = f"of the cells chosen none is for {arguments.arch}" if arguments.arch else "no cells chosen"
        raise UsageError(f"{chosen}; precompile takes names, @FILE, --golden or --all")
    start = time.perf_counter()
    progress = _Progress(len(keys), sys.stderr)
    results = []
    for result in precompile(keys, arguments.jobs):
        results.append(result)
        progress.advance(f"{result.key} {_STATE_WORDS[result.state]} {result.seconds:.1f} s")
    progress.close()
    for warning in dict.fromkeys(warning for result in results for warning in result.warnings):
        _complain(warning)
    for result in results:
        if result.error is not None:
            _complain(f"{result.key}: {result.error}")
    seconds = time.perf_counter() - start
    count = Counter(result.state for result in results)
    refused = count["failed"] + count["unsupported"]
    print(f"compiled {count['compiled']}, found {count['disk'] + count['pack']}, failed {refused} of {len(keys)} in {seconds:.1f} s")
    print(f"cache {cache_dir()}")
    return 1 if count["failed"] else 2 if count["unsupported"] else 0


def _chosen_keys(arguments: argparse.Namespace) -> Iterator[DispatchKey]:
    for name in arguments.keys:
        names = _names_in(name[1:]) if name.startswith("@") else [name]
        yield from map(DispatchKey.parse, names)
    for file in arguments.file:
        yield from map(DispatchKey.parse, _names_in(file))
    if arguments.golden:
        yield from DISPATCH_TABLE
    if arguments.all:
        yield from DISPATCH_TABLE.valid_keys()


def _names_in(file: str) -> list[str]:
    try:
        lines = Path(file).read_text(encoding="utf-8").splitlines()
    except (OSError, ValueError) as error:
        raise UsageError(f"{file} cannot be read as a file of names: {error}") from error
    names = (line.partition("#")[0].strip() for line in lines)
    return [name for name in names if name]


class _Progress:
    """A bar that redraws itself on a terminal; elsewhere, a line for each step."""

    width = 24

    def __init__(self, total: int, stream: TextIO) -> None:
        self._total = total
        self._stream = stream
        self._redraws = stream.isatty()
        self._done = 0
        if self._redraws:
            self._draw("")

    def advance(self, message: str) -> None:
        """One step done; `message` says which."""
        self._done += 1
        if self._redraws:
            self._draw(message)
        else:
            print(f"[{self._done}/{self._total}] {message}", file=self._stream, flush=True)

    def close(self) -> None:
        if self._redraws:
            print(file=self._stream, flush=True)

    def _draw(self, message: str) -> None:
        filled = self.width * self._done // self._total
        bar = "#" * filled + "." * (self.width - filled)
        line = f"[{bar}] {self._done}/{self._total} {message}"[: shutil.get_terminal_size().columns - 1]  # one that wraps is not redrawn
        clear_to_end = "\x1b[K"
        print(f"\r{line}{clear_to_end}", end="", file=self._stream, flush=True)


# ---- cache ---------------------------------------------------------------------------------------------------------------------------


def _cache_info(arguments: argparse.Namespace) -> int:
    info = cache.info()
    _print_field("directory", f"{info.directory} ({'writable' if info.writable else 'not writable'})")
    _print_field("entries", info.entries)
    _print_field("size", _size(info.stored_bytes))
    _print_field("packs", [str(directory) for directory in info.pack_dirs] or "none")
    _print_field("entries in packs", info.pack_entries)
    return 0


def _cache_list(arguments: argparse.Namespace) -> int:
    for entry in cache.entries():
        seconds = "damaged " if entry.compile_seconds is None else f"{entry.compile_seconds:6.1f} s"
        written = time.strftime("%Y-%m-%d %H:%M", time.localtime(entry.mtime))
        print(f"{entry.name:48} {entry.digest} {entry.origin:4} {_size(entry.stored_bytes):>9} {seconds} {written}")
    return 0


def _cache_verify(arguments: argparse.Namespace) -> int:
    problems = cache.verify()
    for problem in problems:
        _complain(problem)
    print(f"{len(cache.entries())} entries, {len(problems)} damaged")
    return 1 if problems else 0


def _cache_clear(arguments: argparse.Namespace) -> int:
    stored = cache.info().stored_bytes
    print(f"removed {cache.clear()} entries ({_size(stored)}) from {cache_dir()}")
    return 0


def _size(count: int) -> str:
    return f"{count / 1024:.0f} KB" if count < 10 * 1024**2 else f"{count / 1024**2:.1f} MB"
