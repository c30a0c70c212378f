"""`tensorrail.package`: a model as a serving system takes it."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tensorrail.models import as_file
from tensorrail_runtime.sessions.inputs import Shapes
from tensorrail_runtime.triton.package import Package, Serving
from tensorrail_runtime.triton.package import package as write_package


@dataclass(frozen=True)
class Repository:
    """What is written into a model repository, beside the model itself."""

    name: str | None = None
    """The model's name; default: that of its file."""
    dense: Path | str | None = None
    """The dense model, as version 1; the model is version 2."""
    separate: bool = False
    """Two models, NAME and NAME-dense, in place of two versions."""
    shapes: Shapes | None = None
    """Shapes of inputs by name, for the check of answers in a batch."""
    tolerance: float = 1e-3
    """Largest relative L2 difference of an answer in a batch from a single one."""
    overwrite: bool = False
    """Replace the model of that name."""


def package(
    model: Any,  # a path, a ModelProto, or (module, example inputs)
    triton: Path | str,
    *,
    contents: Repository | None = None,
    serving: Serving | None = None,
) -> Package:
    """Write a model into a Triton model repository: config.pbtxt from the graph, the model and its external data.

    Args:
        model: a path, an `onnx.ModelProto`, or (torch module, example inputs).
        triton: Triton's model repository; other models in it stay.
        contents: names, versions and the dense model beside it.
        serving: batching, instances and how models run in Triton.

    Returns:
        What was written; `print(report)` shows the tensors of each model.

    Raises:
        ModelError: the model cannot be packaged as asked; nothing is written.

    """
    contents = contents or Repository()
    with as_file(model, contents.name or "model") as path:
        return write_package(
            path,
            Path(triton),
            name=contents.name,
            dense=contents.dense,
            separate=contents.separate,
            serving=serving,
            shapes=contents.shapes or {},
            tolerance=contents.tolerance,
            overwrite=contents.overwrite,
        )
