"""The report of `compress`: the model that was written, compared with the dense model."""

from __future__ import annotations

from typing import Literal

from tensorrail_exporter.calibrate.layerwise import LayerFit
from tensorrail_exporter.plans.plan import Precision
from tensorrail_exporter.precision.reduce import PrecisionReport
from tensorrail_exporter.rewrite.rewriter import LayerRewrite
from tensorrail_exporter.search.guard import Guard
from tensorrail_exporter.search.report import PlannedLayer, PlanReport, Size
from tensorrail_runtime.measure.accuracy import Comparison
from tensorrail_runtime.measure.agreement import Agreement
from tensorrail_runtime.measure.latency import LatencyReport
from tensorrail_runtime.records import Record
from tensorrail_runtime.sessions.machine import Machine
from tensorrail_runtime.tables import Part, PrintedRecord, Table

_SHARES = ("top1", "top5")
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


class Point(Record):
    """A model that was measured beside others: how fast it is, and how closely it agrees with the dense model."""

    name: str
    precision: Precision
    layers: int  # layers that are factored; 0 for the dense network
    kept: tuple[str, ...] = ()  # nodes that stay in fp32 in a model in int8
    size: Size
    ratios: Ratios  # against the dense network in fp32
    approximation: float  # relative L2 error of the outputs, on inputs set aside, else on random ones
    loss: float | None = None  # on inputs that networks are chosen by
    chosen_by: Agreement | None = None  # agreement on the same inputs
    aside: Agreement | None = None  # agreement on inputs set aside
    score: float | None = None  # the mean score on labelled inputs that nothing is fitted to


class Front(Record):
    """All models that were measured in turns, with the dense one that they are compared with."""

    version: Literal[1] = 1
    model: str  # the file that was written
    dense: Size
    points: tuple[Point, ...]
    machine: Machine


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
    precision: Precision = "fp32"  # of the model that was written
    front: tuple[Point, ...] = ()  # all models that it was chosen from, timed in turns; empty for a single one
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
        written = "factored" if self.layers else f"in {self.precision}"
        parts.append(Table(self.model, ("quantity", "dense", written, f"dense against {written}"), rows))
        if self.front:
            parts.append(self._front())
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

    def _front(self) -> Table:
        rows = []
        for point in self.front:
            ratios, aside = point.ratios, point.aside
            shares = [] if aside is None else [aside.difference if aside.agreement is None else aside.agreement]
            rows.append(
                (
                    f"{point.name}{' (written)' if point.ratios == self.ratios else ''}",
                    f"{point.size.bytes:,}",
                    f"{point.size.milliseconds:.3f}",
                    f"{ratios.latency:.2f}× [{ratios.latency_low:.2f}, {ratios.latency_high:.2f}]",
                    *(f"{100 * share:.1f} %" for share in shares),
                    *(
                        []
                        if self.accuracy is None or point.score is None
                        else [_mean(self.accuracy.reference.metric, point.score)]
                    ),
                )
            )
        known = self.front[0].aside
        quality = [] if known is None else ["outputs differ by" if known.agreement is None else "best class agrees"]
        count = "" if known is None else f"; agreement on {known.samples} inputs set aside"
        head = (
            "network",
            "file (bytes)",
            f"latency p50 (ms), batch {self.latency.batch}",
            "speed-up over dense fp32",
            *quality,
        )
        return Table(f"models to choose from, timed in turns{count}", head, rows)

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
    metric = paired.reference.metric
    before, after = (_mean(metric, mean) for mean in (paired.reference.mean, paired.candidate.mean))
    if metric in _SHARES:
        return f"{metric} accuracy", before, after, f"{100 * paired.difference:+.2f} points"
    return f"mean score {metric}", before, after, f"{paired.difference:+.4f}"


def _mean(metric: str, mean: float) -> str:
    return f"{100 * mean:.2f} %" if metric in _SHARES else f"{mean:.4f}"
