"""Conversion of a dense or factorized graph to int8, with ONNX Runtime's static quantization.

Cores are stored in the layout in which they run, so that every core is quantized as a weight. A weight behind a Reshape or
Transpose would get its scales along the wrong axis (onnxruntime#18668); in graphs of other origin such nodes are folded first.

Source: "Quantize ONNX Models", onnxruntime.ai/docs/performance/model-optimizations/quantization.html.
"""

from __future__ import annotations

import contextlib
import io
import logging
import math
import warnings
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Literal

import numpy as np
import onnx
import onnxruntime as ort

from tensorrail_exporter.graphs.io import check_model, export_graph, import_graph, save_model, size_of
from tensorrail_exporter.precision.gauge import gauged
from tensorrail_exporter.precision.left_out import INT8, left_out, with_plain_biases
from tensorrail_exporter.precision.prepared import Prepared, plain_constants
from tensorrail_exporter.precision.products import write_tensor
from tensorrail_exporter.precision.rounding import HELD_OUT, Grid, rounded
from tensorrail_exporter.precision.weights import check_fp32, kept_nodes, require_weights, weighted, with_names
from tensorrail_runtime.errors import GraphError, ModelError, first_line
from tensorrail_runtime.graphs.constants import constants_of
from tensorrail_runtime.graphs.files import bodies, descendants, opset_of
from tensorrail_runtime.measure.agreement import agreement
from tensorrail_runtime.scratch import scratch
from tensorrail_runtime.sessions.machine import processor
from tensorrail_runtime.sessions.session import open_session, run

Method = Literal["minmax", "entropy", "percentile"]
METHODS: tuple[Method, ...] = ("minmax", "entropy", "percentile")
Rounding = Literal["outputs", "nearest"]
ROUNDINGS: tuple[Rounding, ...] = ("outputs", "nearest")

_LARGE = 2**30  # bytes of weights from which external data is written; protobuf's limit is 2 GiB
_BINS = {"entropy": 512, "percentile": 2048}
_KEEP = "name the layer or node that cannot be converted in `keep`: it then stays in fp32"
_SHOWN = 8  # layers in a message
_WIDE, _NARROW = 127, 64  # the largest integer of a weight with 8 and with 7 bits
_ASSUMED = 4.0  # magnitude of activations where only the time counts
_CONVERTED = 1e-3  # relative difference of outputs that a conversion of the opset may make
_OPSET, _IR_VERSION = 13, 7  # the first in which DequantizeLinear has an axis


def to_int8(
    model: onnx.ModelProto,
    calibration: Sequence[Mapping[str, np.ndarray]],
    *,
    per_channel: bool = True,
    method: Method = "minmax",
    keep: Sequence[str] = (),
    reduce_range: bool | None = None,
    gauge: bool = True,
    rounding: Rounding = "outputs",
) -> onnx.ModelProto:
    """Return a copy of the model with int8 weights and uint8 activations, by `onnxruntime.quantization.quantize_static`.

    The result is in QDQ form. Weights are symmetric with one scale per output channel. A stack of matrices gets a single
    scale, and so does a weight on the left of a MatMul, as uint8: ONNX Runtime's integer kernels accept no other form.

    The AVX2, AVX-512 and VNNI kernels multiply uint8 × int8 (U8S8). int8 activations would be converted to uint8 first, and
    run in fp32 where that fails. Without VNNI the sum of two products saturates at 16 bits, so that weights get 7 bits
    ("Quantize ONNX Models", section Data type selection).

    LSTM, GRU, RNN, transposed convolutions, embeddings, com.microsoft's Attention, products of two activations, readers of a
    Softmax, normalisations, and sums outside of convolutional blocks stay fp32. Outputs of MatMul and Gemm are not rounded.

    Args:
        model: the fp32 model; it is not changed.
        calibration: batches of inputs by name, on which the fp32 model runs to measure the ranges of the activations.
        per_channel: whether weights have one scale per output channel instead of one in all; default True.
        method: how a range follows from the values seen: `minmax`, their extremes, the default; `entropy`, the range of
            least entropy loss; `percentile`, the 99.999th percentile.
        keep: names of layers, weights or nodes that stay fp32.
        reduce_range: whether weights have 7 bits; default: only if *this* machine lacks VNNI.
        gauge: whether the basis between two layers is chosen so that rounding loses least, see `gauge`; default True.
        rounding: how weights are rounded: `outputs`, so that the outputs of layers change least on the calibration data, see
            `rounding`, the default; `nearest`, each to the nearest integer.

    Raises:
        GraphError: there is no calibration data or it does not match the model's inputs, the method is unknown, a name in
            `keep` is not in the graph, nothing can be quantized, or the library fails.
        ModelError: the model cannot run on the calibration data.

    """
    with Quantizer(
        model,
        calibration,
        per_channel=per_channel,
        method=method,
        keep=keep,
        reduce_range=reduce_range,
        gauge=gauge,
        rounding=rounding,
    ) as quantizer:
        return quantizer(keep)


