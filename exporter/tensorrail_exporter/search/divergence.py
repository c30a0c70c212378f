"""How far the outputs of a changed network are from those of the dense one: one number that stands for lost accuracy.

Where the first output holds the scores of classes it is the Kullback–Leibler divergence of the classes' probabilities, in nats;
with labels, the increase of the cross-entropy. Scores may be logits, probabilities or their logarithms, or sigmoids, of which
each is a choice of two. For all other outputs it is the squared error as a share of their variance. A metric takes the place
of all of these: the divergence is then how far its mean score falls.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from scipy.special import log_softmax

from tensorrail_runtime.errors import GraphError, PlanError
from tensorrail_runtime.measure.accuracy import sample_scores, wrong_labels
from tensorrail_runtime.measure.agreement import Scores, scores_of
from tensorrail_runtime.measure.features import WHOLE, Features, features_of, variation

Outputs = list[list[np.ndarray]]  # by output, by batch

_TINY = 1e-12
_MANY = 256  # classes, of which those that hardly occur are taken together
_RARE = 1e-6  # probability of a class that hardly occurs
_SURE = 1e-6  # probabilities are taken as no nearer to 0 and 1
_BROKEN = 100.0  # far more than outputs of use differ by, and small enough for the losses beside it to be told apart
_TIE = 1e-3  # weight of the squared error beside cross-entropy and scores, which may be the same for different networks


class Divergence:
    """Compares outputs with those of the dense network on the same inputs.

    Args:
        names: names of the outputs.
        dense: the values of every output of the dense network, one array per batch.
        labels: class indices (N,) of all samples, or None; with a metric, whatever it takes, (N, …). Without a metric they
            are left out unless the first output has the shape (N, classes), with a row for each sample.
        metric: a score of each sample: `top1`, `top5` or `module:function`; default: none.
        samples: the number of samples in each batch, for the metric and the labels; default: the lengths of the first output.

    Attributes:
        dense: the outputs of the dense network.
        scores: what kind of scores of classes the first output holds; None if it holds something else.
        labels: the classes by which the cross-entropy is computed; None if there is a metric, or they do not apply.
        left_out: why labels that were given are not used; empty if they are, or there are none.

    Raises:
        GraphError: no output is numeric, or the labels do not fit the first output.
        PlanError: there is a metric without labels.
        ModelError: the metric is unknown, fails, or gives other than one finite number per sample.

    """

    def __init__(
        self,
        names: Sequence[str],
        dense: Outputs,
        labels: np.ndarray | None = None,
        metric: str | None = None,
        samples: Sequence[int] | None = None,
    ) -> None:
        self.dense = dense
        self.compared = [k for k, parts in enumerate(dense) if all(part.dtype.kind in "fiub" for part in parts)]
        if not self.compared:
            raise GraphError(f"the model's outputs, {', '.join(names)}, are not numeric: losses cannot be measured")
        self.mean_score = None
        if metric is not None:
            samples = [len(part) for part in dense[0]] if samples is None else samples
            self.mean_score = _MeanScore(metric, tuple(names), require_labels(metric, labels, sum(samples)), tuple(samples))
            self.dense_score = self.mean_score.of(dense)
            labels = None  # they need not be classes
        rows = [len(part) if part.ndim else 0 for part in dense[0]]
        a_row_each = dense[0][0].ndim == 2 and rows == (rows if samples is None else list(samples))
        if a_row_each:
            require_classes(labels, dense[0][0])
        self.labels = labels if a_row_each else None
        self.scores = scores_of(dense[0])
        self.left_out = ""
        if labels is not None and self.labels is None:
            count = rows[0] if samples is None else samples[0]
            self.left_out = (
                f"the labels of the calibration inputs are not used: expected scores (samples, classes) in output "
                f"{names[0]!r}, got shape {list(dense[0][0].shape)} for {count} samples; give a metric that takes these labels"
            )
        self._features: dict[int, Features] = {}  # by output
        self._rows: list[_Rows] | None = None  # of each batch; they are compared with many networks

    @property
    def unit(self) -> str:
        """What the divergence is, in words."""
        if self.mean_score is not None:
            return f"fall of the score {self.mean_score.metric}"
        if self.labels is not None:
            return "increase of the cross-entropy (nats)"
        return "KL divergence (nats)" if self.scores else "lost share of the outputs' variance"

    @property
    def uses_labels(self) -> bool:
        """Whether it depends on labels: by a metric, or by the cross-entropy."""
        return self.mean_score is not None or self.labels is not None

    def of(self, changed: Outputs) -> float:
        """Return the divergence of changed outputs: 0 if they are equal, 100 if NaN or infinity in them makes it unknown."""
        divergence = self._of(changed)
        return divergence if math.isfinite(divergence) else _BROKEN

    def _of(self, changed: Outputs) -> float:
        if self.mean_score is not None:
            return max(self.dense_score - self.mean_score.of(changed), 0.0) + _TIE * self._relative(changed)
        if self.labels is not None:
            before, after = (_log_likelihoods(out[0], self.scores, self.labels) for out in (self.dense, changed))
            return max(float(before.mean() - after.mean()), 0.0) + _TIE * self._relative(changed)
        if self.scores is None or any(a.shape != b.shape for a, b in zip(self.dense[0], changed[0], strict=True)):
            return self._relative(changed)
        if self.scores == "sigmoids":  # each class is a choice of two
            return _binary(self.dense[0], changed[0])
        if not all(np.isfinite(part).all() for part in changed[0]):
            return self._relative(changed)
        if self._rows is None:
            self._rows = [_Rows.of(part, self.scores) for part in self.dense[0]]
        sums = [rows.divergences(part, self.scores) for rows, part in zip(self._rows, changed[0], strict=False)]
        return max(float(np.concatenate(sums).mean()), 0.0)

    def of_first(self, changed: Outputs) -> float:
        """Return the divergence of outputs of the first batches alone; there must be neither labels nor a metric."""
        part = copy.copy(self)
        part.dense = [before[: len(after)] for before, after in zip(self.dense, changed, strict=True)]
        return part.of(changed)

    def _relative(self, changed: Outputs) -> float:
        """Return the mean over outputs of the share of their variance that is lost; 1 for an output whose shape has changed.

        Probabilities and other quantities of an output count alike, see `features`.
        """
        shares = []
        for k in self.compared:
            if any(a.shape != b.shape for a, b in zip(self.dense[k], changed[k], strict=True)):
                shares.append(1.0)
                continue
            before, after = ([np.asarray(part, np.float64) for part in parts] for parts in (self.dense[k], changed[k]))
            features = self._features_of(k)
            lost = np.sum([features.sums(np.square(a - b)) for a, b in zip(before, after, strict=True)], 0)
            shares.append(float(features.weights(variation(before, features), _TINY) @ lost))
        return float(np.mean(shares))

    def _features_of(self, output: int) -> Features:
        if output not in self._features:
            parts = self.dense[output]
            self._features[output] = WHOLE if scores_of(parts) is not None else features_of(parts)
        return self._features[output]


@dataclass(frozen=True)
class _Rows:
    """The probabilities of classes in rows of scores. Of many classes, those that hardly occur count as one."""

    places: np.ndarray  # of the classes that occur, in the flattened rows
    owners: np.ndarray  # the row of each place
    logs: np.ndarray  # of their probabilities
    probabilities: np.ndarray
    rest: np.ndarray  # probability of all others together, by row

    @classmethod
    def of(cls, scores: np.ndarray, kind: str) -> _Rows:
        """Return the rows of scores (…, classes) of a kind that `scores_of` returns."""
        logs = _log_probabilities([scores], kind)
        probabilities = np.exp(logs)
        taken = probabilities > (_RARE if logs.shape[1] > _MANY else 0.0)
        places = np.flatnonzero(taken)
        rest = np.where(taken, 0.0, probabilities).sum(1)
        return cls(places, places // logs.shape[1], logs.ravel()[places], probabilities.ravel()[places], rest)

    def divergences(self, scores: np.ndarray, kind: str) -> np.ndarray:
        """Return the Kullback–Leibler divergence of other scores from these, by row."""
        count = len(self.rest)
        if kind == "probabilities":  # without the logarithms of all classes
            found = scores.reshape(-1)[self.places].astype(np.float64)
            logs = np.log(np.maximum(found, _TINY))
            total = scores.reshape(count, -1).sum(1, dtype=np.float64)
        else:
            logs = _log_probabilities([scores], kind).reshape(-1)[self.places]
            found, total = np.exp(logs), np.ones(count)
        sums = np.bincount(self.owners, self.probabilities * (self.logs - logs), count)
        others = np.maximum(total - np.bincount(self.owners, found, count), _TINY)
        return np.asarray(sums + self.rest * (np.log(np.maximum(self.rest, _TINY)) - np.log(others)))


@dataclass(frozen=True)
class _MeanScore:
    """A metric of outputs, with the labels of all samples and the number of samples in each batch."""

    metric: str
    names: tuple[str, ...]
    labels: np.ndarray
    samples: tuple[int, ...]

    def of(self, outputs: Outputs) -> float:
        """Return the mean score of all samples."""
        scores, start = [], 0
        for batch, size in enumerate(self.samples):
            values = {name: parts[batch] for name, parts in zip(self.names, outputs, strict=True)}
            scores.append(sample_scores(self.metric, values, self.labels[start : start + size]))
            start += size
        return float(np.concatenate(scores).mean())


def require_labels(metric: str, labels: np.ndarray | None, count: int) -> np.ndarray:
    """Return the labels that a metric scores samples by.

    Args:
        metric: the metric, for error messages.
        labels: one label per sample, or None.
        count: the number of samples.

    Raises:
        PlanError: there are no labels, or not as many as samples.

    """
    if labels is None:
        raise PlanError(
            f"metric {metric} scores outputs by labels, got calibration inputs without labels: give an npz file, or a folder "
            "of such files, with an array `labels` beside the inputs"
        )
    if np.shape(labels)[:1] != (count,):
        raise PlanError(f"metric {metric}: expected one label per sample, got {count} samples and shape {np.shape(labels)}")
    return labels


def require_classes(labels: np.ndarray | None, scores: np.ndarray) -> None:
    """Raise `GraphError` if there are labels that are not classes of the scores (N, classes)."""
    if labels is None or scores.ndim != 2:
        return
    if labels.ndim != 1 or not np.issubdtype(labels.dtype, np.integer):
        raise GraphError(f"expected integer labels, one per sample, got {labels.dtype} of shape {list(labels.shape)}")
    if wrong := wrong_labels(labels, scores.shape[1]):
        raise GraphError(wrong)


def _binary(dense: Sequence[np.ndarray], changed: Sequence[np.ndarray]) -> float:
    """Return the mean over samples of the sum over classes of the divergence between two probabilities of yes and no."""
    p, q = _chances(dense), _chances(changed)
    return max(float((p * np.log(p / q) + (1 - p) * np.log((1 - p) / (1 - q))).sum(-1).mean()), 0.0)


def _chances(parts: Sequence[np.ndarray]) -> np.ndarray:
    """Return sigmoids (N, classes) of all batches, none of them 0 or 1."""
    return np.clip(np.concatenate(parts).astype(np.float64), _SURE, 1 - _SURE)


def _log_likelihoods(parts: Sequence[np.ndarray], kind: Scores | None, labels: np.ndarray) -> np.ndarray:
    """Return the logarithm of the probability of each sample's label, (N,).

    Of sigmoids it is the probability of yes for the label and of no for all other classes. Other values count as logits.
    """
    if kind == "sigmoids":
        chances = _chances(parts)
        labelled = labels[:, None] == np.arange(chances.shape[1])
        return np.asarray(np.log(np.where(labelled, chances, 1 - chances)).sum(1))
    return np.asarray(_log_probabilities(parts, kind or "logits")[np.arange(len(labels)), labels])


def _log_probabilities(parts: Sequence[np.ndarray], kind: str) -> np.ndarray:
    values = np.concatenate([part.reshape(-1, part.shape[-1]) for part in parts]).astype(np.float64)
    if kind == "probabilities":
        return np.asarray(np.log(np.maximum(values, _TINY)))
    return values if kind == "log-probabilities" else np.asarray(log_softmax(values, -1))
