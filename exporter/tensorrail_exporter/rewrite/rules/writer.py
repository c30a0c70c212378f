"""Writing nodes into a graph or the body of a node, where all new names start with that of one layer."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import numpy as np
import onnx_graphsurgeon as gs

from tensorrail_exporter.rewrite.negligible import without_negligible
from tensorrail_exporter.rewrite.rules.emit import Site


class Writer:
    """Writes nodes into a graph or a body; all new names start with that of the layer."""

    def __init__(self, site: Site, layer: str, dtype: np.dtype) -> None:
        self.site, self.layer, self.dtype = site, layer, dtype

    def within(self, body: gs.Graph) -> Writer:
        """Return a writer into the body of a node."""
        return Writer(replace(self.site, graph=body), self.layer, self.dtype)

    def name(self, what: str) -> str:
        """Return a free name that starts with that of the layer."""
        return self.site.names.unique(f"{self.layer}/{what}")

    def variable(self, what: str) -> gs.Variable:
        """Return a new tensor."""
        return self.site.variable(f"{self.layer}/{what}", self.dtype)

    def constant(self, what: str, values: np.ndarray) -> gs.Constant:
        """Return a constant of the layer's type."""
        return self.site.constant(f"{self.layer}/{what}", without_negligible(values.astype(self.dtype)))

    def integers(self, what: str, values: Sequence[int] | np.ndarray) -> gs.Constant:
        """Return a constant of integers."""
        return self.site.constant(f"{self.layer}/{what}", np.array(values, np.int64))

    def add_with_outputs(self, op: str, inputs: list[gs.Tensor], count: int, **attrs: object) -> list[gs.Variable]:
        """Add a node and return its outputs."""
        outputs = [self.variable(op.lower()) for _ in range(count)]
        self.site.graph.nodes.append(gs.Node(op, self.name(f"{op.lower()}_node"), attrs, inputs, outputs))
        return outputs

    def add(self, op: str, inputs: list[gs.Tensor], **attrs: object) -> gs.Variable:
        """Add a node and return its only output."""
        return self.add_with_outputs(op, inputs, 1, **attrs)[0]

    def split(self, tensor: gs.Tensor, sizes: Sequence[int], axis: int) -> list[gs.Tensor]:
        """Return the parts of a tensor, of these sizes along an axis."""
        if len(sizes) == 1:
            return [tensor]
        return [*self.site.split(tensor, sizes, axis, f"{self.layer}/split", self.dtype)]

    def state(self, place: int, direction: int, gates: gs.Tensor, hidden: int) -> gs.Tensor:
        """Return the initial state (B, H) of one direction: from the node's input, or zeros."""
        inputs = self.site.node.inputs
        if len(inputs) > place and not inputs[place].is_empty():
            return self.add("Gather", [inputs[place], self.integers(f"direction{direction}", np.array(direction))], axis=0)
        of_integers = Writer(self.site, self.layer, np.dtype(np.int64))
        batch = of_integers.add("Gather", [of_integers.add("Shape", [gates]), self.integers("second", [1])])
        shape = of_integers.add("Concat", [batch, self.integers("hidden", [hidden])], axis=0)
        return self.add("ConstantOfShape", [shape], value=gs.Constant("zero", np.zeros(1, self.dtype)))

    def stack(self, tensors: list[gs.Tensor], axis: int, output: gs.Tensor) -> None:
        """Stack the tensors of all directions along a new axis of the output."""
        unsqueezed = [self.site.unsqueezed(tensor, [axis], f"{self.layer}/unsqueeze", self.dtype) for tensor in tensors]
        if len(unsqueezed) == 1:
            unsqueezed[0].inputs[0].outputs = [output]
        else:
            self.site.append("Concat", f"{self.layer}/directions", unsqueezed, output, {"axis": axis})
