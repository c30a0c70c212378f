"""Which layers are faster in fp32, by times that are known."""

from __future__ import annotations

from itertools import pairwise

import onnx
import pytest

from tensorrail_exporter.precision import islands
from tensorrail_exporter.precision.islands import fastest_islands
from tensorrail_exporter.precision.spared import Layer
from tensorrail_runtime.errors import GraphError
from tensorrail_runtime.measure.latency import Ratio


class Times:
    """The times of layers in int8 and in fp32, and what each border between both costs."""

    def __init__(self, int8, fp32, border=0.0, noise=0.0):
        self.int8, self.fp32, self.border, self.noise, self.timed = int8, fp32, border, noise, 0

    def convert(self, names):
        """Stand in for a network: its name says which layers are in fp32."""
        if len(names) == len(self.int8):
            raise GraphError("nothing in the graph can be quantized")
        return onnx.ModelProto(producer_name=",".join(names))

    def __call__(self, models):
        self.timed += len(models)
        first, *others = [self.of(set(model.producer_name.split(","))) for model in models]
        ratios = [first / other for other in others]
        return [
            Ratio(model="", reference="", value=value, low=value * (1 - self.noise), high=value * (1 + self.noise))
            for value in ratios
        ]

    def of(self, kept):
        here = [f"n{k:02}" in kept for k in range(len(self.int8))]
        borders = sum(a != b for a, b in pairwise(here))
        return sum(b if own else a for own, a, b in zip(here, self.int8, self.fp32, strict=True)) + self.border * borders


def found(times, start=()):
    return fastest_islands([Layer(f"n{k:02}", 1) for k in range(len(times.int8))], start, times.convert, times)


@pytest.mark.parametrize("slow", [[0], [15], [4, 5], [2, 9, 12], [8, 9, 10, 11, 12, 13, 14, 15]])
def test_the_layers_that_are_slower_in_int8_go_back_to_fp32(slow):
    int8 = [3.0 if k in slow else 1.0 for k in range(16)]
    assert found(Times(int8, [2.0] * 16)) == tuple(f"n{k:02}" for k in slow)


def test_a_border_that_costs_more_than_it_saves_is_not_made():
    int8 = [1.0] * 16
    int8[5] = 3.0
    assert found(Times(int8, [2.0] * 16, border=0.6)) == ()
    assert found(Times(int8, [2.0] * 16, border=0.2)) == ("n05",)


def test_neighbours_that_only_pay_together_are_found():
    int8 = [1.0] * 8 + [2.4] * 8
    assert found(Times(int8, [2.0] * 16, border=1.0)) == tuple(f"n{k:02}" for k in range(8, 16))


def test_where_all_layers_are_faster_in_fp32_some_stay_in_int8():
    times = Times([3.0] * 8, [1.0] * 8)
    assert len(found(times)) == 7  # the network in fp32 is another one


def test_a_difference_within_the_noise_changes_nothing():
    int8 = [2.1] * 4 + [2.0] * 12
    assert found(Times(int8, [2.0] * 16, noise=0.05)) == ()


def test_layers_that_stay_in_fp32_in_any_case_are_kept():
    int8 = [1.0] * 15 + [9.0]
    assert found(Times(int8, [2.0] * 16), start=("n03",)) == ("n03", "n15")


def test_no_more_networks_are_tried_when_the_time_is_over(monkeypatch):
    monkeypatch.setattr(islands, "_SECONDS", 0.0)
    times = Times([3.0] * 16, [2.0] * 16)
    assert (found(times), times.timed) == ((), 0)


def test_what_was_timed_counts_when_the_time_ends_before_it_is_timed_again(monkeypatch):
    """Time passes with each network: it ends after the first round."""
    clock = iter(range(10_000))
    monkeypatch.setattr(islands.time, "monotonic", lambda: float(next(clock)))
    monkeypatch.setattr(islands, "_SECONDS", 3.5)
    assert found(Times([3.0] * 8 + [1.0] * 8, [2.0] * 16)) == tuple(f"n{k:02}" for k in range(8))


def test_a_network_without_such_layers_stays_as_it_is():
    assert fastest_islands([], ("n03",), None, None) == ("n03",)
