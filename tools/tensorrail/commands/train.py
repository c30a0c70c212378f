"""`tensorrail train`: the training phases of a recipe, without ONNX."""

from __future__ import annotations

from tensorrail.options import Folder, Json, Overwrite, RecipeFile, Resume
from tensorrail.show import progress, say, say_projections


def command(
    recipe: RecipeFile, folder: Folder = None, resume: Resume = False, overwrite: Overwrite = False, json: Json = None
) -> None:
    """Train only: dense, ADMM, cut, fine-tune, control; writes checkpoints, plan.json, cores and dense.safetensors.

    `tensorrail run --resume` on the same folder goes on from there. Several processes: `accelerate launch --num_processes N
    -m tensorrail train RECIPE`.
    """
    from pathlib import Path

    from tensorrail_trainer.recipes.recipe import Recipe
    from tensorrail_trainer.run.pipeline import make_accelerator, prepare, train_all
    from tensorrail_trainer.training.epochs import TrainingLog

    read = Recipe.load(recipe)
    target = folder or Path("runs") / read.name
    accelerator = make_accelerator(read)
    if accelerator.is_main_process:
        prepare(read, target, resume=resume, overwrite=overwrite)
    accelerator.wait_for_everyone()
    with progress(shown=accelerator.is_main_process) as listener:
        trained, _ = train_all(read, target, listener, accelerator)
    if not accelerator.is_main_process:
        return
    last = {row.phase: row for row in trained.rows}
    for phase, row in last.items():
        say(f"{phase:<9} {row.epoch} epochs, test accuracy {row.test_accuracy:.2f} %")
    say_projections(trained.rows)
    log = TrainingLog(epochs=trained.rows, cut_accuracy=trained.cut_accuracy)
    log.save(target / "training.json")
    if json is not None:
        log.save(json)
