"""`tensorrail.run` and `tensorrail.train`: the jobs of a recipe."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from tensorrail_runtime.progress import Progress, silent
from tensorrail_trainer.recipes.recipe import Recipe
from tensorrail_trainer.run import pipeline
from tensorrail_trainer.run.report import Report
from tensorrail_trainer.training.epochs import TrainingLog


def run(
    recipe: Recipe | Path | str,
    folder: Path | str | None = None,
    *,
    resume: bool = False,
    overwrite: bool = False,
    progress: Progress = silent,
    track: Sequence[str] = (),
) -> Report | None:
    """Train, compress, export, check, bench and report, as a recipe says.

    Args:
        recipe: a recipe or its file.
        folder: where the run is written; default `runs/` and the recipe's name.
        resume: continue an interrupted run from its last finished epoch.
        overwrite: remove the run that is in the folder and start again.
        progress: told about epochs and stages; silent in all processes but the first.
        track: what curves, residuals and the report are logged to: `tensorboard` or `mlflow`; default: nothing.

    Returns:
        The report, which is also written to the folder; None in all processes but the first. `print(report)` shows the tables.

    Raises:
        RecipeError: the recipe cannot be read or carried out, or the folder already holds a run.

    """
    read = recipe if isinstance(recipe, Recipe) else Recipe.load(recipe)
    return pipeline.run(
        read,
        Path(folder or Path("runs") / read.name),
        resume=resume,
        overwrite=overwrite,
        progress=progress,
        command=f"tensorrail run {recipe}" if isinstance(recipe, Path | str) else "tensorrail.run",
        track=track,
    )


def train(
    recipe: Recipe | Path | str,
    folder: Path | str | None = None,
    *,
    resume: bool = False,
    overwrite: bool = False,
    progress: Progress = silent,
    track: Sequence[str] = (),
) -> TrainingLog | None:
    """Do the training phases of a recipe alone: dense, ADMM, cut, fine-tune, control.

    Args:
        recipe: a recipe or its file.
        folder: where checkpoints, plan, cores and weights are written; default `runs/` and the recipe's name.
        resume: continue an interrupted run from its last finished epoch.
        overwrite: remove the run that is in the folder and start again.
        progress: told about epochs; silent in all processes but the first.
        track: what curves and residuals are logged to: `tensorboard` or `mlflow`; default: nothing.

    Returns:
        Every epoch of every phase, which is also written to the folder; None in all processes but the first.

    Raises:
        RecipeError: the recipe cannot be read or carried out, or the folder already holds a run.

    """
    read = recipe if isinstance(recipe, Recipe) else Recipe.load(recipe)
    target = Path(folder or Path("runs") / read.name)
    how = pipeline.training(read, target, resume=resume, overwrite=overwrite, progress=progress, track=track)
    with how as (trained, _, logs):
        first = logs.accelerator.is_main_process
    if not first:
        return None
    log = TrainingLog(epochs=trained.rows, cut_accuracy=trained.cut_accuracy)
    log.save(target / "training.json")
    return log
