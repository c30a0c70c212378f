"""The report of `compress`: the model that was written, compared with the dense model."""

from __future__ import annotations

from typing import Literal

from tensorrail_exporter.calibrate.layerwise import LayerFit
from tensorrail_exporter.plans.plan import Precision
from tensorrail_exporter.precision.reduce import WITH_CASTS, PrecisionReport
from tensorrail_exporter.rewrite.narrowed_heads import NarrowedHeads, heads_table
from tensorrail_exporter.rewrite.rewriter import LayerRewrite
from tensorrail_exporter.search.guard import Guard
from tensorrail_exporter.search.report import PlannedLayer, PlanReport, Size
from tensorrail_runtime.measure.accuracy import Comparison
from tensorrail_runtime.measure.agreement import Agreement
from tensorrail_runtime.measure.fusions import Fusions
from tensorrail_runtime.measure.latency import LatencyReport
from tensorrail_runtime.records import Record
from tensorrail_runtime.sessions.machine import Machine
from tensorrail_runtime.tables import Part, PrintedRecord, Table

_SHARES = ("top1", "top5")
_COSTLY = 3  # layers that are named where a model is not accepted
_NAMED = 8  # layers in fp32 that are named


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
    spared: tuple[str, ...] = ()  # nodes that stay in fp32 in a model in another precision
    size: Size
    ratios: Ratios  # against the dense network in fp32
    unstable: bool = False  # its times, or the dense network's, vary so much that the lower end of the interval counts
    # Relative L2 error of the outputs, on held-out inputs (see the report for where there are none). None: an output has
    # another shape than the dense model's, or values that are not finite.
    approximation: float | None
    loss: float | None = None  # on inputs that networks are chosen by
    chosen: Agreement | None = None  # agreement on the same inputs
    aside: Agreement | None = None  # agreement on held-out inputs
    score: float | None = None  # the mean score on labelled inputs that nothing is fitted to


