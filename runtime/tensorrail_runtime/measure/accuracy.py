"""Measures the accuracy of ONNX models on labelled data, by top-1, top-5 or a custom metric, and compares two models.

Both models are scored on the same samples, so the comparison is paired: McNemar's exact test on the samples that only one of
them gets right (McNemar 1947), and the interval of Agresti and Min (2005) for the difference of the two rates. Scores of
another kind are compared by Wilcoxon's signed-rank test and a normal interval of the mean difference.
"""

from __future__ import annotations

import importlib
import sys
from collections.abc import Callable, Iterable, Mapping, Sequence
from copy import deepcopy
from dataclasses import dataclass, field
from pathlib import Path
from statistics import NormalDist
from typing import Any, cast

import numpy as np
import onnxruntime as ort

from tensorrail_runtime.errors import OWN_CODE, MetricError, ModelError, TensorrailError, first_line, in_words
from tensorrail_runtime.feeds.batches import LABELS, Feed, class_column
from tensorrail_runtime.feeds.loading import load_batches
from tensorrail_runtime.feeds.rules import InputRules
from tensorrail_runtime.feeds.sources import read_parts
from tensorrail_runtime.records import Record
from tensorrail_runtime.sessions.session import Session, naming, open_session, require_tensors, run
from tensorrail_runtime.sessions.values import native
from tensorrail_runtime.tables import Part, PrintedRecord, Table

Metric = Callable[[Mapping[str, np.ndarray], np.ndarray], np.ndarray]
"""Takes the outputs of a batch by name and its labels, and returns one score per sample: 0 or 1, or any number."""

_Z = NormalDist().inv_cdf(0.975)
_ROUNDING = 1e-9  # of a score or a limit: far more than the rounding of a mean, far less than anybody measures


@dataclass(frozen=True)
class Labelled:
    """Inputs with labels that an accuracy is measured on."""

    inputs: Mapping[str, np.ndarray] | Sequence[Mapping[str, np.ndarray]]
    """Arrays (N, …) by input name; or several such mappings, each a sequence or what one run takes."""
    labels: np.ndarray
    """One label a sample, (N, …)."""
    metric: str = "top1"
    """`top1`, `top5`, or `module:function` of (outputs, labels) that returns one score a sample (see `Metric`)."""
    rules: InputRules = field(default_factory=InputRules)
    """Which inputs are constant, have their samples along another axis than the first, or are states."""
    counts: tuple[int, ...] = ()
    """How many of the labels belong to each of several mappings, where this is known: it must be as many as their samples."""

    def __post_init__(self) -> None:
        try:
            object.__setattr__(self, "labels", native(self.labels))
        except (ValueError, TypeError, RuntimeError) as error:  # such as lists of unequal length, a tensor on a GPU
            raise ModelError(
                f"labels: not an array ({first_line(error)}); expected a NumPy array, one label a sample"
            ) from None

    @classmethod
    def load(cls, path: Path | str, metric: str | None = None, rules: InputRules | None = None) -> Labelled:
        """Read arrays by input name and `labels` from an npz file, or from each file of a folder.

        Args:
            path: the file or folder.
            metric: see `metric`; default `top1`.
            rules: see `rules`.

        Raises:
            ModelError: a file cannot be read or has no labels.

        """
        inputs, labels = [], []
        for where, arrays in read_parts(path, ()):
            if "labels" not in arrays:
                raise ModelError(f"{where}: expected an array 'labels' beside the inputs, found {', '.join(arrays)}")
            labels.append(np.atleast_1d(arrays.pop("labels")))
            inputs.append(arrays)
        try:
            joined = labels[0] if len(labels) == 1 else np.concatenate(labels)
        except ValueError as error:
            raise ModelError(
                f"{path}: the labels of its files cannot be joined ({error}); expected one label a sample"
            ) from None
        counts = tuple(len(own) for own in labels) if len(labels) > 1 else ()
        return cls(inputs[0] if len(inputs) == 1 else inputs, joined, metric or "top1", rules or InputRules(), counts)


class Accuracy(Record):
    """The number of correct answers, their percentage, and its 95 % confidence interval (Wilson 1927)."""

    correct: int
    total: int

    @property
    def percent(self) -> float:
        """The percentage of correct answers."""
        return 100 * self.correct / self.total

    @property
    def interval(self) -> tuple[float, float]:
        """The 95 % confidence interval of the percentage."""
        low, high = wilson(self.correct, self.total)
        return 100 * low, 100 * high


