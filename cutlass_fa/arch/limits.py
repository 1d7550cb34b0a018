"""What each architecture allows a kernel, and which architectures there are.

The tables name the architectures that kernels were tuned or sized for. Any later one runs kernels of sm_80's instructions compiled for
it, with the table of the nearest older architecture (`table_arch`).
"""

from __future__ import annotations

import re
from dataclasses import dataclass

OLDEST_ARCH = 80


@dataclass(frozen=True)
class ArchLimits:
    """smem_bytes: dynamic shared memory one CTA may ask for. sm_smem_bytes: of a multiprocessor, 1 KiB of it taken by each CTA.
    num_sms: multiprocessors of the largest product, for plans made without a GPU."""

    smem_bytes: int
    sm_smem_bytes: int
    num_sms: int


REGISTERS_PER_SM = 65536  # of 32 bits; all architectures alike
MAX_REGISTERS_PER_THREAD = 255

# CUDA C++ Programming Guide, "Compute Capabilities": shared memory.
ARCH_LIMITS: dict[str, ArchLimits] = {
    "sm_80": ArchLimits(163 << 10, 164 << 10, 108),
    "sm_86": ArchLimits(99 << 10, 100 << 10, 84),
    "sm_89": ArchLimits(99 << 10, 100 << 10, 142),
    "sm_90a": ArchLimits(227 << 10, 228 << 10, 132),
    "sm_100": ArchLimits(227 << 10, 228 << 10, 148),
    "sm_120": ArchLimits(99 << 10, 100 << 10, 188),
}


def arch_problem(arch: str) -> str | None:
    """Why no kernel can be made for `arch` (NVRTC's name, e.g. "sm_90a"), or None."""
    match = re.fullmatch(r"sm_([1-9]\d{1,2})a?", arch)
    if match is None:
        return f"arch {arch!r} is not a GPU's name as NVRTC has it: sm_ and two or three digits, such as sm_80 or sm_90a"
    if int(match[1]) < OLDEST_ARCH:
        return f"arch {arch!r} is older than sm_{OLDEST_ARCH}, the first with the asynchronous copies and bf16 products that kernels use"
    return None


def table_arch(arch: str) -> str:
    """The architecture whose limits and tiles `arch` uses: itself, or else the nearest older one of the tables."""
    if arch in ARCH_LIMITS:
        return arch
    return max((known for known in ARCH_LIMITS if arch_number(known) <= arch_number(arch)), key=arch_number)


def limits_of(arch: str) -> ArchLimits:
    return ARCH_LIMITS[table_arch(arch)]


def arch_number(arch: str) -> int:
    """80 of "sm_80", 90 of "sm_90a"."""
    return int(arch.removeprefix("sm_").removesuffix("a"))
