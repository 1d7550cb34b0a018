"""The check of the checker: change a kernel's text one act at a time and see whether the CPU executor notices.

    python tools/mutate.py KEY [--jobs N] [--seeds N] [--quick] [--only OPERATOR]

A mutant is caught when some run of it, over a few shapes and seeds, ends in a fault, a deadlock, a crash or wrong numbers (the test rule
against float64). One that does not compile is none. One that is known to mean the same as the original (EQUIVALENT, each with its
reason) is listed and not counted. Exit status 1 when fewer than 95% of the others are caught.
"""

from __future__ import annotations

import argparse
import dataclasses
import re
import sys
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))  # this checkout's package and tests

from cutlass_fa.cell import Cell
from cutlass_fa.dispatch import DispatchKey
from cutlass_fa.executor import ExecutorFault, ExecutorKernel, HostCompileError, Program, run_forward
from cutlass_fa.render import Source, render
from cutlass_fa.request_parts import PersistentMode
from tests.numerics import check_forward, poisoned, random_qkv

DEFAULT_KEY = "fa3_fwd_sm90a_bf16_hdim64_causal"
REQUIRED_SCORE = 0.95
TIME_LIMIT_S = 10
DOES_NOT_COMPILE = "does not compile"
QUICK_STEP = 12  # --quick tries every so many mutants

_NAME = r"[A-Za-z_][\w.\[\]]*"


@dataclass(frozen=True)
class Operator:
    """A kind of mutation: every match of `pattern` in the code (comments aside) is replaced by `replacement`, one at a time."""

    name: str
    pattern: str
    replacement: str


# Acts are statements; dropping one leaves the empty statement. A definition's own header never matches, as it ends in a brace.
OPERATORS = (
    Operator("drop a call", rf"(?<![\w.=(] )(?<![\w.]){_NAME}(?:<[\w, :()]*>)?\((?:[^;{{}}]|\{{\}})*\);", ";"),
    Operator("wait<0> to wait<1>", r"wgmma_wait<0>", "wgmma_wait<1>"),
    Operator("wait<1> to wait<0>", r"wgmma_wait<1>", "wgmma_wait<0>"),
    Operator("wait for one copy less", r"(cp_async_wait<kStages - [12])>", r"\1 + 1>"),
    Operator("arrive without expecting bytes", r"arrive_and_expect\([^;]*\)", "arrive()"),
    Operator("expect too few bytes", r"(arrive_and_expect\([^;]*)\);", r"\1 - 128);"),
    Operator("expect too many bytes", r"(arrive_and_expect\([^;]*)\);", r"\1 + 128);"),
    Operator("flip a parity", r"parity\(\) \^ 1\)", "parity())"),
    Operator("flip a parity", r"parity\(\)\)", "parity() ^ 1)"),
    Operator("another stage", r"\[((?:self\.)?[kv]_pipe)\.stage\(\)\]", r"[(\1.stage() + 1) % kStages]"),
    Operator("one arrival more", r"\.init\(([^;]*)\);", r".init(\1 + 1);"),
    Operator("one arrival less", r"\.init\((k\w+|consumer_warps)\);", r".init(\1 - 1);"),
    Operator("half the threads at a barrier", r"2 \* kWarpgroupSize", "kWarpgroupSize"),
    Operator("another named barrier", r"(named_barrier_(?:sync|arrive)\()(warpgroup)", r"\1(1 - 1) * \2"),
    Operator("signal from every lane", r"thread_index\(\) % kWarpSize == 0|\blane == 0", "true"),
    Operator("signal from one warp only", r"thread_index\(\) % kWarpSize == 0|\blane == 0", "thread_index() % kWarpgroupSize == 0"),
    Operator("drop + 1", r" \+ 1\b(?! ==)", ""),
    Operator("drop - 1", r" - 1\b", ""),
    Operator("< to <=", r"(?<=[\w\])]) < (?=[\w(])", " <= "),
    Operator(">= to >", r" >= ", " > "),
    Operator("> to >=", r"(?<=\w) > (?=\w)", " >= "),
    Operator("drop + 8", r" \+ 8\b(?: \* r)?", ""),
    Operator(
        "drop a term",
        r" [+-] (?:params\.\w+|first_column|block \* kTileN|tile\.\w+ \* [\w.]+|chunk \* \w+|warpgroup \* \w+|kTile[MN])\b",
        "",
    ),
    Operator("another coordinate", r"\bkv_head, tile\.batch\)", "tile.head, tile.batch)"),
    Operator("another coordinate", r", tile\.batch\)", ", 0)"),
    Operator("another coordinate", r"chunk \* kChunkColumns", "0"),
    Operator("another coordinate", r"n_block \* kTileN, ", "n_block * kTileN + 1, "),
    Operator("another coordinate", r"tile\.first_query, tile", "tile.first_query + 8, tile"),
    Operator("another operand", r"\bstep > 0\)", "true)"),
    Operator("another operand", r"\bstep > 0\)", "false)"),
    Operator("another operand", r", true\);\n", ", false);\n"),
    Operator("another operand", r"p \+ 4 \* step", "p"),
    Operator("another operand", r"Major::kMn", "Major::kK"),
    Operator("another operand", r"Major::kK", "Major::kMn"),
    Operator("another step", r"\* step\)", "* (step ^ 1))"),
    Operator("another step", r"column_step_bytes\(step, ", "column_step_bytes(step ^ 1, "),
    Operator("another descriptor: swizzle", r"(kQLayout|kKLayout|kVLayout) = 0x(\w)", r"\1 = 0x8000000000000000ull ^ 0x\2"),
    Operator("another descriptor: stride offset", r"(kQLayout|kKLayout|kVLayout) = 0x(\w)", r"\1 = 0x0000002000000000ull ^ 0x\2"),
    Operator("another descriptor: leading offset", r"(kQLayout|kKLayout|kVLayout) = 0x(\w)", r"\1 = 0x0000000000200000ull ^ 0x\2"),
    Operator("another distance", r"(constexpr int k\w+Bytes = \d+);", r"\1 / 2;"),
    Operator("mask no block but the first", r"\bblock >= unmasked_end", "false"),
    Operator("mask no block but the first", r"true_type\{\}", "false_type{}"),
    Operator("mask every block", r"\bblock >= unmasked_end", "true"),
    Operator("mask every block", r"false_type\{\}", "true_type{}"),
    Operator("first softmax as a later one", r"softmax_scale_log2, true\)", "softmax_scale_log2)"),
    Operator("probabilities in the wrong place", r"\bnew_p, rescale", "old_p, rescale"),
    Operator("min to max", r"\bmin\(", "max("),
    Operator("max to min", r"\bmax\(", "min("),
    Operator("fewer registers", r"(shrink|grow)_registers_to<(\d+)>", r"\1_registers_to<\2 - 8>"),
    Operator("more registers", r"(shrink|grow)_registers_to<(\d+)>", r"\1_registers_to<\2 + 8>"),
    Operator("another lane", r"quad_lane == 0", "quad_lane == 1"),
    Operator("another lane", r"thread_index\(\) % 4\b", "thread_index() % 2"),
)


