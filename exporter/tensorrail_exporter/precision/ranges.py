"""Per layer: the ranges of its core and of its output, what fp16 or 8 bits would lose of them, and what overflows first.

fp16 holds ±65504; below 2⁻¹⁴ its values are subnormal and lose digits. An 8-bit tensor has 256 steps between its smallest
and its largest value, so its relative error is step / √12 over the values' root mean square: outliers make it large.
"""

from __future__ import annotations

import tempfile
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import numpy as np
import onnx

from tensorrail_exporter.graphs.io import save_model
from tensorrail_exporter.graphs.tap import with_outputs
from tensorrail_exporter.precision.weights import Weighted, weighted, with_names
from tensorrail_runtime.errors import GraphError, ModelError
from tensorrail_runtime.records import Record
from tensorrail_runtime.sessions.session import open_session, run

Feeds = Sequence[Mapping[str, np.ndarray]]

LARGEST = float(np.finfo(np.float16).max)  # 65504
_SHOWN = 8  # names in the message
NORMAL = float(np.finfo(np.float16).tiny)  # 2⁻¹⁴: smaller values are subnormal


class LayerRange(Record):
    """One core and its output over all inputs, as computed in fp32; infinite and NaN values are left out of the ranges."""

    layer: str  # what `keep` takes
    node: str
    op: str
    core: str
    core_min: float
    core_max: float
    channel_ratio: float  # largest over smallest |w| maximum of the output channels; those of zeros left out
    core_subnormal: float  # share of its values, zeros left out, that are subnormal in fp16
    core_int8_error: float  # relative L2 error of rounding it to int8, one scale a channel
    output: str
    output_min: float
    output_max: float
    output_subnormal: float
    output_int8_error: float  # expected relative L2 error of rounding it to 8 bits, one scale
    overflows: bool  # core or output has values that fp16 does not hold

    @property
    def suspicion(self) -> tuple[float, float]:
        """How much this layer is to be suspected: in fp16, and in int8."""
        fp16 = 1e9 if self.overflows else max(self.core_subnormal, self.output_subnormal)
        return fp16, max(self.core_int8_error, self.output_int8_error)


class RangeError(GraphError):
    """A reduced model overflows; `ranges` holds its layers, the most suspicious first, `keep` all the names that would help."""

    def __init__(self, message: str, ranges: tuple[LayerRange, ...], keep: tuple[str, ...]) -> None:
        super().__init__(message)
        self.ranges = ranges
        self.keep = keep


def layer_ranges(model: onnx.ModelProto, feeds: Feeds, *, to: Literal["fp16", "int8"] = "fp16") -> tuple[LayerRange, ...]:
    """Return the ranges of every core constant and of its output, the most suspicious for `to` first.

    `model` is the fp32 graph, dense or factored. Raises `GraphError` when no inputs came or the graph has no weights, and
    `ModelError` for inputs that do not fit.
    """
    layers = weighted(model)
    if not layers or not feeds:
        missing = "the graph has no layer with a constant weight" if feeds else "no inputs were given"
        raise GraphError(f"no ranges can be measured: {missing}")
    seen = {layer.node.output[0]: _Seen() for layer in layers if layer.node.output and layer.node.output[0]}
    for outputs in _exposed(model, tuple(seen), feeds):
        for name, values in outputs.items():
            seen[name].add(values)
    found = [_record(layer, seen[layer.node.output[0]]) for layer in layers if layer.node.output[0] in seen]
    place = ("fp16", "int8").index(to)
    return tuple(sorted(found, key=lambda one: (one.suspicion[place], one.suspicion[1]), reverse=True))


def require_finite(model: onnx.ModelProto, reduced: onnx.ModelProto, feeds: Feeds) -> None:
    """Raise `RangeError` when an fp16 tensor of the reduced graph overflows, with the `keep` that would help.

    ONNX Runtime's CPU provider computes most operators in fp32 and leaves out casts between them, so that finite outputs
    there prove nothing for a GPU: every fp16 tensor is looked at. A value that is infinite or NaN in fp32 as well, such as −inf
    in a mask, is none that overflows, and neither is what only a Softmax takes.
    """
    model, takers = with_names(model), _takers(reduced)
    names = tuple(
        dict.fromkeys(
            name
            for node in reduced.graph.node
            for name in node.output
            if name and not (takers[name] and all(taker.op_type in ("Softmax", "LogSoftmax") for taker in takers[name]))
        )
    )
    origins = _origins(model, reduced)
    bad: set[str] = set()
    for outputs, exact in zip(
        _exposed(reduced, names, feeds), _exposed(model, tuple(dict.fromkeys(origins.values())), feeds), strict=True
    ):
        for name, values in outputs.items():
            if values.dtype != np.float16:
                continue
            known = exact.get(origins.get(name, ""))
            fine = np.isfinite(values)
            if known is not None and known.shape == values.shape:
                fine |= ~np.isfinite(known)
            if not fine.all():
                bad.add(name)
    if not bad:
        return
    first = next(node for node in reduced.graph.node if bad & set(node.output))
    keep = _touching(model, feeds)
    ranges = layer_ranges(model, feeds) if weighted(model) else ()
    # The converter's own casts stand for the layer that takes or makes the value.
    named = first.name if any(first.name == node.name for node in model.graph.node) else next(iter(keep), first.name)
    layers = {w.node.name: w.layer for w in weighted(model)}
    shown = " ".join(f"--keep {name}" for name in keep[:_SHOWN]) + (f" and {len(keep) - _SHOWN} more" if keep[_SHOWN:] else "")
    raise RangeError(
        f"layer {layers.get(named, named)}: overflows in fp16, whose range is ±{LARGEST:.0f}; keep the layers that produce or "
        f"read such values in fp32: {shown or 'none found, as no layer has such values in fp32'}",
        ranges,
        keep,
    )


