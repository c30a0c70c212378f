"""Writing the steps of a contraction as ONNX nodes."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field

import numpy as np
import onnx_graphsurgeon as gs
from onnx import TensorProto

from tensorrail_exporter.formats.contraction import Conv, Gather, GatherMatMul, MatMul, Reshape, SplitIndex, Step
from tensorrail_exporter.graphs.names import free_name
from tensorrail_exporter.rewrite.negligible import without_negligible
from tensorrail_runtime.errors import GraphError

_MOD = 10  # the opset from which there is Mod
_AS_INPUT = 13  # the opset from which sizes of Split and axes of Unsqueeze are inputs


@dataclass(frozen=True)
class Names:
    """The names of tensors and nodes that are taken, in the graph and in the bodies of its nodes.

    Attributes:
        taken: all names in use.
        constants: the initializers that a rule has added, by the name that it asked for; integers also by the graph that they
            are in.

    """

    taken: set[str]
    constants: dict[tuple[str, int], gs.Constant] = field(default_factory=dict)

    def unique(self, name: str) -> str:
        """Return `name`, or the first of `name_2`, `name_3`, … that is free, and mark it as taken."""
        return free_name(name, self.taken)


@dataclass(frozen=True)
class Site:
    """A node to rewrite, and where it is.

    Attributes:
        graph: the graph, or the body of a node, that contains the node.
        node: the node to rewrite.
        names: the names that are taken in the whole model.
        scan: whether to write the node's loop as a Scan; default False.
        gates: whether the loop is rewritten afterwards, from the inputs of all gates: then the rule of an input weight computes
            these in torch's order, in place of the data, and leaves the node without an input weight; default False.

    """

    graph: gs.Graph
    node: gs.Node
    names: Names
    scan: bool = False
    gates: bool = False

    def constant(self, name: str, values: np.ndarray) -> gs.Constant:
        """Return an initializer with this name and these values; nodes with the same cores (tied weights) share it.

        Shapes and sizes are shared within one graph only: onnx infers no shapes in a body from constants of the graph around.
        """
        key = (name, id(self.graph) if np.issubdtype(values.dtype, np.integer) else 0)
        existing = self.names.constants.get(key)
        if existing is not None and existing.dtype == values.dtype and np.array_equal(existing.values, values):
            return existing
        constant = gs.Constant(self.names.unique(name), np.asarray(values, order="C"))
        self.names.constants.setdefault(key, constant)
        return constant

    def variable(self, name: str, dtype: np.dtype) -> gs.Variable:
        """Return a new tensor with this name, or a free one that starts with it."""
        return gs.Variable(self.names.unique(name), dtype=dtype)

    def append(
        self, op: str, name: str, inputs: list[gs.Tensor], output: gs.Tensor, attrs: dict[str, object] | None = None
    ) -> gs.Node:
        """Add a node with one output to the graph."""
        if op in ("Add", "Mul") and self.graph.opset < 7:
            attrs = {"broadcast": 1, **(attrs or {})}
        node = gs.Node(op, self.names.unique(name), attrs=attrs or {}, inputs=inputs, outputs=[output])
        self.graph.nodes.append(node)
        return node

    def split(self, source: gs.Tensor, sizes: Sequence[int], axis: int, name: str, dtype: np.dtype) -> list[gs.Variable]:
        """Split an axis of a tensor into parts of these sizes."""
        parts = [self.variable(f"{name}{k}", dtype) for k in range(len(sizes))]
        attrs: dict[str, object] = {"axis": axis}
        inputs = [source]
        if self.graph.opset < _AS_INPUT:
            attrs["split"] = list(sizes)
        else:
            inputs.append(self.constant(f"{name}_sizes", np.array(sizes, np.int64)))
        self.graph.nodes.append(gs.Node("Split", self.names.unique(f"{name}_split"), attrs, inputs, parts))
        return parts

    def unsqueezed(self, tensor: gs.Tensor, axes: Sequence[int], name: str, dtype: np.dtype) -> gs.Variable:
        """Return a tensor with new axes of size 1."""
        out = self.variable(name, dtype)
        if self.graph.opset < _AS_INPUT:
            self.append("Unsqueeze", f"{name}_node", [tensor], out, {"axes": list(axes)})
        else:
            places = self.constant(f"{name}_axes{'_'.join(map(str, axes))}", np.array(axes, np.int64))
            self.append("Unsqueeze", f"{name}_node", [tensor, places], out)
        return out

    def chain(
        self, source: gs.Tensor, target: gs.Tensor, steps: tuple[Step, ...], layer: str, dtype: np.dtype
    ) -> list[gs.Node]:
        """Append one node per step between `source` and `target`, and those of indices of several modes.

        Initializers are named `<layer>/<cores>`, as in the cores file, such as `conv1/0+1` for two merged cores.

        Returns:
            The nodes; a rule may give the last one the bias or an attribute of the original node.

        """
        nodes: list[gs.Node] = []
        of_modes: Iterator[gs.Tensor] = iter(())
        for index, step in enumerate(steps):
            if isinstance(step, SplitIndex):
                of_modes = iter(self._split_index(source, step, layer))
                continue
            out = target if index == len(steps) - 1 else self.variable(f"{layer}/step{index}", dtype)
            op, attrs, operand = self._node_of(step, layer, dtype)
            if isinstance(step, Gather):
                source = next(of_modes, source)
            elif isinstance(step, GatherMatMul):
                matrices = self.variable(f"{layer}/matrices{index}", dtype)
                self.append("Gather", f"{layer}/gather{index}", [operand, next(of_modes)], matrices)
                operand = matrices
            left = isinstance(step, Gather | GatherMatMul) or (isinstance(step, MatMul) and step.side == "left")
            nodes.append(
                self.append(op, f"{layer}/{op.lower()}{index}", [operand, source] if left else [source, operand], out, attrs)
            )
            source = out
        return nodes

    def _split_index(self, indices: gs.Tensor, step: SplitIndex, layer: str) -> list[gs.Tensor]:
        """Return the index of each mode, the last mode first: i mod n, and ⌊i / n⌋ of the modes before it.

        Indices that the table does not have are refused by the Gather of the first mode, but for those before the first entry,
        which read the padding.
        """
        if self.graph.opset < _MOD:
            raise GraphError(
                f"layer {layer}: expected opset {_MOD} or newer, since an embedding in format ttm needs the operator Mod, got "
                f"opset {self.graph.opset}; convert the model to a newer opset, or use another format"
            )
        is_known = indices.dtype in (np.int32, np.int64)
        kind = np.dtype(indices.dtype if is_known else np.int64)

        def apply(op: str, name: str, inputs: list[gs.Tensor], dtype: type | np.dtype = kind) -> gs.Variable:
            out = self.variable(f"{layer}/{name}", np.dtype(dtype))
            self.append(op, f"{layer}/{name}_node", inputs, out, {"to": TensorProto.INT64} if op == "Cast" else None)
            return out

        def number(value: int) -> gs.Constant:
            return self.constant(f"{layer}/number{value}", np.array(value, kind))

        if not is_known:  # graphs need not state the types of inner tensors
            indices = apply("Cast", "index", [indices])
        if step.padding:
            negative = apply("Less", "negative", [indices, number(0)], np.bool_)
            behind = apply("Add", "behind_padding", [indices, number(step.padding)])
            indices = apply("Where", "padded_index", [negative, indices, behind])
        of_modes: list[gs.Tensor] = []
        for size in reversed(step.modes[1:]):
            of_modes.append(apply("Mod", "index_of_mode", [indices, number(size)]))
            multiple = apply("Sub", "index_of_first", [indices, of_modes[-1]])
            indices = apply("Div", "index_of_modes", [multiple, number(size)])
        return [*of_modes, indices]

    def _node_of(
        self, step: Conv | MatMul | Gather | GatherMatMul | Reshape, layer: str, dtype: np.dtype
    ) -> tuple[str, dict[str, object], gs.Tensor]:
        match step:
            case Conv():
                attrs: dict[str, object] = {
                    "kernel_shape": list(step.weight.shape[2:]),
                    "strides": list(step.stride),
                    "dilations": list(step.dilation),
                    "group": step.groups,
                }
                attrs |= {"pads": list(step.pads)} if step.auto_pad == "NOTSET" else {"auto_pad": step.auto_pad}
                attrs |= {"output_padding": list(step.output_padding)} if any(step.output_padding) else {}
                kernel = step.spread() if step.transposed else step.weight
                op = "ConvTranspose" if step.transposed else "Conv"
                return op, attrs, self.constant(f"{layer}/{_cores(step.cores)}", _stored(layer, kernel, dtype))
            case MatMul() | GatherMatMul():
                return "MatMul", {}, self.constant(f"{layer}/{_cores(step.cores)}", _stored(layer, step.weight, dtype))
            case Gather():
                return "Gather", {}, self.constant(f"{layer}/{_cores(step.cores)}", _stored(layer, step.weight, dtype))
            case Reshape():
                name = f"{layer}/shape{'_'.join(map(str, step.shape))}"
                return "Reshape", {}, self.constant(name, np.array(step.shape, np.int64))


def _stored(layer: str, weight: object, dtype: np.dtype) -> np.ndarray:
    """Return the weight of a step in the type of the layer; raises `GraphError` if a value of its cores is too large for it."""
    with np.errstate(over="ignore"):
        stored = np.asarray(weight).astype(dtype)
    if not np.isfinite(stored).all():
        raise GraphError(
            f"layer {layer}: its cores hold values that are too large for {stored.dtype}; scale them, or keep the layer dense"
        )
    return without_negligible(stored)


def _cores(cores: tuple[int, ...]) -> str:
    return "+".join(map(str, cores))
