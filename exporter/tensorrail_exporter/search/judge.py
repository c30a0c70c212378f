"""Measures whole models, fitted and rewritten, on the inputs that models are chosen by."""

from __future__ import annotations

import onnx

from tensorrail_exporter.calibrate.inputs import Calibration
from tensorrail_exporter.search.divergence import Divergence, Outputs
from tensorrail_exporter.search.losses import agreement_between, outputs_of
from tensorrail_runtime.measure.agreement import Agreement
from tensorrail_runtime.sessions.session import Session


class Judge:
    """Measures models on the inputs that models are chosen by.

    Args:
        model: the dense graph.
        inputs: the inputs.
        metric: a score of each sample, whose fall is the loss; default: none, so outputs are compared with the dense ones.
        settings: how models run.

    Attributes:
        left_out: why labels of the inputs are not used; empty if they are, or there are none.

    """

    def __init__(self, model: onnx.ModelProto, inputs: Calibration, metric: str | None, settings: Session) -> None:
        self._inputs, self._settings = inputs, settings
        self._names = [output.name for output in model.graph.output]
        self._dense = self._outputs(model)
        self._divergence = Divergence(self._names, self._dense, inputs.labels, metric, inputs.samples)
        self.left_out = self._divergence.left_out

    def __call__(self, model: onnx.ModelProto) -> tuple[float, Agreement]:
        """Return the loss of a model, and how far its outputs agree with the dense ones."""
        outputs = self._outputs(model)
        return self._divergence.of(outputs), agreement_between(self._dense, outputs, self._inputs)

    def loss(self, model: onnx.ModelProto) -> float:
        """Return the loss of a model."""
        return self._divergence.of(self._outputs(model))

    def _outputs(self, model: onnx.ModelProto) -> Outputs:
        return outputs_of(model, self._names, self._inputs, self._settings)
