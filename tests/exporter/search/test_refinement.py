"""Losses between measured options, their correction by the whole network, and the search from there."""

from types import SimpleNamespace

import numpy as np
import pytest

from tensorrail_exporter.search import verified_choice
from tensorrail_exporter.search.knapsack import Limit
from tensorrail_exporter.search.losses import Losses, interpolated
from tensorrail_exporter.search.refinement import Space, corrected, improved, is_confirmed, marginal_losses
from tensorrail_exporter.search.selection import Candidates
from tensorrail_exporter.search.targets import Search
from tensorrail_runtime.progress import silent


def test_effects_between_measured_ones_never_fall():
    shares = [0.65, 0.3, 0.1, 0.05, 0.01]
    effects = {0.05: 0.01, 0.65: 2.0, 0.1: 0.008}  # the second one is a chance of few inputs
    losses = interpolated(shares, effects)
    assert losses[0] == pytest.approx(2.0)
    assert losses[2] == losses[3] == pytest.approx(0.01)
    assert 0.01 < losses[1] < 2.0
    assert losses[4] == pytest.approx(0.002)  # in proportion, below what was measured
    assert list(losses) == sorted(losses, reverse=True)


def test_losses_are_scaled_until_their_sum_is_that_of_the_network():
    losses = Losses("calibration", {"a": (4.0, 1.0), "b": (2.0, 1.0), "c": (1.0,)})
    scaled = corrected(losses, {"a": 1.0, "b": 1.0}, {"a": 5.0, "b": 0.5}, verified=12.0)
    assert scaled.values["a"] == pytest.approx((40.0, 10.0))  # five times, and all of them twice
    assert scaled.values["b"] == pytest.approx((4.0, 2.0))
    assert scaled.values["c"] == pytest.approx((2.0,))
    assert scaled.values["a"][1] + scaled.values["b"][1] == pytest.approx(12.0)
    again = corrected(scaled, {"a": 10.0, "b": 2.0}, {"a": 10.0, "b": 4.0}, verified=14.0)
    assert again.factors == pytest.approx({"a": 10.0, "b": 4.0, "c": 2.0})
    assert losses.factors == {}


@pytest.mark.parametrize(("verified", "predicted", "confirmed"), [(0.5, 1.0, True), (1.2, 1.0, True), (1.5, 1.0, False)])
def test_a_loss_is_confirmed_if_it_is_about_as_predicted(verified, predicted, confirmed):
    assert is_confirmed(verified, predicted) == confirmed


class Probe:
    """A network whose loss is known: layers interact, which their own losses do not tell."""

    few = None

    def __init__(self, true):
        self.true, self.asked = true, []

    def loss(self, choice):
        self.asked.append(dict(choice))
        return self.true(choice)


class ProbeWithAGlimpse(Probe):
    """The same network, whose loss on a few of the inputs is known as well."""

    few = 1

    def __init__(self, true, glimpsed):
        super().__init__(true)
        self.glimpsed = glimpsed

    def loss(self, choice, batches=None):
        return super().loss(choice) if batches is None else self.glimpsed(choice)


def space(costs, losses, most):
    """Layers a, b, …; option k of each is called k."""
    options = {_Layer(name): tuple(range(1, len(values) + 1)) for name, values in losses.items()}
    return Space(options, losses, [Limit("flops", costs, most)])


def allowed(space, picks):
    """Return whether a choice keeps all limits."""
    used = [sum(costs[pick] for costs, pick in zip(limit.costs, picks, strict=True)) for limit in space.limits]
    return all(cost <= limit.most * (1 + 1e-9) for cost, limit in zip(used, space.limits, strict=True))


class _Layer:
    def __init__(self, name):
        self.name = name


def test_what_a_layer_costs_in_its_place():
    probe = Probe(lambda choice: sum(choice.values()) + 3.0 * ("a" in choice and "b" in choice))
    assert marginal_losses(probe, {"a": 1, "b": 2, "c": 4}, 10.0) == {"a": 4.0, "b": 5.0, "c": 4.0}


