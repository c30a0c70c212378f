"""One rule a file: which node it takes, why not when it does not, and how the node's contraction is written.

The rules are tried in the order of `RULES`; a planned layer that no rule takes is an error, never skipped in silence.
"""

from __future__ import annotations

from typing import Protocol

import numpy as np
import onnx_graphsurgeon as gs

from tensorrail_exporter.formats.contraction import LayerSpec, Step
from tensorrail_exporter.rewrite.rules import conv, gemm, matmul, recurrent
from tensorrail_exporter.rewrite.rules.emit import Site


class Rule(Protocol):
    """What every rule module offers."""

    OPS: tuple[str, ...]
    """The ONNX operators that the rule takes."""

    def weight_input(self, node: gs.Node) -> int:
        """Return which of the node's inputs is its weight."""

    def why_not(self, node: gs.Node) -> str | None:
        """Return the reason why this node stays dense, or None when it can be rewritten."""

    def layer(self, node: gs.Node) -> LayerSpec:
        """Return what the node computes, apart from the values of its weight."""

    def weight(self, node: gs.Node) -> np.ndarray:
        """Return the constant weight as (O, I, *K) or (O, I)."""

    def replace_weight(self, node: gs.Node, weight: np.ndarray, name: str) -> None:
        """Give the node a weight of its own, from (O, I, *K) or (O, I)."""

    def rewrite(self, site: Site, steps: tuple[Step, ...], layer: str) -> None:
        """Write the steps in place of the node, between the same input and output."""


RULES: tuple[Rule, ...] = (conv, gemm, matmul, recurrent)

STAY_DENSE = {
    "ConvTranspose": "it is a transposed convolution, which no format supports; leave it out of the plan",
    "QLinearConv": "it is already quantized; factorize the floating-point model, then quantize the result",
    "ConvInteger": "it is already quantized; factorize the floating-point model, then quantize the result",
    "QLinearMatMul": "it is already quantized; factorize the floating-point model, then quantize the result",
    "MatMulInteger": "it is already quantized; factorize the floating-point model, then quantize the result",
    "RNN": "it is a plain RNN; only LSTM and GRU can be factorized",
}
"""Operators with weights that are left dense on purpose, and why."""
