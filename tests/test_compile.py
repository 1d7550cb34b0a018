"""compile.py and toolchain.py: resources of a cubin, what an error shows, the content key, and where headers are found."""

from __future__ import annotations

import shutil
import struct
import subprocess
import sys
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path

import pytest

from cutlass_fa import render, toolchain
from cutlass_fa.compile import UNKNOWN, compile_source, content_key, parse_resources
from cutlass_fa.errors import CompileError
from cutlass_fa.render import Source
from cutlass_fa.toolchain import Toolchain, find_toolchain, whole_cubin
from tests.needs import needs_nvrtc

TOOLS = Toolchain("13.5", "4.2.0", ())

REVERSE = """\
#include <cutlass/cutlass.h>
#include <cutlass_fa/base.cuh>
extern "C" __global__ void reverse(float* x) {
  __shared__ float staged[32];
  staged[threadIdx.x] = x[threadIdx.x];
  __syncthreads();
  x[threadIdx.x] = staged[31 - threadIdx.x];
}
"""
# 64 live values for the 32 registers that 2 CTAs of 1024 threads leave each thread.
SPILLING = """\
extern "C" __global__ void __launch_bounds__(1024, 2) spilling(float* x) {
  float held[64];
  #pragma unroll
  for (int i = 0; i < 64; ++i) { held[i] = x[i * 1024 + threadIdx.x]; }
  __syncthreads();
  #pragma unroll
  for (int i = 0; i < 64; ++i) { x[i * 1024 + threadIdx.x] = held[63 - i] * held[i]; }
}
"""


def make_source(text: str, entry: str = "reverse") -> Source:
    return Source(name=f"test_{entry}", arch="sm_90a", entry=entry, text=text, smem_bytes=0, threads=32)


# ---- a compile ---------------------------------------------------------------------------------------------------------------------------


@needs_nvrtc
def test_cubin_states_its_resources() -> None:
    cubin = compile_source(make_source(REVERSE), "kernel.cu")
    assert 4 < cubin.registers <= 32
    assert cubin.spill_bytes == 0
    assert cubin.static_smem_bytes == 32 * 4
    assert cubin.compile_seconds > 0
    assert "-arch=sm_90a" in cubin.options
    tools = find_toolchain()
    assert (cubin.nvrtc_version, cubin.cutlass_version) == (tools.nvrtc_version, tools.cutlass_version)


@needs_nvrtc
def test_cubin_is_a_whole_elf_file() -> None:
    image = compile_source(make_source(REVERSE), "kernel.cu").image
    assert image[:4] == b"\x7fELF"
    assert whole_cubin(image) == image
    assert whole_cubin(image[:-1]) == image


@needs_nvrtc
def test_spills_are_counted() -> None:
    cubin = compile_source(make_source(SPILLING, "spilling"), "kernel.cu")
    assert cubin.registers == 32
    assert cubin.spill_bytes > 0


@needs_nvrtc
def test_program_name_is_not_in_the_cubin() -> None:
    source = make_source(REVERSE)
    assert compile_source(source, "/one/kernel.cu").image == compile_source(source, "/another place/kernel.cu").image


@needs_nvrtc
def test_warnings_are_kept() -> None:
    text = 'extern "C" __global__ void reverse(float* x) { int forgotten; *x = 0.0f; }\n'
    warnings = compile_source(make_source(text), "kernel.cu").warnings
    assert len(warnings) == 1 and '"forgotten"' in warnings[0]


PTXAS_LOG = """\
kernel.cu(2): warning #177-D: variable "unused" was declared but never referenced
ptxas info    : 16 bytes gmem
ptxas info    : Compiling entry function 'other' for 'sm_90a'
ptxas info    : Function properties for other
ptxas         .     0 bytes stack frame, 0 bytes spill stores, 0 bytes spill loads
ptxas info    : Used 10 registers, used 1 barriers, 64 bytes smem
ptxas info    : Compiling entry function 'flash_fwd' for 'sm_90a'
ptxas info    : Function properties for flash_fwd
ptxas         .     8264 bytes stack frame, 44776 bytes spill stores, 246272 bytes spill loads
ptxas info    : Used 168 registers, used 16 barriers, 8264 bytes cumulative stack size, 1024 bytes smem
ptxas info    : Function properties for _Z6helperi
ptxas         .     8 bytes stack frame, 4 bytes spill stores, 8 bytes spill loads
"""


@pytest.mark.parametrize(
    ("entry", "expected"),
    [("flash_fwd", (168, 44776 + 246272 + 12, 1024)), ("other", (10, 44776 + 246272 + 12, 64)), ("absent", (UNKNOWN, UNKNOWN, UNKNOWN))],
)
def test_parse_resources(entry: str, expected: tuple[int, int, int]) -> None:
    assert parse_resources(PTXAS_LOG, entry) == expected


def test_parse_resources_without_shared_memory() -> None:
    log = PTXAS_LOG.replace(", 1024 bytes smem", "")
    assert parse_resources(log, "flash_fwd") == (168, 291060, 0)


