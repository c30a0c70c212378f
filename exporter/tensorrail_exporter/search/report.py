"""The report of a plan: its layers, the size of the network before and after, and the measured speed-up."""

from __future__ import annotations

from typing import Literal

from tensorrail_exporter.plans.plan import Plan, Precision
from tensorrail_exporter.rewrite.narrowed_heads import NarrowedHeads, heads_table
from tensorrail_exporter.rewrite.survey import DenseLayer, LeftOut
from tensorrail_exporter.search.targets import TARGETS, is_met
from tensorrail_runtime.measure.agreement import Agreement
from tensorrail_runtime.measure.latency import Ratio
from tensorrail_runtime.records import Record
from tensorrail_runtime.sessions.machine import Machine
from tensorrail_runtime.tables import Part, PrintedRecord, Table


class PlannedLayer(Record):
    """One layer of the plan; `reason` says why it stays dense.

    Milliseconds are predicted, for all nodes of the layer together; 0 if the layer was not timed.
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
    whole_node: bool = False  # whether its times are those of a node whose other weight has them in its row as well

    @classmethod
    def dense(cls, layer: DenseLayer, milliseconds: float, reason: str) -> PlannedLayer:
        """Return the row of a layer that stays dense.

        Args:
            layer: the layer.
            milliseconds: its time.
            reason: why it stays dense.

        """
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
            whole_node=bool(layer.spec.state_products),
        )

    @classmethod
    def left_out(cls, row: LeftOut) -> PlannedLayer:
        """Return the row of a node with a weight that cannot be factored."""
        return cls(
            layer=row.name,
            what=row.op,
            format=None,
            ranks=(),
            steps="",
            dense_ms=0.0,
            ms=0.0,
            dense_macs=0,
            macs=0,
            dense_params=row.params,
            params=row.params,
            loss=0.0,
            reason=f"cannot be rewritten: {row.reason}",
        )


class Size(Record):
    """Size and time of one network at the batch size of the report. FLOPs are 2 × MACs; `bytes` is the size of its files."""

    params: int
    macs: int
    flops: int
    bytes: int
    milliseconds: float  # median, measured or predicted: the field that holds the record says which

    def of(self, target: str) -> float:
        """Return the quantity that a target refers to, such as `milliseconds` for `latency`."""
        return float(self.milliseconds if target == "latency" else getattr(self, target))


def times_less(dense: Size, factored: Size, target: str) -> float:
    """Return the reduction factor of a quantity.

    Args:
        dense: the size of the dense network.
        factored: the size of the factored network.
        target: the quantity: `latency`, `flops`, `params`, `bytes` or `macs`.

    Returns:
        Dense divided by factored; 1 if factored is 0.

    """
    return dense.of(target) / factored.of(target) if factored.of(target) else 1.0


class VerifiedLoss(Record):
    """The loss of the chosen network as a whole, with all of its layers approximated, before cores are fitted.

    `predicted` is the sum of the losses of its layers, each measured alone. `samples` is the number of inputs that ranks were
    chosen by, on which both were measured; `chosen` is the agreement on others, which networks were compared on once cores were
    fitted, where the fastest network that agrees was looked for. `aside` compares the outputs on inputs that were not used for
    anything else; it is None if there were too few to hold any out (`too_few`), or if the network is compared later, as in
    `compress`.
    """

    unit: str
    predicted: float
    loss: float
    corrections: int  # how often the losses of layers were scaled and the choice repeated
    samples: int
    chosen: Agreement | None = None
    aside: Agreement | None = None
    too_few: bool = False

    def described(self) -> list[str]:
        """Return the lines for people."""
        lines = [
            f"loss of the planned network ({self.unit}): predicted {self.predicted:.3g} from single layers, measured "
            f"{self.loss:.3g} on {self.samples} inputs"
        ]
        if self.chosen is not None:
            lines.append(
                f"once cores were fitted, on the {self.chosen.samples} inputs that networks were compared on: "
                f"{self.chosen.words()}"
            )
        if self.too_few:
            lines.append("too few inputs to hold any out: the loss on other inputs is not known")
        if self.aside is not None:
            lines.append(f"before cores are fitted, {self.aside.described()}")
        return lines


class PlanReport(PrintedRecord):
    """How a plan was chosen, and what it achieves.

    `dense` is measured. `planned` is counted in the graph of the chosen network, with the predicted time. `measured` is the
    speed-up of the chosen network over the dense one. `slower` lists rewritten layers that are slower than dense in its
    profile; it is empty unless slower layers were allowed or no other choice meets the targets. On a GPU, and in fp16 and int8,
    nothing is profiled: the latency table alone decides which layers are faster.
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
    verified: VerifiedLoss | None = None  # without calibration inputs there is none
    precision: Precision = "fp32"  # of the planned network; the dense one is in fp32
    slower: tuple[str, ...] = ()
    warnings: tuple[str, ...] = ()  # what makes the times less reliable than they seem
    machine: Machine
    plan: Plan
    heads: tuple[NarrowedHeads, ...] = ()  # attention heads of a smaller size
    heads_left: tuple[str, ...] = ()  # layers whose heads keep their size, with the reason

    @property
    def predicted(self) -> float:
        """The speed-up that the latency table predicts."""
        return self.dense.milliseconds / self.planned.milliseconds

    @property
    def prediction_error(self) -> float | None:
        """Predicted time divided by measured time, minus 1."""
        return None if self.measured is None else self.measured.value / self.predicted - 1

    @property
    def reached(self) -> dict[str, float]:
        """The reduction factors of the chosen network by target: latency is measured, the others are counted in its graph."""
        latency = 1.0 if self.measured is None else self.measured.value
        return {name: latency if name == "latency" else times_less(self.dense, self.planned, name) for name in TARGETS}

    @property
    def missed(self) -> dict[str, float]:
        """The reduction factors of the targets that the chosen network does not meet."""
        return {name: self.reached[name] for name, target in self.targets.items() if not is_met(self.reached[name], target)}

    @property
    def meets(self) -> bool:
        """Whether the chosen network meets all targets."""
        return not self.missed

    def shown(self) -> tuple[Part, ...]:
        """Return the table of layers, the predictions and the measurements."""
        head = (
            *("layer", "dense layer", "runs as", "dense (ms)", "planned (ms)", "speed-up"),
            *("dense MFLOPs", "planned MFLOPs", "loss"),
        )
        rows = [
            (
                row.layer,
                row.what,
                "; ".join(filter(None, (row.steps, row.reason))) if row.format else f"dense: {row.reason}",
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
            f"target missed: {name}={self.targets[name]:g}, reached {reached:.2f}×" for name, reached in self.missed.items()
        ]
        where = self.provider if self.precision == "fp32" else f"{self.provider} in {self.precision}"
        losses = "estimated from the weights" if self.loss_from == "weights" else f"measured on {self.loss_from}"
        title = f"plan for {where}, batch {self.batch}; losses {losses}"
        if self.plan.joint:
            count = len(self.plan.joint)
            lines.append(f"{count} group{'s' * (count > 1)} of layers that read the same input run as one layer each")
        if not self.plan.inner_shapes:
            lines.append("the shapes of inner tensors are left out of the file, which makes it faster")
        lines += [f"heads keep their size: {reason}" for reason in self.heads_left]
        if any(row.whole_node and row.dense_ms for row in self.rows):
            lines.append("the rows of both weights of an LSTM or GRU show the time of the whole node, which counts once")
        lines += [f"warning: {warning}" for warning in self.warnings]
        if self.verified is not None:
            lines += self.verified.described()
            if self.precision != "fp32":
                lines.append(f"the loss of the planned network does not include what rounding to {self.precision} loses")
        elif self.plan.layers:
            lines.append("nothing is known about the accuracy of this plan: no calibration inputs were given")
        elif self.plan.heads and self.loss_from != "weights":
            lines.append("what smaller heads alone lose was not measured: compress with this plan, or export it and check")
        heads = [heads_table(self.heads)] if self.heads else []
        return (Table(title, head, rows), *heads, *lines, *self._measured_lines())

    @property
    def _start(self) -> str:
        changes = {
            "with smaller heads": self.plan.heads,
            "with joint layers": self.plan.joint,
            "without the shapes of inner tensors": not self.plan.inner_shapes,
        }
        words = [word for word, done in changes.items() if done]
        return " ".join(["the dense network", *([" and ".join(words)] if words else []), f"in {self.precision}"])

    def _measured_lines(self) -> list[str]:
        if self.measured is None:
            return ["no layer is rewritten: every layer stays dense"]
        ratio = self.measured
        lines = [
            f"measured: {ratio.value:.2f}× [{ratio.low:.2f}, {ratio.high:.2f}]; error of the predicted time "
            f"{100 * (self.prediction_error or 0.0):+.1f} %"
        ]
        if not self.plan.layers:
            lines.append(f"no layer is rewritten: {self._start} is fast enough")
        if self.slower:
            lines.append(f"slower than dense in the network's profile: {', '.join(self.slower)}")
        if ratio.low <= 1.0:
            lines.append("the planned network is not faster: the interval of its speed-up is not above 1")
        return lines
