"""When ADMM pays: the ways from a trained network to a small one, at equal epochs, on the same dense network.

    python benchmarks/admm.py train cifar100 --data data/cifar-100-python [--epochs 10] [--ratios 4 6] [--seeds 0 1 2]
    python benchmarks/admm.py train lstm --data data/spoken_digits [--ways cut admm …]
    python benchmarks/admm.py report -o results/admm.md
    python benchmarks/admm.py speed cifar100 [--ratios 4 6] [--pixels 32] -o results/admm-speed.md

Tasks: `cifar100`, a ResNet-20 trained for 60 epochs on 45,000 images (settings are chosen on the other 5,000 of the training
set, and the test images are looked at once a run, after its last epoch); `cifar100-16`, the same at 16×16 pixels, in a quarter
of the time; `lstm` and `transformer` on spoken digits, each seed with a dense network of its own, with the settings found on
images. Every way gets the same epochs after the dense phase. Runs stand in `--work` (default `runs/admm`) and go on from their
checkpoints; `report` reads the finished ones. `speed` times the networks of seed 0 in ONNX Runtime against the dense one, those
of a ratio in interleaved runs.
"""

from __future__ import annotations

import argparse
import json
import statistics
import tempfile
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from accelerate import Accelerator
from pages import write_results
from torch import nn

from tensorrail_exporter import Plan, decompose_graph, factorize
from tensorrail_exporter.graphs.io import save_model
from tensorrail_runtime.graphs.cost import cost
from tensorrail_runtime.measure.latency import bench
from tensorrail_runtime.measure.timing import Timing
from tensorrail_runtime.records import write_text
from tensorrail_runtime.sessions.machine import machine
from tensorrail_trainer.data import Dataset
from tensorrail_trainer.recipes.recipe import Recipe
from tensorrail_trainer.run.export import to_onnx
from tensorrail_trainer.run.folder import prepare
from tensorrail_trainer.run.phases import make_accelerator, train_all
from tensorrail_trainer.training.loop import evaluate

Settings = dict[str, Any]


@dataclass(frozen=True)
class Task:
    """A network and its data."""

    title: str
    """What the table calls it."""
    data: Settings
    """The recipe's `data`, without the folder."""
    model: Settings
    """The recipe's `model`."""
    layers: str
    """The layers to factor."""
    batch: int
    """Samples of a step."""
    steps: int
    """Steps between two updates of ADMM: a quarter of an epoch."""
    dense_epochs: int
    """Epochs of the dense network."""
    dense: Settings
    """Its optimizer."""
    optimizer: Settings
    """The optimizer of all that follows."""
    shared: Settings = field(default_factory=dict)
    """What all phases share."""
    ratios: tuple[float, ...] = (4.0,)
    """How many times fewer parameters the networks have."""
    validation: int = 0
    """Training samples that settings are chosen on."""


SGD: Settings = {"nesterov": True, "weight_decay": 5.0e-4}
ADAMW: Settings = {"optimizer": "adamw", "weight_decay": 0.05, "clip": 1.0}
TEACHER: Settings = {"weight": 0.5, "temperature": 4.0}
IMAGES: Settings = {
    "label_smoothing": 0.0,
    "augment": {"shift": 4, "flip": True, "border": "zero"},
    "precision": "bf16",
}
CIFAR100 = Task(
    "ResNet-20 on CIFAR-100",
    {"name": "cifar100", "args": {}},
    {"name": "resnet20"},
    "layer*.conv?",
    *(128, 88, 60),
    {"lr": 0.1, "warmup": 2.0, **SGD},
    {"lr": 0.03, **SGD},
    IMAGES,
    ratios=(4.0, 6.0),
    validation=5000,
)
TASKS: dict[str, Task] = {
    "cifar100": CIFAR100,
    "cifar100-16": replace(
        CIFAR100,
        title="ResNet-20 on CIFAR-100 at 16×16 pixels",
        data={"name": "halved:cifar100", "args": {}},
        model={"name": "resnet20", "args": {"classes": 100}},
        shared=IMAGES | {"augment": {"shift": 2, "flip": True, "border": "zero"}},
    ),
    "lstm": Task(
        "LSTM on spoken digits",
        {"name": "speech", "args": {"stack": 8}},
        {"name": "lstm", "args": {"hidden": 128}},
        "rnn.weight_ih_l0",
        *(32, 21, 40),
        {"lr": 1.0e-3, "warmup": 2.0, **ADAMW},
        {"lr": 1.0e-3, **ADAMW},
        ratios=(3.18,),  # rank 6; at most 3.37 with this layer alone, at rank 1
    ),
    "transformer": Task(
        "transformer on spoken digits",
        {"name": "speech", "args": {"stack": 2}},
        {"name": "encoder:encoder"},
        "blocks.*",
        *(32, 21, 40),
        {"lr": 1.0e-3, "warmup": 2.0, **ADAMW},
        {"lr": 3.0e-4, **ADAMW},
        ratios=(8.0, 12.0),  # at most 17.07, at rank 1
    ),
}


