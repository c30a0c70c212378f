"""Finds the fastest network whose outputs agree with the dense network's as closely as asked for.

For a limit on the sum of the layers' losses, the fastest choice follows from the tables of times and losses; what the limit
means for the outputs does not. So the limit is searched for: the choice is run as a whole, and the limit is raised where its
outputs agree and lowered where they do not. Fitted cores bring the outputs nearer to the dense network's than these
approximations are. By how much is measured: the network that was found is fitted, and with what this gained the search is
repeated. Ranks are chosen on the inputs that cores are fitted to, and fitted networks compared on others (`Split.exchanged`).

The share of a few dozen inputs whose best class changes says little about a network: one input more or less decides. How far
outputs move is known much better, and the share rises with it. So while limits are tried, the share is estimated from the
difference of the outputs, with the ratio of both over all networks that were run, but never outside the interval of the share
that the network itself showed. The network that was fitted is judged by the share itself, on all of those others.
"""

from __future__ import annotations

import math
import statistics
from collections.abc import Mapping, Sequence
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

_REDUCED = {
    "latency": "is {:g}× faster",
    "flops": "has {:g}× fewer FLOPs",
    "params": "has {:g}× fewer parameters",
    "bytes": "is {:g}× smaller",
}
"""What a network that meets a target is or has, in words."""
_STEPS = 10  # limits that are tried in a round
_ROUNDS = 4  # networks that are fitted at most
_STEP = 2.0  # factor by which expectations change at most from round to round
_CARE = 1.1
_ALIKE = 0.1  # expectations that change by no more are no reason for another round
_MARGIN = 0.25  # of the interval on one side of a share that was measured: half a standard deviation
_WIDE_MARGIN = 0.75  # the same of a difference, which few inputs show better than a share: one and a half
_SEVERAL = 1.5  # times the number of inputs: fewer say that each has one class, whose interval is Wilson's
_INTERVAL = 1.96  # standard deviations on each side, of a 95 % interval
_FEW = 0.3  # share of inputs that disagree, up to which it is in proportion to the difference of the outputs
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


@dataclass(frozen=True)
class _Gain:
    """What a fit leaves of what was measured before it."""

    difference: float = 0.6
    """The difference of the outputs, as a share of that before."""
    share: float = 1.0
    """The share of inputs that disagree, as a share of that which is expected for the difference before."""

    def changed(self, difference: float, share: float) -> _Gain:
        """Return the gain that was measured, which is not too far from the present one."""
        own = ((self.difference, difference), (self.share, share))
        return _Gain(*(min(max(new, old / _STEP), old * _STEP) for old, new in own))

    def with_care(self) -> _Gain:
        """Return the gain to count on where a network did not agree: one that is nearer to the dense network gains less."""
        return _Gain(self.difference * _CARE, self.share * _CARE)

    def is_less_than(self, other: _Gain) -> bool:
        """Return whether a fit leaves so much less than another one that a faster network may agree."""
        return self.difference < other.difference * (1 - _ALIKE) or self.share < other.share * (1 - _ALIKE)

    def between(self, other: _Gain) -> _Gain:
        """Return the gain in the middle."""
        return _Gain(math.sqrt(self.difference * other.difference), math.sqrt(self.share * other.share))


