"""What is asked of `compress`: targets, precisions, how plans are searched for, and the plans that follow."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING

from tensorrail.options import Options
from tensorrail_runtime.errors import GraphError, PlanError, TargetError

if TYPE_CHECKING:
    from tensorrail_exporter.plans.plan import Plan, Precision
    from tensorrail_exporter.search.guard import Guard
    from tensorrail_exporter.search.report import PlanReport
    from tensorrail_exporter.search.targets import Search

WALK = (1.2, 1.5, 2.0, 2.5, 3.0, 4.0, 5.0, 6.0, 8.0)
"""Times less latency, of the models of a front."""

_FASTER = 1.05  # times: a smaller speed-up is not worth another model


@dataclass(frozen=True)
class Asked:
    """What is asked for."""

    search: Search
    """How plans are searched for."""
    guard: Guard
    """How closely the outputs must agree with the dense model's."""
    precisions: tuple[Precision, ...]
    """The precisions to choose from, fp32 first."""
    plan: Plan | None
    """The plan that was given; None for targets."""
    targets: Mapping[str, float]
    """What the written model must reach; empty for a plan."""
    walk: tuple[Mapping[str, float], ...]
    """The targets that plans are searched for, those that are easiest to meet first."""
    fastest: bool
    """Whether the fastest model within the limits is asked for."""

    def plans(self, search: Callable[[Search, Sequence[Mapping[str, float]]], list[PlanReport]], options: Options) -> Plans:
        """Return the plans for each precision in which targets can be met.

        Args:
            search: searches for plans for several targets, up to the first that cannot be met.
            options: whose `progress` is told what is left out.

        Raises:
            TargetError: no model can meet the targets.
            GraphError: the graph cannot be planned for.

        """
        from tensorrail_exporter.plans.plan import Plan

        if self.plan is not None:
            return Plans([self._plan_in(self.plan, precision) for precision in self.precisions])
        found: dict[Plan, PlanReport] = {}
        refusal: TargetError | GraphError | None = None
        for precision in self.precisions:
            try:
                reports = self._walked(search, replace(self.search, precision=precision))
            except (TargetError, GraphError) as error:
                if precision == "fp32" and isinstance(error, GraphError):
                    raise
                refusal = refusal or error
                if len(self.precisions) > 1:
                    options.progress("note", 1.0, f"low rank in {precision} is left out: {error}")
                continue
            for report in reports:  # targets that are near to each other may have the same plan
                found.setdefault(report.plan, report)
        low_rank: list[PlanReport | Plan] = [one for one in found.values() if one.plan.changes]
        reduced = [precision for precision in self.precisions if precision != "fp32"]
        for precision in reduced:  # the dense network in it is measured in any case, and may be all that is fast enough
            if not any(one.precision == precision for one in low_rank):
                low_rank.append(Plan(layers=(), precision=precision))
        if reduced:
            return Plans(low_rank, refusal if isinstance(refusal, TargetError) and not found else None)
        if refusal is not None:
            raise refusal
        if not low_rank:
            raise TargetError("every layer stays dense: no form is faster here, and no model was written")
        return Plans(low_rank)

    @staticmethod
    def _plan_in(plan: Plan, precision: Precision) -> Plan:
        """Return a plan in a precision; the layers in fp32 that it names are those of its own."""
        if precision == plan.precision:
            return plan
        return plan.model_copy(update={"precision": precision, "fp32": ()})

    def _walked(
        self, search: Callable[[Search, Sequence[Mapping[str, float]]], list[PlanReport]], how: Search
    ) -> list[PlanReport]:
        try:
            return search(how, self.walk)
        except TargetError:
            if self.targets in self.walk:
                raise
            return search(how, [self.targets])  # what was asked for is easier than the first step of the walk


@dataclass(frozen=True)
class Plans:
    """The plans to choose from."""

    plans: Sequence[PlanReport | Plan]
    """The plans; one without layers stands for the dense network in the plan's precision."""
    refusal: TargetError | None = None
    """Why no plan meets the targets: raised unless the dense network in another precision does."""


def asked_of(target: Mapping[str, float] | Plan | Path | str | None, calibration: object, options: Options) -> Asked:
    """Return what is asked for.

    Args:
        target: targets, a plan or the file of one, or None.
        calibration: the calibration inputs, or None.
        options: `search`, `guard`, `precision`, `session` and `front`.

    Raises:
        PlanError: there is neither a target, a plan nor calibration inputs; a target or plan is not valid; int8 or a front is
            asked for without calibration inputs; or two things are asked for that exclude each other.

    """
    from tensorrail_exporter.plans.plan import Plan
    from tensorrail_exporter.search.guard import Guard
    from tensorrail_exporter.search.targets import Search

    search = options.search or Search()
    guard = options.guard or search.guard or Guard()
    given = Plan.load(target) if isinstance(target, Path | str) else target
    if isinstance(given, Plan):
        if options.front:
            raise PlanError("a front searches for plans itself, and a plan was given as well: leave one of them out")
        precisions = _precisions(given.precision, search, calibration, options)
        return Asked(search, guard, precisions, given, {}, (), fastest=False)
    targets = dict(given or {})
    if not targets and search.max_loss is None:
        if calibration is None:
            raise PlanError(
                "expected a target, such as latency=2.0, or calibration inputs, for the fastest model that agrees; got neither"
            )
        search, targets = replace(search, guard=guard), {"latency": _FASTER}
    search.check(targets)
    precisions = _precisions(search.precision, search, calibration, options)
    fastest = search.guard is not None or search.max_loss is not None
    walk: tuple[Mapping[str, float], ...] = (targets,)
    if options.front:
        walk = _walk(search, targets, calibration)
    return Asked(search, guard, precisions, None, targets, walk, fastest)


def _walk(search: Search, targets: Mapping[str, float], calibration: object) -> tuple[Mapping[str, float], ...]:
    """Return the targets of a whole front: latencies, each with the other targets that were given."""
    if search.max_loss is not None:
        raise PlanError("a front covers all losses, so that max_loss has no effect: leave one of them out")
    if calibration is None:
        raise PlanError("a front shows how closely models agree: give calibration inputs")
    own = targets.get("latency", 0.0)
    steps = sorted({*WALK, *([own] if own > _FASTER else [])})
    return tuple({**targets, "latency": step} for step in steps)


def _precisions(default: Precision, search: Search, calibration: object, options: Options) -> tuple[Precision, ...]:
    """Return the precisions to choose from, fp32 first: those that the options name, or the default."""
    from tensorrail_exporter.precision.planned import PRECISIONS
    from tensorrail_exporter.search.targets import precisions_of

    asked = options.precisions or (default,)
    precisions = precisions_of(asked, options.session)
    if calibration is None and any(PRECISIONS[precision].needs_inputs for precision in precisions):
        raise PlanError(
            "int8 needs typical inputs for the ranges of activations: give calibration inputs, 100 or more, or leave int8 out "
            "of the precisions (auto includes it)"
        )
    if search.also and precisions != ("fp32",):
        raise PlanError(f"also: {search.also[0]} is made from a model in fp32: leave it out, or do not ask for a precision")
    return precisions
