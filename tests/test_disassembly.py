"""disassembly.py: instruction counts of a cubin."""

from __future__ import annotations

from pathlib import Path

import pytest

from cutlass_fa import disassembly
from cutlass_fa.compile import compile_source
from cutlass_fa.disassembly import find_nvdisasm, instruction_counts, local_memory_instructions, tensor_core_instructions
from cutlass_fa.errors import FlashAttnError
from cutlass_fa.render import Source
from tests.needs import needs_nvdisasm, needs_nvrtc

WGMMA = """\
extern "C" __global__ void kernel(float* out, unsigned long long a, unsigned long long b) {
  float d[4] = {0.0f, 0.0f, 0.0f, 0.0f};
  asm volatile("wgmma.fence.sync.aligned;" ::: "memory");
  #pragma unroll
  for (int step = 0; step < 3; ++step) {
    asm volatile("wgmma.mma_async.sync.aligned.m64n8k16.f32.bf16.bf16 {%0, %1, %2, %3}, %4, %5, 1, 1, 1, 0, 0;"
                 : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3]) : "l"(a + step), "l"(b + step));
  }
  asm volatile("wgmma.commit_group.sync.aligned; wgmma.wait_group.sync.aligned 0;" ::: "memory");
  for (int i = 0; i < 4; ++i) { out[4 * threadIdx.x + i] = d[i]; }
}
"""
# An array that is indexed at run time lives in local memory.
LOCAL = """\
extern "C" __global__ void kernel(float* x, int at) {
  float held[256] = {};
  for (int i = 0; i < at; ++i) { held[(i * at) & 255] += x[i]; }  // no compiler knows the indices: the array must have addresses
  x[0] = held[at & 255];
}
"""


def _image(text: str) -> bytes:
    return compile_source(Source("test_disassembly", "sm_90a", "kernel", text, smem_bytes=0, threads=128), "kernel.cu").image


@needs_nvrtc
@needs_nvdisasm
def test_tensor_core_instructions_are_counted_by_shape() -> None:
    image = _image(WGMMA)
    assert tensor_core_instructions(image) == {"HGMMA.64x8x16.F32.BF16": 3}
    counts = instruction_counts(image)
    assert counts["HGMMA"] == 3 and counts["EXIT"] >= 1 and counts["STG"] >= 1
    assert not any("." in name for name in counts)
    assert local_memory_instructions(image) == 0


@needs_nvrtc
@needs_nvdisasm
def test_local_memory_is_counted() -> None:
    image = _image(LOCAL)
    counts = instruction_counts(image)
    assert local_memory_instructions(image) == counts.get("LDL", 0) + counts.get("STL", 0) > 0
    assert tensor_core_instructions(image) == {}


@needs_nvrtc
@needs_nvdisasm
def test_what_is_no_cubin_is_refused() -> None:
    with pytest.raises(FlashAttnError, match="refused"):
        instruction_counts(b"no cubin at all")


SASS = """\
        .global         kernel
.text.kernel:
        /*0000*/                   LDC R1, c[0x0][0x28] ;
        /*0010*/              @!P0 LDL.64 R2, [R1+0x10] ;
        /*0020*/              @UP1 STL [R1], R9 ;
        /*0030*/                   QGMMA.64x128x32.F32.E4M3.E4M3 R24, gdesc[UR8], R24, !UPT ;
        /*0040*/                   HFMA2.MMA R7, -RZ, RZ, 0, 0 ;
        /*12340*/             @!PT HMMA.16816.F32.BF16 R4, R8, R2, RZ ;
        /*12350*/                  BRA `(.L_x_1);
"""


def test_lines_of_sass_are_understood(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(disassembly, "disassemble", lambda image: SASS)
    image = b"lines of sass"
    assert instruction_counts(image) == {"LDC": 1, "LDL": 1, "STL": 1, "QGMMA": 1, "HFMA2": 1, "HMMA": 1, "BRA": 1}
    assert tensor_core_instructions(image) == {"QGMMA.64x128x32.F32.E4M3.E4M3": 1, "HMMA.16816.F32.BF16": 1}
    assert local_memory_instructions(image) == 2


def test_missing_tool_names_the_wheel(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(disassembly, "package_dirs", lambda package: iter([tmp_path]))
    monkeypatch.setenv("PATH", str(tmp_path))
    with pytest.raises(FlashAttnError, match="nvidia-cuda-nvdisasm"):
        find_nvdisasm()


def test_tool_on_path_is_found(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    tool = tmp_path / "nvdisasm"
    tool.write_text("#!/bin/sh\n")
    tool.chmod(0o755)
    monkeypatch.setattr(disassembly, "package_dirs", lambda package: iter([]))
    monkeypatch.setenv("PATH", str(tmp_path))
    assert find_nvdisasm() == tool
