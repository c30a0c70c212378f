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
from tensorrail_trainer.recipes.recipe import Recipe
from tensorrail_trainer.run.report import Report
from tensorrail_trainer.training.epochs import Epoch, TrainingLog, projection_share

matplotlib.rcParams["svg.hashsalt"] = "tensorrail"  # the same picture for the same runs

HEAD = (
    "run",
    "network",
    "epochs",
    "last epoch, test",
    "parameter reduction (×)",
    "FLOPs reduction",
    "speed-up, batch 1",
    "speed-up, largest batch",
    "numerical error",
)
BEFORE: dict[str, tuple[str, ...]] = {"dense": (), "admm": ("dense",), "finetune": ("dense", "admm"), "control": ("dense",)}


def seconds_of(rows: tuple[Epoch, ...]) -> float:
    return sum(row.seconds for row in rows)


def last(rows: tuple[Epoch, ...], phase: str) -> Epoch | None:
    return next((row for row in reversed(rows) if row.phase == phase), None)


def log_of(folder: Path) -> Report | TrainingLog:
    """Return what a run left: its report, or the log of one that was only trained."""
    if (folder / "report.json").exists():
        return Report.model_validate_json((folder / "report.json").read_bytes())
    return TrainingLog.model_validate_json((folder / "training.json").read_bytes())


def epochs_of(log: Report | TrainingLog) -> tuple[Epoch, ...]:
    return log.training if isinstance(log, Report) else log.epochs


def begun(recipe: Recipe, folder: Path) -> tuple[Epoch, ...]:
    """Return the epochs of the run beside this one whose dense weights it starts from."""
    if recipe.model.weights is None:
        return ()
    first = folder.parent / Path(recipe.model.weights).parent.name
    return epochs_of(log_of(first)) if (first / "report.json").exists() or (first / "training.json").exists() else ()


def table_of(folder: Path) -> tuple[list[tuple[str, ...]], tuple[Epoch, ...], str]:
    """Return a run's rows of the table, its epochs with those that it began with, and a line about it.

    A run from another's dense network has that one's dense control, if it was trained for as many epochs.
    """
    recipe = Recipe.load(folder / "recipe.yaml")
    log = log_of(folder)
    own = epochs_of(log)
    first = begun(recipe, folder)
    before = tuple(row for row in first if row.phase == "dense")
    control = tuple(row for row in first if row.phase == "control")
    totals = {phase: sum(row.phase in (*others, phase) for row in (*before, *own)) for phase, others in BEFORE.items()}
    rows = []
    names = {"dense": "dense", "admm": "ADMM, not yet cut", "finetune": "cores, fine-tuned", "control": "dense control"}
    for phase, name in names.items():
        row = last(own, phase)
        if row is None:
            continue
        cells = ["–"] * 5
        if isinstance(log, Report) and phase == "finetune":
            dense, factored = log.models[0].cost, log.model("factored").cost
            ratios = [one.ratios[0] for one in (log.latency[0], log.latency[-1])]
            speeds = [f"{ratio.value:.2f}× [{ratio.low:.2f}, {ratio.high:.2f}]" for ratio in ratios]
            cells = [
                f"{dense.params / factored.params:.2f}",
                f"{dense.flops / factored.flops:.2f}",
                speeds[0],
                f"{speeds[1]} at {log.latency[-1].batch}" if len(log.latency) > 1 else "–",
                f"{log.numerical.worst:.1e}",
            ]
        cut_at = totals[phase] - row.epoch
        if phase == "finetune" and log.cut_accuracy is not None and cut_at:  # fresh cores were never cut
            rows.append((recipe.name, "cores, as cut", str(cut_at), f"{log.cut_accuracy:.2f} %", *["–"] * 5))
        rows.append((recipe.name, name, str(totals[phase]), f"{row.test_accuracy:.2f} %", *cells))
    share = projection_share(own)
    projections = "" if share is None else f", projections {100 * share:.1f} % of ADMM"
    fresh = log.latency[0].fresh if isinstance(log, Report) else ""
    timed = f", timed{fresh}" if fresh else ""
    weights = f", from the dense network of `{Path(recipe.model.weights).parent.name}`" if recipe.model.weights else ""
    about = f"- `{recipe.name}`: seed {recipe.seed}{weights}, {seconds_of(own) / 60:.0f} min of training{projections}{timed}"
    same = len(before) + len(control) == totals["finetune"]
    return rows, (*before, *own, *(control if same else ())), about


def draw(runs: dict[str, tuple[Epoch, ...]], path: Path) -> None:
    """Draw test accuracy over epochs, one line a phase, phases one after another; what runs share is drawn once."""
    figure, axes = plt.subplots(figsize=(8, 4.5))
    drawn: list[tuple[Epoch, ...]] = []
    for name, epochs in runs.items():
        for phase, others in BEFORE.items():
            rows = tuple(row for row in epochs if row.phase == phase)
            start = sum(row.phase in others for row in epochs)
            if rows and rows not in drawn:
                drawn.append(rows)
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
        f"Each run: `tensorrail run {options.out}/RUN.yaml`; then `python benchmarks/runs.py {names} "
        f"--title TITLE -o {options.out}`. Accuracies are of the last epoch; nothing was chosen on the test set. "
        "Epochs count from fresh weights.",
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