@dataclass(frozen=True)
class Equivalent:
    """Mutants that compute the same on any machine, at most with more work or less overlap.

    line, function: patterns of the mutated line, before the mutation, and of the function it is in. where: one of the kernel's whole text.
    """

    operator: str
    line: str
    reason: str
    function: str = ""
    where: str = ""


EQUIVALENT = (
    Equivalent("drop a call", r"prefetch_tensor_map", "a hint"),
    Equivalent("drop a call", r"pin_registers", "the product overwrites these registers whatever they hold", function="issue_qk"),
    Equivalent("wait<1> to wait<0>", r"wgmma_wait<1>", "waits for more than it must: less overlap, same numbers"),
    Equivalent("drop - 1", r"kTileN - 1|query_end", "at most one key block more, every score of it masked"),
    Equivalent("min to max", r"min\(query_end", "more key blocks, every score of them masked or of rows that do not exist"),
    Equivalent("max to min", r".", "more blocks are masked score by score, which changes nothing in them", function="n_block_unmasked_end"),
    Equivalent("mask every block", r"block >= unmasked_end|step\(n_block, false_type", "limits beyond the block's end mask nothing"),
    Equivalent(
        "first softmax as a later one|another operand",
        r"softmax_scale_log2, true",
        "an origin of -inf makes no finite sum: origins move all the same",
    ),
    Equivalent("< to <=", r"group < kHeadDim", "one group more, of columns that the test of `column` keeps from being stored"),
    Equivalent("< to <=", r"8 \* block < kHeadDim", "differs only for columns that are not stored"),
    Equivalent("< to <=", r"first < kTileN / 4", "one round more, of no element"),
    Equivalent("min to max", r"min\(first \+ 32", "one round of all 32 elements", where=r"kTileN = 128;"),
    Equivalent(">= to >", r"n_block >= own_end", "a block that could be skipped is computed, every score of it masked"),
    Equivalent(
        r"drop \+ [18]", r"key_end|n_block_end", "the keys that are seen do not depend on the query", where=r"Every query sees every key"
    ),
    Equivalent("drop a call", r"mask_block\(acc_s, block\)", "only the first block is ever masked", where=r"Every query sees every key"),
    Equivalent("another lane", r"quad_lane == 0 && params.lse", "all four lanes of a quad hold the row's lse"),
    Equivalent("another descriptor: leading offset", r"k[QK]Layout", "swizzled K-major operands do not use the leading offset"),
    Equivalent("another descriptor: leading offset", r"kVLayout", "one chunk of columns has no next one", where=r"kChunks = 1;"),
    Equivalent("drop a term|another coordinate", r"chunk \* kChunkColumns", "chunk is 0", where=r"kChunks = 1;"),
    Equivalent("another coordinate", r"kv_head, tile\.batch", "heads are packed: a tile's head is its key head", where=r"kGqaRatio = "),
)


