"""The options that several commands share."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

Json = Annotated[Path | None, typer.Option("--json", metavar="FILE", help="Write the record behind the table as JSON.")]
Provider = Annotated[str, typer.Option(help="ONNX Runtime execution provider: cpu or cuda.")]
Folder = Annotated[Path | None, typer.Option("--folder", help="Run folder; default runs/<the recipe's name>.")]
Resume = Annotated[bool, typer.Option("--resume", help="Go on from the last finished epoch of an interrupted run.")]
Overwrite = Annotated[bool, typer.Option("--overwrite", help="Remove the run that is in the folder and start anew.")]
RecipeFile = Annotated[Path, typer.Argument(metavar="RECIPE.yaml", help="What to train, and how.")]
