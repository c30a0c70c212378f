"""`tensorrail.compress`: a faster model from nothing but an ONNX file."""

from __future__ import annotations

import importlib.util
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from tensorrail.inputs import as_calibration, as_labelled, feed_of, require_writable, timed_on
from tensorrail.models import as_file, load_to_search
from tensorrail.options import Options
from tensorrail_runtime.errors import GraphError, PlanError, TargetError, UsageError
from tensorrail_runtime.measure.accuracy import Labelled
from tensorrail_runtime.measure.parity import require_comparable
from tensorrail_runtime.measure.timing import Conditions, Timing

if TYPE_CHECKING:
    import onnx

    from tensorrail_exporter.calibrate.inputs import Calibration
    from tensorrail_exporter.compressed import CompressReport
    from tensorrail_exporter.plans.plan import Plan, Precision
    from tensorrail_exporter.search.guard import Guard
    from tensorrail_exporter.search.report import PlanReport
    from tensorrail_exporter.search.targets import Search
    from tensorrail_exporter.workflow import Refine

_SAMPLES = 512
_PROCESSES = 5
_FIT_SECONDS = 120.0
_WALK = (1.2, 1.5, 2.0, 2.5, 3.0, 4.0, 5.0, 6.0, 8.0)  # times less latency, of the networks of a front
_FASTER = 1.05  # times: a smaller speed-up is not worth another model


def compress(
    model: Any,  # a path, a ModelProto, or (module, example inputs)
    out: Path | str,
    target: Mapping[str, float] | Plan | Path | str | None = None,
    *,
    calibration: Any = None,  # a path or arrays by input name
    data: Any = None,  # a path, arrays by input name and `labels`, or a Labelled
    options: Options | None = None,
) -> CompressReport:
    """Plan, decompose, rewrite, check and time a model, and write the faster one to `out`.

    Args:
        model: the dense model: a path, an `onnx.ModelProto`, or (torch module, example inputs).
        out: the file to write.
        target: how many times less of `latency`, `flops`, `params` or `bytes`, such as `{"latency": 2.0}`; or a plan, or the
            file of one. Default, with calibration inputs: the fastest model whose outputs agree as `options.guard` asks for, at
            least 1.05 times faster; with `options.search.max_loss`, the fastest within that loss.
        calibration: inputs: an npz file, a folder, or arrays. Cores are fitted to most of them; a quarter is set aside, and the
            agreement with the dense model is measured on these. Labels are needed for `options.search.metric` alone.
        data: labelled inputs for the accuracy, which nothing is fitted to: an npz file or arrays, with `labels`; scored by
            `options.search.metric`, or else by the best class.
        options: `session`, `timing` (batch size, shapes, seconds of the final comparison), `search` (its `also`: other
            precisions to write), `precision`, `fit`, `guard` (how closely the outputs must agree), `inputs` and `progress`.

    Returns:
        Sizes, speed and errors; `print(report)` shows the tables. `report.meets`, `report.faster` and `report.accepted` say
        whether the target, a speed-up and enough agreement were measured.

    Raises:
        TargetError: the target cannot be met, or every layer stays dense; nothing is written.
        PlanError: the target or plan does not fit the model, or there is a metric without labels; nothing is written.
        ModelError: the inputs do not fit the model, or the metric is unknown, fails, or gives other than one number per sample.
        UsageError: a metric would have no effect, as there is a plan and no fit in torch.
        GraphError: the model cannot be rewritten; nothing is written.

    """
    from tensorrail_exporter.plans.plan import Plan
    from tensorrail_exporter.search.guard import Guard
    from tensorrail_exporter.search.planner import plan_networks
    from tensorrail_exporter.search.targets import Search
    from tensorrail_exporter.workflow import Compression
    from tensorrail_exporter.workflow import compress as carry_out

    options = options or Options()
    search = options.search or Search()
    guard = options.guard or search.guard or Guard()
    given = Plan.load(target) if isinstance(target, Path | str) else target
    asked: list[Mapping[str, float]] = []
    if not isinstance(given, Plan):
        search, given = _aimed(search, given or {}, guard, calibration)
        search.check(given)
        asked = [given]
    fastest = search.guard is not None or search.max_loss is not None
    if options.front:
        search, asked = _walked(search, given)
    _check_also(search.also, calibration)
    precisions = _precisions(
        options.precision or (given.precision if isinstance(given, Plan) else search.precision), calibration
    )
    if search.also and precisions != ("fp32",):
        raise PlanError(f"also: {search.also[0]} is made from a model in fp32: leave it out, or do not ask for a precision")
    out = Path(out)
    for path in (out, *(_reduced_path(out, precision) for precision in search.also)):
        require_writable(path, model, target, calibration, data)
    conditions = options.conditions(Timing())
    conditions = replace(conditions, timing=replace(conditions.timing, processes=conditions.timing.processes or _PROCESSES))
    with as_file(model, any_weights=True) as path:  # they are checked once the model is loaded
        samples = options.fit.samples or _SAMPLES
        inputs = as_calibration(calibration, path, samples, options.inputs, classes=search.metric is None)
        conditions = replace(
            conditions, timing=timed_on(conditions.timing, path, conditions.settings.exact, options.inputs, inputs)
        )
        graph = load_to_search(path, conditions.timing, options.progress)
        require_comparable(path, feed_of(path, conditions, inputs), conditions.settings.exact)
        test = as_labelled(data, None if data is None else search.metric, options.inputs)
        refine = _refine(options, len(asked) * len(precisions)) if inputs is not None else {}
        if search.metric is not None and isinstance(given, Plan) and inputs is not None and not refine:
            raise UsageError(
                f"metric {search.metric} judges layers and fits in torch, and has no effect with a plan and no such fit: leave "
                "it out, or give a target, or seconds for the fit"
            )
        plans: Sequence[Plan | PlanReport]
        if isinstance(given, Plan):
            plans = [given.model_copy(update={"precision": precision}) for precision in precisions]
        else:

            def plan(search: Search) -> list[PlanReport]:  # networks are judged once their cores are fitted
                return plan_networks(graph, asked, search, calibration=inputs, conditions=conditions, judge=False)

            plans = _planned(plan, search, precisions, options)
        targets = None if isinstance(given, Plan) else given
        compression = Compression(inputs, refine, test, guard, conditions, search.metric, targets, fastest)
        report = carry_out(graph, plans, out, compression)
    once = replace(conditions, timing=replace(conditions.timing, processes=options.timing.processes if options.timing else 0))
    return _reduced(report, out, search.also, inputs, test, once)


