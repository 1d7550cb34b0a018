"""The summary of executor against GPU, through pytest itself and with its processes apart."""

from __future__ import annotations

import importlib.util
import json
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
INNER = """
import pytest
from tests.agreement import Agreement

@pytest.mark.parametrize("number", [1, 2, 3])
def test_cell(number, record_property):
    Agreement(f"cell{number}", number * 1e-3, number * 1e-6, 1e-2, 1e-4).record(record_property)
    assert number != 2
"""


@pytest.mark.parametrize("workers", [0, 2])
def test_summary_and_file_hold_every_cell(tmp_path: Path, workers: int) -> None:
    """Of tests that fail, too: a difference that is too large is the one to see."""
    if workers and importlib.util.find_spec("xdist") is None:
        pytest.skip("pytest-xdist is not installed")
    inner, out = tmp_path / "test_inner.py", tmp_path / "agreement.json"
    inner.write_text(INNER)
    options = ["-q", "-p", "no:cacheprovider", "-p", "tests.conftest", "--rootdir", str(tmp_path), "--agreement", str(out)]
    command = [sys.executable, "-m", "pytest", str(inner), *options, *(["-n", str(workers)] if workers else [])]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert "1 failed, 2 passed" in done.stdout, done.stdout + done.stderr
    assert "cell2: out 2.00e-03 (allowed 1.00e-02), lse 2.00e-06 (allowed 1.00e-04)" in done.stdout
    assert "3 cells, largest: out 3.00e-03, lse 3.00e-06" in done.stdout
    assert [each["key"] for each in json.loads(out.read_text())] == ["cell1", "cell2", "cell3"]
