"""Compares the outputs of two models on the same inputs. Both models run first and are compared afterwards."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime as ort

from tensorrail_runtime.errors import ModelError
from tensorrail_runtime.feeds.batches import samples_of
from tensorrail_runtime.feeds.rules import Axes, deduced_axes
from tensorrail_runtime.graphs.constants import weight_fault
from tensorrail_runtime.graphs.files import random_nodes
from tensorrail_runtime.graphs.reading import read_model
from tensorrail_runtime.measure.fusions import Fusions
from tensorrail_runtime.records import Record
from tensorrail_runtime.sessions.inputs import random_inputs
from tensorrail_runtime.sessions.session import Session, naming, open_session, require_tensors, run
from tensorrail_runtime.tables import Part, PrintedRecord, Table, or_dash

_SHOWN_BATCHES = 4
_REPEATED = 1e-3  # relative L2 between two runs on the same inputs that is rounding at most
_NODES = 3  # nodes that are named in an error
_INDEX_BYTES = 4  # integers of this size and larger are indices or counts


@dataclass(frozen=True)
class Tolerances:
    """Limits on the differences between outputs: on their relative L2 difference, or on every element.

    Attributes:
        relative_l2: the largest ‖b − a‖ / ‖a‖ of an output; for outputs that are compared exactly (see `is_exact`), the largest
            share of entries that differ. None sets no limit. It is ignored for outputs with an `rtol` or `atol`.
        rtol: by the name of an output, "" for all others: elements pass as in NumPy, if |b − a| ≤ atol + rtol·|a|.
        atol: likewise; one of the two that is not given is 0.

    """

    relative_l2: float | None = 1e-4
    rtol: Mapping[str, float] = field(default_factory=dict)
    atol: Mapping[str, float] = field(default_factory=dict)

    def of(self, name: str) -> tuple[float, float] | None:
        """Return (rtol, atol) of an output, 0 for one that is not given; None if neither is given."""
        limits = [table.get(name, table.get("")) for table in (self.rtol, self.atol)]
        return None if limits == [None, None] else (limits[0] or 0.0, limits[1] or 0.0)

    def check(self, outputs: Sequence[str]) -> None:
        """Raise `ModelError` for a tolerance of an unknown output, and for one that is not a finite number of 0 or more."""
        for name in {*self.rtol, *self.atol} - {*outputs, ""}:
            raise ModelError(f"tolerances: unknown output {name!r}; the model's outputs are {', '.join(outputs)}")
        for value in (*self.rtol.values(), *self.atol.values(), self.relative_l2 or 0.0):
            if not 0 <= value < math.inf:
                raise ModelError(f"expected a tolerance of 0 or more, got {value}")


class OutputParity(Record):
    """How one output b of the candidate differs from the output a of the reference, over all runs together.

    `worst_index` starts with the number of the run. `smallest` is the smallest tolerance that would pass: on the relative
    L2 difference, on the share of entries that differ if `exact`, or the atol for the given rtol.
    """

    name: str
    shape: tuple[int, ...]
    max_abs: float
    mean_abs: float
    relative_l2: float  # ‖b − a‖ / ‖a‖
    cosine: float
    worst_index: tuple[int, ...]
    worst_values: tuple[float, float]
    top1_agreement: float | None  # share of rows with the same largest score; None if the shape is not (rows, classes)
    rtol: float | None
    atol: float | None
    smallest: float
    holds: bool
    exact: bool = False


class LayerError(Record):
    """Relative L2 differences at one layer's output; None where the factored graph has no tensor of that name."""

    layer: str
    tensor: str
    approximation: float | None  # dense graph against the one with reconstructed weights
    numerical: float | None  # that one against the factored graph


