"""Source -> Cubin through NVRTC: the content key of a compile, the compile, and an error message that shows the line at fault.

Needs no GPU and no driver.
"""

from __future__ import annotations

import hashlib
import logging
import re
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from . import render
from .errors import CompileError
from .render import Source
from .toolchain import Toolchain, compile_options, find_toolchain, nvrtc_compile

# Unconfigured, `logging` prints warnings, and nothing below them, to stderr; any configuration of the user's takes over from that. A
# compile that holds up a call for a second is worth that level.
_logger = logging.getLogger("cutlass_fa")
SLOW_COMPILE_S = 1.0

UNKNOWN = -1  # a resource that the compiler's log does not state


@dataclass(frozen=True)
class Cubin:
    """A compiled translation unit.

    image: the ELF image that the driver loads.
    registers: per thread at launch, of the entry kernel; UNKNOWN where NVRTC did not say. A kernel that moves registers between its warps
        (setmaxnreg) states here what it is launched with.
    spill_bytes: bytes spilled to local memory per thread, stores plus loads, over all functions of the unit; UNKNOWN like registers.
    static_smem_bytes: static shared memory of the entry kernel; the dynamic part is Source.smem_bytes.
    compile_seconds: wall time in NVRTC.
    options: NVRTC's options without include paths.
    nvrtc_version, cutlass_version: of the tools that made it.
    log: NVRTC's whole output.
    """

    image: bytes
    registers: int
    spill_bytes: int
    static_smem_bytes: int
    compile_seconds: float
    options: tuple[str, ...]
    nvrtc_version: str
    cutlass_version: str
    log: str

    @property
    def warnings(self) -> tuple[str, ...]:
        """The log's lines that warn: the front end's, and ptxas's "(C7510) Potential Performance Loss" of serialised wgmma."""
        return tuple(line.strip() for line in self.log.splitlines() if re.search(r"\bwarning\s*(#[\w-]+)?\s*:|\(C7\d+\)", line))


@dataclass(frozen=True)
class ContentKey:
    """What a kernel is made of.

    name: the cell's. digest: SHA-256 over everything, tool versions included; "" where the tools are not installed.
    inputs: SHA-256 over everything but the tool versions.
    """

    name: str
    digest: str
    inputs: str

    @property
    def entry_name(self) -> str:
        return f"{self.name}-{self.digest[:16]}"


def content_key(source: Source, toolchain: Toolchain | None) -> ContentKey:
    """The key of `source` compiled by `toolchain`. None stands for a machine without the tools: such a key finds entries by inputs."""
    inputs = hashlib.sha256()
    for part in ("cutlass_fa 1", source.text, headers_digest(render.include_dir()), *compile_options(source.arch)):
        _update(inputs, part.encode())
    if toolchain is None:
        return ContentKey(source.name, "", inputs.hexdigest())
    whole = hashlib.sha256()
    for part in (inputs.hexdigest(), toolchain.nvrtc_version, toolchain.cutlass_version):
        _update(whole, part.encode())
    return ContentKey(source.name, whole.hexdigest(), inputs.hexdigest())


def headers_digest(directory: Path) -> str:
    """SHA-256 over names (relative to `directory`) and bytes of every file below it, in hexadecimal."""
    digest = hashlib.sha256()
    for name, path in sorted((path.relative_to(directory).as_posix(), path) for path in directory.rglob("*") if path.is_file()):
        _update(digest, name.encode())
        _update(digest, path.read_bytes())
    return digest.hexdigest()


def _update(digest: Any, part: bytes) -> None:
    """Each part with its length, so that no two lists of parts read the same."""
    digest.update(b"%d:" % len(part))
    digest.update(part)


