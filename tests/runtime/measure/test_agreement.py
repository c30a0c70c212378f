"""Agreement with the dense model on held-out inputs, with its intervals."""

import numpy as np
import onnx
import pytest
from conftest import make_model
from onnx import helper

from tensorrail_runtime.errors import ModelError
from tensorrail_runtime.measure.agreement import agreement, compared, scores_of


def softmax(values):
    exponentials = np.exp(values - values.max(-1, keepdims=True))
    return exponentials / exponentials.sum(-1, keepdims=True)


def normal(*shape, seed=0):
    return np.random.default_rng(seed).standard_normal(shape).astype(np.float32)


@pytest.mark.parametrize(
    ("values", "kind"),
    [
        (normal(8, 5), "logits"),
        (softmax(normal(8, 5)), "probabilities"),
        (softmax(normal(8, 3, 5)), "probabilities"),  # such as one letter per column of an image
        (np.log(softmax(normal(8, 5))), "log-probabilities"),
        (1 / (1 + np.exp(-normal(8, 5))), "sigmoids"),
        (np.where(np.arange(40) == 7, 0, 1 / (1 + np.exp(-normal(1, 40)))).repeat(2, 0), "sigmoids"),  # one is rounded to 0
        (np.clip(normal(8, 5), 0, 1), None),  # features from 0 to 1
        (normal(8, 5) / np.linalg.norm(normal(8, 5), axis=1, keepdims=True), None),  # embeddings
        (np.maximum(normal(8, 5), 0) * 3, None),  # features
        (normal(8, 3, 5), None),
        (normal(8, 1), None),
        (np.arange(8)[:, None], None),
    ],
    ids=str,
)
def test_what_outputs_hold(values, kind):
    assert scores_of([values]) == kind


def test_the_share_and_its_interval():
    """Wilson's interval for 9 of 10, by the formula in closed form: [0.596, 0.982]."""
    scores = np.eye(10, dtype=np.float32)[:, :5] - 0.5
    scores[5:, 0] = 1.0
    changed = scores.copy()
    changed[0] = [-0.5, 0.5, -0.5, -0.5, -0.5]
    result = compared([[scores]], [[changed]], [10])
    assert result.samples == 10
    assert result.agreement == pytest.approx(0.9)
    assert (result.agreement_low, result.agreement_high) == pytest.approx((0.5958, 0.9821), abs=1e-3)
    assert "90.0 % [59.6, 98.2]" in result.described()


def test_the_interval_holds_the_truth_in_about_95_of_100_cases():
    rng, held = np.random.default_rng(0), 0
    for _ in range(300):
        scores = rng.standard_normal((50, 4))
        changed = scores.copy()
        wrong = rng.random(50) < 0.2
        changed[wrong] = np.roll(scores[wrong], 1, axis=1)
        result = compared([[scores]], [[changed]], [50])
        held += result.agreement_low <= 0.8 <= result.agreement_high
    assert 0.91 <= held / 300 <= 0.99


def test_steps_of_a_sequence_leave_less_uncertain_than_as_many_samples():
    """Samples of 20 steps whose shares differ: the interval of their mean holds the truth, half as wide as of yes or no."""
    rng, held, widths = np.random.default_rng(0), 0, []
    for _ in range(300):
        scores = softmax(rng.standard_normal((50, 20, 4)))
        wrong = rng.random((50, 20)) < rng.beta(2, 8, (50, 1))  # 0.2 on average
        changed = np.where(wrong[..., None], np.roll(scores, 1, axis=-1), scores)
        result = compared([[scores]], [[changed]], [50])
        held += result.agreement_low <= 0.8 <= result.agreement_high
        widths.append(result.agreement_high - result.agreement_low)
    assert 0.91 <= held / 300 <= 0.99
    assert np.mean(widths) < 0.12  # of 50 single trials: 0.22


def test_the_difference_is_that_of_all_samples_together():
    before, after = normal(40, 3, 4), normal(40, 3, 4)
    after = (before + 0.1 * after).astype(np.float32)
    result = compared([[before[:20]], [before[20:]]], [[after[:20]], [after[20:]]], [20, 20])
    assert result.agreement is None
    assert result.difference == pytest.approx(
        np.linalg.norm(after - before) / np.linalg.norm(before - before.mean(0)), rel=1e-6
    )
    assert result.difference_low < result.difference < result.difference_high
    same = compared([[before]], [[before]], [40])
    assert (same.difference, same.difference_low, same.difference_high) == (0, 0, 0)


def test_models_are_run_on_the_inputs(tmp_path):
    for name, scale in (("a", 1.0), ("b", 1.5)):
        node = helper.make_node("Mul", ["x", "s"], ["y"])
        onnx.save(
            make_model([node], {"s": np.array(scale, np.float32)}, {"x": ["n", 3]}, {"y": ["n", 3]}), tmp_path / f"{name}.onnx"
        )
    feeds = [{"x": normal(5, 3)}, {"x": normal(3, 3, seed=1)}]
    result = agreement(tmp_path / "a.onnx", tmp_path / "b.onnx", feeds)
    assert (result.samples, result.agreement) == (8, 1.0)
    values = np.concatenate([feed["x"] for feed in feeds])
    assert result.difference == pytest.approx(0.5 * np.linalg.norm(values) / np.linalg.norm(values - values.mean(0)))
    with pytest.raises(ModelError, match="nothing to compare: expected at least one set of inputs"):
        agreement(tmp_path / "a.onnx", tmp_path / "b.onnx", [])


def test_scores_of_feeds_that_differ_in_their_last_axis_are_none(rng):
    """The last axis is then time, not classes."""
    parts = [rng.standard_normal((1, length)).astype(np.float32) for length in (5, 7)]
    assert scores_of(parts[:1]) == "logits"
    assert scores_of(parts) is None
