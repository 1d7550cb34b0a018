"""tools/bench.py without a GPU: the grid and its rows, the order of measuring, the file of runs, tables and plots."""

from __future__ import annotations

import csv
import io
import json
import math
import shlex
from dataclasses import replace
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

from tools import bench, bench_report
from tools.bench import interleaved_medians
from tools.bench_device import ArrayDevice, Call, Prepare
from tools.bench_inputs import Inputs
from tools.bench_points import Point
from tools.bench_report import COLUMNS, Row, Run, aligned, append_run, load_runs, markdown, other_rows, results_name, table


def made_up_run(**changes: Any) -> Run:
    """Two masks, two lengths, two peers, with host and ceiling rows."""
    rows = [
        Point("bf16", 128, seqlen, causal).row(peer, milliseconds * seqlen / 4096)
        for seqlen in (4096, 16384)
        for causal in (False, True)
        for peer, milliseconds in (("fa3", 0.8), ("cutlass_fa", 0.75), ("cudnn", 0.7))
    ]
    rows.append(Point("bf16", 128, 4096, True, gqa_ratio=4).row("cutlass_fa", 0.5))
    rows.append(Row("cutlass_fa", "host", "bf16", 128, 1, 16, 16, 64, 0, "cupy out=", 0.0123))
    rows.append(Row("ceiling", "copy", "bf16", 0, 0, 0, 0, 0, 0, "2GiB d2d", 1.423, None, 3018.2))
    rows.append(Row("ceiling", "matmul", "bf16", 0, 0, 0, 0, 8192, 0, "", 1.49, 738.0))
    run = Run(
        commit="0123abcd" * 5,
        device="NVIDIA H100 80GB HBM3",
        driver="580.1",
        versions={"cutlass_fa": "0.1.0", "NVRTC": "13.5"},
        date="2026-01-02T03:04:05+00:00",
        command="python tools/bench.py",
        rows=tuple(rows),
    )
    return replace(run, **changes)


def test_default_grid_is_the_design_s() -> None:
    points = list(bench.grid(bench.run_parser().parse_args([])))
    assert len(points) == 3 * 3 * 2
    for point in points:
        assert point.batch * point.seqlen == 16384 and point.num_heads_q * point.head_dim == 2048
        assert point.q_shape == point.kv_shape
    assert {(point.head_dim, point.seqlen, point.causal) for point in points} >= {(64, 1024, False), (256, 16384, True)}


def test_grid_options() -> None:
    options = shlex.split("--head-dims 96 256 --seqlens 32768 --causal causal --gqa 1 4 --dtypes f16")
    points = list(bench.grid(bench.run_parser().parse_args(options)))
    assert [(p.head_dim, p.gqa_ratio) for p in points] == [(96, 1), (256, 1), (256, 4)], "4 does not divide 21 heads"
    assert all(p.causal and p.dtype == "f16" and p.batch == 1 for p in points)
    assert points[-1].q_shape == (1, 32768, 8, 256) and points[-1].kv_shape == (1, 32768, 2, 256)


def test_cases_take_the_grid_s_place() -> None:
    arguments = bench.run_arguments(shlex.split("--cases window alibi --dtypes f16 --head-dims 256"))
    found = list(bench.points(arguments))
    assert len(found) == 4 + 2 and all(point.dtype == "f16" and point.head_dim == 256 for point in found)
    assert len(list(bench.points(bench.run_arguments([])))) == 18
    assert list(bench.points(bench.run_arguments(["--cases", "window", "--no-grid"]))) == []


