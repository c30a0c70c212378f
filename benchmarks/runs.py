"""Finished runs side by side: accuracies of the last epoch, ratios, latency and parity, curves; from their folders alone.

    python benchmarks/runs.py runs/a runs/b … --title "CIFAR-100" -o results/cifar100

Writes `<out>.md` with one row a network, `<out>.svg` with the curves, and `<out>/<run>.{yaml,json}`, each run's recipe and log.
Every run was made by `tensorrail run RECIPE`; one that has only been trained (`tensorrail train`) has no graphs to measure.
"""

from __future__ import annotations

import argparse
import shutil
from pathlib import Path

import matplotlib

matplotlib.use("svg")
from matplotlib import pyplot as plt

from tensorrail_runtime.records import write_text
from tensorrail_runtime.report import Epoch, Report, TrainingLog
from tensorrail_trainer.recipe import Recipe

HEAD = ("run", "network", "epochs", "last epoch, test", "parameters ÷", "FLOPs ÷", "speed-up, batch 1", "numerical error")


def seconds_of(rows: tuple[Epoch, ...]) -> float:
    return sum(row.seconds for row in rows)


def last(rows: tuple[Epoch, ...], phase: str) -> Epoch | None:
    return next((row for row in reversed(rows) if row.phase == phase), None)


def table_of(folder: Path) -> tuple[list[tuple[str, ...]], tuple[Epoch, ...], str]:
    """Return a run's rows of the table, its epochs, and a line about it."""
    recipe = Recipe.load(folder / "recipe.yaml")
    report = Report.model_validate_json((folder / "report.json").read_bytes()) if (folder / "report.json").exists() else None
    log = report or TrainingLog.model_validate_json((folder / "training.json").read_bytes())
    epochs = report.training if report else log.epochs
    rows = []
    done = 0
    names = {"dense": "dense", "admm": "ADMM, not yet cut", "finetune": "cores, fine-tuned", "control": "dense control"}
    for phase, name in names.items():
        row = last(epochs, phase)
        if row is None:
            continue
        before = last(epochs, "dense")
        count = row.epoch + (before.epoch if before and phase in ("admm", "control") else 0)
        if phase == "finetune":
            count = sum(one.epoch for one in (before, last(epochs, "admm"), row) if one is not None)
        done = max(done, count)
        cells = ["–"] * 4
        if report is not None and phase == "finetune":
            dense, own = report.models[0].cost, report.model("factored").cost
            ratio = report.latency[0].ratios[0]
            cells = [
                f"{dense.params / own.params:.2f}",
                f"{dense.flops / own.flops:.2f}",
                f"{ratio.value:.2f}× [{ratio.low:.2f}, {ratio.high:.2f}]",
                f"{report.numerical.worst:.1e}",
            ]
        if phase == "finetune" and log.cut_accuracy is not None:
            rows.append((recipe.name, "cores, as cut", str(count - row.epoch), f"{log.cut_accuracy:.2f} %", *["–"] * 4))
        rows.append((recipe.name, name, str(count), f"{row.test_accuracy:.2f} %", *cells))
    admm = [row for row in epochs if row.phase == "admm"]
    share = (
        f", projections {100 * sum(r.projection_seconds for r in admm) / seconds_of(tuple(admm)):.1f} % of ADMM" if admm else ""
    )
    weights = f", starting from `{Path(recipe.model.weights).parent.name}/`" if recipe.model.weights else ""
    return rows, epochs, f"- `{recipe.name}`: seed {recipe.seed}{weights}, {seconds_of(epochs) / 60:.0f} min of training{share}"


def draw(runs: dict[str, tuple[Epoch, ...]], path: Path) -> None:
    """Draw test accuracy over epochs, one line a phase, phases one after another."""
    figure, axes = plt.subplots(figsize=(8, 4.5))
    for name, epochs in runs.items():
        for phase in ("dense", "admm", "finetune", "control"):
            rows = [row for row in epochs if row.phase == phase]
            starts = {"dense": (), "admm": ("dense",), "finetune": ("dense", "admm"), "control": ("dense",)}[phase]
            start = sum(len([row for row in epochs if row.phase == before]) for before in starts)
            if rows:
                axes.plot([start + row.epoch for row in rows], [row.test_accuracy for row in rows], label=f"{name}: {phase}")
    axes.set(xlabel="epoch", ylabel="test accuracy, %")
    axes.grid(alpha=0.3)
    axes.legend(fontsize=7)
    figure.tight_layout()
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, metadata={"Date": None})


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("runs", type=Path, nargs="+")
    parser.add_argument("--title", required=True)
    parser.add_argument("--note", default="")
    parser.add_argument("-o", "--out", type=Path, required=True)
    options = parser.parse_args()
    lines, notes, curves = [], [], {}
    options.out.mkdir(parents=True, exist_ok=True)
    for folder in options.runs:
        rows, epochs, note = table_of(folder)
        lines += ["| " + " | ".join(row) + " |" for row in rows]
        notes.append(note)
        name = rows[0][0]
        curves[name] = epochs
        shutil.copyfile(folder / "recipe.yaml", options.out / f"{name}.yaml")
        TrainingLog(epochs=epochs).save(options.out / f"{name}.json")
    draw(curves, options.out.with_suffix(".svg"))
    names = " ".join(f"runs/{name}" for name in curves)
    text = [
        f"# {options.title}",
        "",
        f"Each run: `tensorrail run {options.out}/RUN.yaml`; then `python benchmarks/runs.py {names}`. Accuracies are of "
        "the last epoch; nothing was chosen on the test set. Epochs count from fresh weights.",
        *(["", options.note] if options.note else []),
        "",
        "| " + " | ".join(HEAD) + " |",
        "|" + "---|" * len(HEAD),
        *lines,
        "",
        *notes,
        "",
        f"![test accuracy over epochs]({options.out.name}.svg)",
        "",
    ]
    write_text(options.out.with_suffix(".md"), "\n".join(text))
    print("\n".join(text))


if __name__ == "__main__":
    main()
