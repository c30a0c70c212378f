"""The metrics of the server, which Prometheus reads from the route /metrics."""

from __future__ import annotations

import time
from collections.abc import Iterable
from typing import Any

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, generate_latest
from prometheus_client.exposition import CONTENT_TYPE_LATEST as CONTENT_TYPE_LATEST

from tensorrail_runtime.serve.replicas.batching import Answer
from tensorrail_runtime.serve.replicas.differences import Difference

_SECONDS = (0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 30.0)
_ROWS = (1, 2, 4, 8, 16, 32, 64, 128, 256)
_RELATIVE = (1e-7, 1e-6, 1e-5, 1e-4, 1e-3, 1e-2, 3e-2, 0.1, 0.3, 1.0)


class Metrics:
    """Counters, gauges and histograms of one served model, labelled with its name, in their own registry."""

    def __init__(self, model: str) -> None:
        self.registry = CollectorRegistry()
        self._model = model
        self._requests = self._counter("requests", "Inference requests answered, by HTTP status.", "code")
        self._latency = self._histogram("request_seconds", "Seconds from the first byte read to the rendered answer.", _SECONDS)
        self._waited = self._histogram("queue_seconds", "Seconds that a request waits in a replica for its run.", _SECONDS)
        self._ran = self._histogram("run_seconds", "Seconds of one run of the model, for a whole batch.", _SECONDS)
        self._rows = self._histogram("batch_size", "Samples in one run of the model.", _ROWS)
        self._queue = Gauge(
            "tensorrail_queue_length",
            "Inference requests that were accepted and are not answered yet.",
            ("model",),
            registry=self.registry,
        )
        self._retries = self._counter("retries", "Requests sent again because their replica died.")
        self._shadow = self._counter(
            "shadow", "Sampled requests: compared, failed, or dropped because too many waited.", "outcome"
        )
        self._relative = self._histogram(
            "shadow_relative_l2", "Relative L2 difference between a served output and the shadow model's.", _RELATIVE, "output"
        )
        self._largest = Gauge(
            "tensorrail_shadow_max_abs",
            "Largest element-wise difference seen in an output.",
            ("model", "output"),
            registry=self.registry,
        )
        self._largest_seen: dict[str, float] = {}
        self.in_flight = 0
        self._counts = {kind: [0, 0.0] for kind in ("success", "fail", "queue", "compute_infer")}  # number and seconds
        self._samples, self._runs, self._last = 0, 0, 0.0
        self._queue.labels(model).set_function(lambda: self.in_flight)
        self._retries.labels(model)  # so that it is shown as 0 before the first retry
        for outcome in ("compared", "failed", "dropped"):
            self._shadow.labels(model, outcome)

    def exposition(self) -> bytes:
        """Return all metrics in the text format of Prometheus."""
        return generate_latest(self.registry)

    def answered(self, code: int, seconds: float) -> None:
        """Count one inference request, with its HTTP status and its time in seconds."""
        self._requests.labels(self._model, str(code)).inc()
        self._latency.labels(self._model).observe(seconds)
        self._count("success" if code < 400 else "fail", seconds)
        self._last = time.time()

    def ran(self, answer: Answer) -> None:
        """Record how long a request waited, and its run if it is the first request of the run."""
        self._waited.labels(self._model).observe(answer.waited)
        self._count("queue", answer.waited)
        if answer.first:
            self._samples, self._runs = self._samples + answer.rows, self._runs + 1
            self._count("compute_infer", answer.seconds)
            self._rows.labels(self._model).observe(answer.rows)
            self._ran.labels(self._model).observe(answer.seconds)

    def statistics(self) -> dict[str, Any]:
        """Return what was counted in the form of Triton's statistics: numbers, milliseconds since 1970, and nanoseconds."""
        durations = {kind: {"count": number, "ns": round(1e9 * seconds)} for kind, (number, seconds) in self._counts.items()}
        none = {"count": 0, "ns": 0}
        return {
            "last_inference": round(1e3 * self._last),
            "inference_count": self._samples,
            "execution_count": self._runs,
            "inference_stats": durations
            | {"compute_input": none, "compute_output": none, "cache_hit": none, "cache_miss": none},
            "batch_stats": [],
        }

    def _count(self, kind: str, seconds: float) -> None:
        self._counts[kind][0] += 1
        self._counts[kind][1] += seconds

    def retried(self) -> None:
        """Count a request that is sent again."""
        self._retries.labels(self._model).inc()

    def shadowed(self, outcome: str, differences: Iterable[Difference] = ()) -> None:
        """Count one sampled request, and record the differences of its outputs."""
        self._shadow.labels(self._model, outcome).inc()
        for difference in differences:
            output = difference.output
            self._relative.labels(self._model, output).observe(difference.relative_l2)
            self._largest_seen[output] = max(difference.max_abs, self._largest_seen.get(output, 0.0))
            self._largest.labels(self._model, output).set(self._largest_seen[output])

    def _counter(self, name: str, text: str, *labels: str) -> Counter:
        return Counter(f"tensorrail_{name}", text, ("model", *labels), registry=self.registry)

    def _histogram(self, name: str, text: str, buckets: tuple[float, ...], *labels: str) -> Histogram:
        return Histogram(f"tensorrail_{name}", text, ("model", *labels), buckets=buckets, registry=self.registry)
