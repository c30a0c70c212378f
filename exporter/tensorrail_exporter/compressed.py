"""The report of `compress`: the model that was written, compared with the dense model."""

from __future__ import annotations

from typing import Literal

from tensorrail_exporter.calibrate.layerwise import LayerFit
from tensorrail_exporter.precision.reduce import PrecisionReport
from tensorrail_exporter.rewrite.rewriter import LayerRewrite
from tensorrail_exporter.search.guard import Guard
from tensorrail_exporter.search.report import PlannedLayer, PlanReport, Size
from tensorrail_runtime.measure.accuracy import Comparison
from tensorrail_runtime.measure.agreement import Agreement
from tensorrail_runtime.measure.latency import LatencyReport
from tensorrail_runtime.records import Record
from tensorrail_runtime.tables import Part, PrintedRecord, Table

_COSTLY = 3  # layers that are named where a model is not accepted


class Ratios(Record):
    """Dense divided by factored. `latency` is measured, with its 95 % interval; the others are counted."""

    params: float
    macs: float
    flops: float
    bytes: float
    latency: float
    latency_low: float
    latency_high: float


class CompressReport(PrintedRecord):
    """The model that `compress` wrote, compared with the dense model."""

    version: Literal[1] = 1
    dense: Size
    factored: Size
    ratios: Ratios
    targets: dict[str, float]
    meets: bool
    predicted_latency: float | None  # the speed-up that the latency table predicted
    approximation: float  # relative L2 error of the outputs against the dense model, on inputs set aside, else on random ones
    top1_agreement: float | None  # on inputs set aside
    aside: Agreement | None = None  # the same with intervals; None: no inputs were set aside, so the accuracy is not known
    guard: Guard = Guard()
    numerical: float  # relative L2 error of the cores against reconstructed weights, before refining
    accuracy: Comparison | None
    layers: tuple[LayerRewrite, ...]
    planned: tuple[PlannedLayer, ...]
    fits: tuple[LayerFit, ...]
    latency: LatencyReport
    reduced: tuple[PrecisionReport, ...] = ()  # the factored model in fp16 or int8, compared with fp32
    planning: PlanReport | None = None  # how the plan was chosen, if a target was given
    model: str = ""  # the file that was written

    @property
    def faster(self) -> bool:
        """Whether the whole interval of the measured speed-up lies above 1."""
        return self.ratios.latency_low > 1.0

    def shown(self) -> tuple[Part, ...]:
        """Return the plan, the table of both models, the errors, and the models in reduced precision."""
        dense, factored, ratios = self.dense, self.factored, self.ratios
        rows = [
            ("parameters", f"{dense.params:,}", f"{factored.params:,}", f"÷ {ratios.params:.2f}"),
            ("FLOPs (2 × MACs)", f"{dense.flops:,}", f"{factored.flops:,}", f"÷ {ratios.flops:.2f}"),
            ("file (bytes)", f"{dense.bytes:,}", f"{factored.bytes:,}", f"÷ {ratios.bytes:.2f}"),
            (
                f"latency p50 (ms), batch {self.latency.batch}",
                f"{dense.milliseconds:.3f}",
                f"{factored.milliseconds:.3f}",
                f"{ratios.latency:.2f}× [{ratios.latency_low:.2f}, {ratios.latency_high:.2f}]",
            ),
        ]
        if (paired := self.accuracy) is not None:
            rows.append(_accuracy_row(paired))
        parts: list[Part] = list(self.planning.shown()) if self.planning else []
        parts.append(Table(self.model, ("quantity", "dense", "factored", "dense against factored"), rows))
        parts.append(f"numerical error of the rewriting {self.numerical:.1e} (relative L2)")
        parts.append(self._accuracy_line())
        parts += [f"warning: {warning}" for warning in self.latency.warnings]
        if not self.faster:
            parts.append("NOT measured to be faster than the dense model")
        if not self.meets:
            targets = ", ".join(f"{name}={value:g}" for name, value in self.targets.items())
            parts.append(f"target {targets} was NOT reached")
        if self.aside is not None and (refused := self.guard.refusal(self.aside)):
            parts.append(f"{refused}{self._advice()}")
        return (*parts, *(part for report in self.reduced for part in report.shown()))

    @property
    def accepted(self) -> bool:
        """Whether the outputs agree with the dense model's as closely as asked for, as far as is known."""
        return self.aside is None or not self.guard.refusal(self.aside)

    def _accuracy_line(self) -> str:
        if self.aside is not None:
            return self.aside.described()
        why = "there were too few calibration inputs to set some aside" if self.fits else "no calibration inputs were given"
        return f"nothing is known about the accuracy of this model: {why}"

    def _advice(self) -> str:
        costly = sorted((row for row in self.planned if row.format), key=lambda row: -row.loss)[:_COSTLY]
        names = f" the layers that cost most are {', '.join(row.layer for row in costly)};" if costly else ""
        return f":{names} keep them dense, ask for a smaller target, give more calibration inputs, or train"


def _accuracy_row(paired: Comparison) -> tuple[str, str, str, str]:
    """Return the row of the table: shares of right answers in percent, or mean scores of another metric."""
    metric, means = paired.reference.metric, (paired.reference.mean, paired.candidate.mean)
    if metric in ("top1", "top5"):
        before, after = (f"{100 * mean:.2f} %" for mean in means)
        return f"{metric} accuracy", before, after, f"{100 * paired.difference:+.2f} points"
    before, after = (f"{mean:.4f}" for mean in means)
    return f"mean score {metric}", before, after, f"{paired.difference:+.4f}"
