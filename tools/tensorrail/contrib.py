"""Models without operators that ONNX Runtime alone has, as far as they can be written in ONNX's own."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING

from tensorrail_runtime.measure.timing import Conditions

if TYPE_CHECKING:
    import numpy as np
    import onnx

    from tensorrail_runtime.progress import Progress


def without_contrib(model: onnx.ModelProto, progress: Progress) -> onnx.ModelProto:
    """Return a model with fused attention in ONNX's operators, and tell which operators of com.microsoft are left.

    Args:
        model: the model; it is not changed.
        progress: told which operators are left.

    """
    from tensorrail_exporter.rewrite.plain_attention import contrib_operators, plain_attention

    plain = plain_attention(model)
    left = ", ".join(f"{name} ({count})" for name, count in sorted(contrib_operators(plain).items()))
    if left:
        progress("note", 1.0, f"the graph still has operators of com.microsoft, which ONNX Runtime alone runs: {left}")
    return plain


def dense_without_contrib(
    model: onnx.ModelProto, path: Path, feed: Mapping[str, np.ndarray], conditions: Conditions
) -> onnx.ModelProto:
    """Do the same for the model that others are compared with, and compare it with its file.

    Args:
        model: the model of the file.
        path: the file.
        feed: inputs to compare the outputs on.
        conditions: how models run, and what is told about it.

    Raises:
        GraphError: the outputs differ by more than rounding.

    """
    from tensorrail_exporter.rewrite.plain_attention import require_equal
    from tensorrail_exporter.rewrite.survey import with_known_axes

    plain = without_contrib(model, conditions.progress)
    if plain is model:
        return model
    require_equal(path, plain, feed, conditions.settings.exact)
    conditions.progress(
        "note", 1.0, "fused attention is written as operators of ONNX, in the dense model too, with which times are compared"
    )
    timing = conditions.timing
    return with_known_axes(plain, timing.batch, timing.shapes, timing.values)
