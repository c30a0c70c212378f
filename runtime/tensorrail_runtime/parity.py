"""Do two models compute the same? Everything runs first and is compared afterwards, on the same inputs."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np
import onnxruntime as ort

from tensorrail_runtime.records import Record
from tensorrail_runtime.session import ModelError, open_session, run

_TYPES = {
    "tensor(float)": np.float32,
    "tensor(double)": np.float64,
    "tensor(float16)": np.float16,
    "tensor(int64)": np.int64,
    "tensor(int32)": np.int32,
    "tensor(uint8)": np.uint8,
    "tensor(int8)": np.int8,
    "tensor(bool)": np.bool_,
}


class OutputParity(Record):
    """How one output of the second model differs from that of the first."""

    name: str
    shape: tuple[int, ...]
    max_abs: float
    mean_abs: float
    relative_l2: float  # ‖b − a‖ / ‖a‖
    cosine: float
    top1_agreement: float | None  # share of rows with the same largest score; None for outputs that are not (rows, classes)


class Parity(Record):
    """All outputs, and the tolerance they were held to."""

    reference: str
    candidate: str
    batches: tuple[int, ...]
    tolerance: float | None  # None: measured, and held to nothing
    outputs: tuple[OutputParity, ...]

    @property
    def worst(self) -> float:
        """The largest relative L2 difference: the smallest tolerance that would pass."""
        return max(output.relative_l2 for output in self.outputs)

    @property
    def holds(self) -> bool:
        """Whether every output is within the tolerance."""
        return self.tolerance is None or self.worst <= self.tolerance


def parity(
    reference: Path | str,
    candidate: Path | str,
    *,
    inputs: Sequence[Mapping[str, np.ndarray]] | None = None,
    batches: Sequence[int] = (1, 7),
    tolerance: float | None = 1e-4,
    provider: str = "cpu",
    seed: int = 0,
) -> Parity:
    """Run both models and compare every output by its relative L2 difference, over all inputs together.

    Without `inputs`, random ones are drawn at each of the batch sizes. Raises `ModelError` for models whose inputs or
    outputs differ, and for outputs that are not finite.
    """
    first, second = open_session(reference, provider=provider), open_session(candidate, provider=provider)
    _require_same_signature(first, second)
    feeds = list(inputs) if inputs is not None else [random_inputs(first, batch, seed) for batch in batches]
    ran = [[run(session, feed) for feed in feeds] for session in (first, second)]
    outputs = []
    for name in (entry.name for entry in first.get_outputs()):
        a, b = ([np.asarray(outs[name], np.float64) for outs in runs] for runs in ran)
        outputs.append(_compare(name, a, b))
    sizes = tuple(next(iter(feed.values())).shape[0] if next(iter(feed.values())).ndim else 1 for feed in feeds)
    return Parity(
        reference=Path(reference).name,
        candidate=Path(candidate).name,
        batches=sizes,
        tolerance=tolerance,
        outputs=tuple(outputs),
    )


def random_inputs(session: ort.InferenceSession, batch: int, seed: int = 0) -> dict[str, np.ndarray]:
    """Return inputs of the model's own types and shapes: standard normal, or integers 0 and 1; `batch` for dynamic axes."""
    rng = np.random.default_rng(seed)
    feed = {}
    for entry in session.get_inputs():
        if entry.type not in _TYPES:
            raise ModelError(f"input {entry.name!r} is a {entry.type}: give its values, they cannot be drawn at random")
        shape = [size if isinstance(size, int) else batch for size in entry.shape]
        dtype = np.dtype(_TYPES[entry.type])
        normal = np.issubdtype(dtype, np.floating)
        feed[entry.name] = (rng.standard_normal(shape) if normal else rng.integers(0, 2, shape)).astype(dtype)
    return feed


def _require_same_signature(first: ort.InferenceSession, second: ort.InferenceSession) -> None:
    for kind in ("get_inputs", "get_outputs"):
        a, b = ({e.name: (e.type, len(e.shape)) for e in getattr(session, kind)()} for session in (first, second))
        if a != b:
            raise ModelError(f"the models differ in their {kind[4:]}: {a} against {b}")


def _compare(name: str, a: list[np.ndarray], b: list[np.ndarray]) -> OutputParity:
    for left, right in zip(a, b, strict=True):
        if left.shape != right.shape:
            raise ModelError(f"output {name!r} has shape {left.shape} in one model and {right.shape} in the other")
        if not (np.isfinite(left).all() and np.isfinite(right).all()):
            raise ModelError(f"output {name!r} holds NaN or infinite values: nothing can be compared")
    rows = a[0].ndim == 2 and a[0].shape[1] > 1
    agreement = None
    if rows:
        agreement = float(np.mean(np.concatenate([x.argmax(1) == y.argmax(1) for x, y in zip(a, b, strict=True)])))
    x, y = (np.concatenate([part.ravel() for part in parts]) for parts in (a, b))
    norm_x, norm_y, difference = np.linalg.norm(x), np.linalg.norm(y), np.abs(x - y)
    return OutputParity(
        name=name,
        shape=tuple(a[0].shape),
        max_abs=float(difference.max(initial=0.0)),
        mean_abs=float(difference.mean()) if difference.size else 0.0,
        relative_l2=float(np.linalg.norm(difference) / (norm_x or 1.0)),
        cosine=float(x @ y / (norm_x * norm_y)) if norm_x and norm_y else float(norm_x == norm_y),
        top1_agreement=agreement,
    )
