"""The folder of a run: made, checked before a run goes on in it, or cleared."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from tensorrail_runtime.errors import RecipeError
from tensorrail_trainer.recipes.recipe import Recipe
from tensorrail_trainer.run.sources import Sources
from tensorrail_trainer.run.tracking import LOGGED
from tensorrail_trainer.training.checkpoints import place_of

_WRITTEN = (
    *("plan.json", "cores.safetensors", "dense.safetensors", "training.json", "report.json", "report.md", "report.html"),
    *(f"{graph}.onnx{data}" for graph in ("dense", "model", "control", "baseline") for data in ("", ".data")),
)
_PHASES = ("dense", "admm", "finetune", "control")
_TRAINED_BY = ("version", "seed", "data", "model", "plan", "train")  # the keys of a recipe that a trained network depends on


def prepare(recipe: Recipe, folder: Path, *, resume: bool = False, overwrite: bool = False) -> None:
    """Create the folder of a run, or check that the run in it can be resumed.

    Args:
        recipe: the recipe.
        folder: the folder of the run.
        resume: continue the run in the folder; default False.
        overwrite: delete the files of the run in the folder, and no others, and start again; default False. Its logs are
            left to `remove_logs`, since trackers start before.

    Raises:
        RecipeError: the folder holds a run and neither `resume` nor `overwrite` is set, or both are, the run was trained with
            another recipe or with files of another content, or the folder holds files of these names without a run.

    """
    check(recipe, folder, resume=resume, overwrite=overwrite)
    sources = Sources.of(recipe)  # raises where a file cannot be read
    recipe_file, checkpoints = folder / "recipe.yaml", folder / "checkpoints"
    kept = checkpoints / "sources.json"
    if overwrite and checkpoints.is_dir():
        for file in (*_written(folder), kept, recipe_file):
            file.unlink(missing_ok=True)
    trained = any(file.exists() for file in _written(folder))
    checkpoints.mkdir(parents=True, exist_ok=True)
    _remove_leftovers(folder)
    recipe.save(recipe_file)
    if sources.sha256 and not trained:
        sources.save(kept)


def remove_logs(folder: Path) -> None:
    """Delete the files that trackers wrote to the folder of a run."""
    for pattern in LOGGED:
        for file in folder.glob(pattern):
            file.unlink(missing_ok=True)


def check(recipe: Recipe, folder: Path, *, resume: bool = False, overwrite: bool = False) -> None:
    """Raise `RecipeError` where `prepare` would; nothing is written or deleted. The arguments are those of `prepare`."""
    if resume and overwrite:
        raise RecipeError("expected resume or overwrite, got both: overwrite deletes the run that resume would continue")
    recipe_file, checkpoints = folder / "recipe.yaml", folder / "checkpoints"
    kept, written = checkpoints / "sources.json", _written(folder)
    if recipe_file.exists() and not checkpoints.is_dir():
        raise RecipeError(f"{recipe_file} exists, but its folder holds no run; give the run another folder")
    if overwrite and checkpoints.is_dir():
        _require_apart(recipe, written)
        return
    if not recipe_file.exists():
        existing = next((file for file in (*written, kept) if file.exists()), None)
        if existing is not None:
            raise RecipeError(f"{existing} exists, but the folder has no recipe.yaml; give the run an empty folder")
    else:
        if not resume:
            raise RecipeError(f"{folder} already holds a run; resume it, or overwrite it to start again")
        old_recipe = Recipe.load(recipe_file)
        changed = [key for key in _TRAINED_BY if _deciding(old_recipe, key) != _deciding(recipe, key)]
        if changed:
            raise RecipeError(
                f"{folder} was trained with a recipe that differs in {', '.join(changed)}; give the run another name, or "
                "overwrite this run to start again"
            )
        if any(file.exists() for file in written):
            Sources.of(recipe).require_same(recipe, kept)


def _written(folder: Path) -> tuple[Path, ...]:
    """Return the files that a run in a folder may have written, but for its recipe, its sources and its logs."""
    checkpoints = (file for file in (folder / "checkpoints").glob("*.pt") if (place_of(file) or ("",))[0] in _PHASES)
    return (*checkpoints, *(folder / name for name in _WRITTEN))


def _remove_leftovers(folder: Path) -> None:
    """Remove the temporary files of a process that was killed while it wrote to the folder of a run."""
    checkpoints = (f"checkpoints/.{name}.*.part" for name in ("*-[0-9][0-9][0-9][0-9]*.pt", "sources.json"))
    for pattern in (*checkpoints, *(f".{name}.*.part" for name in _WRITTEN)):
        for leftover in folder.glob(pattern):
            leftover.unlink(missing_ok=True)


def _require_apart(recipe: Recipe, written: Sequence[Path]) -> None:
    """Raise `RecipeError` if a file that is about to be deleted is an input of the recipe."""
    to_delete = {file.resolve() for file in written}
    for key, name in recipe.files():
        if Path(name).resolve() in to_delete:
            raise RecipeError(f"{key}: {name} belongs to the run that would be overwritten; give the new run another folder")


def _deciding(recipe: Recipe, key: str) -> Any:
    """Return what a recipe has for a key, without `cuda_graph`, which does not change what is trained."""
    if key == "train":
        return recipe.train.model_copy(update={"cuda_graph": False})
    return recipe.model_dump(mode="json", include={key})  # as it is written: a saved recipe has no other types
