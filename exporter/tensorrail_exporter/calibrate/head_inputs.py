"""Attention heads of a smaller size in the metric of calibration inputs: second moments of what their layers read."""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np
import onnx

from tensorrail_exporter.calibrate.inputs import Calibration, run_to
from tensorrail_exporter.graphs.head_pairs import PairNames
from tensorrail_exporter.graphs.heads import head_inputs, with_heads
from tensorrail_runtime.errors import GraphError
from tensorrail_runtime.sessions.session import Session


def with_heads_for(
    model: onnx.ModelProto, sizes: Mapping[PairNames, int], calibration: Calibration | None, settings: Session
) -> onnx.ModelProto:
    """Return a copy in which the heads of some pairs have fewer values, the best ones for some inputs.

    Args:
        model: the dense model; it is not changed.
        sizes: the number of values of each head, by the names of the pair.
        calibration: the inputs; None: the weights alone are approximated.
        settings: how the model runs.

    Raises:
        GraphError: the model has no such pair, its heads have fewer values, or values are not finite.

    """
    if not sizes:
        return model
    return with_heads(model, sizes, None if calibration is None else head_moments(model, sizes, calibration, settings))


def head_moments(
    model: onnx.ModelProto, sizes: Mapping[PairNames, int], calibration: Calibration, settings: Session
) -> dict[str, np.ndarray]:
    """Return the second moments that `with_heads` takes, over all rows of the layers' inputs.

    Args:
        model: the dense model.
        sizes: the pairs, as for `with_heads`.
        calibration: inputs of the model.
        settings: how the model runs.

    Returns:
        By the name of the input, the second moment (I + 1, I + 1) of its values with a 1 behind them.

    Raises:
        GraphError: the model has no such pair, or an input is not finite.

    """
    names = head_inputs(model, tuple(sizes))
    run = run_to(model, names, settings)
    sums: dict[str, np.ndarray] = {}
    counts = dict.fromkeys(names, 0)
    for feed in calibration.feeds:
        for name, values in zip(names, run(feed), strict=True):
            rows = values.reshape(-1, values.shape[-1]).astype(np.float32)
            rows = np.concatenate([rows, np.ones((len(rows), 1), np.float32)], axis=1)
            sums[name] = sums.get(name, 0.0) + (rows.T @ rows).astype(np.float64)
            counts[name] += len(rows)
    for name, total in sums.items():
        if not np.isfinite(total).all():
            raise GraphError(f"{name!r}: holds NaN or infinite values for these calibration inputs; check the inputs")
    return {name: total / counts[name] for name, total in sums.items()}
