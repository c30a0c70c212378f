"""How far a model agrees with a reference on inputs that nothing was fitted to, with what a few inputs leave uncertain."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Literal

import numpy as np
from scipy.stats import norm, t

from tensorrail_runtime.feeds.batches import samples_of
from tensorrail_runtime.feeds.rules import Axes
from tensorrail_runtime.measure.accuracy import wilson
from tensorrail_runtime.measure.features import WHOLE, Features, features_of, variation
from tensorrail_runtime.measure.parity import Both, run_both
from tensorrail_runtime.records import Record
from tensorrail_runtime.sessions.session import Session

Scores = Literal["probabilities", "log-probabilities", "sigmoids", "logits"]

_TINY = 1e-30
_CONSTANT = 1e-3  # the standard deviation of values counts as at least so much of their root mean square
_DRAWS = 2000  # resamplings behind the interval of the difference
_AT_ONCE = 4_000_000  # indices that are drawn at once
_TOLERANCE = 1e-3  # of a sum of probabilities, or of a norm of 1
_SATURATED = 0.1  # share of sigmoids that may be exactly 0 or 1: ONNX Runtime rounds them to 0 below about −18


class Agreement(Record):
    """How far a model agrees with the dense one on inputs that it was not fitted to.

    `agreement` is the share of samples whose best class, by the first output, is the same, with Wilson's 95 % interval (Wilson
    1927); None if the first output does not hold scores of classes. Where a sample has several rows of scores, such as steps of
    a sequence, it is the mean of their shares, whose interval follows from how much samples differ. `difference` is the root
    mean square of b − a, as a multiple of the standard deviation of a over the samples: what outputs of all samples have in
    common, such as the mean place of a landmark, hides no error. Several outputs count alike, as do probabilities and other
    quantities in one output (see `features`). Its 95 % interval is from resampling the inputs.

    Both intervals take samples as independent. Where samples are the steps of sequences, each with the state that the step
    before it left, they are not, and the intervals are too narrow.
    """

    samples: int
    agreement: float | None
    agreement_low: float | None
    agreement_high: float | None
    difference: float
    difference_low: float
    difference_high: float

    def described(self) -> str:
        """Return one line for people."""
        count = f"{self.samples} held-out inputs" if self.samples != 1 else "1 held-out input"
        return f"on {count}: {self.words()}"

    def words(self) -> str:
        """Return what was measured, without saying on which inputs."""
        words = []
        if self.agreement is not None:
            interval = f"[{100 * (self.agreement_low or 0.0):.1f}, {100 * (self.agreement_high or 0.0):.1f}]"
            words.append(f"top-1 agreement with the dense model is {100 * self.agreement:.1f} % {interval}")
        words.append(
            f"outputs differ by {self.difference:.2e} [{self.difference_low:.2e}, {self.difference_high:.2e}] of their "
            "standard deviation"
        )
        return "; ".join(words)


def scores_of(parts: Sequence[np.ndarray]) -> Scores | None:
    """Return what kind of scores of classes an output holds along its last axis; None if it holds something else.

    Args:
        parts: the values of the output, one array per batch.

    """
    if any(part.dtype.kind != "f" or part.ndim < 2 or part.shape[-1] < 2 or not part.size for part in parts):
        return None
    if len({part.shape[-1] for part in parts}) > 1:
        return None  # the last axis is not that of classes, such as time in feeds of different lengths
    values = np.concatenate([part.reshape(-1, part.shape[-1]) for part in parts]).astype(np.float64)
    if values.min() >= 0 and np.abs(values.sum(-1) - 1).max() < _TOLERANCE:
        return "probabilities"
    if values.max() <= _TOLERANCE and np.abs(np.exp(values).sum(-1) - 1).max() < _TOLERANCE:
        return "log-probabilities"
    if parts[0].ndim != 2 or np.abs(np.linalg.norm(values, axis=-1) - 1).max() < _TOLERANCE:
        return None  # an embedding, or values that belong together
    if values.min() >= 0 and values.max() <= 1 and np.mean((values == 0) | (values == 1)) <= _SATURATED:
        return "sigmoids"
    return "logits" if values.min() < 0 else None


def agreement(
    reference: Path | str,
    candidate: Path | str,
    feeds: Sequence[Mapping[str, np.ndarray]],
    settings: Session | None = None,
    axes: Axes | None = None,
) -> Agreement:
    """Run two models on the same inputs and compare their outputs.

    Args:
        reference: the file of the dense model.
        candidate: the file of the other model, with the same inputs and outputs.
        feeds: batches of inputs by name, which nothing was fitted to.
        settings: how the models run; default `Session()`.
        axes: the batch axis of each input by name, by which samples are counted; default: the first axes.

    Returns:
        The share of samples with the same best class and the difference of the outputs, with 95 % intervals.

    Raises:
        ModelError: a model does not run on these inputs, there are none, or the outputs differ in name.

    """
    return agreement_of(run_both(reference, candidate, inputs=feeds, settings=settings), axes)


def agreement_of(both: Both, axes: Axes | None = None) -> Agreement:
    """Compare the outputs of two models that ran on inputs which nothing was fitted to; `axes` as for `agreement`."""
    names = list(both.runs[0][0])
    dense, other = ([[batch[name] for name in names] for batch in batches] for batches in both.runs)
    return compared(dense, other, [samples_of(feed, axes) for feed in both.feeds])


def compared(
    reference: Sequence[Sequence[np.ndarray]], candidate: Sequence[Sequence[np.ndarray]], samples: Sequence[int]
) -> Agreement:
    """Compare the outputs of two models.

    Args:
        reference: the outputs of the dense model, batch by batch.
        candidate: those of the other model.
        samples: the number of samples in each batch.

    """
    same = _same_classes(reference, candidate, samples)
    value, low, high = (None, None, None) if same is None else (float(same[0].mean()), *_interval(*same))
    difference = _differences(reference, candidate, samples)
    return Agreement(
        samples=sum(samples),
        agreement=value,
        agreement_low=low,
        agreement_high=high,
        difference=difference[0],
        difference_low=difference[1],
        difference_high=difference[2],
    )


def _interval(shares: np.ndarray, rows: int) -> tuple[float, float]:
    """Return Wilson's interval of the mean of shares, for as many trials as would vary as much as these samples do.

    Args:
        shares: the share of each sample's rows with the same best class.
        rows: the rows of a sample; for more than one, the variance is estimated, and the interval wider for few samples.

    """
    mean, count = float(shares.mean()), float(len(shares))
    binary = mean * (1 - mean) / count  # variance of the mean of as many trials
    if rows > 1 and count > 1 and binary > 0:
        varies = float(shares.var(ddof=1)) / count
        effective = min(count * binary / max(varies, 1e-30), count * rows)
        count = max(count, effective * (norm.ppf(0.975) / t.ppf(0.975, count - 1)) ** 2)
    return wilson(mean * count, count)


def _same_classes(
    reference: Sequence[Sequence[np.ndarray]], candidate: Sequence[Sequence[np.ndarray]], samples: Sequence[int]
) -> tuple[np.ndarray, int] | None:
    """Return the share of each sample's rows of scores with the same best class, and the fewest rows; None without scores."""
    if scores_of([batch[0] for batch in reference]) is None:
        return None
    shares, rows = [], []
    for before, after, count in zip(reference, candidate, samples, strict=True):
        if before[0].shape != after[0].shape or before[0].shape[0] != count:
            return None
        same = (before[0].argmax(-1) == after[0].argmax(-1)).reshape(count, -1)
        shares.append(same.mean(1))
        rows.append(same.shape[1])
    return np.concatenate(shares), min(rows)


