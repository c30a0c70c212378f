"""Inputs as a user has them: a file, a folder, or arrays in memory."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from tensorrail_runtime.errors import ModelError, UsageError
from tensorrail_runtime.feeds.batches import Batches
from tensorrail_runtime.feeds.loading import known_values, load_batches
from tensorrail_runtime.feeds.rules import InputRules
from tensorrail_runtime.feeds.sources import files_of
from tensorrail_runtime.graphs.files import files_read
from tensorrail_runtime.measure.accuracy import Labelled
from tensorrail_runtime.measure.timing import Conditions, Timing
from tensorrail_runtime.records import is_stream
from tensorrail_runtime.sessions.inputs import random_inputs
from tensorrail_runtime.sessions.session import Session, open_session

if TYPE_CHECKING:
    from tensorrail_exporter.calibrate.inputs import Calibration

_LARGE = 2**30  # bytes of a model whose rewriting may exceed 2 GiB, so that its weights get a file of their own

Arrays = Path | str | Mapping[str, np.ndarray] | Sequence[Mapping[str, np.ndarray]]
"""A file of arrays by input name (npz), a folder of such files, or such arrays."""


def as_calibration(
    inputs: Any,  # Any: see `Args`
    model: Path,
    samples: int | None,
    rules: InputRules,
    *,
    default: int,
    classes: bool = True,
) -> Calibration | None:
    """Return calibration inputs in batches.

    Args:
        inputs: an npz file or a folder, arrays by input name, a `Calibration`, or None.
        model: the file of the model that they are for.
        samples: samples that are used at most; None: as many as `default` says, and all of a `Calibration`.
        rules: inputs that are constants or states, or whose samples are not along the first axis.
        default: samples that are used at most where it is not said.
        classes: whether labels must be class indices; default True.

    Raises:
        ModelError: the inputs cannot be read, or do not suit the model.
        UsageError: a number of samples without inputs.

    """
    require_effect(samples, inputs)
    if inputs is None:
        return None
    from tensorrail_exporter.calibrate.inputs import Calibration, load_calibration

    if isinstance(inputs, Calibration):
        return inputs if samples is None else inputs.first(samples)
    return load_calibration(_source(inputs, "calibration"), model, most=samples or default, rules=rules, classes=classes)


def require_effect(samples: int | None, inputs: object) -> None:
    """Raise `UsageError` for a number of calibration samples where there are no calibration inputs."""
    if samples is not None and inputs is None:
        raise UsageError(
            f"samples={samples} is about calibration inputs and has no effect without them: give calibration inputs"
        )


def as_batches(
    inputs: Any,  # Any: see `Args`
    model: Path,
    batch: int,
    settings: Session,
    rules: InputRules,
    most: int | None = None,
) -> Batches | None:
    """Return inputs in batches of a size, as a session takes them; None where there are none.

    Args:
        inputs: an npz file or a folder, arrays by input name, a `Calibration`, or None.
        model: the file of the model that they are for.
        batch: the largest number of samples in a batch.
        settings: how the model runs, where it has states.
        rules: inputs that are constants or states, or whose samples are not along the first axis.
        most: samples that are used at most, spread evenly over the data; default: all.

    """
    if inputs is None:
        return None
    if isinstance(inputs, Path | str | Mapping | list | tuple):
        session = open_session(model, settings=settings)
        return load_batches(_source(inputs, "inputs"), session, rules, batch=batch, most=most)
    if not hasattr(inputs, "feeds"):  # of a `Calibration`, whose module a base install cannot import
        _source(inputs, "inputs")
    inputs = inputs if most is None else inputs.first(most)
    return Batches(tuple(inputs.feeds), inputs.axes, inputs.labels, inputs.batch, inputs.whole, inputs.sequences)


def timed_on(timing: Timing, model: Path, settings: Session, rules: InputRules, inputs: Batches | Calibration | None) -> Timing:
    """Return the timing on the values and shapes that are known.

    Args:
        timing: the timing, whose shapes are kept.
        model: the file of the model.
        settings: how the model runs.
        rules: the inputs that are constants.
        inputs: typical inputs, if there are any: their first feed gives values, and the sizes of axes that are not known.

    """
    if inputs is None and not (rules.constants or rules.states or rules.batch_axes):
        return timing
    batches = inputs if inputs is None or isinstance(inputs, Batches) else Batches(inputs.feeds, inputs.axes)
    session = open_session(model, settings=settings)
    shapes, values = known_values(session, rules, batches, timing.batch, timing.shapes)
    return replace(timing, shapes=shapes, values={**values, **timing.values})


def feed_of(model: Path, conditions: Conditions, inputs: Batches | Calibration | None) -> Mapping[str, np.ndarray]:
    """Return inputs of one run: the first given ones, or random ones where there are none."""
    if inputs is not None and inputs.feeds:
        return inputs.feeds[0]
    timing = conditions.timing
    session = open_session(model, settings=conditions.settings.exact)
    return random_inputs(session, timing.batch, shapes=timing.shapes, values=timing.values)


def as_labelled(data: Any, metric: str | None = None, rules: InputRules | None = None) -> Labelled | None:  # Any: see `Args`
    """Return labelled inputs.

    Args:
        data: an npz file or a folder, a mapping with arrays by input name and `labels`, a `Labelled`, or None.
        metric: `top1` (default), `top5` or `module:function`.
        rules: inputs that are constants or states, or whose samples are not along the first axis; default: none.

    Raises:
        ModelError: there are no labels, or a metric was given without data.
        UsageError: a metric was given beside a `Labelled` that has another one.

    """
    if data is None:
        if metric is not None:
            raise ModelError(f"metric {metric!r} scores labelled data, got no data: give data with labels as well")
        return None
    rules = rules or InputRules()
    if isinstance(data, Labelled):
        if metric not in (None, data.metric):
            raise UsageError(f"metric: the data are scored by {data.metric!r}, got {metric!r}: make Labelled with this metric")
        return replace(data, rules=rules) if data.rules == InputRules() else data
    if isinstance(data, Path | str):
        return Labelled.load(data, metric, rules)
    if not isinstance(data, Mapping):
        _source(data, "data")
        raise UsageError("data: expected a path or one mapping with arrays by input name and `labels`, got several mappings")
    arrays = dict(data)
    if "labels" not in arrays:
        raise ModelError(f"data: expected an array 'labels' beside the inputs, found {', '.join(arrays) or 'none'}")
    labels = arrays.pop("labels")
    return Labelled(arrays, np.asarray(labels), metric or "top1", rules)


def _source(arrays: Any, what: str) -> Any:  # Any: whatever was given
    """Return a path, or arrays by input name; `UsageError` for anything else, such as a single array."""
    several = isinstance(arrays, list | tuple) and all(isinstance(part, Mapping) for part in arrays)
    if not isinstance(arrays, Path | str | Mapping) and not several:
        raise UsageError(
            f"{what}: expected a path or arrays by input name, such as {{'image': array}}, got {type(arrays).__name__}"
        )
    return arrays


def require_writable(out: Path | str, *inputs: Any, append: bool = False) -> Path:  # Any: models and data, of which paths count
    """Return a file that is to be written; `ModelError`, before any work, where it cannot be, or is one that is read.

    Args:
        out: the file.
        inputs: what is read. Of a path, all files count: those of a folder, and a model's external data.
        append: whether lines are added to the file, if there is one, so that its folder need not be writable.

    """
    out = Path(out)
    if out.is_dir() or not out.parent.is_dir():
        problem = "is a folder" if out.is_dir() else f"the folder {out.parent} does not exist"
        raise ModelError(f"{out}: cannot be written: {problem}; expected the name of a file in an existing folder")
    _require_permission(out, append)
    for source in inputs:
        if isinstance(source, Path | str) and Path(source).exists():
            _require_unread(out, Path(source))
    return out


def _require_permission(out: Path, append: bool) -> None:
    """Raise `ModelError` if this process may not write a file as `write_bytes` does, or add to it."""
    folder = out.resolve().parent  # of the file that a link leads to
    if is_stream(out) or (append and out.exists()):
        if not os.access(out, os.W_OK):
            raise ModelError(f"{out}: cannot be written: no permission; expected a file that you may write")
    elif not os.access(folder, os.W_OK | os.X_OK):  # even of a file that is there, which is replaced by a new one
        problem = f"no permission to write to {folder}" if folder.is_dir() else f"the folder {folder} does not exist"
        raise ModelError(f"{out}: cannot be written: {problem}; expected the name of a file in another folder")


def _require_unread(out: Path, source: Path) -> None:
    """Raise `ModelError` if writing a file would replace what is read from a path."""
    data = out.with_name(f"{out.name}.data")
    if not out.exists() and not data.exists():
        return
    read = files_of(source) if source.is_dir() else files_read(source)
    for file in read:
        if out.exists() and file.exists() and out.samefile(file):
            whose = "" if file == source else f", as {'a file' if source.is_dir() else 'external data'} of {source}"
            raise ModelError(f"{out}: is also read{whose}, and would be lost: write to another file")
    large = source.is_file() and sum(file.stat().st_size for file in read if file.exists()) >= _LARGE
    if large and data.exists() and any(file.exists() and data.samefile(file) for file in read):
        raise ModelError(
            f"{out}: its weights would be written to {data.name} if they exceed 2 GiB, and {source} reads them there: write to "
            "a file of another name"
        )