def _touching(model: onnx.ModelProto, feeds: Feeds) -> tuple[str, ...]:
    """Return the layers, or nodes without a weight, that make or take a float32 tensor with values beyond fp16."""
    names = tuple(dict.fromkeys(name for node in model.graph.node for name in node.output if name))
    large = {name for feed in feeds for name, values in feed.items() if _beyond(values)}
    for outputs in _exposed(model, names, feeds):
        large |= {name for name, values in outputs.items() if _beyond(values)}
    layers = {w.node.name: w.layer for w in weighted(model)}
    touching = [node for node in model.graph.node if large & {*node.input, *node.output}]
    return tuple(dict.fromkeys(layers.get(node.name, node.name or node.op_type) for node in touching))


def _beyond(values: np.ndarray) -> bool:
    return values.dtype == np.float32 and bool((np.abs(values[np.isfinite(values)]) > LARGEST).any())


def _takers(model: onnx.ModelProto) -> dict[str, list[onnx.NodeProto]]:
    takers: dict[str, list[onnx.NodeProto]] = {name: [] for node in model.graph.node for name in node.output}
    for node in model.graph.node:
        for name in node.input:
            takers.setdefault(name, []).append(node)
    return takers


def _origins(model: onnx.ModelProto, reduced: onnx.ModelProto) -> dict[str, str]:
    """Return for tensors of the reduced graph the one of the fp32 graph that they are, found through casts."""
    known = {name for node in model.graph.node for name in node.output if name}
    found = {name: name for node in reduced.graph.node for name in node.output if name in known}
    casts = [node for node in reduced.graph.node if node.op_type == "Cast"]
    for node in (*casts, *reversed(casts)):  # behind a tensor that is known, and before one
        one, other = node.input[0], node.output[0]
        if one in found:
            found.setdefault(other, found[one])
        elif other in found:
            found.setdefault(one, found[other])
    return found


def _exposed(model: onnx.ModelProto, names: Sequence[str], feeds: Feeds) -> Iterator[dict[str, np.ndarray]]:
    """Run the model with these tensors as outputs, and yield those that are arrays, feed by feed."""
    exposed = set(names)
    with tempfile.TemporaryDirectory() as folder:
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
    """What has been seen of one tensor so far."""

    low: float = np.inf
    high: float = -np.inf
    squares: float = 0.0
    count: int = 0
    nonzero: int = 0
    small: int = 0
    beyond: bool = False

    def add(self, values: np.ndarray) -> None:
        finite = values[np.isfinite(values)].astype(np.float64)
        size = np.abs(finite)
        self.beyond |= finite.size < values.size or bool((size > LARGEST).any())
        if finite.size:
            self.low, self.high = min(self.low, float(finite.min())), max(self.high, float(finite.max()))
            self.squares += float(finite @ finite)
        self.count += finite.size
        self.nonzero += int((size > 0).sum())
        self.small += int(((size > 0) & (size < NORMAL)).sum())


def _record(layer: Weighted, seen: _Seen) -> LayerRange:
    values = layer.values.astype(np.float64)
    core = _Seen()
    core.add(values.ravel())
    rows = np.abs(np.moveaxis(values, layer.axis, 0)).reshape(values.shape[layer.axis], -1).max(1, initial=0.0)
    live = rows[np.isfinite(rows) & (rows > 0)]
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
        channel_ratio=float(live.max() / live.min()) if live.size else 1.0,
        core_subnormal=core.small / core.nonzero if core.nonzero else 0.0,
        core_int8_error=_rounded(values, layer.axis),
        output=layer.node.output[0],
        output_min=0.0 if empty else seen.low,
        output_max=0.0 if empty else seen.high,
        output_subnormal=seen.small / seen.nonzero if seen.nonzero else 0.0,
        output_int8_error=float(step / np.sqrt(12) / rms) if rms else 0.0,
        overflows=core.beyond or seen.beyond,
    )


def _rounded(values: np.ndarray, axis: int) -> float:
    finite = np.where(np.isfinite(values), values, 0.0)
    others = tuple(k for k in range(values.ndim) if k != axis)
    scale = np.abs(finite).max(others, keepdims=True, initial=0.0) / 127
    scale[scale == 0] = 1.0
    return float(np.linalg.norm(np.round(finite / scale) * scale - finite) / (np.linalg.norm(finite) or 1.0))
