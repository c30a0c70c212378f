"""`tensorrail run`: the whole job of a recipe."""

from __future__ import annotations

import typer

from tensorrail.options import Folder, Json, Overwrite, RecipeFile, Resume
from tensorrail.show import progress, say, say_projections, table


def command(
    recipe: RecipeFile, folder: Folder = None, resume: Resume = False, overwrite: Overwrite = False, json: Json = None
) -> None:
    """Train, compress, export, check, bench and report. Exit code 1 when a target of the recipe is missed."""
    from pathlib import Path

    from tensorrail_trainer.recipes.recipe import Recipe
    from tensorrail_trainer.run.pipeline import make_accelerator, run

    read = Recipe.load(recipe)
    target = folder or Path("runs") / read.name
    accelerator = make_accelerator(read)
    with progress(shown=accelerator.is_main_process) as listener:
        report = run(
            read,
            target,
            resume=resume,
            overwrite=overwrite,
            progress=listener,
            command=f"tensorrail run {recipe}",
            accelerator=accelerator,
        )
    if report is None:  # one of several processes, and not the first
        return
    table(report.name, report.head(), report.table())
    table("three errors", ("error", "measured"), report.errors())
    rows = [(c.name, c.target, c.measured, "yes" if c.holds else "NO") for c in report.checks]
    table("targets", ("target", "asked", "measured", "holds"), rows)
    say_projections(report.training)
    say(f"The run is in {target}; open {target / 'report.html'}")
    if json is not None:
        report.save(json)
    raise typer.Exit(0 if report.holds else 1)
