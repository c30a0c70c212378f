"""`tensorrail run`: the whole job of a recipe."""

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
    """Carry out a recipe: train, compress, export, check, time and report. Exit code 1 if a target is missed."""
    from pathlib import Path

    from tensorrail.verbs.run import run

    require_apart(json, recipe)
    with progress_bar(stays=True) as progress:
        report = run(recipe, folder, resume=resume, overwrite=overwrite, progress=progress, track=tuple(track or ()))
    if report is None:  # one of several processes, and not the first
        return
    target = folder or Path("runs") / report.name
    finish(report, json, report.holds, f"The run is in {target}; open {target / 'report.html'}")
