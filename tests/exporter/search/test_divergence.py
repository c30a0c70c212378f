"""How far outputs are from the dense ones."""

import numpy as np
import pytest
from scipy.special import softmax
from scipy.stats import entropy

from tensorrail_exporter import GraphError, PlanError
from tensorrail_exporter.search.divergence import Divergence
from tensorrail_runtime.errors import ModelError

SHOW = {
    "logits": lambda x: x,
    "probabilities": lambda x: softmax(x, 1),
    "log-probabilities": lambda x: np.log(softmax(x, 1)),
}


def normal(*shape, seed=0):
    return np.random.default_rng(seed).standard_normal(shape).astype(np.float32)


def in_batches(*outputs):
    return [[output[:7], output[7:]] for output in outputs]


@pytest.mark.parametrize("kind", SHOW)
def test_scores_are_compared_by_the_divergence_of_their_classes(kind):
    a, b = normal(20, 5), normal(20, 5, seed=1)
    divergence = Divergence(["y"], in_batches(SHOW[kind](a)))
    expected = np.mean([entropy(p, q) for p, q in zip(softmax(a, 1), softmax(b, 1), strict=True)])
    assert divergence.of(in_batches(SHOW[kind](b))) == pytest.approx(expected, rel=1e-4)
    assert divergence.of(in_batches(SHOW[kind](a))) == pytest.approx(0, abs=1e-9)
    assert divergence.unit == "KL divergence (nats)"


@pytest.mark.parametrize("kind", ["logits", "probabilities"])
@pytest.mark.parametrize("moved", [0.01, 1.0])
def test_of_many_classes_the_rare_ones_count_as_one(kind, moved):
    """Scores of 3,000 classes, of which a few are likely: nearly the whole divergence is that of these, and never more."""
    a = 4 * normal(20, 3000).astype(np.float64)
    b = a + moved * normal(20, 3000, seed=1)
    b[0] = -a[0]  # what was likely becomes rare, and the other way round
    shown = [(values if kind == "logits" else softmax(values, 1)).astype(np.float32) for values in (a, b)]
    divergence = Divergence(["y"], in_batches(shown[0]))
    expected = np.mean([entropy(p, q) for p, q in zip(softmax(a, 1), softmax(b, 1), strict=True)])
    got = divergence.of(in_batches(shown[1]))
    assert 0.9 * expected < got < expected * (1 + 1e-3)
    assert divergence.of(in_batches(shown[0])) == pytest.approx(0, abs=1e-7)
    assert divergence.of_first([[shown[1][:7]]]) > 0


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


SQUARES = 0.02  # what the squared error adds to a loss by labels, at most, in the tests below


@pytest.mark.parametrize("kind", SHOW)
def test_the_loss_by_labels_is_the_cross_entropy_of_any_scores(kind):
    """Of ten classes the right one falls from 0.9 to 0.1 and the others are alike: ln 9 nats."""
    labels = np.arange(20) % 10
    right = np.eye(10, dtype=bool)[labels]
    before, after = (np.log(np.where(right, share, (1 - share) / 9)) + 3 for share in (0.9, 0.1))
    divergence = Divergence(["y"], in_batches(SHOW[kind](before)), labels)
    assert divergence.scores == kind
    assert divergence.unit == "increase of the cross-entropy (nats)"
    assert divergence.of(in_batches(SHOW[kind](after))) == pytest.approx(np.log(9), abs=SQUARES)
    assert divergence.of(in_batches(SHOW[kind](before))) == 0


def test_the_loss_by_labels_of_independent_classes_is_their_cross_entropy():
    labels = np.arange(20) % 5
    right = np.eye(5, dtype=bool)[labels]
    before, after = (np.where(right, share, 1 - share) for share in (0.9, 0.6))
    divergence = Divergence(["y"], in_batches(before), labels)
    assert divergence.scores == "sigmoids"
    assert divergence.of(in_batches(after)) == pytest.approx(5 * np.log(0.9 / 0.6), abs=SQUARES)


@pytest.mark.parametrize("shape", [(20, 4, 5), (20,)])
def test_labels_of_classes_do_not_apply_to_other_outputs(shape):
    """Neither to the scores of each step of a sequence, nor to one number per sample."""
    a, b, labels = normal(*shape), normal(*shape, seed=1), np.arange(20) % 5
    with_labels, without = Divergence(["y"], in_batches(a), labels), Divergence(["y"], in_batches(a))
    (part, *_), *_ = in_batches(a)
    assert (with_labels.uses_labels, with_labels.unit) == (False, without.unit)
    assert with_labels.of(in_batches(b)) == without.of(in_batches(b)) > 0
    assert with_labels.left_out == (
        "the labels of the calibration inputs are not used: expected scores (samples, classes) in output 'y', got shape "
        f"{[len(part), *shape[1:]]} for {len(part)} samples; give a metric that takes these labels"
    )
    assert without.left_out == Divergence(["y"], in_batches(normal(20, 5)), labels).left_out == ""


@pytest.mark.parametrize("rows", [60, 10])
def test_labels_of_samples_do_not_apply_to_other_rows(rows):
    """Scores of each step of a sequence in one axis, and fewer rows than labels."""
    a, b, labels = normal(rows, 5), normal(rows, 5, seed=1), np.arange(20) % 5
    with_labels = Divergence(["y"], in_batches(a), labels, samples=[10, 10])
    assert not with_labels.uses_labels
    assert with_labels.of(in_batches(b)) == Divergence(["y"], in_batches(a)).of(in_batches(b)) > 0
    assert "expected scores (samples, classes) in output 'y', got shape" in with_labels.left_out