def test_layers_that_are_bad_together_are_parted():
    """By their own losses a and b are cheapest; together they are ruinous. The search finds c, at the same cost."""
    costs = [[10.0, 5.0]] * 3
    losses = {"a": (1.0,), "b": (1.0,), "c": (1.1,)}
    choices = space(costs, losses, 20.0)
    probe = Probe(
        lambda choice: float(sum(1.0 + 0.1 * (name == "c") for name in choice)) + 50.0 * ({"a", "b"} <= choice.keys())
    )
    picks, loss = improved(choices, (1, 1, 0), 52.0, probe, seconds=60.0)
    assert picks in ((1, 0, 1), (0, 1, 1))
    assert loss == pytest.approx(2.1)
    assert allowed(choices, picks)
    asked = [tuple(sorted(choice)) for choice in probe.asked]
    assert len(asked) == len(set(asked))  # nothing is tried twice


def test_every_trade_keeps_the_limits(rng):
    costs = [[10.0, *sorted(rng.uniform(1, 9, 4), reverse=True)] for _ in range(6)]
    losses = {name: tuple(sorted(rng.uniform(0.1, 2.0, 4))) for name in "abcdef"}
    choices = space(costs, losses, 30.0)
    true = {name: rng.uniform(0.5, 4.0) for name in losses}
    probe = Probe(lambda choice: sum(true[name] * losses[name][pick - 1] for name, pick in choice.items()))
    start = (4,) * 6
    loss = probe.loss(choices.choice(start))
    picks, best = improved(choices, start, loss, probe, seconds=60.0)
    assert best < loss
    assert allowed(choices, picks)
    for choice in probe.asked[1:]:
        assert allowed(choices, tuple(choice.get(name, 0) for name in losses))


def test_what_does_not_gain_on_a_few_inputs_is_not_tried_on_all():
    choices = space([[10.0, 6.0]] * 4, dict.fromkeys("abcd", (1.0,)), 32.0)  # two of the four layers are cut
    few = {"a": 2.0, "b": 1.0, "c": 3.0, "d": 0.1}  # on all inputs d is worse than it looks, and a is better
    every = few | {"a": 0.5, "d": 10.0}
    glimpsed = []

    def glimpse(choice):
        glimpsed.append(set(choice))
        return sum(few[name] for name in choice)

    probe = ProbeWithAGlimpse(lambda choice: sum(every[name] for name in choice), glimpse)
    assert improved(choices, (0, 1, 1, 0), 4.0, probe, seconds=60.0) == ((1, 1, 0, 0), 1.5)
    assert {"a", "c"} in glimpsed
    assert {"c", "d"} in glimpsed
    assert [set(choice) for choice in probe.asked if "c" in choice] == [{"c", "d"}]


def test_no_time_means_no_search():
    choices = space([[10.0, 5.0]] * 2, {"a": (1.0,), "b": (2.0,)}, 15.0)
    probe = Probe(lambda choice: 0.0)
    assert improved(choices, (0, 1), 2.0, probe, seconds=-1.0) == ((0, 1), 2.0)
    assert probe.asked == []
    assert np.isfinite(choices.predicted((0, 1)))


def test_a_limit_that_no_choice_keeps_is_said(monkeypatch):
    """What was found comes back, with a warning, and not as if the limit held."""
    start = SimpleNamespace(warnings=(), plan=SimpleNamespace(layers=("a",)), rows=())
    start.model_copy = lambda update: SimpleNamespace(**{"warnings": start.warnings, **update})
    monkeypatch.setattr(verified_choice, "pick", lambda *_: (1,))
    monkeypatch.setattr(verified_choice, "report_of", lambda *_: start)
    choices = space([[10.0, 5.0]], {"a": (0.1,)}, 20.0)
    candidates = Candidates({}, {}, Losses("calibration", {"a": (0.1,)}), None, None, None)
    monkeypatch.setattr(Candidates, "space", lambda *_: choices)
    probe = Probe(lambda choice: 0.5 * len(choice))
    probe.inputs = SimpleNamespace(count=8)
    for limit, warned in ((0.2, True), (0.6, False)):
        report, _ = verified_choice.choose_verified(start, {}, candidates, Search(max_loss=limit), probe, silent)
        assert [f"expected at most {limit:g}, got 0.5" in warning for warning in report.warnings] == [True] * warned
        assert report.verified.loss == 0.5
