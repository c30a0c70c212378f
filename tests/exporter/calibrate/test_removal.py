"""Which channels are removed, what that loses, and the weight that makes up for them."""

import numpy as np
import pytest
from cases import lost_in_metric

from tensorrail_exporter import LayerPlan
from tensorrail_exporter.calibrate import metric
from tensorrail_exporter.calibrate.channels import refitted, removal
from tensorrail_exporter.calibrate.metric import Moments


def inputs_of(rng, count, hidden, rows=400):
    """Channels that are mixtures of a few hidden ones, and a little noise."""
    mixed = rng.standard_normal((rows, hidden)) @ rng.standard_normal((hidden, count))
    return mixed + 0.05 * rng.standard_normal((rows, count))


def lost_by(weight, x, kept):
    """The share that the best weight on some channels loses on these rows, by least squares."""
    y = x @ weight.T
    best = np.linalg.lstsq(x[:, kept], y, rcond=None)[0]
    return np.square(y - x[:, kept] @ best).sum() / np.square(y).sum()


@pytest.mark.parametrize("count", [10, 600])
def test_what_is_lost_is_what_least_squares_leaves(count, rng):
    x, weight = inputs_of(rng, count, 6, 1800), rng.standard_normal((7, count))
    order = removal(weight, x.T @ x / len(x), 0)
    assert sorted(order.order.tolist()) == list(range(count))
    assert order.lost[0] == 0
    assert order.lost[-1] == pytest.approx(1, rel=1e-6)
    assert (np.diff(order.lost) >= -1e-12).all()
    for kept in (count // 2, count - 2):  # of 600, two are removed at a time
        expected = lost_by(weight, x, order.kept(kept))
        assert order.lost[count - kept] == pytest.approx(expected, rel=1e-3)
    few = removal(weight, x.T @ x / len(x), count // 2)
    np.testing.assert_array_equal(few.order, order.order[: len(few.order)])
    assert len(few.kept(count // 2)) == count // 2


def test_channels_that_others_replace_go_first(rng):
    """Two equal channels and one that nothing replaces: the removal of one of the two loses nothing."""
    x = rng.standard_normal((500, 3))
    x[:, 1] = x[:, 0] + 1e-3 * rng.standard_normal(500)
    order = removal(np.array([[1.0, 1.0, 0.3]]), x.T @ x, 0)
    assert order.order[0] in (0, 1)
    assert order.lost[1] < 1e-5
    assert order.lost[2] > 0.01


def test_norms_alone_would_choose_worse(rng):
    """Five large channels say the same; four smaller ones are all that says the rest."""
    x = rng.standard_normal((400, 9))
    x[:, :5] = 3 * x[:, :1] + 0.01 * x[:, :5]
    weight = rng.standard_normal((16, 9))
    kept = removal(weight, x.T @ x / len(x)).kept(5)
    assert {5, 6, 7, 8} < set(kept.tolist())
    assert lost_by(weight, x, kept) < 0.01 * lost_by(weight, x, np.arange(5))


def test_the_refitted_weight_is_the_regression(rng):
    x, weight = inputs_of(rng, 8, 4), rng.standard_normal((5, 8))
    kept = np.array([1, 4, 6, 7])
    expected = np.linalg.lstsq(x[:, kept], x @ weight.T, rcond=None)[0].T
    np.testing.assert_allclose(refitted(weight, x.T @ x, kept), expected, rtol=1e-3, atol=1e-4)


def test_all_taps_of_a_channel_are_refitted_together(rng):
    channels, taps = 6, 4
    x = inputs_of(rng, channels * taps, 10)
    weight = rng.standard_normal((5, channels, 2, 2))
    kept = np.array([0, 2, 5])
    places = (kept[:, None] * taps + np.arange(taps)).reshape(-1)
    expected = np.linalg.lstsq(x[:, places], x @ weight.reshape(5, -1).T, rcond=None)[0].T.reshape(5, 3, 2, 2)
    np.testing.assert_allclose(refitted(weight, x.T @ x, kept), expected, rtol=1e-2, atol=1e-3)


@pytest.mark.parametrize("shape", [(5, 12), (5, 12, 3, 3)])
def test_cores_in_the_metric_of_inputs_lose_less_than_plain_ones(shape, rng):
    taps = int(np.prod(shape[2:]))
    x = inputs_of(rng, 12 * taps, 9)
    moments = Moments(x.T @ x / len(x))
    plan = LayerPlan(name="layer", format="width", modes=(12,), ranks=(6,))
    target = rng.standard_normal(shape).astype(np.float32)
    fitted, plain = metric.decompose(plan, target, moments), plan.decompose(target)
    errors = [lost_in_metric(moments, plan.reconstruct(cores, shape), target) for cores in (fitted, plain)]
    assert errors[0] < 0.5 * errors[1]
    assert [core.shape for core in fitted] == list(plan.core_shapes(shape))
    assert sorted(fitted[1].sum(1).tolist()) == [1] * 6


def test_channels_that_never_vary_are_removed_without_loss(rng):
    x = rng.standard_normal((300, 6))
    x[:, [1, 4]] = 0
    plan = LayerPlan(name="layer", format="width", modes=(6,), ranks=(4,))
    moments = Moments(x.T @ x / len(x))
    target = rng.standard_normal((3, 6)).astype(np.float32)
    weight, selection = metric.decompose(plan, target, moments)
    assert np.argmax(selection, 1).tolist() == [0, 2, 3, 5]
    np.testing.assert_allclose(weight, target[:, [0, 2, 3, 5]], rtol=1e-3)