class Quantizer:
    """Converts a model to int8 several times, with other nodes in fp32 each time, and measures ranges once.

    Use it in a `with` statement. The arguments and errors are those of `to_int8`; the basis between layers, which stays as it
    is, is chosen for the layers in `keep` in fp32; these are never rounded by outputs.

    Attributes:
        model: the model in fp32, with a name for each node.
        kept: the nodes that stay in fp32 in any case: none.

    """

    def __init__(
        self,
        model: onnx.ModelProto,
        calibration: Sequence[Mapping[str, np.ndarray]],
        *,
        per_channel: bool = True,
        method: Method = "minmax",
        keep: Sequence[str] = (),
        reduce_range: bool | None = None,
        gauge: bool = True,
        rounding: Rounding = "outputs",
    ) -> None:
        if method not in METHODS:
            raise GraphError(f"unknown calibration method {method!r}: expected one of {', '.join(METHODS)}")
        if rounding not in ROUNDINGS:
            raise GraphError(f"unknown rounding {rounding!r}: expected one of {', '.join(ROUNDINGS)}")
        _check_calibration(model, calibration)
        self.model = with_names(plain_constants(model))
        check_fp32(self.model, "int8")
        require_weights(self.model)
        self.kept: tuple[str, ...] = ()
        self._prepared = Prepared(self.model)
        self._per_channel = per_channel
        self._narrow = processor().saturates if reduce_range is None else reduce_range
        self._rounded: dict[str, dict[str, np.ndarray]] = {}  # weights and biases by the names of nodes
        blocked = self._blocked(keep)
        self._large = size_of(self.model) > _LARGE
        coded = [self._prepared.feed(feed) for feed in calibration]
        self._open = contextlib.ExitStack()
        try:
            folder = Path(self._open.enter_context(scratch()))
            self._ready = folder / "ready.onnx"
            source = folder / "fp32.onnx"
            save_model(self.model, source)
            with _quiet():
                outputs = run(open_session(source), calibration[0])  # reports in one line what does not fit
                old = 0 < opset_of(self.model) < _OPSET
                again = run(open_session(source), calibration[0]) if old else outputs  # one session would keep the weights
                with self._in_one_line():
                    self._prepare(source, coded, blocked, method, gauge=gauge, rounding=rounding)
                if old:
                    converted = {
                        self._prepared.text(name): array for name, array in run(open_session(source), coded[0]).items()
                    }
                    _require_alike({k: v for k, v in outputs.items() if _alike(v, again[k])}, converted, opset_of(self.model))
        except BaseException:
            self._open.close()
            raise

    def __enter__(self) -> Quantizer:
        return self

    def __exit__(self, *exception: object) -> None:
        self._open.close()

    def __call__(self, keep: Sequence[str] = ()) -> onnx.ModelProto:
        """Return the model in int8, but for the layers, weights or nodes in `keep`."""
        blocked = self._blocked(keep)
        with _quiet(), self._in_one_line():
            quantized = self._quantized(blocked)
        if not any(node.op_type == "DequantizeLinear" for node in quantized.graph.node):
            raise GraphError(
                "nothing in the graph can be quantized: it has no Conv, Gemm or MatMul with a constant weight that may become "
                f"int8{self._that_stay()}"
            )
        return _tidy(quantized, self.model, self._prepared)

    def layers(self) -> list[str]:
        """Return the names of the nodes with a weight that may become int8, in their order."""
        return [w.node.name for w in weighted(self.model) if w.node.op_type in INT8]

    def _that_stay(self) -> str:
        """Return the end of a message that names the layers of a graph in which nothing can be quantized."""
        stay = list(dict.fromkeys(f"{w.layer} ({w.node.op_type})" for w in weighted(self.model)))
        more = f" and {len(stay) - _SHOWN} more" if stay[_SHOWN:] else ""
        return f"; these stay fp32: {', '.join(stay[:_SHOWN])}{more}" if stay else ""

    def _blocked(self, keep: Sequence[str]) -> frozenset[str]:
        return frozenset(self._prepared.node_code(name) for name in kept_nodes(self.model, keep))

    def _quantized(self, blocked: frozenset[str]) -> onnx.ModelProto:
        options = {"per_channel": self._per_channel, "reduce_range": self._narrow, "large": self._large}
        return _quantize(self._with_rounded(blocked), self._ranges, blocked, **options)

    def _with_rounded(self, blocked: frozenset[str]) -> Path:
        """Return the file of the graph with rounded weights, but for the nodes that stay fp32."""
        if not self._rounded:
            return self._ready
        model = onnx.load(self._ready)
        constants, fp32 = constants_of(model.graph), left_out(model, blocked)
        for node, tensors in self._rounded.items():
            for name, values in tensors.items() if node not in fp32 else ():
                write_tensor(constants[name], values)
        path = self._ready.with_name("rounded.onnx")
        save_model(model, path)
        return path

    def _prepare(
        self,
        source: Path,
        coded: list[dict[str, np.ndarray]],
        blocked: frozenset[str],
        method: Method,
        *,
        gauge: bool,
        rounding: Rounding,
    ) -> None:
        """Write the graph that is quantized, and the ranges of its activations."""
        from onnxruntime.quantization.shape_inference import quant_pre_process

        save_model(_current(self._prepared.model), source)
        # Folds constants and batch norms; the basic level emits operators of ONNX only.
        quant_pre_process(source, self._ready, skip_symbolic_shape=True, save_as_external_data=self._large)
        if not gauge and rounding == "nearest":
            self._ranges = _calibrate(self._ready, coded, method, large=self._large)
            return
        ready = with_names(onnx.load(self._ready))
        grid = Grid(self._per_channel, _NARROW if self._narrow else _WIDE)
        skip = frozenset(left_out(ready, blocked))
        graphs = [ready]
        if gauge and (other := gauged(ready, coded, grid=grid, skip=skip)) is not ready:
            graphs.append(other)
        best: tuple[float, Path, dict[str, dict[str, np.ndarray]], Path] | None = None
        for number, graph in enumerate(graphs):
            self._ready = self._ready.with_name(f"ready{number}.onnx")
            save_model(graph, self._ready)
            self._rounded = rounded(graph, coded, grid=grid, skip=skip) if rounding == "outputs" else {}
            self._ranges = _calibrate(self._ready, coded, method, large=self._large)
            self._ranges = self._ranges.rename(self._ranges.with_name(f"ranges{number}.json"))
            error = self._error(source, coded[HELD_OUT - 1 :: HELD_OUT] or coded, blocked) if len(graphs) > 1 else 0.0
            # A basis that helps layers alone may do harm in the network, beside the rounding by outputs. Where outputs cannot
            # be compared, it is kept.
            if best is None or not best[0] <= error:
                best = error, self._ready, self._rounded, self._ranges
        if best is not None:
            _, self._ready, self._rounded, self._ranges = best

    def _error(self, source: Path, feeds: Sequence[Mapping[str, np.ndarray]], blocked: frozenset[str]) -> float:
        """Return how far the outputs in int8 are from those in fp32, in standard deviations; NaN if that is not known."""
        path = self._ready.with_name("tried.onnx")
        save_model(self._quantized(blocked), path)
        try:
            return agreement(source, path, feeds).difference
        except ModelError:  # outputs that are no tensors, or random
            return math.nan
        finally:
            path.unlink()

    @contextlib.contextmanager
    def _in_one_line(self) -> Iterator[None]:
        try:
            yield
        except Exception as error:  # noqa: BLE001 - the library raises a dozen unrelated classes
            reason = self._prepared.text(first_line(error)) or type(error).__name__
            raise GraphError(f"the graph cannot be quantized ({reason}); {_KEEP}") from None