@pytest.mark.filterwarnings("ignore:invalid value:RuntimeWarning")
@pytest.mark.parametrize("value", [np.nan, np.inf])
def test_outputs_that_are_not_finite_have_a_large_loss(value):
    a, b = normal(20, 5), normal(20, 5)
    b[3, 2] = value
    for labels in (None, np.arange(20) % 5):
        assert Divergence(["y"], in_batches(a), labels).of(in_batches(b)) == 100


def test_a_first_output_without_axes_is_compared():
    outputs = [[np.float32(1.0), np.float32(2.0)], *in_batches(normal(20, 5))]
    changed = [[np.float32(1.5), np.float32(2.0)], *in_batches(normal(20, 5))]
    assert Divergence(["loss", "y"], outputs).of(changed) > 0


def test_labels_that_are_no_classes_are_refused():
    with pytest.raises(GraphError, match="classes"):
        Divergence(["y"], in_batches(normal(20, 5)), np.full(20, 7))


def test_outputs_without_numbers_are_refused():
    with pytest.raises(GraphError, match="are not numeric"):
        Divergence(["y"], [[np.array(["a", "b"])]])


@pytest.fixture
def metrics(tmp_path, monkeypatch):
    """Write metrics of a user to the current folder."""
    (tmp_path / "scores_of_mine.py").write_text(
        "def nearness(outputs, labels):\n"
        "    return -abs(outputs['y'][..., 0] - labels[:, 1]).reshape(len(labels), -1).sum(1)\n\n\n"
        "def one(outputs, labels):\n    return 1.0\n\n\n"
        "def careless(outputs, labels):\n"
        "    outputs['y'] -= labels[:, :1]\n    labels[:] = 0\n    return -abs(outputs['y']).sum(1)\n"
    )
    monkeypatch.chdir(tmp_path)
    return "scores_of_mine"


def test_a_metric_takes_labels_of_any_shape_and_its_fall_is_the_divergence(metrics):
    outputs, labels = normal(20, 5), normal(20, 2, seed=1)
    outputs[:, 0] = labels[:, 1]  # right in all samples
    divergence = Divergence(["y"], in_batches(outputs), labels, f"{metrics}:nearness")
    assert divergence.unit == "fall of the score scores_of_mine:nearness"
    worse, same = outputs.copy(), outputs.copy()
    worse[3, 0] += 8.0  # of one in 20 samples
    same[:, 1:] += 0.1
    assert divergence.of(in_batches(outputs)) == 0
    assert divergence.of(in_batches(worse)) == pytest.approx(8 / 20, abs=2e-3)
    assert 0 < divergence.of(in_batches(same)) < 1e-3  # the same score, and still not the same network


def test_a_higher_score_than_the_dense_one_is_no_loss():
    scores, labels = normal(20, 5), np.arange(20) % 5
    divergence = Divergence(["y"], in_batches(scores), labels, "top1")
    right = 3 * np.eye(5, dtype=np.float32)[labels]
    missed = np.mean(scores.argmax(1) != labels)
    assert divergence.of(in_batches(right)) < 0.01 < missed
    best = Divergence(["y"], in_batches(right), labels, "top1")
    assert best.of(in_batches(scores)) == pytest.approx(missed, abs=0.01)


def test_samples_along_another_axis_are_counted_as_the_inputs_have_them(metrics):
    """Five steps of 20 sequences: the batch is the second axis of the output."""
    outputs, labels = normal(5, 20, 3), normal(20, 2, seed=1)
    parts = [[outputs[:, :7], outputs[:, 7:]]]
    with pytest.raises(PlanError, match="expected one label per sample, got 10 samples"):
        Divergence(["y"], parts, labels, f"{metrics}:nearness")
    wrong = r"one score for each of 7 samples, got shape \(\)"
    with pytest.raises(ModelError, match=wrong):
        Divergence(["y"], parts, labels, f"{metrics}:one", [7, 13])
    assert Divergence(["y"], parts, labels, f"{metrics}:nearness", [7, 13]).of(parts) == 0


def test_a_metric_that_changes_its_arguments_changes_nothing_else(metrics):
    outputs, labels = normal(20, 5), normal(20, 2, seed=1)
    before = outputs.copy(), labels.copy()
    divergence = Divergence(["y"], in_batches(outputs), labels, f"{metrics}:careless")
    assert [divergence.of(in_batches(outputs)) for _ in range(2)] == [0, 0]
    np.testing.assert_array_equal(outputs, before[0])
    np.testing.assert_array_equal(labels, before[1])


def test_a_metric_needs_labels():
    with pytest.raises(PlanError, match="metric top1 scores outputs by labels, got calibration inputs without labels"):
        Divergence(["y"], in_batches(normal(20, 5)), None, "top1")


def test_what_a_detector_finds_counts_beside_where_it_is(rng):
    boxes, scores = rng.uniform(20, 300, (6, 4, 50)), np.zeros((6, 2, 50))
    scores[:, :, :4] = rng.uniform(0.5, 0.9, (6, 2, 4))
    before = np.concatenate([boxes, scores], 1)
    moved, lost = before.copy(), before.copy()
    moved[:, :4] += 1.0
    lost[:, 4:] *= 0.5
    divergence = Divergence(["y"], [[before]])
    assert divergence.of([[lost]]) > 100 * divergence.of([[moved]])
