"""A whole run: dense training → ADMM → cores → fine-tuning → dense control → ONNX → checks → benchmark → report.

The folder of a run holds `recipe.yaml`, `checkpoints/`, `plan.json`, `cores.safetensors`, the graphs and the report.
`dense.onnx` is the fine-tuned network in dense form, with every planned weight reconstructed from its cores; `model.onnx` is
made of it, the plan and the cores. `control.onnx` is the dense network after as many further epochs without a constraint, with
which the factored network is compared. If the recipe has no control, `baseline.onnx` is the trained dense network, if there is
one.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path

import onnx

from tensorrail_exporter.graphs.io import save_model
from tensorrail_exporter.plans.plan import Plan
from tensorrail_exporter.rewrite.rewriter import Factored, factorize, reconstruct
from tensorrail_exporter.search.fastest_form import Form, factorize_fastest
from tensorrail_runtime.errors import PlanError
from tensorrail_runtime.graphs.cost import cost
from tensorrail_runtime.measure.accuracy import accuracy_of
from tensorrail_runtime.measure.latency import LatencyReport, bench
from tensorrail_runtime.measure.parity import Parity, parity
from tensorrail_runtime.measure.placement import Placement, placement, time_shares
from tensorrail_runtime.measure.timing import Timing
from tensorrail_runtime.progress import Progress, silent
from tensorrail_runtime.records import write_text
from tensorrail_runtime.scratch import scratch
from tensorrail_runtime.sessions.session import Session
from tensorrail_trainer.data import Dataset
from tensorrail_trainer.data.splits import arrays
from tensorrail_trainer.layers.swap import swap, to_dense
from tensorrail_trainer.recipes.recipe import Bench, Export, Recipe
from tensorrail_trainer.run.export import Tracing
from tensorrail_trainer.run.folder import check, prepare, remove_logs
from tensorrail_trainer.run.phases import Trained, core_arrays, make_accelerator, train_all
from tensorrail_trainer.run.render import html, markdown
from tensorrail_trainer.run.report import Check, DenseRow, LayerRow, Model, Report
from tensorrail_trainer.run.tracking import Tracking


def export_all(
    trained: Trained, data: Dataset, folder: Path, temporary: Path, form: Export, progress: Progress
) -> tuple[Factored, dict[str, Path]]:
    """Export `dense.onnx`, `model.onnx` and the network to compare with.

    Args:
        trained: the trained networks.
        data: the data set, for an example input.
        folder: the folder of the run.
        temporary: a folder for `before cut` and `after cut`, which are only used to measure the approximation error.
        form: the form in which the cores run.
        progress: is told of layers that stay dense.

    Returns:
        The factored graph, and the paths of the graphs by label.

    """
    example = data.example()
    tracing = Tracing(to_dense(trained.factored), example)  # the other networks differ only in their weights
    dense = tracing.graph()
    save_model(dense, folder / "dense.onnx")
    paths = {"dense form": folder / "dense.onnx", "factored": folder / "model.onnx"}
    if trained.dense is not None:
        name = "control.onnx" if trained.reference == "dense control" else "baseline.onnx"
        paths = {trained.reference: folder / name, **paths}
        save_model(tracing.graph(trained.dense), folder / name)
    factored = _in_form(dense, trained, form, progress)
    save_model(factored.model, folder / "model.onnx")
    paths |= {"before cut": temporary / "before_cut.onnx", "after cut": temporary / "after_cut.onnx"}
    graph = tracing.graph(trained.uncut)
    save_model(graph, paths["before cut"])
    cut = swap(to_dense(trained.uncut), trained.plan, roots=trained.roots)
    save_model(reconstruct(graph, trained.plan, core_arrays(cut)), paths["after cut"])
    return factored, paths


def _in_form(dense: onnx.ModelProto, trained: Trained, form: Export, progress: Progress) -> Factored:
    """Return the factored graph in the form that the recipe asks for."""
    cores = core_arrays(trained.factored)
    try:
        chosen = Form(block=form.block, dense_if_slower=form.dense_if_slower, batch=form.batch)
        factored, slower = factorize_fastest(dense, trained.plan, cores, chosen)
    except PlanError as error:  # export and report the trained cores anyway
        progress("note", 1.0, str(error))
        return factorize(dense, trained.plan, cores, block=form.block if isinstance(form.block, int) else 1)
    if slower.layers:
        progress(
            "note",
            1.0,
            f"kept dense, since no form of their cores is faster here: {', '.join(layer.name for layer in slower.layers)}",
        )
    return factored


def run(
    recipe: Recipe,
    folder: Path,
    *,
    resume: bool = False,
    overwrite: bool = False,
    progress: Progress = silent,
    command: str = "tensorrail run",
    track: Sequence[str] = (),
) -> Report | None:
    """Do a whole run, and write its report to the folder as `report.json`, `report.md` and `report.html`.

    Args:
        recipe: the recipe.
        folder: the folder of the run.
        resume: continue the run in the folder; default False.
        overwrite: delete the run in the folder and start again; default False.
        progress: is told of the progress, in the first process alone; default: nothing is shown.
        command: the command line that the report names.
        track: what the run is logged to, of `TRACKERS`; default: nothing.

    Returns:
        The report, or None in all processes but the first one, which measures.

    Raises:
        RecipeError: the folder holds another run, or the recipe does not fit.
        TrainingError: the training failed.
        CheckpointError: a checkpoint cannot be read or written.

    """
    with training(recipe, folder, resume=resume, overwrite=overwrite, progress=progress, track=track) as (trained, data, logs):
        if not logs.accelerator.is_main_process:
            return None
        report = _measured(recipe, folder, trained, data, command, progress)
        logs.report(report, len(trained.rows))
    return report


@contextmanager
def training(
    recipe: Recipe,
    folder: Path,
    *,
    resume: bool = False,
    overwrite: bool = False,
    progress: Progress = silent,
    track: Sequence[str] = (),
) -> Iterator[tuple[Trained, Dataset, Tracking]]:
    """Carry out the training of a recipe; the arguments are those of `run`.

    Nothing is written or deleted before the data are read and samples have run through all networks.

    Yields:
        The trained networks, the data set, and what logs the run, which ends with the `with` statement.

    """
    accelerator = make_accelerator(recipe, folder, track)
    first = accelerator.is_main_process
    told = progress if first else silent
    if first:
        check(recipe, folder, resume=resume, overwrite=overwrite)
    with Tracking(accelerator, recipe, track, told) as tracking:

        def begin() -> None:
            if first and overwrite:
                remove_logs(folder)
            tracking.start()  # a tracker that cannot be used leaves the run in the folder as it is
            if first:
                prepare(recipe, folder, resume=resume, overwrite=overwrite)
            accelerator.wait_for_everyone()

        yield *train_all(recipe, folder, told, accelerator, tracking, begin), tracking


def _measured(recipe: Recipe, folder: Path, trained: Trained, data: Dataset, command: str, progress: Progress) -> Report:
    """Export and measure the trained networks, and write the report."""
    sample = data.example(33).numpy()
    feeds = [{"image": sample[:1]}, {"image": sample[1:]}]
    with scratch() as temporary:
        progress("exporting to ONNX", 0.0)
        factored, paths = export_all(trained, data, folder, Path(temporary), recipe.export, progress)
        progress("checking parity and accuracy in ONNX Runtime", 0.0)
        approximation = parity(paths.pop("before cut"), paths.pop("after cut"), inputs=feeds, tolerance=None)
    numerical = parity(paths["dense form"], paths["factored"], inputs=feeds, tolerance=recipe.targets.numerical_error)
    models = tuple(
        Model(label=label, cost=cost(path), accuracy=accuracy_of(path, arrays(data.test))) for label, path in paths.items()
    )
    latency = _latency(recipe.bench, paths, progress)
    placed = placement(paths["factored"])
    report = Report(
        name=recipe.name,
        data="; ".join((data.source, *data.left_out)),
        command=command,
        models=models,
        approximation=approximation,
        numerical=numerical,
        latency=latency,
        placement=placed,
        layers=_layer_rows(factored, paths["factored"], placed),
        dense=_dense_rows(recipe, trained.plan, factored),
        training=trained.rows,
        cut_accuracy=trained.cut_accuracy,
        checks=_checks(recipe, models, numerical, latency),
    )
    report.save(folder / "report.json")
    write_text(folder / "report.md", markdown(report))
    write_text(folder / "report.html", html(report))
    return report


def _latency(settings: Bench, paths: Mapping[str, Path], progress: Progress) -> tuple[LatencyReport, ...]:
    """Time the first network and the factored one at each batch size.

    They run in new processes: after training, this process would time one of the models too slow.
    """
    compared = (next(iter(paths)), "factored")
    return tuple(
        bench(
            [paths[label] for label in compared],
            Timing(batch, seconds=settings.seconds, processes=settings.processes),
            Session(threads=settings.threads),
            labels=compared,
            progress=lambda _, share, detail="", batch=batch: progress(f"measuring latency at batch {batch}", share, detail),
        )
        for batch in settings.batches
    )


def _layer_rows(factored: Factored, path: Path, placed: Placement) -> tuple[LayerRow, ...]:
    """Return the rewritten layers with their shares of the time of the factored network."""
    shares = time_shares(path, placed, [row.layer for row in factored.layers])
    return tuple(
        LayerRow(**row.model_dump(include=set(LayerRow.model_fields)), time_share=shares[row.layer]) for row in factored.layers
    )


def _dense_rows(recipe: Recipe, plan: Plan, factored: Factored) -> tuple[DenseRow, ...]:
    """Return the layers that the rules of a recipe match and that are exported dense, with the reasons."""
    rewritten, planned = {row.layer for row in factored.layers}, {layer.name for layer in plan.layers}
    matched = (layer.name for layer in recipe.plannable(recipe.make_model(trained=False)).layers)
    slower, larger = "no form of its cores is faster here", "the ranks for the size of the whole network leave it dense"
    return tuple(
        DenseRow(layer=name, reason=slower if name in planned else larger) for name in matched if name not in rewritten
    )


def _checks(
    recipe: Recipe, models: tuple[Model, ...], numerical: Parity, latency: tuple[LatencyReport, ...]
) -> tuple[Check, ...]:
    """Compare accuracy, parameters, numerical error and latency with the targets of the recipe."""
    target = recipe.targets
    dense, factored = models[0], models[-1]
    drop = dense.accuracy.percent - factored.accuracy.percent
    params = dense.cost.params / factored.cost.params
    checks = [
        Check(
            name=f"accuracy against the {dense.label}",
            target=f"≥ −{target.accuracy_drop} points",
            measured=f"{0.0 - drop:+.2f} points",
            holds=drop <= target.accuracy_drop,
        ),
        Check(
            name="parameters of the whole network",
            target=f"÷ {target.params_ratio} or more",
            measured=f"÷ {params:.2f}",
            holds=params >= target.params_ratio,
        ),
        Check(
            name="numerical error, relative",
            target=f"≤ {target.numerical_error:.0e}",
            measured=f"{numerical.worst:.2e}",
            holds=numerical.holds,
        ),
    ]
    for measured in latency:
        ratio = measured.ratios[0]
        checks.append(
            Check(
                name=f"speed-up at batch {measured.batch}",
                target=f"≥ {target.speedup}×, interval above 1",
                measured=f"{ratio.value:.2f}× [{ratio.low:.2f}, {ratio.high:.2f}]",
                holds=ratio.value >= target.speedup and ratio.low > 1,
            )
        )
    return tuple(checks)