def with_assumed_ranges(model: onnx.ModelProto, *, reduce_range: bool | None = None) -> onnx.ModelProto:
    """Return a copy of a model in int8 that takes as long as one with measured ranges, and computes nothing of use.

    Args:
        model: a small model with random weights, without constants to fold; it is not changed.
        reduce_range: as for `to_int8`.

    Returns:
        The model in int8, or the same model if nothing in it can be quantized.

    """
    from onnxruntime.quantization.calibrate import CalibrationMethod, TensorData, TensorsData, save_tensors_data

    if not any(node.op_type in INT8 for node in model.graph.node):
        return model
    narrow = processor().saturates if reduce_range is None else reduce_range
    with scratch() as folder, _quiet():
        ready, ranges = Path(folder) / "ready.onnx", Path(folder) / "ranges.json"
        current = _current(with_names(model))
        positive = {node.output[0] for node in current.graph.node if node.op_type == "Relu"}
        names = [name for node in current.graph.node for name in node.output] + [value.name for value in current.graph.input]
        low, high = np.float32(-_ASSUMED), np.float32(_ASSUMED)
        data = {name: TensorData(lowest=np.float32(0) if name in positive else low, highest=high) for name in names}
        save_tensors_data(TensorsData(CalibrationMethod.MinMax, data), ranges)
        save_model(current, ready)
        return _quantize(ready, ranges, frozenset(), per_channel=True, reduce_range=narrow, large=False)


