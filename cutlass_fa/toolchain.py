"""NVIDIA's wheels on this machine: where the headers lie, which versions they are, and NVRTC itself.

The one module that touches CuPy's NVRTC binding, which is semi-private: `cupy_backends.cuda.libs.nvrtc` compiles without a GPU and without
a driver, which CuPy's public compile functions do not. Its first call imports `cupy` (0.15 s), so even NVRTC's version, which a kernel's
identity needs, is asked for only when a kernel is in no memory.
"""

from __future__ import annotations

import importlib.util
import re
import struct
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from .errors import CompileError

# Measured: CUTLASS 4.2.0 compiles with CCCL 3.0 and 3.1 (wheels 13.0 and 13.1), not with 3.2 and 3.3 (wheels 13.2 and 13.3).
_CUTLASS_OF_CCCL_LIMIT = (4, 2)
_CCCL_LIMIT = (3, 2)


@dataclass(frozen=True)
class Toolchain:
    """What a compile uses.

    nvrtc_version: "major.minor" as NVRTC states it, e.g. "13.5".
    cutlass_version: of the CUTLASS headers, e.g. "4.2.0".
    include_dirs: CUTLASS, CCCL and CUDA runtime headers, in search order; this package's own headers are not among them.
    """

    nvrtc_version: str
    cutlass_version: str
    include_dirs: tuple[Path, ...]


@dataclass(frozen=True)
class NvrtcResult:
    """`image` is the cubin, or None where NVRTC refused the program; `log` is its whole output either way."""

    image: bytes | None
    log: str


def find_toolchain() -> Toolchain:
    """Locate NVRTC and the headers that match its major version. Raises CompileError naming the wheel that is missing."""
    major, minor = _nvrtc().getVersion()
    cutlass = _cutlass_include()
    cutlass_version = _cutlass_version(cutlass)
    runtime = _runtime_include(major)
    cccl = _cccl_include(major, cutlass_version)
    # CUTLASS includes <cccl/cuda/std/...> under CUDA 13, so the directory above that very cccl/ must come before any other that has one.
    # Not under CUDA 12, where it holds the runtime headers of CUDA 13.
    above_cccl = [cccl.parent] if major != 12 else []
    include_dirs = dict.fromkeys([cutlass, *above_cccl, cccl, runtime])
    return Toolchain(f"{major}.{minor}", ".".join(map(str, cutlass_version)), tuple(include_dirs))


def compile_options(arch: str) -> tuple[str, ...]:
    """NVRTC's options for a target such as "sm_90a", without include paths: the part that belongs to a kernel's identity.

    -default-device because CUTLASS has unannotated functions; -v makes ptxas state registers and spills in the log.
    """
    return ("-std=c++17", "-default-device", f"-arch={arch}", "--ptxas-options=-v")


def nvrtc_compile(text: str, program_name: str, options: tuple[str, ...]) -> NvrtcResult:
    """Run NVRTC on one translation unit; needs no GPU and no driver. Releases the GIL while it compiles.

    Raises CompileError where NVRTC cannot be loaded or hands back something that is no whole cubin.
    """
    nvrtc = _nvrtc()
    program = nvrtc.createProgram(text, program_name, [], [])
    try:
        try:
            nvrtc.compileProgram(program, list(options))
        except nvrtc.NVRTCError:
            return NvrtcResult(None, _log(nvrtc, program))
        return NvrtcResult(whole_cubin(nvrtc.getCUBIN(program)), _log(nvrtc, program))
    finally:
        nvrtc.destroyProgram(program)


def whole_cubin(image: bytes) -> bytes:
    """`image` with its last byte, where the binding dropped it; raises CompileError on anything shorter or no ELF at all.

    CuPy 14.2's getCUBIN takes the image for a C string and cuts the last byte, a zero. The driver still loads such a cubin; nvdisasm and
    cuobjdump refuse it. Where the file must end follows from the ELF header: at the end of the program headers or of the section headers,
    whichever lies last.
    """
    if image[:4] != b"\x7fELF" or len(image) < 64:
        raise CompileError(f"NVRTC returned {len(image)} bytes that are no cubin")
    program_offset, section_offset = struct.unpack_from("<QQ", image, 0x20)
    program_size, program_count, section_size, section_count = struct.unpack_from("<HHHH", image, 0x36)
    end = max(program_offset + program_size * program_count, section_offset + section_size * section_count)
    if len(image) == end - 1:
        return image + b"\0"
    if len(image) < end:
        raise CompileError(f"NVRTC returned a cubin of {len(image)} bytes whose headers reach to byte {end}")
    return image