class Evaluation(PrintedRecord):
    """The scores of one model, one per sample."""

    model: str
    metric: str
    scores: tuple[float, ...]

    @property
    def mean(self) -> float:
        """The mean score: for metrics of 0 and 1, the share of correct answers."""
        return float(np.mean(self.scores))

    def shown(self) -> tuple[Part, ...]:
        """Return the table of the one model."""
        return (_scores(self),)


class Comparison(PrintedRecord):
    """Two models on the same samples. `difference` is the mean score of candidate − reference, with its 95 % interval."""

    reference: Evaluation
    candidate: Evaluation
    only_reference: int  # samples that only the reference gets right, or on which it scores higher
    only_candidate: int
    difference: float
    low: float
    high: float
    test: str
    p_value: float  # of the hypothesis that the models do not differ

    def shown(self) -> tuple[Part, ...]:
        """Return the table of both models, and the paired test."""
        return (
            _scores(self.reference, self.candidate),
            f"difference {self.difference:+.4f} [{self.low:+.4f}, {self.high:+.4f}]; right in A alone {self.only_reference}, "
            f"in B alone {self.only_candidate}; {self.test}: p = {self.p_value:.3g}",
        )


def _scores(*evaluations: Evaluation) -> Table:
    rows = [(one.model, f"{one.mean:.4f}", str(len(one.scores))) for one in evaluations]
    return Table(evaluations[0].metric, ("model", "mean score", "samples"), rows)


def accuracy(path: Path | str, images: np.ndarray, labels: np.ndarray, *, batch: int = 64, provider: str = "cpu") -> Accuracy:
    """Measure the top-1 accuracy of a model.

    Args:
        path: the ONNX file; it takes one input, and its first output are class scores of shape (N, classes).
        images: the samples, of shape (N, …).
        labels: the integer labels, of shape (N,).
        batch: the number of samples in each run.
        provider: "cpu", "cuda" or "tensorrt".

    Returns:
        The number of correct answers out of all.

    Raises:
        ModelError: there are not as many images as labels, or the model cannot be run on them.

    """
    if not np.size(images) or np.shape(images)[:1] != np.shape(labels)[:1]:
        raise ModelError(f"expected as many images as labels, got arrays of shape {np.shape(images)} and {np.shape(labels)}")
    name = _first_input(path, open_session(path, provider=provider))
    evaluation = evaluate(path, Labelled({name: images}, labels), batch=batch, settings=Session(provider=provider))
    return Accuracy(correct=int(sum(evaluation.scores)), total=len(labels))


def accuracy_of(path: Path | str, batches: Iterable[tuple[np.ndarray, np.ndarray]], *, provider: str = "cpu") -> Accuracy:
    """Measure the top-1 accuracy of a model on an iterable of batches, which need not be in memory at once.

    Args:
        path: the ONNX file; it takes one input, and its first output are class scores of shape (B, classes).
        batches: pairs of samples, of shape (B, …), and integer labels, of shape (B,).
        provider: "cpu", "cuda" or "tensorrt".

    Returns:
        The number of correct answers out of all.

    Raises:
        ModelError: there are no samples, the model cannot be run on them, or its output is NaN.

    """
    session = open_session(path, provider=provider)
    name, correct, total = _first_input(path, session), 0, 0
    for images, labels in batches:
        with naming(path):
            scores = next(iter(run(session, {name: images}).values()))
        if np.isnan(scores).any():
            raise ModelError(f"{path}: its output holds NaN, which cannot be scored")
        if len(scores) != len(labels):
            raise ModelError(f"expected one label per sample, got labels of shape {np.shape(labels)} and {len(scores)} samples")
        correct += int(_top(scores, native(labels), 1).sum())
        total += len(labels)
    if not total:
        raise ModelError("expected at least one sample to score, got none")
    return Accuracy(correct=correct, total=total)


