"""Names the nodes that ONNX Runtime's quantization must leave in fp32."""

from __future__ import annotations

import math
from collections.abc import Collection, Mapping

import numpy as np
import onnx
from onnx import numpy_helper

from tensorrail_exporter.precision.weights import is_row, weighted
from tensorrail_runtime.graphs.constants import constants_of
from tensorrail_runtime.graphs.files import descendants

_MOVES = ("Flatten", "MaxPool", "Reshape", "Squeeze", "Transpose", "Unsqueeze")
_JOINS = ("Add", "Concat")
INT8 = ("Conv", "Gemm", "MatMul", "Relu", "Clip", *_MOVES, *_JOINS)
"""The operators that are quantized: products; Relu and Clip, which become part of a range; operators that only move values;
sums and concatenations between convolutions. All others stay fp32: they cost little time and lose much accuracy. See also
`left_out`."""


def left_out(model: onnx.ModelProto, kept: frozenset[str]) -> set[str]:
    """Return the names of the nodes that stay fp32 because of their inputs.

    A product of two activations would round both of them. A reader of a Softmax would make the library round the output of
    the Softmax with the measured range, but the kernel that ONNX Runtime then uses computes it for another range. A sum
    outside of convolutional blocks, such as the residual stream of a transformer, has outliers that one scale cannot
    represent.
    """
    values = constants_of(model.graph)
    constants = set(values)
    read_elsewhere = {value.name for value in model.graph.output}
    widths = _widths(model)
    read_elsewhere |= {name for body in descendants(model.graph) for node in body.node for name in node.input}
    producers = {name: node for node in model.graph.node for name in node.output}
    convolutional: set[str] = set()
    out = {node.name for node in model.graph.node if any(node.name == k or node.name.startswith(f"{k}/") for k in kept)}
    for node in model.graph.node:  # in topological order
        computed = [name for name in node.input if name and name not in constants]
        before = [producers[name] for name in computed if name in producers]
        inside = len(before) == len(computed) and all(producer.name in convolutional for producer in before)
        no_constant = len(computed) == len(node.input)
        joins = node.op_type in _JOINS and no_constant
        if node.op_type == "Conv" or ((node.op_type in ("Relu", "Clip", *_MOVES) or joins) and inside):
            convolutional.add(node.name)
        elif node.op_type in _JOINS or (node.op_type in ("MatMul", "Gemm") and no_constant):
            out.add(node.name)
        if any(producer.op_type in ("Softmax", "LogSoftmax") for producer in before):
            out.add(node.name)
        if node.op_type in ("Relu", "Clip") and node.input[0] in read_elsewhere:
            out.add(node.name)  # the library would apply its range to the value that is read elsewhere, too
        if node.name in widths and not _plain_bias(node, values, widths[node.name]):
            out.add(node.name)
    return out | _not_in_ranges(model, values, read_elsewhere, out)


def _not_in_ranges(
    model: onnx.ModelProto, values: Mapping[str, onnx.TensorProto], elsewhere: Collection[str], out: set[str]
) -> set[str]:
    """Return the names of the Relu and Clip nodes that cannot become part of a range, where the library would remove them.

    A tensor that several quantized nodes read is rounded for each of them, and what else reads it, such as an output of the
    graph or a node that stays fp32, would get it without the Relu. A range includes 0, so that it cannot replace a Clip whose
    limits do not.
    """
    readers: dict[str, list[onnx.NodeProto]] = {}
    for node in model.graph.node:
        for name in node.input:
            readers.setdefault(name, []).append(node)
    found: set[str] = set()
    for node in reversed(model.graph.node):  # so that what stays fp32 is known of all readers
        if node.op_type not in ("Relu", "Clip") or node.name in out:
            continue
        reading = readers.get(node.output[0], [])
        rounding = [reader for reader in reading if reader.op_type in INT8 and reader.name not in out | found]
        others = len(rounding) < len(reading) or node.output[0] in elsewhere
        if (len(rounding) > 1 and others) or not _includes_zero(node, values):
            found.add(node.name)
    return found


def _includes_zero(node: onnx.NodeProto, constants: Mapping[str, onnx.TensorProto]) -> bool:
    """Return whether 0 lies between the limits of a Clip, as far as they are known; of a Relu it does."""
    if node.op_type == "Relu":
        return True
    limits = []
    for place, key, default in ((1, "min", -math.inf), (2, "max", math.inf)):
        if len(node.input) <= place or not node.input[place]:
            limits.append(next((attribute.f for attribute in node.attribute if attribute.name == key), default))
        elif (stored := constants.get(node.input[place])) is not None:
            limits.append(float(numpy_helper.to_array(stored).reshape(-1)[0]))
        else:
            return False
    return limits[0] <= 0 <= limits[1]


def _widths(model: onnx.ModelProto) -> dict[str, int]:
    """Return the number of outputs of every Gemm whose second operand is its weight, by the name of the node."""
    return {w.node.name: w.values.shape[w.axis] for w in weighted(model) if w.node.op_type == "Gemm" and w.place == 1}


def _beta(node: onnx.NodeProto) -> float:
    return float(next((attribute.f for attribute in node.attribute if attribute.name == "beta"), 1.0))


def _plain_bias(node: onnx.NodeProto, constants: Mapping[str, onnx.TensorProto], width: int) -> bool:
    """Return whether a Gemm adds a vector with `beta` 1: the library supports no other bias, and puts `beta` in its scale."""
    if len(node.input) < 3 or not node.input[2]:
        return True
    stored = constants.get(node.input[2])
    return _beta(node) == 1.0 and (stored is None or tuple(stored.dims) == (width,))


def with_plain_biases(model: onnx.ModelProto) -> None:
    """Replace the bias of every Gemm that adds the same constant to all rows by a vector, multiplied by `beta`."""
    constants, widths = constants_of(model.graph), _widths(model)
    for node in model.graph.node:
        width = widths.get(node.name, 0)
        if not width or _plain_bias(node, constants, width):
            continue
        beta, stored = _beta(node), constants.get(node.input[2])
        if beta == 0:
            del node.input[2]
        elif stored is not None and (math.prod(stored.dims) == 1 or is_row(stored, width)):
            vector = np.broadcast_to(numpy_helper.to_array(stored).reshape(-1) * np.float32(beta), width)
            name = f"{node.name}/bias_once"
            model.graph.initializer.append(numpy_helper.from_array(np.ascontiguousarray(vector), name))
            node.input[2] = name
        else:
            continue
        kept = [attribute for attribute in node.attribute if attribute.name != "beta"]
        del node.attribute[:]
        node.attribute.extend(kept)
