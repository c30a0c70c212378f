"""Inputs as a user has them: a file, a folder, or arrays in memory."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from tensorrail_runtime.errors import ModelError, UsageError
from tensorrail_runtime.measure.accuracy import Labelled
from tensorrail_runtime.sessions.inputs import batches_of, load_arrays
from tensorrail_runtime.sessions.session import Session, open_session

if TYPE_CHECKING:
    from tensorrail_exporter.calibrate.inputs import Calibration

Arrays = Path | str | Mapping[str, np.ndarray]
"""A file of arrays by input name (npz), or such arrays."""


def as_calibration(inputs: Any, model: Path, samples: int) -> Calibration | None:  # Any: see `Args`
    """Return calibration inputs in batches.

    Args:
        inputs: an npz file or a folder, arrays by input name, a `Calibration`, or None.
        model: the file of the model that they are for.
        samples: samples that are used at most.

    """
    if inputs is None:
        return None
    from tensorrail_exporter.calibrate.inputs import BATCH, Calibration, load_calibration

    if isinstance(inputs, Calibration):
        return inputs
    if isinstance(inputs, Path | str):
        return load_calibration(inputs, model, most=samples)
    arrays = {name: np.asarray(array)[:samples] for name, array in _mapping(inputs, "calibration").items()}
    labels = arrays.pop("labels", None)
    return Calibration(tuple(batches_of(open_session(model), arrays, BATCH)), labels)


def as_feeds(inputs: Arrays | None, model: Path, batch: int, settings: Session) -> list[Mapping[str, np.ndarray]] | None:
    """Return inputs in batches of a size, as a session takes them; None where there are none."""
    if inputs is None:
        return None
    arrays = load_arrays(inputs) if isinstance(inputs, Path | str) else dict(_mapping(inputs, "inputs"))
    return list(batches_of(open_session(model, settings=settings), arrays, batch))


def as_labelled(data: Any, metric: str | None = None) -> Labelled | None:  # Any: see `Args`
    """Return labelled inputs.

    Args:
        data: an npz file or a mapping with arrays by input name and `labels`, a `Labelled`, or None.
        metric: `top1` (default), `top5` or `module:function`.

    Raises:
        ModelError: there are no labels, or a metric was given without data.

    """
    if data is None:
        if metric is not None:
            raise ModelError(f"metric {metric!r} scores labelled data, got no data: give data with labels as well")
        return None
    if isinstance(data, Labelled):
        return data
    if isinstance(data, Path | str):
        return Labelled.load(data, metric)
    arrays = dict(_mapping(data, "data"))
    if "labels" not in arrays:
        raise ModelError(f"data: expected an array 'labels' beside the inputs, found {', '.join(arrays) or 'none'}")
    labels = arrays.pop("labels")
    return Labelled(arrays, labels, metric or "top1")


def _mapping(arrays: Any, what: str) -> Mapping[str, Any]:  # Any: whatever was given
    """Return arrays by input name; `UsageError` for anything else, such as a single array."""
    if not isinstance(arrays, Mapping):
        raise UsageError(
            f"{what}: expected a path or arrays by input name, such as {{'image': array}}, got {type(arrays).__name__}"
        )
    return arrays


def require_writable(out: Path | str, *inputs: Any) -> Path:  # Any: models and data, of which paths count
    """Return a file that is to be written; `ModelError`, before any work, where it cannot be, or is one that is read."""
    out = Path(out)
    if out.is_dir() or not out.parent.is_dir():
        problem = "is a folder" if out.is_dir() else f"the folder {out.parent} does not exist"
        raise ModelError(f"{out}: cannot be written: {problem}; expected the name of a file in an existing folder")
    for source in inputs:
        path = Path(source) if isinstance(source, Path | str) else None
        if path is not None and path.exists() and out.exists() and out.samefile(path):
            raise ModelError(f"{out}: is also read, and would be lost: write to another file")
    return out