@pytest.mark.parametrize("options", ["--seqlens 1024", "--gqa 4", "--causal full", "--directions bwd"])
def test_cases_refuse_what_shapes_the_grid(options: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        bench.run_arguments(["--cases", "varlen", *shlex.split(options)])
    assert f"--cases names its points itself: leave out {options.split()[0]}" in capsys.readouterr().err


def test_row_formula() -> None:
    """The published figures of FlashAttention-3 at 16k: 3.10326 ms are 708.6 TFLOP/s, causal 1.55365 ms are 707.7."""
    row = Point("bf16", 128, 16384, False).row("fa3", 3.10326)
    assert row.as_dict() == {
        **{"peer": "fa3", "pass": "fwd", "dtype": "bf16", "d": 128, "b": 1, "h": 16, "hk": 16, "s": 16384},
        **{"causal": 0, "extra": "", "ms": 3.10326, "tflops": 708.6, "gbs": None},
    }
    causal = Point("bf16", 128, 16384, True).row("fa3", 1.55365)
    assert causal.tflops == 707.7 and causal.causal == 1
    grouped = Point("bf16", 128, 8192, True, gqa_ratio=4).row("fa3", 1.0, "disagrees")
    assert (grouped.b, grouped.h, grouped.hk, grouped.extra) == (2, 16, 4, "gqa4 disagrees")


def test_columns_make_a_csv() -> None:
    text = io.StringIO()
    writer = csv.DictWriter(text, COLUMNS)
    writer.writeheader()
    writer.writerow(made_up_run().rows[0].as_dict())
    assert text.getvalue().splitlines()[0] == "peer,pass,dtype,d,b,h,hk,s,causal,extra,ms,tflops,gbs"


def test_peers_take_turns() -> None:
    """Every round is a permutation, not always the same; a slow call is warmed up with few calls and a quick one with many."""
    turns: list[tuple[str, int]] = []
    milliseconds = {"a": 1.0, "b": 10.0, "c": 100.0}
    calls: dict[str, Call] = {name: partial(str, name) for name in milliseconds}

    def timings(call: Any, count: int, lead: int) -> list[float]:
        turns.append((call(), lead))
        return [milliseconds[call()] + len(turns)] * count

    medians = interleaved_medians(calls, timings, rounds=8, count=3)
    rounds = ["".join(name for name, _ in turns[3 * i : 3 * i + 3]) for i in range(1, 9)]
    assert all(sorted(order) == ["a", "b", "c"] for order in rounds) and len(set(rounds)) > 1
    assert set(turns[3:]) == {("a", 50), ("b", 8), ("c", 2)}  # 100 ms of 2, 12 and 103 ms, at least two calls
    assert medians["a"] < medians["b"] < medians["c"]


def test_runs_are_appended_and_read_back(tmp_path: Path) -> None:
    path = tmp_path / "new" / "h100.json"
    first, second = made_up_run(), made_up_run(commit="f" * 40 + "-dirty", rows=made_up_run().rows[:2])
    append_run(path, first)
    append_run(path, second)
    assert load_runs(path) == [first, second]
    assert [entry.name for entry in path.parent.iterdir()] == ["h100.json"]
    stored = json.loads(path.read_text())
    assert set(stored[0]) == {"commit", "device", "driver", "versions", "date", "command", "rows"}
    assert all(list(row) == list(COLUMNS) for run in stored for row in run["rows"])
    assert len(path.read_text().splitlines()) < 60, "a row takes one line"
    assert load_runs(tmp_path / "none.json") == []


FEATURE_POINTS = (
    Point("bf16", 128, 16384, True, window=(1023, 0)),
    Point("bf16", 128, 16384, False, window=(255, -1)),
    Point("bf16", 128, 16384, True, window=(1023, 0), sink_tokens=4),
    Point("bf16", 128, 4096, True, alibi=True),
    Point("bf16", 128, 4096, True, learnable_sink=True),
    Point("bf16", 128, 1024, True, window=(1023, 0), sink_tokens=4, seqlen_k=65536),
    Point("bf16", 128, 32512, False, lengths="one_long"),
)


def test_a_file_names_features_only_where_a_row_has_them(tmp_path: Path) -> None:
    path = tmp_path / "h100.json"
    run = made_up_run(rows=(made_up_run().rows[0], *(point.row("cutlass_fa", 0.5) for point in FEATURE_POINTS)))
    append_run(path, run)
    assert load_runs(path) == [run]
    plain, *rows = json.loads(path.read_text())[0]["rows"]
    assert list(plain) == list(COLUMNS)
    assert [list(row)[len(COLUMNS) :] for row in rows] == [
        *(["window"], ["window"], ["window", "sink_tokens"], ["alibi"], ["learnable_sink"]),
        *(["sk", "window", "sink_tokens"], ["lengths"]),
    ]


def test_committed_results_load_and_print() -> None:
    """Runs from before there were features, and runs with them."""
    runs = load_runs(bench.REPOSITORY / "benchmarks" / "h100.json")
    assert runs and all(len(table(run.rows)[0]) <= 26 for run in runs) and len(table(runs[0].rows)) == 19


def test_a_time_that_is_no_number_is_not_stored(tmp_path: Path) -> None:
    row = replace(made_up_run().rows[0], ms=math.nan)
    with pytest.raises(ValueError, match="JSON compliant"):
        append_run(tmp_path / "h100.json", made_up_run(rows=(row,)))
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("device", "name"),
    [
        ("NVIDIA H100 80GB HBM3", "h100.json"),
        ("NVIDIA H200", "h200.json"),
        ("NVIDIA A100-SXM4-80GB", "a100.json"),
        ("NVIDIA GeForce RTX 4090", "nvidia_geforce_rtx_4090.json"),
    ],
)
def test_results_file_is_the_gpu_s(device: str, name: str) -> None:
    assert results_name(device) == name