@dataclass(frozen=True)
class Way:
    """A way to the small network: what the table calls it, and its part of a recipe for a task, a ratio and epochs."""

    title: str
    recipe: Callable[[Task, float, int], Settings]


def _plan(task: Task, ratio: float, metric: str, form: str) -> list[Settings]:
    return [{"layers": task.layers, "format": form, "params": ratio, "metric": metric}]


def _cut(metric: str, form: str = "tt", **settings: Any) -> Callable[[Task, float, int], Settings]:
    """Cut the trained network, ranks and cores chosen by a metric, and train the cores for all epochs."""

    def recipe(task: Task, ratio: float, epochs: int) -> Settings:
        return {
            "plan": _plan(task, ratio, metric, form),
            "train": {"cut": metric, "finetune": {"epochs": epochs, **task.optimizer, **settings}},
        }

    return recipe


def _admm(ranks_by: str, share: float = 0.4, form: str = "tt", **settings: Any) -> Callable[[Task, float, int], Settings]:
    """Train toward low rank for a share of the epochs, then cut as `_cut` and train the cores.

    Without a `rho` it rises from 0.01 to 0.1, and Z and U are updated four times an epoch; other settings replace these.
    """

    def recipe(task: Task, ratio: float, epochs: int) -> Settings:
        first = round(share * epochs)
        rising = {} if "rho" in settings else {"rho": 0.01, "rho_end": 0.1, "every_steps": task.steps}
        admm = {"epochs": first, "decay": "constant", **task.optimizer, **rising, **settings}
        return {
            "plan": _plan(task, ratio, ranks_by, form),
            "train": {"cut": ranks_by, "admm": admm, "finetune": {"epochs": epochs - first, **task.optimizer}},
        }

    return recipe


WAYS: dict[str, Way] = {
    "control": Way("dense, trained on", lambda task, _, epochs: {"train": {"control": {"epochs": epochs, **task.optimizer}}}),
    "cut": Way("cut by weights", _cut("weight")),
    "cut-activation": Way("cut by activations", _cut("activation")),
    "cut-auto": Way("cut by activations, tt or svd", _cut("activation", "auto")),
    "published": Way("ADMM, rho 0.001, one update an epoch", _admm("weight", 0.5, rho=0.001, every=1)),
    "admm": Way("ADMM, rho rising", _admm("weight")),
    "admm-activation": Way("ADMM, rho rising, ranks and cut by activations", _admm("activation")),
    "admm-auto": Way("ADMM, rho rising, then cut by activations, tt or svd", _admm("activation", form="auto")),
    "admm-metric": Way("ADMM, rho rising, all in the metric of activations", _admm("activation", metric="activation")),
}
CHANGES: dict[str, Way] = {  # of one setting each; not among the ways that are trained by default
    "cut-activation-lr": Way("cut by activations, learning rate 0.08", _cut("activation", lr=0.08)),
    "cut-activation-decay": Way("cut by activations, weight decay 1e-4", _cut("activation", weight_decay=1.0e-4)),
    "admm-activation-short": Way("ADMM, ranks and cut by activations, a fifth of the epochs", _admm("activation", 0.2)),
    "admm-activation-often": Way(
        "ADMM, ranks and cut by activations, an update every 22 steps", _admm("activation", every_steps=22)
    ),
    "admm-activation-balance": Way(
        "ADMM, ranks and cut by activations, rho by residual balancing", _admm("activation", balance=True, rho_end=None)
    ),
}
EVERY_WAY = WAYS | CHANGES


