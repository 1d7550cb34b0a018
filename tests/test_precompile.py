"""precompile: worker processes, what they report, and what happens when they end early."""

from __future__ import annotations

import json
import time
from pathlib import Path

import pytest

from cutlass_fa import kernels
from cutlass_fa.errors import InvalidArgument, UnknownKey
from cutlass_fa.precompile import PrecompileResult, precompile
from cutlass_fa.requests import Fa3FwdRequest
from cutlass_fa.settings import no_compile
from tests.needs import needs_nvrtc

pytestmark = pytest.mark.usefixtures("own_cache")

CAUSAL_128 = "fa3_fwd_sm90a_bf16_hdim128_causal"
FULL_64 = "fa3_fwd_sm90a_bf16_hdim64"
FULL_80 = "fa3_fwd_sm90a_bf16_hdim80"


@needs_nvrtc
@pytest.mark.compile
def test_keys_names_and_requests_are_compiled_once(own_cache: Path) -> None:
    request = Fa3FwdRequest(batch=1, seqlen_q=5, seqlen_k=7, num_heads_q=4, num_heads_kv=4, head_dim=56)
    (first,) = precompile([FULL_64, request, request.dispatch_key()])
    assert (first.key, first.state, first.ok) == (FULL_64, "compiled", True) and first.seconds > 0
    assert first.path is not None and Path(first.path).parent == own_cache
    (second,) = precompile([FULL_64])
    assert second.state == "disk" and second.path == first.path
    assert not kernels.is_loaded(request.dispatch_key()), "the work is the workers'"


def test_precompile_obeys_no_compile() -> None:
    with no_compile():
        (result,) = precompile([FULL_64])
    assert result.state == "failed" and result.error is not None and "compiling is switched off" in result.error


@needs_nvrtc
@pytest.mark.compile
def test_precompile_says_where_nothing_can_be_stored(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "file").write_text("in the way")
    monkeypatch.setenv("CUTLASS_FA_CACHE_DIR", str(tmp_path / "file" / "cache"))
    (result,) = precompile([FULL_64], jobs=3)
    assert result.state == "failed" and "cannot be written" in str(result.error) and len(result.warnings) == 1


def test_precompile_arguments() -> None:
    with pytest.raises(UnknownKey):
        precompile([FULL_64, "nonsense"])
    with pytest.raises(InvalidArgument, match="jobs=0"):
        precompile([FULL_64], jobs=0)
    assert list(precompile([])) == []


def test_a_worker_that_dies_costs_its_cell(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("cutlass_fa.precompile._WORKER_PROGRAM", "import os, sys; sys.stdin.readline(); os._exit(3)")
    results = sorted(precompile([FULL_64, FULL_80], jobs=1), key=lambda result: result.key)
    assert [result.key for result in results] == [FULL_64, FULL_80]
    assert [result.error for result in results] == ["the compiling process ended (exit status 3)"] * 2


def test_closing_the_results_stops_the_workers(monkeypatch: pytest.MonkeyPatch) -> None:
    answer = json.dumps({"key": FULL_64, "seconds": 0.0, "state": "disk", "error": None, "path": "", "warnings": []})
    program = f"import sys, time; sys.stdin.readline(); print({answer!r}, flush=True); sys.stdin.readline(); time.sleep(60)"
    monkeypatch.setattr("cutlass_fa.precompile._WORKER_PROGRAM", program)
    start = time.perf_counter()
    results = precompile([FULL_64, FULL_80, CAUSAL_128], jobs=1)
    assert isinstance(next(results), PrecompileResult)
    results.close()  # type: ignore[attr-defined]
    assert time.perf_counter() - start < 20
