"""Pictures of the tables that have peers: ``python -m benchmarks.plots [JSON ...]`` writes ``docs/img/bench-*.png``.

Without an argument it takes the newest file of ``benchmarks/results``. Of several files with the same table the last
one counts. A table that is in none of them keeps its picture.
"""

import json
import sys
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from benchmarks.exec_latency import ECHO
from benchmarks.harness import REPOSITORY, p50, p99
from benchmarks.memory import MANY

FOLDER = REPOSITORY / "docs" / "img"
COLOURS = {"ours, helper": "#15607a", "ours, channel": "#7fb3c6", "floor": "#e3d6ba", "peer": "#b8b8b8"}
WIDTH = 8.0  # inches, at 100 dots each
ROW = 0.27  # inches for a bar


def main(files: list[str]) -> int:
    import matplotlib as mpl

    mpl.use("Agg")
    mpl.rcParams.update({"font.size": 9, "axes.spines.top": False, "axes.spines.right": False})
    paths = [Path(file) for file in files] or sorted((REPOSITORY / "benchmarks" / "results").glob("*.json"))[-1:]
    documents = [json.loads(path.read_text()) for path in paths]
    reports = {report["name"]: (report, document) for document in documents for report in document["reports"]}
    for name, draw in PICTURES.items():
        if name in reports:
            report, document = reports[name]
            draw(report["raw"], _where(document))
    return 0 if set(reports) & set(PICTURES) else 1


def _where(document: Mapping[str, Any]) -> str:
    machine = document["machine"]
    quick = ", quick run" if document["quick"] else ""
    return f"{machine['date'][:10]}, {machine['cores']} cores, load {machine['load'][0]:.1f}{quick}"


def _exec(raw: Mapping[str, Any], where: str) -> None:
    panels = {"a warm `true`, loopback: ms (log)": raw["ms"]}
    _draw("exec", panels, where, "ms", log=True, tails=True)


def _latency(raw: Mapping[str, Any], where: str) -> None:
    panels = {}
    for what, told in raw.items():
        if not what.startswith("ms at"):
            continue
        trip = p50(told[ECHO])
        scaled = {name: [ms / trip for ms in values] for name, values in told.items() if name != ECHO}
        panels[f"a warm `true` {what[3:]} round trip time: round trips"] = scaled
    _draw("latency", panels, where, "{:.2f}", tails=True)


def _files(raw: Mapping[str, Any], where: str) -> None:
    panels = {f"{what.replace(' at ', ', round trip time ')}: ms": told for what, told in raw["ms"].items()}
    _draw("files", panels, where, "ms", columns=2)


def _concurrent(raw: Mapping[str, Any], where: str) -> None:
    rates = {what: told for what, told in raw.items() if what.endswith("commands per second")}
    _draw("concurrent", rates, where, "{:.0f}")


def _output(raw: Mapping[str, Any], where: str) -> None:
    megabytes = raw.get("megabytes", 100)
    rates = {name: [1e3 * megabytes / ms for ms in values] for name, values in raw["ms"].items()}
    _draw("output", {f"{megabytes} MB of output: MB/s": rates}, where, "{:.0f}")


def _memory(raw: Mapping[str, Any], where: str) -> None:
    told = {name: one for name, one in raw["told"].items() if "kb" in one}
    ours = {name: [one["kb"]] for name, one in told.items()}
    waiting = {name: [one["waiting_kb"]] for name, one in told.items() if name in MANY}
    host = {name: [one["sshd_mb"] + one["helper_pss_mb"]] for name, one in told.items()}
    panels = {
        "a warm connection, our side: KB (log)": ours,
        "a waiting command, our side: KB": waiting,
        "a warm connection, on the host: MB, its share": host,
    }
    _draw("memory", panels, where, "number", log=True)


def _draw(
    name: str,
    panels: Mapping[str, Mapping[str, list[float]]],
    where: str,
    unit: str,
    *,
    columns: int = 1,
    log: bool = False,
    tails: bool = False,
) -> None:
    """One picture, a panel of bars for each of *panels*; *tails*: a thin line on to the p99."""
    from matplotlib import pyplot as plt
    from PIL import Image

    rows = -(-len(panels) // columns)
    bars = [len(told) for told in panels.values()]
    heights = [0.75 + ROW * max(bars[row * columns : (row + 1) * columns]) for row in range(rows)]
    size = (WIDTH * (1.25 if columns > 1 else 1), sum(heights))
    shares = {"height_ratios": heights}
    figure, grid = plt.subplots(rows, columns, figsize=size, squeeze=False, layout="constrained", gridspec_kw=shares)
    axes = list(grid.flat)
    for axis, (title, told) in zip(axes, panels.items(), strict=False):
        _panel(axis, title, told, unit, log=log and "(log)" in title, tails=tails)
    for axis in axes[len(panels) :]:
        axis.set_visible(False)
    figure.get_layout_engine().set(w_pad=0.12)
    figure.supxlabel(where, fontsize=7, color="#777777", x=0.99, ha="right")
    FOLDER.mkdir(parents=True, exist_ok=True)
    path = FOLDER / f"bench-{name}.png"
    figure.savefig(path, dpi=100)
    plt.close(figure)
    with Image.open(path) as image:
        image.convert("RGB").quantize(64).save(path, optimize=True)  # a third of the size, and no difference to see
    print(path.relative_to(REPOSITORY))


def _panel(axis: Any, title: str, told: Mapping[str, list[float]], unit: str, *, log: bool, tails: bool) -> None:
    names = list(told)[::-1]
    middles = [p50(told[name]) for name in names]
    axis.barh(names, middles, color=[_colour(name) for name in names], height=0.72)
    ends = list(middles)
    if tails:
        ends = [max(middle, p99(told[name])) for name, middle in zip(names, middles, strict=True)]
        axis.hlines(names, middles, ends, color="#555555", linewidth=1)
    if log:
        axis.set_xscale("log")
        axis.xaxis.set_major_formatter("{x:,g}")
    for name, middle, end in zip(names, middles, ends, strict=True):
        place = {"xytext": (4, 0), "textcoords": "offset points", "va": "center"}
        text = f"{_label(middle, unit)}, p99 {_label(end, unit)}" if tails else _label(middle, unit)
        axis.annotate(text, (end, name), fontsize=8, **place)
    axis.margins(x=0.2 if tails else 0.12)
    if not log:
        axis.set_xlim(left=0)
    axis.set_title(title, loc="left", fontsize=9, fontweight="bold")
    axis.tick_params(axis="y", length=0)


def _label(value: float, unit: str) -> str:
    if "{" in unit:
        return unit.format(value)
    return f"{value:,.0f}" if value >= 100 else f"{value:.3g}"


def _colour(name: str) -> str:
    kind = "floor" if name.startswith("floor") else name
    return COLOURS.get(kind, COLOURS["peer"])


PICTURES: dict[str, Callable[[Mapping[str, Any], str], None]] = {
    "exec_peers": _exec,
    "exec_latency": _latency,
    "files_peers": _files,
    "concurrent": _concurrent,
    "output_rate": _output,
    "memory": _memory,
}


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