def package_dirs(package: str) -> Iterator[Path]:
    """Every directory that holds a part of `package`, without importing it, in the order of sys.path.

    One package of NVIDIA's may be spread over several directories of sys.path. find_spec alone sees them all only while no wheel among
    them ships an __init__.py, and CUDA 12's do.
    """
    spec = importlib.util.find_spec(package)
    located = [] if spec is None else list(spec.submodule_search_locations or ())
    candidates = [Path(entry or ".") / package for entry in sys.path] + [Path(entry) for entry in located]
    for directory in dict.fromkeys(candidates):
        if directory.is_dir():
            yield directory


def _nvrtc() -> Any:
    """CuPy's NVRTC binding, proved to find its library. Raises CompileError."""
    try:
        from cupy_backends.cuda.libs import nvrtc

        nvrtc.getVersion()
    except ImportError as error:
        raise _missing("CuPy", "cupy-cuda13x", "cupy-cuda12x", str(error)) from error
    except (OSError, RuntimeError) as error:
        raise _missing("the NVRTC library", "nvidia-cuda-nvrtc", "nvidia-cuda-nvrtc-cu12", str(error)) from error
    return nvrtc


def _log(nvrtc: Any, program: int) -> str:
    return str(nvrtc.getProgramLog(program)).rstrip("\0 \n")


def _cutlass_include() -> Path:
    for directory in package_dirs("cutlass_library"):
        include = directory / "source" / "include"
        if (include / "cutlass" / "version.h").is_file():
            return include
    raise _missing("the CUTLASS headers", "nvidia-cutlass", "nvidia-cutlass", "no cutlass_library/source/include on sys.path")


def _runtime_include(cuda_major: int) -> Path:
    part = "cuda_runtime/include" if cuda_major == 12 else f"cu{cuda_major}/include"
    for directory in package_dirs("nvidia"):
        if (directory / part / "cuda_runtime.h").is_file():
            return directory / part
    found = f"NVRTC is of CUDA {cuda_major}, and no nvidia/{part}/cuda_runtime.h is on sys.path"
    raise _missing("the CUDA runtime headers", "nvidia-cuda-runtime", "nvidia-cuda-runtime-cu12", found)


def _cccl_include(cuda_major: int, cutlass_version: tuple[int, int, int]) -> Path:
    """The first CCCL that this CUTLASS compiles with; another wheel's newer one may lie on sys.path as well."""
    parts = ["cuda_cccl/include", "cu13/include/cccl"] if cuda_major == 12 else [f"cu{cuda_major}/include/cccl"]
    too_new = []
    for part in parts:
        for directory in package_dirs("nvidia"):
            header = directory / part / "cuda" / "std" / "__cccl" / "version.h"
            if not header.is_file():
                continue
            number = _macro(header, "CCCL_VERSION")
            version = (number // 1_000_000, number // 1000 % 1000)
            if cutlass_version[:2] > _CUTLASS_OF_CCCL_LIMIT or version < _CCCL_LIMIT:
                return directory / part
            too_new.append(f"{version[0]}.{version[1]} in {directory / part}")
    found = "no nvidia/" + " or nvidia/".join(parts) + " on sys.path"
    if too_new:
        cutlass = ".".join(map(str, cutlass_version))
        found = f"CUTLASS {cutlass} needs CCCL older than {_CCCL_LIMIT[0]}.{_CCCL_LIMIT[1]}, found {', '.join(too_new)}"
    raise _missing("usable CCCL headers", "nvidia-cuda-cccl>=13.0,<13.2", "nvidia-cuda-cccl-cu12", found)


def _cutlass_version(include: Path) -> tuple[int, int, int]:
    header = include / "cutlass" / "version.h"
    major, minor, patch = (_macro(header, f"CUTLASS_{part}") for part in ("MAJOR", "MINOR", "PATCH"))
    return major, minor, patch


def _macro(header: Path, name: str) -> int:
    match = re.search(rf"^#\s*define\s+{name}\s+(\d+)", header.read_text(encoding="utf-8", errors="replace"), re.MULTILINE)
    if match is None:
        raise CompileError(f"{header} does not define {name}")
    return int(match[1])


def _missing(what: str, wheel_cuda13: str, wheel_cuda12: str, found: str) -> CompileError:
    wheel = wheel_cuda13 if wheel_cuda13 == wheel_cuda12 else f"{wheel_cuda13} (CUDA 12: {wheel_cuda12})"
    return CompileError(
        f"{what} cannot be used: {found}. It comes with the wheel {wheel}: pip install 'cutlass-fa[cuda13]' (CUDA 12: 'cutlass-fa[cuda12]')"
    )
