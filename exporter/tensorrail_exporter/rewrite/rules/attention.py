"""Attention(X, W, B, M) -> MultiHeadAttention(Split(… MatMul(MatMul(X, W₁), W₂) …), B, M), both of com.microsoft.

W holds the weights of query, key and value side by side, as `onnxruntime.transformers` writes them. The steps compute all three
at once; the attention itself stays one fused operator, with the same bias, mask, scale and direction. A Split hands over its
parts: ONNX Runtime's CPU kernel takes no query, key and value in one tensor.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import onnx_graphsurgeon as gs

from tensorrail_exporter.formats.contraction import LayerSpec, Step
from tensorrail_exporter.rewrite.rules.emit import Site
from tensorrail_runtime.graphs.operators import CONTRIB

OPS: tuple[str, ...] = (f"{CONTRIB}:Attention",)

BIAS, MASK, PAST, ADDED, PAST_LENGTH = range(2, 7)  # indices of the node's inputs
_SAME = ("mask_filter_value", "num_heads", "scale", "unidirectional")  # attributes that both operators have
_IGNORED = ("qkv_hidden_sizes", "rotary_embedding_dim")  # which parts to split; of no effect without do_rotary
_LEAVE = "leave it out of the plan"
_OTHERS = {"do_rotary": "it rotates queries and keys (do_rotary)", "past_present_share_buffer": "it keeps past keys and values"}


def weight_input(node: gs.Node) -> int:
    """Return 1: the second input is the weight."""
    return 1


def why_not(node: gs.Node) -> str | None:
    """Return the reason why the products of this attention stay dense, or None."""
    weight = node.inputs[1]
    if not isinstance(weight, gs.Constant):
        return f"its weight {weight.name!r} is computed in the graph, not a constant"
    if len(weight.shape) != 2:
        return f"expected a matrix as its weight, got shape {list(weight.shape)}; {_LEAVE}"
    sizes = sizes_of(node)
    if len(sizes) != 3 or sum(sizes) != weight.shape[1] or sizes[0] != sizes[1]:
        expected = f"expected a weight (inputs, query + key + value), got shape {list(weight.shape)}"
        return f"{expected} for hidden sizes {sizes}; {_LEAVE}"
    present = len(node.outputs) > 1 and not node.outputs[1].is_empty()
    if present or given(node, PAST) is not None or given(node, PAST_LENGTH) is not None:
        return f"it keeps past keys and values, which MultiHeadAttention takes in another form; {_LEAVE}"
    for name, value in node.attrs.items():
        if name not in (*_SAME, *_IGNORED) and value:
            return f"{_OTHERS.get(name, f'it has the attribute {name}')}, which MultiHeadAttention does not; {_LEAVE}"
    return _why_not_mask(node)


def layer(node: gs.Node) -> LayerSpec:
    """Return a linear layer of shape (query + key + value, I), whose input (B, S, I) has tokens."""
    inputs, outputs = node.inputs[1].shape
    axes = node.inputs[0].shape or (0, 0, 0)
    return LayerSpec("linear", (outputs, inputs), lead=2, size=(axes[1] if isinstance(axes[1], int) else 0,))


def weight(node: gs.Node) -> np.ndarray:
    """Return the weight (query + key + value, I)."""
    return np.asarray(node.inputs[1].values).T


def replace_weight(node: gs.Node, weight: np.ndarray, name: str) -> None:
    """Replace the node's weight by a new constant, given as (query + key + value, I)."""
    node.inputs[1] = gs.Constant(name, np.ascontiguousarray(weight.T))


def rewrite(site: Site, steps: tuple[Step, ...], layer: str) -> None:
    """Write the steps, a Split into query, key and value, and the attention of these."""
    node = site.node
    dtype, target = np.dtype(node.inputs[1].dtype), node.outputs[0]
    node.outputs.clear()
    product = site.variable(f"{layer}/product", dtype)
    site.chain(node.inputs[0], product, steps, layer, dtype)
    parts = site.split(product, sizes_of(node), 2, f"{layer}/qkv", dtype)
    others = [given(node, place) for place in (BIAS, MASK, ADDED)]
    while others and others[-1] is None:
        others.pop()
    inputs = [*parts, *(gs.Variable.empty() if tensor is None else tensor for tensor in others)]
    attrs = {name: node.attrs[name] for name in _SAME if name in node.attrs}
    name = site.names.unique(f"{layer}/attention")
    site.graph.nodes.append(gs.Node("MultiHeadAttention", name, attrs, inputs, [target], domain=CONTRIB))


def given(node: gs.Node, place: int) -> gs.Tensor | None:
    """Return an input, None if the node does not have it."""
    return node.inputs[place] if place < len(node.inputs) and not node.inputs[place].is_empty() else None


def sizes_of(node: gs.Node) -> list[int]:
    """Return the numbers of outputs of query, key and value."""
    return list(node.attrs.get("qkv_hidden_sizes", ())) or [node.inputs[1].shape[1] // 3] * 3


def _why_not_mask(node: gs.Node) -> str | None:
    """Return why MultiHeadAttention does not take the node's mask; None if it does, or if there is none."""
    mask, data = given(node, MASK), node.inputs[0].shape or (None,) * 3
    if mask is None:
        return None
    if mask.shape is None:
        return f"the number of axes of its mask {mask.name!r} is unknown: give the shapes of the inputs"
    match list(mask.shape):
        case [count]:
            if not (_same(count, data[0]) or _holds_lengths(mask)):
                return (
                    f"its mask {mask.name!r} of shape {[count]} is not known to hold one length for each sample: name the "
                    f"mask's axis like the batch of {node.inputs[0].name!r}, or {_LEAVE}"
                )
        case [_, 1] if data[1] != 1:
            return (
                f"its mask {mask.name!r} has one value for each sample, which MultiHeadAttention does not take: give it the "
                f"shape (batch, tokens), or {_LEAVE}"
            )
        case [_, _] | [_, _, _]:
            pass
        case axes:
            return (
                f"its mask {mask.name!r} has {len(axes)} axes, and MultiHeadAttention takes 1 to 3: give it the shape (batch, "
                f"tokens), or {_LEAVE}"
            )
    return None


def _same(one: object, other: object) -> bool:
    """Return whether two sizes of axes are known to be equal: by number or by name."""
    return one == other and one not in (None, "")


def _holds_lengths(mask: gs.Tensor) -> bool:
    """Return whether a mask with one axis is a sum of a mask with two, or what an EmbedLayerNormalization makes of one."""
    makers: Sequence[gs.Node] = mask.inputs
    return any(maker.op in ("ReduceSum", "EmbedLayerNormalization") for maker in makers)
