"""The variants of operators that the fit does not support, with the reason. They are detected when a graph is read."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import onnx

from tensorrail_trainer.fit.node import DTYPES, Node

_SINGLE = onnx.defs.OpSchema.FormalParameterOption.Single


def why_not(node: Node) -> str | None:
    """Return the reason why a node of one of the `OPERATORS` is not supported, or None if it is."""
    if why := _schema_violation(node):
        return why
    if any(node.outputs[1:]) and node.op not in ("Dropout", "GRU", "LSTM", "Split"):
        return f"only its first output can be computed, but the graph uses {', '.join(filter(None, node.outputs))}"
    return WHY_NOT[node.op](node) if node.op in WHY_NOT else None


def _schema_violation(node: Node) -> str | None:
    """Return how a node violates the schema of its operator in this opset, or None if it is valid."""
    try:
        schema = onnx.defs.get_schema(node.op, node.opset, "")
    except onnx.defs.SchemaError:
        return f"opset {node.opset} has no such operator"
    if unknown := node.attributes.keys() - schema.attributes.keys():
        return f"attribute {min(unknown)!r} does not exist in opset {node.opset}"
    if absent := {name for name, attribute in schema.attributes.items() if attribute.required} - node.attributes.keys():
        return f"attribute {min(absent)!r} is missing"
    if not schema.min_input <= len(node.inputs) <= schema.max_input:
        return f"expected {schema.min_input} to {schema.max_input} inputs in opset {node.opset}, got {len(node.inputs)}"
    inputs = zip(schema.inputs, node.inputs, strict=False)
    if absent := {parameter.name for parameter, name in inputs if not name and parameter.option == _SINGLE}:
        return f"input {min(absent)!r} is missing"
    if not schema.min_output <= len(node.outputs) <= schema.max_output:
        return f"expected {schema.min_output} to {schema.max_output} outputs in opset {node.opset}, got {len(node.outputs)}"
    return None


def _recurrent(node: Node) -> str | None:
    default = {"LSTM": ["Sigmoid", "Tanh", "Tanh"], "GRU": ["Sigmoid", "Tanh"]}[node.op]
    direction = node.get("direction", "forward")
    if direction not in ("forward", "reverse", "bidirectional"):
        return f"expected direction 'forward', 'reverse' or 'bidirectional', got {direction!r}"
    directions = 2 if direction == "bidirectional" else 1
    if node.get("activations", default * directions) != default * directions:
        return f"expected the default activations {default}, got {node.attributes['activations']}"
    for name in ("clip", "input_forget", "layout"):
        if node.get(name, 0):
            return f"expected {name}=0, got {node.attributes[name]}"
    for index, name in ((4, "sequence_lens"), (7, "P")):
        if len(node.inputs) > index and node.inputs[index]:
            return f"input {name} is not supported"
    return None


def _broadcast(node: Node) -> str | None:
    if node.opset < 7 and "axis" in node.attributes:
        return "broadcasting along an axis (before opset 7) is not supported; convert the model with onnx.version_converter"
    return None


def _only(name: str, *values: Any) -> Callable[[Node], str | None]:
    """Return a check that an attribute is absent or has one of the values."""

    def check(node: Node) -> str | None:
        value = node.get(name, values[0])
        return None if value in values else f"expected {name} to be {' or '.join(map(repr, values))}, got {value!r}"

    return check


def _one_value(node: Node) -> str | None:
    known = ("value", "value_float", "value_floats", "value_int", "value_ints")
    actual = ", ".join(node.attributes) or "none"
    return (
        None
        if len(node.attributes) == 1 and actual in known
        else f"expected exactly one attribute of {', '.join(known)}, got {actual}"
    )


def _all(*checks: Callable[[Node], str | None]) -> Callable[[Node], str | None]:
    return lambda node: next((why for check in checks if (why := check(node))), None)


_AUTO_PAD = _only("auto_pad", "NOTSET", "VALID", "SAME_UPPER", "SAME_LOWER")

WHY_NOT: dict[str, Callable[[Node], str | None]] = {
    **dict.fromkeys(("Add", "Sub", "Mul", "Div", "Pow", "PRelu"), _broadcast),
    **dict.fromkeys(("LSTM", "GRU"), _recurrent),
    **dict.fromkeys(("Conv", "MaxPool"), _AUTO_PAD),
    "AveragePool": _all(_AUTO_PAD, lambda node: _only("dilations", [1] * len(node.get("dilations", [])))(node)),
    "BatchNormalization": _all(_only("training_mode", 0), _only("spatial", 1)),
    "Cast": lambda node: None if node.get("to") in DTYPES else f"casting to type {node.get('to')} is not supported",
    "Constant": _one_value,
    "ConvTranspose": _all(
        _only("auto_pad", "NOTSET", "VALID"),
        lambda node: "attribute output_shape is not supported" if "output_shape" in node.attributes else None,
    ),
    "Gelu": _only("approximate", "none", "tanh"),
    "LRN": lambda node: None if node.attributes["size"] % 2 else f"expected an odd size, got {node.attributes['size']}",
    "Pad": _only("mode", "constant", "reflect", "edge", "wrap"),
}
"""For each operator with unsupported variants, a function that returns the reason, or None."""
