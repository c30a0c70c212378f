"""Where two graphs part: the approximation and the numerical error at every planned layer's output.

The dense graph, the graph with reconstructed weights and the factored graph name the output of a planned layer alike, so it
can be made an output of all three and compared. Both errors are of the whole network up to there, not of the layer alone.
"""

from __future__ import annotations

import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np
import onnx

from tensorrail_exporter.graphs.io import save_model
from tensorrail_exporter.graphs.tap import with_outputs
from tensorrail_exporter.plans.cores import Cores
from tensorrail_exporter.plans.plan import Plan
from tensorrail_exporter.rewrite.resolve import ResolvedPlan, resolve
from tensorrail_exporter.rewrite.rewriter import with_cores
from tensorrail_runtime.measure.parity import LayerError, Tolerances, compare
from tensorrail_runtime.sessions.session import Session, open_session, run


def layer_errors(
    dense: onnx.ModelProto,
    factored: onnx.ModelProto,
    plan: Plan,
    cores: Cores,
    feeds: Sequence[Mapping[str, np.ndarray]],
    settings: Session | None = None,
) -> tuple[LayerError, ...]:
    """Return the two errors at every planned layer, in the graph's order; layers in the body of a node have no tensor here."""
    return errors_of(resolve(dense, plan), factored, cores, feeds, settings)


def errors_of(
    resolved: ResolvedPlan,
    factored: onnx.ModelProto,
    cores: Cores,
    feeds: Sequence[Mapping[str, np.ndarray]],
    settings: Session | None = None,
) -> tuple[LayerError, ...]:
    """Do what `layer_errors` does for a plan that was resolved in the dense model."""
    tensors = _outputs(resolved)
    graphs = [resolved.model, with_cores(resolved, cores), factored]
    shown = [set(tensors.values()) & _tensors(graph) for graph in graphs]
    values = []
    with tempfile.TemporaryDirectory() as folder:
        for number, (graph, names) in enumerate(zip(graphs, shown, strict=True)):
            path = Path(folder) / f"{number}.onnx"
            save_model(with_outputs(graph, sorted(names)), path)
            session = open_session(path, settings=settings)
            values.append([run(session, feed) for feed in feeds])
    found = []
    for layer, tensor in tensors.items():
        errors = []
        for k in (0, 1):
            known = tensor in shown[k] and tensor in shown[k + 1]
            before, after = ([outs[tensor] for outs in values[j]] if known else [] for j in (k, k + 1))
            errors.append(compare(tensor, before, after, Tolerances()).relative_l2 if known else None)
        found.append(LayerError(layer=layer, tensor=tensor, approximation=errors[0], numerical=errors[1]))
    return tuple(found)


def _outputs(resolved: ResolvedPlan) -> dict[str, str]:
    """Return the output tensor of every planned layer, in the order of the graph; of the first node of a shared weight."""
    order = {output: index for index, node in enumerate(resolved.model.graph.node) for output in node.output}
    found = {
        name: next(tensor.name for tensor in layer.sites[0].node.outputs if not tensor.is_empty())
        for name, layer in resolved.layers.items()
    }
    return dict(sorted(found.items(), key=lambda item: order.get(item[1], len(order))))


def _tensors(model: onnx.ModelProto) -> set[str]:
    return {output for node in model.graph.node for output in node.output}
