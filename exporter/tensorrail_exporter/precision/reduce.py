"""Reduced precision: a model is converted to fp16 or int8, and its parity, accuracy and latency are compared with fp32."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Literal, get_args

import numpy as np
import onnx
import onnxruntime as ort

from tensorrail_exporter.graphs.io import load_model, save_model
from tensorrail_exporter.precision.fp16 import to_fp16 as to_fp16
from tensorrail_exporter.precision.int8 import METHODS as METHODS
from tensorrail_exporter.precision.int8 import ROUNDINGS as ROUNDINGS
from tensorrail_exporter.precision.int8 import Method as Method
from tensorrail_exporter.precision.int8 import Rounding as Rounding
from tensorrail_exporter.precision.int8 import to_int8 as to_int8
from tensorrail_exporter.precision.ranges import LayerRange, layer_ranges, ranges_table, require_finite
from tensorrail_exporter.precision.weights import weighted, with_names
from tensorrail_runtime.errors import GraphError, ModelError
from tensorrail_runtime.graphs.constants import constants_of
from tensorrail_runtime.graphs.files import bytes_of, files_read
from tensorrail_runtime.measure.accuracy import Comparison, Labelled, compare_scores, evaluate
from tensorrail_runtime.measure.latency import LatencyReport, Ratio, bench
from tensorrail_runtime.measure.parity import Parity, parity, require_comparable
from tensorrail_runtime.measure.timing import Conditions, Timing
from tensorrail_runtime.records import Record, is_stream
from tensorrail_runtime.scratch import scratch
from tensorrail_runtime.sessions.halves import runs_with_casts
from tensorrail_runtime.sessions.inputs import random_inputs
from tensorrail_runtime.sessions.session import open_session
from tensorrail_runtime.tables import Part, PrintedRecord, Table

Precision = Literal["fp16", "int8"]

TOLERANCES: dict[Precision, float] = {"fp16": 1e-2, "int8": 1e-1}
"""The default tolerance of the relative L2 difference of an output. What counts in the end is the accuracy."""

WITH_CASTS = ": this processor computes in fp32, with casts around operators; fp16 is for GPUs, or to halve the file"

_RANDOM_BATCHES = (1, 7)  # batch sizes of the random inputs that are compared if none are given
_SAMPLES = {"held out": "held-out samples", "given": "given samples", "random": "random samples"}


class Unreduced(Record):
    """A layer whose weight is still float32 in the reduced model, because it is kept or has no reduced form."""

    layer: str
    op: str
    kept: bool  # named in `keep`


class PrecisionReport(PrintedRecord):
    """A model in reduced precision and its measurements. The ratio of the latencies is fp32 time divided by reduced time."""

    version: Literal[1] = 1
    model: str
    reduced: str
    to: Precision
    method: str | None  # of int8 calibration; None for fp16
    keep: tuple[str, ...]
    fp32: tuple[Unreduced, ...]
    bytes_before: int  # size of the files, including external data
    bytes_after: int
    inputs: Literal["held out", "given", "random"]  # that outputs were compared on; int8 was fitted to given ones too
    samples: int
    parity: Parity
    accuracy: Comparison | None  # None without labelled data
    latency: LatencyReport
    ranges: tuple[LayerRange, ...] = ()  # the most suspicious layer first; only if the tolerance is exceeded
    with_casts: bool = False  # whether the model is in fp16, which the provider computes in fp32 with casts around

    @property
    def holds(self) -> bool:
        """Whether every output is within the tolerance."""
        return self.parity.holds

    @property
    def ratio(self) -> Ratio:
        """How many times faster than fp32 the reduced model is, with its interval."""
        return self.latency.ratios[0]

    @property
    def verdict(self) -> Literal["faster", "slower", "not proven faster"]:
        """The conclusion from the 95 % interval of the ratio."""
        return "faster" if self.ratio.low > 1 else "slower" if self.ratio.high < 1 else "not proven faster"

    def shown(self) -> tuple[Part, ...]:
        """Return the table of fp32 beside the reduced model, the layers left in fp32, the verdict, and the ranges."""
        worst = max(self.parity.outputs, key=lambda output: output.relative_l2)
        before, after = self.latency.latencies
        rows = [
            ("file (bytes)", f"{self.bytes_before:,}", f"{self.bytes_after:,}"),
            (f"relative L2 of {worst.name}", "0", f"{worst.relative_l2:.2e}"),
        ]
        if worst.top1_agreement is not None:
            rows.append(("top-1 agreement", "100.0 %", f"{100 * worst.top1_agreement:.1f} %"))
        if (paired := self.accuracy) is not None:
            interval = f"{paired.difference:+.4f} [{paired.low:+.4f}, {paired.high:+.4f}], p = {paired.p_value:.2g}"
            rows.append((paired.reference.metric, f"{paired.reference.mean:.4f}", f"{paired.candidate.mean:.4f} ({interval})"))
        ratio = self.ratio
        rows += [
            (f"latency p50 (ms), batch {self.latency.batch}", f"{before.p50:.3f}", f"{after.p50:.3f}"),
            ("speed-up [95 % CI]", "1", f"{ratio.value:.2f}× [{ratio.low:.2f}, {ratio.high:.2f}]"),
        ]
        title = (
            f"{self.model} as {self.reduced}; {self.samples} {_SAMPLES[self.inputs]}, {self.latency.rounds} rounds on "
            f"{self.latency.machine.processor}"
        )
        parts: list[Part] = [Table(title, ("quantity", "fp32", self.to), rows)]
        if self.to == "int8" and self.inputs == "given":
            parts.append("int8 was fitted to these samples, since none were held out: on other inputs, outputs differ more")
        if self.fp32:
            kept = ", ".join(f"{layer.layer} ({layer.op}{', kept' if layer.kept else ''})" for layer in self.fp32)
            parts.append(f"still fp32: {kept}")
        parts.append(f"{self.to} is {self.verdict} than fp32 here{self._why()}")
        parts += [f"warning: {warning}" for warning in self.latency.warnings]
        verdict = "within" if self.holds else "OUT OF"
        parts.append(
            f"{verdict} tolerance {self.parity.tolerance:g}; the smallest tolerance that would pass is "
            f"{self.parity.smallest:.2e}"
        )
        return (*parts, *((ranges_table(self.ranges),) if self.ranges else ()))

    def _why(self) -> str:
        return WITH_CASTS if self.with_casts and self.verdict != "faster" else ""


@dataclass(frozen=True)
class Quantization:
    """The precision that a model is converted to."""

    to: Precision
    """`fp16` or `int8`."""
    method: Method | None = None
    """How int8 finds the ranges of activations: `minmax` (default), `entropy` or `percentile`."""
    keep: tuple[str, ...] = ()
    """Layers or nodes that stay fp32."""
    tolerance: float | None = None
    """Largest relative L2 difference of any output; default 0.01 for fp16, 0.1 for int8."""
    reduce_range: bool | None = None
    """Whether int8 weights have 7 bits, for processors without VNNI; default: only if this machine's processor lacks VNNI."""
    gauge: bool = True
    """Whether int8 may scale and mix the channels between two layers so that rounding loses less; default True."""
    rounding: Rounding | None = None
    """How int8 rounds weights: `outputs` (default), so that the outputs of layers change least, or `nearest`."""

    @property
    def calibrated_by(self) -> Method | None:
        """The method of int8 calibration; None for fp16, which has none."""
        return (self.method or "minmax") if self.to == "int8" else None

    @property
    def allowed(self) -> float:
        """The tolerance, or its default."""
        return TOLERANCES[self.to] if self.tolerance is None else self.tolerance