def recipe_of(task: Task, name: str, data: str, seed: int, part: Settings, weights: Path | None) -> Recipe:
    """Return the recipe of a run; without weights it starts with the dense phase."""
    smallest = {"layers": task.layers, "format": "tt", "ranks": 1}
    train: Settings = {
        "batch": task.batch,
        **task.shared,
        "finetune": {"epochs": 1, **task.optimizer},
        "control": "none",
        **part["train"],
    }
    validation = {"validation": task.validation} if task.validation else {}
    return Recipe.model_validate(
        {
            "version": 1,
            "name": name,
            "seed": seed,
            "data": task.data | {"args": {"root": data, **task.data["args"], **validation}},
            "model": task.model | ({"weights": str(weights)} if weights else {}),
            "plan": part.get("plan", [smallest]),
            "train": train,
        }
    )


def one_run(recipe: Recipe, work: Path, test: Dataset, facts: Settings) -> Settings:
    """Train a recipe, or go on with it, and return its record, which its folder keeps as `outcome.json`."""
    folder = work / recipe.name
    record = folder / "outcome.json"
    prepare(recipe, folder, resume=(folder / "recipe.yaml").exists())  # refuses a folder of other settings
    if record.exists():
        kept: Settings = json.loads(record.read_text())
        return kept
    accelerator = make_accelerator(recipe)

    def progress(stage: str, share: float, detail: str = "") -> None:
        print(f"{recipe.name}: {stage} {detail}", flush=True)

    trained, data = train_all(recipe, folder, progress, accelerator)
    dense = facts["way"] in ("dense", "control") and trained.dense is not None
    network = trained.dense if dense and trained.dense is not None else trained.factored
    outcome = facts | {
        "params_ratio": _size(recipe.make_model(trained=False)) / _size(network),
        "cut": None if dense else trained.cut_accuracy,
        "validation": _accuracy(network, data, accelerator) if "validation" in recipe.data.args else None,
        "test": _accuracy(network, test, accelerator),
        "seconds": sum(row.seconds for row in trained.rows if row.phase in _counted(facts["way"])),
        "machine": machine().processor,
    }
    write_text(record, json.dumps(outcome, indent=1) + "\n")
    print(json.dumps(outcome), flush=True)
    return outcome


def _counted(way: str) -> tuple[str, ...]:
    """Return the phases whose time counts: those of the network in the table."""
    return {"dense": ("dense",), "control": ("control",)}.get(way, ("admm", "finetune"))


def _size(model: nn.Module) -> int:
    return sum(parameter.numel() for parameter in model.parameters())


def _accuracy(model: nn.Module, data: Dataset, accelerator: Accelerator) -> float:
    return evaluate(model, data.to(accelerator.device).test, accelerator, channels_last=True)


def train(options: argparse.Namespace) -> None:
    """Train the dense networks and every run that was asked for."""
    task = TASKS[options.task]
    if options.precision:
        task = replace(task, shared=task.shared | {"precision": options.precision})
    phase = {"epochs": options.dense_epochs or task.dense_epochs, **task.dense}
    for seed in options.seeds:
        first = 0 if task.validation else seed  # a long dense phase is shared by all seeds
        start = recipe_of(task, f"{options.task}-dense-{first}", options.data, first, {"train": {"dense": phase}}, None)
        without = {key: value for key, value in start.data.args.items() if key != "validation"}
        test = start.model_copy(update={"data": start.data.model_copy(update={"args": without})}).make_data()
        facts: Settings = {"task": options.task, "seed": first, "way": "dense", "ratio": 1.0, "epochs": 0}
        one_run(start, options.work, test, facts)
        weights = options.work / start.name / "dense.safetensors"
        for ratio in options.ratios or task.ratios:
            for way in options.ways:
                facts = {"task": options.task, "seed": seed, "way": way, "epochs": options.epochs}
                facts |= {"ratio": 1.0 if way == "control" else ratio, "teacher": options.teacher}
                name = f"{options.task}-{way}-{facts['ratio']:g}x-{options.epochs}-{seed}" + "-taught" * options.teacher
                part = EVERY_WAY[way].recipe(task, ratio, options.epochs)
                if options.teacher:
                    part["train"]["distill"] = TEACHER
                one_run(recipe_of(task, name, options.data, seed, part, weights), options.work, test, facts)


