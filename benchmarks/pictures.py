"""Draw what results/ holds: speed-up against MACs, and accuracy where it was measured; write the table beside the picture.

    python benchmarks/pictures.py

Reads `results/compress.json`, `results/calibration.md` and, once they are there, `results/cifar100*.md` with their logs
(`benchmarks/runs.py`). Writes `docs/assets/speed-accuracy.svg`, and the table between two comments of
`docs/performance.md`. A panel whose results are not there is left out; no figure comes from anywhere else.
"""

from __future__ import annotations

import json
import re
from collections.abc import Sequence
from dataclasses import dataclass
from io import StringIO
from pathlib import Path
from typing import Any

import matplotlib

matplotlib.use("svg")
from matplotlib import pyplot as plt

from tensorrail_runtime.records import write_text
from tensorrail_trainer.training.epochs import TrainingLog

ROOT = Path(__file__).parents[1]
PAGE, PICTURE = ROOT / "docs" / "performance.md", ROOT / "docs" / "assets" / "speed-accuracy.svg"
BEGIN, END = "<!-- made by `python benchmarks/pictures.py` from results/ -->\n", "<!-- end -->"

# Drawn in these colours, which then become names, so that the picture follows the light or dark scheme.
COLOURS = {
    "ink": ("#010101", "#14232b", "#eef3f5"),
    "soft": ("#020202", "#5a6b75", "#9db0ba"),
    "grid": ("#030303", "#d7dee2", "#33444d"),
    "first": ("#040404", "#0f6285", "#7cc4e4"),
    "second": ("#050505", "#a85b00", "#f2b544"),
    "third": ("#060606", "#3f7d37", "#8fce86"),
    "fourth": ("#070707", "#a0346c", "#ee8fc0"),
    "fifth": ("#080808", "#5b4bb0", "#b3a7f5"),
}
SERIES = ("first", "second", "third", "fourth", "fifth")
MARKERS = {"planned": "o", "published": "s", "published, padded": "D", "tensorly-torch tucker": "^", "tensorly-torch tt": "v"}


@dataclass(frozen=True)
class Form:
    """One form of one network against its dense one: ratios, and the 95 % interval of the measured speed-up."""

    network: str
    batch: int
    form: str
    macs: float
    params: float
    speed: float
    low: float
    high: float

    @property
    def kind(self) -> str:
        """The form without the target that it was planned for."""
        return self.form.partition(", latency")[0]


@dataclass(frozen=True)
class TrainedRun:
    """One run: test accuracies of the last epochs in percent, and the measured speed-up of the factored network."""

    run: str
    dense: float
    factored: float
    speed: float


def forms(path: Path) -> list[Form]:
    """Return the rows of `results/compress.json`, dense ones left out."""
    found = []
    for record in json.loads(path.read_text(encoding="utf-8")):
        dense, *others = record.get("rows", [None])
        for row in others:
            speed = row["speed_up"]
            ratios = (dense["macs"] / row["macs"], dense["params"] / row["params"])
            found.append(Form(record["network"], record["batch"], row["form"], *ratios, *speed))
    return found


def without_training(path: Path) -> dict[str, dict[str, float]]:
    """Return the accuracies in percent of `results/calibration.md`: by plan and its MACs, then by what was done."""
    return {
        f"{row['plan'].strip('`')}, MACs reduction {row['MACs reduction']}": {
            key: float(value.rstrip(" %")) for key, value in row.items() if value.endswith("%")
        }
        for row in _table(path.read_text(encoding="utf-8"))
    }


def trained_runs(page: Path, logs: Path) -> list[TrainedRun]:
    """Return the runs of `results/cifar100` that have a dense control, trained for as many epochs, and a measured speed-up."""
    speeds = {
        row["run"]: float(found[1])
        for row in _table(page.read_text(encoding="utf-8"))
        if (found := re.match(r"([\d.]+)×", row["speed-up, batch 1"]))
    }
    runs = []
    for path in sorted(logs.glob("*.json")):
        last = {row.phase: row.test_accuracy for row in TrainingLog.model_validate_json(path.read_bytes()).epochs}
        reference = last.get("control")
        if path.stem in speeds and reference is not None and "finetune" in last:
            runs.append(TrainedRun(path.stem, reference, last["finetune"], speeds[path.stem]))
    return runs


