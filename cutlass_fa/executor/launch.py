"""One launch on the CPU: global buffers between guard pages, a program in a process of its own, its report."""

from __future__ import annotations

import re
import shutil
import subprocess
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from .build import Program
from .faults import ExecutorError, ExecutorFault

# The request file of executor/runtime/main.cpp.
_MAGIC = 0x3154534552414643
_REQUEST = np.dtype(
    [("magic", "u8"), ("seed", "u8")]
    + [(n, "u4") for n in ("grid", "threads", "shared_bytes", "time_limit_s", "num_buffers", "num_arguments")],
    align=True,
)
_BUFFER = np.dtype([("address", "u8"), ("bytes", "u8"), ("file_offset", "u8"), ("writable", "u4"), ("reserved", "u4"), ("name", "S32")])
_ARGUMENT = np.dtype([("bytes", "u8"), ("file_offset", "u8")])

_FAULT_STATUS, _CRASH_STATUS = 70, 71
_PAGE = 65536
_FIRST_ADDRESS = 1 << 45  # far from where programs and their libraries lie
_ALIGNMENT = 16
DEFAULT_TIME_LIMIT_S = 60


@dataclass
class Buffer:
    """Bytes of global memory, at an address known before the launch. `data` (uint8) is replaced by the result where writable."""

    name: str
    data: np.ndarray
    writable: bool
    address: int = 0


class GlobalMemory:
    """Hands out addresses: each buffer ends (to within 15 bytes) where an inaccessible page begins, and begins after one."""

    def __init__(self) -> None:
        self.buffers: list[Buffer] = []
        self._next = _FIRST_ADDRESS

    def add(self, name: str, data: np.ndarray, *, writable: bool = False) -> Buffer:
        """A copy of `data`'s bytes (it must be contiguous) as a buffer."""
        raw = np.frombuffer(np.ascontiguousarray(data).tobytes(), np.uint8).copy()
        pages = -(-raw.size // _PAGE)
        begin = self._next + _PAGE
        buffer = Buffer(name, raw, writable, begin + (pages * _PAGE - raw.size) // _ALIGNMENT * _ALIGNMENT)
        self._next = begin + (pages + 1) * _PAGE
        self.buffers.append(buffer)
        return buffer


def launch(
    program: Program,
    grid: int,
    arguments: Sequence[bytes],
    memory: GlobalMemory,
    *,
    seed: int,
    time_limit_s: int = DEFAULT_TIME_LIMIT_S,
) -> None:
    """Run `grid` CTAs of a kernel. arguments: the bytes of each, in the kernel's order. Buffers of `memory` are updated in place.

    seed: draws the schedule and when asynchronous work lands; equal seeds give equal runs.
    Raises ExecutorFault with the report, ExecutorError when the runtime refuses the request.
    """
    with tempfile.TemporaryDirectory(prefix="cutlass-fa-run-", dir=_fast_directory()) as scratch:
        request, result = Path(scratch) / "request", Path(scratch) / "result"
        request.write_bytes(_pack(program, grid, arguments, memory, seed, time_limit_s))
        command = [str(program.path), str(request), str(result)]
        try:
            done = subprocess.run(command, capture_output=True, text=True, errors="replace", timeout=time_limit_s + 30)
        except subprocess.TimeoutExpired as error:
            raise ExecutorFault("timeout", f"{program.source.name} with seed {seed} did not end in {time_limit_s + 30} s") from error
        if done.returncode != 0:
            _raise(program, seed, done.returncode, done.stderr)
        _unpack(result.read_bytes(), memory)


def _fast_directory() -> str | None:
    return "/dev/shm" if Path("/dev/shm").is_dir() else None


def _pack(program: Program, grid: int, arguments: Sequence[bytes], memory: GlobalMemory, seed: int, time_limit_s: int) -> bytes:
    source = program.source
    header = np.zeros(1, _REQUEST)
    header[0] = (_MAGIC, seed, grid, source.threads, source.smem_bytes, time_limit_s, len(memory.buffers), len(arguments))
    buffers, packed = np.zeros(len(memory.buffers), _BUFFER), np.zeros(len(arguments), _ARGUMENT)
    offset = header.nbytes + buffers.nbytes + packed.nbytes
    blobs: list[bytes] = []
    for row, buffer in zip(buffers, memory.buffers, strict=True):
        row["address"], row["bytes"], row["file_offset"] = buffer.address, buffer.data.size, offset
        row["writable"], row["name"] = buffer.writable, buffer.name.encode()
        blobs.append(buffer.data.tobytes())
        offset += len(blobs[-1])
    for row, argument in zip(packed, arguments, strict=True):
        row["bytes"], row["file_offset"] = len(argument), offset
        blobs.append(argument)
        offset += len(argument)
    return b"".join([header.tobytes(), buffers.tobytes(), packed.tobytes(), *blobs])


def _unpack(result: bytes, memory: GlobalMemory) -> None:
    offset = 0
    for buffer in memory.buffers:
        if buffer.writable:
            buffer.data = np.frombuffer(result, np.uint8, buffer.data.size, offset).copy()
            offset += buffer.data.size


def _raise(program: Program, seed: int, status: int, stderr: str) -> None:
    report = f"{program.source.name}, seed {seed}: {stderr.strip()}"
    if status not in (_FAULT_STATUS, _CRASH_STATUS) and status > 0:
        raise ExecutorError(report)
    if status < 0:
        raise ExecutorFault("crash", f"{report}\n  the program died of signal {-status}")
    match = re.search(r"pc (0x[0-9a-f]+)", stderr)
    if match is not None:
        report += _line_of(program, match[1])
    raise ExecutorFault("deadlock" if "deadlock:" in stderr else "timeout" if "timeout:" in stderr else "fault", report)


def _line_of(program: Program, address: str) -> str:
    """The source lines of a program counter, innermost call first, where addr2line is at hand."""
    if shutil.which("addr2line") is None:
        return ""
    done = subprocess.run(["addr2line", "-e", str(program.path), "-i", "-s", address], capture_output=True, text=True)
    lines = [line.partition(" ")[0] for line in done.stdout.split("\n") if line and not line.startswith("??")]
    return "\n  at " + ", called from ".join(dict.fromkeys(lines)) if lines else ""
