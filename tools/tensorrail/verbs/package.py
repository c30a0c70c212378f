"""`tensorrail.package`: a model as a serving system takes it."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from tensorrail.models import as_file
from tensorrail_runtime.triton.package import Package, Repository, Serving
from tensorrail_runtime.triton.package import package as write_package


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
        return write_package(path, Path(triton), contents=contents, serving=serving)
