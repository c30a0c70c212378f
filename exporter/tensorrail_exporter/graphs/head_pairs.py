"""Finds the two pairs of products of an attention that meet in the values of its heads: query and key, value and output.

The scores of a head depend on its query and key weights only by their product Wq Wkᵀ, and what it adds to the output on its
value and output weights only by Wv Wo. Both products have at most the rank d of the head size.
"""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import dataclass

import onnx
from onnx import helper

from tensorrail_exporter.graphs.head_paths import ATTENTIONS, Layout, Path, Shapes, constant_value
from tensorrail_exporter.graphs.io import inferred_shapes
from tensorrail_exporter.graphs.own_products import STANDARD, OwnProduct, own_products, visible_tensors
from tensorrail_exporter.graphs.parts import Network
from tensorrail_exporter.graphs.unpacked import unpacked

PairNames = tuple[str, str]
"""The names of the two layers of a pair: those of their weights, without `.weight`."""


@dataclass(frozen=True)
class Product:
    """A MatMul or Gemm with a stored weight that nothing else reads."""

    name: str
    """The name of the layer."""
    place: int
    """Its node."""
    transposed: bool
    """Whether the weight is stored as (outputs, inputs)."""
    bias: str
    """The stored vector that is added to its outputs; empty: none."""
    adder: int
    """The node that adds it: the product itself, or an Add."""
    out: str
    """The tensor behind both."""
    outputs: int
    """The number of its outputs."""
    inputs: int
    """The number of its inputs."""


@dataclass(frozen=True)
class Columns:
    """Outputs of a product that are the queries, keys or values of all heads."""

    product: Product
    begin: int
    """The first of them."""
    end: int
    """The one behind the last."""
    split: int
    """The Split that separates them from others; -1: they are all outputs of the product."""
    place: int
    """Which output of the Split they are."""
    lead: Path
    """The way of the outputs to the Split."""


@dataclass(frozen=True)
class Pair:
    """Two products that meet in the values of heads."""

    names: PairNames
    scores: bool
    """Whether they are query and key; otherwise value and output."""
    heads: int
    """The number of heads."""
    size: int
    """The number of values of a head."""
    first: Columns
    """The query, or the value."""
    second: Columns | Product
    """The key, or the product that gives the outputs of the attention."""
    paths: tuple[Path, ...]
    """The ways of the values of heads."""
    attention: int = -1
    """The node with attributes for heads, if one operator computes the attention; else -1."""


@dataclass(frozen=True)
class Pairs:
    """What was found in a graph."""

    found: tuple[Pair, ...]
    """The pairs, in the order of the graph."""
    refused: dict[str, str]
    """Why the values of heads of other layers cannot change, by the name of the layer."""


def find_pairs(model: onnx.ModelProto) -> Pairs:
    """Find all pairs of the main graph.

    Args:
        model: the model; it is not changed.

    Returns:
        The pairs, in the graph of `unpacked`, and why layers that also give heads are in none.

    """
    model = unpacked(model)
    network = Network(model)
    shapes = inferred_shapes(model, data_prop=True)
    known = {value.name: value for value in (*model.graph.value_info, *model.graph.input, *model.graph.output)}
    for name, value in known.items():
        dims = value.type.tensor_type.shape.dim
        if value.type.tensor_type.HasField("shape"):
            shapes.setdefault(name, [d.dim_value if d.HasField("dim_value") else d.dim_param or f"?{name}" for d in dims])
    return _Search(network, shapes).pairs()


