"""Outputs that hold several quantities: what is lost of a small one counts like what is lost of a large one."""

from __future__ import annotations

import numpy as np
import pytest

from tensorrail_runtime.measure.agreement import compared
from tensorrail_runtime.measure.features import features_of


def detector(rng, classes, samples=8, last=False):
    """Return boxes beside scores, of which class 0 is found at a few places and the others nowhere."""
    boxes = rng.uniform(20, 300, (samples, 4, 200))
    scores = rng.uniform(0, 1e-4, (samples, classes, 200))
    scores[:, 0, :5] = rng.uniform(0.6, 0.95, (samples, 5))
    out = np.concatenate([boxes, scores], 1).astype(np.float32)
    return out.transpose(0, 2, 1).copy() if last else out


def difference(before, after):
    return compared([[before]], [[after]], [len(before)]).difference


@pytest.mark.parametrize("classes", [1, 5, 80])
@pytest.mark.parametrize("last", [False, True])
def test_a_detector_that_finds_nothing_has_lost_much(classes, last, rng):
    before = detector(rng, classes, last=last)
    after = before.copy()
    found = (slice(None), slice(None), 4) if last else (slice(None), 4)
    after[found] = 0
    assert np.linalg.norm(after - before) / np.linalg.norm(before) < 0.001
    assert difference(before, after) == pytest.approx((1 / 5) ** 0.5, rel=0.02)  # one of five features is gone


def test_where_nothing_is_found_noise_does_not_count(rng):
    before = detector(rng, 80)
    after = before.copy()
    after[:, 5:] *= rng.uniform(0, 3, after[:, 5:].shape).astype(np.float32)
    assert difference(before, after) < 0.03
    after[:, 30, :20] = 0.9  # but what is found wrongly does
    assert difference(before, after) > 1


def test_features_that_are_alike_are_compared_as_a_whole(rng):
    before = rng.standard_normal((8, 12, 5)) * rng.uniform(1, 5, (12, 1))
    after = before + 0.1 * rng.standard_normal(before.shape)
    assert features_of([before]).axis is None
    assert difference(before, after) == pytest.approx(np.linalg.norm(after - before) / np.linalg.norm(before))


def test_targets_in_different_units_count_alike(rng):
    before = rng.standard_normal((50, 3, 4)) * np.array([1000.0, 1.0, 0.01])[:, None]
    after = before.copy()
    after[:, 2] = 0
    assert difference(before, after) == pytest.approx((1 / 3) ** 0.5)


def test_batches_of_different_lengths_have_features_along_the_other_axis(rng):
    batches = [rng.standard_normal((2, 4, length)) * np.array([1, 10, 100, 1000.0])[:, None] for length in (5, 9)]
    assert features_of(batches).axis == 1
    assert features_of([batch.transpose(0, 2, 1) for batch in batches]).axis == 2
    assert features_of([batches[0], batches[1].transpose(0, 2, 1)]).axis is None


@pytest.mark.parametrize("shape", [(), (7,), (7, 1), (0, 3), (7, 3)])
def test_outputs_without_features_are_one(shape, rng):
    found = features_of([np.zeros(shape)])
    assert found.axis is None
    assert found.sums(np.ones(shape)) == pytest.approx(np.prod(shape))