def reduced(
    model: Path | str,
    out: Path | str,
    quantization: Quantization,
    *,
    calibration: Sequence[Mapping[str, np.ndarray]] | None = None,
    judged: Sequence[Mapping[str, np.ndarray]] | None = None,
    test: Labelled | None = None,
    conditions: Conditions | None = None,
) -> PrecisionReport:
    """Convert a model to fp16 or int8, compare it with fp32, and write it, completely or not at all.

    Args:
        model: the fp32 model's file, dense or factored.
        out: the file to write.
        quantization: the precision, and what stays fp32.
        calibration: inputs, batch by batch: int8 needs them, for its ranges and its rounding.
        judged: inputs that neither int8 nor the model was fitted to, on which outputs are compared; default: the calibration
            inputs, else random ones.
        test: labelled inputs for the accuracy; nothing is calibrated on them.
        conditions: how latency is measured and models run. Dynamic axes of random inputs are set by its shapes and batch size.

    Returns:
        Parity, accuracy and latency beside fp32; the ranges of layers where the tolerance is missed.

    Raises:
        RangeError: fp16 overflows on any of the inputs, with the layers' ranges; nothing is written.
        GraphError: the model cannot be converted; nothing is written.
        ModelError: the model cannot be run or scored.

    """
    conditions = conditions or Conditions()
    settings, to = conditions.settings, quantization.to
    if is_stream(Path(out)):
        raise ModelError(f"{out}: expected a file, got a pipe or device: the model is measured where it was written")
    model, out = Path(model), Path(out).resolve()  # a link stays one
    settings.check()
    exact = settings.exact
    _check_request(model, out, quantization)
    session = open_session(model, settings=exact)
    given = list(calibration or ())
    feeds = list(judged or given) or _random_feeds(session, conditions.timing)
    require_comparable(model, feeds[0], exact)
    # Before anything is written: it shows whether the data fit.
    scores = None if test is None else evaluate(model, test, settings=exact)
    single = load_model(model)
    small = _converted(single, quantization, [*given, *feeds] if judged else feeds, given)
    left = _left_fp32(single, small, quantization.keep)
    with scratch(f".{out.name}.", out.parent) as folder:  # where there is room for it
        written = Path(folder) / out.name
        save_model(small, written)
        same = parity(model, written, inputs=feeds, tolerance=quantization.allowed, settings=exact)
        accuracy = None
        if scores is not None and test is not None:
            accuracy = compare_scores(scores, evaluate(written, test, settings=exact))
        timing = replace(conditions.timing, io_binding=settings.on_gpu)
        latency = bench([model, written], timing, settings, labels=["fp32", to], progress=conditions.progress)
        report = PrecisionReport(
            model=model.name,
            reduced=out.name,
            to=to,
            method=quantization.calibrated_by,
            keep=quantization.keep,
            fp32=left,
            bytes_before=bytes_of(model),
            bytes_after=bytes_of(written),
            inputs="held out" if judged else "given" if given else "random",
            samples=sum(same.batches),
            parity=same,
            accuracy=accuracy,
            latency=latency,
            ranges=() if same.holds or not weighted(single) else layer_ranges(single, feeds, to=to),
            with_casts=runs_with_casts(to, settings),
        )
    save_model(small, out)
    return report


