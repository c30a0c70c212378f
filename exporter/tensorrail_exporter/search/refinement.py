"""Verifies the loss of a chosen network as a whole, corrects the losses of its layers, and searches on from there.

Losses of single layers are added up to choose a network, as if their errors did not meet. They do: a layer may cost more behind
others that were cut as well. The chosen network is therefore run with all of its layers approximated. Putting one dense layer
back shows what that layer costs in its place; where it was charged less, its losses are scaled and the choice is repeated, as
is done for predicted times. A local search then trades layers: one gets a cheaper form, another a better one, within the same
limits.

Evolutionary search over whole compressed networks follows EvoPress (Sieberling et al., ICML 2025), choosing by a table and then
searching around the choice follows SPDY (Frantar and Alistarh, ICML 2022). Trying candidates on few inputs first is EvoPress's
selection in steps.
"""

from __future__ import annotations

import itertools
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

from tensorrail_exporter.rewrite.survey import DenseLayer
from tensorrail_exporter.search.knapsack import Apart, Limit
from tensorrail_exporter.search.losses import Losses, Probe
from tensorrail_exporter.search.options import Option
from tensorrail_runtime.progress import Progress, silent

_TRUSTED = 1.25  # times the predicted loss: a verified loss up to this confirms the prediction
_LARGEST = 100.0  # factor by which losses of a layer are scaled at most in one correction
_NEIGHBOURS = 2  # forms on either side of the chosen one that the local search tries
_PATIENCE = 24  # trades without gain in a row that end the local search
_GAIN = 1e-3  # share of the loss that a trade must gain
_ROUNDING = 1e-9

Picks = tuple[int, ...]
"""The option of every layer: 0 is dense, k is the k-th of its options."""


@dataclass(frozen=True)
class Space:
    """All choices: layers with options, their losses, and the limits that a choice must keep."""

    options: Mapping[DenseLayer, Sequence[Option]]
    losses: Mapping[str, Sequence[float]]
    limits: Sequence[Limit]
    apart: Sequence[Apart] = ()

    def allows(self, picks: Picks) -> bool:
        """Return whether no two of the options are to be kept apart."""
        chosen = set(enumerate(picks))
        return not any(chosen & set(first) and chosen & set(second) for first, second in self.apart)

    @property
    def layers(self) -> tuple[DenseLayer, ...]:
        """The layers, in the order of picks."""
        return tuple(self.options)

    def choice(self, picks: Picks) -> dict[str, Option]:
        """Return the options of the layers that are not dense, by name."""
        return {layer.name: self.options[layer][pick - 1] for layer, pick in zip(self.options, picks, strict=True) if pick}

    def loss_of(self, place: int, pick: int) -> float:
        """Return the loss of one option of the layer at a place."""
        return self.losses[self.layers[place].name][pick - 1] if pick else 0.0

    def charged(self, picks: Picks) -> dict[str, float]:
        """Return the losses of the layers that are not dense, by name."""
        return {layer.name: self.loss_of(place, picks[place]) for place, layer in enumerate(self.layers) if picks[place]}

    def predicted(self, picks: Picks) -> float:
        """Return the sum of the layers' losses."""
        return sum(self.charged(picks).values())


def marginal_losses(probe: Probe, choice: Mapping[str, Option], loss: float, progress: Progress = silent) -> dict[str, float]:
    """Return how much the loss of a network falls when one layer is dense again, for each layer of a choice.

    Args:
        probe: measures the network.
        choice: the options of the layers that are not dense.
        loss: the loss of the network with this choice.
        progress: told which layer is next.

    """
    marginal = {}
    for number, name in enumerate(choice):
        progress("verifying losses", number / len(choice), name)
        others = {other: option for other, option in choice.items() if other != name}
        marginal[name] = max(0.0, loss - probe.loss(others))
    return marginal


def corrected(losses: Losses, charged: Mapping[str, float], marginal: Mapping[str, float], verified: float) -> Losses:
    """Return losses that are scaled, layer by layer, so that the sum over a choice is its verified loss.

    Args:
        losses: the losses of all options.
        charged: the losses of the chosen options, by layer name.
        marginal: what these layers cost in the network.
        verified: the loss of the whole network.

    """
    factors = {name: min(max(1.0, marginal[name] / max(charged[name], 1e-12)), _LARGEST) for name in charged}
    total = sum(factors[name] * charged[name] for name in charged)
    common = max(1.0, verified / max(total, 1e-12))
    scales = {name: common * factors.get(name, 1.0) for name in losses.values}
    return replace(
        losses,
        values={name: tuple(scales[name] * value for value in options) for name, options in losses.values.items()},
        factors={name: scale * losses.factors.get(name, 1.0) for name, scale in scales.items()},
    )