def compile_source(source: Source, program_name: str, toolchain: Toolchain | None = None) -> Cubin:
    """Compile one translation unit.

    program_name is the path under which error messages, and tools that read line information, know the text; it need not exist.
    toolchain: what `find_toolchain()` gives, where the caller has it already.
    Raises CompileError: the first error with the line it stands in, NVRTC's whole output in `log`; or the wheel that is missing.
    """
    toolchain = toolchain or find_toolchain()
    options = compile_options(source.arch)
    include_options = tuple(f"-I{directory}" for directory in (render.include_dir(), *toolchain.include_dirs))
    start = time.perf_counter()
    result = nvrtc_compile(source.text, program_name, options + include_options)
    seconds = time.perf_counter() - start
    if result.image is None:
        raise CompileError(_describe_failure(source, program_name, result.log, toolchain), log=result.log)
    registers, spill_bytes, static_smem_bytes = parse_resources(result.log, source.entry)
    return Cubin(
        image=result.image,
        registers=registers,
        spill_bytes=spill_bytes,
        static_smem_bytes=static_smem_bytes,
        compile_seconds=seconds,
        options=options,
        nvrtc_version=toolchain.nvrtc_version,
        cutlass_version=toolchain.cutlass_version,
        log=result.log,
    )


def announce(name: str, seconds: float, path: Path | None) -> None:
    """Say on the logger "cutlass_fa" that a cell was compiled, where it took longer than SLOW_COMPILE_S; at level DEBUG otherwise."""
    level = logging.WARNING if seconds > SLOW_COMPILE_S else logging.DEBUG
    where = f"cached in {path}" if path is not None else "kept in memory only"
    _logger.log(level, "cutlass_fa: compiled %s in %.1f s, %s", name, seconds, where)


def parse_resources(log: str, entry: str) -> tuple[int, int, int]:
    """(registers, spill bytes, static shared memory bytes) out of the output of `ptxas -v`.

    Registers and shared memory are those of the entry kernel; spills are added up over the unit, since a function that was not inlined
    spills on the entry's behalf. What the log does not state is UNKNOWN.
    """
    block = re.search(rf"Compiling entry function '{re.escape(entry)}'.*?\n(.*?Used (\d+) registers[^\n]*)", log, re.DOTALL)
    spills = re.findall(r"(\d+) bytes spill stores, (\d+) bytes spill loads", log)
    if block is None or not spills:
        return UNKNOWN, UNKNOWN, UNKNOWN
    used = block[1].splitlines()[-1]
    smem = re.search(r"(\d+) bytes smem", used)
    return int(block[2]), sum(int(stores) + int(loads) for stores, loads in spills), int(smem[1]) if smem else 0


# `file(12): error: message`, `catastrophic error`, `error #20014-D`; and ptxas, whose line numbers are those of PTX nobody sees.
_FRONT_END_ERROR = re.compile(r"^(?P<file>.+?)\((?P<line>\d+)\): (?:\w+ )?error(?: #[\w-]+)?: (?P<message>.*)$", re.MULTILINE)
_PTXAS_ERROR = re.compile(r"^\s*(?P<message>(?:ptxas|nvvm|nvlink|libnvvm)\b.*\b(?:error|fatal)\b\s*:.*)$", re.MULTILINE)
_NVRTC_ERROR = re.compile(r"^(?P<message>.*\berror\b.*)$", re.MULTILINE)


def _describe_failure(source: Source, program_name: str, log: str, toolchain: Toolchain) -> str:
    """The first error, the line it stands in, and how many more there are."""
    head = f"NVRTC {toolchain.nvrtc_version} refused {source.name} (CUTLASS {toolchain.cutlass_version})"
    errors = list(_FRONT_END_ERROR.finditer(log))
    if errors:
        first = errors[0]
        text = _line_of(source, program_name, first["file"], int(first["line"]))
        message = f"{head}\n{first['file']}:{first['line']}: {first['message']}"
        message += f"\n    {first['line']} | {text}" if text is not None else ""
    else:
        errors = list(_PTXAS_ERROR.finditer(log)) or list(_NVRTC_ERROR.finditer(log))
        message = f"{head}\n{errors[0]['message'] if errors else log or 'it gave no reason'}"
    return message + f"\n({max(len(errors) - 1, 0)} more; the compiler's whole output is in this exception's `log`)"


def _line_of(source: Source, program_name: str, file: str, line: int) -> str | None:
    """Line `line` (from 1) of the translation unit or of a header; None where it cannot be had."""
    try:
        text = source.text if file == program_name else Path(file).read_text(encoding="utf-8", errors="replace")
        return text.splitlines()[line - 1].rstrip()
    except (OSError, IndexError):
        return None
