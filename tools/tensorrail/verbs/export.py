"""`tensorrail.export`: a dense graph and a plan become a factored graph."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from tensorrail.contrib import without_contrib
from tensorrail.inputs import require_writable
from tensorrail.models import as_graph
from tensorrail.options import Options
from tensorrail_runtime.errors import PlanError

if TYPE_CHECKING:
    import numpy as np
    import onnx

    from tensorrail_exporter.plans.plan import Plan
    from tensorrail_exporter.rewrite.rewriter import Rewrites
    from tensorrail_exporter.search.fastest_form import Form


def export(
    model: Any,  # a path, a ModelProto, or (module, example inputs)
    out: Path | str,
    plan: Plan | Path | str,
    *,
    cores: Mapping[str, Sequence[np.ndarray]] | Path | str | None = None,
    form: Form | None = None,
    options: Options | None = None,
) -> Rewrites:
    """Rewrite every planned layer of a dense model to the contraction of its cores, and write the factored model to `out`.

    A plan for fp16 gives a model in fp16; one for int8, whose ranges need typical inputs, gives a model in fp32. Where forms
    of the cores are timed, they are timed in the precision of the plan.

    Args:
        model: the dense model: a path, an `onnx.ModelProto`, or (torch module, example inputs).
        out: the file to write.
        plan: the layers, formats, modes and ranks, or the file of them.
        cores: the cores of each layer by its name, or the file of them; default: the model's own weights are decomposed.
        form: which forms of the cores may be chosen, and the shapes of inputs; default: the cores as they are.
        options: `session`, `contrib` and `progress`.

    Returns:
        What was done to each layer; `print(report)` shows the table.

    Raises:
        PlanError: the plan names no layer, or modes, ranks or cores do not fit.
        GraphError: a planned layer is not in the model, or cannot be rewritten; or the model cannot be converted to fp16.

    """
    from tensorrail_exporter.graphs.io import save_model
    from tensorrail_exporter.graphs.joint import without_inner_shapes
    from tensorrail_exporter.plans.cores import load_cores
    from tensorrail_exporter.plans.plan import Plan
    from tensorrail_exporter.rewrite.narrowed_heads import narrowed_heads
    from tensorrail_exporter.rewrite.rewriter import Rewrites, decompose_graph
    from tensorrail_exporter.rewrite.survey import with_known_axes
    from tensorrail_exporter.search.fastest_form import Form, factorize_fastest
    from tensorrail_runtime.measure.fusions import compared_fusions
    from tensorrail_runtime.records import is_stream
    from tensorrail_runtime.scratch import scratch

    options = options or Options()
    require_writable(out, model, plan, cores)
    form = form or Form()
    graph = with_known_axes(as_graph(model), form.batch, form.shapes)  # an attention is written only if its mask's are known
    if not options.contrib:
        graph = with_known_axes(without_contrib(graph, options.progress), form.batch, form.shapes)
    read = plan if isinstance(plan, Plan) else Plan.load(plan)
    if not read.changes and read.precision != "fp16":
        raise PlanError(f"{'the plan' if plan is read else plan}: changes nothing: it names no layer")
    if read.heads:
        _require_same_heads(graph, read, form, options)
    if cores is None:
        cores = decompose_graph(graph, read)
    elif isinstance(cores, Path | str):
        cores = load_cores(cores, read)
    factored, dense_again = factorize_fastest(graph, read, cores, form, settings=options.session, progress=options.progress)
    written = _in_precision(factored.model, read, out, form, options)
    written = written if read.inner_shapes else without_inner_shapes(written)
    save_model(written, Path(out))
    with scratch() as folder:
        dense = Path(model) if isinstance(model, Path | str) else Path(folder) / "dense.onnx"
        if not isinstance(model, Path | str):
            save_model(graph, dense)
        there = Path(out)
        if is_stream(there):  # what went into a pipe cannot be read
            there = Path(folder) / "written.onnx"
            save_model(written, there)
        fusions = compared_fusions(dense, there, options.session)
    heads = narrowed_heads(graph, read.heads)
    return Rewrites(layers=factored.layers, dense=dense_again.layers, heads=heads, fusions=fusions, model=str(out))


def _require_same_heads(graph: onnx.ModelProto, plan: Plan, form: Form, options: Options) -> None:
    """Raise `GraphError` if the outputs differ when the heads of a plan are written anew at their full size."""
    from tensorrail_exporter.graphs.io import save_model
    from tensorrail_exporter.rewrite.narrowed_heads import heads_error
    from tensorrail_runtime.scratch import scratch

    exact = options.session.exact
    with scratch() as folder:
        dense = Path(folder) / "dense.onnx"
        save_model(graph, dense)
        heads_error(dense, graph, plan.heads, [_random_feed(graph, form, options)], exact)


def _in_precision(model: onnx.ModelProto, plan: Plan, out: Path | str, form: Form, options: Options) -> onnx.ModelProto:
    """Return a factored model in the precision of its plan, or in fp32 where that needs typical inputs; a note says what it is.

    Values that leave the range of fp16 are looked for with random inputs.
    """
    from tensorrail_exporter.precision.planned import PRECISIONS, require_kept

    own = PRECISIONS[plan.precision]
    if own.converter is None:
        return model
    named = ", ".join(plan.fp32)
    if own.needs_inputs:
        kept = f", and keep these in fp32: {named}" if named else ""
        options.progress(
            "note", 1.0, f"the plan is for {plan.precision}, and {out} is fp32: convert it with `tensorrail quantize`{kept}"
        )
        return model
    with own.converter(model, [_random_feed(model, form, options)]) as convert:
        require_kept(convert.model, plan.fp32)
        converted = convert(plan.fp32)
        kept = f", but for {names}" if (names := ", ".join(dict.fromkeys((*plan.fp32, *convert.kept)))) else ""
    options.progress(
        "note", 1.0, f"{out} is in {plan.precision} as the plan says{kept}; overflow was looked for with random inputs alone"
    )
    return converted


def _random_feed(model: onnx.ModelProto, form: Form, options: Options) -> Mapping[str, np.ndarray]:
    from tensorrail_exporter.graphs.io import save_model
    from tensorrail_runtime.scratch import scratch
    from tensorrail_runtime.sessions.inputs import random_inputs
    from tensorrail_runtime.sessions.session import open_session

    with scratch() as folder:
        path = Path(folder) / "model.onnx"
        save_model(model, path)
        return random_inputs(open_session(path, settings=options.session.exact), form.batch, shapes=form.shapes)
