"""Writing a contraction's steps as ONNX nodes."""

from __future__ import annotations

import numpy as np
import onnx_graphsurgeon as gs

from tensorrail_exporter.contraction import Conv, MatMul, Reshape, Step


def constant(graph: gs.Graph, name: str, values: np.ndarray) -> gs.Constant:
    """Return the initializer of that name; nodes with the same cores (tied weights) share one."""
    present = graph.tensors().get(name)
    if isinstance(present, gs.Constant):
        if np.array_equal(present.values, values):
            return present
        name += "'"
    return gs.Constant(name, np.ascontiguousarray(values))


def chain(
    graph: gs.Graph, source: gs.Tensor, target: gs.Tensor, steps: tuple[Step, ...], layer: str, dtype: np.dtype
) -> list[gs.Node]:
    """Append one node a step, from `source` to `target`; initializers are named `<layer>/<cores>`, as in the cores file.

    The nodes are returned, so that a rule can give the last one a bias or an attribute of the original.
    """
    nodes: list[gs.Node] = []
    for index, step in enumerate(steps):
        last = index == len(steps) - 1
        out = target if last else gs.Variable(unique(graph, f"{layer}/step{index}"), dtype=dtype)
        node = _node(graph, step, source, out, layer, dtype)
        node.name = unique(graph, f"{layer}/{node.op.lower()}{index}")
        graph.nodes.append(node)
        nodes.append(node)
        source = out
    return nodes


def unique(graph: gs.Graph, name: str) -> str:
    """Return `name`, or the first `name_2`, `name_3`, … that no tensor or node of the graph has."""
    taken = set(graph.tensors()) | {node.name for node in graph.nodes}
    candidate, count = name, 1
    while candidate in taken:
        count += 1
        candidate = f"{name}_{count}"
    return candidate


def _node(graph: gs.Graph, step: Step, source: gs.Tensor, out: gs.Tensor, layer: str, dtype: np.dtype) -> gs.Node:
    match step:
        case Conv():
            attrs: dict[str, object] = {
                "kernel_shape": list(step.weight.shape[2:]),
                "strides": list(step.stride),
                "dilations": list(step.dilation),
                "group": step.groups,
            }
            attrs |= {"pads": list(step.pads)} if step.auto_pad == "NOTSET" else {"auto_pad": step.auto_pad}
            weight = constant(graph, f"{layer}/{_cores(step.cores)}", step.weight.astype(dtype))
            return gs.Node("Conv", attrs=attrs, inputs=[source, weight], outputs=[out])
        case MatMul():
            weight = constant(graph, f"{layer}/{_cores(step.cores)}", step.weight.astype(dtype))
            inputs = [source, weight] if step.side == "right" else [weight, source]
            return gs.Node("MatMul", inputs=inputs, outputs=[out])
        case Reshape():
            shape = constant(graph, f"{layer}/shape{'_'.join(map(str, step.shape))}", np.array(step.shape, np.int64))
            return gs.Node("Reshape", inputs=[source, shape], outputs=[out])


def _cores(cores: tuple[int, ...]) -> str:
    return "+".join(map(str, cores))
