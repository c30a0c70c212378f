"""`tensorrail.bench`: interleaved latency of several models."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import replace
from pathlib import Path
from typing import Any

from tensorrail.inputs import as_batches, timed_on
from tensorrail.models import as_file
from tensorrail.options import Options
from tensorrail_runtime.errors import UsageError
from tensorrail_runtime.measure import latency
from tensorrail_runtime.measure.footprint import footprint
from tensorrail_runtime.measure.latency import LatencyReport
from tensorrail_runtime.measure.timing import Timing


def bench(
    models: Sequence[Any],  # each a path, a ModelProto, or (module, example inputs)
    *,
    data: Any = None,  # a path, arrays by input name, or a Calibration
    memory: bool = False,
    labels: Sequence[str] | None = None,
    options: Options | None = None,
) -> LatencyReport:
    """Time models in interleaved runs (A B B A) and return the speed-up over the first with a 95 % interval.

    Args:
        models: paths, `onnx.ModelProto`s, or (torch module, example inputs); the first one is the reference.
        data: typical inputs, of which the first ones are timed: an npz file, a folder, or arrays by input name; default: random
            ones.
        memory: also measure load time and peak memory, each model in a process of its own.
        labels: names of the models in the report; default: those of their files.
        options: `session`, `timing`, `inputs` and `progress`. With IO binding and no CUDA graph, latency with transfers is
            measured as well.

    Returns:
        Every sample, percentiles and ratios; `print(report)` shows the table.

    Raises:
        ModelError: a model does not run, or inputs do not fit it.
        UsageError: `models` is a single path.

    """
    options = options or Options()
    timing, settings = options.timing or Timing(), options.session
    if isinstance(models, str | Path):
        raise UsageError(f"models: expected a list of models, such as [{str(models)!r}], got one path")
    with ExitStack() as files:
        paths: list[Path] = [files.enter_context(as_file(model, f"model{number}")) for number, model in enumerate(models)]
        typical = as_batches(data, paths[0], timing.batch, settings.exact, options.inputs) if paths else None
        if paths:
            timing = timed_on(timing, paths[0], settings.exact, options.inputs, typical)
        report = latency.bench(paths, timing, settings, labels=labels, progress=options.progress)
        if timing.io_binding and not settings.cuda_graph:
            copied = replace(timing, io_binding=False)
            other = latency.bench(paths, copied, settings, labels=labels, progress=options.progress)
            report = report.model_copy(update={"with_transfers": other})
        if memory:
            taken = [
                footprint(path, settings=settings, batch=timing.batch, shapes=timing.shapes, values=timing.values)
                for path in paths
            ]
            report = report.model_copy(update={"footprints": tuple(taken)})
    return report
