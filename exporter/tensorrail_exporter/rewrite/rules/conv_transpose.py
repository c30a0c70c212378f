"""ConvTranspose(X, W, B) -> ConvTranspose(… ConvTranspose(ConvTranspose(X, W₁), W₂) …, Wₙ, B).

The steps are those of a convolution, transposed. One with one tap and stride 1 is a Conv.
"""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import onnx_graphsurgeon as gs

from tensorrail_exporter.formats.contraction import LayerSpec, Step
from tensorrail_exporter.rewrite.rules import conv
from tensorrail_exporter.rewrite.rules.emit import Site

OPS: tuple[str, ...] = ("ConvTranspose",)


def weight_input(node: gs.Node) -> int:
    """Return 1: the second input is the weight."""
    return 1


def why_not(node: gs.Node) -> str | None:
    """Return the reason why this transposed convolution stays dense, or None."""
    if (group := node.attrs.get("group", 1)) != 1:
        return f"it is a transposed convolution with group={group}; only group=1 can be factorized; leave it out of the plan"
    if why := conv.why_not(node):
        return why
    if "output_shape" in node.attrs:
        return "its padding follows from output_shape, which is not supported: give pads and output_padding instead"
    if (auto_pad := conv.layer(node).auto_pad) not in ("NOTSET", "VALID"):
        return f"its padding follows from auto_pad={auto_pad}, which is not supported: give pads instead"
    return None


def layer(node: gs.Node) -> LayerSpec:
    """Return the shape (O, I, *K) and what a convolution has, with ONNX's defaults for missing attributes."""
    spec = conv.layer(node)
    inputs, outputs, *kernel = spec.shape
    return replace(
        spec,
        shape=(outputs, inputs, *kernel),
        transposed=True,
        output_padding=tuple(node.attrs.get("output_padding", (0,) * len(kernel))),
    )


def weight(node: gs.Node) -> np.ndarray:
    """Return the weight (O, I, *K); the node stores (I, O, *K)."""
    return np.swapaxes(np.asarray(node.inputs[1].values), 0, 1)


def replace_weight(node: gs.Node, weight: np.ndarray, name: str) -> None:
    """Replace the node's weight by a new constant, given as (O, I, *K)."""
    node.inputs[1] = gs.Constant(name, np.ascontiguousarray(np.swapaxes(weight, 0, 1)))


def rewrite(site: Site, steps: tuple[Step, ...], layer: str) -> None:
    """Write the steps; the bias goes where that of a convolution goes."""
    conv.rewrite(site, steps, layer)