@dataclass(frozen=True)
class Mutant:
    """One changed text. line, before, function: where the change is, the line as it was, and the function around it."""

    operator: str
    line: int
    before: str
    function: str
    source: Source

    @property
    def equivalent(self) -> str | None:
        """Why this mutant means the same as the original, where that is known."""
        for entry in EQUIVALENT:
            if (
                re.fullmatch(entry.operator, self.operator)
                and re.search(entry.line, self.before)
                and re.search(entry.function, self.function)
                and re.search(entry.where, self.source.text)
            ):
                return entry.reason
        return None

    def __str__(self) -> str:
        return f"{self.operator:32} {self.line:4} in {self.function}: {self.before.strip()}"


def mutants(source: Source) -> Iterator[Mutant]:
    """Every mutant of a kernel, in the order of OPERATORS and of the text; texts that come out twice appear once."""
    code = _without_comments(source.text)
    seen = {source.text}
    for operator in OPERATORS:
        for match in re.finditer(operator.pattern, code):
            if match.group().startswith(("static_assert", "return", "decltype")):
                continue
            changed = source.text[: match.start()] + match.expand(operator.replacement) + source.text[match.end() :]
            if changed in seen:
                continue
            seen.add(changed)
            number = code.count("\n", 0, match.start()) + 1
            mutated = dataclasses.replace(source, text=changed)
            yield Mutant(operator.name, number, source.text.split("\n")[number - 1], _function_around(code[: match.start()]), mutated)


def _function_around(code_before: str) -> str:
    headers = re.findall(r"^ *(?:CUTLASS_FA_DEVICE|extern|struct)[^;{=]*?\b(?!__)(\w+)(?=\(| \{)", code_before, flags=re.MULTILINE)
    return headers[-1] if headers else ""


def _without_comments(text: str) -> str:
    """The text with every comment blanked, character for character, and preprocessor lines with it."""
    return re.sub(r"//[^\n]*|^#[^\n]*", lambda match: " " * len(match.group()), text, flags=re.MULTILINE)


# ---- running them --------------------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Case:
    """A shape on which mutants run: (batch, seqlen_q, seqlen_k, heads of q and of k and v), head_dim less than the cell's by `narrower`."""

    batch: int
    seqlens: tuple[int, int]
    heads: tuple[int, int]
    narrower: int = 0
    persistent: int = 0  # CTAs; 0: the cell's own default
    strided: bool = False
    sharpness: int = 1  # q is so many times a standard normal: row maxima then move far from block to block
    window: tuple[int, int] = (90, 20)  # of cells that have one
    sinks: int = 5  # of cells that have them
    offsets: tuple[int, int] = (120, 30)  # of cells that have them


def cases(cell: Cell) -> tuple[Case, ...]:
    """Few and small, and still: more key blocks than stages, several tiles of a CTA, empty rows, a last causal section that is short."""
    return (
        Case(1, (250, 5 * cell.tile_n + 60), (2, 1), sharpness=8, window=(3 * cell.tile_n, cell.tile_n)),
        Case(2, (420, 260), (4, 2), narrower=24, persistent=2, strided=True),
        Case(1, (200, 300), (3, 3), persistent=1),
        Case(2, (70, 40), (2, 1), persistent=1),  # tiles of a single key block each
        Case(1, (192, 129 + cell.tile_n), (1, 1)),  # 64 queries end with the first key of a block
    )


def caught(cell: Cell, mutant: Mutant, seeds: int) -> str | None:
    """How the executor noticed the mutant, or None when it did not."""
    try:
        program = ExecutorKernel.build(mutant.source)
    except HostCompileError:
        return DOES_NOT_COMPILE
    try:
        for seed in range(seeds):
            for case in cases(cell):
                noticed = _run(cell, program, case, seed)
                if noticed is not None:
                    return noticed
        return None
    finally:
        program.path.unlink()


_DTYPES = {
    name: np.dtype(dtype)
    for name, dtype in (
        ("bf16", ml_dtypes.bfloat16),
        ("f16", np.float16),
        ("e4m3", ml_dtypes.float8_e4m3fn),
        ("e5m2", ml_dtypes.float8_e5m2),
    )
}


