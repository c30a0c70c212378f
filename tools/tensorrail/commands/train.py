"""`tensorrail train`: the training phases of a recipe, without ONNX."""

from __future__ import annotations

from tensorrail.commands.arguments import Folder, Json, Overwrite, RecipeFile, Resume, Track, require_apart
from tensorrail.commands.groups import grouped
from tensorrail.terminal import finish, progress_bar


@grouped
def command(
    recipe: RecipeFile,
    folder: Folder = None,
    resume: Resume = False,
    overwrite: Overwrite = False,
    track: Track = None,
    json: Json = None,
) -> None:
    """Carry out only the training of a recipe.

    Phases: dense, ADMM, cut, fine-tune, control. Writes checkpoints, plan.json, cores and dense.safetensors.

    `tensorrail run --resume` on the same folder continues from there. Several processes: `accelerate launch --num_processes N
    -m tensorrail train RECIPE`.
    """
    from tensorrail.verbs.run import train

    require_apart(json, recipe)
    with progress_bar(stays=True) as progress:
        log = train(recipe, folder, resume=resume, overwrite=overwrite, progress=progress, track=tuple(track or ()))
    if log is not None:
        finish(log, json)
