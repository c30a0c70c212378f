"""`tensorrail.accuracy`: a metric over a data set, and whether two models really differ in it."""

from __future__ import annotations

from contextlib import ExitStack
from typing import Any

from tensorrail.inputs import as_labelled
from tensorrail.models import as_file
from tensorrail.options import Options
from tensorrail_runtime.errors import ModelError
from tensorrail_runtime.measure.accuracy import Comparison, Evaluation, compare_scores, evaluate

_BATCH = 64


def accuracy(
    reference: Any,  # a path, a ModelProto, or (module, example inputs)
    candidate: Any = None,  # likewise
    *,
    data: Any,  # a path, arrays by input name and `labels`, or a Labelled
    metric: str | None = None,
    options: Options | None = None,
) -> Evaluation | Comparison:
    """Score one model on labelled data, or two on the same samples with a paired test.

    Args:
        reference: the model to score: a path, an `onnx.ModelProto`, or (torch module, example inputs).
        candidate: a second model, which is compared with the first.
        data: an npz file, a folder of them, or arrays by input name, with `labels`.
        metric: `top1` (default), `top5`, or `module:function` of (outputs, labels) that returns one score a sample.
        options: `session`, `inputs`, `progress`, and `timing` for the batch size (default 64).

    Returns:
        The scores of one model, or the comparison of two; `print(report)` shows the table.

    Raises:
        ModelError: a model does not run, or data do not fit it.

    """
    options = options or Options()
    labelled = as_labelled(data, metric, options.inputs)
    if labelled is None:
        raise ModelError("data: expected inputs with labels, got none")
    batch = options.timing.batch if options.timing else _BATCH
    with ExitStack() as files:
        models = [("reference", reference), *([] if candidate is None else [("candidate", candidate)])]
        scores = [
            evaluate(
                files.enter_context(as_file(model, name)),
                labelled,
                batch=batch,
                settings=options.session,
                on_batch=lambda share, name=name: options.progress(f"scoring the {name}", share),  # type: ignore[misc]
            )
            for name, model in models
        ]
    return scores[0] if candidate is None else compare_scores(*scores)
