"""The value ranges of every layer's core and output, what fp16 or 8 bits would lose, and what overflows.

The range of fp16 is ±65504; values below 2⁻¹⁴ are subnormal and lose digits. An 8-bit tensor has 256 steps between its
smallest and its largest value, so its relative error is step / √12 divided by the root mean square of the values: outliers
make it large.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import numpy as np
import onnx

from tensorrail_exporter.graphs.io import save_model
from tensorrail_exporter.precision.weights import Weighted, weighted, with_names
from tensorrail_runtime.errors import GraphError, ModelError
from tensorrail_runtime.graphs.tap import with_outputs
from tensorrail_runtime.records import Record
from tensorrail_runtime.scratch import scratch
from tensorrail_runtime.sessions.session import open_session, run
from tensorrail_runtime.tables import Table

Feeds = Sequence[Mapping[str, np.ndarray]]

LARGEST = float(np.finfo(np.float16).max)  # 65504
_SHOWN = 8  # names in the message, and layers in the table
NORMAL = float(np.finfo(np.float16).tiny)  # 2⁻¹⁴: smaller values are subnormal

_EXPONENT = np.uint16(0x7C00)  # the bits of the exponent of a float16
_SOFTMAX = ("Softmax", "LogSoftmax")
_MOVES = (
    *(
        "Concat",
        "Expand",
        "Flatten",
        "Gather",
        "Identity",
        "MaxPool",
        "Relu",
        "Reshape",
        "Slice",
        "Split",
        "Squeeze",
        "Transpose",
    ),
    "Unsqueeze",
)
"""Operators whose results are among their inputs: what overflows is found before them."""


class LayerRange(Record):
    """One core and its output over all inputs, computed in fp32. Ranges do not include infinite and NaN values.

    Fields are explained beside them. Shares and errors are between 0 and 1.
    """

    layer: str  # the name that `keep` accepts
    node: str
    op: str
    core: str
    core_min: float
    core_max: float
    channel_ratio: float  # largest maximum of |w| over an output channel divided by the smallest that is not zero
    core_subnormal: float  # share of the core's nonzero values that are subnormal in fp16
    core_int8_error: float  # relative L2 error of rounding the core to int8 with one scale per channel
    output: str
    output_min: float
    output_max: float
    output_subnormal: float
    output_int8_error: float  # expected relative L2 error of rounding the output to 8 bits with one scale
    overflows: bool  # whether core or output has values outside the range of fp16

    @property
    def suspicion(self) -> tuple[float, float]:
        """How likely the layer is to cause a loss of accuracy: in fp16, and in int8."""
        fp16 = 1e9 if self.overflows else max(self.core_subnormal, self.output_subnormal)
        return fp16, max(self.core_int8_error, self.output_int8_error)


def ranges_table(ranges: Sequence[LayerRange]) -> Table:
    """Return the table of ranges, the most suspicious layers first: those to keep in fp32."""
    rows = [
        (
            r.layer,
            r.core,
            f"{r.core_min:.3g} … {r.core_max:.3g}",
            f"{r.channel_ratio:.3g}",
            f"{r.output_min:.3g} … {r.output_max:.3g}",
            "YES" if r.overflows else "no",
            f"{100 * max(r.core_subnormal, r.output_subnormal):.1f} %",
            f"{100 * r.core_int8_error:.1f} %",
            f"{100 * r.output_int8_error:.1f} %",
        )
        for r in ranges[:_SHOWN]
    ]
    left = f", the first {_SHOWN} of {len(ranges)}" if len(ranges) > _SHOWN else ""
    head = (
        *("layer", "core", "range of the core", "ratio of channels", "range of the output", "beyond fp16", "subnormal"),
        *("int8 error of the core", "8-bit error of the output"),
    )
    return Table(f"ranges in fp32, the most suspicious first{left}: try to keep the first layers in fp32", head, rows)


class RangeError(GraphError):
    """A model overflows in reduced precision.

    Attributes:
        ranges: the ranges of all layers, the most suspicious first.
        keep: names to leave in fp32 so that nothing overflows.

    """

    def __init__(self, message: str, ranges: tuple[LayerRange, ...], keep: tuple[str, ...]) -> None:
        super().__init__(message)
        self.ranges = ranges
        self.keep = keep


def layer_ranges(model: onnx.ModelProto, feeds: Feeds, *, to: Literal["fp16", "int8"] = "fp16") -> tuple[LayerRange, ...]:
    """Return the ranges of every core and of its output, the most suspicious first.

    Args:
        model: the fp32 model, dense or factorized.
        feeds: batches of inputs by name.
        to: the precision that the order is for, `fp16` (the default) or `int8`.

    Raises:
        GraphError: there are no inputs, or the graph has no constant weights.
        ModelError: the model cannot run on the inputs.

    """
    layers = weighted(model)
    if not layers or not feeds:
        missing = "the graph has no layer with a constant weight" if feeds else "no inputs were given"
        raise GraphError(f"no ranges can be measured: {missing}")
    seen = {layer.node.output[0]: _Seen() for layer in layers if layer.node.output and layer.node.output[0]}
    for outputs in _exposed(model, tuple(seen), feeds):
        for name, values in outputs.items():
            seen[name].add(values)
    ranges = [_record(layer, seen[layer.node.output[0]]) for layer in layers if layer.node.output[0] in seen]
    place = ("fp16", "int8").index(to)
    return tuple(sorted(ranges, key=lambda layer: (layer.suspicion[place], layer.suspicion[1]), reverse=True))


def require_finite(model: onnx.ModelProto, reduced: onnx.ModelProto, feeds: Feeds) -> None:
    """Raise `RangeError` if an fp16 tensor of the reduced graph overflows.

    ONNX Runtime's CPU provider computes most operators in fp32 and removes casts between them, so that finite outputs there
    prove nothing for a GPU. Therefore every fp16 tensor of the graph is checked; those in bodies of If, Loop and Scan are not.
    A value that is infinite or NaN in fp32 too, such as −inf in a mask, is not an overflow, and neither is −inf in a tensor
    that only a Softmax reads.

    Args:
        model: the fp32 model.
        reduced: the same model in fp16.
        feeds: batches of inputs by name.

    Raises:
        RangeError: a tensor overflows; the message and the error name the layers to keep in fp32.

    """
    model, readers = with_names(model), _readers(reduced)
    names = tuple(
        dict.fromkeys(name for node in reduced.graph.node for name in node.output if name and node.op_type not in _MOVES)
    )
    scores = {name for name in names if readers[name] and all(one.op_type in _SOFTMAX for one in readers[name])}
    suspects: list[tuple[Mapping[str, np.ndarray], dict[str, np.ndarray]]] = []  # inputs, and where tensors are not finite
    for feed, outputs in zip(feeds, _exposed(reduced, names, feeds), strict=True):
        infinite = {name: ~np.isfinite(values) for name, values in outputs.items() if _overflows(values)}
        for name in infinite.keys() & scores:
            infinite[name] &= ~np.isneginf(outputs[name])
        infinite = {name: where for name, where in infinite.items() if where.any()}
        if infinite:
            suspects.append((feed, infinite))
    overflowing = _not_in_fp32(model, suspects, _origins(model, reduced))
    if not overflowing:
        return
    first = next(node for node in reduced.graph.node if overflowing & set(node.output))
    keep = _with_large_values(model, feeds)
    ranges = layer_ranges(model, feeds) if weighted(model) else ()
    # If the first node is a cast that the converter added, the layer that reads or produces the value is named instead.
    named = first.name if any(first.name == node.name for node in model.graph.node) else next(iter(keep), first.name)
    layers = {w.node.name: w.layer for w in weighted(model)}
    shown = ", ".join(keep[:_SHOWN]) + (f" and {len(keep) - _SHOWN} more" if keep[_SHOWN:] else "")
    raise RangeError(
        f"layer {layers.get(named, named)}: overflows in fp16, whose range is ±{LARGEST:.0f}; keep the layers that produce or "
        f"read such values in fp32: {shown or 'none found, as no layer has such values in fp32'}",
        ranges,
        keep,
    )


def _overflows(values: np.ndarray) -> bool:
    """Return whether an array is float16 and has a value that is infinite or NaN: all bits of its exponent are set."""
    return values.dtype == np.float16 and bool(((values.view(np.uint16) & _EXPONENT) == _EXPONENT).any())


def _not_in_fp32(
    model: onnx.ModelProto,
    suspects: Sequence[tuple[Mapping[str, np.ndarray], dict[str, np.ndarray]]],
    origins: Mapping[str, str],
) -> set[str]:
    """Return the tensors with values that are finite in fp32; `origins` are their names there."""
    overflowing: set[str] = set()
    if not suspects:
        return overflowing
    names = {origins[name] for _, infinite in suspects for name in infinite if name in origins}
    exact = _exposed(model, tuple(sorted(names)), [feed for feed, _ in suspects])
    for (_, infinite), known in zip(suspects, exact, strict=True):
        for name, places in infinite.items():
            values = known.get(origins.get(name, ""))
            if values is not None and values.shape == places.shape:
                places = places & np.isfinite(values)  # noqa: PLW2901
            if places.any():
                overflowing.add(name)
    return overflowing


def _with_large_values(model: onnx.ModelProto, feeds: Feeds) -> tuple[str, ...]:
    """Return the layers, or nodes without a weight, that produce or read float32 values outside the range of fp16."""
    names = tuple(dict.fromkeys(name for node in model.graph.node for name in node.output if name))
    large = {name for feed in feeds for name, values in feed.items() if _beyond(values)}
    for outputs in _exposed(model, names, feeds):
        large |= {name for name, values in outputs.items() if _beyond(values)}
    layers = {w.node.name: w.layer for w in weighted(model)}
    touching = [node for node in model.graph.node if large & {*node.input, *node.output}]
    return tuple(dict.fromkeys(layers.get(node.name, node.name or node.op_type) for node in touching))


def _beyond(values: np.ndarray) -> bool:
    return values.dtype == np.float32 and bool((np.abs(values[np.isfinite(values)]) > LARGEST).any())


def _readers(model: onnx.ModelProto) -> dict[str, list[onnx.NodeProto]]:
    readers: dict[str, list[onnx.NodeProto]] = {name: [] for node in model.graph.node for name in node.output}
    for node in model.graph.node:
        for name in node.input:
            readers.setdefault(name, []).append(node)
    return readers


def _origins(model: onnx.ModelProto, reduced: onnx.ModelProto) -> dict[str, str]:
    """Return the tensor of the fp32 graph that each tensor of the reduced graph equals, by name or through casts."""
    known = {name for node in model.graph.node for name in node.output if name}
    origins = {name: name for node in reduced.graph.node for name in node.output if name in known}
    casts = [node for node in reduced.graph.node if node.op_type == "Cast"]
    for node in (*casts, *reversed(casts)):  # forwards for casts behind a known tensor, backwards for those before one
        source, target = node.input[0], node.output[0]
        if source in origins:
            origins.setdefault(target, origins[source])
        elif target in origins:
            origins.setdefault(source, origins[target])
    return origins


def _exposed(model: onnx.ModelProto, names: Sequence[str], feeds: Feeds) -> Iterator[dict[str, np.ndarray]]:
    """Run the model with these tensors as outputs; yield their values for each feed, except those that are not arrays."""
    exposed = set(names)
    with scratch() as folder:
        path = Path(folder) / "exposed.onnx"
        save_model(with_outputs(model, names), path)
        try:
            session = open_session(path)
        except ModelError as error:
            raise GraphError(f"the ranges cannot be measured: {str(error).removeprefix(f'{path}: ')}") from None
        for feed in feeds:
            outputs = run(session, feed)
            yield {name: array for name, array in outputs.items() if name in exposed and isinstance(array, np.ndarray)}


@dataclass
class _Seen:
    """Statistics of the values of one tensor so far."""

    low: float = np.inf
    high: float = -np.inf
    squares: float = 0.0
    count: int = 0
    nonzero: int = 0
    subnormal: int = 0
    overflows: bool = False

    def add(self, values: np.ndarray) -> None:
        finite = values[np.isfinite(values)].astype(np.float64)
        size = np.abs(finite)
        self.overflows |= finite.size < values.size or bool((size > LARGEST).any())
        if finite.size:
            self.low, self.high = min(self.low, float(finite.min())), max(self.high, float(finite.max()))
            self.squares += float(finite @ finite)
        self.count += finite.size
        self.nonzero += int((size > 0).sum())
        self.subnormal += int(((size > 0) & (size < NORMAL)).sum())


def _record(layer: Weighted, seen: _Seen) -> LayerRange:
    values = layer.values.astype(np.float64)
    core = _Seen()
    core.add(values.ravel())
    rows = np.abs(np.moveaxis(values, layer.axis, 0)).reshape(values.shape[layer.axis], -1).max(1, initial=0.0)
    nonzero = rows[np.isfinite(rows) & (rows > 0)]
    empty = not seen.count
    step = 0.0 if empty else (max(seen.high, 0.0) - min(seen.low, 0.0)) / 255
    rms = np.sqrt(seen.squares / seen.count) if seen.squares else 0.0
    return LayerRange(
        layer=layer.layer,
        node=layer.node.name,
        op=layer.node.op_type,
        core=layer.weight,
        core_min=core.low if core.count else 0.0,
        core_max=core.high if core.count else 0.0,
        channel_ratio=float(nonzero.max() / nonzero.min()) if nonzero.size else 1.0,
        core_subnormal=core.subnormal / core.nonzero if core.nonzero else 0.0,
        core_int8_error=_int8_error(values, layer.axis),
        output=layer.node.output[0],
        output_min=0.0 if empty else seen.low,
        output_max=0.0 if empty else seen.high,
        output_subnormal=seen.subnormal / seen.nonzero if seen.nonzero else 0.0,
        output_int8_error=float(step / np.sqrt(12) / rms) if rms else 0.0,
        overflows=core.overflows or seen.overflows,
    )


def _int8_error(values: np.ndarray, axis: int) -> float:
    """Return the relative L2 error of rounding to int8 with one symmetric scale per index of `axis`."""
    finite = np.where(np.isfinite(values), values, 0.0)
    others = tuple(k for k in range(values.ndim) if k != axis)
    scale = np.abs(finite).max(others, keepdims=True, initial=0.0) / 127
    scale[scale == 0] = 1.0
    return float(np.linalg.norm(np.round(finite / scale) * scale - finite) / (np.linalg.norm(finite) or 1.0))