def test_table_sets_peers_side_by_side() -> None:
    lines = table(made_up_run().rows)
    assert lines[0] == ["dtype", "head_dim", "heads", "mask", "seqlen", "cutlass_fa", "fa3", "cudnn", "of fa3", "of best peer"]
    assert [line[2:5] for line in lines[1:]] == [
        ["16", "full", "4096"],
        ["16", "full", "16384"],
        ["16", "causal", "4096"],
        ["16", "causal", "16384"],
        ["16/4", "causal", "4096"],
    ]
    assert lines[1][5:] == ["733", "687", "785", "1.07", "0.93"]
    assert lines[5][5:] == ["550", "-", "-", "-", "-"], "a peer that was not there leaves a gap"


def lines_by_header(rows: list[Row]) -> list[dict[str, str]]:
    header, *lines = table(rows)
    return [dict(zip(header, line, strict=True)) for line in lines]


def test_table_of_features() -> None:
    lines = lines_by_header([point.row("cutlass_fa", 0.5) for point in FEATURE_POINTS])
    assert list(lines[0]) == [
        *("dtype", "head_dim", "heads", "mask", "window", "sinks", "bias", "learnable sink", "lengths", "seqlen", "seqlen_k"),
        *("cutlass_fa", "cutlass_fa ms"),
    ]
    shown = {tuple(line[name] for name in ("mask", "window", "sinks", "bias", "learnable sink", "lengths", "seqlen_k")) for line in lines}
    assert shown == {
        ("causal", "1024", "-", "-", "-", "-", "16384"),
        ("full", "(255, -1)", "-", "-", "-", "-", "16384"),
        ("causal", "1024", "4", "-", "-", "-", "16384"),
        ("causal", "-", "-", "ALiBi", "-", "-", "4096"),
        ("causal", "-", "-", "-", "yes", "-", "4096"),
        ("causal", "1024", "4", "-", "-", "-", "65536"),
        ("full", "-", "-", "-", "-", "one_long", "32512"),
    }
    assert lines[0]["cutlass_fa ms"] == "0.500"


def test_table_s_ratios_to_baselines() -> None:
    """Without a feature by time, on equal lengths by rate; neither is a peer to be better than."""
    alibi, packed = FEATURE_POINTS[3], FEATURE_POINTS[6]
    rows = [alibi.row("cutlass_fa", 1.04), alibi.row("without", 1.0)]
    rows += [packed.row("cutlass_fa", 4.0), packed.row("equal", 3.6), packed.row("fa3", 5.0)]
    by_lengths = {line["lengths"]: line for line in lines_by_header(rows)}
    without, equal = by_lengths["-"], by_lengths["one_long"]
    assert (without["of without"], without["of equal"], without["of best peer"]) == ("0.96", "-", "-")
    assert (equal["of without"], equal["of equal"], equal["of best peer"], equal["of fa3"]) == ("-", "0.90", "1.25", "1.25")
    assert "of best peer" not in lines_by_header(rows[:2])[0]