class Parity(PrintedRecord):
    """The differences between all outputs of two models, and the tolerance for them."""

    reference: str
    candidate: str
    batches: tuple[int, ...]
    tolerance: float | None  # None: no limit
    outputs: tuple[OutputParity, ...]
    layers: tuple[LayerError, ...] = ()  # at the layers of a plan, where one was given
    fusions: Fusions | None = None  # the operators that ONNX Runtime fuses in both, where they were compared

    @property
    def worst(self) -> float:
        """The largest relative L2 difference of any output."""
        return max(output.relative_l2 for output in self.outputs)

    @property
    def holds(self) -> bool:
        """Whether every output is within its tolerance."""
        return all(output.holds for output in self.outputs)

    @property
    def smallest(self) -> float:
        """The smallest tolerance that every output would pass."""
        return max(output.smallest for output in self.outputs)

    def shown(self) -> tuple[Part, ...]:
        """Return the table of outputs, that of the plan's layers where there is one, and the verdict."""
        rows = [
            (
                o.name,
                *(f"{value:.2e}" for value in (o.relative_l2, o.max_abs, o.mean_abs)),
                f"{o.cosine:.8f}",
                f"{list(o.worst_index)}",
                "–" if o.top1_agreement is None else f"{100 * o.top1_agreement:.1f} %",
                f"{o.smallest:.2e}",
                "yes" if o.holds else "NO",
            )
            for o in self.outputs
        ]
        head = ("output", "relative L2", "max abs", "mean abs", "cosine", "worst at", "top-1 agreement", "would pass", "holds")
        several = len(self.batches) > _SHOWN_BATCHES
        sizes = ", ".join(map(str, self.batches))
        ran = f"{sum(self.batches)} samples in {len(self.batches)} batches" if several else f"batches of {sizes}"
        parts: list[Part] = [Table(f"{self.reference} against {self.candidate}, {ran}", head, rows)]
        if self.layers:
            errors = [(e.layer, or_dash(e.approximation, ".2e"), or_dash(e.numerical, ".2e")) for e in self.layers]
            parts.append(Table("relative L2 at each layer's output", ("layer", "approximation", "numerical"), errors))
            limit = self.tolerance or 0.0
            first = next((e.layer for e in self.layers if e.numerical is not None and e.numerical > limit), None)
            parts.append(
                f"the first layer with a larger numerical error than {limit:g}: {first}"
                if first
                else f"no layer has a larger numerical error than {limit:g}"
            )
        if self.fusions is not None and (line := self.fusions.described()):
            parts.append(line)
        by_element = any(output.rtol is not None or output.atol is not None for output in self.outputs)
        limit_text = "the element tolerances" if by_element else f"tolerance {or_dash(self.tolerance, 'g')}"
        verdict = "within" if self.holds else "OUT OF"
        return (*parts, f"{verdict} {limit_text}; the smallest tolerance that would pass is {self.smallest:.2e}")


def parity(
    reference: Path | str,
    candidate: Path | str,
    *,
    inputs: Sequence[Mapping[str, np.ndarray]] | None = None,
    batches: Sequence[int] = (1, 7),
    tolerance: float | Tolerances | None = 1e-4,
    settings: Session | None = None,
    axes: Axes | None = None,
) -> Parity:
    """Run two models on the same inputs and compare every output, over all runs together.

    Args:
        reference: the file of the model to compare with.
        candidate: the file of the model that is compared.
        inputs: arrays by input name, one mapping for each run; default: random ones at each of `batches`.
        batches: batch sizes of random inputs.
        tolerance: the largest relative L2 difference of any output; `Tolerances` for limits by output and element; None to
            measure only.
        settings: how both run; default: the CPU provider.
        axes: the batch axis of each input by name, by which samples are counted; default: as `InputRules` deduces them.

    Returns:
        How each output differs, over all runs together.

    Raises:
        ModelError: inputs or outputs of the models differ, an output is not a tensor or not finite, or no run gave a value.

    """
    limits = tolerance if isinstance(tolerance, Tolerances) else Tolerances(tolerance)
    return parity_of(
        run_both(reference, candidate, inputs=inputs, batches=batches, limits=limits, settings=settings), limits, axes
    )


@dataclass(frozen=True)
class Both:
    """Two models that ran on the same inputs.

    Attributes:
        reference: the file of the model to compare with.
        candidate: the file of the model that is compared.
        feeds: the inputs of every run, by name.
        runs: the outputs of both models by name, one mapping for each run.
        axes: the batch axis of each input, as the graph suggests.

    """

    reference: Path
    candidate: Path
    feeds: Sequence[Mapping[str, np.ndarray]]
    runs: tuple[Sequence[Mapping[str, np.ndarray]], Sequence[Mapping[str, np.ndarray]]]
    axes: Axes


