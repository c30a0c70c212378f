"""Einsums of an activation and a stored tensor, written as matrix products.

torch's older exporter writes `torch.einsum` so. As a MatMul it is a layer like any other, and ONNX Runtime's quantizer takes
it. The axes that are summed are moved to the end of the activation by a Transpose, unless they are there already; several are
joined by a Reshape, and outputs divided by another.
"""

from __future__ import annotations

import math
from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import onnx
from onnx import helper, numpy_helper

from tensorrail_exporter.graphs.names import defined_names, free_name
from tensorrail_exporter.graphs.own_products import STANDARD
from tensorrail_runtime.graphs.files import bodies, descendants

_ELLIPSIS = "…"  # one label for the axes of `...`


@dataclass(frozen=True)
class _Product:
    """The labels of an Einsum that is a matrix product."""

    data: str
    weight: str
    output: str
    summed: str  # in the order of the weight
    made: str  # those that only weight and output have, in the order of the weight
    kept: str  # those that only data and output have, in the order of the output
    place: int  # of the data among the inputs

    @property
    def order(self) -> tuple[int, ...]:
        """The axes of the weight in the order of the matrix (summed, made)."""
        return tuple(self.weight.index(label) for label in self.summed + self.made)

    @property
    def is_plain(self) -> bool:
        """Whether the MatMul needs neither Transpose nor Reshape, so that the data may have any number of axes."""
        in_order = self.data == self.kept + self.summed and self.output == self.kept + self.made
        return in_order and len(self.summed) == len(self.made) == 1


@dataclass(frozen=True)
class _Found:
    """An Einsum that is a matrix product of an activation and an initializer."""

    node: onnx.NodeProto
    product: _Product
    tensor: onnx.TensorProto


def products_of_einsums(model: onnx.ModelProto) -> onnx.ModelProto:
    """Return a copy in which every Einsum of an activation and a stored tensor is a MatMul; the model itself without one.

    The MatMul has the name of the Einsum, and its matrix that of the initializer. Left as they are: equations that are not
    those of a layer (with an axis that both operands and the output have, a trace, or a sum over one operand alone), `...`
    where axes would be moved or joined, tensors that an input of the model may replace, and those that something else reads,
    which would have to be stored twice.

    Args:
        model: the model; it is not changed.

    """
    if not any(node.op_type == "Einsum" for graph in (model.graph, *descendants(model.graph)) for node in graph.node):
        return model
    changed = onnx.ModelProto()
    changed.CopyFrom(model)
    writer = _Writer(changed)
    found = writer.alone(list(_einsums(changed.graph, {})))
    if not found:
        return model
    written = {id(one.node): writer.nodes(one) for one in found}
    for one in {id(one.tensor): one for one in found}.values():
        one.tensor.CopyFrom(_matrix(one))
    _replace(changed.graph, written, {one.tensor.name for one in found})
    return changed


def _einsums(graph: onnx.GraphProto, outer: Mapping[str, onnx.TensorProto]) -> Iterator[_Found]:
    """Yield the Einsums that are products in a graph and in the bodies of its nodes."""
    inputs = {value.name for value in graph.input}
    stored = {name: tensor for name, tensor in outer.items() if name not in inputs}
    stored |= {tensor.name: tensor for tensor in graph.initializer if tensor.name not in inputs}
    for node in graph.node:
        places = [place for place, name in enumerate(node.input) if name in stored]
        if node.op_type == "Einsum" and node.domain in STANDARD and len(node.input) == 2 and len(places) == 1:
            product, tensor = _product(node, places[0]), stored[node.input[places[0]]]
            if product is not None and len(tensor.dims) == len(product.weight) and _fits(product, tensor.dims):
                yield _Found(node, product, tensor)
    for body in bodies(graph):
        yield from _einsums(body, stored)


def _product(node: onnx.NodeProto, place: int) -> _Product | None:
    """Return the labels of an Einsum whose input at `place` is stored; None if it is not a matrix product."""
    text = next((attribute.s.decode(errors="replace") for attribute in node.attribute if attribute.name == "equation"), "")
    left, arrow, output = text.replace(" ", "").replace("...", _ELLIPSIS).partition("->")
    terms = left.split(",")
    if len(terms) != 2:
        return None
    if not arrow:  # the labels that occur once, in alphabetical order, behind the axes of `...`
        once = sorted(label for label in left.replace(",", "") if left.count(label) == 1 and label != _ELLIPSIS)
        output = "".join([_ELLIPSIS] if _ELLIPSIS in left else []) + "".join(once)
    weight, data = terms[place], terms[1 - place]
    if any(len(set(labels)) < len(labels) for labels in (weight, data, output)):
        return None
    summed = "".join(label for label in weight if label in data and label not in output)
    made = "".join(label for label in weight if label in output and label not in data)
    kept = "".join(label for label in output if label in data and label not in weight)
    product = _Product(data, weight, output, summed, made, kept, 1 - place)
    whole = all(sorted(a) == sorted(b) for a, b in ((data, kept + summed), (weight, summed + made), (output, kept + made)))
    moved = _ELLIPSIS in data and not product.is_plain
    return product if whole and summed and _ELLIPSIS not in weight and not moved else None