def _check_calibration(model: onnx.ModelProto, feeds: Sequence[Mapping[str, np.ndarray]]) -> None:
    names = {value.name for value in model.graph.input} - {tensor.name for tensor in model.graph.initializer}
    if not feeds:
        raise GraphError("int8 needs calibration data to measure activation ranges, got none; provide 100 or more samples")
    for feed in feeds:
        if set(feed) != names:
            expected, given = ", ".join(sorted(names)), ", ".join(feed) or "none"
            raise GraphError(f"expected calibration data for the model's inputs {expected}, got {given}")
        for name, array in feed.items():
            if np.issubdtype(array.dtype, np.floating) and not np.isfinite(array).all():
                raise GraphError(
                    f"the calibration data of input {name!r} contains NaN or infinite values; expected finite ones"
                )


def _calibrate(ready: Path, feeds: Sequence[Mapping[str, np.ndarray]], method: Method, *, large: bool) -> Path:
    """Run the fp32 graph on all feeds, write the ranges of the activations to a file, and return its path.

    `quantize_static` would pass all feeds at once, but histograms need feeds of one shape (onnxruntime#18792), and it uses
    128 bins, with which the entropy method always returns the extremes (onnxruntime#9597).
    """
    from onnxruntime.quantization.calibrate import create_calibrator, save_tensors_data

    augmented = str(ready.with_name("augmented.onnx"))
    options = {} if method == "minmax" else {"num_bins": _BINS[method]}
    calibrator = create_calibrator(
        ready, list(INT8), augmented, _method(method), use_external_data_format=large, extra_options=options
    )
    for feed in feeds:
        calibrator.collect_data(_Once(dict(feed)))
    path = ready.with_name("ranges.json")
    save_tensors_data(calibrator.compute_data(), path)
    return path


def _quantize(
    ready: Path, ranges: Path, kept: frozenset[str], *, per_channel: bool, reduce_range: bool, large: bool
) -> onnx.ModelProto:
    from onnxruntime.quantization import QuantFormat, QuantType, quantize_static
    from onnxruntime.quantization.calibrate import load_tensors_data

    prepared, out = onnx.load(ready), ready.with_name("int8.onnx")
    for file in ready.parent.glob(f"{out.name}*"):  # external data of an earlier call would be added to
        file.unlink()
    quantize_static(
        ready,
        out,
        quant_format=QuantFormat.QDQ,
        op_types_to_quantize=list(INT8),
        per_channel=per_channel,
        reduce_range=reduce_range,
        activation_type=QuantType.QUInt8,
        weight_type=QuantType.QInt8,
        nodes_to_exclude=sorted(left_out(prepared, kept)),
        use_external_data_format=large,
        calibrate_method=load_tensors_data(ranges).calibration_method,
        calibration_cache_path=ranges,
        extra_options={
            # As floats they reach a bias or a normalisation without a second rounding.
            "OpTypesToExcludeOutputQuantization": ["MatMul", "Gemm"],
            # Otherwise a node that stays fp32 reads the rounded value if another reader of it is quantized.
            "DedicatedQDQPair": True,
            "TensorQuantOverrides": _one_scale(prepared),
        },
    )
    return onnx.load(out)


class _Once:
    """A data reader, as the library expects it, that returns a single feed."""

    def __init__(self, feed: dict[str, np.ndarray]) -> None:
        self._feed: dict[str, np.ndarray] | None = feed

    def get_next(self) -> dict[str, np.ndarray] | None:
        feed, self._feed = self._feed, None
        return feed