def _run(cell: Cell, program: Program, case: Case, seed: int) -> str | None:
    rng = np.random.default_rng(1000 * seed + case.seqlens[1])
    dtype = _DTYPES[cell.key.dtype]
    q, k, v = random_qkv(
        np,
        rng,
        batch=case.batch,
        seqlen_q=case.seqlens[0],
        seqlen_k=case.seqlens[1],
        num_heads_q=case.heads[0] if cell.key.gqa_ratio == 1 else case.heads[1] * cell.key.gqa_ratio,
        num_heads_kv=case.heads[1],
        head_dim=cell.head_dim - case.narrower,
        dtype=dtype,
        v_dtype=_DTYPES[cell.key.v_dtype],
        extra_strides=case.strided,
    )
    if case.sharpness != 1:
        q = (q.astype(np.float32) * case.sharpness).astype(dtype)
    few = case.persistent if cell.key.family == "fa3" else 0  # a CTA of the other family has one tile
    persistent = PersistentMode(True, few) if few else None
    out_dtype = np.dtype(np.float32) if cell.has_float_out else _DTYPES["bf16"] if cell.is_fp8 else dtype
    out_like = poisoned(np, (*q.shape[:3], q.shape[3] + 16), out_dtype)[..., : q.shape[3]] if case.strided else None
    try:
        options: dict[str, Any] = {"window_size": case.window} if cell.has_window else {}
        options |= {"sink_tokens": case.sinks} if cell.has_sink else {}
        options |= {"q_offset": case.offsets[0], "k_offset": case.offsets[1]} if cell.has_offset else {}
        options |= {"alibi_slopes": np.float32(2) ** -np.arange(q.shape[2], dtype=np.float32)} if cell.has_alibi else {}
        options |= {"learnable_sink": np.linspace(-1, 3, q.shape[2], dtype=np.float32)} if cell.has_learnable_sink else {}
        limits: dict[str, Any] = {"seed": seed, "time_limit_s": TIME_LIMIT_S}
        result = run_forward(cell, q, k, v, program=program, persistent=persistent, out_like=out_like, **limits, **options)
        check_forward(result.out, result.lse, q, k, v, case=f"{case}, seed {seed}", causal=cell.is_causal, **options)
    except ExecutorFault as fault:
        return fault.report.split("\n")[0].partition(": ")[2]
    except AssertionError as error:
        return f"wrong numbers: {str(error)[:160]}"
    return None


def main(argv: Sequence[str] | None = None) -> int:
    """Returns the exit status: 0 when enough mutants are caught."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("key", nargs="?", default=DEFAULT_KEY, help="a cell's name (default: %(default)s)")
    parser.add_argument("--jobs", type=int, default=2, help="mutants at a time (default: %(default)s)")
    parser.add_argument("--seeds", type=int, default=6, help="schedules per shape (default: %(default)s)")
    parser.add_argument("--quick", action="store_true", help=f"every {QUICK_STEP}th mutant only")
    parser.add_argument("--only", metavar="OPERATOR", default="", help="operators whose name contains this")
    arguments = parser.parse_args(argv)
    cell = Cell.of(DispatchKey.parse(arguments.key))
    chosen = [mutant for mutant in mutants(render(cell)) if arguments.only in mutant.operator]
    if arguments.quick:
        chosen = chosen[::QUICK_STEP]
    original = ExecutorKernel.build(render(cell))
    problems = [_run(cell, original, case, seed) for seed in range(arguments.seeds) for case in cases(cell)]
    if any(problems):
        print(f"the unchanged kernel is not clean, so nothing is proved: {next(filter(None, problems))}", file=sys.stderr)
        return 1
    with ThreadPoolExecutor(arguments.jobs) as pool:
        results = list(pool.map(lambda mutant: caught(cell, mutant, arguments.seeds), chosen))
    return _report(chosen, results)


def _report(chosen: Sequence[Mutant], results: Sequence[str | None]) -> int:
    counted = found = same = 0
    for mutant, result in zip(chosen, results, strict=True):
        if result == DOES_NOT_COMPILE:
            continue
        equivalent = mutant.equivalent
        if result is None and equivalent is not None:
            same += 1
            print(f"same      {mutant}\n            {equivalent}")
            continue
        counted += 1
        found += result is not None
        print(f"{'caught' if result is not None else 'SURVIVED':9} {mutant}" + (f"\n            {result}" if result is not None else ""))
    score = found / counted if counted else 1.0
    print(f"{found} of {counted} mutants caught ({score:.1%}); {same} mean the same as the original")
    return 0 if score >= REQUIRED_SCORE else 1


if __name__ == "__main__":
    sys.exit(main())