class _Tries:
    """Choices for limits on the loss, each of which is run once."""

    def __init__(
        self, start: PlanReport, aims: Mapping[str, float], candidates: Candidates, search: Search, guard: Guard, probe: Probe
    ) -> None:
        self.start, self.aims, self.candidates, self.search, self.guard = start, aims, candidates, search, guard
        self.probe = probe
        self.tried: dict[Picks, _Found] = {}
        self.measured: list[Agreement] = []
        self.fitted: dict[Picks, Agreement] = {}

    def found(self, gain: _Gain, progress: Progress) -> tuple[_Found, bool]:
        """Return the fastest choice that will agree once it is fitted, and True; or the one with the least loss, and False.

        Args:
            gain: what a fit leaves of what was measured before it.
            progress: told how many limits were tried.

        Raises:
            TargetError: a target cannot be met.

        """
        losses = [loss for row in self.candidates.losses.values.values() for loss in row if loss > 0]
        low, high = min(losses, default=1.0) / 2, 2 * sum(losses, start=1.0)
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
                if self.agrees(tried, gain):
                    low = limit
                else:
                    high = limit
            if high / low < _CLOSE:
                break
            limit = math.sqrt(low * high)
        progress(_STAGE, 1.0)
        # With all that is known now, a choice that was tried early may be the best one.
        good = [one for one in self.tried.values() if self.agrees(one, gain)]
        if not good:
            return min(self.tried.values(), key=lambda one: (one.picks in self.fitted, one.loss)), False
        return min(good, key=lambda one: one.milliseconds), True

    def agrees(self, one: _Found, gain: _Gain) -> bool:
        """Return whether a network will agree as closely as asked for once it is fitted; known for those that were."""
        if one.picks in self.fitted:
            return agrees(self.fitted[one.picks], self.guard)
        guard, difference = self.guard, one.agreement.difference
        if guard.max_difference is not None and not gain.difference * difference <= guard.max_difference:
            return False
        share = self.expected(one.agreement) if guard.min_agreement else None
        return share is None or gain.share * share <= self.allowed(one.agreement)

    def is_hopeless(self, one: _Found, gain: _Gain) -> bool:
        """Return whether a network will not agree even if its fit gains much, and as far as few inputs can show it."""
        high = one.agreement.agreement_high
        least = 0.0 if high is None or not self.guard.min_agreement else 1 - high
        optimistic = _Gain(gain.difference / _STEP, gain.share / _STEP)
        limit = self.guard.max_difference
        too_far = limit is not None and not optimistic.difference * one.agreement.difference <= limit
        return too_far or optimistic.share * least > self.allowed(one.agreement)

    def allowed(self, agreement: Agreement) -> float:
        """Return the largest share of the inputs that fitted networks are compared on that may have another best class."""
        compared = self.probe.inputs if self.probe.parts is None else self.probe.parts.chosen
        each = self.independent(agreement) / max(1, agreement.samples)  # more than one where inputs have several classes
        return allowed_share(self.guard, round(each * compared.count))

    def expected(self, agreement: Agreement) -> float | None:
        """Return the share of inputs that will disagree for a network that was run, within the interval of what it showed."""
        share = expected_share(self.measured, agreement.difference)
        if share is None or agreement.agreement_low is None or agreement.agreement_high is None:
            return share
        return min(max(share, 1 - agreement.agreement_high), 1 - agreement.agreement_low)

    def independent(self, agreement: Agreement) -> int:
        """Return `independent` of a network; where all classes agree, as for the other networks that were run."""
        others = [independent(one) for one in self.measured if one.agreement is not None and 0 < one.agreement < 1]
        if agreement.agreement == 1 and others:
            return max(agreement.samples, int(statistics.median(others)))
        return independent(agreement)

    def most_careful(self) -> tuple[_Found, _Gain]:
        """Return the network with the least loss that was tried, and the gain for which it would just agree."""
        found = min(self.tried.values(), key=lambda one: one.loss)
        difference, guard = max(found.agreement.difference, 1e-12), self.guard
        expected = self.expected(found.agreement) or 1.0
        share = self.allowed(found.agreement) / expected
        return found, _Gain(1.0 if guard.max_difference is None else guard.max_difference / difference, share)

    def fit(self, one: _Found, progress: Progress) -> Agreement:
        """Return the agreement of a network once its cores are fitted."""
        if one.picks not in self.fitted:
            plan = report_of(self.start, self.candidates, one.picks, self.search).plan
            self.fitted[one.picks] = self.probe.fitted(plan, progress)
        return self.fitted[one.picks]

    def run(self, picks: Picks) -> _Found:
        """Return what a choice is like as a whole."""
        if picks not in self.tried:
            self.tried[picks] = _measured(picks, self.candidates, self.probe)
            self.measured.append(self.tried[picks].agreement)
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
    fitted: Agreement | None = None
    corrections = 0
    if isinstance(probe.gain, _Gain):  # from an earlier choice among nearly the same candidates
        found, hopeful = tries.found(probe.gain, progress)
        fitted = tries.fit(found, progress) if hopeful else None
        if fitted is None or not agrees(fitted, guard):
            raise TargetError("no other network agrees as closely as asked for")
    else:
        tries, found, fitted, corrections = _in_rounds(tries, progress)
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


