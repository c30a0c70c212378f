"""`tensorrail.check`: whether two models compute the same."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from tensorrail.inputs import Arrays, as_batches, timed_on
from tensorrail.models import as_file
from tensorrail.options import Options
from tensorrail_runtime.errors import UsageError
from tensorrail_runtime.measure.fusions import compared_fusions
from tensorrail_runtime.measure.parity import LayerError, Parity, Tolerances, parity
from tensorrail_runtime.measure.timing import Timing
from tensorrail_runtime.sessions.inputs import random_inputs
from tensorrail_runtime.sessions.session import open_session

if TYPE_CHECKING:
    from tensorrail_exporter.plans.plan import Plan


@dataclass(frozen=True)
class Layers:
    """Layers of a plan at which two models are compared."""

    plan: Plan | Path | str
    """The plan, or its file."""
    cores: Mapping[str, Sequence[np.ndarray]] | Path | str | None = None
    """The cores by layer, or their file; default: the reference's weights are decomposed."""


def check(
    reference: Any,  # a path, a ModelProto, or (module, example inputs)
    candidate: Any,  # likewise
    *,
    inputs: Arrays | Sequence[int] | None = None,
    tolerance: float | Tolerances | None = 1e-4,
    layers: Layers | None = None,
    options: Options | None = None,
) -> Parity:
    """Compare the outputs of two models on the same inputs.

    Args:
        reference: the model to compare with: a path, an `onnx.ModelProto`, or (torch module, example inputs).
        candidate: the model that is compared.
        inputs: an npz file, a folder or arrays by input name; or batch sizes of random inputs, default 1 and 7. States are
            those of the reference.
        tolerance: the largest relative L2 difference of any output, `Tolerances` for limits by output and element, or None.
        layers: a plan at whose layers approximation and numerical errors are measured as well; needs the extra `export`.
        options: `session`, `inputs`, and `timing` for the shapes of random inputs and the batch size that given ones are run
            with.

    Returns:
        How each output differs, and which operators ONNX Runtime fuses in one model alone; `print(report)` shows the table,
        `report.holds` says whether all outputs are within the tolerance.

    Raises:
        ModelError: a model cannot be run, or inputs or outputs differ.
        UsageError: `inputs` is empty.

    """
    options = options or Options()
    settings, timing = options.session, options.timing
    with as_file(reference, "reference") as first, as_file(candidate, "candidate") as second:
        sizes = _sizes(inputs)
        feeds: Sequence[Mapping[str, np.ndarray]]
        axes = None
        if inputs is not None and sizes is None:
            batches = as_batches(inputs, first, timing.batch if timing else 7, settings, options.inputs)
            feeds, axes = (batches.feeds, batches.axes) if batches is not None else ((), None)
        else:
            session = open_session(first, settings=settings)
            known = timed_on(timing or Timing(), first, settings, options.inputs, None)
            shapes, values = known.shapes, known.values
            drawn = sizes or ((1,) if shapes else (1, 7))
            feeds = [random_inputs(session, size, shapes=shapes, values=values) for size in drawn]
        report = parity(first, second, inputs=feeds, tolerance=tolerance, settings=settings, axes=axes)
        report = report.model_copy(update={"fusions": compared_fusions(first, second, settings)})
        if layers is None:
            return report
        return report.model_copy(update={"layers": _layer_errors(first, second, layers, feeds, options)})


def _sizes(inputs: object) -> Sequence[int] | None:
    """Return the batch sizes of random inputs, if `inputs` are these."""
    if not isinstance(inputs, Sequence) or isinstance(inputs, str):
        return None
    if not inputs:
        raise UsageError("inputs: expected inputs or batch sizes, got none: there is nothing to compare")
    return inputs if all(isinstance(size, int) for size in inputs) else None


def _layer_errors(
    reference: Path, candidate: Path, layers: Layers, feeds: Sequence[Mapping[str, np.ndarray]], options: Options
) -> tuple[LayerError, ...]:
    from tensorrail_exporter.graphs.io import load_model
    from tensorrail_exporter.plans.cores import load_cores
    from tensorrail_exporter.plans.plan import Plan
    from tensorrail_exporter.rewrite.layer_errors import layer_errors
    from tensorrail_exporter.rewrite.rewriter import decompose_graph
    from tensorrail_exporter.rewrite.survey import with_known_axes

    model = load_model(reference)
    first = feeds[0] if feeds else {}
    of_known_axes = {value.name for value in model.graph.input if value.type.tensor_type.HasField("shape")}
    shapes = {name: np.shape(array) for name, array in first.items() if name in of_known_axes}
    model = with_known_axes(model, shapes=shapes, values=first)
    plan = layers.plan if isinstance(layers.plan, Plan) else Plan.load(layers.plan)
    cores = layers.cores
    if cores is None:
        cores = decompose_graph(model, plan)
    elif isinstance(cores, Path | str):
        cores = load_cores(cores, plan)
    return layer_errors(model, load_model(candidate), plan, cores, feeds, options.session)
