"""Attention heads with fewer values: query and key, or value and output, are factored together, without a further kernel.

The matrices of a pair meet in the d values of a head alone. Those of the best product of rank r < d take their place, so the
head has r values; biases are one more row of the matrices. Scores keep their scale, that of the dense network, since they
approximate the same numbers. With r = d, or at least the rank of the product, the network computes the same.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, field

import numpy as np
import onnx
from onnx import helper, numpy_helper

from tensorrail_exporter.graphs.head_factors import narrowed, root
from tensorrail_exporter.graphs.head_pairs import Columns, Pair, PairNames, Product, find_pairs
from tensorrail_exporter.graphs.head_paths import Edit, Path, constant_value, pieces_of
from tensorrail_exporter.graphs.io import inferred_shapes
from tensorrail_exporter.graphs.own_products import SIZES_AS_INPUT
from tensorrail_exporter.graphs.parts import Network, reads_of
from tensorrail_exporter.graphs.unpacked import unpacked
from tensorrail_runtime.errors import GraphError
from tensorrail_runtime.graphs.files import opset_of

_OF_SHAPES = ("Constant", "Concat", "Shape", "Gather", "Slice", "Unsqueeze", "Cast")


def head_inputs(model: onnx.ModelProto, names: Sequence[PairNames]) -> tuple[str, ...]:
    """Return the tensors whose second moments `with_heads` uses for some pairs, each once."""
    model = unpacked(model)
    network = Network(model)
    pairs = _asked(model, names)
    products = [columns.product for pair in pairs for columns in (pair.first, pair.second) if isinstance(columns, Columns)]
    return tuple(dict.fromkeys(str(network.nodes[product.place].input[0]) for product in products))


def with_heads(
    model: onnx.ModelProto, sizes: Mapping[PairNames, int], moments: Mapping[str, np.ndarray] | None = None
) -> onnx.ModelProto:
    """Return a copy in which the heads of some pairs have fewer values.

    Args:
        model: the dense model; it is not changed.
        sizes: the number of values of each head, by the names of the pair, as `find_pairs` returns them.
        moments: second moments (I + 1, I + 1) of the inputs of the layers, with a 1 behind the I values, by the names that
            `head_inputs` returns; default: none, so the products of the weights themselves are approximated.

    Raises:
        GraphError: the model has no such pair, its heads have fewer values, or its weights are not finite.

    """
    if not sizes:
        return model
    model = unpacked(model)
    pairs = _asked(model, tuple(sizes))
    changed = onnx.ModelProto()
    changed.CopyFrom(model)
    surgery = _Surgery(Network(changed), opset_of(changed))
    metric = _Metric(moments or {})
    for pair in pairs:
        size = sizes[pair.names]
        if not 1 <= size <= pair.size:
            raise GraphError(
                f"layers {' and '.join(pair.names)}: expected heads of 1 to {pair.size} values, got {size}; plan anew"
            )
        _narrow(surgery, pair, size, metric)
    surgery.finish()
    return changed


def _asked(model: onnx.ModelProto, names: Sequence[PairNames]) -> list[Pair]:
    """Return the pairs of these names; `GraphError` for one that is not in the graph."""
    pairs = find_pairs(model)
    found = {pair.names: pair for pair in pairs.found}
    for one in names:
        if one not in found:
            reason = next((f"{name}: {pairs.refused[name]}" for name in one if name in pairs.refused), "")
            known = ", ".join(" and ".join(pair) for pair in found) or "none"
            raise GraphError(
                f"layers {' and '.join(one)}: expected query and key, or value and output, of one attention"
                f"{f' ({reason})' if reason else ''}; the model has these pairs: {known}; plan this model anew"
            )
    return [found[one] for one in names]


@dataclass
class _Metric:
    """Square roots of the second moments of inputs, each computed once."""

    moments: Mapping[str, np.ndarray]
    _roots: dict[tuple[str, bool], np.ndarray] = field(default_factory=dict)

    def of(self, tensor: str, *, bias: bool) -> np.ndarray | None:
        moment = self.moments.get(tensor)
        if moment is None:
            return None
        if (tensor, bias) not in self._roots:
            self._roots[tensor, bias] = root(moment if bias else moment[:-1, :-1])
        return self._roots[tensor, bias]


def _narrow(surgery: _Surgery, pair: Pair, size: int, metric: _Metric) -> None:
    """Give the heads of a pair fewer values."""
    sides = [surgery.matrix(pair.first), surgery.matrix(pair.second)]
    if not all(np.isfinite(side).all() for side in sides):
        raise GraphError(
            f"layers {' and '.join(pair.names)}: weights hold NaN or infinite values and cannot be decomposed: repair the model"
        )
    roots = tuple(
        metric.of(surgery.data(side.product), bias=bool(side.product.bias)) if isinstance(side, Columns) else None
        for side in (pair.first, pair.second)
    )
    parts = []
    for head in range(pair.heads):
        own = slice(head * pair.size, (head + 1) * pair.size)
        parts.append(narrowed(sides[0][:, own], sides[1][:, own], size, (roots[0], roots[1])))
    for side, matrices in zip((pair.first, pair.second), zip(*parts, strict=True), strict=True):
        surgery.replace(side, np.concatenate(matrices, axis=1))
    for path in pair.paths:
        surgery.resize(path, size, pair.heads * size)
    if pair.scores and pair.attention >= 0:
        surgery.keep_scale(pair.attention, pair.size)


class _Surgery:
    """Changes of weights, shapes and nodes, which are carried out at the end."""

    def __init__(self, network: Network, opset: int) -> None:
        self.network, self.opset = network, opset
        self.shapes = inferred_shapes(network.model, data_prop=True)
        self.columns: dict[str, list[tuple[Columns, np.ndarray]]] = {}
        self.products: dict[str, Product] = {}
        self.rows: dict[str, np.ndarray] = {}
        self.sizes: dict[str, tuple[int, int]] = {}  # the axis of a tensor whose size changes, and the new size
        self.added: dict[int, list[onnx.NodeProto]] = {}

    def data(self, product: Product) -> str:
        return str(self.network.nodes[product.place].input[0])

    def _weight(self, product: Product) -> np.ndarray:
        """Return the weight (inputs, outputs) in double precision."""
        stored = numpy_helper.to_array(self.network.constants[self.network.nodes[product.place].input[1]])
        return (stored.T if product.transposed else stored).astype(np.float64)

    def _bias(self, product: Product) -> np.ndarray:
        return numpy_helper.to_array(self.network.constants[product.bias]).astype(np.float64)

    def matrix(self, side: Columns | Product) -> np.ndarray:
        """Return the matrix of a side with the values of all heads as its columns; a bias is its last row."""
        if isinstance(side, Product):
            return self._weight(side).T
        product = side.product
        weight = self._weight(product)
        rows = np.concatenate([weight, self._bias(product)[None]]) if product.bias else weight
        return rows[:, side.begin : side.end]

    def replace(self, side: Columns | Product, matrix: np.ndarray) -> None:
        product = side if isinstance(side, Product) else side.product
        self.products[product.name] = product
        if isinstance(side, Product):
            self.rows[product.name] = matrix.T
        else:
            self.columns.setdefault(product.name, []).append((side, matrix))

    def resize(self, path: Path, size: int, together: int) -> None:
        """Change the numbers of shapes on the way of the values of heads."""
        for layout in path.layouts:
            self.sizes[layout.tensor] = layout.axis, size if layout.head_axis >= 0 else together
        for place, known in path.frozen.items():
            self._freeze(place, known)
        for edit in path.edits:
            self._reshape(edit, size if edit.apart else together)

    def _freeze(self, place: int, size: int) -> None:
        """Let a node that read the size of heads from a shape give that of the dense network."""
        node = self.network.nodes[place]
        rank = len(self.shapes.get(node.output[0], [1]))
        value = numpy_helper.from_array(np.full([1] * rank, size, np.int64))
        node.CopyFrom(helper.make_node("Constant", [], [node.output[0]], node.name, value=value))

    def keep_scale(self, place: int, size: int) -> None:
        """Write the scale of the scores into an operator that would compute it from the size of its heads."""
        node = self.network.nodes[place]
        scale = next((attribute for attribute in node.attribute if attribute.name == "scale"), None)
        if scale is None:
            node.attribute.append(helper.make_attribute("scale", size**-0.5))
        elif not scale.f:
            scale.f = size**-0.5

    def _reshape(self, edit: Edit, number: int) -> None:
        node = self.network.nodes[edit.place]
        name, begin, _ = next(
            piece for piece in pieces_of(self.network, self.shapes, node.input[1]) if piece[1] <= edit.position < piece[2]
        )
        values = constant_value(self.network, name)
        changed = np.zeros(1, np.int64) if values is None else np.array(values, np.int64)
        changed.reshape(-1)[edit.position - begin] = number
        stored = f"{node.output[0]}/heads"
        self._store(stored, changed)
        if name == node.input[1]:
            node.input[1] = stored
            return
        place = self.network.makers[node.input[1]]
        at = [one[1] for one in pieces_of(self.network, self.shapes, node.input[1])].index(begin)
        if len(self.network.readers[node.input[1]]) == 1:
            self.network.nodes[place].input[at] = stored
            return
        joined = onnx.NodeProto()
        joined.CopyFrom(self.network.nodes[place])
        joined.name = joined.output[0] = f"{node.output[0]}/shape"
        joined.input[at] = stored
        node.input[1] = joined.output[0]
        self.added.setdefault(place, []).append(joined)

    def _store(self, name: str, values: np.ndarray) -> None:
        tensor = numpy_helper.from_array(np.ascontiguousarray(values), name)
        if name in self.network.constants:
            self.network.constants[name].CopyFrom(tensor)
        else:
            self.network.graph.initializer.append(tensor)

    def finish(self) -> None:
        """Write the weights, biases and sizes, and remove what nothing reads any more."""
        for name, product in self.products.items():
            self._rewrite(product, sorted(self.columns.get(name, ()), key=lambda part: part[0].begin))
        graph = self.network.graph
        nodes = [one for place, node in enumerate(self.network.nodes) for one in (node, *self.added.get(place, ()))]
        copies = [onnx.NodeProto.FromString(node.SerializeToString()) for node in nodes]
        del graph.node[:]
        graph.node.extend(copies)
        for value in graph.value_info:
            dims = value.type.tensor_type.shape.dim
            if value.name in self.sizes and len(dims):
                axis, size = self.sizes[value.name]
                dims[axis].dim_value = size
        _drop_unused(graph, self.network.readers)

    def _rewrite(self, product: Product, parts: Sequence[tuple[Columns, np.ndarray]]) -> None:
        """Write the weight and the bias of a product, and the sizes of the Split behind it."""
        node = self.network.nodes[product.place]
        stored = self.network.constants[node.input[1]]
        dtype = numpy_helper.to_array(stored).dtype
        weight = self.rows.get(product.name)
        weight = self._weight(product) if weight is None else weight
        rows = np.concatenate([weight, self._bias(product)[None]]) if product.bias else weight
        pieces, place = [], 0
        for columns, matrix in parts:
            pieces += [rows[:, place : columns.begin], matrix]
            place = columns.end
        rows = np.concatenate([*pieces, rows[:, place:]], axis=1)
        weight = rows[: len(weight)]
        self._store(stored.name, (weight.T if product.transposed else weight).astype(dtype))
        if not parts:
            return
        for tensor in (node.output[0], product.out):
            self.sizes[tensor] = -1, rows.shape[1]
        if product.bias:
            self._give_bias(product, rows[-1].astype(dtype))
        if parts[0][0].split >= 0:
            self.resize(parts[0][0].lead, 0, rows.shape[1])
            self._split(parts[0][0].split, parts)

    def _give_bias(self, product: Product, bias: np.ndarray) -> None:
        adder = self.network.nodes[product.adder]
        alone = len(self.network.readers[product.bias]) == 1
        name = product.bias if alone else f"{product.name}/bias"
        self._store(name, bias)
        adder.input[list(adder.input).index(product.bias)] = name

    def _split(self, place: int, parts: Sequence[tuple[Columns, np.ndarray]]) -> None:
        node = self.network.nodes[place]
        shapes = [self.shapes[name][-1] for name in node.output]
        sizes = [int(size) for size in shapes]
        for columns, matrix in parts:
            sizes[columns.place] = matrix.shape[1]
        for attribute in [one for one in node.attribute if one.name in ("split", "num_outputs")]:
            node.attribute.remove(attribute)
        if self.opset < SIZES_AS_INPUT:
            node.attribute.append(helper.make_attribute("split", sizes))
            return
        name = f"{node.output[0]}/sizes"
        self._store(name, np.array(sizes, np.int64))
        del node.input[1:]
        node.input.append(name)


def _drop_unused(graph: onnx.GraphProto, before: Collection[str]) -> None:
    """Remove what nothing reads any more: tensors that something read before, and nodes that put shapes together."""
    outputs = {value.name for value in graph.output}
    while True:
        read = outputs.union(*(reads_of(node) for node in graph.node))
        stored = [tensor for tensor in graph.initializer if tensor.name in read or tensor.name not in before]
        if len(stored) < len(graph.initializer):
            del graph.initializer[:]
            graph.initializer.extend(stored)
        unused = [n for n in graph.node if n.op_type in _OF_SHAPES and not read.intersection(n.output)]
        if not unused:
            return
        for node in unused:
            graph.node.remove(node)