def _differences(
    reference: Sequence[Sequence[np.ndarray]], candidate: Sequence[Sequence[np.ndarray]], samples: Sequence[int]
) -> tuple[float, float, float]:
    """Return the difference of all outputs together, as a multiple of their standard deviation, and its interval."""
    shares = []
    for k, first in enumerate(reference[0]):
        if not _numeric(first):
            continue
        befores = [batch[k] for batch in reference]
        features = WHOLE if scores_of(befores) is not None else features_of(befores)
        squares, errors = np.zeros(len(features.groups)), []
        for before, batch, count in zip(befores, candidate, samples, strict=True):
            a, b = np.asarray(before, np.float64), np.asarray(batch[k], np.float64)
            squares += features.sums(np.square(a))
            # An output with another shape is wrong by as much as all of its values.
            errors.append(_per_sample(np.square(a - b) if a.shape == b.shape else np.square(a), count, features))
        varied = variation(befores, features)
        sizes = np.maximum(varied, _CONSTANT**2 * squares)
        shares.append(features.weights(sizes, _TINY) @ np.concatenate(errors, 1))
    if not shares:
        return math.nan, math.nan, math.nan
    shares_of_samples = np.mean(shares, 0)  # what each sample adds to the mean over outputs of the squared difference
    value = math.sqrt(shares_of_samples.sum())
    count = len(shares_of_samples)
    if count < 2:
        return value, 0.0, math.inf
    rng = np.random.default_rng(0)
    parts = np.array_split(np.arange(_DRAWS), max(1, _DRAWS * count // _AT_ONCE))  # or many samples would fill the memory
    sums = [shares_of_samples[rng.integers(0, count, (len(part), count))].sum(1) for part in parts]
    resampled = np.sqrt(np.concatenate(sums))
    low, high = np.quantile(resampled, [0.025, 0.975])
    return value, float(min(low, value)), float(max(high, value))


def _per_sample(square: np.ndarray, count: int, features: Features) -> np.ndarray:
    """Return the sum of squares of each group of features for each sample of a batch, (groups, samples).

    A batch without a row per sample is shared out over its samples.
    """
    if square.ndim and square.shape[0] == count:
        return np.stack([features.sums(row[None]) for row in square], 1)
    return np.repeat(features.sums(square)[:, None] / count, count, 1)


def _numeric(array: object) -> bool:
    return isinstance(array, np.ndarray) and array.dtype.kind in "fiub"
