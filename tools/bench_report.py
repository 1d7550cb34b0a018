"""What a benchmark run leaves behind: its rows, the JSON file of runs, tables and plots. Needs no GPU.

A results file (benchmarks/h100.json) is a list of runs, oldest first; each run says with what it was measured and holds its rows. All rows
of a run come from one GPU in one process, so that its peers may be compared; rows of different runs may not.
"""

from __future__ import annotations

import json
import os
import re
from collections.abc import Callable, Iterable, Sequence
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Any, TypeAlias

OWN_PEER = "cutlass_fa"
BASELINE_PEER = "fa3"
PEER_ORDER = (OWN_PEER, "fa3", "cudnn", "fa2")
# This library beside itself: without the ALiBi or the sinks of a case, whose price is a matter of time, and on packed sequences of equal
# lengths, whose rate is what counts.
WITHOUT, EQUAL, DENSE = "without", "equal", "dense"
COLUMNS = ("peer", "pass", "dtype", "d", "b", "h", "hk", "s", "causal", "extra", "ms", "tflops", "gbs")
# In a file only where a row uses them.
FEATURE_COLUMNS = {"sk": 0, "window": (-1, -1), "sink_tokens": 0, "alibi": 0, "learnable_sink": 0, "lengths": "", "page": ""}


@dataclass(frozen=True)
class Row:
    """One measurement.

    peer: who did it. direction: "pass" of a file: "fwd", "bwd", "host" (host time of a call), "copy", "matmul". d: head_dim. b: batch.
    h, hk: query and key heads. s: sequence length of queries, and of keys where sk is 0; of packed sequences, the rows of all. causal: 0 or
    1. extra: what else tells rows apart. ms: median of the timings. tflops, gbs: TFLOP/s and GB/s, None where they say nothing. window:
    (left, right), -1 unbounded. sink_tokens: how many. alibi, learnable_sink: 0 or 1. lengths: the mix of packed sequences. page: keys of
    a KV cache's page, or "none" for a contiguous one.
    """

    peer: str
    direction: str
    dtype: str
    d: int
    b: int
    h: int
    hk: int
    s: int
    causal: int
    extra: str
    ms: float
    tflops: float | None = None
    gbs: float | None = None
    sk: int = 0
    window: tuple[int, int] = (-1, -1)
    sink_tokens: int = 0
    alibi: int = 0
    learnable_sink: int = 0
    lengths: str = ""
    page: str = ""

    @property
    def features(self) -> dict[str, Any]:
        """Those of FEATURE_COLUMNS that the row uses."""
        return {name: getattr(self, name) for name, unused in FEATURE_COLUMNS.items() if getattr(self, name) != unused}

    @property
    def case(self) -> tuple[Any, ...]:
        """What was measured, whoever did it and with whichever family of kernels; sorts in reading order."""
        extra = " ".join(word for word in self.extra.split() if not word.startswith("family="))
        features = (self.lengths, self.window, self.sink_tokens, self.alibi, self.learnable_sink)
        return (
            self.direction,
            self.dtype,
            self.h != self.hk,
            self.d,
            self.causal,
            *features,
            self.s,
            self.sk,
            self.h,
            self.hk,
            self.b,
            self.page,
            extra,
        )

    def as_dict(self) -> dict[str, Any]:
        """The row under the names of COLUMNS, in their order, and the features that it uses."""
        values = {"pass" if name == "direction" else name: value for name, value in asdict(self).items()}
        return {name: values[name] for name in COLUMNS} | self.features

    @classmethod
    def from_dict(cls, values: dict[str, Any]) -> Row:
        features = {name: values[name] for name in FEATURE_COLUMNS if name in values}
        if "window" in features:
            features["window"] = tuple(features["window"])
        return cls(**{"direction" if name == "pass" else name: values[name] for name in COLUMNS}, **features)


@dataclass(frozen=True)
class Run:
    """One process's measurements and what they were made with.

    commit: of this repository, "-dirty" appended where files differed from it. device, driver: the GPU's name and its driver's version.
    versions: of every package that took part. date: UTC, ISO 8601. command: the command line.
    """

    commit: str
    device: str
    driver: str
    versions: dict[str, str]
    date: str
    command: str
    rows: tuple[Row, ...]

    @property
    def caption(self) -> str:
        versions = ", ".join(f"{name} {version}" for name, version in self.versions.items())
        return f"{self.device}, driver {self.driver}; {versions}; {self.date[:10]}, commit {self.commit[:12]}"


# ---- the file of runs ----------------------------------------------------------------------------------------------------------------


def load_runs(path: Path) -> list[Run]:
    """The runs of a results file, oldest first; none where there is no file."""
    if not path.exists():
        return []
    return [
        Run(**{**run, "rows": tuple(Row.from_dict(row) for row in run["rows"])}) for run in json.loads(path.read_text(encoding="utf-8"))
    ]


def append_run(path: Path, run: Run) -> None:
    """Add a run to a results file, which appears whole or not at all; a row takes one line, so that a diff can be read."""
    text = "[\n" + ",\n".join(_run_text(each) for each in [*load_runs(path), run]) + "\n]\n"
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    temporary.write_text(text, encoding="utf-8")
    temporary.replace(path)


