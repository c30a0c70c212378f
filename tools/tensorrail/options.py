"""The options that several commands share."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer


def require_writable(out: Path | None, *inputs: Path | None) -> Path | None:
    """Return a file that is to be written; `ModelError`, before any work, where it cannot be, or is one that is read."""
    from tensorrail_runtime.errors import ModelError

    if out is None:
        return None
    if out.is_dir() or not out.parent.is_dir():
        problem = "is a folder" if out.is_dir() else "its folder is not there"
        raise ModelError(f"{out}: {problem}: expected the name of a file to be written, in a folder that is there")
    for path in inputs:
        if path is not None and path.exists() and out.exists() and out.samefile(path):
            raise ModelError(f"{out}: is read as well, and would be lost: write to another file")
    return out


def _json(path: Path | None) -> Path | None:
    from tensorrail_runtime.errors import ModelError

    if path is not None and path.suffix.lower() == ".onnx":
        raise ModelError(f"{path}: is a model's name, and JSON would be written there: give another one, such as out.json")
    return require_writable(path)


Json = Annotated[
    Path | None,
    typer.Option("--json", metavar="FILE", help="Write the record behind the table as JSON.", callback=_json),
]
Provider = Annotated[str, typer.Option(help="ONNX Runtime execution provider: cpu, cuda or tensorrt.")]
Tf32 = Annotated[bool, typer.Option("--tf32", help="Let CUDA use TF32, which changes the fourth digit.")]
Nhwc = Annotated[bool, typer.Option("--nhwc", help="Let CUDA's convolutions run with the channels last.")]
CudaGraph = Annotated[bool, typer.Option("--cuda-graph", help="Time launches as one CUDA graph, as for fixed shapes.")]
Shape = Annotated[
    list[str] | None, typer.Option("--shape", metavar="NAME=1,3,224,224", help="An input's shape; may be given again.")
]
Data = Annotated[
    Path | None,
    typer.Option("--data", metavar="FILE.npz", help="Arrays by input name, and `labels` where a metric needs them."),
]
Metric = Annotated[
    str | None,
    typer.Option("--metric", help="top1 (where none is given), top5, or module:function of (outputs, labels) → scores."),
]
Folder = Annotated[Path | None, typer.Option("--folder", help="Run folder; default runs/<the recipe's name>.")]
Resume = Annotated[bool, typer.Option("--resume", help="Go on from the last finished epoch of an interrupted run.")]
Overwrite = Annotated[bool, typer.Option("--overwrite", help="Remove the run that is in the folder and start anew.")]
RecipeFile = Annotated[Path, typer.Argument(metavar="RECIPE.yaml", help="What to train, and how.")]