def evaluate(
    path: Path | str,
    data: Labelled,
    *,
    batch: int = 64,
    settings: Session | None = None,
    on_batch: Callable[[float], None] = lambda _: None,
) -> Evaluation:
    """Run a model on all samples, batch by batch, and score each sample.

    Args:
        path: the ONNX file.
        data: the samples, their labels and the metric.
        batch: the number of samples in each run.
        settings: the options of the session.
        on_batch: called after each batch with the share of the samples that are scored.

    Returns:
        One score per sample.

    Raises:
        ModelError: the data do not fit the model, an output is NaN or not a tensor, or the metric is unknown, fails, or gives
            other than one finite number per sample.

    """
    metric, labels = data.metric, data.labels
    metric_of(metric)  # raises, before anything runs, if it is unknown
    session = open_session(path, settings=settings)
    require_tensors(path, session)
    with naming(path):
        batches = load_batches(_with_labels(data), session, data.rules, batch=batch)
    count = sum(batches.samples)
    if not count or np.shape(labels)[:1] != (count,):
        raise ModelError(
            f"expected as many labels as samples, got labels of shape {np.shape(labels)} and {count} samples: check the array "
            "'labels' of the data"
        )
    scores: list[float] = []
    for feed, size in zip(batches.feeds, batches.samples, strict=True):
        with naming(path):
            outputs = run(session, feed)
        for name, output in outputs.items():
            if np.issubdtype(output.dtype, np.floating) and np.isnan(output).any():
                raise ModelError(f"{path}: output {name!r} holds NaN, which cannot be scored")
        scores += sample_scores(metric, outputs, labels[len(scores) : len(scores) + size]).tolist()
        on_batch(len(scores) / count)
    return Evaluation(model=Path(path).name, metric=metric, scores=tuple(scores))


def _with_labels(data: Labelled) -> Mapping[str, np.ndarray] | Sequence[Mapping[str, np.ndarray]]:
    """Return the inputs, each of several mappings with its own labels where they are known: their number is then checked."""
    if not data.counts or data.rules.states:
        return data.inputs
    own = np.split(data.labels, np.cumsum(data.counts)[:-1])
    return [{**part, LABELS: labels} for part, labels in zip(cast("Sequence[Feed]", data.inputs), own, strict=True)]


def sample_scores(metric: str, outputs: Mapping[str, np.ndarray], labels: np.ndarray) -> np.ndarray:
    """Score each sample of a batch.

    Args:
        metric: `top1`, `top5` or `module:function` (see `Metric`).
        outputs: the outputs of the batch by name; the metric gets copies, which it may change.
        labels: the labels of its samples, (N, …); likewise.

    Returns:
        The scores, of shape (N,) and type float64.

    Raises:
        ModelError: the metric is unknown, or the outputs or labels are of another form than `top1` and `top5` take.
        MetricError: the metric fails, or gives other than one finite number per sample.

    """
    scorer, size = metric_of(metric), len(labels)
    try:
        scores = np.asarray(scorer(deepcopy(dict(outputs)), deepcopy(labels)), np.float64)
    except TensorrailError:
        raise
    except OWN_CODE as error:
        raise MetricError(f"metric {metric}: failed on {size} samples {in_words(error)}") from error
    if scores.shape != (size,):
        raise MetricError(f"metric {metric}: expected one score for each of {size} samples, got shape {scores.shape}")
    if not np.isfinite(scores).all():
        found = "NaN" if np.isnan(scores).any() else "an infinite value"
        raise MetricError(f"metric {metric}: expected a finite number for each sample, got {found}")
    return scores


def wilson(successes: float, count: float) -> tuple[float, float]:
    """Return Wilson's 95 % interval of a share (Wilson 1927).

    Args:
        successes: the number of successes; a fraction where single trials may succeed in part.
        count: the number of trials.

    """
    share, squared = successes / count, _Z**2
    middle = (share + squared / (2 * count)) / (1 + squared / count)
    half = _Z * float(np.sqrt(share * (1 - share) / count + squared / (4 * count**2))) / (1 + squared / count)
    return max(0.0, middle - half), min(1.0, middle + half)


