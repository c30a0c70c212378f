"""`tensorrail check`: whether two models compute the same."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from tensorrail.options import Data, Json, Provider, Shape
from tensorrail.show import say, table

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    import numpy as np

Limit = Annotated[list[str] | None, typer.Option(metavar="[OUTPUT=]VALUE", help="May be given again, by output.")]


def command(
    reference: Annotated[Path, typer.Argument(metavar="A.onnx")],
    candidate: Annotated[Path, typer.Argument(metavar="B.onnx")],
    tolerance: Annotated[float, typer.Option(min=0, help="Largest relative L2 difference of any output.")] = 1e-4,
    rtol: Limit = None,
    atol: Limit = None,
    batch: Annotated[list[int] | None, typer.Option(min=1, help="Batch sizes to run; may be given again.")] = None,
    shape: Shape = None,
    data: Data = None,
    provider: Provider = "cpu",
    layers: Annotated[
        bool, typer.Option("--layers", help="Errors at every planned layer, approximation and numerical apart.")
    ] = False,
    plan: Annotated[Path | None, typer.Option(help="For --layers: plan.json.")] = None,
    cores: Annotated[Path | None, typer.Option(help="For --layers: cores.safetensors; without it A is decomposed.")] = None,
    json: Json = None,
) -> None:
    """Compare the outputs of two models on the same inputs, random or from a file. Exit code 1 when out of tolerance."""
    from tensorrail_runtime.errors import ModelError
    from tensorrail_runtime.measure.parity import Tolerances, parity
    from tensorrail_runtime.sessions.inputs import batches_of, load_arrays, parse_shapes, random_inputs
    from tensorrail_runtime.sessions.session import Session, open_session

    if layers and plan is None:
        raise ModelError("--layers compares at the planned layers: give --plan")
    for option, given in (("--plan", plan), ("--cores", cores)):
        if given is not None and not layers:
            raise ModelError(f"{option} is for --layers, which compares at the planned layers: give --layers as well")
    if data is not None and shape:
        raise ModelError("--shape is for random inputs, and --data has shapes of its own: give one of them")
    if len(batch or ()) > 1 and (shape or data is not None):
        raise ModelError(f"several --batch came, and {'--shape' if shape else '--data'} is run at one: give --batch once")
    settings = Session(provider=provider)
    session = open_session(reference, settings=settings)
    sizes = tuple(batch or (1, 7))
    if data is not None:
        feeds = batches_of(session, load_arrays(data), max(sizes))
    elif shape:
        feeds = [random_inputs(session, sizes[0], shapes=parse_shapes(shape))]
    else:
        feeds = [random_inputs(session, size) for size in sizes]
    held = Tolerances(tolerance, _limits(rtol), _limits(atol))
    result = parity(reference, candidate, inputs=feeds, tolerances=held, settings=settings)
    rows = [
        (
            o.name,
            f"{o.relative_l2:.2e}",
            f"{o.max_abs:.2e}",
            f"{o.mean_abs:.2e}",
            f"{o.cosine:.8f}",
            f"{list(o.worst_index)}",
            "–" if o.top1_agreement is None else f"{100 * o.top1_agreement:.1f} %",
            f"{o.smallest:.2e}",
            "yes" if o.holds else "NO",
        )
        for o in result.outputs
    ]
    table(
        f"{reference} against {candidate}, {_batches(result.batches)}",
        ("output", "relative L2", "max abs", "mean abs", "cosine", "worst at", "top-1 agreement", "would pass", "holds"),
        rows,
    )
    if layers and plan is not None:
        _layers(reference, candidate, plan, cores, feeds, tolerance, settings.provider)
    how = f"tolerance {tolerance:g}" if not (rtol or atol) else "the element tolerances"
    verdict = "within" if result.holds else "OUT OF"
    say(f"{verdict} {how}; the smallest that would pass is {max(o.smallest for o in result.outputs):.2e}")
    if json is not None:
        result.save(json)
    raise typer.Exit(0 if result.holds else 1)


def _batches(sizes: Sequence[int]) -> str:
    shown = ", ".join(map(str, sizes[:4]))
    return f"batches of {shown}" if len(sizes) <= 4 else f"{sum(sizes)} samples in {len(sizes)} batches"


def _layers(
    dense: Path,
    factored: Path,
    plan: Path,
    cores: Path | None,
    feeds: Sequence[Mapping[str, np.ndarray]],
    tolerance: float,
    provider: str,
) -> None:
    from tensorrail_exporter.graphs.io import load_model
    from tensorrail_exporter.plans.cores import load_cores
    from tensorrail_exporter.plans.plan import Plan
    from tensorrail_exporter.rewrite.layer_errors import layer_errors
    from tensorrail_exporter.rewrite.rewriter import decompose_graph
    from tensorrail_runtime.sessions.session import Session

    model, read = load_model(dense), Plan.load(plan)
    found = load_cores(cores, read) if cores else decompose_graph(model, read)
    errors = layer_errors(model, load_model(factored), read, found, feeds, Session(provider=provider))
    rows = [(e.layer, *("–" if value is None else f"{value:.2e}" for value in (e.approximation, e.numerical))) for e in errors]
    table("up to each layer's output", ("layer", "approximation", "numerical"), rows)
    first = next((e.layer for e in errors if e.numerical is not None and e.numerical > tolerance), None)
    text = f"they part first at {first}" if first else f"no layer parts by more than {tolerance:g} numerically"
    say(text)


def _limits(texts: Sequence[str] | None) -> dict[str, float]:
    from tensorrail_runtime.errors import ModelError

    found = {}
    for text in texts or []:
        name, _, value = text.rpartition("=")
        try:
            found[name] = float(value)
        except ValueError:
            raise ModelError(f"a tolerance is written as 1e-4 or output=1e-4, and {text!r} came") from None
    return found
