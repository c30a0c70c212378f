"""`tensorrail.inspect`: the layers of a model, what each costs on paper, and where each really runs."""

from __future__ import annotations

from typing import Any

from tensorrail.models import as_file
from tensorrail.options import Options
from tensorrail_runtime.graphs.cost import GraphCost, cost, file_fault
from tensorrail_runtime.measure.placement import Placement
from tensorrail_runtime.measure.placement import placement as placement_of
from tensorrail_runtime.measure.timing import Timing


def inspect(
    model: Any,  # a path, a ModelProto, or (module, example inputs)
    *,
    placement: bool = False,
    options: Options | None = None,
) -> GraphCost | Placement:
    """Return the layers with their shapes, parameters and FLOPs (2 × MACs), or where every node runs.

    Args:
        model: a path, an `onnx.ModelProto`, or (torch module, example inputs).
        placement: run the model with ONNX Runtime's profile on, and return the provider and time of every node.
        options: `timing` for the batch size and shapes, and with `placement` the `session`.

    Returns:
        A record; `print(report)` shows the table.

    Raises:
        ModelError: the model cannot be read or run.

    """
    options = options or Options()
    timing = options.timing or Timing()
    with as_file(model, any_weights=True) as path:
        if placement:
            return placement_of(path, settings=options.session, batch=timing.batch, shapes=timing.shapes)
        report = cost(path, timing.batch, timing.shapes)
        fault = file_fault(path)
        return report.model_copy(update={"notes": (*report.notes, f"warning: {fault}")}) if fault else report
