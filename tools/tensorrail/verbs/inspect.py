"""`tensorrail.inspect`: the layers of a model, what each costs on paper, and where each really runs."""

from __future__ import annotations

from typing import Any

from tensorrail.models import as_file
from tensorrail.options import Options
from tensorrail_runtime.errors import UsageError
from tensorrail_runtime.graphs.constants import file_fault
from tensorrail_runtime.graphs.cost import GraphCost, cost
from tensorrail_runtime.measure.fusions import FusedOperators, fused_operators
from tensorrail_runtime.measure.placement import Placement
from tensorrail_runtime.measure.placement import placement as placement_of
from tensorrail_runtime.measure.timing import Timing


def inspect(
    model: Any,  # a path, a ModelProto, or (module, example inputs)
    *,
    placement: bool = False,
    fusion: bool = False,
    options: Options | None = None,
) -> GraphCost | Placement | FusedOperators:
    """Return the layers with their shapes, parameters and FLOPs (2 × MACs), where nodes run, or which operators are fused.

    Args:
        model: a path, an `onnx.ModelProto`, or (torch module, example inputs).
        placement: run the model with ONNX Runtime's profile on, and return the provider and time of every node.
        fusion: count the operators that ONNX Runtime fuses from several nodes; not with `placement`.
        options: `timing` for the batch size and shapes (not with `fusion`), and with `placement` or `fusion` the `session`.

    Returns:
        A record; `print(report)` shows the table.

    Raises:
        ModelError: the model cannot be read or run.
        UsageError: both `placement` and `fusion` are asked for, or `fusion` with a batch size or shapes.

    """
    options = options or Options()
    timing = options.timing or Timing()
    if placement and fusion:
        raise UsageError("placement and fusion are two reports: ask for one of them")
    if fusion and (timing.batch != Timing.batch or timing.shapes):
        raise UsageError("operators are fused when a model is loaded: leave out the batch size and shapes")
    with as_file(model, any_weights=True) as path:
        if placement:
            return placement_of(path, settings=options.session, batch=timing.batch, shapes=timing.shapes)
        if fusion:
            return fused_operators(path, options.session)
        report = cost(path, timing.batch, timing.shapes)
        fault = file_fault(path)
        return report.model_copy(update={"notes": (*report.notes, f"warning: {fault}")}) if fault else report
