"""`tensorrail train`: the training phases of a recipe, without ONNX."""

from __future__ import annotations

from tensorrail.options import Folder, Json, Overwrite, RecipeFile, Resume
from tensorrail.show import console, progress


def command(
    recipe: RecipeFile, folder: Folder = None, resume: Resume = False, overwrite: Overwrite = False, json: Json = None
) -> None:
    """Train only: dense, ADMM, cut, fine-tune, control; writes checkpoints, plan.json and cores.safetensors.

    `tensorrail run --resume` on the same folder goes on from there.
    """
    from pathlib import Path

    from tensorrail_runtime.report import TrainingLog
    from tensorrail_trainer.pipeline import prepare, train_all
    from tensorrail_trainer.recipe import Recipe

    read = Recipe.load(recipe)
    target = folder or Path("runs") / read.name
    prepare(read, target, resume=resume, overwrite=overwrite)
    with progress() as listener:
        trained, _ = train_all(read, target, listener)
    last = {row.phase: row for row in trained.rows}
    for phase, row in last.items():
        console.print(f"{phase:<9} {row.epoch} epochs, test accuracy {row.test_accuracy:.2f} %")
    if json is not None:
        TrainingLog(epochs=trained.rows).save(json)