def _spread(values: Sequence[float | None]) -> str:
    known = [value for value in values if value is not None]
    if not known:
        return "–"
    return f"{statistics.mean(known):.2f}" + (f" ± {statistics.stdev(known):.2f}" if len(known) > 1 else "")


def table(outcomes: Sequence[Settings], task: str) -> list[str]:
    """Return the table of a task: mean and standard deviation over seeds of all finished runs."""
    groups: dict[tuple[int, bool, float, int], list[Settings]] = {}
    order = ["dense", *EVERY_WAY]
    for outcome in outcomes:
        if outcome["task"] == task:
            key = (outcome["epochs"], outcome.get("teacher", False), outcome["ratio"], order.index(outcome["way"]))
            groups.setdefault(key, []).append(outcome)
    split = "validation" if TASKS[task].validation else "test"
    columns = {"cut": f"right after the cut, {split}, %", "validation": "validation, %", "test": "test, %"}
    if not TASKS[task].validation:
        del columns["validation"]
    head = ["epochs", "teacher", "parameter reduction (×)", "way", "seeds", *columns.values(), "minutes"]
    lines = [f"## {TASKS[task].title}", "", f"| {' | '.join(head)} |", "|" + "---|" * len(head)]
    for (epochs, teacher, _, place), runs in sorted(groups.items()):
        way = order[place]
        cells = [
            *(str(epochs), "dense" if teacher else "none"),
            _spread([statistics.mean(outcome["params_ratio"] for outcome in runs)]),
            *("dense" if way == "dense" else EVERY_WAY[way].title, str(len(runs))),
            *(_spread([outcome[key] for outcome in runs]) for key in columns),
            f"{statistics.mean(outcome['seconds'] for outcome in runs) / 60:.1f}",
        ]
        lines.append(f"| {' | '.join(cells)} |")
    return lines


def report(options: argparse.Namespace) -> None:
    """Write the tables of all finished runs."""
    outcomes = [json.loads(path.read_text()) for path in sorted(options.work.glob("*/outcome.json"))]
    tasks = [task for task in TASKS if any(outcome["task"] == task for outcome in outcomes)]
    processors = ", ".join(sorted({outcome["machine"] for outcome in outcomes}))
    lines = [
        "# When ADMM pays",
        "",
        "Each row: `python benchmarks/admm.py train TASK --data FOLDER --epochs E --ratios R --seeds …`; then",
        f"`python benchmarks/admm.py report`. {processors}. Accuracies are of the last epoch, with the standard deviation",
        "over seeds. Epochs are those after the dense network; every way has the same. Minutes are those of these epochs.",
    ]
    for task in tasks:
        shared = "All seeds start from the same dense network." if TASKS[task].validation else ""
        lines += ["", *table(outcomes, task), *(["", shared] if shared else [])]
    print("\n".join(lines))
    if options.out:
        write_text(options.out, "\n".join(lines) + "\n")
        write_text(options.out.with_suffix(".json"), json.dumps(outcomes, indent=1) + "\n")