class Front(Record):
    """All models that were measured in interleaved runs, with the dense one that they are compared with."""

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
    # Relative L2 error of the outputs against the dense model, on held-out inputs. Where `aside` is None it says little: it is
    # of the inputs that the model was fitted to or, without calibration inputs, of random ones. None as in `Point`.
    approximation: float | None
    top1_agreement: float | None  # on held-out inputs
    aside: Agreement | None = None  # the same with intervals; None: no inputs were held out, so the accuracy is not known
    guard: Guard = Guard()
    max_loss: float | None = None  # the limit on the loss, if there was one
    loss: float | None = None  # of the model that was written, on inputs that models are chosen by; None for a single model
    calibrated: bool = False  # whether there were calibration inputs
    held_out: bool = True  # whether these are other inputs than those that models were fitted to
    precision: Precision = "fp32"  # of the model that was written
    with_casts: bool = False  # whether the model is in fp16, which the provider computes in fp32 with casts around
    written: int = 0  # its place in `front`
    front: tuple[Point, ...] = ()  # all models that it was chosen from, timed in interleaved runs
    numerical: float  # relative L2 error of the cores against reconstructed weights, before refining
    exact: str = ""  # changes besides low rank, such as `joint layers` or `smaller heads`; empty: none
    accuracy: Comparison | None
    layers: tuple[LayerRewrite, ...]
    heads: tuple[NarrowedHeads, ...] = ()  # attention heads of a smaller size
    planned: tuple[PlannedLayer, ...]
    fits: tuple[LayerFit, ...]
    latency: LatencyReport
    fusions: Fusions | None = None  # the operators that ONNX Runtime fuses in the dense model and in the one that was written
    reduced: tuple[PrecisionReport, ...] = ()  # the factored model in fp16 or int8, compared with fp32
    not_reduced: tuple[str, ...] = ()  # precisions in which the model could not be written as well, with the reasons
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
                _interval(ratios),
            ),
        ]
        if (paired := self.accuracy) is not None:
            rows.append(_accuracy_row(paired))
        parts: list[Part] = list(self.planning.shown()) if self.planning else []
        written = "factored" if self.layers else self.exact or f"in {self.precision}"
        parts.append(Table(self.model, ("quantity", "dense", written, f"dense against {written}"), rows))
        if self.heads and self.planning is None:  # otherwise the plan shows them
            parts.append(heads_table(self.heads))
        if len(self.front) > 1:
            parts.append(self._front())
        if self.front and (names := self.front[self.written].spared):
            more = f" and {len(names) - _NAMED} more" if len(names) > _NAMED else ""
            parts.append(f"layers that stay in fp32: {', '.join(names[:_NAMED])}{more}")
        if self.layers or self.exact:
            parts.append(f"numerical error of the rewriting {self.numerical:.1e} (relative L2)")
        if not self.held_out:
            parts.append(
                "warning: there were too few calibration inputs to hold some out: the model, and its layers in fp32, were "
                "chosen by the inputs that it was fitted to, on which losses are smaller than on others"
            )
        parts.append(self._accuracy_line())
        if self.fusions is not None and (line := self.fusions.described()):
            parts.append(line)
        parts += [f"warning: {warning}" for warning in self.latency.warnings]
        if not self.faster:
            parts.append(f"NOT measured to be faster than the dense model{WITH_CASTS * self.with_casts}")
        if not self.meets:
            targets = ", ".join(f"{name}={value:g}" for name, value in self.targets.items())
            parts.append(f"target {targets} was NOT reached")
        if self.aside is not None and (refused := self.guard.refusal(self.aside)):
            parts.append(f"{refused}{self._advice()}")
        if self._over_the_limit():
            parts.append(f"NOT accurate enough: the loss is {self.loss:.3g}, expected at most {self.max_loss:g}")
        parts += [part for report in self.reduced for part in report.shown()]
        return (*parts, *(f"NOT written in {reason}" for reason in self.not_reduced))

    def _front(self) -> Table:
        """Return the table of all models, with the columns for which something was measured."""
        known = self.front[0].aside
        quality = "outputs differ by" if known is None or known.agreement is None else "top-1 agreement"
        metric = "" if self.accuracy is None else self.accuracy.reference.metric
        columns: dict[str, list[str]] = {
            "model": [f"{point.name}{' (written)' if k == self.written else ''}" for k, point in enumerate(self.front)],
            "file (bytes)": [f"{point.size.bytes:,}" for point in self.front],
            f"latency p50 (ms), batch {self.latency.batch}": [f"{point.size.milliseconds:.3f}" for point in self.front],
            "speed-up over dense fp32": [_interval(point.ratios) for point in self.front],
            "loss": ["" if point.loss is None else f"{point.loss:.3g}" for point in self.front],
            quality: ["" if point.aside is None else _quality(point.aside) for point in self.front],
            f"{metric} (dense fp32: {_mean(metric, self.accuracy.reference.mean)})" if self.accuracy is not None else "": [
                "" if point.score is None else _mean(metric, point.score) for point in self.front
            ],
        }
        told = {head: cells for head, cells in columns.items() if any(cells)}
        chosen = self.front[0].chosen
        title = "models to choose from, timed in interleaved runs"
        title += "" if chosen is None else f"; loss on {chosen.samples} inputs that they are chosen by"
        title += "" if known is None else f"; agreement on {known.samples} held-out inputs"
        return Table(title, tuple(told), list(zip(*told.values(), strict=True)))

    @property
    def accepted(self) -> bool:
        """Whether outputs agree and the loss is as small as asked for, as far as is known."""
        return not self._over_the_limit() and (self.aside is None or not self.guard.refusal(self.aside))

    def _over_the_limit(self) -> bool:
        return self.max_loss is not None and self.loss is not None and self.loss > self.max_loss

    def _accuracy_line(self) -> str:
        if self.aside is not None:
            unlimited = self.aside.agreement is None and self.guard.max_difference is None and self.max_loss is None
            return f"{self.aside.described()}{'; no limit was given for it' * unlimited}"
        few, none = "there were too few calibration inputs to hold some out", "no calibration inputs were given"
        why = few if self.calibrated else none
        return f"nothing is known about the accuracy of this model: {why}"

    def _advice(self) -> str:
        costly = sorted((row for row in self.planned if row.format), key=lambda row: -row.loss)[:_COSTLY]
        dense = f" the layers that cost most are {', '.join(row.layer for row in costly)}; keep them dense," if costly else ""
        return f":{dense} ask for a smaller target, give more calibration inputs, or train"


def _accuracy_row(paired: Comparison) -> tuple[str, str, str, str]:
    """Return the row of the table: shares of right answers in percent, or mean scores of another metric."""
    metric = paired.reference.metric
    before, after = (_mean(metric, mean) for mean in (paired.reference.mean, paired.candidate.mean))
    if metric in _SHARES:
        return f"{metric} accuracy", before, after, f"{100 * paired.difference:+.2f} points"
    return f"mean score {metric}", before, after, f"{paired.difference:+.4f}"


def _interval(ratios: Ratios) -> str:
    return f"{ratios.latency:.2f}× [{ratios.latency_low:.2f}, {ratios.latency_high:.2f}]"


def _quality(aside: Agreement) -> str:
    return f"{100 * (aside.difference if aside.agreement is None else aside.agreement):.1f} %"


def _mean(metric: str, mean: float) -> str:
    return f"{100 * mean:.2f} %" if metric in _SHARES else f"{mean:.4f}"
