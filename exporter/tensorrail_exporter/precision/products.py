"""Products with a constant matrix or kernel, whose weights may be changed: what they read, and who else does."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import onnx
from onnx import numpy_helper

from tensorrail_exporter.precision.weights import Weighted, is_row, weighted
from tensorrail_runtime.graphs.constants import constants_of
from tensorrail_runtime.graphs.files import descendants

_PRODUCTS = ("Conv", "Gemm", "MatMul")


@dataclass(frozen=True)
class Uses:
    """Who reads the tensors of a graph."""

    readers: Mapping[str, Sequence[onnx.NodeProto]]
    """The nodes of the main graph that read each tensor, once for each input that does."""
    outer: frozenset[str]
    """The tensors that are outputs of the model, or that a body of If, Loop or Scan reads."""

    @classmethod
    def of(cls, model: onnx.ModelProto) -> Uses:
        """Return the uses of the tensors of a model."""
        readers: dict[str, list[onnx.NodeProto]] = {}
        for node in model.graph.node:
            for name in node.input:
                readers.setdefault(name, []).append(node)
        inside = {name for body in descendants(model.graph) for node in body.node for name in node.input}
        return cls(readers, frozenset({value.name for value in model.graph.output} | inside))

    def once(self, name: str) -> bool:
        """Return whether a single node of the main graph reads a tensor, and nothing else does."""
        return len(self.readers.get(name, ())) == 1 and name not in self.outer


def plain_products(model: onnx.ModelProto, uses: Uses) -> dict[str, Weighted]:
    """Return the products with a matrix or kernel in float32 whose constants no other node reads, by the name of the node."""
    constants = constants_of(model.graph)
    return {w.node.name: w for w in weighted(model) if _is_plain(w, uses, constants)}


def _is_plain(layer: Weighted, uses: Uses, constants: Mapping[str, onnx.TensorProto]) -> bool:
    node = layer.node
    if node.op_type not in _PRODUCTS or layer.values.dtype != np.float32 or not np.isfinite(layer.values).all():
        return False
    if node.op_type != "Conv" and layer.values.ndim != 2:
        return False
    if node.op_type == "Gemm" and (layer.place == 0 or any(one.name == "transA" and one.i for one in node.attribute)):
        return False
    names = [layer.weight]
    if name := bias_of(layer):
        if name not in constants or not is_row(constants[name], layer.values.shape[layer.axis]):
            return False
        names.append(name)
    return all(map(uses.once, names))


def data_of(layer: Weighted) -> str:
    """Return the name of the tensor that a product multiplies by its weight."""
    return str(layer.node.input[1 - layer.place])


def bias_of(layer: Weighted) -> str:
    """Return the name of the tensor that a product adds; empty for none."""
    node = layer.node
    return node.input[2] if node.op_type in ("Conv", "Gemm") and len(node.input) > 2 else ""


def groups_of(layer: Weighted) -> int:
    """Return the groups of a convolution; 1 for other products."""
    return next((int(one.i) for one in layer.node.attribute if one.name == "group"), 1) if layer.node.op_type == "Conv" else 1


def scale_axis(layer: Weighted) -> int | None:
    """Return the axis with one scale each; None where a weight has a single scale, on the left of a MatMul."""
    return None if layer.node.op_type == "MatMul" and layer.place == 0 else layer.axis


def write_tensor(tensor: onnx.TensorProto, values: np.ndarray) -> None:
    """Write values to a tensor, as float32."""
    tensor.CopyFrom(numpy_helper.from_array(np.ascontiguousarray(values, np.float32), tensor.name))
