"""ONNX models measured: sessions, parity, accuracy, cost, interleaved latency, report. Nothing of torch."""

from tensorrail_runtime.accuracy import Accuracy, accuracy
from tensorrail_runtime.cost import GraphCost, cost
from tensorrail_runtime.latency import LatencyReport, bench
from tensorrail_runtime.parity import Parity, parity, random_inputs
from tensorrail_runtime.report import Report
from tensorrail_runtime.session import ModelError, open_session

__all__ = [
    "Accuracy",
    "GraphCost",
    "LatencyReport",
    "ModelError",
    "Parity",
    "Report",
    "accuracy",
    "bench",
    "cost",
    "open_session",
    "parity",
    "random_inputs",
]