def _random_feeds(session: ort.InferenceSession, timing: Timing) -> list[Mapping[str, np.ndarray]]:
    """Return random inputs to compare outputs on, in batches of two sizes; a shape that is given has its own batch."""
    sizes = _RANDOM_BATCHES[:1] if timing.shapes else _RANDOM_BATCHES
    return [random_inputs(session, size, timing.seed, timing.shapes, timing.values) for size in sizes]


def _converted(
    model: onnx.ModelProto,
    quantization: Quantization,
    feeds: Sequence[Mapping[str, np.ndarray]],
    calibration: Sequence[Mapping[str, np.ndarray]],
) -> onnx.ModelProto:
    """Return the model in fp16, finite on the inputs `feeds`, or in int8, with ranges from the calibration inputs."""
    if quantization.calibrated_by is not None:
        method, narrow = quantization.calibrated_by, quantization.reduce_range
        keep, gauge, rounding = quantization.keep, quantization.gauge, quantization.rounding or "outputs"
        return to_int8(model, calibration, method=method, keep=keep, reduce_range=narrow, gauge=gauge, rounding=rounding)
    small = to_fp16(model, keep=quantization.keep)
    require_finite(model, small, feeds)
    return small


def _check_request(model: Path, out: Path, quantization: Quantization) -> None:
    to, method = quantization.to, quantization.method
    if to not in get_args(Precision):
        raise GraphError(f"unknown precision {to!r}: expected one of {', '.join(get_args(Precision))}")
    if method is not None and to != "int8":
        raise GraphError(f"calibration method {method!r} was given, but {to} needs no calibration: leave it out")
    if quantization.rounding is not None and quantization.rounding not in ROUNDINGS:
        raise GraphError(f"unknown rounding {quantization.rounding!r}: expected one of {', '.join(ROUNDINGS)}")
    if quantization.rounding is not None and to != "int8":
        raise GraphError(f"rounding {quantization.rounding!r} is a choice for int8 weights, got {to}: leave it out")
    if quantization.reduce_range is not None and to != "int8":
        raise GraphError(f"reduce_range is a choice for int8 weights, got {to}: leave it out, or convert to int8")
    if not quantization.gauge and to != "int8":
        raise GraphError(f"gauge is a choice for int8 weights, got {to}: leave it out, or convert to int8")
    if not out.parent.is_dir():
        raise GraphError(f"{out}: its folder does not exist: create it first, or choose another one")
    if out.exists() and any(file.exists() and out.samefile(file) for file in files_read(model)):
        raise GraphError(f"{out}: is the fp32 model itself, or its external data; write to another file")


def _left_fp32(model: onnx.ModelProto, small: onnx.ModelProto, keep: Sequence[str]) -> tuple[Unreduced, ...]:
    """Return the layers whose weight is still float32; for int8, layers of the graph after constant folding."""
    constants = constants_of(small.graph)
    names = {w.node.name: w for w in weighted(with_names(model))}
    unreduced: dict[str, Unreduced] = {}
    for layer in weighted(small):
        if constants[layer.weight].data_type == onnx.TensorProto.FLOAT:
            known = names.get(layer.node.name, layer)
            asked = any(k in (known.layer, known.weight, known.node.name) or known.node.name.startswith(f"{k}/") for k in keep)
            unreduced.setdefault(known.layer, Unreduced(layer=known.layer, op=layer.node.op_type, kept=asked))
    return tuple(unreduced.values())