def _planned(
    plan: Callable[[Search], list[PlanReport]], search: Search, precisions: Sequence[Precision], options: Options
) -> list[PlanReport | Plan]:
    """Return the plans for each precision in which the target can be met; for int8 also one without layers.

    Raises:
        TargetError: no precision meets the target.

    """
    from tensorrail_exporter.plans.plan import Plan

    plans: list[PlanReport | Plan] = []
    known: list[Plan] = []
    for precision in precisions:
        try:
            reports = plan(replace(search, precision=precision))
        except (TargetError, GraphError) as error:
            if (precision == precisions[-1] and not plans) or (precision == "fp32" and isinstance(error, GraphError)):
                raise
            options.progress("note", 1.0, f"low rank in {precision}: {error}")
            reports = []
        for report in reports:
            if report.plan not in known and (report.plan.layers or precision == "int8"):
                plans.append(report)
                known.append(report.plan)
        if not reports and precision == "int8":
            plans.append(Plan(layers=(), precision="int8"))  # the dense network in int8 is still compared
    if not plans:
        raise TargetError("every layer stays dense: no form is faster here, and no model was written")
    return plans


def _precisions(asked: str, calibration: object) -> tuple[Precision, ...]:
    """Return the precisions to choose from, with int8 last."""
    from tensorrail_exporter.search.targets import CHOICES

    if asked not in CHOICES:
        raise PlanError(f"precision: expected {', '.join(CHOICES)}, got {asked!r}")
    if CHOICES[asked] != ("fp32",) and calibration is None:
        raise PlanError(
            f"precision {asked} needs typical inputs for the ranges of activations: give calibration inputs, 100 or more"
        )
    return CHOICES[asked]


