"""Measures ONNX models with ONNX Runtime: cost, latency, parity, accuracy and memory. It does not need torch."""

import os

# For its telemetry, ONNX Runtime would store an identifier of this device, and it warns on stderr without a home folder.
os.environ.setdefault("ORT_DISABLE_TELEMETRY", "1")

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
