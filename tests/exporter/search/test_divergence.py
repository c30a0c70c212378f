"""How far outputs are from the dense ones."""

import numpy as np
import pytest
from scipy.special import softmax
from scipy.stats import entropy

from tensorrail_exporter import GraphError
from tensorrail_exporter.search.divergence import Divergence


def normal(*shape, seed=0):
    return np.random.default_rng(seed).standard_normal(shape).astype(np.float32)


def in_batches(*outputs):
    return [[output[:7], output[7:]] for output in outputs]


@pytest.mark.parametrize("kind", ["logits", "probabilities", "log-probabilities"])
def test_scores_are_compared_by_the_divergence_of_their_classes(kind):
    a, b = normal(20, 5), normal(20, 5, seed=1)
    show = {
        "logits": lambda x: x,
        "probabilities": lambda x: softmax(x, 1),
        "log-probabilities": lambda x: np.log(softmax(x, 1)),
    }
    divergence = Divergence(["y"], in_batches(show[kind](a)))
    expected = np.mean([entropy(p, q) for p, q in zip(softmax(a, 1), softmax(b, 1), strict=True)])
    assert divergence.of(in_batches(show[kind](b))) == pytest.approx(expected, rel=1e-4)
    assert divergence.of(in_batches(show[kind](a))) == pytest.approx(0, abs=1e-9)
    assert divergence.unit == "KL divergence (nats)"


def test_independent_classes_are_compared_one_by_one():
    p, q = (1 / (1 + np.exp(-normal(20, 5, seed=seed))) for seed in (0, 1))
    pairs = [entropy([a, 1 - a], [b, 1 - b]) for a, b in zip(p.ravel(), q.ravel(), strict=True)]
    assert Divergence(["y"], in_batches(p)).of(in_batches(q)) == pytest.approx(np.sum(pairs) / 20, rel=1e-4)


def test_other_outputs_are_compared_by_the_share_of_their_variance():
    a, b = normal(20, 3, 4) + 5, normal(20, 3, 4, seed=1)
    divergence = Divergence(["y", "z"], in_batches(a, 2 * a))
    lost = np.square(b).sum() / np.square(a - a.mean(0)).sum()
    assert divergence.of(in_batches(a + b, 2 * a)) == pytest.approx(lost / 2, rel=1e-4)
    assert divergence.unit == "lost share of the outputs' variance"


def test_labels_come_before_the_dense_scores():
    scores, labels = normal(20, 5), np.arange(20) % 5
    divergence = Divergence(["y"], in_batches(scores), labels)
    assert divergence.unit == "increase of the cross-entropy (nats)"
    better = scores + 5 * np.eye(5, dtype=np.float32)[labels]
    worse = scores - 5 * np.eye(5, dtype=np.float32)[labels]
    assert divergence.of(in_batches(worse)) > 1
    assert divergence.of(in_batches(better)) < 0.01 * divergence.of(in_batches(worse))


def test_labels_that_are_no_classes_are_refused():
    with pytest.raises(GraphError, match="classes"):
        Divergence(["y"], in_batches(normal(20, 5)), np.full(20, 7))


def test_outputs_without_numbers_are_refused():
    with pytest.raises(GraphError, match="are not numeric"):
        Divergence(["y"], [[np.array(["a", "b"])]])