def speed(options: argparse.Namespace) -> None:
    """Time the networks of seed 0 against the dense one, with images of the data's size or of `--pixels`."""
    lines = [
        f"# Speed of the networks for {TASKS[options.task].title}",
        "",
        "`python benchmarks/admm.py speed`; in interleaved runs, in five fresh processes. Weights are those before training.",
        f"{machine().processor}, {machine().cores} cores.",
        "",
        "| parameter reduction (×) | way | batch | MACs reduction | speed-up | 95 % |",
        "|---|---|---|---|---|---|",
    ]
    records = []
    for ratio in options.ratios or TASKS[options.task].ratios:
        with tempfile.TemporaryDirectory() as folder:
            models = _networks(options, ratio, Path(folder))
            for batch in options.batches:
                timing = Timing(batch, seconds=options.seconds * len(models), processes=5)
                measured = bench(list(models.values()), timing, labels=list(models))
                macs = [cost(path, batch).macs for path in models.values()]
                for way, found, own in zip(list(models)[1:], measured.ratios, macs[1:], strict=True):
                    record = {"ratio": ratio, "way": way, "batch": batch, "macs": macs[0] / own, **found.model_dump()}
                    records.append(record)
                    lines.append(
                        f"| {ratio:g} | {EVERY_WAY[way].title} | {batch} | {macs[0] / own:.2f} | {found.value:.2f}× "
                        f"| {found.low:.2f}–{found.high:.2f} |"
                    )
                    print(lines[-1], flush=True)
    write_results(options.out, records, "\n".join(lines) + "\n")


def _networks(options: argparse.Namespace, ratio: float, folder: Path) -> dict[str, Path]:
    """Write the dense network, and that of each way, as ONNX files; return them by the names of the ways."""
    models: dict[str, Path] = {}
    for way in options.ways:
        run = options.work / f"{options.task}-{way}-{ratio:g}x-{options.epochs}-0"
        recipe, plan = Recipe.load(run / "recipe.yaml"), Plan.load(run / "plan.json")
        if not models:
            example = recipe.make_data().example(2)
            size = options.pixels or example.shape[-1]
            dense = to_onnx(recipe.make_model(), example.new_zeros(2, *example.shape[1:-2], size, size))
            models["dense"] = folder / "dense.onnx"
            save_model(dense, models["dense"])
        models[way] = folder / f"{way}.onnx"
        save_model(factorize(dense, plan, decompose_graph(dense, plan)).model, models[way])
    return models


def main() -> None:
    """Train, report or time, as the command line says."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    commands = parser.add_subparsers(required=True)
    training = commands.add_parser("train")
    training.set_defaults(call=train)
    training.add_argument("task", choices=list(TASKS))
    training.add_argument("--data", required=True)
    training.add_argument("--epochs", type=int, default=10)
    training.add_argument("--dense-epochs", type=int)
    training.add_argument("--ratios", type=float, nargs="+", help="Default: those of the task.")
    training.add_argument("--seeds", type=int, nargs="+", default=[0])
    training.add_argument("--ways", nargs="+", choices=list(EVERY_WAY), default=list(WAYS))
    training.add_argument("--teacher", action="store_true", help="The dense network teaches every phase after it.")
    training.add_argument("--precision", choices=["fp32", "bf16"], help="Default: that of the task.")
    reporting = commands.add_parser("report")
    reporting.set_defaults(call=report)
    reporting.add_argument("-o", "--out", type=Path)
    timing = commands.add_parser("speed")
    timing.set_defaults(call=speed)
    timing.add_argument("task", choices=[task for task in TASKS if task.startswith("cifar100")])
    timing.add_argument("--epochs", type=int, default=10)
    timing.add_argument("--ratios", type=float, nargs="+", help="Default: those of the task.")
    timing.add_argument("--ways", nargs="+", choices=list(EVERY_WAY), default=["cut", "cut-activation", "cut-auto"])
    timing.add_argument("--batches", type=int, nargs="+", default=[1, 32])
    timing.add_argument("--pixels", type=int, help="Height and width of the images. Default: those of the data.")
    timing.add_argument("--seconds", type=float, default=10.0, help="For each network at each batch size.")
    timing.add_argument("-o", "--out", type=Path, help="Without suffix: FILE.md and FILE.json are written.")
    for command in (training, reporting, timing):
        command.add_argument("--work", type=Path, default=Path("runs/admm"))
    options = parser.parse_args()
    options.call(options)


if __name__ == "__main__":
    main()
