"""The report of a run: one record, which is written as JSON, as Markdown and as one self-contained HTML page."""

from __future__ import annotations

from typing import Literal

from tensorrail_runtime.graphs.cost import GraphCost
from tensorrail_runtime.measure.accuracy import Accuracy
from tensorrail_runtime.measure.latency import LatencyReport
from tensorrail_runtime.measure.parity import Parity
from tensorrail_runtime.measure.placement import Placement
from tensorrail_runtime.records import Record
from tensorrail_runtime.tables import Part, PrintedRecord, Table
from tensorrail_trainer.training.epochs import Epoch, projection_line


class LayerRow(Record):
    """One planned layer. Parameters count the weight only; `merged` lists the cores that each stored constant holds."""

    layer: str
    format: str
    modes: tuple[int, ...]
    ranks: tuple[int, ...]
    merge: str
    merged: tuple[tuple[int, ...], ...]
    steps: str
    dense_params: int
    core_params: int
    stored_params: int
    flops: int  # of all steps of the layer, for one sample
    weight_error: float
    time_share: float  # share of the time of the factored model at batch 1, from ONNX Runtime's profile


class DenseRow(Record):
    """One layer that the recipe would factor, and that is exported dense."""

    layer: str
    reason: str


class Model(Record):
    """One network: its cost at batch 1, and its accuracy on the test split in ONNX Runtime."""

    label: str
    cost: GraphCost
    accuracy: Accuracy


class Check(Record):
    """One target: what was required, what was measured, and whether the target is met."""

    name: str
    target: str
    measured: str
    holds: bool


class Report(PrintedRecord):
    """Everything that a run measured.

    `approximation` compares the dense network at the end of ADMM with the same network whose planned weights are replaced by
    the reconstruction from their cores. `numerical` compares the fine-tuned network in dense form with the factored graph. The
    accuracies are in `models`.
    """

    version: Literal[1] = 1
    name: str
    data: str
    command: str
    placement: Placement  # of the factored model
    models: tuple[Model, ...]  # the reference (dense control, network or form), the dense form, the factored model
    approximation: Parity
    numerical: Parity
    latency: tuple[LatencyReport, ...]
    layers: tuple[LayerRow, ...]
    dense: tuple[DenseRow, ...] = ()  # layers that the recipe would factor, and that stay dense
    training: tuple[Epoch, ...]
    cut_accuracy: float | None = None  # percent, in torch, of the factored network before fine-tuning
    checks: tuple[Check, ...]

    def shown(self) -> tuple[Part, ...]:
        """Return the table of networks, the three errors, the targets, and the time that projections took."""
        checks = [(c.name, c.target, c.measured, "yes" if c.holds else "NO") for c in self.checks]
        return (
            Table(self.name, self.head(), self.table()),
            Table("three errors", ("error", "measured"), self.errors()),
            Table("targets", ("target", "asked", "measured", "holds"), checks),
            *(f"layer {row.layer} stays dense: {row.reason}" for row in self.dense),
            *projection_line(self.training),
        )

    @property
    def holds(self) -> bool:
        """Whether every target is met."""
        return all(check.holds for check in self.checks)

    def model(self, label: str) -> Model:
        """Return the model with this label."""
        return next(model for model in self.models if model.label == label)

    def head(self) -> tuple[str, str, str, str]:
        """Return the header of the main table."""
        return "", self.models[0].label, "factored", ""

    def table(self) -> list[tuple[str, str, str, str]]:
        """Return the rows of the main table: quantity, dense reference, factored model, and their comparison."""
        dense, factored = self.models[0], self.model("factored")
        rows = [
            (
                "test accuracy",
                f"{dense.accuracy.percent:.2f} %",
                f"{factored.accuracy.percent:.2f} %",
                f"{factored.accuracy.percent - dense.accuracy.percent:+.2f} points",
            )
        ]
        for name, dense_cost, own_cost in (
            ("parameters", dense.cost.params, factored.cost.params),
            ("FLOPs (2 × MACs), batch 1", dense.cost.flops, factored.cost.flops),
            ("file, bytes", dense.cost.bytes, factored.cost.bytes),
        ):
            rows.append((name, f"{dense_cost:,}", f"{own_cost:,}", f"÷ {dense_cost / own_cost:.2f}"))
        for run in self.latency:
            a, b = run.latencies[0], run.latencies[1]
            ratio = run.ratios[0]
            rows.append(
                (
                    f"latency p50, batch {run.batch}",
                    f"{a.p50:.3f} ms",
                    f"{b.p50:.3f} ms",
                    f"{ratio.value:.2f}× [{ratio.low:.2f}, {ratio.high:.2f}]",
                )
            )
            for name, before, after in (("p90", a.p90, b.p90), ("p99", a.p99, b.p99)):
                if before is not None and after is not None:
                    rows.append(
                        (f"latency {name}, batch {run.batch}", f"{before:.3f} ms", f"{after:.3f} ms", f"{run.rounds} rounds")
                    )
        return rows

    def errors(self) -> list[tuple[str, str]]:
        """Return the three errors, each with a description of what is compared."""
        dense, factored = self.models[0].accuracy, self.model("factored").accuracy
        return [
            (
                "approximation (before fine-tuning: dense network against its weights cut to cores)",
                f"{self.approximation.worst:.2e} relative",
            ),
            ("numerical (dense form against factored graph, same provider)", f"{self.numerical.worst:.2e} relative"),
            (
                f"accuracy (factored against {self.models[0].label}, {factored.total} test samples)",
                f"{factored.percent - dense.percent:+.2f} points",
            ),
        ]