def compare_scores(reference: Evaluation, candidate: Evaluation) -> Comparison:
    """Compare two evaluations of the same samples, as pairs.

    Args:
        reference: the scores of the reference, for example the dense model.
        candidate: the scores of the other model.

    Returns:
        The difference of the mean scores with its 95 % interval, and the p-value of no difference.

    Raises:
        ModelError: the evaluations have different numbers of samples.

    """
    from scipy import stats  # imported here: half a second that every fresh process would pay

    a, b = np.array(reference.scores), np.array(candidate.scores)
    if a.shape != b.shape:
        raise ModelError(f"expected two evaluations of the same samples, got {len(a)} and {len(b)} samples")
    better, worse, count = int((b > a).sum()), int((a > b).sum()), len(a)
    if set(np.unique(np.concatenate([a, b]))) <= {0.0, 1.0}:
        test = "McNemar, exact"
        p = float(stats.binomtest(better, better + worse).pvalue) if better + worse else 1.0
        gained, lost, total = better + 0.5, worse + 0.5, count + 2
        centre = (gained - lost) / total
        half = _Z * float(np.sqrt((gained + lost) - (gained - lost) ** 2 / total)) / total
    else:
        test = "Wilcoxon signed-rank"
        p = float(stats.wilcoxon(b - a).pvalue) if (a != b).any() else 1.0
        centre = float((b - a).mean())
        half = _Z * float((b - a).std(ddof=1)) / float(np.sqrt(count)) if count > 1 else float("inf")
    return Comparison(
        reference=reference,
        candidate=candidate,
        only_reference=worse,
        only_candidate=better,
        difference=float(b.mean() - a.mean()),
        low=centre - half,
        high=centre + half,
        test=test,
        p_value=p,
    )


def within_drop(before: float, after: float, limit: float) -> bool:
    """Return whether a mean score is lower than another by a limit at most.

    A drop of just the limit is within it, whatever its floating-point rounding: 0.99 - 0.98 is greater than 0.01.

    Args:
        before: the mean score of the reference.
        after: the mean score of the other model.
        limit: the largest drop.

    """
    return after >= before - limit - _ROUNDING * max(abs(before), limit)


def metric_of(name: str) -> Metric:
    """Return the metric `top1`, `top5` or `module:function`; raises `ModelError` for an unknown one.

    `top1` and `top5` compare the first output, of shape (N, classes), with integer labels of shape (N,).
    """
    if name in ("top1", "top5"):
        return lambda outputs, labels: _top(next(iter(outputs.values())), labels, int(name[3:]))
    metric: Metric = imported(name, "metric", "top1, top5 or module:function")
    return metric


def _first_input(path: Path | str, session: ort.InferenceSession) -> str:
    entries = session.get_inputs()
    if not entries:
        raise ModelError(f"{path}: the model has no inputs, so it cannot be run on images")
    return str(entries[0].name)


def imported(name: str, what: str, expected: str = "module:function") -> Callable[..., Any]:
    """Import a function by name, also from the current folder.

    Args:
        name: `module:function`.
        what: what the function is, for error messages, such as "metric".
        expected: the names that are allowed, for error messages.

    Returns:
        The function.

    Raises:
        ModelError: the name has another form, or cannot be imported, or is not a function.

    """
    module, _, attribute = name.partition(":")
    if not module or not attribute:
        raise ModelError(f"unknown {what} {name!r}: expected {expected}")
    folder = str(Path.cwd())
    if folder not in sys.path:  # as `python -m` does
        sys.path.insert(0, folder)
    try:
        function: Callable[..., Any] = getattr(importlib.import_module(module), attribute)
    except (ImportError, AttributeError) as error:
        raise ModelError(f"{what} {name!r} cannot be imported ({' '.join(str(error).split())})") from None
    except OWN_CODE as error:  # of the code that the module runs
        raise ModelError(f"{what} {name!r} cannot be imported {in_words(error)}") from None
    if not callable(function):
        raise ModelError(f"{what} {name!r} is not a function")
    return function


def wrong_labels(labels: np.ndarray, classes: int) -> str:
    """Check that integer labels are classes of a model.

    Args:
        labels: the labels, of shape (N,).
        classes: the number of classes.

    Returns:
        An error message, or an empty text if the labels are valid.

    """
    if not len(labels) or 0 <= labels.min() <= labels.max() < classes:
        return ""
    return f"the model has {classes} classes: expected labels 0 to {classes - 1}, got {labels.min()} to {labels.max()}"


def _top(scores: np.ndarray, labels: np.ndarray, count: int) -> np.ndarray:
    labels = class_column(labels)
    if scores.ndim != 2 or scores.shape[1] < count or not np.issubdtype(labels.dtype, np.integer) or labels.ndim != 1:
        raise ModelError(
            f"top{count}: expected an output of shape (samples, {count} or more classes) and integer labels of shape "
            f"(samples,), got an output of shape {scores.shape} and labels of type {labels.dtype} and shape {labels.shape}"
        )
    if wrong := wrong_labels(labels, scores.shape[1]):
        raise ModelError(wrong)
    best = scores.argmax(1)[:, None] if count == 1 else np.argpartition(scores, -count, axis=1)[:, -count:]
    return np.asarray((best == labels[:, None]).any(1))
