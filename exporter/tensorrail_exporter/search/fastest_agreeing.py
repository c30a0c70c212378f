"""Finds the fastest network whose outputs agree with the dense network's as closely as asked for.

For a limit on the sum of the layers' losses, the fastest choice follows from the tables of times and losses; what the limit
means for the outputs does not. So the limit is searched for: the choice is run as a whole, and the limit is raised where its
outputs agree and lowered where they do not. Fitted cores bring the outputs nearer to the dense network's than these
approximations are. By how much is measured: the network that was found is fitted, and with what this gained the search is
repeated. Networks are fitted to some of the inputs, and their outputs compared on others, by which ranks are chosen.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, replace

from tensorrail_exporter.search.guard import Guard
from tensorrail_exporter.search.losses import Probe
from tensorrail_exporter.search.refinement import Picks, corrected, improved, is_confirmed, marginal_losses
from tensorrail_exporter.search.report import PlanReport, VerifiedLoss
from tensorrail_exporter.search.selection import Candidates, pick, report_of
from tensorrail_exporter.search.targets import Search
from tensorrail_runtime.errors import TargetError
from tensorrail_runtime.measure.accuracy import wilson
from tensorrail_runtime.measure.agreement import Agreement
from tensorrail_runtime.progress import Progress

_STEPS = 10  # limits that are tried in a round
_ROUNDS = 3  # networks that are fitted at most
_GAINED = 0.6  # difference of the outputs after a fit, as a share of that before, until it is measured
_ALIKE = 0.05  # a share that changes by no more is no reason for another round
_STRICTER = 1.25  # times that share, where a fitted network agrees less than was expected
_MARGIN = 0.5  # of the interval below the share of inputs that agree: about one standard deviation
_CLOSE = 1.05  # times: limits that are so near to each other are not told apart
_STAGE = "looking for the fastest network that agrees"


@dataclass(frozen=True)
class _Found:
    """A choice, with what was measured of the whole network before cores are fitted."""

    picks: Picks
    milliseconds: float  # of the network, predicted
    loss: float
    predicted: float
    agreement: Agreement


class _Tries:
    """Choices for limits on the loss, each of which is run once."""

    def __init__(
        self, start: PlanReport, aims: Mapping[str, float], candidates: Candidates, search: Search, guard: Guard, probe: Probe
    ) -> None:
        self.start, self.aims, self.candidates, self.search, self.guard = start, aims, candidates, search, guard
        self.probe = probe
        self.tried: dict[Picks, _Found] = {}

    def found(self, gained: float, progress: Progress) -> tuple[_Found, bool]:
        """Return the fastest choice that will agree once it is fitted, and True; or the one with the least loss, and False.

        Args:
            gained: the difference of the outputs after a fit, as a share of that before.
            progress: told how many limits were tried.

        Raises:
            TargetError: a target cannot be met.

        """
        losses = [loss for row in self.candidates.losses.values.values() for loss in row if loss > 0]
        low, high = min(losses, default=1.0) / 2, 2 * sum(losses, start=1.0)
        best: _Found | None = None
        limit = high  # the fastest choice of all comes first
        for step in range(_STEPS):
            progress(_STAGE, step / _STEPS)
            try:
                picks = pick(self.start, self.aims, self.candidates, replace(self.search, max_loss=limit))
            except TargetError:
                if not self.tried:
                    raise
                low = limit  # nothing that is so accurate is fast enough
            else:
                tried = self.run(picks)
                if agrees(_brought_nearer(tried.agreement, gained), self.guard):
                    best, low = tried, limit
                else:
                    high = limit
            if high / low < _CLOSE:
                break
            limit = math.sqrt(low * high)
        progress(_STAGE, 1.0)
        return (min(self.tried.values(), key=lambda one: one.loss), False) if best is None else (best, True)

    def run(self, picks: Picks) -> _Found:
        """Return what a choice is like as a whole."""
        if picks not in self.tried:
            self.tried[picks] = _measured(picks, self.candidates, self.probe)
        return self.tried[picks]

    def improved(self, found: _Found, seconds: float, progress: Progress) -> _Found:
        """Return a choice that is as fast and loses less, if one is found in that many seconds."""
        if not seconds or not any(found.picks):
            return found
        space = self.candidates.space(dict(self.aims) | {"latency": self.candidates.dense.milliseconds / found.milliseconds})
        picks, _ = improved(space, found.picks, found.loss, self.probe, seconds, progress)
        return self.run(picks)

    def corrected(self, found: _Found, progress: Progress) -> Candidates:
        """Return the candidates with losses that add up to the loss of a choice as a whole."""
        space = self.candidates.space(self.aims)
        marginal = marginal_losses(self.probe, space.choice(found.picks), found.loss, progress)
        losses = corrected(self.candidates.losses, space.charged(found.picks), marginal, found.loss)
        return replace(self.candidates, losses=losses)


def choose_fastest(
    start: PlanReport,
    aims: Mapping[str, float],
    candidates: Candidates,
    search: Search,
    guard: Guard,
    probe: Probe,
    progress: Progress,
) -> tuple[PlanReport, Candidates]:
    """Choose the fastest network that meets the targets and whose outputs agree with the dense network's.

    Args:
        start: the report to complete, with the user's targets.
        aims: the targets of this choice; that on the latency says how much faster the network must be at least.
        candidates: the layers with their forms, times and losses.
        search: how long to search on.
        guard: how closely the outputs must agree.
        probe: runs and fits networks.
        progress: told what is done.

    Returns:
        The report of the choice, and the candidates with corrected losses.

    Raises:
        TargetError: a target cannot be met, or no network that was tried meets them and agrees.

    """
    tries = _Tries(start, aims, candidates, search, guard, probe)
    # What a fit gains, and what layers cost together, is known from an earlier choice among nearly the same candidates.
    known = probe.gained is not None
    corrections, gained = 0, probe.gained if probe.gained is not None else _GAINED
    best: tuple[_Found, Agreement] | None = None
    for number in range(_ROUNDS):
        found, hopeful = tries.found(gained, progress)
        if not number and not known and not is_confirmed(found.loss, found.predicted):
            tries = _Tries(start, aims, tries.corrected(found, progress), search, guard, probe)
            found, hopeful = tries.found(gained, progress)
            corrections = 1
        found = tries.improved(found, search.improve_seconds / _ROUNDS, progress)
        report = report_of(start, tries.candidates, found.picks, search)
        fitted = probe.agreement(probe.fitted(report.plan, progress))
        good = agrees(fitted, guard)
        if good and (best is None or found.milliseconds < best[0].milliseconds):
            best = found, fitted
        measured = fitted.difference / max(found.agreement.difference, 1e-12)
        gained, before = measured if good else max(measured, gained * _STRICTER), gained
        if not hopeful or (good and (known or measured > before * (1 - _ALIKE))):
            break  # no other choice loses less, or a faster one would hardly agree
    probe.gained = gained
    if best is None:
        raise TargetError(_refusal(start, found, fitted, guard, candidates.dense.milliseconds))
    found, fitted = best
    report = report_of(start, tries.candidates, found.picks, search)
    factors = tries.candidates.losses.factors
    verified = VerifiedLoss(
        unit=candidates.losses.unit,
        predicted=sum(row.loss / factors.get(row.layer, 1.0) for row in report.rows),
        loss=found.loss,
        corrections=corrections,
        samples=probe.inputs.count,
        chosen=fitted,
    )
    return report.model_copy(update={"verified": verified}), tries.candidates


def _measured(picks: Picks, candidates: Candidates, probe: Probe) -> _Found:
    space = candidates.space({})
    outputs = probe.outputs(space.choice(picks))
    saved = sum(
        candidates.milliseconds(layer) - candidates.milliseconds(layer, options[picked - 1])
        for (layer, options), picked in zip(candidates.faster.items(), picks, strict=True)
        if picked
    )
    loss = probe.divergence.of(outputs)
    return _Found(picks, candidates.dense.milliseconds - saved, loss, space.predicted(picks), probe.agreement(outputs))


def agrees(measured: Agreement, guard: Guard) -> bool:
    """Return whether outputs agree so closely that they will probably agree closely enough on other inputs, too.

    Args:
        measured: the agreement on some inputs.
        guard: the limits. The share of inputs with the same class must be a standard deviation above its own.

    """
    if measured.agreement is not None:
        low = measured.agreement if measured.agreement_low is None else measured.agreement_low
        most, _ = wilson(measured.samples, measured.samples)  # few inputs cannot show more
        probable, limit = (high - _MARGIN * (high - low) for high, low in ((measured.agreement, low), (1.0, most)))
        if probable < min(guard.min_agreement, limit):
            return False
    return not guard.refusal(measured)


def _brought_nearer(measured: Agreement, gained: float) -> Agreement:
    """Return what an agreement will be once cores are fitted, if what differs falls to a share of `gained`."""
    shares = {
        name: 1 - gained * (1 - share)
        for name in ("agreement", "agreement_low", "agreement_high")
        if (share := getattr(measured, name)) is not None
    }
    return measured.model_copy(update=shares | {"difference": gained * measured.difference})


def _refusal(start: PlanReport, found: _Found, fitted: Agreement, guard: Guard, dense: float) -> str:
    targets = ", ".join(f"{name}={value:g}" for name, value in start.targets.items())
    return (
        f"no network was found that meets the target {targets} and agrees as asked for ({guard.described()}): of the "
        f"best one, predicted to be {dense / found.milliseconds:.2f} times faster, on {fitted.samples} inputs and with fitted "
        f"cores, {fitted.words()}; ask for less agreement, or train"
    )
