"""Conv(X, W, B) -> Conv(… Conv(Conv(X, W₁), W₂) …, Wₙ, B)."""

from __future__ import annotations

import numpy as np
import onnx_graphsurgeon as gs

from tensorrail_exporter.formats.contraction import LayerSpec, Reshape, Step
from tensorrail_exporter.rewrite.rules.emit import Site

OPS: tuple[str, ...] = ("Conv",)


def weight_input(node: gs.Node) -> int:
    """Return 1: the second input is the weight."""
    return 1


def why_not(node: gs.Node) -> str | None:
    """Return the reason why this convolution stays dense, or None."""
    weight = node.inputs[1]
    if not isinstance(weight, gs.Constant):
        return f"its weight {weight.name!r} is computed in the graph, not a constant"
    if len(weight.shape) < 3:
        return f"expected a weight of shape (outputs, inputs, *kernel), got {list(weight.shape)}"
    axes = len(weight.shape) - 2
    for name, count in (("strides", axes), ("dilations", axes), ("pads", 2 * axes), ("output_padding", axes)):
        if len(node.attrs.get(name, (0,) * count)) != count:
            return f"expected {count} {name} for a kernel of {axes} axes, got {list(node.attrs[name])}"
    for name in ("strides", "dilations"):
        if min(node.attrs.get(name, (1,)), default=1) < 1:
            return f"expected {name} of 1 or more, got {list(node.attrs[name])}"
    group = node.attrs.get("group", 1)
    if group != 1 and weight.shape[1] == 1:
        return f"it is a depthwise convolution (group={group}), of one input channel per group; leave it out of the plan"
    if group < 1 or weight.shape[0] % group:
        got = f"got {weight.shape[0]} outputs with group={group}"
        return f"expected outputs that are a multiple of its groups, {got}; leave it out of the plan"
    return None


def layer(node: gs.Node) -> LayerSpec:
    """Return the convolution's shape, stride, pads, dilation and groups, with ONNX's defaults for missing attributes."""
    shape = tuple(node.inputs[1].shape)
    nd = len(shape) - 2
    auto_pad = node.attrs.get("auto_pad", "NOTSET")
    axes = node.inputs[0].shape or ()
    return LayerSpec(
        "conv",
        shape,
        stride=tuple(node.attrs.get("strides", (1,) * nd)),
        pads=tuple(node.attrs.get("pads", (0,) * (2 * nd))),
        dilation=tuple(node.attrs.get("dilations", (1,) * nd)),
        auto_pad=auto_pad.decode() if isinstance(auto_pad, bytes) else auto_pad,
        size=tuple(axis if isinstance(axis, int) and axis > 0 else 0 for axis in axes[2:]),
        groups=node.attrs.get("group", 1),
    )


def weight(node: gs.Node) -> np.ndarray:
    """Return the weight (O, I, *K)."""
    return np.asarray(node.inputs[1].values)


def replace_weight(node: gs.Node, weight: np.ndarray, name: str) -> None:
    """Replace the node's weight by a new constant (O, I, *K)."""
    node.inputs[1] = gs.Constant(name, np.ascontiguousarray(weight))


def rewrite(site: Site, steps: tuple[Step, ...], layer: str) -> None:
    """Write the steps; the bias goes into the last convolution, or into an Add if the last step is a Reshape."""
    node = site.node
    dtype = node.inputs[1].dtype
    bias = node.inputs[2] if len(node.inputs) > 2 and not node.inputs[2].is_empty() else None
    target = node.outputs[0]
    node.outputs.clear()
    if bias is None or not isinstance(steps[-1], Reshape):
        nodes = site.chain(node.inputs[0], target, steps, layer, dtype)
        if bias is not None:
            nodes[-1].inputs.append(bias)
        return
    spatial = len(node.inputs[1].shape) - 2
    before, column = site.variable(f"{layer}/before_bias", dtype), site.variable(f"{layer}/bias_column", dtype)
    site.chain(node.inputs[0], before, steps, layer, dtype)
    shape = site.constant(f"{layer}/bias_shape", np.array([-1, *(1,) * spatial], np.int64))
    site.append("Reshape", f"{layer}/bias", [bias, shape], column)
    site.append("Add", f"{layer}/add", [before, column], target)
