"""Which variants of the operators a fit does not run, and why: found when a graph is read, not when it is half run."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import onnx

from tensorrail_trainer.fit.node import DTYPES, Node

_SINGLE = onnx.defs.OpSchema.FormalParameterOption.Single


def why_not(node: Node) -> str | None:
    """Return the reason why a node of one of the `OPERATORS` cannot be run, or None."""
    if why := _misfit(node):
        return why
    if any(node.outputs[1:]) and node.op not in ("Dropout", "GRU", "LSTM", "Split"):
        return f"only its first output can be computed, and {', '.join(filter(None, node.outputs))} are used"
    return WHY_NOT[node.op](node) if node.op in WHY_NOT else None


def _misfit(node: Node) -> str | None:
    """Return how a node differs from what ONNX says of its operator in this opset, or None."""
    try:
        schema = onnx.defs.get_schema(node.op, node.opset, "")
    except onnx.defs.SchemaError:
        return f"no such operator in opset {node.opset}"
    if unknown := node.attributes.keys() - schema.attributes.keys():
        return f"unknown attribute {min(unknown)!r} in opset {node.opset}"
    if absent := {name for name, attribute in schema.attributes.items() if attribute.required} - node.attributes.keys():
        return f"its attribute {min(absent)!r} is missing"
    if not schema.min_input <= len(node.inputs) <= schema.max_input:
        return f"{len(node.inputs)} inputs came, expected {schema.min_input} to {schema.max_input} in opset {node.opset}"
    inputs = zip(schema.inputs, node.inputs, strict=False)
    if absent := {single.name for single, name in inputs if not name and single.option == _SINGLE}:
        return f"its input {min(absent)!r} is missing"
    if not schema.min_output <= len(node.outputs) <= schema.max_output:
        return f"{len(node.outputs)} outputs came, expected {schema.min_output} to {schema.max_output} in opset {node.opset}"
    return None


def _recurrent(node: Node) -> str | None:
    default = {"LSTM": ["Sigmoid", "Tanh", "Tanh"], "GRU": ["Sigmoid", "Tanh"]}[node.op]
    direction = node.get("direction", "forward")
    if direction not in ("forward", "reverse", "bidirectional"):
        return f"its direction is {direction!r}, expected 'forward', 'reverse' or 'bidirectional'"
    directions = 2 if direction == "bidirectional" else 1
    if node.get("activations", default * directions) != default * directions:
        return f"its activations are {node.attributes['activations']}, and only {default} can be run"
    for name in ("clip", "input_forget", "layout"):
        if node.get(name, 0):
            return f"its attribute {name} is {node.attributes[name]}, and only 0 can be run"
    for index, name in ((4, "sequence_lens"), (7, "P")):
        if len(node.inputs) > index and node.inputs[index]:
            return f"it has the input {name}, which no fit runs"
    return None


def _broadcast(node: Node) -> str | None:
    if node.opset < 7 and "axis" in node.attributes:
        return "it broadcasts along an axis as before opset 7; convert the model with onnx.version_converter"
    return None


def _only(name: str, *values: Any) -> Callable[[Node], str | None]:
    """Return a check that an attribute is left out or has one of the values."""

    def check(node: Node) -> str | None:
        value = node.get(name, values[0])
        return None if value in values else f"its attribute {name} is {value!r}, expected {' or '.join(map(repr, values))}"

    return check


def _one_value(node: Node) -> str | None:
    known = ("value", "value_float", "value_floats", "value_int", "value_ints")
    came = ", ".join(node.attributes) or "none"
    return (
        None
        if len(node.attributes) == 1 and came in known
        else f"its attributes are {came}, expected one of {', '.join(known)}"
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
    "Cast": lambda node: None if node.get("to") in DTYPES else f"it casts to the type {node.get('to')}, which no fit computes",
    "Constant": _one_value,
    "ConvTranspose": _all(
        _only("auto_pad", "NOTSET", "VALID"),
        lambda node: "it has an output_shape, which no fit runs" if "output_shape" in node.attributes else None,
    ),
    "Gelu": _only("approximate", "none", "tanh"),
    "LRN": lambda node: None if node.attributes["size"] % 2 else "its size is even, which torch centres otherwise",
    "Pad": _only("mode", "constant", "reflect", "edge", "wrap"),
}
"""Variants of the operators that are refused, and why."""