def with_table(page: str) -> str:
    """Return the page with the table of the present results between its two comments."""
    rows = [
        f"| {row.network}, batch {row.batch} | {row.form} | {row.macs:.2f} | {row.params:.2f} | {row.speed:.2f}× "
        f"[{row.low:.2f}, {row.high:.2f}] |"
        for row in forms(ROOT / "results" / "compress.json")
    ]
    head = ["| network | form | MACs reduction (×) | parameter reduction (×) | speed-up [95 % CI] |", "|---|---|---|---|---|"]
    before, _, rest = page.partition(BEGIN)
    _, _, after = rest.partition(END)
    return "\n".join([before + BEGIN, *head, *rows, "", END]) + after


def main() -> None:
    results = ROOT / "results"
    panels: list[tuple[float, Any, Any]] = []  # height in inches, what draws it, of what
    said = []
    rows = forms(results / "compress.json")
    panels.append((4.6, _speed, rows))
    said += [f"{row.network}, batch {row.batch}, {row.form}: {row.speed:.2f}× at {row.macs:.2f}× fewer MACs" for row in rows]
    runs = [run for page in sorted(results.glob("cifar100*.md")) for run in trained_runs(page, page.with_suffix(""))]
    if runs:
        panels.append((3.4, _trained, runs))
        said += [f"{run.run}: {run.factored:.2f} % at {run.speed:.2f}×, dense {run.dense:.2f} %" for run in runs]
    if (results / "calibration.md").exists():
        plans = without_training(results / "calibration.md")
        panels.append((0.9 + 0.3 * sum(map(len, plans.values())), _untrained, plans))
        said += [f"{plan}, {step}: {value:.2f} %" for plan, steps in plans.items() for step, value in steps.items()]
    write_text(PICTURE, _scheme(_figure(panels), "; ".join(said)))
    write_text(PAGE, with_table(PAGE.read_text(encoding="utf-8")))


def _figure(panels: Sequence[tuple[float, Any, Any]]) -> str:
    style = dict.fromkeys(("text.color", "axes.labelcolor", "axes.titlecolor"), COLOURS["ink"][0])
    style |= dict.fromkeys(("axes.edgecolor", "xtick.color", "ytick.color"), COLOURS["soft"][0])
    style |= {"grid.color": COLOURS["grid"][0], "svg.fonttype": "none", "svg.hashsalt": "tensorrail", "font.size": 10.5}
    style |= {"axes.spines.top": False, "axes.spines.right": False, "axes.titlelocation": "left", "axes.titlesize": 11}
    with plt.rc_context(style):  # type: ignore[arg-type] # strings and numbers, as it takes them
        heights = [height for height, _, _ in panels]
        figure, axes = plt.subplots(
            len(panels), 1, figsize=(6.4, sum(heights)), height_ratios=heights, squeeze=False, layout="constrained"
        )
        for (_, draw, what), own in zip(panels, axes[:, 0], strict=True):
            draw(own, what)
        text = StringIO()
        figure.savefig(text, format="svg", transparent=True, metadata={"Date": None})
        plt.close(figure)
    return text.getvalue()


def _speed(axes: Any, rows: Sequence[Form]) -> None:
    labels = list(dict.fromkeys((row.network, row.batch) for row in rows))
    most = 1.12 * max(max(row.macs, row.high) for row in rows)
    axes.plot([1, most], [1, most], ":", color=COLOURS["soft"][0], zorder=1)
    for row in rows:
        colour = COLOURS[SERIES[labels.index((row.network, row.batch)) % len(SERIES)]][0]
        errors = [[row.speed - row.low], [row.high - row.speed]]
        marker = MARKERS.get(row.kind, "x")
        axes.errorbar(row.macs, row.speed, yerr=errors, fmt=marker, color=colour, markersize=6.5, capsize=2.5, elinewidth=1)
    for number, (network, batch) in enumerate(labels):
        axes.plot([], [], "o", color=COLOURS[SERIES[number % len(SERIES)]][0], label=f"{network}, batch {batch}")
    for kind in dict.fromkeys(row.kind for row in rows):
        axes.plot([], [], MARKERS.get(kind, "x"), color=COLOURS["soft"][0], label=kind)
    axes.set(xscale="log", yscale="log", xlim=(1, most), ylim=(1, most))
    axes.set(xlabel="MACs reduction (×)", ylabel="measured speed-up")
    ticks = [tick for tick in (1, 1.5, 2, 2.5, 3, 4, 6, 10, 15, 20, 30) if tick <= most]
    for axis in (axes.xaxis, axes.yaxis):
        axis.set_major_locator(plt.FixedLocator(ticks))
        axis.set_major_formatter(plt.FuncFormatter(lambda value, _: f"{value:g}×"))
        axis.set_minor_locator(plt.NullLocator())
    axes.grid(True, linewidth=0.7)
    axes.set_title("Speed-up over the dense network, CPU, with 95 % interval")
    axes.legend(loc="upper left", fontsize=9, frameon=False)


