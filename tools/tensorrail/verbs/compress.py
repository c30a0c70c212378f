"""`tensorrail.compress`: a faster model from nothing but an ONNX file."""

from __future__ import annotations

import importlib.util
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from tensorrail.asked import asked_of
from tensorrail.contrib import dense_without_contrib
from tensorrail.inputs import as_calibration, as_labelled, feed_of, require_writable, timed_on
from tensorrail.models import as_file, load_to_search
from tensorrail.options import Options
from tensorrail_runtime.errors import GraphError, PlanError, TensorrailError, UsageError
from tensorrail_runtime.measure.accuracy import Labelled
from tensorrail_runtime.measure.parity import require_comparable
from tensorrail_runtime.measure.timing import Conditions, Timing

if TYPE_CHECKING:
    import onnx

    from tensorrail_exporter.calibrate.inputs import Calibration
    from tensorrail_exporter.calibrate.split import Split
    from tensorrail_exporter.compressed import CompressReport
    from tensorrail_exporter.plans.plan import Plan
    from tensorrail_exporter.search.report import PlanReport
    from tensorrail_exporter.search.targets import Search
    from tensorrail_exporter.workflow import Refine

_SAMPLES = 512
_PROCESSES = 5
_FIT_SECONDS = 120.0


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
        target: reduction factors of `latency`, `flops`, `params` or `bytes`, such as `{"latency": 2.0}`; or a plan, or the
            file of one. Default, with calibration inputs: the fastest model whose outputs agree as `options.guard` asks for, at
            least 1.05× faster; with `options.search.max_loss`, the fastest within that loss.
        calibration: inputs: an npz file, a folder, or arrays. Cores are fitted to most of them; a quarter is held out, and the
            agreement with the dense model is measured on these. Labels are needed for `options.search.metric` alone.
        data: labelled inputs for the accuracy, which nothing is fitted to: an npz file or arrays, with `labels`; scored by
            `options.search.metric`, or else by the best class.
        options: `session`, `timing` (batch size, shapes, seconds of the final comparison), `search` (its `also`: other
            precisions to write), `precision`, `fit`, `guard` (how closely the outputs must agree), `inputs`, `contrib` and
            `progress`.

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
    from tensorrail_exporter.calibrate.split import split
    from tensorrail_exporter.search.planner import calibration_parts, plan_networks
    from tensorrail_exporter.workflow import Compression
    from tensorrail_exporter.workflow import compress as carry_out

    options = options or Options()
    asked = asked_of(target, calibration, options)
    search = asked.search
    _check_also(search.also, calibration)
    out = Path(out)
    for path in (out, *(_reduced_path(out, precision) for precision in search.also)):
        require_writable(path, model, target, calibration, data)
    conditions = options.conditions(Timing())
    conditions = replace(conditions, timing=replace(conditions.timing, processes=conditions.timing.processes or _PROCESSES))
    with as_file(model, any_weights=True) as path:  # they are checked once the model is loaded
        samples, classes = options.fit.samples, search.metric is None
        inputs = as_calibration(calibration, path, samples, options.inputs, default=_SAMPLES, classes=classes)
        conditions = replace(
            conditions, timing=timed_on(conditions.timing, path, conditions.settings.exact, options.inputs, inputs)
        )
        graph = load_to_search(path, conditions.timing, options.progress)
        feed = feed_of(path, conditions, inputs)
        require_comparable(path, feed, conditions.settings.exact)
        graph = graph if options.contrib else dense_without_contrib(graph, path, feed, conditions)
        test = as_labelled(data, None if data is None else search.metric, options.inputs)
        if asked.plan is not None and asked.precisions == ("fp32",) and test is None:
            _require_effect(search, inputs, options)
        if options.front and inputs is not None:
            calibration_parts(inputs, graph, search, conditions.settings.exact)  # while the limits are those of the search
            search = replace(search, guard=None)

        def plan(how: Search, targets: Sequence[Mapping[str, float]]) -> list[PlanReport]:
            # Networks are judged once their cores are fitted.
            return plan_networks(graph, targets, how, calibration=inputs, conditions=conditions, judge=False)

        found = replace(asked, search=search).plans(plan, options)
        compression = Compression(
            inputs,
            _refine(options, sum(1 for one in found.plans if _layers(one))) if inputs is not None else {},
            test,
            asked.guard,
            conditions,
            search.metric,
            asked.targets,
            search.max_loss,
            asked.fastest,
            found.refusal,
        )
        report = carry_out(graph, found.plans, out, compression)
    once = replace(conditions, timing=replace(conditions.timing, processes=options.timing.processes if options.timing else 0))
    parts = split(inputs, graph) if search.also and inputs is not None else None  # as the model was fitted
    return _reduced(report, out, search.also, parts, test, once)


def _layers(planned: Plan | PlanReport) -> int:
    from tensorrail_exporter.plans.plan import Plan

    return len((planned if isinstance(planned, Plan) else planned.plan).layers)


def _require_effect(search: Search, inputs: Calibration | None, options: Options) -> None:
    """Raise `UsageError` for a metric that judges nothing, as there is one plan and no further fit."""
    if search.metric is not None and inputs is not None and not _refine(options, 1):
        raise UsageError(
            f"metric {search.metric} judges layers and fits in torch, and has no effect with a plan and no such fit: leave "
            "it out, or give a target, or seconds for the fit"
        )


def _reduced(
    report: CompressReport,
    out: Path,
    precisions: Sequence[str],
    parts: Split | None,
    test: Labelled | None,
    conditions: Conditions,
) -> CompressReport:
    """Return the report with the models in other precisions, which are written beside `out`, judged on held-out inputs."""
    from tensorrail_exporter.precision.reduce import Quantization, reduced

    reports, failed = [], []
    for precision in precisions:
        try:
            converted = reduced(
                out,
                _reduced_path(out, precision),
                Quantization(precision),  # type: ignore[arg-type] # checked by `_check_also`
                calibration=None if parts is None else parts.seen.feeds,
                judged=None if parts is None or parts.judged is None else parts.judged.feeds,
                test=test,
                conditions=conditions,
            )
        except TensorrailError as error:  # the report of the model that was written is not lost
            failed.append(f"{precision}: {error}")
        else:
            reports.append(converted)
    return report.model_copy(update={"reduced": tuple(reports), "not_reduced": tuple(failed)})


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
