"""`tensorrail.quantize`: a model in fp16 or int8, measured beside fp32."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from tensorrail.inputs import as_batches, as_labelled, require_effect, require_writable, timed_on
from tensorrail.models import as_file
from tensorrail.options import Options
from tensorrail_runtime.errors import ModelError
from tensorrail_runtime.measure.timing import Timing

if TYPE_CHECKING:
    from tensorrail_exporter.calibrate.split import Split
    from tensorrail_exporter.precision.reduce import PrecisionReport, Quantization
    from tensorrail_runtime.feeds.batches import Batches

_BATCH = 16


def quantize(
    model: Any,  # a path, a ModelProto, or (module, example inputs)
    out: Path | str,
    to: Quantization | str,
    *,
    calibration: Any = None,  # a path or arrays by input name
    data: Any = None,  # a path, arrays by input name and `labels`, or a Labelled
    options: Options | None = None,
) -> PrecisionReport:
    """Convert a model to fp16 or int8, write it to `out`, and measure parity, accuracy and latency beside fp32.

    Args:
        model: the fp32 model, dense or factored: a path, an `onnx.ModelProto`, or (torch module, example inputs).
        out: the file to write.
        to: `fp16`, `int8`, or a `Quantization` that says more.
        calibration: typical inputs, on which outputs are compared. int8 needs them for the ranges of activations, and is
            compared on a quarter that is held out (fewer than four samples are not divided, and the report says so).
        data: labelled inputs for the accuracy: an npz file or arrays, with `labels`.
        options: `session`, `timing`, `inputs`, `progress`, and `fit.samples` for the most calibration samples (default: all).

    Returns:
        What was measured; `print(report)` shows the table, `report.holds` says whether outputs are within the tolerance.

    Raises:
        RangeError: fp16 overflows; nothing is written.
        GraphError: the model cannot be converted; nothing is written.
        ModelError: inputs are missing or do not fit.

    """
    from tensorrail_exporter.precision.reduce import Quantization, reduced

    options = options or Options()
    quantization = to if isinstance(to, Quantization) else Quantization(to)  # type: ignore[arg-type] # checked by `reduced`
    if quantization.to == "int8" and calibration is None:
        raise ModelError("int8 needs typical inputs for the ranges of activations: give calibration inputs, 100 or more")
    require_writable(out, model, calibration, data)
    conditions = options.conditions(Timing())
    with as_file(model) as path:
        exact = conditions.settings.exact
        require_effect(options.fit.samples, calibration)
        batches = as_batches(calibration, path, _BATCH, exact, options.inputs, options.fit.samples)
        timing = timed_on(conditions.timing, path, exact, options.inputs, batches)
        parts = _parts(batches, path) if batches is not None and quantization.to == "int8" else None
        feeds = None if batches is None else batches.feeds
        return reduced(
            path,
            out,
            quantization,
            calibration=feeds if parts is None else parts.seen.feeds,
            judged=None if parts is None or parts.judged is None else parts.judged.feeds,
            test=as_labelled(data, rules=options.inputs),
            conditions=replace(conditions, timing=timing),
        )


def _parts(batches: Batches, model: Path) -> Split:
    """Return inputs in parts, of which int8 is fitted to those that are not held out."""
    import onnx

    from tensorrail_exporter.calibrate.inputs import Calibration
    from tensorrail_exporter.calibrate.split import split

    inputs = Calibration(batches.feeds, batches.labels, batches.fixed, batches.axes, batches.whole, batches.sequences)
    return split(inputs, onnx.load(model, load_external_data=False))  # for the batch size