def _in_rounds(tries: _Tries, progress: Progress) -> tuple[_Tries, _Found, Agreement, int]:
    """Find a network, fit it, and look for a faster or a slower one by what the fit has shown.

    Returns:
        The choices among candidates with corrected losses, the fastest network that agreed once it was fitted, its agreement,
        and how often losses were corrected.

    Raises:
        TargetError: a target cannot be met, or no network that was fitted agrees.

    """
    start, search, guard, probe = tries.start, tries.search, tries.guard, tries.probe
    corrections, gain = 0, _Gain()
    best: tuple[_Found, Agreement] | None = None
    ends: dict[bool, _Gain] = {}  # the expectations that led to the last network that agreed, and to the last that did not
    for number in range(_ROUNDS):
        found, hopeful = tries.found(gain, progress)
        if best is None and number == _ROUNDS - 1:
            found, gain = tries.most_careful()
        if not number and not is_confirmed(found.loss, found.predicted):
            again = _Tries(start, tries.aims, tries.corrected(found, progress), search, guard, probe)
            other, also = again.found(gain, progress)
            if also >= hopeful and (other.milliseconds < found.milliseconds or not also):
                tries, found, hopeful, corrections = again, other, also, 1
        if not number and not hopeful and tries.is_hopeless(found, gain):
            raise TargetError(_refusal(tries, found))  # no fit gains so much
        # A first network that will hardly agree is fitted as it is, to see how far from it all are.
        found = tries.improved(found, search.improve_seconds / _ROUNDS if hopeful or number else 0.0, progress)
        if found.picks in tries.fitted:
            break  # nothing new is hoped for
        fitted = tries.fit(found, progress)
        good = agrees(fitted, guard)
        if good and (best is None or found.milliseconds < best[0].milliseconds):
            best = found, fitted
        ends[good] = gain
        if len(ends) > 1:
            gain = ends[True].between(ends[False])
            if not gain.is_less_than(ends[True]):
                break
            continue
        moved = found.agreement.difference
        expected = tries.expected(found.agreement)
        share = 1.0 if fitted.agreement is None or not expected else (1 - fitted.agreement + 0.5 / fitted.samples) / expected
        gain = gain.changed(_probable_difference(fitted) / max(moved, 1e-12), share)
        if not good:
            gain = gain.with_care()
        if not hopeful or (good and not gain.is_less_than(ends[True])):
            break  # no other choice loses less, or a faster one would hardly agree
    probe.gain = ends.get(True, gain)
    if best is None:
        raise TargetError(_refusal(tries, found))
    return tries, *best, corrections


def _measured(picks: Picks, candidates: Candidates, probe: Probe) -> _Found:
    space = candidates.space({})
    outputs = probe.outputs(space.choice(picks))
    saved = sum(
        candidates.milliseconds(layer) - candidates.added(layer, options[picked - 1])
        for (layer, options), picked in zip(candidates.faster.items(), picks, strict=True)
        if picked
    )
    loss = probe.divergence.of(outputs)
    return _Found(picks, candidates.start.milliseconds - saved, loss, space.predicted(picks), probe.agreement(outputs))


