"""tools/startup.py, tools/profile_kernel.py and tools/floors.py without a GPU."""

from __future__ import annotations

import json
import os
import sys
from dataclasses import replace
from pathlib import Path
from unittest.mock import MagicMock

import pytest

import cutlass_fa
from cutlass_fa.arch.sm90 import FA3_FWD_FP8_TILES, FA3_FWD_TILES
from cutlass_fa.cell import Cell
from cutlass_fa.dispatch import DispatchKey
from tests.needs import needs_nvrtc
from tools import floors, profile_kernel, startup, sweep_tiles
from tools.bench_points import Point
from tools.bench_report import Row, Run, append_run
from tools.floors import Ceilings, floor_of
from tools.profile_kernel import Profile, ProfilerError, parse_metric_names, parse_raw_csv, wanted_metrics
from tools.startup import PACKAGE, START_TO_RESULT, WHOLE_PROCESS, FirstCall

# ---- startup -------------------------------------------------------------------------------------------------------------------------

MARKS = [
    ("interpreter", 10.1),
    ("import cupy", 10.4),
    ("import cutlass_fa", 10.5),
    ("CUDA context", 11.0),
    ("inputs", 11.25),
    ("first call", 11.5),
    ("second call", 11.75),
]


def test_steps_are_differences_and_the_package_s_share_is_its_import_and_call() -> None:
    seconds = startup.steps(10.0, MARKS, 12.0)
    assert list(seconds)[:2] == ["interpreter", "import cupy"]
    assert seconds["CUDA context"] == pytest.approx(0.5)
    assert seconds[START_TO_RESULT] == pytest.approx(1.5), "the second call and the process's end come after the result"
    assert seconds[PACKAGE] == pytest.approx(0.1 + 0.25), "neither CuPy's import nor the context"
    assert seconds[WHOLE_PROCESS] == pytest.approx(2.0)


