"""Layers that read the same input, as one layer: query, key and value of attention, or the two halves of a gated unit.

Their weights are put side by side, one product computes all outputs, and a Split hands them to their readers. The outputs are
the same, each sum in the same order or nearly so. Whether one large product is faster than several small ones depends on the
machine. Its weight may have a lower rank than its parts together, since the parts read the same directions of their input
(DeepSeek-AI, *DeepSeek-V2*, arXiv:2405.04434, section 2.1, trains keys and values with such a joint factor).
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass
from itertools import chain
from pathlib import Path

import numpy as np
import onnx
from onnx import helper, numpy_helper

from tensorrail_exporter.graphs.own_products import SIZES_AS_INPUT, STANDARD, OwnProduct, own_products, visible_tensors
from tensorrail_exporter.graphs.parts import Network
from tensorrail_exporter.graphs.rounding import Rewritten, require_rounding
from tensorrail_runtime.errors import GraphError
from tensorrail_runtime.graphs.files import opset_of
from tensorrail_runtime.sessions.session import Session

Joint = tuple[str, ...]
"""The names of layers that become one: those of their weights, without `.weight`."""

_FROM_THE_END = 11  # the opset from which Split counts axes from the end
_JOINT = Rewritten("joint layers to differ from the dense ones", "plan without joint layers", 1e-4)


def joint_name(parts: Joint) -> str:
    """Return the name of the layer that several become, such as `attention.{query,key,value}`."""
    end = 0  # of what all have in common, up to a separator
    for k, letters in enumerate(zip(*parts, strict=False)):
        if len(set(letters)) > 1:
            break
        end = end if letters[0].isalnum() else k + 1
    return f"{parts[0][:end]}{{{','.join(part[end:] for part in parts)}}}"


def joint_groups(model: onnx.ModelProto, keeps: Callable[[str], bool] = lambda _: False) -> tuple[Joint, ...]:
    """Return the layers that can become one, in the order of the graph.

    These are MatMul and Gemm nodes of the graph itself with the same input and stored weights that no other node reads. There
    are none below opset 11, and none whose new name the graph has already.

    Args:
        model: the dense model.
        keeps: whether the layer of a name is to stay as it is; default: none is.

    """
    network = Network(model)
    if opset_of(model) < _FROM_THE_END:
        return ()
    groups: dict[tuple[object, ...], list[str]] = {}
    for name, product in _products(network).items():
        if not keeps(name):
            groups.setdefault(product.kind, []).append(name)
    taken = _taken(network)
    several = (tuple(names) for names in groups.values() if len(names) > 1)
    return tuple(names for names in several if not _new_names(joint_name(names)) & taken)


def rounding_error(
    dense: Path, changed: Path, feeds: Sequence[Mapping[str, np.ndarray]], settings: Session | None = None
) -> float:
    """Return how far the outputs of a graph with joint layers are from the dense one's.

    Args:
        dense: the dense model.
        changed: the same with joint layers.
        feeds: batches of inputs by name.
        settings: how both run; default: the CPU provider.

    Returns:
        The relative L2 difference.

    Raises:
        GraphError: it is more than another order of sums may cause.
        ModelError: a model does not run, or the outputs cannot be compared.

    """
    return require_rounding(dense, changed, feeds, _JOINT, settings)


def with_joint(model: onnx.ModelProto, groups: Collection[Joint]) -> onnx.ModelProto:
    """Return a copy in which the layers of each group are one layer, whose weight is named `joint_name`.

    Biases that are added to all parts of a group are added at once.

    Args:
        model: the dense model; it is not changed.
        groups: names of layers, as `joint_groups` returns them.

    Raises:
        GraphError: the model has no such layer, layers of a group do not read the same input, or a new name is taken.

    """
    if not groups:
        return model
    joined = onnx.ModelProto()
    joined.CopyFrom(model)
    network = Network(joined)
    products = _products(network)
    removed: set[int] = set()
    added: dict[int, list[onnx.NodeProto]] = {}
    tensors: list[onnx.TensorProto] = []
    replaced: set[str] = set()  # constants, which others may read
    taken = _taken(network)
    for parts in groups:
        if clash := sorted(_new_names(joint_name(parts)) & taken):
            raise GraphError(f"layers {', '.join(parts)}: cannot become one, since the graph has a {clash[0]!r} already")
        own = [_found(products, part, parts) for part in parts]
        biases = _biases(network, own)
        replaced.update(*(product.node.input[1:] for product in own), *(add.input for _, add in biases))
        nodes, new = _as_one(network, joint_name(parts), own, biases, opset_of(joined))
        tensors += new
        removed.update(chain((product.place for product in own), (place for place, _ in biases)))
        added[min(product.place for product in own)] = nodes
    kept = [[node] if place not in removed else [] for place, node in enumerate(network.nodes)]
    nodes = [node for place, old in enumerate(kept) for node in (*added.get(place, ()), *old)]
    graph = joined.graph
    del graph.node[:]
    graph.node.extend(nodes)
    graph.initializer.extend(tensors)
    read = {*Network(joined).readers, *(value.name for value in graph.output)}
    stored = [tensor for tensor in graph.initializer if tensor.name not in replaced - read]
    del graph.initializer[:]
    graph.initializer.extend(stored)
    return joined


def _new_names(name: str) -> set[str]:
    return {name, *(f"{name}/{part}" for part in ("product", "sum", "bias", "sizes"))}


def _taken(network: Network) -> set[str]:
    return {*network.makers, *network.readers, *network.constants, *network.sparse, *(v.name for v in network.graph.input)}


def without_inner_shapes(model: onnx.ModelProto) -> onnx.ModelProto:
    """Return a copy whose file does not state the shapes of the graph's inner tensors; ONNX Runtime infers what it can."""
    plain = onnx.ModelProto()
    plain.CopyFrom(model)
    del plain.graph.value_info[:]
    return plain