def _method(method: Method) -> object:
    from onnxruntime.quantization import CalibrationMethod

    return {
        "minmax": CalibrationMethod.MinMax,
        "entropy": CalibrationMethod.Entropy,
        "percentile": CalibrationMethod.Percentile,
    }[method]


def _one_scale(model: onnx.ModelProto) -> dict[str, list[dict[str, object]]]:
    """Return the library's overrides for the weights that get a single scale; on the left of a MatMul they are uint8.

    These are weights of a MatMul that are not matrices or are on its left, and weights that several nodes share with their
    output channels along different axes, as in a tied autoencoder.
    """
    from onnxruntime.quantization import QuantType

    layers = weighted(model)
    axes: dict[str, set[int]] = {}
    for w in layers:
        axes.setdefault(w.weight, set()).add(w.axis)
    several_axes = [w for w in layers if len(axes[w.weight]) > 1]
    products = [w for w in layers if w.node.op_type == "MatMul" and (w.place == 0 or w.values.ndim != 2)]
    return {
        w.weight: [{"quant_type": QuantType.QUInt8 if w.node.op_type == "MatMul" and w.place == 0 else QuantType.QInt8}]
        for w in (*several_axes, *products)
    }


def _alike(first: object, second: object) -> bool:
    """Return whether two outputs are the same tensor, up to rounding."""
    if not (isinstance(first, np.ndarray) and isinstance(second, np.ndarray) and first.shape == second.shape):
        return False
    if first.dtype.kind != "f":
        return np.array_equal(first, second)
    return bool(
        np.allclose(first, second, rtol=_CONVERTED, atol=_CONVERTED * float(np.abs(first).max(initial=0)), equal_nan=True)
    )


def _require_alike(before: Mapping[str, object], after: Mapping[str, object], opset: int) -> None:
    """Raise `GraphError` for an output that onnx's conversion to a later opset changed, as it does with Hardmax."""
    for name in before.keys() & after.keys():
        if not _alike(before[name], after[name]):
            raise GraphError(
                f"output {name!r} changed when onnx converted the model from opset {opset} to {_OPSET}, which int8 "
                f"needs; export the model with opset {_OPSET} or later"
            )


def _current(model: onnx.ModelProto) -> onnx.ModelProto:
    """Return the model at an opset and IR version with scales per channel, without its weights among the inputs.

    The libraries do not treat a weight that is an input as a constant: nothing would be folded into it.
    """
    if 0 < opset_of(model) < _OPSET:
        model = onnx.version_converter.convert_version(model, _OPSET)
    model.ir_version = max(model.ir_version, _IR_VERSION)
    with_plain_biases(model)
    stored = {tensor.name for tensor in model.graph.initializer}
    free = [value for value in model.graph.input if value.name not in stored]
    del model.graph.input[:]
    model.graph.input.extend(free)
    return model


def _tidy(quantized: onnx.ModelProto, original: onnx.ModelProto, prepared: Prepared) -> onnx.ModelProto:
    """Return the result with names and metadata of the original and only the opsets that it uses, after a full check."""
    if any(True for _ in bodies(quantized.graph)):
        # The library sorts nodes without regard to tensors that only the body of an If, Loop or Scan reads.
        quantized = export_graph(import_graph(quantized), quantized)
    quantized = prepared.restored(quantized)
    nodes = (node for graph in (quantized.graph, *descendants(quantized.graph)) for node in graph.node)
    used = {"" if node.domain == "ai.onnx" else node.domain for node in nodes} | {f.domain for f in quantized.functions}
    opsets = [entry for entry in quantized.opset_import if ("" if entry.domain == "ai.onnx" else entry.domain) in used]
    del quantized.opset_import[:], quantized.metadata_props[:]
    quantized.opset_import.extend(opsets)
    quantized.metadata_props.extend(original.metadata_props)
    check_model(quantized, original)
    return quantized


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """Suppress what the libraries print, log and warn."""
    root, before = logging.getLogger(), logging.root.manager.disable
    handler = logging.NullHandler()  # without one, `logging.warning` would install a handler permanently
    root.addHandler(handler)
    logging.disable(logging.CRITICAL)
    ort.set_default_logger_severity(4)
    try:
        with contextlib.redirect_stdout(io.StringIO()), warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        ort.set_default_logger_severity(2)  # ONNX Runtime's default; it has no function that returns the current level
        logging.disable(before)
        root.removeHandler(handler)
