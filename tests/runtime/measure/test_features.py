"""Outputs that hold probabilities beside other quantities: what is lost of either counts alike."""

from __future__ import annotations

import numpy as np
import pytest

from tensorrail_runtime.measure.agreement import compared
from tensorrail_runtime.measure.features import WHOLE, features_of


def detector(rng, classes, samples=8, places=8400, last=False):
    """Return boxes beside scores, of which class 0 is found at one place of every second sample and the others nowhere."""
    boxes = rng.uniform(20, 300, (samples, 4, places))
    scores = rng.uniform(0, 1e-4, (samples, classes, places))
    scores[::2, 0, 3] = 0.9
    out = np.concatenate([boxes, scores], 1).astype(np.float32)
    return out.transpose(0, 2, 1).copy() if last else out


def difference(before, after):
    return compared([[before]], [[after]], [len(before)]).difference


def whole(before, after):
    return np.linalg.norm(after - before) / np.linalg.norm(before - before.mean(0))


@pytest.mark.parametrize("classes", [1, 80])
@pytest.mark.parametrize("last", [False, True])
def test_a_detector_that_finds_nothing_has_lost_half(classes, last, rng):
    before = detector(rng, classes, last=last)
    after = before.copy()
    after[(slice(None), slice(None), 4) if last else (slice(None), 4)] = 0
    assert whole(before, after) < 0.001
    # The scores vary by 0.45 around their mean and are wrong by 0.9 in every second sample; boxes are as they were.
    assert difference(before, after) == pytest.approx((0.5 * (0.9**2 / 2) / 0.45**2) ** 0.5, rel=0.02)


def test_noise_where_nothing_is_found_counts_little_and_a_wrong_find_much(rng):
    before = detector(rng, 80)
    after = before.copy()
    after[:, 5:] *= rng.uniform(0, 2, after[:, 5:].shape).astype(np.float32)
    assert difference(before, after) < 0.05
    after[::2, 30, 20] = 0.9
    assert difference(before, after) == pytest.approx(1.0, rel=0.02)


@pytest.mark.parametrize("shape", [(), (7,), (7, 1), (0, 3), (7, 3), (8, 1, 4000), (4, 3, 16, 16), (5, 40, 12)])
@pytest.mark.parametrize("most", [1.0, 50.0])
def test_other_outputs_are_compared_as_a_whole(shape, most, rng):
    """Sound with quiet parts, pictures with dark borders, channels that are dead: one relative error in all."""
    before = rng.uniform(0, most, shape)
    if before.ndim > 2:
        before[..., : shape[-1] // 4] *= 0.001
        before[:, 0] *= 0.0 if shape[1] > 1 else 1.0
    if before.size and most > 1 and before.ndim > 1 and shape[1] > 1:
        before[0] = most  # no feature stays below 1
    assert features_of([before]) is WHOLE
    if before.ndim > 1 and before.size:
        after = before + 0.01 * rng.standard_normal(shape)
        assert compared([[before]], [[after]], [len(before)]).difference == pytest.approx(whole(before, after))


def test_what_all_samples_have_in_common_hides_no_error(rng):
    places = 100.0 + rng.standard_normal((50, 8)) + 40 * np.arange(8)  # of landmarks in a picture
    after = np.broadcast_to(places.mean(0), places.shape)  # a network that has learned nothing but the means
    assert np.linalg.norm(after - places) < 0.01 * np.linalg.norm(places)
    assert difference(places, after) == pytest.approx(1.0)
    constant = np.full((50, 8), 3.0)
    assert difference(constant, constant + 3e-7) < 1e-3  # rounding


def test_zeros_beside_other_values_are_no_probabilities(rng):
    before = rng.standard_normal((6, 16, 5, 5)) * 3
    before[:, :5] = 0
    after = before.copy()
    after[:, :5] = 0.02
    assert difference(before, after) == pytest.approx(whole(before, after))


def test_rows_of_boxes_with_padding_are_split_by_their_columns(rng):
    before = np.zeros((6, 100, 6))
    before[:, :4] = np.concatenate(
        [rng.uniform(10, 300, (6, 4, 4)), rng.uniform(0.5, 1, (6, 4, 1)), np.full((6, 4, 1), 3.0)], 2
    )
    found = features_of([before])
    assert found.axis == 2
    assert found.groups.tolist() == [[0, 0, 0, 0, 1, 0], [1, 1, 1, 1, 0, 1]]


def test_batches_of_different_lengths_have_features_along_the_other_axis(rng):
    batches = [detector(rng, 3, 2, places) for places in (5, 9)]
    assert features_of([np.maximum(batch, 0.05) for batch in batches]).axis == 1
    assert features_of([np.maximum(batch, 0.05).transpose(0, 2, 1) for batch in batches]).axis == 2


def test_outputs_without_numbers_have_no_difference():
    words = np.array(["cat", "dog"], object)
    assert np.isnan(compared([[words]], [[words]], [2]).difference)