def is_confirmed(verified: float, predicted: float) -> bool:
    """Return whether a verified loss is about as small as predicted, or smaller."""
    return verified <= _TRUSTED * predicted + 1e-9


def improved(
    space: Space, picks: Picks, loss: float, probe: Probe, seconds: float, progress: Progress = silent
) -> tuple[Picks, float]:
    """Trade forms between layers for as long as that lowers the loss of the network.

    A trade moves one or two layers to a neighbouring form. Those that the layers' own losses promise most of are tried first,
    on a few of the inputs, and on all of them if they gain on these.

    Args:
        space: the choices, with the limits that each must keep.
        picks: the choice to start from.
        loss: its measured loss.
        probe: measures the network.
        seconds: how long to search at most.
        progress: told how much time has passed.

    Returns:
        The best choice that was found, and its measured loss.

    """
    start = time.monotonic()
    tried = {picks}
    failures = 0
    least = None if probe.few is None else probe.loss(space.choice(picks), probe.few)  # on a few of the inputs
    while failures < _PATIENCE:
        trades = [trade for trade in _trades(space, picks) if trade not in tried]
        if not trades:
            break
        for trade in trades:
            passed = time.monotonic() - start
            if passed > seconds or failures >= _PATIENCE:
                return picks, loss
            progress("searching on", min(passed / seconds, failures / _PATIENCE), f"loss {loss:.3g}")
            tried.add(trade)
            choice = space.choice(trade)
            glimpsed = None if least is None else probe.loss(choice, probe.few)
            if glimpsed is None or (least is not None and glimpsed < least):
                changed = probe.loss(choice)
                if changed < loss * (1 - _GAIN):
                    picks, loss, least, failures = trade, changed, glimpsed, 0
                    break
            failures += 1
        else:
            break
    return picks, loss


def _trades(space: Space, picks: Picks) -> list[Picks]:
    """Return the allowed choices in which one or two layers take a neighbouring form, by rising predicted loss."""
    moves = [_neighbours(space, place, pick) for place, pick in enumerate(picks)]
    singles = [((place, pick),) for place, row in enumerate(moves) for pick in row]
    pairs = (
        ((a, first), (b, second))
        for a, b in itertools.combinations(range(len(picks)), 2)
        for first in moves[a]
        for second in moves[b]
    )
    usage = [sum(costs[pick] for costs, pick in zip(limit.costs, picks, strict=True)) for limit in space.limits]
    ranked = []
    for trade in itertools.chain(singles, pairs):
        within = all(
            used + sum(limit.costs[place][pick] - limit.costs[place][picks[place]] for place, pick in trade)
            <= limit.most * (1 + _ROUNDING)
            for limit, used in zip(space.limits, usage, strict=True)
        )
        if not within:
            continue
        gain = sum(space.loss_of(place, pick) - space.loss_of(place, picks[place]) for place, pick in trade)
        changed = list(picks)
        for place, pick in trade:
            changed[place] = pick
        if space.allows(tuple(changed)):
            ranked.append((gain, tuple(changed)))
    return [trade for _, trade in sorted(ranked)]


def _neighbours(space: Space, place: int, pick: int) -> list[int]:
    """Return the options next to the chosen one among those that no other option beats in loss and all costs."""
    count = 1 + len(space.options[space.layers[place]])
    points = [(space.loss_of(place, k), *(limit.costs[place][k] for limit in space.limits)) for k in range(count)]
    front = [
        k
        for k in range(count)
        if k == pick
        or not any(
            points[other] != points[k] and all(a <= b for a, b in zip(points[other], points[k], strict=True))
            for other in range(count)
        )
    ]
    front.sort(key=lambda k: points[k])
    at = front.index(pick)
    return [k for k in front[max(0, at - _NEIGHBOURS) : at + _NEIGHBOURS + 1] if k != pick]
