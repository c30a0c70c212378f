"""Calibration inputs in three parts: to fit to, to choose by, to judge on."""

import itertools

import numpy as np
import pytest

from tensorrail_exporter.calibrate.inputs import Calibration
from tensorrail_exporter.calibrate.split import split


def calibration(count, batch=None, size=25):
    """Samples that hold their own number, which is also their label."""
    values = np.arange(count, dtype=np.float32)[:, None]
    feeds = tuple({"x": values[k : k + (batch or size)]} for k in range(0, count, batch or size))
    return Calibration(feeds, np.arange(count), batch)


def numbers(part):
    return [int(value) for feed in part.feeds for value in feed["x"][:, 0]]


@pytest.mark.parametrize(
    ("count", "judged", "chosen"), [(4, 1, 1), (10, 2, 2), (63, 15, 16), (64, 32, 10), (100, 32, 22), (250, 62, 62)]
)
def test_each_sample_is_in_one_part(count, judged, chosen):
    parts = split(calibration(count))
    held = [numbers(part) for part in (parts.fitted, parts.chosen, parts.judged)]
    assert sorted(itertools.chain(*held)) == list(range(count))
    assert [len(part) for part in held[1:]] == [chosen, judged]
    for part in (parts.fitted, parts.chosen, parts.judged, parts.seen):
        assert part.labels.tolist() == numbers(part)  # labels stay with their samples
    assert sorted(numbers(parts.seen)) == sorted(held[0] + held[1])
    assert numbers(split(calibration(count)).judged) == held[2]  # the same division each time


def test_a_fixed_batch_size_is_kept():
    parts = split(calibration(96, batch=8))
    for part in (parts.fitted, parts.chosen, parts.judged):
        assert {len(feed["x"]) for feed in part.feeds} == {8}
        assert part.labels.tolist() == numbers(part)
    assert parts.judged.count == 32
    assert parts.seen.batch == 8


@pytest.mark.parametrize(("count", "batch"), [(1, None), (3, None), (24, 8), (3, 1)])
def test_too_few_are_not_divided(count, batch):
    parts = split(calibration(count, batch))
    assert parts.judged is None
    assert parts.seen is parts.fitted
    assert parts.fitted.count == parts.chosen.count == count


def test_samples_in_order_are_mixed():
    """Inputs are often sorted by their class; a part that holds some classes only would say nothing about the others."""
    aside = np.array(numbers(split(calibration(400)).judged))
    quarters = np.bincount(aside // 100, minlength=4)
    assert quarters.min() >= 15