def run_both(
    reference: Path | str,
    candidate: Path | str,
    *,
    inputs: Sequence[Mapping[str, np.ndarray]] | None = None,
    batches: Sequence[int] = (1, 7),
    limits: Tolerances | None = None,
    settings: Session | None = None,
) -> Both:
    """Run two models on the same inputs, for `parity_of` and `agreement_of`; arguments and errors are those of `parity`."""
    settings = settings or Session()
    first, second = (open_session(path, settings=settings) for path in (reference, candidate))
    _require_same_signature(first, second)
    require_tensors(reference, first)
    if limits is not None:
        limits.check([entry.name for entry in first.get_outputs()])
    feeds = list(inputs) if inputs is not None else [random_inputs(first, batch) for batch in batches]
    if not feeds:
        raise ModelError("nothing to compare: expected at least one set of inputs, got none")
    for path, session in ((reference, first), (candidate, second)):
        require_comparable(path, feeds[0], settings, session)
    runs = []
    for path, session in ((reference, first), (candidate, second)):
        with naming(path):
            runs.append([run(session, feed) for feed in feeds])
    for path, results in zip((reference, candidate), runs, strict=True):
        _require_finite_weights(Path(path), results)
    axes = deduced_axes({entry.name: entry.shape for entry in first.get_inputs()})
    return Both(Path(reference), Path(candidate), feeds, (runs[0], runs[1]), axes)


def parity_of(both: Both, tolerance: Tolerances | None = None, axes: Axes | None = None) -> Parity:
    """Compare every output of two models that ran; arguments and errors are those of `parity`."""
    limits = tolerance or Tolerances(None)
    first_runs, second_runs = both.runs
    axes = both.axes if axes is None else axes
    outputs = [
        compare(name, [arrays[name] for arrays in first_runs], [arrays[name] for arrays in second_runs], limits)
        for name in first_runs[0]
    ]
    if not any(array.size for arrays in first_runs for array in arrays.values()):
        raise ModelError("nothing to compare: no output had a value in any run; give inputs of your own")
    return Parity(
        reference=both.reference.name,
        candidate=both.candidate.name,
        batches=tuple(samples_of(feed, axes) for feed in both.feeds),
        tolerance=limits.relative_l2,
        outputs=tuple(outputs),
    )


def require_comparable(
    path: Path | str,
    feed: Mapping[str, np.ndarray],
    settings: Session | None = None,
    session: ort.InferenceSession | None = None,
) -> None:
    """Check, before any work, that the outputs of a model can be compared.

    Args:
        path: the file of the model.
        feed: inputs by name.
        settings: how the model runs; default: the CPU provider.
        session: a session of the model, where one is open; default: one is opened with the settings.

    Raises:
        ModelError: an output is not a tensor, or outputs differ from run to run because the model draws random numbers.

    """
    session = session or open_session(path, settings=settings or Session())
    require_tensors(path, session)
    random = random_nodes(Path(path))
    if not random:
        return
    first, second = run(session, feed), run(session, feed)
    for name, left in first.items():
        right = second[name]
        same = left.shape == right.shape and (left.dtype.kind not in "fiub" or relative_l2(*_doubles(left, right)) <= _REPEATED)
        if not same:
            by = "its shape" if left.shape != right.shape else f"{relative_l2(*_doubles(left, right)):.2g} (relative L2)"
            raise ModelError(
                f"{path}: output {name!r} differs by {by} between two runs on the same inputs, because the model draws random "
                f"numbers ({', '.join(random[:_NODES])}): its outputs cannot be compared; make the noise an input, or give "
                "these nodes a seed"
            )


def _require_finite_weights(path: Path, runs: Sequence[Mapping[str, np.ndarray]]) -> None:
    """Raise `ModelError` for a weight that holds NaN, where an output is not finite."""
    arrays = [array for outputs in runs for array in outputs.values() if array.dtype.kind == "f"]
    if all(np.isfinite(array).all() for array in arrays):
        return
    fault = weight_fault(read_model(path)[0])
    if fault:
        raise ModelError(f"{path}: {fault}")


def _doubles(*arrays: np.ndarray) -> list[np.ndarray]:
    return [np.nan_to_num(np.asarray(array, np.float64)) for array in arrays]