class _Search:
    def __init__(self, network: Network, shapes: Shapes) -> None:
        self.network, self.shapes = network, shapes
        self.products = _products(network)
        self.ends: dict[int, dict[int, tuple[Columns, Path]]] = {}  # by the node that uses heads, and its input
        self.refused: dict[str, str] = {}
        self.found: list[Pair] = []

    def pairs(self) -> Pairs:
        for product in self.products.values():
            for columns, tensor in _columns(self.network, self.shapes, product):
                self._follow(columns, tensor)
        for place in sorted(self.ends):
            node = self.network.nodes[place]
            if node.op_type == "MatMul":
                self._at_product(place, self.ends[place])
            else:
                self._at_attention(place, node, self.ends[place])
        named = [pair.names for pair in self.found]
        outputs = {pair.names[1] for pair in self.found if not pair.scores}
        firsts = {name for pair in self.found for name in (pair.names if pair.scores else pair.names[:1])}
        kept = [pair for pair in self.found if named.count(pair.names) == 1 and not outputs & firsts & {*pair.names}]
        return Pairs(tuple(kept), self.refused)

    def _follow(self, columns: Columns, tensor: str) -> None:
        shape = self.shapes.get(tensor)
        if not shape:
            return  # without the number of its axes, nothing is known of what follows
        path = Path(self.network, self.shapes, Layout(tensor, len(shape) - 1, columns.end - columns.begin))
        if path.end >= 0 and not path.reason:
            node = self.network.nodes[path.end]
            if path.layout.head_axis >= 0 or node.op_type in ATTENTIONS:
                index = list(node.input).index(path.layout.tensor)
                self.ends.setdefault(path.end, {})[index] = (columns, path)
        elif any(layout.head_axis >= 0 for layout in path.layouts):
            self.refused[columns.product.name] = path.reason

    def _at_product(self, place: int, ends: dict[int, tuple[Columns, Path]]) -> None:
        node = self.network.nodes[place]
        if len(ends) == 2:
            (first, ours), (second, theirs) = ends[0], ends[1]
            one, other = ours.layout, theirs.layout
            rank = len(self.shapes.get(one.tensor, ()))
            same = (one.heads, one.size, one.head_axis, one.merged) == (other.heads, other.size, other.head_axis, other.merged)
            if same and one.axis == rank - 1 and other.axis == rank - 2 and one.head_axis < rank - 2:
                self._add(first, second, (ours, theirs), one.heads, one.size, scores=True)
            else:
                self.refused[first.product.name] = self.refused[second.product.name] = "query and key have different heads"
            return
        columns, path = next(iter(ends.values()))
        layout = path.layout
        ranks = [len(self.shapes.get(name, ())) for name in (layout.tensor, node.output[0])]
        if 1 in ends and ranks == [layout.axis + 1] * 2 and layout.head_axis < layout.axis - 1:
            self._with_output(columns, path, Layout(node.output[0], *_where(layout)), layout.size)
        else:
            self.refused[columns.product.name] = "it is multiplied with something other than a layer with the same heads"

    def _at_attention(self, place: int, node: onnx.NodeProto, ends: dict[int, tuple[Columns, Path]]) -> None:
        heads = _heads_of(node)
        if not heads:
            for columns, _ in ends.values():
                self.refused[columns.product.name] = f"{node.op_type} has a bias, a cache, or fewer keys than queries"
            return
        sizes = {k: columns.end - columns.begin for k, (columns, _) in ends.items()}
        if 0 in ends and 1 in ends and sizes[0] == sizes[1] and sizes[0] % heads == 0:
            (first, ours), (second, theirs) = ends[0], ends[1]
            self._add(first, second, (ours, theirs), heads, sizes[0] // heads, place, scores=True)
        if 2 in ends and sizes[2] % heads == 0:
            out = Layout(node.output[0], 2, sizes[2], heads)
            self._with_output(*ends[2], out, sizes[2] // heads, place)

    def _with_output(self, columns: Columns, path: Path, start: Layout, size: int, attention: int = -1) -> None:
        """Add the pair of values and the product that takes what heads give, if there is one."""
        behind = Path(self.network, self.shapes, start)
        last = behind.layout
        reader = next((one for one in self.products.values() if one.place == behind.end), None)
        if behind.reason or reader is None or last.head_axis >= 0 or reader.inputs != start.heads * size:
            self.refused[columns.product.name] = behind.reason or "no layer takes all values of the heads"
            return
        if self.network.nodes[reader.place].input[0] != last.tensor:
            return
        self._add(columns, reader, (path, behind), start.heads, size, attention, scores=False)

    def _add(
        self,
        first: Columns,
        second: Columns | Product,
        paths: tuple[Path, ...],
        heads: int,
        size: int,
        attention: int = -1,
        *,
        scores: bool,
    ) -> None:
        other = second if isinstance(second, Product) else second.product
        self.found.append(Pair((first.product.name, other.name), scores, heads, size, first, second, paths, attention))


def _where(layout: Layout) -> tuple[int, int, int, int, bool]:
    return layout.axis, layout.size, layout.heads, layout.head_axis, layout.merged


def _heads_of(node: onnx.NodeProto) -> int:
    """Return the number of heads of an operator for attention; 0 if heads of another size are not possible."""
    attributes = {attribute.name: helper.get_attribute_value(attribute) for attribute in node.attribute}
    inputs = [*node.input, *[""] * 8]
    if any(node.output[1:]):
        return 0
    if node.domain == "com.microsoft" and node.op_type == "MultiHeadAttention":
        return 0 if any((inputs[3], *inputs[6:8])) else int(attributes.get("num_heads", 0))
    if node.domain in STANDARD and node.op_type == "Attention" and not any(inputs[4:6]):
        heads = int(attributes.get("q_num_heads", 0))
        return heads if attributes.get("kv_num_heads", 0) == heads else 0
    return 0


def _products(network: Network) -> dict[str, Product]:
    """Return the products with a weight of their own, by the name of the layer."""
    visible = visible_tensors(network)
    products = {own.name: _product(network, own, visible) for own in own_products(network)}
    return {name: product for name, product in products.items() if product is not None}


def _product(network: Network, own: OwnProduct, visible: Collection[str]) -> Product | None:
    name, place, node, transposed = own.name, own.place, own.node, own.transposed
    rows, columns = (int(axis) for axis in own.weight.dims)
    inputs, outputs = (columns, rows) if transposed else (rows, columns)

    def is_bias(tensor: str) -> bool:
        bias = network.constants.get(tensor)
        return bias is not None and list(bias.dims) == [outputs] and bias.name not in visible

    out = str(node.output[0])
    if len(node.input) > 2 and node.input[2]:
        known = is_bias(node.input[2])
        return Product(name, place, transposed, node.input[2], place, out, outputs, inputs) if known else None
    readers = network.readers.get(out, [])
    add = network.nodes[readers[0]] if len(readers) == 1 and out not in visible else None
    if add is not None and add.op_type == "Add" and add.domain in STANDARD and list(add.input).count(out) == 1:
        other = next(operand for operand in add.input if operand != out)
        if is_bias(other):
            return Product(name, place, transposed, other, readers[0], str(add.output[0]), outputs, inputs)
    return Product(name, place, transposed, "", place, out, outputs, inputs)


def _columns(network: Network, shapes: Shapes, product: Product) -> list[tuple[Columns, str]]:
    """Return the parts of the outputs of a product that a Split gives, or all of them, each with its tensor."""
    rank = len(shapes.get(product.out, ()))
    lead = Path(network, shapes, Layout(product.out, rank - 1 if rank else -1, product.outputs))
    whole = [(Columns(product, 0, product.outputs, -1, 0, lead), product.out)]
    tensor = lead.layout.tensor
    readers = network.readers.get(tensor, [])
    node = network.nodes[readers[0]] if len(readers) == 1 else None
    visible = tensor in {value.name for value in network.graph.output}
    if node is None or node.op_type != "Split" or lead.layout.head_axis >= 0 or lead.sized or not lead.known or visible:
        return whole
    attributes = {attribute.name: helper.get_attribute_value(attribute) for attribute in node.attribute}
    if attributes.get("axis", 0) not in (-1, len(shapes.get(tensor, ())) - 1):
        return []
    if len(node.input) > 1 and node.input[1]:
        values = constant_value(network, node.input[1])
        sizes = [] if values is None else [int(size) for size in values.reshape(-1)]
    else:
        count = len(node.output)
        sizes = list(attributes.get("split", [product.outputs // count] * count))
    if sum(sizes) != product.outputs or len(sizes) != len(node.output):
        return []
    begins = [sum(sizes[:k]) for k in range(len(sizes))]
    return [
        (Columns(product, begin, begin + size, readers[0], k, lead), str(node.output[k]))
        for k, (begin, size) in enumerate(zip(begins, sizes, strict=True))
    ]
