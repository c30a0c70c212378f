"""The precisions that a network is planned in: how it is converted for each purpose, and what is known about it.

Layers are timed in small models with random weights; whole networks are timed, then compared with the dense one, and then
written. Each of these is done in the precision of the plan. Weights come in fp32, which every other precision is made from.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import Protocol

import onnx

from tensorrail_exporter.plans.plan import Precision
from tensorrail_exporter.precision.finite import Float16Converter, to_finite_fp16
from tensorrail_exporter.precision.fp16 import to_fp16
from tensorrail_exporter.precision.int8 import Quantizer, to_int8, with_assumed_ranges
from tensorrail_exporter.precision.ranges import Feeds, require_finite
from tensorrail_exporter.precision.weights import kept_nodes
from tensorrail_runtime.errors import GraphError
from tensorrail_runtime.graphs.constants import constants_of


class Converter(Protocol):
    """Converts one network several times, with other nodes in fp32 each time."""

    model: onnx.ModelProto
    """The network in fp32, with a name for each node."""
    kept: tuple[str, ...]
    """The nodes that stay in fp32 in any case."""

    def __call__(self, keep: Sequence[str] = ()) -> onnx.ModelProto:
        """Return the network, with these layers, weights or nodes in fp32; raise `GraphError` if it cannot be converted."""

    def layers(self) -> list[str]:
        """Return the names of the nodes with a weight that is converted, in their order."""


_FEW = 4  # batches on which overflow is looked for in networks that are compared, and not written

Require = Callable[[onnx.ModelProto, onnx.ModelProto, Feeds], None]
"""Raises `GraphError` where a network, the first model, and its conversion, the second one, do not agree on inputs."""


def _unchanged(model: onnx.ModelProto, feeds: Feeds = ()) -> onnx.ModelProto:
    del feeds
    return model


@dataclass(frozen=True)
class PlannedPrecision:
    """How networks get into a precision, and what is known about it. Feeds are batches of inputs by name."""

    for_layer: Callable[[onnx.ModelProto], onnx.ModelProto] = _unchanged
    """Returns a small model, with random weights, of which only the time counts; the same model where nothing is converted."""
    for_times: Callable[[onnx.ModelProto, Feeds], onnx.ModelProto] = _unchanged
    """Returns a network of which only the time counts; ranges of activations are taken from the inputs, if they are needed."""
    for_outputs: Callable[[onnx.ModelProto, Feeds], onnx.ModelProto] = _unchanged
    """Returns a network of which the outputs count; ranges of activations are taken from the inputs."""
    converter: Callable[[onnx.ModelProto, Feeds], AbstractContextManager[Converter]] | None = None
    """Returns what converts a network that is written; None for fp32."""
    require: Require | None = None
    """Checks a conversion on inputs that it was not made with; None: nothing can go wrong on them."""
    itemsize: int | None = None
    """Bytes of one value of a weight; None: those of the model's own."""
    needs_inputs: bool = False
    """Whether a network cannot be converted without typical inputs."""
    islands: bool = False
    """Whether some layers may be faster in fp32: conversions at both ends of a layer can take longer than they save."""


PRECISIONS: dict[Precision, PlannedPrecision] = {
    "fp32": PlannedPrecision(),
    "fp16": PlannedPrecision(
        for_layer=lambda model: to_fp16(model) if _has_floats(model) else model,
        for_times=lambda model, _: to_finite_fp16(model),
        for_outputs=lambda model, feeds: to_finite_fp16(model, feeds[:_FEW]),
        converter=Float16Converter,
        require=require_finite,
        itemsize=2,
    ),
    "int8": PlannedPrecision(
        for_layer=with_assumed_ranges,
        for_times=lambda model, feeds: to_int8(model, feeds, gauge=False, rounding="nearest"),
        for_outputs=to_int8,
        converter=Quantizer,
        itemsize=1,
        needs_inputs=True,
        islands=True,
    ),
}
"""The precisions that a plan may have, in the order in which they are shown. Layers that are faster in fp32 are looked for in
int8 alone: where a provider computes in fp16, a layer is hardly slower in it, and casts at both ends cost time."""


def require_kept(model: onnx.ModelProto, names: Sequence[str]) -> None:
    """Raise `GraphError` for a name that a plan keeps in fp32 and the network does not have.

    Args:
        model: the network with its cores, in fp32, with a name for each node.
        names: layers, weights or nodes, as `Plan.fp32` has them.

    """
    try:
        kept_nodes(model, names)
    except GraphError as error:
        raise GraphError(f"fp32 of the plan: {error}") from None


def _has_floats(model: onnx.ModelProto) -> bool:
    return any(tensor.data_type == onnx.TensorProto.FLOAT for tensor in constants_of(model.graph).values())
