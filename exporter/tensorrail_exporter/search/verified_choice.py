"""Chooses a network by the losses of its layers, and verifies the loss of the whole."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path

from tensorrail_exporter.calibrate.inputs import Calibration
from tensorrail_exporter.search.fastest_agreeing import choose_fastest
from tensorrail_exporter.search.losses import Probe
from tensorrail_exporter.search.options import Option
from tensorrail_exporter.search.refinement import Picks, corrected, improved, is_confirmed, marginal_losses
from tensorrail_exporter.search.report import PlanReport, VerifiedLoss
from tensorrail_exporter.search.selection import Candidates, pick, report_of, select
from tensorrail_exporter.search.targets import Search
from tensorrail_runtime.progress import Progress

_CORRECTIONS = 3  # of the losses of layers, in one choice


def choose_verified(
    start: PlanReport,
    aims: Mapping[str, float],
    candidates: Candidates,
    search: Search,
    probe: Probe | None,
    progress: Progress,
) -> tuple[PlanReport, Candidates]:
    """Choose a network; with calibration inputs, measure its loss, correct those of its layers and search on.

    Args:
        start: the report to complete, with the user's targets.
        aims: the targets of this choice, which may be tighter or looser than the user's.
        candidates: the layers with their forms, times and losses.
        search: the limit on the loss, and how long to search on.
        probe: measures the loss of networks; None without calibration inputs.
        progress: told what is done.

    Returns:
        The report of the choice, and the candidates with corrected losses.

    Raises:
        TargetError: a target cannot be met; the message says what can be reached.

    """
    if probe is None:
        return select(start, aims, candidates, search), candidates
    if search.guard is not None:
        return choose_fastest(start, aims, candidates, search, search.guard, probe, progress)
    tried: dict[Picks, float] = {}
    corrections = 0
    while True:
        picks = pick(start, aims, candidates, search)
        if picks in tried:
            break
        space = candidates.space(aims)
        choice, predicted = space.choice(picks), space.predicted(picks)
        tried[picks] = loss = probe.loss(choice)
        within = search.max_loss is None or loss <= search.max_loss
        if not choice or (within and is_confirmed(loss, predicted)) or corrections == _CORRECTIONS:
            break
        marginal = marginal_losses(probe, choice, loss, progress)
        candidates = replace(candidates, losses=corrected(candidates.losses, space.charged(picks), marginal, loss))
        corrections += 1
    picks, loss = _least(tried, search)
    space = candidates.space(aims)
    if search.max_loss is None and search.improve_seconds and space.choice(picks):
        picks, loss = improved(space, picks, loss, probe, search.improve_seconds, progress)
    report = report_of(start, candidates, picks, search)
    factors = candidates.losses.factors
    verified = VerifiedLoss(
        unit=candidates.losses.unit,
        predicted=sum(row.loss / factors.get(row.layer, 1.0) for row in report.rows),
        loss=loss,
        corrections=corrections,
        samples=probe.inputs.count,
    )
    warnings = report.warnings
    if search.max_loss is not None and loss > search.max_loss:
        warnings += (
            f"no choice was found whose measured loss keeps the limit: expected at most {search.max_loss:g}, got {loss:.3g}",
        )
    update = {"verified": verified if report.plan.layers else None, "warnings": warnings}
    return report.model_copy(update=update), candidates


def _least(tried: Mapping[Picks, float], search: Search) -> tuple[Picks, float]:
    """Return the choice with the least loss; if the loss is limited, the first one, the fastest, that keeps the limit."""
    if search.max_loss is not None:
        for picks, loss in tried.items():
            if loss <= search.max_loss:
                return picks, loss
    return min(tried.items(), key=lambda item: item[1])


def with_inputs_set_aside(
    report: PlanReport, choice: Mapping[str, Option], probe: Probe, inputs: Calibration | None, folder: Path
) -> PlanReport:
    """Return the report with the outputs compared on inputs that nothing was chosen by; None if there are too few."""
    if (verified := report.verified) is None or not report.plan.layers:
        return report
    if inputs is None:
        return report.model_copy(update={"verified": verified.model_copy(update={"too_few": True})})
    aside = Probe(probe.resolved, probe.approximations, inputs, probe.settings, folder, probe.metric, reference=probe.reference)
    agreement = aside.agreement(aside.outputs(choice))
    return report.model_copy(update={"verified": verified.model_copy(update={"aside": agreement})})