@pytest.mark.parametrize("library", startup.LIBRARIES)
def test_the_measured_program_marks_every_step(library: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    """Run here, with stand-ins for the libraries and the call."""
    calls = []
    nothing = MagicMock()
    monkeypatch.setitem(sys.modules, "cupy", MagicMock(asarray=lambda values: values))
    monkeypatch.setitem(sys.modules, "torch", nothing)
    monkeypatch.setattr(cutlass_fa, "flash_attn_func", lambda q, k, v, causal: calls.append((q.shape, causal)))
    monkeypatch.setattr(sys, "argv", ["-c", library])
    exec(startup.FIRST_CALL_PROGRAM, {})
    marks = json.loads(capsys.readouterr().out)
    expected = [step for step, _ in MARKS]
    assert [step for step, _ in marks] == expected[:1] + ["import torch"] * (library == "torch") + expected[1:]
    shape = (1, 1024, 16, 128) if library == "cupy" else nothing.randn().shape
    assert calls == [(shape, True)] * 2
    assert startup.steps(marks[0][1], marks, marks[-1][1])[PACKAGE] >= 0


def test_first_call_table_sets_libraries_side_by_side() -> None:
    cupy = startup.steps(10.0, MARKS, 12.0)
    torch = {"interpreter": 0.1, "import torch": 3.0, **{step: 2 * value for step, value in cupy.items() if step != "interpreter"}}
    lines = startup.first_call_table([FirstCall("cupy", "warm", 5, cupy), FirstCall("torch", "cold", 5, torch)])
    assert lines[0] == ["seconds", "cupy warm", "torch cold"]
    assert lines[2] == ["import torch", "-", "3.000"]
    assert [line[0] for line in lines[1:4]] == ["interpreter", "import torch", "import cupy"]
    assert lines[-2][1:] == ["OVER", "OVER"], "1.5 s of 1.0 with a warm cache, 3.0 of 2.5 with a cold one"
    assert lines[-1][1:] == ["OVER", "-"], "0.35 s of 0.2"
    assert len({len(line) for line in lines}) == 1


def test_medians_are_each_step_s_own() -> None:
    samples = [{"a": 3.0, "b": 1.0}, {"a": 1.0, "b": 2.0}, {"a": 2.0, "b": 9.0}]
    assert startup.medians(samples) == {"a": 2.0, "b": 2.0}


def test_own_settings_hold_inside_and_are_undone(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("CUTLASS_FA_CACHE_DIR", "/before")
    monkeypatch.delenv("CUTLASS_FA_PACK_DIRS", raising=False)
    with startup.own_settings(tmp_path):
        seen = startup.run_python("import os; print(os.environ['CUTLASS_FA_CACHE_DIR'])").strip()
    assert seen == str(tmp_path)
    assert os.environ["CUTLASS_FA_CACHE_DIR"] == "/before" and "CUTLASS_FA_PACK_DIRS" not in os.environ


def test_a_measured_process_that_fails_is_an_error() -> None:
    with pytest.raises(RuntimeError, match=r"status 1:\n(.|\n)*ZeroDivisionError"):
        startup.run_python("1 / 0")


def test_import_is_measured_without_numpy_too() -> None:
    times = startup.measure_import(3)
    assert 0 < times.after_numpy < times.with_numpy < 60


@needs_nvrtc
@pytest.mark.compile
def test_cells_are_compiled_and_not_found_in_a_cache() -> None:
    key = DispatchKey("fa3", "fwd", "sm_90a", "bf16", 64)
    (time,) = startup.measure_cells([key])
    assert time.cell == str(key) and time.cubin_bytes > 10000
    assert 0.05 < time.nvrtc < time.total
    assert startup.cell_table([time])[-1][:2] == ["slowest", f"{time.nvrtc:.2f}"]


def test_results_are_appended(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setattr(startup, "launch_problem", lambda: "there is none")
    path = tmp_path / "new" / "startup.json"
    for commit in ("a", "b"):
        assert startup.main(["--import-runs", "0", "--cells", "--output", str(path), "--commit", commit]) == 0
    assert "No first call: there is none." in capsys.readouterr().out
    entries = json.loads(path.read_text())
    assert [entry["commit"] for entry in entries] == ["a", "b"]
    assert set(entries[0]) == {"commit", "device", "driver", "versions", "date", "startup"}
    assert entries[0]["device"] == "no GPU" and entries[0]["startup"]["processors"] >= 1
    assert [each.name for each in path.parent.iterdir()] == ["startup.json"]


@pytest.mark.gpu
def test_first_calls_of_a_gpu() -> None:
    cold, warm = startup.measure_first_calls("cupy", 1)
    assert (cold.cache, warm.cache) == ("cold", "warm")
    assert cold.seconds["first call"] > warm.seconds["first call"], "a compile"
    for call in (cold, warm):
        assert call.seconds["second call"] < call.seconds["first call"] < call.seconds[START_TO_RESULT] < call.seconds[WHOLE_PROCESS]


# ---- profile_kernel ------------------------------------------------------------------------------------------------------------------

HEAD = '"ID","Process ID","Process Name","Host Name","Kernel Name","Context","Stream","Block Size","Grid Size","Device","CC"'
STALLED = "smsp__average_warps_issue_stalled"
METRICS = {  # name: (unit, value)
    "gpu__time_duration.sum": ("usecond", "1,600.00"),
    "sm__cycles_elapsed.avg.per_second": ("cycle/nsecond", "1.50"),
    "sm__pipe_tensor_op_hmma_cycles_active.avg.pct_of_peak_sustained_active": ("%", "78.25"),
    "sm__inst_executed_pipe_xu.avg.pct_of_peak_sustained_active": ("%", "n/a"),
    "dram__bytes_read.sum": ("Gbyte", "0.2"),
    "launch__registers_per_thread": ("register/thread", "168"),
    f"{STALLED}_gmma_per_issue_active.ratio": ("inst", "6.00"),
    f"{STALLED}_selected_per_issue_active.ratio": ("inst", "1.00"),
    f"{STALLED}_long_scoreboard_per_issue_active.ratio": ("inst", "3.00"),
    f"{STALLED}_tex_throttle_per_issue_active.ratio": ("inst", "0.00"),
}
FIXED = '"0","42","python3","host","flash_fwd","1","7","(384, 1, 1)","(132, 1, 1)","0","9.0"'
RAW_CSV = "\n".join(
    [
        "==PROF== Connected to process 42 (/usr/bin/python3)",
        '==PROF== Profiling "flash_fwd" - 0: 0%....50%....100% - 9 passes',
        "==PROF== Disconnected from process 42",
        ",".join([HEAD, *(f'"{name}"' for name in METRICS)]),
        ",".join([*['""'] * 11, *(f'"{unit}"' for unit, _ in METRICS.values())]),
        ",".join([FIXED, *(f'"{value}"' for _, value in METRICS.values())]),
        "",
    ]
)


def test_raw_page_is_read_in_base_units() -> None:
    found = parse_raw_csv(RAW_CSV)
    assert (found.kernel, found.grid, found.block) == ("flash_fwd", "(132, 1, 1)", "(384, 1, 1)")
    assert found.metrics["gpu__time_duration.sum"] == pytest.approx(1.6e-3)
    assert found.metrics["sm__cycles_elapsed.avg.per_second"] == pytest.approx(1.5e9)
    assert found.metrics["dram__bytes_read.sum"] == pytest.approx(2e8)
    assert "sm__inst_executed_pipe_xu.avg.pct_of_peak_sustained_active" not in found.metrics, "n/a is no number"
    assert "CC" not in found.metrics


@pytest.mark.parametrize("text", ["", "==WARNING== No kernels were profiled.\n", "\n".join(RAW_CSV.splitlines()[:5])])
def test_no_profiled_launch_is_an_error(text: str) -> None:
    with pytest.raises(ProfilerError, match="no launch"):
        parse_raw_csv(text)


def test_tables_of_a_profile() -> None:
    found = parse_raw_csv(RAW_CSV)
    lines = profile_kernel.figure_table(found, flops=1.2e12)
    assert lines[1:4] == [["duration", "1,600.0", "us"], ["rate", "750.0", "TFLOP/s"], ["SM clock", "1,500.0", "MHz"]]
    assert ["tensor pipe, cycles busy", "78.2", "%"] in lines and ["DRAM bytes read", "200.0", "MB"] in lines
    assert not any(line[0].startswith("XU") for line in lines), "what was not measured is left out"
    assert profile_kernel.stall_table(found)[1:] == [
        ["gmma", "6.00", "60%"],
        ["long_scoreboard", "3.00", "30%"],
        ["selected", "1.00", "10%"],
    ]
    assert profile_kernel.stall_table(Profile("k", "", "", {})) == [["warps wait for", "per issue", "share"]]


LISTING = f"""\
Device NVIDIA H100 80GB HBM3 (GH100)
---------------------------------- --------- ---------------
Metric Name                        Type      Description
---------------------------------- --------- ---------------
dram__throughput                   Throughput
gpu__time_duration                 Counter   total duration in nanoseconds
sm__pipe_tensor_cycles_active      Counter   # of cycles where tensor pipe was active
{STALLED}_gmma_per_issue_active    Ratio     average # of warps
{STALLED}_gmma_not_issued_per_issue_active  Ratio  average # of warps
"""


def test_only_metrics_that_the_gpu_has_are_asked_for() -> None:
    assert wanted_metrics(parse_metric_names(LISTING)) == [
        "gpu__time_duration.sum",
        "sm__pipe_tensor_cycles_active.avg.pct_of_peak_sustained_active",
        "dram__throughput.avg.pct_of_peak_sustained_elapsed",
        "launch__registers_per_thread",
        f"{STALLED}_gmma_per_issue_active.ratio",
    ]
    everything = wanted_metrics([])
    assert len(everything) == len(set(everything)) > 40
    without_stalls = wanted_metrics(["gpu__time_duration"])
    assert f"{STALLED}_wait_per_issue_active.ratio" in without_stalls, "a list without any is not trusted on them"


FAKE_NCU = """\
#!{python}
import sys
from pathlib import Path
arguments = sys.argv[1:]
with open({log!r}, "a") as log:
    print(arguments, file=log)
if arguments == ["--query-metrics"]:
    sys.exit("no permission")
metrics = arguments[arguments.index("--metrics") + 1].split(",")
assert arguments[arguments.index("--clock-control") + 1] == "none"
assert arguments[arguments.index("--kernel-name") + 1] == "flash_fwd" and "--launch" in arguments
if "sm__pipe_xu_cycles_active.avg.pct_of_peak_sustained_active" in metrics:
    print("==ERROR== Failed to find metric sm__pipe_xu_cycles_active")
    sys.exit(1)
print(Path({csv!r}).read_text())
"""


def fake_ncu(directory: Path) -> Path:
    """An ncu that lists no metrics, refuses one by name, and prints RAW_CSV when it is left out."""
    (directory / "raw.csv").write_text(RAW_CSV)
    path = directory / "ncu"
    path.write_text(FAKE_NCU.format(python=sys.executable, log=str(directory / "log"), csv=str(directory / "raw.csv")))
    path.chmod(0o755)
    return path


def test_a_refused_metric_is_left_out(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setattr(profile_kernel, "launch_problem", lambda: None)
    kept = tmp_path / "kept.csv"
    command = ["fa3_fwd_sm90a_bf16_hdim128_causal", "--ncu", str(fake_ncu(tmp_path)), "--csv", str(kept)]
    assert profile_kernel.main(command) == 0
    printed = capsys.readouterr()
    assert "does not know sm__pipe_xu_cycles_active" in printed.err
    # Causal, 16k tokens: 1.0995e12 operations in 1.6 ms.
    assert "687.2" in printed.out and "gmma" in printed.out
    assert parse_raw_csv(kept.read_text()) == parse_raw_csv(RAW_CSV)
    assert len((tmp_path / "log").read_text().splitlines()) == 3


def test_without_ncu_or_gpu_the_status_is_1(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    monkeypatch.setattr(profile_kernel, "NCU_PLACES", (str(tmp_path / "ncu"), str(tmp_path)))
    assert profile_kernel.main([]) == 1
    assert "ncu (Nsight Compute) is not installed" in capsys.readouterr().err
    monkeypatch.setattr(profile_kernel, "launch_problem", lambda: "there is none")
    assert profile_kernel.main(["--ncu", "ncu"]) == 1
    assert "nothing to profile: there is none" in capsys.readouterr().err
    monkeypatch.setattr(profile_kernel, "launch_problem", lambda: None)
    assert profile_kernel.main(["--ncu", str(tmp_path / "absent")]) == 1
    assert "cannot be run" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("command", "reason"),
    [
        ("nonsense", "not a key's name"),
        ("fa3_bwd_sm90a_bf16_hdim128", "is served by fa3_fwd_sm90a_bf16_hdim128"),
        ("fa3_fwd_sm90a_bf16_hdim128_alibi", "is served by fa3_fwd_sm90a_bf16_hdim128"),
        ("fa3_fwd_sm90a_bf16_hdim128_causal_gqa4", "is served by fa3_fwd_sm90a_bf16_hdim128_causal,"),
        ("fa3_fwd_sm90a_bf16_hdim120", "is served by fa3_fwd_sm90a_bf16_hdim128"),
    ],
)
def test_a_key_that_the_shape_does_not_use_is_refused(command: str, reason: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        profile_kernel.main([command])
    assert reason in capsys.readouterr().err


def test_a_packed_cell_is_profiled_on_short_queries() -> None:
    parser = profile_kernel.argument_parser()
    name = "fa3_fwd_sm90a_bf16_hdim128_causal_gqa4"
    point = profile_kernel.point_of(parser, parser.parse_args([name, "--seqlen", "16"]))
    assert point == Point("bf16", 128, 16, True, gqa_ratio=4) and str(profile_kernel.key_of(point)) == name


def test_a_key_and_its_shape_mean_the_same_point() -> None:
    parser = profile_kernel.argument_parser()
    by_key = profile_kernel.point_of(parser, parser.parse_args(["fa3_fwd_sm90a_f16_hdim64_causal", "--seqlen", "4096", "--gqa", "4"]))
    by_shape = profile_kernel.point_of(
        parser, parser.parse_args(["--dtype", "f16", "--head-dim", "64", "--causal", "--seqlen", "4096", "--gqa", "4"])
    )
    assert by_key == by_shape == Point("f16", 64, 4096, True, gqa_ratio=4)
    assert str(profile_kernel.key_of(replace(by_key, head_dim=72))) == "fa3_fwd_sm90a_f16_hdim80_causal"


# ---- floors --------------------------------------------------------------------------------------------------------------------------

CEILINGS = Ceilings(flops=738e12, bytes=3.02e12, exponentials=16 * 132 * 1.755e9)


def test_floors_of_known_shapes() -> None:
    full = floor_of(Point("bf16", 128, 16384, False).row("cutlass_fa", 3.1), CEILINGS)
    assert full.matmul_ms == pytest.approx(2.980, abs=1e-3), "2.199e12 operations"
    assert full.exp_ms == pytest.approx(1.159, abs=1e-3), "4.295e9 exponentials"
    assert full.copy_ms == pytest.approx(0.0889, abs=1e-4), "four arrays of 64 MiB"
    assert full.bound_by == "matmul" and full.ms == full.matmul_ms and full.achieved == pytest.approx(3.1 / 2.980, abs=1e-3)
    causal = floor_of(Point("bf16", 128, 16384, True).row("cutlass_fa", 1.6), CEILINGS)
    assert (causal.matmul_ms, causal.exp_ms, causal.copy_ms) == (full.matmul_ms / 2, full.exp_ms / 2, full.copy_ms)


def test_what_binds() -> None:
    point = Point("bf16", 32, 16384, False)
    assert floor_of(point.row("cutlass_fa", 9.0), CEILINGS).bound_by == "exp"
    assert floor_of(replace(point, head_dim=128, seqlen=128).row("cutlass_fa", 9.0), CEILINGS).bound_by == "copy"
    grouped = replace(point, head_dim=128, gqa_ratio=16)
    assert floor_of(grouped.row("cutlass_fa", 9.0), CEILINGS).copy_ms == pytest.approx(0.0889 * 34 / 64, abs=1e-4)


def made_up_run(*rows: Row, device: str = "NVIDIA H100 80GB HBM3", date: str = "2026-01-02") -> Run:
    return Run("0123abcd" * 5, device, "580.1", {"NVRTC": "13.0"}, date + "T03:04:05+00:00", "python tools/bench.py", rows)


COPY = Row("ceiling", "copy", "bf16", 0, 0, 0, 0, 0, 0, "2GiB d2d", 1.42, None, 3020.0)
MATMUL = Row("ceiling", "matmul", "bf16", 0, 0, 0, 0, 8192, 0, "", 1.49, 738.0)


def test_newest_forwards_meet_the_newest_ceilings_of_their_gpu(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = tmp_path / "h100.json"
    forwards = [Point("bf16", 128, 16384, causal).row(peer, 3.1) for causal in (True, False) for peer in ("cutlass_fa", "fa3")]
    append_run(path, made_up_run(COPY, MATMUL, *forwards[:2], date="2026-01-01"))
    append_run(path, made_up_run(COPY, replace(MATMUL, tflops=900.0), device="NVIDIA H200"))
    append_run(path, made_up_run(*forwards, date="2026-01-03"))
    append_run(path, made_up_run(Row("cutlass_fa", "host", "bf16", 128, 1, 16, 16, 64, 0, "cupy", 0.01)))
    assert floors.main([str(path)]) == 0
    caption, _, *lines = capsys.readouterr().out.splitlines()
    assert "2026-01-03" in caption and "738 TFLOP/s (measured 2026-01-01)" in caption and "1755 MHz" in caption
    assert len(lines) == 2 + 2, "one line for each of this library's rows"
    assert lines[2] == "| bf16 | 128 | 16 | full | 16384 | 2.980 | 0.089 | 1.159 | 2.980 | 3.100 | 1.04 | matmul |"
    assert floors.main([str(path), "--run", "0", "--sm-clock-mhz", "500"]) == 0
    assert capsys.readouterr().out.splitlines()[-1].endswith("| exp |")


def test_missing_rows_are_said(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = tmp_path / "h100.json"
    assert floors.main([str(path)]) == 1
    append_run(path, made_up_run(Point("bf16", 128, 16384, False).row("cutlass_fa", 3.1), COPY))
    assert floors.main([str(path)]) == 1
    assert "no run on NVIDIA H100 80GB HBM3 has a ceiling row 'matmul'" in capsys.readouterr().err


# ---- sweep ---------------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("head_dim", "causal"), list(FA3_FWD_FP8_TILES))
def test_sweep_tries_the_fp8_table(head_dim: int, causal: bool) -> None:
    tried = sweep_tiles.fp8_candidates(head_dim, causal, None, ["static", "dynamic"])
    assert FA3_FWD_FP8_TILES[head_dim, causal] in [cell.tile for cell in tried] and all(not cell.misfits() for cell in tried)


@pytest.mark.parametrize(("head_dim", "causal"), list(FA3_FWD_TILES))
def test_the_sweep_tries_the_tables_own_tiles(head_dim: int, causal: bool) -> None:
    tried = sweep_tiles.candidates(head_dim, causal, None, ["static", "dynamic"])
    assert FA3_FWD_TILES[head_dim, causal] in [cell.tile for cell in tried]
    assert len({sweep_tiles.label(cell) for cell in tried}) == len(tried)


@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize("arch", ["sm_80", "sm_86", "sm_90a"])
@pytest.mark.parametrize("head_dim", [64, 80, 96, 128])
def test_sweep_of_fa2_tries_the_tables_tile(head_dim: int, arch: str, causal: bool) -> None:
    tried = sweep_tiles.fa2_candidates(arch, head_dim, causal, None)
    labels = [sweep_tiles.label(cell) for cell in tried]
    key = DispatchKey("fa2", "fwd", arch, "bf16", head_dim, causal=causal)
    assert len(set(labels)) == len(labels) and sweep_tiles.label(Cell.of(key)) in labels
    assert all(needed < available for needed, available in map(sweep_tiles.registers, tried))


def test_useful_share() -> None:
    (cell,) = [c for c in sweep_tiles.candidates(128, True, [(128, 128)], ["static"]) if c.q_stages == 1 and not c.has_own_overlap]
    assert sweep_tiles.useful_share(cell, 128) == pytest.approx(129 / 256)  # the lower triangle of one block, diagonal included
    (cell,) = [c for c in sweep_tiles.candidates(128, False, [(128, 128)], ["static"]) if c.q_stages == 1 and not c.has_own_overlap]
    assert sweep_tiles.useful_share(cell, 256) == 1.0 and sweep_tiles.useful_share(cell, 192) == pytest.approx(192**2 / 256**2)