def _run_text(run: Run) -> str:
    head = {name: value for name, value in asdict(run).items() if name != "rows"}
    rows = ",\n".join("  " + json.dumps(row.as_dict(), allow_nan=False) for row in run.rows)
    return json.dumps(head, indent=1, allow_nan=False)[:-2] + ',\n "rows": [\n' + rows + "\n ]\n}"


def results_name(device: str) -> str:
    """The results file of a GPU: h100.json for an "NVIDIA H100 80GB HBM3", h200.json for an "NVIDIA H200"."""
    model = re.search(r"\b([A-Z]+\d+[A-Za-z]*)\b", device)
    return (model[1] if model else re.sub(r"\W+", "_", device).strip("_")).lower() + ".json"


# ---- tables --------------------------------------------------------------------------------------------------------------------------


Found: TypeAlias = dict[str, Row]  # the rows of one case, by peer
Column: TypeAlias = tuple[str, Callable[[Found], str]]  # a header, and the text of a case


def table(rows: Iterable[Row]) -> list[list[str]]:
    """Rows side by side: a header, then a line for each case with every peer's TFLOP/s and what this library's is of theirs. A pass other
    than the forward, a window, packed lengths and other features have columns where some case has them."""
    cases: dict[tuple[Any, ...], Found] = {}
    for row in rows:
        if row.tflops is not None and row.peer != "ceiling":
            cases.setdefault(row.case, {})[row.peer] = row
    every = [row for found in cases.values() for row in found.values()]
    with_time, with_bandwidth = any(row.sk for row in every), any(row.page for row in every)
    columns = [*_case_columns(every), *_peer_columns(_ordered(row.peer for row in every), with_time, with_bandwidth)]
    return [[header for header, _ in columns], *([text(cases[case]) for _, text in columns] for case in sorted(cases))]


def _case_columns(rows: Sequence[Row]) -> list[Column]:
    """What was measured, as every row of a case says it."""
    used = {name for row in rows for name in row.features} | ({"pass"} if {row.direction for row in rows} != {"fwd"} else set())
    optional: list[tuple[str, str, Callable[[Row], str]]] = [
        ("window", "window", _window),
        ("sink_tokens", "sinks", lambda row: str(row.sink_tokens or "-")),
        ("alibi", "bias", lambda row: "ALiBi" if row.alibi else "-"),
        ("learnable_sink", "learnable sink", lambda row: "yes" if row.learnable_sink else "-"),
        ("lengths", "lengths", lambda row: row.lengths or "-"),
        ("page", "batch", lambda row: str(row.b)),
        ("page", "page", lambda row: row.page or "-"),
    ]
    columns: list[tuple[str, Callable[[Row], str]]] = [
        *[("pass", lambda row: row.direction)] * ("pass" in used),
        ("dtype", lambda row: row.dtype),
        ("head_dim", lambda row: str(row.d)),
        ("heads", lambda row: f"{row.h}" if row.h == row.hk else f"{row.h}/{row.hk}"),
        ("mask", lambda row: "causal" if row.causal else "full"),
        *[(header, text) for name, header, text in optional if name in used],
        ("seqlen", lambda row: str(row.s)),
        *[("seqlen_k", lambda row: str(row.sk or row.s))] * ("sk" in used),
    ]
    return [(header, partial(_of_any_row, text)) for header, text in columns]


def _of_any_row(text: Callable[[Row], str], found: Found) -> str:
    return text(next(iter(found.values())))


def _window(row: Row) -> str:
    """The keys of a causal window, the query's own included; of another (left, right)."""
    left, right = row.window
    if row.window == (-1, -1):
        return "-"
    return str(left + 1) if row.causal else f"({left}, {right})"


def _peer_columns(peers: Sequence[str], with_time: bool, with_bandwidth: bool) -> list[Column]:
    """Rates, this library's time where asked for, and ratios to the peers there are."""
    columns: list[Column] = [(peer, partial(_tflops, peer)) for peer in peers]
    columns += [(f"{OWN_PEER} GB/s", _bandwidth)] * with_bandwidth
    if OWN_PEER not in peers:
        return columns
    if with_time:
        columns.append((f"{OWN_PEER} ms", lambda found: f"{found[OWN_PEER].ms:.3f}" if OWN_PEER in found else "-"))
    others = [peer for peer in peers if peer not in (OWN_PEER, WITHOUT, EQUAL, DENSE)]
    columns += [("of fa3", lambda found: _ratio(found, [BASELINE_PEER]))] * (BASELINE_PEER in others)
    columns += [("of best peer", lambda found: _ratio(found, others))] * bool(others)
    columns += [("of without", lambda found: _ratio(found, [WITHOUT]))] * (WITHOUT in peers)
    columns += [("of equal", partial(_rate_of, EQUAL))] * (EQUAL in peers) + [("of dense", partial(_rate_of, DENSE))] * (DENSE in peers)
    return columns