def compare(name: str, first: Sequence[np.ndarray], second: Sequence[np.ndarray], tolerances: Tolerances) -> OutputParity:
    """Compare one output of two models over several runs.

    Args:
        name: the name of the output.
        first: the output of the reference in each run.
        second: the output of the candidate in each run.
        tolerances: the limits for the difference.

    Returns:
        The difference over all runs together.

    Raises:
        ModelError: the shapes differ, or a value is not a number or not finite.

    """
    for number, (left, right) in enumerate(zip(first, second, strict=True)):
        if left.shape != right.shape:
            raise ModelError(f"output {name!r} has shape {left.shape} in one model and {right.shape} in the other")
        if not np.issubdtype(left.dtype, np.number) and left.dtype != np.bool_:
            raise ModelError(f"output {name!r} has {left.dtype} values: only numbers and booleans can be compared")
        for model, array in (("first", left), ("second", right)):
            if not np.isfinite(array).all():
                raise ModelError(
                    f"output {name!r} of the {model} model: expected finite values, got NaN or infinite ones in run {number}: "
                    "check the inputs and the weights of this model"
                )
    a, b = ([np.asarray(array, np.float64) for array in arrays] for arrays in (first, second))
    differences = [_difference(left, right) for left, right in zip(first, second, strict=True)]
    x, y, difference = (np.concatenate([array.ravel() for array in arrays]) for arrays in (a, b, differences))
    relative, exact = relative_l2(x, y), is_exact(first[0].dtype)
    limits = tolerances.of(name)
    index, values = _worst(a, b, differences)
    if limits is None:
        smallest = (float(np.mean(difference != 0)) if difference.size else 0.0) if exact else relative
        holds = tolerances.relative_l2 is None or smallest <= tolerances.relative_l2
    else:
        smallest = float((difference - limits[0] * np.abs(x)).max(initial=0.0))
        holds = smallest <= limits[1]
    return OutputParity(
        name=name,
        shape=tuple(a[0].shape),
        max_abs=float(difference.max(initial=0.0)),
        mean_abs=float(difference.mean()) if difference.size else 0.0,
        relative_l2=relative,
        cosine=_cosine(x, y),
        worst_index=index,
        worst_values=values,
        top1_agreement=_agreement(a, b),
        rtol=None if limits is None else limits[0],
        atol=None if limits is None else limits[1],
        exact=exact,
        smallest=smallest,
        holds=bool(holds),
    )


def is_exact(dtype: np.dtype[Any]) -> bool:
    """Return whether values of this type are compared exactly: indices, counts and booleans.

    Integers of 8 and 16 bits are compared as quantities: they are pixels and quantized numbers.
    """
    return dtype.kind == "b" or (dtype.kind in "iu" and dtype.itemsize >= _INDEX_BYTES)


def relative_l2(a: np.ndarray, b: np.ndarray) -> float:
    """Return ‖b − a‖ / ‖a‖, or ‖b‖ where a is zero, without overflow."""
    scale = float(np.abs(a).max(initial=0.0)) or 1.0
    return float(np.linalg.norm(b / scale - a / scale) / np.linalg.norm(a / scale)) if a.any() else float(np.linalg.norm(b))


def _difference(left: np.ndarray, right: np.ndarray) -> np.ndarray:
    """Return |right − left| for each entry; integers are subtracted as integers, without rounding to floats."""
    if left.dtype.kind in "iu" and left.dtype == right.dtype:
        larger, smaller = np.maximum(left, right), np.minimum(left, right)
        return np.asarray(larger.astype(np.uint64) - smaller.astype(np.uint64), np.float64)
    return np.asarray(np.abs(left.astype(np.float64) - right.astype(np.float64)))


def _cosine(x: np.ndarray, y: np.ndarray) -> float:
    if not (x.any() and y.any()):
        return float(x.any() == y.any())
    x, y = x / np.abs(x).max(), y / np.abs(y).max()
    return float(x @ y / (np.linalg.norm(x) * np.linalg.norm(y)))


def _worst(
    a: Sequence[np.ndarray], b: Sequence[np.ndarray], differences: Sequence[np.ndarray]
) -> tuple[tuple[int, ...], tuple[float, float]]:
    """Return the index of the largest absolute difference, run first, and the two values there."""
    worst: tuple[float, tuple[int, ...], tuple[float, float]] = (-1.0, (), (0.0, 0.0))
    for number, (left, right, difference) in enumerate(zip(a, b, differences, strict=True)):
        if not left.size:
            continue
        index = np.unravel_index(int(difference.argmax()), difference.shape)
        if difference[index] > worst[0]:
            worst = (float(difference[index]), (number, *map(int, index)), (float(left[index]), float(right[index])))
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
            raise ModelError(f"expected two models with the same {kind[4:]}, got {a} and {b}")
