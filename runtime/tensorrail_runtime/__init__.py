"""ONNX models measured: sessions, parity, accuracy, cost, interleaved latency, report. Nothing of torch."""

from tensorrail_runtime.accuracy import Accuracy, Comparison, Evaluation, accuracy, compare_scores, evaluate
from tensorrail_runtime.cost import GraphCost, cost
from tensorrail_runtime.footprint import Footprint, footprint
from tensorrail_runtime.inputs import random_inputs
from tensorrail_runtime.latency import LatencyReport, bench
from tensorrail_runtime.parity import Parity, Tolerances, parity
from tensorrail_runtime.placement import Placement, placement
from tensorrail_runtime.report import Report
from tensorrail_runtime.session import ModelError, Settings, open_session

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
    "Report",
    "Settings",
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