def _ordered(peers: Iterable[str]) -> list[str]:
    """This library first, then the peers that everybody knows, then the rest."""
    found = set(peers)
    return [peer for peer in PEER_ORDER if peer in found] + sorted(found - set(PEER_ORDER))


def _tflops(peer: str, found: Found) -> str:
    return f"{found[peer].tflops:.0f}" if peer in found else "-"


def _bandwidth(found: Found) -> str:
    """Keys and values that a call on a cache reads, in GB/s."""
    return f"{found[OWN_PEER].gbs:.0f}" if OWN_PEER in found and found[OWN_PEER].gbs else "-"


def _ratio(found: Found, others: Sequence[str]) -> str:
    """This library's speed over the fastest of `others`."""
    times = [found[peer].ms for peer in others if peer in found]
    return f"{min(times) / found[OWN_PEER].ms:.2f}" if times and OWN_PEER in found else "-"


def _rate_of(baseline: str, found: Found) -> str:
    """This library's TFLOP/s over those of a baseline, whose FLOPs need not be quite the same."""
    own, other = found.get(OWN_PEER), found.get(baseline)
    return "-" if own is None or other is None or not own.tflops or not other.tflops else f"{own.tflops / other.tflops:.2f}"


def other_rows(rows: Iterable[Row]) -> list[list[str]]:
    """A header, then host times and ceilings, one line each; no lines at all where there are none."""
    lines = []
    for row in rows:
        what = " ".join(part for part in (row.peer, row.direction, row.extra) if part)
        if row.direction == "host":
            lines.append([what, f"{1e3 * row.ms:.1f} us"])
        elif row.peer == "ceiling":
            lines.append([what, f"{row.tflops:.0f} TFLOP/s" if row.tflops is not None else f"{row.gbs:.0f} GB/s"])
    return [["measurement", "value"], *lines] if lines else []


def aligned(lines: Sequence[Sequence[str]]) -> str:
    """A table for a terminal."""
    widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
    return "\n".join("  ".join(cell.rjust(width) for cell, width in zip(line, widths, strict=True)) for line in lines)


def markdown(lines: Sequence[Sequence[str]]) -> str:
    """A table for a README."""
    if not lines:
        return ""
    rule = ["---:"] * len(lines[0])
    return "\n".join("| " + " | ".join(line) + " |" for line in (lines[0], rule, *lines[1:]))


# ---- plots ---------------------------------------------------------------------------------------------------------------------------


def plot(run: Run, directory: Path, stem: str) -> list[Path]:
    """TFLOP/s against sequence length: a PNG for each direction and dtype, a panel for each mask and head_dim. Needs matplotlib.

    Rows of grouped heads, of windows, packed sequences and other features, and cases that no sequence length follows, are left to the
    table. Returns the files written.
    """
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    timed = [row for row in run.rows if row.tflops is not None and row.peer != "ceiling"]
    rows = [row for row in timed if row.h == row.hk and not row.extra and not row.features]
    written = []
    for direction, dtype in sorted({(row.direction, row.dtype) for row in rows}):
        chosen = [row for row in rows if (row.direction, row.dtype) == (direction, dtype)]
        head_dims, masks = sorted({row.d for row in chosen}), sorted({row.causal for row in chosen})
        size = (max(8.0, 4.0 * len(head_dims)), 3.2 * len(masks) + 0.8)
        figure, axes = pyplot.subplots(len(masks), len(head_dims), figsize=size, squeeze=False, sharex=True, layout="constrained")
        for panels, causal in zip(axes, masks, strict=True):
            for panel, head_dim in zip(panels, head_dims, strict=True):
                panel.set_title(f"head_dim {head_dim}, {'causal' if causal else 'full'}", fontsize=9)
                _draw_panel(panel, [row for row in chosen if (row.d, row.causal) == (head_dim, causal)])
        axes[0][0].legend(fontsize=8)
        for panels in axes:
            panels[0].set_ylabel("TFLOP/s")
        figure.suptitle(f"attention {direction}, {dtype}", fontsize=10)
        figure.supxlabel(f"sequence length (batch * seqlen and heads * head_dim constant)\n{run.caption}", fontsize=7)
        path = directory / f"{stem}_{direction}_{dtype}.png"
        directory.mkdir(parents=True, exist_ok=True)
        figure.savefig(path, dpi=150)
        pyplot.close(figure)
        written.append(path)
    return written


def _draw_panel(panel: Any, rows: Sequence[Row]) -> None:
    """One line for each peer."""
    from matplotlib.ticker import NullLocator

    for peer in _ordered(row.peer for row in rows):
        points = sorted((row.s, row.tflops) for row in rows if row.peer == peer)
        width = 2.0 if peer == OWN_PEER else 1.0
        panel.plot([s for s, _ in points], [tflops for _, tflops in points], marker="o", linewidth=width, markersize=3, label=peer)
    panel.set_xscale("log", base=2)
    seqlens = sorted({row.s for row in rows})
    panel.set_xticks(seqlens, [f"{s // 1024}k" if s % 1024 == 0 else str(s) for s in seqlens])
    panel.xaxis.set_minor_locator(NullLocator())
    panel.set_ylim(bottom=0)
    panel.grid(alpha=0.3)