def _fits(product: _Product, sizes: Sequence[int]) -> bool:
    """Return whether a MatMul takes axes of these sizes; in an Einsum one value may stand for as many as the data have."""
    return 0 not in sizes and all(sizes[product.weight.index(label)] > 1 for label in product.summed)


def _matrix(one: _Found) -> onnx.TensorProto:
    """Return the stored tensor as a matrix (summed, made)."""
    values = numpy_helper.to_array(one.tensor).transpose(one.product.order)
    rows = math.prod(values.shape[: len(one.product.summed)])
    return numpy_helper.from_array(np.ascontiguousarray(values.reshape(rows, -1)), one.tensor.name)


class _Writer:
    """Writes products into a model."""

    def __init__(self, model: onnx.ModelProto) -> None:
        self.graph = model.graph
        self.taken: set[str] = set()
        self.reads: dict[str, int] = {}
        for graph in (model.graph, *descendants(model.graph)):
            self.taken.update(defined_names(graph))
            self.taken.update(node.name for node in graph.node)
            for name in (*(name for node in graph.node for name in node.input), *(value.name for value in graph.output)):
                self.reads[name] = self.reads.get(name, 0) + 1

    def alone(self, found: list[_Found]) -> list[_Found]:
        """Return the products whose tensor is read by such products alone, all with the same axes in the same order."""
        orders: dict[int, list[tuple[int, ...]]] = {}  # by the tensor: two branches may use one name
        for one in found:
            orders.setdefault(id(one.tensor), []).append((len(one.product.summed), *one.product.order))
        own = {key for key, uses in orders.items() if len(set(uses)) == 1}
        return [one for one in found if id(one.tensor) in own and self.reads[one.tensor.name] == len(orders[id(one.tensor)])]

    def nodes(self, one: _Found) -> list[onnx.NodeProto]:
        """Return the nodes of a product."""
        product, node = one.product, one.node
        sizes = dict(zip(product.weight, map(int, one.tensor.dims), strict=True))
        before, after = product.kept + product.summed, product.kept + product.made
        joined = math.prod(sizes[label] for label in product.summed)
        steps: list[tuple[str, list[str], dict[str, Any]]] = []  # Any: of attributes, as make_node has it
        if product.data != before:
            steps.append(("Transpose", [], {"perm": [product.data.index(label) for label in before]}))
        if len(product.summed) > 1:
            steps.append(("Reshape", [self._shape(one, joined)], {}))
        steps.append(("MatMul", [one.tensor.name], {}))
        if len(product.made) != 1:
            steps.append(("Reshape", [self._shape(one, *(sizes[label] for label in product.made))], {}))
        if product.output != after:
            steps.append(("Transpose", [], {"perm": [after.index(label) for label in product.output]}))
        source, nodes = str(node.input[product.place]), []
        for number, (op, others, attributes) in enumerate(steps):
            target = node.output[0] if number == len(steps) - 1 else free_name(f"{_stem(node)}/step{number}", self.taken)
            name = node.name if op == "MatMul" else free_name(f"{_stem(node)}/{op.lower()}{number}", self.taken)
            nodes.append(helper.make_node(op, [source, *others], [target], name, **attributes))
            source = target
        return nodes

    def _shape(self, one: _Found, *behind: int) -> str:
        """Store a shape whose first sizes are those of the data, and return its name."""
        return self._store(f"{_stem(one.node)}/shape", np.array([0] * len(one.product.kept) + list(behind), np.int64))

    def _store(self, name: str, values: np.ndarray) -> str:
        free = free_name(name, self.taken)
        self.graph.initializer.append(numpy_helper.from_array(values, free))
        return free


def _stem(node: onnx.NodeProto) -> str:
    return node.name or str(node.output[0])


def _replace(graph: onnx.GraphProto, written: Mapping[int, list[onnx.NodeProto]], reshaped: Collection[str]) -> None:
    """Put the nodes of products in the place of their Einsums, in a graph and in the bodies of its nodes."""
    for body in bodies(graph):
        _replace(body, written, reshaped)
    nodes = [new for node in graph.node for new in written.get(id(node), [node])]
    if len(nodes) != len(graph.node) or any(new is not old for new, old in zip(nodes, graph.node, strict=True)):
        kept = [onnx.NodeProto.FromString(node.SerializeToString()) for node in nodes]
        del graph.node[:]
        graph.node.extend(kept)
    known = [
        onnx.ValueInfoProto.FromString(value.SerializeToString()) for value in graph.value_info if value.name not in reshaped
    ]
    del graph.value_info[:]
    graph.value_info.extend(known)
