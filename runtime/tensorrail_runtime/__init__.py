"""Measures ONNX models with ONNX Runtime: cost, latency, parity, accuracy and memory. It does not need torch."""

import importlib
import os
from typing import TYPE_CHECKING

# For its telemetry, ONNX Runtime would store an identifier of this device, and it warns on stderr without a home folder.
os.environ.setdefault("ORT_DISABLE_TELEMETRY", "1")

if TYPE_CHECKING:
    from tensorrail_runtime.errors import ModelError
    from tensorrail_runtime.graphs.cost import GraphCost, cost
    from tensorrail_runtime.measure.accuracy import Accuracy, Comparison, Evaluation, accuracy, compare_scores, evaluate
    from tensorrail_runtime.measure.footprint import Footprint, footprint
    from tensorrail_runtime.measure.latency import LatencyReport, bench
    from tensorrail_runtime.measure.parity import Parity, Tolerances, parity
    from tensorrail_runtime.measure.placement import Placement, placement
    from tensorrail_runtime.sessions.inputs import random_inputs
    from tensorrail_runtime.sessions.session import Session, open_session

__all__ = [
    "Accuracy",
    "Comparison",
    "Evaluation",
    "Footprint",
    "GraphCost",
    "LatencyReport",
    "ModelError",
    "Parity",
    "Placement",
    "Session",
    "Tolerances",
    "accuracy",
    "bench",
    "compare_scores",
    "cost",
    "evaluate",
    "footprint",
    "open_session",
    "parity",
    "placement",
    "random_inputs",
]

# Imported when they are used: the processes in which models are timed need few of them.
_HOMES = {
    "Accuracy": "tensorrail_runtime.measure.accuracy",
    "accuracy": "tensorrail_runtime.measure.accuracy",
    "bench": "tensorrail_runtime.measure.latency",
    "compare_scores": "tensorrail_runtime.measure.accuracy",
    "Comparison": "tensorrail_runtime.measure.accuracy",
    "cost": "tensorrail_runtime.graphs.cost",
    "evaluate": "tensorrail_runtime.measure.accuracy",
    "Evaluation": "tensorrail_runtime.measure.accuracy",
    "Footprint": "tensorrail_runtime.measure.footprint",
    "footprint": "tensorrail_runtime.measure.footprint",
    "GraphCost": "tensorrail_runtime.graphs.cost",
    "LatencyReport": "tensorrail_runtime.measure.latency",
    "ModelError": "tensorrail_runtime.errors",
    "open_session": "tensorrail_runtime.sessions.session",
    "Parity": "tensorrail_runtime.measure.parity",
    "parity": "tensorrail_runtime.measure.parity",
    "Placement": "tensorrail_runtime.measure.placement",
    "placement": "tensorrail_runtime.measure.placement",
    "random_inputs": "tensorrail_runtime.sessions.inputs",
    "Session": "tensorrail_runtime.sessions.session",
    "Tolerances": "tensorrail_runtime.measure.parity",
}


def __getattr__(name: str) -> object:
    """Load a public name from its module when it is first used."""
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}; its names are {', '.join(__all__)}")
    value: object = getattr(importlib.import_module(_HOMES[name]), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    """Return the public names, for completion."""
    return list(__all__)