def _aimed(
    search: Search, target: Mapping[str, float], guard: Guard, calibration: object
) -> tuple[Search, Mapping[str, float]]:
    """Return what is searched for: without a target or a limit on the loss, the fastest model that agrees."""
    if target or search.max_loss is not None:
        return search, target
    if calibration is None:
        raise PlanError(
            "expected a target, such as latency=2.0, or calibration inputs, for the fastest model that agrees; got neither"
        )
    return replace(search, guard=guard), {"latency": _FASTER}


def _walked(search: Search, given: Mapping[str, float] | Plan) -> tuple[Search, list[Mapping[str, float]]]:
    """Return the search and the targets of a whole front: times less latency, each with the other targets that were given."""
    from tensorrail_exporter.plans.plan import Plan

    if isinstance(given, Plan):
        raise PlanError("a front is searched for, and does not follow from a plan: leave the plan out, or the front")
    if search.max_loss is not None:
        raise PlanError("a front shows every loss, so max_loss has no effect: leave it out, or the front")
    own = given.get("latency", 0.0)
    walked = sorted({*_WALK, *([own] if own > _FASTER else [])})
    return replace(search, guard=None), [{**given, "latency": factor} for factor in walked]


def _reduced(
    report: CompressReport,
    out: Path,
    precisions: Sequence[str],
    calibration: Calibration | None,
    test: Labelled | None,
    conditions: Conditions,
) -> CompressReport:
    """Return the report with the models in other precisions, which are written beside `out`."""
    from tensorrail_exporter.precision.reduce import Quantization, reduced

    reports = []
    for precision in precisions:
        reports.append(
            reduced(
                out,
                _reduced_path(out, precision),
                Quantization(precision),  # type: ignore[arg-type] # checked by `_check_also`
                calibration=calibration.feeds if calibration is not None else None,
                test=test,
                conditions=conditions,
            )
        )
    return report.model_copy(update={"reduced": tuple(reports)})


def _reduced_path(out: Path, precision: str) -> Path:
    return out.with_suffix(f".{precision}.onnx")


def _check_also(precisions: Sequence[str], calibration: object) -> None:
    from typing import get_args

    from tensorrail_exporter.precision.reduce import Precision

    for precision in precisions:
        if precision not in get_args(Precision):
            raise PlanError(f"also: expected {' or '.join(get_args(Precision))}, got {precision!r}")
    if "int8" in precisions and calibration is None:
        raise PlanError("int8 needs typical inputs for the ranges of activations: give calibration inputs, 100 or more")


def _refine(options: Options, networks: int) -> dict[str, Refine]:
    """Return the fits in torch, which share their time among so many networks.

    None when they are switched off, or torch is missing and they were not asked for.
    """
    seconds = options.fit.seconds
    if seconds == 0 or (seconds is None and importlib.util.find_spec("torch") is None):
        return {}
    if seconds is not None:
        pass  # raises where something is missing; otherwise torch is loaded when it is needed
    half = (_FIT_SECONDS if seconds is None else seconds) / max(1, networks) / 2

    def by_blocks(dense: onnx.ModelProto, factored: onnx.ModelProto, plan: Plan, inputs: Calibration) -> onnx.ModelProto:
        from tensorrail_trainer.fit.blocks import FitSettings, fit_blocks

        return fit_blocks(dense, factored, plan, inputs, FitSettings(seconds=half), options.progress).model

    def as_a_whole(dense: onnx.ModelProto, factored: onnx.ModelProto, plan: Plan, inputs: Calibration) -> onnx.ModelProto:
        from tensorrail_trainer.fit.network import NetworkFit, fit_network

        return fit_network(dense, factored, plan, inputs, NetworkFit(seconds=half), options.progress)

    fits = {"the fit to activations": by_blocks, "the fit of the whole network": as_a_whole}
    return {what: _or_left_out(what, fit, options) for what, fit in fits.items()}


def _or_left_out(what: str, fit: Refine, options: Options) -> Refine:
    """Return a fit that leaves the graph as it is, with a note, where torch cannot run it, unless it was asked for."""

    def tried(dense: onnx.ModelProto, factored: onnx.ModelProto, plan: Plan, inputs: Calibration) -> onnx.ModelProto:
        try:
            return fit(dense, factored, plan, inputs)
        except (GraphError, ModuleNotFoundError) as error:
            if options.fit.seconds is not None:  # asked for
                raise
            options.progress("note", 1.0, f"{what} is left out: {error}")
            return factored

    return tried
