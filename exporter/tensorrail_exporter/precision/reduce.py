"""Reduced precision, converted and measured: parity, accuracy and latency beside fp32, and the ranges when it breaks."""

from __future__ import annotations

import tempfile
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Literal, get_args

import numpy as np
import onnx

from tensorrail_exporter.graphs.io import load_model, save_model
from tensorrail_exporter.precision.fp16 import to_fp16 as to_fp16
from tensorrail_exporter.precision.int8 import METHODS as METHODS
from tensorrail_exporter.precision.int8 import Method as Method
from tensorrail_exporter.precision.int8 import to_int8 as to_int8
from tensorrail_exporter.precision.ranges import LayerRange, layer_ranges, require_finite
from tensorrail_exporter.precision.weights import weighted, with_names
from tensorrail_runtime.errors import GraphError, ModelError
from tensorrail_runtime.graphs.cost import constants_of
from tensorrail_runtime.graphs.files import bytes_of
from tensorrail_runtime.measure.accuracy import Comparison, compare_scores, evaluate
from tensorrail_runtime.measure.latency import LatencyReport, Ratio, bench
from tensorrail_runtime.measure.parity import Parity, parity
from tensorrail_runtime.records import Record
from tensorrail_runtime.sessions.inputs import Shapes, random_inputs
from tensorrail_runtime.sessions.session import Session, open_session

Precision = Literal["fp16", "int8"]

TOLERANCES: dict[Precision, float] = {"fp16": 1e-2, "int8": 1e-1}
"""The relative L2 difference of an output that is usual at most; what counts is the accuracy."""

_RANDOM_BATCHES = (1, 7)


class Unreduced(Record):
    """A layer whose weight is still float32 in the reduced model, because it was kept or has no reduced form."""

    layer: str
    op: str
    kept: bool  # named in `keep`


class PrecisionReport(Record):
    """One model reduced, and all that was measured of it beside fp32. The latency's ratio is fp32's time over its time."""

    version: Literal[1] = 1
    model: str
    reduced: str
    to: Precision
    method: str | None  # of calibration; None for fp16
    keep: tuple[str, ...]
    fp32: tuple[Unreduced, ...]
    bytes_before: int  # of the files, external data included
    bytes_after: int
    inputs: Literal["given", "random"]
    samples: int
    parity: Parity
    accuracy: Comparison | None  # None without labelled data
    latency: LatencyReport
    ranges: tuple[LayerRange, ...] = ()  # the most suspicious first; only when the tolerance is missed

    @property
    def holds(self) -> bool:
        """Whether every output is within the tolerance."""
        return self.parity.holds

    @property
    def ratio(self) -> Ratio:
        """How many times faster than fp32 it is."""
        return self.latency.ratios[0]

    @property
    def verdict(self) -> Literal["faster", "slower", "not proven faster"]:
        """What the 95 % interval of the ratio says."""
        return "faster" if self.ratio.low > 1 else "slower" if self.ratio.high < 1 else "not proven faster"


