"""Shared by all tests: GPU tests are skipped, with the reason, where no kernel can be launched; how far executor and GPU are apart is
summed up in the end."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from cutlass_fa import kernels
from cutlass_fa.device import gpu_problem
from tests import agreement


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--agreement", metavar="FILE", help="where to write, as JSON, how far the CPU executor and the GPU are apart")


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter) -> None:
    reports = (report for outcome in ("passed", "failed") for report in terminalreporter.stats.get(outcome, ()))
    found = agreement.collect(reports)
    if not found:
        return
    terminalreporter.section("CPU executor beside the GPU, largest differences")
    for line in agreement.lines(found):
        terminalreporter.line(line)
    path = terminalreporter.config.getoption("--agreement")
    if path:
        agreement.write(Path(path), found)


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    if not any(item.get_closest_marker("gpu") for item in items):
        return
    problem = gpu_problem()
    if problem is None:
        return
    for item in items:
        if item.get_closest_marker("gpu"):
            item.add_marker(pytest.mark.skip(reason=f"needs a GPU: {problem}"))


@pytest.fixture(scope="session", autouse=True)
def _no_inherited_settings() -> None:
    """Tests start from this package's defaults, except for a cache directory that the caller chose."""
    os.environ.pop("CUTLASS_FA_NO_COMPILE", None)


@pytest.fixture
def own_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty cache of kernels, on disk and in memory."""
    monkeypatch.setenv("CUTLASS_FA_CACHE_DIR", str(tmp_path / "cache"))
    monkeypatch.delenv("CUTLASS_FA_PACK_DIRS", raising=False)
    kernels.forget()
    return tmp_path / "cache"
