"""Conversion to fp16 in which nothing overflows: layers whose values leave its range stay in fp32.

The range of fp16 is ±65504. Which layers leave it is measured on inputs. Every tensor is looked at but those in bodies of If,
Loop and Scan, since ONNX Runtime's CPU provider leaves casts out: outputs that are finite there may not be finite on a GPU.
"""

from __future__ import annotations

from collections.abc import Sequence

import onnx

from tensorrail_exporter.precision.fp16 import to_fp16, too_large
from tensorrail_exporter.precision.prepared import plain_constants
from tensorrail_exporter.precision.ranges import Feeds, RangeError, require_finite
from tensorrail_exporter.precision.weights import kept_nodes, weighted, with_names


class Float16Converter:
    """Converts a model to fp16 several times, with other nodes in fp32 each time, and looks for overflow once.

    Use it in a `with` statement, as other converters.

    Args:
        model: the fp32 model; it is not changed.
        feeds: batches of inputs by name, on which values are looked at; none: only weights are.

    Attributes:
        model: the model in fp32, with a name for each node.
        kept: the nodes that stay in fp32 in any case: their weights or values are outside the range of fp16.

    Raises:
        RangeError: values overflow, and no layers are found that could stay in fp32 for it.
        GraphError: the model cannot be converted, see `to_fp16`.
        ModelError: the model cannot run on the inputs.

    """

    def __init__(self, model: onnx.ModelProto, feeds: Feeds) -> None:
        self.model = with_names(plain_constants(model))
        self.kept = tuple(sorted({node for constant in too_large(self.model) for node in constant.readers}))
        while feeds:
            try:
                require_finite(self.model, self(), feeds)
                break
            except RangeError as error:
                more = kept_nodes(self.model, error.keep) - {*self.kept}
                if not more:
                    raise
                self.kept = tuple(sorted({*self.kept, *more}))

    def __enter__(self) -> Float16Converter:
        return self

    def __exit__(self, *exception: object) -> None:
        """Do nothing: no file is open."""

    def __call__(self, keep: Sequence[str] = ()) -> onnx.ModelProto:
        """Return the model in fp16, but for the layers, weights or nodes in `keep` and those that overflow."""
        return to_fp16(self.model, keep=(*self.kept, *keep))

    def layers(self) -> list[str]:
        """Return the names of the nodes with a weight that become fp16, in their order."""
        return [w.node.name for w in weighted(self.model) if w.node.name not in self.kept]


def to_finite_fp16(model: onnx.ModelProto, feeds: Feeds = ()) -> onnx.ModelProto:
    """Return a model in fp16 in which nothing overflows on these inputs; arguments and errors of `Float16Converter`."""
    return Float16Converter(model, feeds)()