def reduced(
    model: Path | str,
    out: Path | str,
    *,
    to: Precision,
    calibration: Sequence[Mapping[str, np.ndarray]] | None = None,
    data: Mapping[str, np.ndarray] | None = None,
    labels: np.ndarray | None = None,
    metric: str = "top1",
    method: Method | None = None,
    keep: Sequence[str] = (),
    tolerance: float | None = None,
    batch: int = 1,
    shapes: Shapes | None = None,
    seconds: float = 10.0,
    settings: Session | None = None,
    seed: int = 0,
    on_round: Callable[[float], None] = lambda _: None,
) -> PrecisionReport:
    """Measure the model in reduced precision beside fp32, and write it to `out`, whole or not at all.

    `calibration` holds inputs, batch by batch: int8 needs them, fp16 is only compared on them, or else on random ones.
    `data` and `labels` are for the accuracy and are not calibrated on. `tolerance` is of the relative L2 difference of every
    output, by default that of `TOLERANCES`. Dynamic axes of random inputs, those of the latency among them, are set by
    `shapes`, or else to `batch`. Nothing is written when fp16 overflows on the inputs: `RangeError`, with the layers' ranges;
    nor otherwise: `GraphError` for what cannot be converted, `ModelError` for what cannot be run or scored.
    """
    model, out, settings = Path(model), Path(out).resolve(), settings or Session()  # a link stays one
    settings.check()
    exact = settings.exact
    _check_request(model, out, to, method, data, labels)
    session = open_session(model, settings=exact)
    given = None if calibration is None else list(calibration)
    sizes = _RANDOM_BATCHES[:1] if shapes else _RANDOM_BATCHES  # a shape that is given has its own batch
    feeds = given if given is not None else [random_inputs(session, size, seed, shapes) for size in sizes]
    scores = None
    if data is not None and labels is not None:  # before anything is written: it shows whether the data fit
        scores = evaluate(model, data, labels, metric=metric, settings=exact)
    single = load_model(model)
    if to == "fp16":
        small = to_fp16(single, keep=keep)
        require_finite(single, small, feeds)
    else:
        small = to_int8(single, given or (), method=method or "minmax", keep=keep)
    left = _left_fp32(single, small, keep)
    # Measured in a folder beside `out`, under its own name, which the names of external data are made of; then moved.
    with tempfile.TemporaryDirectory(dir=out.parent, prefix=f".{out.name}.") as folder:
        made = Path(folder) / out.name
        save_model(small, made)
        same = parity(model, made, inputs=feeds, tolerance=TOLERANCES[to] if tolerance is None else tolerance, settings=exact)
        accuracy = None
        if scores is not None and data is not None and labels is not None:
            accuracy = compare_scores(scores, evaluate(made, data, labels, metric=metric, settings=exact))
        latency = bench(
            [model, made],
            batch=batch,
            seconds=seconds,
            settings=settings,
            io_binding=settings.on_gpu,
            shapes=shapes,
            seed=seed,
            labels=["fp32", to],
            on_round=on_round,
        )
        report = PrecisionReport(
            model=model.name,
            reduced=out.name,
            to=to,
            method=(method or "minmax") if to == "int8" else None,
            keep=tuple(keep),
            fp32=left,
            bytes_before=bytes_of(model),
            bytes_after=bytes_of(made),
            inputs="random" if given is None else "given",
            samples=sum(same.batches),
            parity=same,
            accuracy=accuracy,
            latency=latency,
            ranges=() if same.holds else layer_ranges(single, feeds, to=to),
        )
        for file in sorted(Path(folder).iterdir(), key=lambda file: file == made):  # the graph last, when its data are there
            file.replace(out.parent / file.name)
    return report


def _check_request(
    model: Path,
    out: Path,
    to: Precision,
    method: Method | None,
    data: Mapping[str, np.ndarray] | None,
    labels: np.ndarray | None,
) -> None:
    if to not in get_args(Precision):
        raise GraphError(f"unknown precision {to!r}: expected one of {', '.join(get_args(Precision))}")
    if method is not None and to != "int8":
        raise GraphError(f"calibration method {method!r} was given, but {to} needs no calibration: leave it out")
    if (data is None) != (labels is None):
        given = "labels" if data is None else "data"
        raise ModelError(f"accuracy needs both data and labels, got only {given}")
    if not out.parent.is_dir():
        raise GraphError(f"{out}: its folder does not exist: create it first, or choose another one")
    if out.exists() and model.exists() and out.samefile(model):
        raise GraphError(f"{out}: is the fp32 model itself; write to another file")


def _left_fp32(model: onnx.ModelProto, small: onnx.ModelProto, keep: Sequence[str]) -> tuple[Unreduced, ...]:
    """Return the layers whose weight is still float32; for int8 those of the graph with its constants folded."""
    constants = constants_of(small.graph)
    names = {w.node.name: w for w in weighted(with_names(model))}
    found: dict[str, Unreduced] = {}
    for layer in weighted(small):
        if constants[layer.weight].data_type == onnx.TensorProto.FLOAT:
            known = names.get(layer.node.name, layer)
            asked = any(k in (known.layer, known.weight, known.node.name) or known.node.name.startswith(f"{k}/") for k in keep)
            found.setdefault(known.layer, Unreduced(layer=known.layer, op=layer.node.op_type, kept=asked))
    return tuple(found.values())
