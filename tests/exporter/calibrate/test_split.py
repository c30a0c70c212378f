"""Calibration inputs in three parts: to fit to, to choose by, to judge on."""

import itertools
from dataclasses import replace

import numpy as np
import pytest
from conftest import make_model
from onnx import helper

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


def test_samples_lie_along_the_axis_of_each_input():
    """As a state [2, batch, 1] beside frames [batch, 1], with a constant."""
    values = np.arange(40, dtype=np.float32)
    feeds = tuple(
        {"s": np.stack([values[k : k + 25]] * 2)[..., None], "x": values[k : k + 25, None], "sr": np.array(16000)}
        for k in (0, 25)
    )
    parts = split(Calibration(feeds, np.arange(40), None, {"s": 1, "x": 0, "sr": None}))
    held = [numbers(part) for part in (parts.fitted, parts.chosen, parts.judged)]
    assert sorted(itertools.chain(*held)) == list(range(40))
    for part in (parts.fitted, parts.chosen, parts.judged, parts.seen):
        assert part.count == len(numbers(part)) == len(part.labels)
        for feed in part.feeds:
            np.testing.assert_array_equal(feed["s"], np.stack([feed["x"]] * 2))
            assert feed["sr"] == 16000


def test_feeds_that_differ_in_length_stay_whole():
    feeds = tuple({"x": np.full((1, length), k, np.float32)} for k, length in enumerate((3, 5, 4, 7, 3, 6, 2, 5)))
    parts = split(Calibration(feeds, np.arange(8), whole=True))
    assert sorted(itertools.chain(*(numbers(part) for part in (parts.seen, parts.judged)))) == list(range(8))
    assert {feed["x"].shape for part in (parts.seen, parts.judged) for feed in part.feeds} == {f["x"].shape for f in feeds}
    assert parts.judged.labels.tolist() == numbers(parts.judged)


def along(*lengths):
    """Steps that hold their own number, of sequences of these lengths."""
    steps = calibration(sum(lengths), size=4)
    return replace(steps, sequences=np.repeat(np.arange(len(lengths)), lengths))


@pytest.mark.parametrize(("lengths", "counts"), [((6,) * 10, (2, 2, 6)), ((16,) * 8, (2, 2, 4)), ((3, 20) * 6, (3, 3, 6))])
def test_steps_of_a_sequence_are_in_one_part(lengths, counts):
    parts = split(along(*lengths))
    held = [set(part.sequences.tolist()) for part in (parts.judged, parts.chosen, parts.fitted)]
    assert tuple(map(len, held)) == counts
    assert sorted(itertools.chain(*held)) == list(range(len(lengths)))
    for part in (parts.judged, parts.chosen, parts.fitted, parts.seen):
        assert [int(np.repeat(np.arange(len(lengths)), lengths)[k]) for k in numbers(part)] == part.sequences.tolist()
        assert part.labels.tolist() == numbers(part)


@pytest.mark.parametrize("lengths", [(120,), (40, 80), (5,) * 7 + (85,)])
def test_few_or_unequal_sequences_are_divided_in_runs_of_steps(lengths):
    """Of twelve runs of ten steps three are held out; a single step would lie between two that are fitted to."""
    parts = split(along(*lengths))
    runs = [{k // 10 for k in numbers(part)} for part in (parts.judged, parts.chosen, parts.fitted)]
    assert [len(own) for own in runs] == [3, 3, 6]
    assert sorted(itertools.chain(*runs)) == list(range(12))


@pytest.mark.parametrize(("lengths", "judged"), [((3,), 0), ((4,), 1), ((9,), 2), ((5, 5), 2)])
def test_few_steps_are_divided_one_by_one(lengths, judged):
    parts = split(along(*lengths))
    assert (0 if parts.judged is None else parts.judged.count) == judged
    assert parts.holds_out == (judged > 0)


def test_sequences_of_a_model_with_a_fixed_batch_size_are_divided_too():
    steps = replace(calibration(40, batch=1), sequences=np.repeat(np.arange(10), 4))
    parts = split(steps)
    assert {len(feed["x"]) for feed in parts.seen.feeds} == {1}
    assert set(parts.judged.sequences.tolist()).isdisjoint(parts.seen.sequences.tolist())
    assert parts.judged.count == 8


def test_the_parts_to_fit_to_and_to_choose_by_can_be_exchanged():
    parts = split(Calibration(({"x": np.arange(40.0)},)))
    other = parts.exchanged
    assert (other.fitted, other.chosen, other.judged) == (parts.chosen, parts.fitted, parts.judged)


def test_a_constant_of_a_fixed_size_does_not_fix_the_batch(rng):
    weights = {"w": rng.standard_normal((6, 4)).astype(np.float32)}
    nodes = [
        helper.make_node("MatMul", ["x", "w"], ["h"]),
        helper.make_node("Mul", ["h", "rate"], ["y"]),
    ]
    model = make_model(nodes, weights, {"x": ["batch", 6], "rate": [1]}, {"y": ["batch", 4]})
    feeds = tuple({"x": np.ones((16, 6), np.float32), "rate": np.ones(1, np.float32)} for _ in range(3))
    parts = split(Calibration(feeds, axes={"x": 0, "rate": None}), model)
    assert parts.judged is not None
    assert parts.judged.count == 12
