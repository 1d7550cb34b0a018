"""The demo, with and without a GPU, and the check it holds its results to."""

from __future__ import annotations

import io
from pathlib import Path

import ml_dtypes
import numpy as np
import pytest

from cutlass_fa import cli, demo, device, kernels
from cutlass_fa.cell import Cell
from cutlass_fa.errors import CompileError
from cutlass_fa.reference import attention_forward
from tests.needs import needs_nvrtc


@pytest.fixture(autouse=True)
def own_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """An empty cache, on disk and in memory, for each test."""
    monkeypatch.setenv("CUTLASS_FA_CACHE_DIR", str(tmp_path / "cache"))
    monkeypatch.delenv("CUTLASS_FA_PACK_DIRS", raising=False)
    kernels.forget()


@pytest.fixture
def no_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(device, "gpu_problem", lambda: "there is no GPU here")


@needs_nvrtc
@pytest.mark.compile
def test_demo_without_a_gpu(no_gpu: None, capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["demo"]) == 0
    told = capsys.readouterr().out
    assert "No kernel can be launched here: there is no GPU here." in told and "NumPy reference" in told
    assert f"generated  {demo.SHOWN_KEY}: {Cell.of(demo.SHOWN_KEY).summary}" in told
    assert "tensor core instructions: " in told and "0 bytes spilled" in told
    assert "ok" in told and "WRONG" not in told


def test_demo_without_a_compiler(no_gpu: None, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    def missing(*arguments: object) -> None:
        raise CompileError("the NVRTC library cannot be used: it comes with the wheel nvidia-cuda-nvrtc")

    monkeypatch.setattr("cutlass_fa.kernels.find_toolchain", missing)
    assert cli.main(["demo"]) == 0
    told = capsys.readouterr().out
    assert "not compiled: the NVRTC library cannot be used" in told and "lines of CUDA C++" in told and "NumPy reference" in told


def test_demo_fails_where_the_compiler_refuses_the_kernel(no_gpu: None, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*arguments: object) -> None:
        raise CompileError("NVRTC refused it", log="error: no")

    monkeypatch.setattr("cutlass_fa.demo.explain", refuse)
    assert demo.demo(io.StringIO()) is False


def test_demo_names_a_gpu_that_has_no_kernels(monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("cupy")
    monkeypatch.setattr(device, "gpu_problem", lambda: None)
    monkeypatch.setattr("cupy.cuda.runtime.getDevice", lambda: 0)
    monkeypatch.setattr(device, "device_info", lambda index: device.DeviceInfo("sm_75", 40, 4 << 20, "NVIDIA T4"))
    problem = demo.launch_problem()
    assert problem is not None and "NVIDIA T4" in problem and "older than sm_80" in problem
    for arch, name in (("sm_80", "NVIDIA A100"), ("sm_90a", "NVIDIA H100"), ("sm_121", "NVIDIA GB10")):
        monkeypatch.setattr(device, "device_info", lambda index, arch=arch, name=name: device.DeviceInfo(arch, 108, 40 << 20, name))
        assert demo.launch_problem() is None


@pytest.mark.parametrize("causal", [False, True])
def test_demo_s_check_passes_rounding_and_catches_a_wrong_element(causal: bool) -> None:
    rng = np.random.default_rng(1)
    q, k, v = (rng.standard_normal((2, 96, heads, 64), dtype=np.float32).astype(ml_dtypes.bfloat16) for heads in (4, 2, 2))
    out = attention_forward(q, k, v, causal=causal)[0].astype(q.dtype)
    error, allowed = demo.check_heads(out, q, k, v, causal=causal)
    assert 0 < error <= allowed < 0.1
    for wrong in (out[1, 95, 3, 7] + 0.25, np.nan):
        broken = out.copy()
        broken[1, 95, 3, 7] = wrong
        error, allowed = demo.check_heads(broken, q, k, v, causal=causal)
        assert not error <= allowed


def test_forward_flops() -> None:
    assert demo.forward_flops(1, 16, 16384, 16384, 128, causal=False) == 4 * 16 * 16384**2 * 128
    assert demo.forward_flops(2, 16, 100, 200, 64, causal=True) == 2 * 2 * 16 * 100 * 200 * 64


@pytest.mark.gpu
def test_demo_on_the_gpu(capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["demo"]) == 0
    told = capsys.readouterr().out
    assert told.count(" ok\n") == len(demo.SHAPES) and "TFLOP/s" in told
