"""`tensorrail.regress`: record a model's baseline, and check later models against it."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

from tensorrail.inputs import as_labelled, require_writable
from tensorrail.models import as_file, require_finite_weights
from tensorrail.options import Options
from tensorrail_runtime.gate import regress
from tensorrail_runtime.gate.regress import TIMING, Baseline, Limits, Verdict
from tensorrail_runtime.measure.timing import Conditions
from tensorrail_runtime.sessions.session import Session


def record(
    model: Path | str,
    out: Path | str,
    *,
    data: Any = None,  # a path, arrays by input name and `labels`, or a Labelled
    options: Options | None = None,
) -> Baseline:
    """Measure a model and write its baseline.

    Args:
        model: the model's file; the baseline refers to it.
        out: the file of the baseline.
        data: labelled inputs for the accuracy.
        options: `session`, `progress`, and `timing`: batch size, shapes, fresh processes (default 6) and seconds in each
            (default 1), and `inputs`, which are recorded.

    Returns:
        The baseline, which `check` reads from `out`.

    Raises:
        ModelError: the model cannot be measured.

    """
    options = options or Options()
    conditions = options.conditions(TIMING)
    require_writable(out, model, data)
    require_finite_weights(Path(model))
    labelled = as_labelled(data, rules=options.inputs)
    return regress.record(Path(model), Path(out), conditions=conditions, data=labelled, rules=options.inputs)


def check(
    baseline: Path | str,
    model: Any,  # a path, a ModelProto, or (module, example inputs)
    *,
    limits: Limits | None = None,
    data: Any = None,  # a path, arrays by input name and `labels`, or a Labelled
    options: Options | None = None,
) -> Verdict:
    """Hold a model against a baseline, or against another model that is measured beside it.

    Args:
        baseline: the file of a baseline, or a model (`.onnx`).
        model: the model to check: a path, an `onnx.ModelProto`, or (torch module, example inputs).
        limits: the slow-down to detect (default 5 %), and how far outputs and the metric may differ.
        data: labelled inputs for the accuracy.
        options: `progress`, and `timing` as for `record`; `session`, `inputs`, batch size and shapes are for two models, a
            baseline has its own.

    Returns:
        The findings; `print(verdict)` shows the table, `verdict.holds` says whether all are within their limits.

    Raises:
        ModelError: the baseline or the model cannot be read or measured.

    """
    options = options or Options()
    conditions = options.conditions(TIMING)
    baseline = Path(baseline)
    if baseline.suffix != ".onnx":
        conditions = Conditions(replace(conditions.timing, batch=1), Session(), conditions.progress)
    with as_file(model) as path:
        return regress.check(baseline, path, limits=limits, conditions=conditions, data=as_labelled(data), rules=options.inputs)
