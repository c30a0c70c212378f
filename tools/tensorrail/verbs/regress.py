"""`tensorrail.regress`: record a model's baseline, and check later models against it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from tensorrail.inputs import as_batches, as_labelled, require_writable, timed_on
from tensorrail.models import as_file, require_finite_weights
from tensorrail.options import Options
from tensorrail_runtime.errors import UsageError
from tensorrail_runtime.feeds.rules import InputRules
from tensorrail_runtime.gate import environments, regress
from tensorrail_runtime.gate import history as histories
from tensorrail_runtime.gate.environments import EnvironmentsVerdict
from tensorrail_runtime.gate.regress import TIMING, Baseline, Limits, Verdict
from tensorrail_runtime.measure.accuracy import Labelled


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
    """Compare a model with a baseline, or with another model that is measured beside it.

    A model that takes other inputs, does not run on them, has a weight with NaN or gives NaN fails without being timed.

    Args:
        baseline: the file of a baseline, or a model (`.onnx`).
        model: the model to check: a path, an `onnx.ModelProto`, or (torch module, example inputs).
        limits: the slow-down to detect (default 5 %), and how far outputs and the metric may differ.
        data: labelled inputs for the accuracy.
        options: `progress`, and `timing` as for `record`. A baseline has its own `session`, `inputs`, batch size and shapes:
            leave them out, or give the recorded ones.

    Returns:
        The findings; `print(verdict)` shows the table, `verdict.holds` says whether all are within their limits.

    Raises:
        ModelError: a file is neither a baseline nor a model, the options differ from the recorded ones, or the accuracies
            cannot be compared.

    """
    options = options or Options()
    conditions = options.conditions(TIMING)
    with as_file(model, any_weights=True) as path:
        return regress.check(
            Path(baseline), path, limits=limits, conditions=conditions, data=as_labelled(data), rules=options.inputs
        )


def check_environments(
    model: Any,  # a path, a ModelProto, or (module, example inputs)
    pythons: Sequence[Path | str],
    *,
    there: Path | str | None = None,
    limits: Limits | None = None,
    data: Any = None,  # a path, arrays by input name, or a Calibration
    options: Options | None = None,
) -> EnvironmentsVerdict:
    """Compare a model under this environment's ONNX Runtime with the same model under the ONNX Runtime of other environments.

    Args:
        model: the model to check: a path, an `onnx.ModelProto`, or (torch module, example inputs).
        pythons: Python interpreters of the other environments, which have onnxruntime and numpy, and need nothing else. They
            are started: give those that you trust.
        there: the model's file that runs in the other environments; default: the same model.
        limits: the slow-down to detect (default 5 %), and how far outputs may differ.
        data: typical inputs, of which the first ones are run on, an npz file, a folder, or arrays by input name; default:
            random ones. Labels are not needed.
        options: `session`, `progress`, `inputs`, and `timing` as for `record`.

    Returns:
        The findings for each environment, and what runs differently there; `verdict.holds` says whether all are within their
        limits.

    Raises:
        ModelError: an interpreter cannot be started or has no onnxruntime, or the model does not run there or here.
        UsageError: `there` is not a model.

    """
    options = options or Options()
    if there is not None and Path(there).suffix != ".onnx":
        raise UsageError(f"{there}: expected a model (.onnx) to run under the other interpreters, not a baseline")
    conditions = options.conditions(TIMING)
    rules = options.inputs
    if isinstance(data, Labelled):
        data, rules = data.inputs, data.rules if rules == InputRules() else rules
    with as_file(model) as path:
        settings = conditions.settings.exact
        typical = as_batches(data, path, conditions.timing.batch, settings, rules)
        timing = timed_on(conditions.timing, path, settings, rules, typical)
        return environments.check_environments(
            path, pythons, there=there, limits=limits, conditions=replace(conditions, timing=timing)
        )


def add_to_history(path: Path | str, baseline: Baseline, *, commit: str | None = None, model: Path | str | None = None) -> None:
    """Add the time of a baseline to a history.

    Args:
        path: a file of JSON lines, which is made if it is not there.
        baseline: what `record` returned.
        commit: what was measured; default: the commit that a CI system names in its environment, or that git has checked out.
        model: the model's file. In the history it is named by its path from the current folder, so that files of one name in
            several folders are told apart, or by its name if it is elsewhere; default: by its name.

    Raises:
        ModelError: the file is no history, or cannot be written.

    """
    histories.add_entry(path, histories.entry_of(baseline, commit, model))


def history(path: Path | str) -> histories.History:
    """Return the times in a history by model, machine and settings, and the commits from which a model takes another time.

    Args:
        path: the file that `add_to_history` wrote.

    Raises:
        ModelError: the file is no history.

    """
    return histories.history_of(histories.read_entries(path))
