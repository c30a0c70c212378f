"""Shows where two graphs diverge: the approximation error and the numerical error at the output of every planned layer.

The output of a planned layer has the same name in the dense graph, in the graph with reconstructed weights and in the factored
graph, so it can be made an output of all three and compared. Both errors accumulate over the network up to that layer.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np
import onnx

from tensorrail_exporter.graphs.io import save_model
from tensorrail_exporter.plans.cores import Cores
from tensorrail_exporter.plans.plan import Plan
from tensorrail_exporter.rewrite.resolve import ResolvedPlan, resolve
from tensorrail_exporter.rewrite.rewriter import with_cores
from tensorrail_runtime.graphs.tap import with_outputs
from tensorrail_runtime.measure.parity import LayerError, Tolerances, compare
from tensorrail_runtime.scratch import scratch
from tensorrail_runtime.sessions.session import Session, open_session, run


def layer_errors(
    dense: onnx.ModelProto,
    factored: onnx.ModelProto,
    plan: Plan,
    cores: Cores,
    feeds: Sequence[Mapping[str, np.ndarray]],
    settings: Session | None = None,
) -> tuple[LayerError, ...]:
    """Return the approximation error and the numerical error at the output of every planned layer.

    Args:
        dense: the dense graph.
        factored: the factored graph.
        plan: the planned layers.
        cores: the cores of each planned layer, by name.
        feeds: batches of the network's inputs by name.
        settings: how the graphs run; default: the CPU provider.

    Returns:
        One row per layer in the order of the graph, with relative L2 errors; None for a layer in the body of a node, whose
        output cannot be compared.

    Raises:
        GraphError: a planned layer is not in the dense graph or cannot be rewritten.
        PlanError: modes, ranks or cores do not fit the weight.

    """
    return errors_of(resolve(dense, plan), factored, cores, feeds, settings)


def errors_of(
    resolved: ResolvedPlan,
    factored: onnx.ModelProto,
    cores: Cores,
    feeds: Sequence[Mapping[str, np.ndarray]],
    settings: Session | None = None,
) -> tuple[LayerError, ...]:
    """Do the same as `layer_errors` for a plan that was resolved in the dense graph."""
    tensors = _outputs(resolved)
    graphs = [resolved.model, with_cores(resolved, cores), factored]
    shown = [set(tensors.values()) & _tensors(graph) for graph in graphs]
    values = []
    with scratch() as folder:
        for number, (graph, names) in enumerate(zip(graphs, shown, strict=True)):
            path = Path(folder) / f"{number}.onnx"
            save_model(with_outputs(graph, sorted(names)), path)
            session = open_session(path, settings=settings)
            values.append([run(session, feed) for feed in feeds])
    rows = []
    for layer, tensor in tensors.items():
        errors = []
        for k in (0, 1):
            in_both = tensor in shown[k] and tensor in shown[k + 1]
            before, after = ([outs[tensor] for outs in values[j]] if in_both else [] for j in (k, k + 1))
            errors.append(compare(tensor, before, after, Tolerances()).relative_l2 if in_both else None)
        rows.append(LayerError(layer=layer, tensor=tensor, approximation=errors[0], numerical=errors[1]))
    return tuple(rows)


def _outputs(resolved: ResolvedPlan) -> dict[str, str]:
    """Return the output tensor of each layer's first node by layer name, in the order of the graph."""
    order = {output: index for index, node in enumerate(resolved.model.graph.node) for output in node.output}
    tensor_of_layer = {
        name: next(tensor.name for tensor in layer.sites[0].node.outputs if not tensor.is_empty())
        for name, layer in resolved.layers.items()
    }
    return dict(sorted(tensor_of_layer.items(), key=lambda item: order.get(item[1], len(order))))


def _tensors(model: onnx.ModelProto) -> set[str]:
    return {output for node in model.graph.node for output in node.output}
