"""Models as a user has them: a file, an ONNX model in memory, or a torch module with example inputs."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

from tensorrail_runtime.errors import ModelError
from tensorrail_runtime.graphs.constants import file_fault, weight_fault
from tensorrail_runtime.graphs.reading import standardized
from tensorrail_runtime.measure.timing import Timing
from tensorrail_runtime.progress import Progress
from tensorrail_runtime.scratch import scratch
from tensorrail_runtime.sessions.inputs import open_axes

if TYPE_CHECKING:
    import onnx

Model = (
    "Path | str | onnx.ModelProto | tuple[torch.nn.Module, torch.Tensor | Sequence[torch.Tensor] | Mapping[str, torch.Tensor]]"
)
"""A file, an ONNX model, or a torch module with example inputs, as `to_onnx` takes them."""

_PROTOBUF_LIMIT = 2**31 - 2**20  # bytes of one protobuf message, with room for the graph


@contextmanager
def as_file(model: Any, name: str = "model", *, any_weights: bool = False) -> Iterator[Path]:  # Any: see `Model`
    """Yield the file of a model; one that is not a file is written to a temporary folder, and removed afterwards.

    Args:
        model: a path, an `onnx.ModelProto`, or (module, example inputs).
        name: the name of a temporary file, without its ending.
        any_weights: also take a model whose weights hold NaN; default False.

    Raises:
        ModelError: the model is none of these, or a weight cannot be computed with.

    """
    if isinstance(model, Path | str):
        if not any_weights:
            require_finite_weights(Path(model))
        yield Path(model)
        return
    import onnx

    graph = as_graph(model)
    if not any_weights and (fault := weight_fault(graph)):
        raise ModelError(fault)
    with scratch("tensorrail-") as folder:
        path = Path(folder) / f"{name}.onnx"
        onnx.save_model(graph, path, save_as_external_data=graph.ByteSize() > _PROTOBUF_LIMIT, location=f"{name}.onnx.data")
        yield path


def require_finite_weights(path: Path) -> None:
    """Raise `ModelError` for a file with a weight that cannot be computed with, such as one that holds NaN."""
    if fault := file_fault(path):
        raise ModelError(f"{path}: {fault}")


def as_graph(model: Any) -> onnx.ModelProto:  # Any: see `Model`
    """Return the ONNX model of a path, an ONNX model or (module, example inputs); needs the extra `export` for a path."""
    import onnx

    if isinstance(model, onnx.ModelProto):
        standard = onnx.ModelProto()
        standard.CopyFrom(model)
        return standard if standardized(standard) else model
    if isinstance(model, Path | str):
        from tensorrail_exporter.graphs.io import load_model

        return load_model(model)
    if isinstance(model, tuple) and len(model) == 2:
        from tensorrail_trainer.run.export import to_onnx

        module, example = model
        return to_onnx(module, example)
    raise ModelError(
        f"expected a model as a path, an onnx.ModelProto or (torch module, example inputs), got {type(model).__name__}"
    )


def load_to_search(path: Path, timing: Timing, progress: Progress) -> onnx.ModelProto:
    """Return the model of a file, and tell which dynamic axes get the batch size without being named a batch."""
    from tensorrail_exporter.graphs.io import load_model
    from tensorrail_exporter.rewrite.survey import with_known_axes

    graph = load_model(path)
    if fault := weight_fault(graph):
        raise ModelError(f"{path}: {fault}")
    for line in open_axes(graph, timing.shapes):
        progress("note", 1.0, f"warning: {line}")
    return with_known_axes(graph, timing.batch, timing.shapes, timing.values)
