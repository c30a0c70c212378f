"""`tensorrail.plan`: which layers become which cores, so that a target is met at the least loss."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, Any

from tensorrail.inputs import as_calibration, feed_of, timed_on
from tensorrail.models import as_file, load_to_search
from tensorrail.options import Options
from tensorrail_runtime.errors import PlanError
from tensorrail_runtime.measure.parity import require_comparable
from tensorrail_runtime.measure.timing import Timing

if TYPE_CHECKING:
    from tensorrail_exporter.search.report import PlanReport
    from tensorrail_exporter.search.targets import Search

_SAMPLES = 128


def plan(
    model: Any,  # a path, a ModelProto, or (module, example inputs)
    target: Mapping[str, float] | None = None,
    *,
    calibration: Any = None,  # a path or arrays by input name
    options: Options | None = None,
) -> PlanReport:
    """Choose formats and ranks for a target, from times measured on this machine.

    Args:
        model: the dense model: a path, an `onnx.ModelProto`, or (torch module, example inputs).
        target: reduction factors of `latency`, `flops`, `params` or `bytes`, such as `{"latency": 2.0}`; may be left out
            where `options.search` has a `max_loss` or a `guard`.
        calibration: inputs that losses are measured on: an npz file, a folder, or arrays by input name. Labels, an array
            `labels`, are needed for `options.search.metric` alone.
        options: `session`, `timing` (batch size and shapes), `search`, `precision` (`fp32`, `fp16` or `int8`), `fit.samples`
            (default 128), `inputs` and `progress`. Of a torch module, layers are joined only if `search.joint` is True.

    Returns:
        The plan in `report.plan`, and what was predicted and measured; `print(report)` shows the table.

    Raises:
        TargetError: the target cannot be met; the message says what can be reached.
        PlanError: the target, or a layer to keep, does not exist, or there is a metric without labels.
        ModelError: the inputs do not fit the model, or the metric is unknown, fails, or gives other than one number per sample.
        GraphError: the model or its outputs cannot be planned for.

    """
    from tensorrail_exporter.search.planner import plan_network
    from tensorrail_exporter.search.targets import Search

    options = options or Options()
    search = _in_precision(options.search or Search(), options.precisions)
    if isinstance(model, tuple) and search.joint is None:
        search = replace(search, joint=False)  # a module keeps such layers apart, and is trained toward the plan
    search.check(target or {})
    conditions = options.conditions(Timing())
    with as_file(model, any_weights=True) as path:  # they are checked once the model is loaded
        samples, classes = options.fit.samples, search.metric is None
        inputs = as_calibration(calibration, path, samples, options.inputs, default=_SAMPLES, classes=classes)
        timing = timed_on(conditions.timing, path, conditions.settings.exact, options.inputs, inputs)
        conditions = replace(conditions, timing=timing)
        graph = load_to_search(path, timing, options.progress)
        if inputs is not None:  # losses are differences of outputs
            require_comparable(path, feed_of(path, conditions, inputs), conditions.settings.exact)
        return plan_network(graph, target or {}, search, calibration=inputs, conditions=conditions)


def _in_precision(search: Search, asked: Sequence[str]) -> Search:
    """Return the search in the precision that is asked for, which is checked with the search."""
    if len(asked) > 1:
        raise PlanError(f"precision: a plan is for one precision, got {', '.join(asked)}; compress chooses among several")
    return replace(search, precision=asked[0]) if asked else search  # type: ignore[arg-type] # checked with the search