def test_whole_cubin_refuses_what_is_none() -> None:
    header = b"\x7fELF" + bytes(60)
    short = bytearray(header)
    struct.pack_into("<Q", short, 0x28, 4096)
    struct.pack_into("<HH", short, 0x3A, 64, 10)
    for image in (b"", b"not a cubin" * 20, bytes(short)):
        with pytest.raises(CompileError):
            whole_cubin(image)


# ---- what an error shows -----------------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Failure:
    """A text NVRTC refuses, and what the message must say."""

    name: str
    text: str
    shown: tuple[str, ...]


KERNEL_HEAD = 'extern "C" __global__ void reverse(float* x) {\n'
FAILURES = (
    Failure(
        "in the unit",
        KERNEL_HEAD + "  int unused;\n  x[0] = no_such_name;\n  x[1] = nor_this;\n}\n",
        ("unit.cu:3: ", 'identifier "no_such_name" is undefined', "3 |   x[0] = no_such_name;", "(1 more"),
    ),
    Failure(
        "in a header", '#include "broken.cuh"\n' + KERNEL_HEAD + "}\n", ("broken.cuh:2: ", "2 | static_assert(sizeof(int) == 3, ", "is 3")
    ),
    Failure(
        "no such header",
        "\n#include <no/such.cuh>\n",
        ("unit.cu:2: ", 'cannot open source file "no/such.cuh"', "2 | #include <no/such.cuh>"),
    ),
    Failure("ptxas", KERNEL_HEAD + '  asm volatile("wgmma.nonsense;");\n}\n', ("ptxas", "error", ".nonsense")),
    Failure(
        "too much shared memory",
        KERNEL_HEAD + "__shared__ float s[99999]; s[threadIdx.x] = *x; __syncthreads(); *x = s[3]; }\n",
        ("too much shared",),
    ),
)


@needs_nvrtc
@pytest.mark.parametrize("failure", FAILURES, ids=lambda failure: failure.name)
def test_error_quotes_the_line(failure: Failure, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    headers = tmp_path / "a path with spaces"
    headers.mkdir()
    (headers / "broken.cuh").write_text('// A header.\nstatic_assert(sizeof(int) == 3, "an int is 3 bytes");\n')
    monkeypatch.setattr(render, "include_dir", lambda: headers)
    with pytest.raises(CompileError) as caught:
        compile_source(make_source(failure.text), "unit.cu")
    message = str(caught.value)
    assert "test_reverse" in message
    for part in failure.shown:
        assert part in message
    assert "warning" not in message  # the whole output has them, the message only the error
    assert caught.value.log and len(message.splitlines()) <= 4


# ---- what is said on stderr --------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("configuration", "seconds", "said"),
    [
        ("", 2.5, True),
        ("", 0.2, False),
        ("logging.basicConfig(level=logging.ERROR)", 2.5, False),
        ("logging.getLogger('cutlass_fa').setLevel(logging.ERROR)", 2.5, False),
    ],
)
def test_slow_compile_is_said(configuration: str, seconds: float, said: bool) -> None:
    code = f"import logging; from pathlib import Path; from cutlass_fa.compile import announce; {configuration}\n"
    code += f"announce('fa3_cell', {seconds}, Path('/cache/entry'))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, cwd=render.PACKAGE_DIR.parent)
    assert ("fa3_cell" in done.stderr and f"{seconds} s" in done.stderr and "/cache/entry" in done.stderr) == said
    assert bool(done.stderr) == said and not done.stdout


# ---- the content key ---------------------------------------------------------------------------------------------------------------------


