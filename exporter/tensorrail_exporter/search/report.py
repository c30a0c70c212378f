"""The record of a plan: every layer, what the network costs before and after, and what was measured."""

from __future__ import annotations

from typing import Literal

from tensorrail_exporter.plans.plan import Plan
from tensorrail_exporter.rewrite.survey import DenseLayer
from tensorrail_exporter.search.targets import TARGETS, is_met
from tensorrail_runtime.measure.latency import Ratio
from tensorrail_runtime.records import Record
from tensorrail_runtime.sessions.machine import Machine
from tensorrail_runtime.tables import Part, PrintedRecord, Table


class PlannedLayer(Record):
    """One layer of the plan; `reason` says why it stays dense.

    Milliseconds are predicted, for all nodes of the layer together; 0 where the layer was not timed.
    """

    layer: str
    what: str
    format: str | None
    ranks: tuple[int, ...]
    steps: str
    dense_ms: float
    ms: float
    dense_macs: int
    macs: int
    dense_params: int
    params: int
    loss: float
    reason: str = ""

    @classmethod
    def dense(cls, layer: DenseLayer, milliseconds: float, reason: str) -> PlannedLayer:
        """Return the row of a layer that stays dense."""
        return cls(
            layer=layer.name,
            what=layer.describe(),
            format=None,
            ranks=(),
            steps="",
            dense_ms=milliseconds,
            ms=milliseconds,
            dense_macs=layer.macs,
            macs=layer.macs,
            dense_params=layer.params,
            params=layer.params,
            loss=0.0,
            reason=reason,
        )


class Size(Record):
    """What one network costs at the batch size of the report: FLOPs are 2 × MACs, `bytes` those of its files."""

    params: int
    macs: int
    flops: int
    bytes: int
    milliseconds: float  # median, measured or predicted: the field that holds the record says which

    def of(self, target: str) -> float:
        """Return the quantity that a target is about."""
        return float(self.milliseconds if target == "latency" else getattr(self, target))


def times_less(dense: Size, factored: Size, target: str) -> float:
    """Return how many times less of a quantity the factored network takes; 1 where both take none."""
    return dense.of(target) / factored.of(target) if factored.of(target) else 1.0


class PlanReport(PrintedRecord):
    """How a plan was chosen, and what is expected of it.

    `dense` is measured; `planned` is counted in the chosen network's graph, with the predicted time. `measured` is the chosen
    network against the dense one. `slower` are the rewritten layers that its profile shows slower than dense: none, unless
    slower layers were allowed or no other choice meets the targets. On a GPU nothing is profiled: the latency table alone says
    which layers are faster.
    """

    version: Literal[1] = 1
    targets: dict[str, float]
    provider: str
    batch: int
    grid: int
    loss_from: str
    dense: Size
    planned: Size
    rows: tuple[PlannedLayer, ...]
    measured: Ratio | None
    slower: tuple[str, ...] = ()
    machine: Machine
    plan: Plan

    @property
    def predicted(self) -> float:
        """The speed-up that the latency table predicts."""
        return self.dense.milliseconds / self.planned.milliseconds

    @property
    def prediction_error(self) -> float | None:
        """Predicted time over measured time, less one."""
        return None if self.measured is None else self.measured.value / self.predicted - 1

    @property
    def reached(self) -> dict[str, float]:
        """How many times less the chosen network takes, by target: latency measured, the others counted in its graph."""
        latency = 1.0 if self.measured is None else self.measured.value
        return {name: latency if name == "latency" else times_less(self.dense, self.planned, name) for name in TARGETS}

    @property
    def missed(self) -> dict[str, float]:
        """What was reached of the targets that the chosen network does not meet."""
        return {name: self.reached[name] for name, target in self.targets.items() if not is_met(self.reached[name], target)}

    @property
    def meets(self) -> bool:
        """Whether the chosen network meets all targets."""
        return not self.missed

    def shown(self) -> tuple[Part, ...]:
        """Return the table of layers, what is predicted and what was measured."""
        head = (
            *("layer", "dense layer", "runs as", "dense (ms)", "planned (ms)", "speed-up"),
            *("dense MFLOPs", "planned MFLOPs", "loss"),
        )
        rows = [
            (
                row.layer,
                row.what,
                row.steps or f"dense: {row.reason}",
                f"{row.dense_ms:.3f}",
                f"{row.ms:.3f}",
                f"{row.dense_ms / row.ms:.2f}×" if row.format else "–",
                f"{2 * row.dense_macs / 1e6:.1f}",
                f"{2 * row.macs / 1e6:.1f}",
                f"{row.loss:.2e}" if row.format else "–",
            )
            for row in self.rows
        ]
        lines = [
            f"predicted: {self.dense.milliseconds:.2f} → {self.planned.milliseconds:.2f} ms ({self.predicted:.2f}×), "
            f"FLOPs ÷ {self.reached['flops']:.2f}, parameters ÷ {self.reached['params']:.2f}"
        ]
        lines += [
            f"target missed: {name}={self.targets[name]:g}, reached {reached:.2f}" for name, reached in self.missed.items()
        ]
        title = f"plan for {self.provider}, batch {self.batch}; losses measured on {self.loss_from}"
        return (Table(title, head, rows), *lines, *self._measured_lines())

    def _measured_lines(self) -> list[str]:
        if self.measured is None:
            return ["no layer is rewritten: every layer stays dense"]
        ratio = self.measured
        lines = [
            f"measured: {ratio.value:.2f}× [{ratio.low:.2f}, {ratio.high:.2f}]; error of the predicted time "
            f"{100 * (self.prediction_error or 0.0):+.1f} %"
        ]
        if self.slower:
            lines.append(f"slower than dense in the network's profile: {', '.join(self.slower)}")
        if ratio.low <= 1.0:
            lines.append("the planned network is not faster: the interval of its speed-up is not above 1")
        return lines
