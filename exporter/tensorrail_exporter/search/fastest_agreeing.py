"""Finds the fastest network whose outputs agree with the dense network's as closely as asked for.

For a limit on the sum of the layers' losses, the fastest choice follows from the tables of times and losses; what the limit
means for the outputs does not. So the limit is searched for: the choice is run as a whole, and the limit is raised where its
outputs agree and lowered where they do not. All of it happens on the inputs that ranks are chosen by, before cores are fitted,
which brings the outputs nearer.
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

_STEPS = 10  # limits that are tried
_MARGIN = 1.0  # standard deviations between the share of inputs that agree and the limit
_CLOSE = 1.05  # times: limits that are so near to each other are not told apart


@dataclass(frozen=True)
class _Found:
    """A choice, with what was measured of the whole network."""

    picks: Picks
    milliseconds: float  # of the network, predicted
    loss: float
    predicted: float
    agreement: Agreement


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
        probe: runs networks.
        progress: told what is done.

    Returns:
        The report of the choice, and the candidates with corrected losses.

    Raises:
        TargetError: a target cannot be met, or no network that was tried meets them and agrees.

    """
    found = _found(start, aims, candidates, search, guard, probe, progress)
    corrections = 0
    if not is_confirmed(found.loss, found.predicted):
        space = candidates.space(aims)
        marginal = marginal_losses(probe, space.choice(found.picks), found.loss, progress)
        changed = corrected(candidates.losses, space.charged(found.picks), marginal, found.loss)
        again = _found(start, aims, replace(candidates, losses=changed), search, guard, probe, progress)
        if again.milliseconds < found.milliseconds:
            found, candidates, corrections = again, replace(candidates, losses=changed), 1
    found = _improved(found, candidates, search, guard, probe, progress)
    report = report_of(start, candidates, found.picks, search)
    factors = candidates.losses.factors
    verified = VerifiedLoss(
        unit=candidates.losses.unit,
        predicted=sum(row.loss / factors.get(row.layer, 1.0) for row in report.rows),
        loss=found.loss,
        corrections=corrections,
        samples=probe.inputs.count,
        chosen=found.agreement,
    )
    return report.model_copy(update={"verified": verified}), candidates


def _found(
    start: PlanReport,
    aims: Mapping[str, float],
    candidates: Candidates,
    search: Search,
    guard: Guard,
    probe: Probe,
    progress: Progress,
) -> _Found:
    """Return the fastest choice that agrees; raise `TargetError` if there is none."""
    losses = [loss for row in candidates.losses.values.values() for loss in row if loss > 0]
    low, high = min(losses, default=1.0) / 2, 2 * sum(losses, start=1.0)
    tried: dict[Picks, _Found] = {}
    best: _Found | None = None
    limit = high  # the fastest choice of all comes first
    for step in range(_STEPS):
        progress("looking for the fastest network that agrees", step / _STEPS)
        try:
            picks = pick(start, aims, candidates, replace(search, max_loss=limit))
        except TargetError:
            if not tried:
                raise
            low = limit  # nothing that is so accurate is fast enough
        else:
            if picks not in tried:
                tried[picks] = _measured(picks, candidates, probe)
            if agrees(tried[picks].agreement, guard):
                best, low = tried[picks], limit
            else:
                high = limit
        if high / low < _CLOSE:
            break
        limit = math.sqrt(low * high)
    progress("looking for the fastest network that agrees", 1.0)
    if best is None:
        nearest = min(tried.values(), key=lambda one: one.loss)
        raise TargetError(
            f"no network was found that meets the target {_words(start.targets)} and agrees as closely as asked for "
            f"({guard.described()}): the best one of {len(tried)}, predicted to be "
            f"{candidates.dense.milliseconds / nearest.milliseconds:.2f} times faster, {_short_of(nearest.agreement)}; ask for "
            "less agreement, or train"
        )
    return best


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


def _improved(found: _Found, candidates: Candidates, search: Search, guard: Guard, probe: Probe, progress: Progress) -> _Found:
    """Return a choice that is as fast and loses less, if there is one."""
    if not search.improve_seconds or not any(found.picks):
        return found
    space = candidates.space({"latency": candidates.dense.milliseconds / found.milliseconds})
    picks, _ = improved(space, found.picks, found.loss, probe, search.improve_seconds, progress)
    changed = _measured(picks, candidates, probe)
    return changed if agrees(changed.agreement, guard) else found


def agrees(measured: Agreement, guard: Guard) -> bool:
    """Return whether outputs agree so closely that they will probably agree closely enough on other inputs, too.

    Args:
        measured: the agreement on some inputs.
        guard: the limits. The share of inputs with the same class must be a standard deviation above its own.

    """
    if measured.agreement is not None:
        low, _ = wilson(measured.agreement * measured.samples, measured.samples, _MARGIN)
        most, _ = wilson(measured.samples, measured.samples, _MARGIN)  # few inputs cannot show more
        if low < min(guard.min_agreement, most):
            return False
    return not guard.refusal(measured)


def _words(targets: Mapping[str, float]) -> str:
    return ", ".join(f"{name}={value:g}" for name, value in targets.items())


def _short_of(measured: Agreement) -> str:
    if measured.agreement is not None:
        return f"has the dense model's best class on {100 * measured.agreement:.1f} % of {measured.samples} inputs"
    return f"has outputs that differ by {measured.difference:.2e} on {measured.samples} inputs"