@pytest.fixture
def headers(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A copy of this package's headers, used in place of them."""
    copied = tmp_path / "copied include"
    shutil.copytree(render.include_dir(), copied)
    monkeypatch.setattr(render, "include_dir", lambda: copied)
    return copied


def test_key_does_not_depend_on_paths(headers: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    source = make_source(REVERSE)
    copied = content_key(source, TOOLS)
    monkeypatch.undo()
    assert content_key(source, TOOLS) == copied
    assert content_key(source, replace(TOOLS, include_dirs=(tmp_path,))) == copied


def _edit(headers: Path) -> None:
    header = next(headers.rglob("*.cuh"))
    header.write_bytes(header.read_bytes() + b"\n")


def _rename(headers: Path) -> None:
    header = next(headers.rglob("*.cuh"))
    header.rename(header.with_suffix(".h"))


def _add(headers: Path) -> None:
    (headers / "deeper").mkdir()
    (headers / "deeper" / "new.cuh").write_bytes(b"")


@pytest.mark.parametrize("change", [_edit, _rename, _add])
def test_key_follows_own_headers(change: Callable[[Path], None], headers: Path) -> None:
    source = make_source(REVERSE)
    before = content_key(source, TOOLS)
    change(headers)
    after = content_key(source, TOOLS)
    assert after.digest != before.digest and after.inputs != before.inputs


def test_key_follows_text_target_and_tools() -> None:
    source = make_source(REVERSE)
    keys = [
        content_key(source, TOOLS),
        content_key(replace(source, text=REVERSE + "\n"), TOOLS),
        content_key(replace(source, arch="sm_90"), TOOLS),
        content_key(source, replace(TOOLS, nvrtc_version="13.0")),
        content_key(source, replace(TOOLS, cutlass_version="4.3.0")),
    ]
    assert len({key.digest for key in keys}) == len(keys)
    assert [key.inputs == keys[0].inputs for key in keys] == [True, False, False, True, True]
    assert content_key(source, None).inputs == keys[0].inputs


# ---- where headers are found -------------------------------------------------------------------------------------------------------------


class _FakeNvrtc:
    def __init__(self, major: int, minor: int) -> None:
        self.version = (major, minor)

    def getVersion(self) -> tuple[int, int]:
        return self.version


@dataclass(frozen=True)
class Site:
    """Directories on sys.path that hold nothing but what `install` puts there."""

    root: Path

    def install(self, directory: str, *files: str) -> None:
        contents = {CUTLASS: "#define CUTLASS_MAJOR 4\n#define CUTLASS_MINOR 2\n#define CUTLASS_PATCH 0\n"}
        for file in files:
            name, _, cccl_version = file.partition("=")
            path = self.root / directory / name
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text(f"#define CCCL_VERSION {cccl_version}\n" if cccl_version else contents.get(name, ""))


CUTLASS = "cutlass_library/source/include/cutlass/version.h"
RUNTIME_13 = "nvidia/cu13/include/cuda_runtime.h"
CCCL_13 = "nvidia/cu13/include/cccl/cuda/std/__cccl/version.h"


@pytest.fixture
def site(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Site:
    monkeypatch.setattr(sys, "path", [str(tmp_path / "a"), str(tmp_path / "b")])
    monkeypatch.setattr(toolchain.importlib.util, "find_spec", lambda name: None)
    monkeypatch.setattr(toolchain, "_nvrtc", lambda: _FakeNvrtc(13, 5))
    return Site(tmp_path)


def test_wheels_may_be_spread_over_directories(site: Site, tmp_path: Path) -> None:
    site.install("a", CUTLASS, f"{CCCL_13}=3001004")
    site.install("b", "nvidia/__init__.py", RUNTIME_13)
    assert find_toolchain() == Toolchain(
        "13.5",
        "4.2.0",
        (
            tmp_path / "a/cutlass_library/source/include",
            tmp_path / "a/nvidia/cu13/include",
            tmp_path / "a/nvidia/cu13/include/cccl",
            tmp_path / "b/nvidia/cu13/include",
        ),
    )


def test_a_cccl_too_new_for_cutlass_is_passed_over(site: Site, tmp_path: Path) -> None:
    site.install("a", CUTLASS, RUNTIME_13, f"{CCCL_13}=3002000")
    with pytest.raises(CompileError, match=r"nvidia-cuda-cccl>=13.0,<13.2") as caught:
        find_toolchain()
    assert "found 3.2 in" in str(caught.value)
    site.install("b", f"{CCCL_13}=3000085")
    directories = find_toolchain().include_dirs
    assert directories.index(tmp_path / "b/nvidia/cu13/include/cccl") < directories.index(tmp_path / "a/nvidia/cu13/include")


def test_headers_follow_nvrtc_major_version(site: Site, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(toolchain, "_nvrtc", lambda: _FakeNvrtc(12, 9))
    site.install("a", CUTLASS, RUNTIME_13, f"{CCCL_13}=3000085")
    with pytest.raises(CompileError, match="nvidia-cuda-runtime-cu12"):
        find_toolchain()
    site.install("b", "nvidia/cuda_runtime/include/cuda_runtime.h")
    # A CCCL wheel of CUDA 13 will do, but not the directory above it, where that CUDA's runtime headers are.
    assert find_toolchain().include_dirs[1:] == (tmp_path / "a/nvidia/cu13/include/cccl", tmp_path / "b/nvidia/cuda_runtime/include")
    site.install("a", "nvidia/cuda_runtime/include/cuda_runtime.h", "nvidia/cuda_cccl/include/cuda/std/__cccl/version.h=2008002")
    found = find_toolchain()
    assert found.nvrtc_version == "12.9"
    assert found.include_dirs[1:] == (tmp_path / "a/nvidia/cuda_cccl/include", tmp_path / "a/nvidia/cuda_runtime/include")


@pytest.mark.parametrize(
    ("missing", "wheel"), [(CUTLASS, "nvidia-cutlass"), (RUNTIME_13, "nvidia-cuda-runtime"), (CCCL_13, "nvidia-cuda-cccl")]
)
def test_missing_headers_name_the_wheel(missing: str, wheel: str, site: Site) -> None:
    present = {CUTLASS: CUTLASS, RUNTIME_13: RUNTIME_13, CCCL_13: f"{CCCL_13}=3001004"}
    site.install("a", *(file for name, file in present.items() if name != missing))
    with pytest.raises(CompileError, match=rf"wheel {wheel}.*pip install 'cutlass-fa\[cuda13\]'"):
        find_toolchain()


def test_missing_cupy_names_the_wheel(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("cupy_backends", "cupy_backends.cuda", "cupy_backends.cuda.libs"):
        monkeypatch.setitem(sys.modules, name, None)
    with pytest.raises(CompileError, match="cupy-cuda13x"):
        find_toolchain()