def _trained(axes: Any, runs: Sequence[TrainedRun]) -> None:
    for number, run in enumerate(runs):
        colour = COLOURS[SERIES[number % len(SERIES)]][0]
        axes.plot([1, run.speed], [run.dense, run.factored], "-", color=colour, linewidth=1, label=run.run)
        axes.plot(1, run.dense, "o", color=colour, fillstyle="none", markersize=6.5)
        axes.plot(run.speed, run.factored, "o", color=colour, markersize=6.5)
    axes.set(xlabel="measured speed-up, batch 1 (hollow: dense)", ylabel="test accuracy, %")
    axes.grid(True, linewidth=0.7)
    axes.set_title("CIFAR-100, with and without ADMM, last epoch")
    axes.legend(fontsize=9, frameon=False)


def _untrained(axes: Any, plans: dict[str, dict[str, float]]) -> None:
    steps = [(plan, step, value) for plan, values in plans.items() for step, value in values.items()]
    for place, (plan, _, value) in enumerate(steps):
        colour = COLOURS[SERIES[list(plans).index(plan) % len(SERIES)]][0]
        axes.plot(value, place, "o", color=colour, markersize=6.5)
        axes.annotate(f"{value:.2f} %", (value, place), xytext=(8, 0), textcoords="offset points", va="center", fontsize=9.5)
    names = [step if len(plans) == 1 else f"{plan}: {step}" for plan, step, _ in steps]
    axes.set_yticks(range(len(steps)), names)
    low, high = min(value for *_, value in steps), max(value for *_, value in steps)
    axes.set(xlim=(low - 1, high + 1.2), ylim=(len(steps) - 0.4, -0.6), xlabel="test accuracy, %")
    axes.grid(True, axis="x", linewidth=0.7)
    axes.set_title(f"Without training: {', '.join(plans)}" if len(plans) == 1 else "Without training")


def _scheme(svg: str, said: str) -> str:
    """Return the picture with names in place of colours, both schemes in its style, and its figures in words."""
    for name, (drawn, _, _) in COLOURS.items():
        svg = svg.replace(drawn, f"var(--{name})")
    light, dark = ("".join(f"--{name}: {one[k]}; " for name, one in COLOURS.items()) for k in (1, 2))
    style = (
        f"<style>#only-light {{ {light}}} @media (prefers-color-scheme: dark) {{ #only-light {{ {dark}}} }} "
        f"#only-light:target {{ {light}}} #only-dark:target #only-light {{ {dark}}}</style>"
    )
    head = f"<title>Speed against accuracy</title>\n <desc>{said.replace('&', '&amp;').replace('<', '&lt;')}</desc>\n {style}"
    svg = re.sub(r"<svg ([^>]*)>", rf'<svg id="only-dark" role="img" \1>\n {head}', svg, count=1)
    return svg.replace('<g id="figure_1">', '<g id="only-light">', 1)


def _table(text: str) -> list[dict[str, str]]:
    """Return the rows of the first table of a page, by its head."""
    lines = [
        [cell.strip() for cell in line.strip().strip("|").split("|")] for line in text.splitlines() if line.startswith("|")
    ]
    head, _, *rows = lines
    return [dict(zip(head, row, strict=True)) for row in rows]


if __name__ == "__main__":
    main()
