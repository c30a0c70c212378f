"""An ONNX graph as a differentiable torch module, so that its cores can be fitted without the source code of the model.

Every tensor of the graph can be an input or an output of a call, so that a block can run separately: the cores of a factored
block are fitted to the activations of the dense graph at the output of the block.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import cast

import numpy as np
import onnx
import torch
from onnx import numpy_helper
from torch import Tensor, nn

from tensorrail_runtime.errors import GraphError, first_line
from tensorrail_runtime.graphs.files import opset_of
from tensorrail_trainer.fit.limits import why_not
from tensorrail_trainer.fit.node import Node, read_node, read_tensor
from tensorrail_trainer.fit.operators import OPERATORS

_LAYOUTS = {4: torch.channels_last, 5: torch.channels_last_3d}
_LEAVE_OUT = "skip the fit of the cores to compress this model"


class OnnxModule(nn.Module):
    """The graph of an ONNX model, run node by node in torch.

    Kernels of convolutions are in channels_last memory format. Batch-norm uses its stored statistics and dropout does nothing,
    in training mode, too. Graphs in float16 take, compute and return float32; those in float64 stay in float64.

    Args:
        model: the ONNX model, with its tensors loaded.
        trainable: names of the float initializers that become parameters; all other tensors are buffers. Default: none.

    Raises:
        GraphError: a node is not supported, or a name in `trainable` is not a float initializer.

    """

    def __init__(self, model: onnx.ModelProto, trainable: Iterable[str] = ()) -> None:
        super().__init__()
        graph, trained = model.graph, list(dict.fromkeys(trainable))
        if graph.sparse_initializer:
            raise GraphError(f"expected dense initializers, got {len(graph.sparse_initializer)} sparse ones; {_LEAVE_OUT}")
        tensors = {proto.name: read_tensor(proto) for proto in graph.initializer}
        for name in trained:
            if name not in tensors or not tensors[name].is_floating_point():
                floats = [known for known, tensor in tensors.items() if tensor.is_floating_point()]
                raise GraphError(f"{name!r} cannot be trained: expected a float initializer, such as {', '.join(floats[:5])}")
        self.outputs = tuple(value.name for value in graph.output)
        self.inputs = tuple(value.name for value in graph.input if value.name not in tensors)
        nodes = _read_nodes(model, tensors, set(trained))
        kernels = {node.inputs[1] for node in nodes if node.op in ("Conv", "ConvTranspose")}
        self._names: dict[str, str] = {}  # name in the graph → name of the attribute
        self._trainable = tuple(trained)
        for index, (name, stored) in enumerate(tensors.items()):
            layout = _LAYOUTS.get(stored.dim()) if name in kernels else None
            tensor = stored.contiguous(memory_format=layout) if layout else stored
            self._names[name] = f"tensor{index}_{re.sub(r'[^0-9A-Za-z_]', '_', name)}"
            if name in trained:
                self.register_parameter(self._names[name], nn.Parameter(tensor))
            else:
                self.register_buffer(self._names[name], tensor)
        self._nodes = tuple(node for node in nodes if node.op != "Constant")
        self._known = {*self.inputs, *self._names, *(output for node in self._nodes for output in node.outputs if output)}
        self._plans: dict[tuple[frozenset[str], tuple[str, ...]], tuple[_Call, ...]] = {}

    def forward(self, feeds: Mapping[str, Tensor], outputs: Sequence[str] | None = None) -> dict[str, Tensor]:
        """Compute tensors of the graph. Only the nodes that they need are run.

        Args:
            feeds: tensors by name: inputs of the graph, or intermediate tensors, whose nodes are then not run.
            outputs: names of the tensors to compute; default: the outputs of the graph.

        Returns:
            The tensors by name.

        Raises:
            GraphError: a name is not in the graph, an input is missing, or shapes or types do not fit a node.

        """
        requested = self.outputs if outputs is None else tuple(outputs)
        key = (frozenset(feeds), requested)
        if key not in self._plans:
            self._plans[key] = self._plan(*key)
        values = {name: _to_computed_dtype(tensor) for name, tensor in feeds.items()}
        for call in self._plans[key]:
            node = call.node
            inputs = [values[name] if name in values else self._stored(name) if name else None for name in node.inputs]
            try:
                results = OPERATORS[node.op](node, inputs)
            except (RuntimeError, ValueError, TypeError, LookupError, ArithmeticError) as error:
                shapes = ", ".join("none" if tensor is None else str(list(tensor.shape)) for tensor in inputs)
                raise GraphError(f"{node}: {first_line(error)} (input shapes: {shapes})") from error
            for name, result in zip(node.outputs, results, strict=False):
                if name and name not in feeds:
                    values[name] = result
            for name in call.released:
                values.pop(name, None)
        return {name: values[name] if name in values else self._stored(name) for name in requested}

    def parameters_by_name(self) -> dict[str, nn.Parameter]:
        """Return the trainable initializers, by their names in the graph."""
        return {name: cast(nn.Parameter, getattr(self, self._names[name])) for name in self._trainable}

    def write_back(self, model: onnx.ModelProto) -> onnx.ModelProto:
        """Return a copy of a model with the values of the trained initializers.

        Args:
            model: the model; its initializers keep their types.

        Returns:
            The copy.

        Raises:
            GraphError: an initializer is missing or has another shape, or a value is not finite in its type.

        """
        updated = onnx.ModelProto()
        updated.CopyFrom(model)
        stored = {proto.name: proto for proto in updated.graph.initializer}
        for name, parameter in self.parameters_by_name().items():
            if name not in stored or list(stored[name].dims) != list(parameter.shape):
                actual = f"one of shape {list(stored[name].dims)}" if name in stored else "none"
                raise GraphError(
                    f"initializer {name!r}: expected one of shape {list(parameter.shape)} in the model, found {actual}"
                )
            dtype = onnx.helper.tensor_dtype_to_np_dtype(stored[name].data_type)
            with np.errstate(over="ignore"):
                values = parameter.detach().cpu().contiguous().numpy().astype(dtype)
            if not np.isfinite(values.astype(np.float64)).all():
                raise GraphError(f"initializer {name!r}: its trained values are not finite in {dtype}; lower the learning rate")
            for field in ("float_data", "double_data", "int32_data", "external_data", "data_location"):
                stored[name].ClearField(field)
            stored[name].raw_data = numpy_helper.from_array(values).raw_data
        return updated

    def _stored(self, name: str) -> Tensor:
        return cast(Tensor, getattr(self, self._names[name]))

    def _plan(self, fed: frozenset[str], requested: tuple[str, ...]) -> tuple[_Call, ...]:
        """Return the nodes to run, in order, each with the tensors that are not needed after it."""
        for name in (*fed, *requested):
            if name not in self._known or name in fed & self._names.keys():
                what = "is an initializer and cannot be fed" if name in self._names else "is not in the graph"
                raise GraphError(f"tensor {name!r} {what}; the graph's inputs are {', '.join(self.inputs)}")
        needed, chosen = set(requested) - fed, []
        for node in reversed(self._nodes):
            if not needed.isdisjoint(node.outputs):
                chosen.append(node)
                needed.difference_update(node.outputs)
                needed.update({name for name in node.inputs if name} - fed)
        missing = sorted(needed - self._names.keys())
        if missing:
            actual = ", ".join(sorted(fed)) or "none"
            raise GraphError(f"{', '.join(requested)}: expected {missing[0]!r} among the inputs that are fed, got {actual}")
        plan, needed_later = [], set(requested)
        for node in chosen:  # from the last node to the first
            tensors = {name for name in (*node.inputs, *node.outputs) if name} - self._names.keys()
            plan.append(_Call(node, tuple(tensors - needed_later)))
            needed_later |= tensors
        return tuple(reversed(plan))


@dataclass(frozen=True)
class _Call:
    node: Node
    released: tuple[str, ...]  # tensors that no later node reads


def _read_nodes(model: onnx.ModelProto, tensors: dict[str, Tensor], trained: set[str]) -> list[Node]:
    """Read and check all nodes; the tensors of Constant nodes are added to `tensors`."""
    opset = opset_of(model) or 1
    constants = {name: tensor for name, tensor in tensors.items() if name not in trained}
    available = {value.name for value in model.graph.input} | tensors.keys()
    used = {name for proto in model.graph.node for name in proto.input} | {value.name for value in model.graph.output}
    nodes = []
    for proto in model.graph.node:
        unread = Node(proto.op_type, proto.name, {}, opset, tuple(proto.input), tuple(proto.output))
        if proto.domain not in ("", "ai.onnx"):
            raise GraphError(
                f"{unread}: operators of the domain {proto.domain!r} are not supported, only those of ONNX; {_LEAVE_OUT}"
            )
        if proto.op_type not in OPERATORS:
            raise GraphError(f"{unread}: this operator is not supported; {_LEAVE_OUT}")
        node = read_node(proto, opset, constants, used)
        if why := why_not(node):
            raise GraphError(f"{node}: {why}; {_LEAVE_OUT}")
        for name in filter(None, node.inputs):
            if name not in available:
                raise GraphError(f"{node}: input {name!r} is not computed by any earlier node")
        if duplicates := available.intersection(filter(None, node.outputs)):
            raise GraphError(f"{node}: output {min(duplicates)!r} already exists; expected unique names")
        available.update(filter(None, node.outputs))
        if node.op == "Constant":
            (tensor,) = OPERATORS[node.op](node, ())
            tensors[node.outputs[0]] = constants[node.outputs[0]] = tensor
        nodes.append(node)
    return nodes


def _to_computed_dtype(tensor: Tensor) -> Tensor:
    return tensor.float() if tensor.dtype in (torch.float16, torch.bfloat16) else tensor