def expected_share(measured: Sequence[Agreement], difference: float) -> float | None:
    """Return the share of inputs that will have another best class, for outputs that differ by so much.

    Args:
        measured: what was measured of some networks, on the same inputs.
        difference: the relative difference of the outputs.

    Returns:
        The share, in proportion to the difference; None if outputs are no scores of classes.

    """
    known = [(1 - one.agreement, one.difference) for one in measured if one.agreement is not None]
    if not known:
        return None
    few = [pair for pair in known if pair[0] <= _FEW] or [min(known)]
    chance = 0.5 / measured[0].samples  # none of a few inputs is not none of all
    return difference * (sum(share for share, _ in few) + chance) / max(sum(moved for _, moved in few), 1e-12)


def agrees(fitted: Agreement, guard: Guard) -> bool:
    """Return whether a fitted network agrees so closely that it will probably do so on other inputs.

    Args:
        fitted: its agreement on some inputs.
        guard: the limits. Agreement must keep them by half a standard deviation, as far as so few inputs can show it, and the
            difference of the outputs by one and a half.

    """
    if fitted.agreement is not None:
        low = fitted.agreement if fitted.agreement_low is None else fitted.agreement_low
        if _probable(fitted.agreement, low) < _limit(guard, fitted.samples):
            return False
    return not guard.refusal(fitted.model_copy(update={"difference": _probable_difference(fitted)}))


def independent(agreement: Agreement) -> int:
    """Return how many inputs with one class each would show the share as narrowly as these do.

    Inputs with several classes each, such as the letters of a line, show it more narrowly than their number says.
    """
    share, low, high = agreement.agreement, agreement.agreement_low, agreement.agreement_high
    if share is None or low is None or high is None or not 0 < share < 1:
        return agreement.samples
    count = round(_INTERVAL**2 * share * (1 - share) / max((high - low) / 2, 1e-6) ** 2)
    return count if count > _SEVERAL * agreement.samples else agreement.samples


def allowed_share(guard: Guard, samples: int) -> float:
    """Return the largest share of so many inputs that may have another best class, for `agrees`."""
    limit = _limit(guard, samples)
    for wrong in range(samples, 0, -1):
        low, _ = wilson(samples - wrong, samples)
        if _probable(1 - wrong / samples, low) >= limit:
            return wrong / samples
    return 0.5 / samples


def _probable_difference(fitted: Agreement) -> float:
    """Return the difference of the outputs that other inputs will probably keep."""
    high = fitted.difference_high if math.isfinite(fitted.difference_high) else fitted.difference
    return fitted.difference + _WIDE_MARGIN * (high - fitted.difference)


def _probable(share: float, low: float) -> float:
    """Return the share that other inputs will probably reach, from a share and the lower end of its interval."""
    return share - _MARGIN * (share - low)


def _limit(guard: Guard, samples: int) -> float:
    """Return the share that must probably be reached: the limit, or the most that so few inputs can show."""
    low, _ = wilson(samples, samples)
    return min(guard.min_agreement, _probable(1.0, low))


def _refusal(tries: _Tries, found: _Found) -> str:
    """Return why no network agrees: which one came nearest once it was fitted, or else this one before."""
    reductions = "".join(f"{_REDUCED[name].format(value)} and " for name, value in tries.start.targets.items())
    picks, nearest, when = found.picks, found.agreement, "before cores are fitted"
    if tries.fitted:
        picks, nearest = min(tries.fitted.items(), key=lambda pair: (1 - (pair[1].agreement or 0.0), pair[1].difference))
        when = "with fitted cores"
    faster = tries.candidates.dense.milliseconds / tries.tried[picks].milliseconds
    asked = tries.guard.described(scores=nearest.agreement is not None)
    unsure = tries.fitted and not tries.guard.refusal(nearest)
    advice = "so few do not show that other inputs will keep the limit: give more, ask" if unsure else "ask"
    return (
        f"no network was found that {reductions}agrees as closely as asked for ({asked}): with the nearest one, predicted "
        f"to be {faster:.2f}× faster, {when}, on {nearest.samples} inputs, "
        f"{nearest.words()}; {advice} for less agreement, or train"
    )
