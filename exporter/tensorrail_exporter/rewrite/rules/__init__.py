"""The rewriting rules, one per file: which nodes a rule accepts, why it refuses one, and how it writes the steps.

The rules are tried in the order of `RULES`. A planned layer that no rule accepts is an error; it is never skipped silently.
"""

from __future__ import annotations

from typing import Protocol

import numpy as np
import onnx_graphsurgeon as gs

from tensorrail_exporter.formats.contraction import LayerSpec, Step
from tensorrail_exporter.rewrite.rules import (
    attention,
    conv,
    conv_transpose,
    gather,
    gemm,
    matmul,
    recurrence,
    recurrent,
)
from tensorrail_exporter.rewrite.rules.emit import Site


class Rule(Protocol):
    """The functions that every rule module has. Weights are (O, I, *K) for a convolution, else (O, I)."""

    OPS: tuple[str, ...]
    """The operators that the rule rewrites: ONNX's by their names, others as `domain:name`."""

    def weight_input(self, node: gs.Node) -> int:
        """Return the index of the node's input that is its weight."""

    def why_not(self, node: gs.Node) -> str | None:
        """Return the reason why this node stays dense, or None if it can be rewritten."""

    def layer(self, node: gs.Node) -> LayerSpec:
        """Return the description of the layer that the node computes."""

    def weight(self, node: gs.Node) -> np.ndarray:
        """Return the constant weight."""

    def replace_weight(self, node: gs.Node, weight: np.ndarray, name: str) -> None:
        """Replace the node's weight by a new constant of this name, which no other node shares."""

    def rewrite(self, site: Site, steps: tuple[Step, ...], layer: str) -> None:
        """Replace the node by the steps, between the same input and output; `layer` starts the names of new tensors."""


RULES: tuple[Rule, ...] = (conv, conv_transpose, gather, gemm, matmul, recurrent, attention)

SECOND_RULES: tuple[Rule, ...] = (recurrence,)
"""The rules of a node's second weight, which is a layer of its own. It has the names of that weight, not those of the node."""

STAY_DENSE = {
    "QLinearConv": "it is already quantized; factorize the floating-point model, then quantize the result",
    "ConvInteger": "it is already quantized; factorize the floating-point model, then quantize the result",
    "QLinearMatMul": "it is already quantized; factorize the floating-point model, then quantize the result",
    "MatMulInteger": "it is already quantized; factorize the floating-point model, then quantize the result",
    "RNN": "it is a plain RNN; only LSTM and GRU can be factorized",
}
"""Operators with weights that always stay dense, and the reason."""