def test_table_without_peers_has_no_ratios() -> None:
    assert table([Point("bf16", 64, 1024, True).row("cutlass_fa", 0.2)])[0][-1] == "cutlass_fa"
    assert other_rows([]) == []


def test_host_times_and_ceilings() -> None:
    assert other_rows(made_up_run().rows)[1:] == [
        ["cutlass_fa host cupy out=", "12.3 us"],
        ["ceiling copy 2GiB d2d", "3018 GB/s"],
        ["ceiling matmul", "738 TFLOP/s"],
    ]


def test_text_tables() -> None:
    lines = [["a", "bb"], ["123", "4"]]
    assert aligned(lines) == "  a  bb\n123   4"
    assert markdown(lines) == "| a | bb |\n| ---: | ---: |\n| 123 | 4 |"


def test_table_command_prints_the_newest_run(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = tmp_path / "h100.json"
    append_run(path, made_up_run(device="NVIDIA H100 OLD"))
    append_run(path, made_up_run())
    assert bench.main(["table", str(path)]) == 0
    told = capsys.readouterr().out
    assert "80GB HBM3, driver 580.1; cutlass_fa 0.1.0, NVRTC 13.5; 2026-01-02, commit 0123abcd0123" in told
    assert "| bf16 | 128 | 16 | full | 4096 | 733 | 687 | 785 | 1.07 | 0.93 |" in told and "OLD" not in told
    assert bench.main(["table", str(path), "--run", "0"]) == 0
    assert "OLD" in capsys.readouterr().out
    with pytest.raises(SystemExit):
        bench.main(["table", str(path), "--run", "7"])


def test_plot_command_writes_a_png(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    pytest.importorskip("matplotlib")
    path = tmp_path / "h100.json"
    rows = made_up_run().rows
    append_run(path, made_up_run(rows=(*rows, *(point.row("cutlass_fa", 0.5) for point in FEATURE_POINTS))))
    assert bench.main(["plot", str(path)]) == 0
    assert [Path(line).name for line in capsys.readouterr().out.splitlines()] == ["h100_fwd_bf16.png"]
    assert (tmp_path / "h100_fwd_bf16.png").read_bytes()[:8] == b"\x89PNG\r\n\x1a\n"


def test_command_line_keeps_no_folders() -> None:
    arguments = ["--fa3-library", "/tmp/somewhere/fa3.so", "--seqlens", "1024"]
    assert bench.command_line(arguments) == "python tools/bench.py --fa3-library fa3.so --seqlens 1024"


def test_commit_outside_a_checkout_is_unknown(tmp_path: Path) -> None:
    assert bench.commit_of(tmp_path) == "unknown"


def test_host_time_counts_the_call_alone() -> None:
    calls, waits = [], []
    microseconds = bench.host_microseconds(lambda: calls.append(1), lambda: waits.append(1), batches=3, count=10)
    assert len(calls) == 40 and len(waits) == 4 and 0 < microseconds < 1000


class FakeDevice(ArrayDevice):
    """Arrays that take no memory, and timings made up: what is left is bench.py's own work."""

    library = "fake"
    gpu_name = "NVIDIA H200"

    def __init__(self, difference: float = 0.01) -> None:
        self.difference = difference

    def versions(self) -> dict[str, str]:
        return {"cutlass_fa": "0"}

    def own_call(self, inputs: Inputs) -> Call:
        cost = 0.04 * len(inputs.features)
        return lambda: cost

    def peers(self, fa3_library: Path | None) -> dict[str, Prepare]:
        def refuse(inputs: Inputs) -> Call:
            raise RuntimeError("no such kernel")

        def plain(inputs: Inputs) -> Call:
            inputs.check_features()
            return lambda: 0.25

        return {"cutlass_fa": self.own_call, "fa2": plain, "cudnn": refuse}

    def backward_peers(self, has_fa3: bool) -> dict[str, Prepare]:
        return {"cutlass_fa": lambda inputs: lambda: 1.5, "fa2": lambda inputs: lambda: 4.0}

    def normal(self, shape: tuple[int, ...], dtype: str) -> Any:
        return np.broadcast_to(np.uint8(0), shape)

    def asarray(self, values: np.ndarray) -> Any:
        return values

    def empty_like(self, x: Any) -> Any:
        return x

    def timings(self, call: Call, count: int, lead: int) -> list[float]:
        return [1.0 + call()] * count

    def event(self) -> Any:
        raise AssertionError("its timings are what calls return")

    def elapsed_ms(self, start: Any, stop: Any) -> float:
        raise AssertionError("its timings are what calls return")

    def synchronize(self) -> None:
        pass

    def max_difference(self, a: Any, b: Any) -> float:
        return self.difference

    def copy_call(self) -> tuple[int, Call]:
        return 2 << 30, lambda: 0.0

    def host_calls(self, inputs: Inputs) -> list[tuple[str, str, Call]]:
        return [("cutlass_fa", "fake out=", lambda: None)]


class ClockedDevice(FakeDevice):
    """Events that remember a clock, which calls move on."""

    timings = ArrayDevice.timings
    now = 0.0

    def event(self) -> Any:
        marks: list[float] = []
        return SimpleNamespace(record=lambda: marks.append(self.now), marks=marks)

    def elapsed_ms(self, start: Any, stop: Any) -> float:
        ((begin,), (end,)) = start.marks, stop.marks
        return float(end - begin)


def test_calls_are_timed_one_by_one_after_the_lead() -> None:
    device = ClockedDevice()

    def call() -> None:
        device.now += 100.0 if device.now < 200 else 2.5

    assert device.timings(call, count=3, lead=2) == [2.5] * 3 and device.now == 207.5


@pytest.mark.parametrize(
    ("family", "difference", "status", "extra"),
    [
        ([], 0.01, 0, ""),
        ([], 0.5, 1, "disagrees"),
        ([], math.nan, 1, "disagrees"),
        (["--family", "fa2"], 0.01, 0, "family=fa2"),
        (["--family", "fa2"], 0.5, 1, "family=fa2 disagrees"),
    ],
)
def test_a_run_from_end_to_end(
    family: list[str],
    difference: float,
    status: int,
    extra: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.setattr(bench, "current_devices", lambda: [FakeDevice(difference)])
    monkeypatch.setattr(bench, "WARM_UP_S", 0.0)
    output = tmp_path / "h200.json"
    options = shlex.split("--head-dims 128 --seqlens 1024 4096 --causal full --host --ceilings --commit abc --output")
    assert bench.main([*family, *options, str(output)]) == status
    (run,) = load_runs(output)
    assert (run.commit, run.device) == ("abc", "NVIDIA H200") and "--head-dims 128" in run.command
    assert [row.peer for row in run.rows] == ["cutlass_fa", "cutlass_fa", "ceiling", *["cutlass_fa", "fa2"] * 2]
    assert [row.extra for row in run.rows[3:5]] == [extra, ""]
    told = capsys.readouterr()
    assert "cudnn cannot do Point(dtype='bf16', head_dim=128, seqlen=1024" in told.err and "no such kernel" in told.err
    assert "fa2" in told.out and "ceiling copy 2GiB d2d" in told.out and "appended to" in told.out


def test_a_run_of_cases(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    """Peers where they have the features, the baseline beside this library, and no comparison of a baseline's numbers."""
    monkeypatch.setattr(bench, "current_devices", lambda: [FakeDevice()])
    monkeypatch.setattr(bench, "WARM_UP_S", 0.0)
    output = tmp_path / "x.json"
    options = shlex.split("--cases window varlen alibi sinks learnable_sink seqlen_k --head-dims 128 --commit abc --output")
    assert bench.main([*options, str(output)]) == 0
    (run,) = load_runs(output)
    peers: dict[Any, list[str]] = {}
    for row in run.rows:
        peers.setdefault(row.case, []).append(row.peer)
    assert sorted(peers.values()) == [
        *[["cutlass_fa"]] * 5,  # windows, mix16
        *[["cutlass_fa", "equal"]] * 2,
        ["cutlass_fa", "fa2"],  # grouped heads without a window
        *[["cutlass_fa", "without"]] * 10,
    ]
    told = capsys.readouterr()
    assert "fa2 cannot do Point(dtype='bf16', head_dim=128, seqlen=4096, causal=True, alibi=True): it has no alibi_slopes" in told.err
    assert "of without" in told.out and "of equal" in told.out and "cutlass_fa ms" in told.out
    assert bench.main(["table", str(output)]) == 0
    assert "| bf16 | 128 | 16 | causal | 1024 | 4 | - | - | - | 1024 | 262144 |" in capsys.readouterr().out


def test_backward_rows(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    """Counted as two and a half forwards, and named as the family's that every backward is."""
    monkeypatch.setattr(bench, "current_devices", lambda: [FakeDevice()])
    monkeypatch.setattr(bench, "WARM_UP_S", 0.0)
    options = shlex.split("--directions bwd fwd --head-dims 128 --seqlens 4096 --causal full --commit abc --output")
    assert bench.main([*options, str(tmp_path / "x.json")]) == 0
    (run,) = load_runs(tmp_path / "x.json")
    assert [(row.peer, row.direction, row.extra) for row in run.rows] == [
        ("cutlass_fa", "bwd", "family=fa2"),
        ("fa2", "bwd", ""),
        ("cutlass_fa", "fwd", ""),
        ("fa2", "fwd", ""),
    ]
    assert run.rows[0].tflops is not None and run.rows[2].tflops is not None
    assert run.rows[0].tflops == pytest.approx(run.rows[2].tflops, rel=1e-3), "2.5 times the work in 2.5 times the time"
    header, backward, _ = table(run.rows)
    assert header[0] == "pass" and backward[0] == "bwd" and dict(zip(header, backward, strict=True))["of best peer"] == "2.00"
    assert bench.main(["--deterministic", *options, str(tmp_path / "x.json")]) == 0
    assert [row.extra for row in load_runs(tmp_path / "x.json")[1].rows] == ["family=fa2 deterministic", "", "", ""]
    assert "bwd" in capsys.readouterr().out


def test_a_row_of_a_family_stands_beside_its_peers() -> None:
    point = Point("bf16", 128, 4096, True)
    header, line = bench_report.table([point.row("cutlass_fa", 1.0, "family=fa2"), point.row("fa2", 1.5)])
    assert dict(zip(header, line, strict=True))["of best peer"] == "1.50"


def test_without_a_gpu_it_says_so(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    monkeypatch.setattr("tools.bench_device.launch_problem", lambda: "there is no GPU")
    assert bench.main(["--output", str(tmp_path / "x.json")]) == 1
    assert "nothing to measure: there is no GPU" in capsys.readouterr().err and list(tmp_path.iterdir()) == []


@pytest.mark.gpu
def test_measure_a_point_on_the_gpu(tmp_path: Path) -> None:
    output = tmp_path / "results.json"
    options = shlex.split("--head-dims 128 --seqlens 1024 --rounds 2 --calls 3 --host --ceilings --commit test --output")
    assert bench.main([*options, str(output)]) == 0
    (run,) = load_runs(output)
    own = [row for row in run.rows if row.peer == "cutlass_fa" and row.direction == "fwd"]
    assert len(own) == 2 and all(row.ms > 0 and row.tflops is not None and row.tflops > 10 for row in own)
    assert any(row.direction == "host" for row in run.rows) and any(row.peer == "ceiling" for row in run.rows)
    assert bench_report.table(run.rows)[0][5] == "cutlass_fa"


@pytest.mark.gpu
def test_measure_cases_on_the_gpu(tmp_path: Path) -> None:
    output = tmp_path / "results.json"
    options = shlex.split("--cases window varlen alibi sinks --head-dims 128 --rounds 2 --calls 3 --commit test --output")
    assert bench.main([*options, str(output)]) == 0
    (run,) = load_runs(output)
    assert len({row.case for row in run.rows}) == 4 + 4 + 2 + 2
    assert all(row.ms > 0 and row.tflops is not None and row.tflops > 10 for row in run.rows)
    assert {row.peer for row in run.rows} >= {"cutlass_fa", "without", "equal"}
