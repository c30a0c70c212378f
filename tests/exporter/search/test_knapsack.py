"""The choice over all layers: exact, and clear about what cannot be had."""

from __future__ import annotations

import itertools

import numpy as np
import pytest

from tensorrail_exporter import PlanError
from tensorrail_exporter.search.knapsack import Limit, choose


@pytest.mark.parametrize("seed", range(12))
def test_it_is_the_best_of_all_choices(seed):
    rng = np.random.default_rng(seed)
    counts = rng.integers(1, 5, 5)
    losses = [rng.random(count) for count in counts]
    limits = [Limit(name, [rng.random(count) + 0.1 for count in counts], 0.0) for name in ("latency", "params")]
    limits = [Limit(one.name, one.costs, 1.3 * sum(min(c) for c in one.costs) + 0.2) for one in limits]
    every = itertools.product(*map(range, counts))
    allowed = [
        pick for pick in every if all(sum(c[k] for c, k in zip(one.costs, pick, strict=True)) <= one.most for one in limits)
    ]
    if not allowed:
        with pytest.raises(PlanError, match="together"):
            choose(losses, limits)
        return
    best = min(sum(one[k] for one, k in zip(losses, pick, strict=True)) for pick in allowed)
    found = choose(losses, limits)
    assert sum(one[k] for one, k in zip(losses, found, strict=True)) == pytest.approx(best, abs=1e-5)
    assert found in allowed


@pytest.mark.parametrize("seed", range(8))
def test_it_is_the_best_beside_options_that_lose_everything(seed):
    """Losses of 1e12 beside some of 1e-3: what a deep cut, or a calibration of one sample, may give."""
    rng = np.random.default_rng(seed)
    losses = [np.array([0.0, *np.sort(1e-3 + 9e-3 * rng.random(3))[::-1], 1e12]) for _ in range(4)]
    costs = [np.array([1.0, *np.sort(rng.random(3))[::-1], 0.01]) for _ in range(4)]
    limit = Limit("latency", costs, 2.7)
    every = [
        pick for pick in itertools.product(range(5), repeat=4) if sum(c[k] for c, k in zip(costs, pick, strict=True)) <= 2.7
    ]
    best = min(sum(one[k] for one, k in zip(losses, pick, strict=True)) for pick in every)
    found = choose(losses, [limit])
    assert sum(one[k] for one, k in zip(losses, found, strict=True)) == pytest.approx(best, rel=1e-4)


def test_all_layers_compete_for_one_budget():
    # One layer saves much for little loss: it alone is taken, not half of each.
    losses = [[0.0, 0.1], [0.0, 0.3], [0.0, 0.3]]
    costs = [[10.0, 2.0], [10.0, 6.0], [10.0, 6.0]]
    assert choose(losses, [Limit("latency", costs, 22.0)]) == (1, 0, 0)


def test_a_target_out_of_reach_says_what_can_be_reached():
    with pytest.raises(PlanError, match=r"latency cannot be met: it allows 1, but the cheapest .* cost 2"):
        choose([[0.0, 1.0]], [Limit("latency", [[4.0, 2.0]], 1.0)])