@dataclass(frozen=True)
class _Product:
    """A MatMul or Gemm with a stored weight."""

    place: int
    node: onnx.NodeProto
    kind: tuple[object, ...]
    """Equal for products that can become one: input, operator, orientation and type of the weight, and whether it adds."""


def _products(network: Network) -> dict[str, _Product]:
    """Return the products that could become one with others, by the name of the layer."""
    visible, found = visible_tensors(network), {}
    for own in own_products(network):
        adds = len(own.node.input) > 2 and own.node.input[2] != ""
        if not adds or _is_own_bias(network, own, visible):
            kind = (own.node.input[0], own.node.op_type, own.transposed, own.weight.data_type, adds)
            found[own.name] = _Product(own.place, own.node, kind)
    return found


def _is_own_bias(network: Network, own: OwnProduct, visible: Collection[str]) -> bool:
    """Return whether the bias of a Gemm is stored, of the type of its weight, has a value per output and no user may set it."""
    bias = network.constants.get(own.node.input[2])
    if bias is None or bias.data_type != own.weight.data_type or bias.name in visible:
        return False
    return list(bias.dims) == [own.weight.dims[0 if own.transposed else 1]]


def _found(products: dict[str, _Product], part: str, parts: Joint) -> _Product:
    product = products.get(part)
    if product is None:
        raise GraphError(
            f"layer {part}: expected a product with a stored weight that no other node reads, to become one with "
            f"{', '.join(name for name in parts if name != part)}; the model has no such layer: plan this model anew"
        )
    if product.kind != products[parts[0]].kind:
        raise GraphError(f"layers {', '.join(parts)}: expected layers that read the same input; plan this model anew")
    return product


def _biases(network: Network, products: Sequence[_Product]) -> list[tuple[int, onnx.NodeProto]]:
    """Return the Add of a stored vector behind each product; none unless all have one, or where the products add themselves."""
    if products[0].kind[-1]:
        return []
    outputs = {value.name for value in network.graph.output}
    found = []
    for product in products:
        out = product.node.output[0]
        readers = network.readers.get(out, [])
        add = network.nodes[readers[0]] if len(readers) == 1 and out not in outputs else None
        if add is None or add.op_type != "Add" or add.domain not in STANDARD or list(add.input).count(out) != 1:
            return []
        bias = network.constants.get(_other(add, out))
        width = _width(network, product)
        if bias is None or list(bias.dims) != [width] or bias.name in {value.name for value in network.graph.input}:
            return []
        found.append((readers[0], add))
    return found


def _other(add: onnx.NodeProto, name: str) -> str:
    return str(next(operand for operand in add.input if operand != name))


def _width(network: Network, product: _Product) -> int:
    """Return the number of outputs of a product."""
    transposed = bool(product.kind[2])
    return int(network.constants[product.node.input[1]].dims[0 if transposed else 1])


def _as_one(
    network: Network, name: str, products: Sequence[_Product], biases: Sequence[tuple[int, onnx.NodeProto]], opset: int
) -> tuple[list[onnx.NodeProto], list[onnx.TensorProto]]:
    """Return the nodes and tensors that compute several products, and the sums behind them, at once."""
    first = products[0].node
    axis = 0 if products[0].kind[2] else 1

    def stored(names: Sequence[str], axis: int, name: str) -> onnx.TensorProto:
        arrays = [numpy_helper.to_array(network.constants[one]) for one in names]
        return numpy_helper.from_array(np.concatenate(arrays, axis), name)

    tensors = [stored([product.node.input[1] for product in products], axis, name)]
    node = onnx.NodeProto()
    node.CopyFrom(first)
    node.name, node.input[1], node.output[0] = name, name, f"{name}/product"
    if len(first.input) > 2 and first.input[2]:
        tensors.append(stored([product.node.input[2] for product in products], 0, f"{name}/bias"))
        node.input[2] = f"{name}/bias"
    nodes = [node]
    outputs = [product.node.output[0] for product in products]
    if biases:
        pairs = zip(products, biases, strict=True)
        tensors.append(stored([_other(add, product.node.output[0]) for product, (_, add) in pairs], 0, f"{name}/bias"))
        nodes.append(helper.make_node("Add", [node.output[0], f"{name}/bias"], [f"{name}/sum"], name=f"{name}/Add"))
        outputs = [add.output[0] for _, add in biases]
    sizes = [_width(network, product) for product in products]
    split = helper.make_node("Split", [nodes[-1].output[0]], outputs, name=f"{name}/Split", axis=-1)
    if opset >= SIZES_AS_INPUT:
        tensors.append(numpy_helper.from_array(np.array(sizes, np.int64), f"{name}/sizes"))
        split.input.append(f"{name}/sizes")
    else:
        split.attribute.append(helper.make_attribute("split", sizes))
    return [*nodes, split], tensors
