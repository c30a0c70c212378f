"""Do two models compute the same? Everything runs first and is compared afterwards, on the same inputs."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import onnxruntime as ort

from tensorrail_runtime.inputs import Shapes, random_inputs, samples_of
from tensorrail_runtime.records import Record
from tensorrail_runtime.session import ModelError, Settings, open_session, require_tensors, run


@dataclass(frozen=True)
class Tolerances:
    """What outputs are held to: their relative L2 difference, or, once `rtol` or `atol` is given, every element.

    Elements pass as in numpy: |b − a| ≤ atol + rtol·|a|. The mappings are by output, "" for all others.
    """

    relative_l2: float | None = 1e-4
    rtol: Mapping[str, float] = field(default_factory=dict)
    atol: Mapping[str, float] = field(default_factory=dict)

    def of(self, name: str) -> tuple[float, float] | None:
        """Return (rtol, atol) of an output, 0 for the one that is not given; None when it is held to the L2 difference."""
        found = [table.get(name, table.get("")) for table in (self.rtol, self.atol)]
        return None if found == [None, None] else (found[0] or 0.0, found[1] or 0.0)

    def check(self, outputs: Sequence[str]) -> None:
        """Raise `ModelError` for a tolerance of an output that is not there."""
        for name in {*self.rtol, *self.atol} - {*outputs, ""}:
            raise ModelError(f"a tolerance came for output {name!r}, and the outputs are {', '.join(outputs)}")


class OutputParity(Record):
    """How one output of the second model differs from that of the first, over all runs together.

    `worst_index` starts with the number of the run. `smallest` is the smallest tolerance that would pass: of the relative
    L2 difference, or the atol beside the given rtol.
    """

    name: str
    shape: tuple[int, ...]
    max_abs: float
    mean_abs: float
    relative_l2: float  # ‖b − a‖ / ‖a‖
    cosine: float
    worst_index: tuple[int, ...]
    worst_values: tuple[float, float]
    top1_agreement: float | None  # share of rows with the same largest score; None for outputs that are not (rows, classes)
    rtol: float | None
    atol: float | None
    smallest: float
    holds: bool


class Parity(Record):
    """All outputs, and the tolerance they were held to."""

    reference: str
    candidate: str
    batches: tuple[int, ...]
    tolerance: float | None  # None: measured, and held to nothing
    outputs: tuple[OutputParity, ...]

    @property
    def worst(self) -> float:
        """The largest relative L2 difference of any output."""
        return max(output.relative_l2 for output in self.outputs)

    @property
    def holds(self) -> bool:
        """Whether every output is within its tolerance."""
        return all(output.holds for output in self.outputs)


def parity(
    reference: Path | str,
    candidate: Path | str,
    *,
    inputs: Sequence[Mapping[str, np.ndarray]] | None = None,
    batches: Sequence[int] = (1, 7),
    shapes: Shapes | None = None,
    tolerance: float | None = 1e-4,
    tolerances: Tolerances | None = None,
    provider: str = "cpu",
    settings: Settings | None = None,
    seed: int = 0,
) -> Parity:
    """Run both models and compare every output, over all inputs together.

    Without `inputs`, random ones are drawn at each of the batch sizes. `tolerance` is of the relative L2 difference,
    `tolerances` says it by output and element. Raises `ModelError` for models whose inputs or outputs differ, and for
    outputs that are no tensors or not finite.
    """
    held = tolerances or Tolerances(tolerance)
    settings = settings or Settings(provider=provider)
    first, second = (open_session(path, settings=settings) for path in (reference, candidate))
    _require_same_signature(first, second)
    require_tensors(reference, first)
    held.check([entry.name for entry in first.get_outputs()])
    feeds = list(inputs) if inputs is not None else [random_inputs(first, batch, seed, shapes) for batch in batches]
    if not feeds:
        raise ModelError("nothing to compare: no inputs came")
    ran = [[run(session, feed) for feed in feeds] for session in (first, second)]
    names = [entry.name for entry in first.get_outputs()]
    outputs = [compare(name, [outs[name] for outs in ran[0]], [outs[name] for outs in ran[1]], held) for name in names]
    return Parity(
        reference=Path(reference).name,
        candidate=Path(candidate).name,
        batches=tuple(samples_of(feed) for feed in feeds),
        tolerance=held.relative_l2,
        outputs=tuple(outputs),
    )


def compare(name: str, first: Sequence[np.ndarray], second: Sequence[np.ndarray], held: Tolerances) -> OutputParity:
    """Return how one output differs, its arrays given run by run; `ModelError` for other shapes and values not finite."""
    for number, (left, right) in enumerate(zip(first, second, strict=True)):
        if left.shape != right.shape:
            raise ModelError(f"output {name!r} has shape {left.shape} in one model and {right.shape} in the other")
        if not np.issubdtype(left.dtype, np.number) and left.dtype != np.bool_:
            raise ModelError(f"output {name!r} holds {left.dtype} values, which have no difference")
        for model, array in (("first", left), ("second", right)):
            if not np.isfinite(array).all():
                raise ModelError(f"output {name!r} of the {model} model holds NaN or infinite values in run {number}")
    a, b = ([np.asarray(array, np.float64) for array in arrays] for arrays in (first, second))
    x, y = (np.concatenate([part.ravel() for part in parts]) for parts in (a, b))
    norm_x, norm_y, difference = np.linalg.norm(x), np.linalg.norm(y), np.abs(x - y)
    relative = float(np.linalg.norm(difference) / (norm_x or 1.0))
    limits = held.of(name)
    index, values = _worst(a, b)
    if limits is None:
        smallest, holds = relative, held.relative_l2 is None or relative <= held.relative_l2
    else:
        smallest = float(max(0.0, (difference - limits[0] * np.abs(x)).max(initial=0.0)))
        holds = smallest <= limits[1]
    return OutputParity(
        name=name,
        shape=tuple(a[0].shape),
        max_abs=float(difference.max(initial=0.0)),
        mean_abs=float(difference.mean()) if difference.size else 0.0,
        relative_l2=relative,
        cosine=float(x @ y / (norm_x * norm_y)) if norm_x and norm_y else float(norm_x == norm_y),
        worst_index=index,
        worst_values=values,
        top1_agreement=_agreement(a, b),
        rtol=None if limits is None else limits[0],
        atol=None if limits is None else limits[1],
        smallest=smallest,
        holds=bool(holds),
    )


def _worst(a: Sequence[np.ndarray], b: Sequence[np.ndarray]) -> tuple[tuple[int, ...], tuple[float, float]]:
    """Return where the largest absolute difference is, the run first, and the two values there."""
    worst: tuple[float, tuple[int, ...], tuple[float, float]] = (-1.0, (), (0.0, 0.0))
    for number, (left, right) in enumerate(zip(a, b, strict=True)):
        if not left.size:
            continue
        difference = np.abs(left - right)
        at = np.unravel_index(int(difference.argmax()), difference.shape)
        if difference[at] > worst[0]:
            worst = (float(difference[at]), (number, *map(int, at)), (float(left[at]), float(right[at])))
    return worst[1], worst[2]


def _agreement(a: Sequence[np.ndarray], b: Sequence[np.ndarray]) -> float | None:
    if a[0].ndim != 2 or a[0].shape[1] < 2 or not any(map(np.size, a)):
        return None
    same = [x.argmax(1) == y.argmax(1) for x, y in zip(a, b, strict=True)]
    return float(np.mean(np.concatenate(same)))


def _require_same_signature(first: ort.InferenceSession, second: ort.InferenceSession) -> None:
    for kind in ("get_inputs", "get_outputs"):
        a, b = ({e.name: (e.type, len(e.shape)) for e in getattr(session, kind)()} for session in (first, second))
        if a != b:
            raise ModelError(f"the models differ in their {kind[4:]}: {a} against {b}")
