"""Whether a graph that computes the same in another way differs from the dense one by rounding alone."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import onnx

from tensorrail_runtime.errors import GraphError
from tensorrail_runtime.measure.parity import Parity, parity
from tensorrail_runtime.sessions.session import Session

_HALVES = 1e-2  # relative L2 where weights are float16
_TIES = 0.05  # relative difference of integers that near ties may cause


@dataclass(frozen=True)
class Rewritten:
    """What was written in another way, and how much rounding may change the outputs.

    Attributes:
        what: the rest of "expected …", such as `joint layers to differ from the dense ones`.
        instead: what the user can do if the outputs differ by more.
        single: the limit with weights in float32, relative L2.
        times: a factor of the limits; default 1.

    """

    what: str
    instead: str
    single: float
    times: float = 1.0


def require_rounding(
    dense: Path,
    changed: Path,
    feeds: Sequence[Mapping[str, np.ndarray]],
    rewritten: Rewritten,
    settings: Session | None = None,
) -> float:
    """Return how far the outputs of a graph are from the dense one's.

    Args:
        dense: the dense model.
        changed: the same, of which a part is written in another way.
        feeds: batches of inputs by name.
        rewritten: which part, and how much it may differ.
        settings: how both run; default: the CPU provider.

    Returns:
        The relative L2 difference.

    Raises:
        GraphError: it is more than rounding may cause.
        ModelError: a model does not run, or the outputs cannot be compared.

    """
    error = rounding_of(parity(dense, changed, inputs=feeds, tolerance=None, settings=settings))
    stored = onnx.load(changed, load_external_data=False).graph.initializer
    halves = any(tensor.data_type == onnx.TensorProto.FLOAT16 for tensor in stored)
    limit = rewritten.times * (_HALVES if halves else rewritten.single)
    if not error <= limit:
        raise GraphError(
            f"expected {rewritten.what} by at most {limit:.1g} (relative L2), got {error:.1e}; {rewritten.instead}, and please "
            "report the model"
        )
    return error


def rounding_of(compared: Parity) -> float:
    """Return the largest relative L2 difference of outputs, as far as rounding does not explain it.

    Rounding may turn a near tie, so that a few values of an integer output (ArgMax, TopK) differ by much: such an output counts
    only where more than that differs.
    """
    return max(
        (one.relative_l2 for one in compared.outputs if not (one.exact and one.relative_l2 <= _TIES)),
        default=0.0,
    )
