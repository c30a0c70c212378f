"""Exported models on an NVIDIA GPU: placement, parity, plans, latency, training, and the regression gate.

    make bench-gpu
    python benchmarks/gpu.py [--sections plan placement latency training gate] [--networks resnet18 …] [--batches 64 1 8 256]
        [--minutes 25] [--resume] [--recipes recipes/a.yaml …] [-o results]

Writes `<out>/gpu-<name>.json` and `.md` after every measurement, so that a machine that is lent for minutes is used to its last
one; `--resume` goes on from what is there. What a machine lacks is left out, with the reason. `--provider cpu` is a dry run of
the same steps where there is no GPU; its results are called that. Weights are random: times do not depend on them.

- plan: what `tensorrail plan --provider cuda` makes at the first of a few FLOPs targets that can be met, for each rank grid.
- placement: where every node ran, read from the profile; the relative L2 difference from the dense form on the CPU.
- latency: dense, published ranks and plans interleaved, in fresh processes, inputs and outputs on the device, beside the bound
  that the card's measured bandwidth and arithmetic set (roofline.py).
- training: seconds an epoch of ResNet-20 on CIFAR-100 (needs `--data`); then the recipes given, for as long as time is left.
- gate: `benchmarks/gate.py --provider cuda`, shorter.

Anchor: TDC (Xiang et al., PPoPP 2023) reports up to 3.27 times over cuDNN for Tucker-2 convolutions on an A100, with kernels of
its own; here every kernel is ONNX Runtime's.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import re
import shlex
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import networks
import numpy as np
import onnx
import torch
import yaml
from gpu_page import Log, markdown
from roofline import Peaks, bound_ms, peaks

from tensorrail_exporter import FORMATS, GraphError, Plan, PlanError, factorize
from tensorrail_exporter.graphs.io import save_model
from tensorrail_exporter.precision.fp16 import to_fp16
from tensorrail_exporter.rewrite.rewriter import reconstruct
from tensorrail_exporter.rewrite.survey import survey
from tensorrail_exporter.search.latency_table import LatencyTable
from tensorrail_exporter.search.options import options_of
from tensorrail_exporter.search.planner import plan_network
from tensorrail_exporter.search.targets import Search
from tensorrail_exporter.search.verification import random_cores
from tensorrail_runtime.errors import ModelError
from tensorrail_runtime.graphs.cost import cost
from tensorrail_runtime.measure.latency import bench as time_models
from tensorrail_runtime.measure.parity import Tolerances, compare
from tensorrail_runtime.measure.placement import placement
from tensorrail_runtime.measure.timing import Conditions, Timing
from tensorrail_runtime.records import write_text
from tensorrail_runtime.sessions.inputs import random_inputs
from tensorrail_runtime.sessions.machine import machine
from tensorrail_runtime.sessions.session import SEARCHES, Session, open_session, run
from tensorrail_trainer.planning.published import PUBLISHED
from tensorrail_trainer.training.epochs import TrainingLog, projection_share

ROOT = Path(__file__).parents[1]
SECTIONS = ("plan", "placement", "latency", "training", "gate")
TARGETS = {  # how many times fewer FLOPs; the first that can be met with layers that are all faster
    "resnet18": (2.5, 2.0, 1.5),
    "resnet50": (2.5, 2.0, 1.5),
    "resnet20": (2.0, 1.5, 1.25),
    "vit_tiny": (2.0, 1.5, 1.25),
    "lstm": (10.0, 4.0, 2.0),
}
GRIDS = {"resnet18": (8, 16, 32, 64)}  # the others: the GPU's own
SMALL = 2  # the batch of placement and parity
ENDED = "ended"
EPOCHS = {"dense": 2, "admm": 2, "finetune": 1}


@dataclass(frozen=True)
class Mode:
    """How a model runs. fp16 is a file of its own; the rest are settings of the session."""

    precision: str = "fp32"
    nhwc: bool = False
    graph: bool = False

    @property
    def name(self) -> str:
        """As it stands in the tables."""
        return ", ".join([self.precision, "NHWC" if self.nhwc else "NCHW", *(["CUDA graph"] if self.graph else [])])

    def settings(self, provider: str) -> Session:
        """Return what a session is opened with."""
        return Session(provider=provider, tf32=self.precision == "tf32", nhwc=self.nhwc, cuda_graph=self.graph)


PLANNED = Mode("tf32", nhwc=True)  # what plans are made for


def modes(provider: str) -> tuple[Mode, ...]:
    """Return every mode, the likeliest to be served first; a CPU has neither TF32 nor graphs, and its layout is its own."""
    if provider == "cpu":
        return Mode(), Mode("fp16")
    layouts = [(nhwc, graph) for graph in (False, True) for nhwc in (False, True)]
    return tuple(Mode(precision, nhwc, graph) for precision in ("tf32", "fp16", "fp32") for nhwc, graph in layouts)


class Bench:
    """What was measured so far, and where it is written."""

    def __init__(self, options: argparse.Namespace) -> None:
        self.options = options
        self.provider: str = options.provider
        self.end = time.monotonic() + 60 * options.minutes
        where = machine(gpu=self.provider != "cpu")
        self.device = where.gpu.name if where.gpu is not None else where.processor
        word = re.sub(r"[^a-z0-9]+", "-", self.device.lower()).strip("-") if self.provider != "cpu" else "dry-run"
        self.stem: Path = options.out / f"gpu-{word.removeprefix('nvidia-')}"
        self.log: Log = {"version": 1, "machine": where.model_dump(mode="json"), "provider": self.provider, "notes": []}
        self.log |= {"commands": [], "layers": []}
        self.log |= {section: [] for section in SECTIONS}
        for folder in (options.out, options.folder):
            folder.mkdir(parents=True, exist_ok=True)
        before = self.stem.with_suffix(".json")
        if options.resume and before.exists():
            self.log |= json.loads(before.read_text())
        self.log["commands"].append(shlex.join(sys.argv[1:]))
        self._card: Peaks | None = None

    @property
    def late(self) -> bool:
        """Whether the time is over."""
        return time.monotonic() > self.end

    def rest(self) -> float:
        """Return the seconds that are left."""
        return max(1.0, self.end - time.monotonic())

    def add(self, section: str, row: Log) -> None:
        """Keep a row, and write all of them."""
        self.log[section].append(row)
        print(f"{section}: { ({key: value for key, value in row.items() if key != 'plan'}) }", flush=True)
        self.write()

    def note(self, text: str) -> None:
        """Keep a line about what was not measured, or not well."""
        if text not in self.log["notes"]:
            self.log["notes"].append(text)
            print(text, flush=True)
            self.write()

    def has(self, section: str, **keys: Any) -> bool:
        """Whether such a row is there already."""
        return any(all(row.get(key) == value for key, value in keys.items()) for row in self.log[section])

    def card(self) -> Peaks | None:
        """Return what the card gives, measured once; None where torch has no GPU."""
        device = "cpu" if self.provider == "cpu" else "cuda"
        if self._card is None and (device == "cpu" or torch.cuda.is_available()):
            self._card = peaks(device)
            self.log["peaks"] = asdict(self._card)
        return self._card

    def modes(self) -> tuple[Mode, ...]:
        """Return the modes to time: those asked for, in the order in which they were, or all."""
        known = self.known()
        return tuple(known[name] for name in self.options.modes or known)

    def known(self) -> dict[str, Mode]:
        """Return every mode of the provider by its name."""
        return {mode.name: mode for mode in modes(self.provider)}

    def write(self) -> None:
        """Write the record and its page, each whole or not at all."""
        write_text(self.stem.with_suffix(".json"), json.dumps(self.log, indent=1) + "\n")
        write_text(self.stem.with_suffix(".md"), markdown(self.log))

    def dense(self, name: str) -> Path:
        """Return the path of a network's dense form, written when it is not there."""
        path: Path = self.options.folder / name / f"{name}.onnx"
        return path if path.exists() else networks.write(name, path.parent)

    def plans(self, name: str) -> dict[str, Plan]:
        """Return the published plan, where there is one, and those that were made here."""
        found = {}
        if (name, 3) in PUBLISHED:
            found["published"] = networks.published_plan(name)
        for row in self.log["plan"]:
            if row["network"] == name and row["plan"] is not None:
                found[f"planned, grid {row['grid']}"] = Plan.model_validate(row["plan"])
        return found

    def forms(self, name: str, precision: str) -> dict[str, Path]:
        """Return the files of a network's forms in a precision, dense first, written when they are not there."""
        dense = self.dense(name)
        paths = {"dense": dense}
        for label, plan in self.plans(name).items():
            # Named by what the plan says: one that was made anew is another file.
            digest = hashlib.sha256(plan.model_dump_json().encode()).hexdigest()[:8]
            paths[label] = dense.with_name(f"{_slug(label)}-{digest}.onnx")
            if not paths[label].exists():
                model = onnx.load(dense)
                save_model(factorize(model, plan, random_cores(model, plan)).model, paths[label])
        if precision != "fp16":
            return paths
        halves = {label: path.with_stem(f"{path.stem}-fp16") for label, path in paths.items()}
        for label, path in halves.items():
            if not path.exists():
                save_model(to_fp16(onnx.load(paths[label])), path)
        return halves


def plan(bench: Bench, name: str) -> None:
    """Make the plans of a network, one a rank grid."""
    mode = bench.known()[bench.options.plan_mode] if bench.provider != "cpu" else Mode()
    settings = replace(mode.settings(bench.provider), conv_search=bench.options.search)
    batch = bench.options.plan_batch
    for grid in bench.options.grids or GRIDS.get(name, (8,)):
        if bench.late or bench.has("plan", network=name, grid=grid, batch=batch, mode=mode.name):
            continue
        row: Log = {"network": name, "grid": grid, "batch": batch, "mode": mode.name, "plan": None, "refused": []}
        start = time.monotonic()
        for target in TARGETS[name]:
            search = Search(
                grid=grid,
                formats=tuple(bench.options.formats),
                seconds=bench.options.plan_seconds,
                check_seconds=3 * bench.options.seconds,
                cache=bench.options.cache,
            )
            try:
                report = plan_network(
                    onnx.load(bench.dense(name)), {"flops": target}, search, conditions=Conditions(Timing(batch), settings)
                )
            except PlanError as error:
                row["refused"].append(str(error))
                continue
            row |= {
                "target": target,
                "plan": report.plan.model_dump(mode="json") if report.plan.layers else None,
                "layers": len(report.plan.layers),
                "of": len(report.rows),
                "predicted": report.predicted,
                "measured": None if report.measured is None else report.measured.value,
                "merges": sorted({layer.merge for layer in report.plan.layers}),
                "formats": sorted({layer.format for layer in report.plan.layers}),
            }
            break
        for layer in fastest(bench, name, grid, settings):
            bench.add("layers", {"network": name, "grid": grid, "batch": batch, "mode": mode.name} | layer)
        bench.add("plan", row | {"seconds": time.monotonic() - start})


def fastest(bench: Bench, name: str, grid: int, settings: Session) -> list[Log]:
    """Return every layer of a network that was timed: how long it takes dense, and in its fastest form."""
    table = LatencyTable.open(settings, bench.options.cache)
    rows: dict[str, Log] = {}
    for layer in survey(onnx.load(bench.dense(name)), bench.options.plan_batch):
        options = options_of(layer, bench.options.formats, grid)
        known = layer.output is not None and layer.inputs[layer.data] is not None
        if layer.describe() in rows or not known or table.missing(layer, options):
            continue
        row: Log = {"layer": layer.describe(), "forms": len(options), "dense": table.milliseconds(layer)}
        best = min(options, key=lambda option: table.milliseconds(layer, option), default=None)
        rows[layer.describe()] = row | ({} if best is None else {"form": best.steps, "ms": table.milliseconds(layer, best)})
    return list(rows.values())


def place(bench: Bench, name: str) -> None:
    """Record where the nodes of every form ran, and how far its outputs are from the dense form's on the CPU."""
    model = onnx.load(bench.dense(name))
    for label, path in bench.forms(name, "fp32").items():
        if bench.late or bench.has("placement", network=name, form=label):
            continue
        placed = placement(path, settings=Mode().settings(bench.provider), batch=SMALL)
        made = bench.plans(name).get(label)
        reference = path.with_stem(f"{path.stem}-reference")
        save_model(model if made is None else reconstruct(model, made, random_cores(model, made)), reference)
        session = open_session(reference)
        feed = random_inputs(session, SMALL)
        expected = run(session, feed)
        reference.unlink()
        row: Log = {"network": name, "form": label, "nodes": len(placed.nodes), "providers": placed.providers}
        row |= {"elsewhere": [f"{node.name} ({node.op})" for node in placed.elsewhere]}
        for precision in dict.fromkeys(mode.precision for mode in modes(bench.provider)):
            file = bench.forms(name, precision)[label]
            try:
                row[precision] = worst(
                    expected, run(open_session(file, settings=Mode(precision).settings(bench.provider)), feed)
                )
            except ModelError as error:  # as where fp16 overflows
                bench.note(f"{name}, {label}, {precision}: not compared, {error}")
        bench.add("placement", row)


def worst(expected: dict[str, np.ndarray], found: dict[str, np.ndarray]) -> float:
    """Return the largest relative L2 difference of any output."""
    held = Tolerances(None)
    return max(compare(name, [value], [found[name]], held).relative_l2 for name, value in expected.items())


def latency(bench: Bench, name: str) -> None:
    """Time all forms of a network in interleaved runs, in every mode and at every batch size."""
    for batch in bench.options.batches:
        for mode in bench.modes():
            if bench.has("latency", network=name, batch=batch, mode=mode.name):
                continue
            if bench.late:
                bench.note(f"{name}, batch {batch}, {mode.name}: not run, the time was over")
                continue
            try:
                _time(bench, name, batch, mode)
            except (ModelError, GraphError) as error:
                bench.note(f"{name}, batch {batch}, {mode.name}: {error}")


def _time(bench: Bench, name: str, batch: int, mode: Mode) -> None:
    paths, plain = bench.forms(name, mode.precision), bench.forms(name, "fp32")
    timing = Timing(
        batch,
        seconds=bench.options.seconds * len(paths),
        processes=bench.options.processes,
        io_binding=bench.provider != "cpu",
    )
    report = time_models(list(paths.values()), timing, mode.settings(bench.provider), labels=list(paths))
    card = bench.card()
    costs = [cost(path, batch) for path in plain.values()]
    bounds = [None if card is None else bound_ms(found, card, mode.precision) for found in costs]
    for k, label in enumerate(paths):
        ratio = report.ratios[k - 1] if k else None
        row = {
            "network": name,
            "batch": batch,
            "mode": mode.name,
            "form": label,
            "ms": report.latencies[k].p50,
            "macs": costs[0].macs / costs[k].macs,
            "speed_up": [1.0, 1.0, 1.0] if ratio is None else [ratio.value, ratio.low, ratio.high],
            "bound_ms": bounds[k],
        }
        bench.add("latency", row)
    for warning in report.warnings:
        bench.note(f"{name}, batch {batch}, {mode.name}: {warning}")


def train(bench: Bench) -> None:
    """Time epochs of ResNet-20 on CIFAR-100, dense and with ADMM; then run the recipes, each as long as time is left."""
    options = bench.options
    if not options.data.is_dir():
        bench.note(f"epochs: not timed, {options.data} is not there: name CIFAR-100's folder (cifar-100-python) with --data")
    elif not bench.late and not bench.has("training", recipe="epochs", how=ENDED):
        recipe = yaml.safe_load((ROOT / "recipes" / "resnet20-cifar100-tt.yaml").read_text())
        recipe["name"], recipe["data"]["args"]["root"] = "epochs", str(options.data)
        recipe["train"] |= {"precision": "bf16", "control": "none"}
        for phase, count in EPOCHS.items():
            recipe["train"][phase]["epochs"] = count
        path = options.folder / "epochs.yaml"
        write_text(path, yaml.safe_dump(recipe))
        _train(bench, path)
    for path in options.recipes:
        if not bench.late and not bench.has("training", recipe=path.stem, how=ENDED):
            _train(bench, path)


def _train(bench: Bench, recipe: Path) -> None:
    """Go on with a recipe until it ends or the time is over; its row says how far it came."""
    folder: Path = bench.options.folder / recipe.stem
    command = [sys.executable, "-m", "tensorrail", "train", str(recipe), "--folder", str(folder), "--resume"]
    with (folder.parent / f"{folder.name}.log").open("a") as log:
        try:
            code: int | None = subprocess.run(
                command, stdin=subprocess.DEVNULL, stdout=log, stderr=log, timeout=bench.rest(), check=False
            ).returncode
        except subprocess.TimeoutExpired:
            code = None
    ends = {0: ENDED, None: "not ended, the time was over: go on with --resume"}
    row: Log = {"recipe": recipe.stem, "how": ends.get(code, f"failed, exit code {code}: see {folder.name}.log")}
    if code == 0:
        epochs = TrainingLog.model_validate_json((folder / "training.json").read_bytes()).epochs
        for phase in EPOCHS:
            rows = [epoch for epoch in epochs if epoch.phase == phase]
            if rows:
                taken = rows[1:] or rows  # the first one warms up
                row[phase] = float(np.median([epoch.seconds for epoch in taken]))
                row[f"{phase} accuracy"] = rows[-1].test_accuracy
        row["projection"] = projection_share(epochs)
    bench.add("training", row)


def gate(bench: Bench) -> None:
    """Run the gate's own benchmark on the provider, shorter."""
    if bench.late or bench.log["gate"]:
        return
    out = bench.stem.with_name(f"{bench.stem.name}-gate.md")
    trials = ["--alarms", str(bench.options.trials), "--finds", str(bench.options.trials)]
    command = [sys.executable, str(Path(__file__).with_name("gate.py")), "--provider", bench.provider, *trials, "-o", str(out)]
    try:
        done = subprocess.run(command, stdin=subprocess.DEVNULL, timeout=bench.rest(), check=False)
    except subprocess.TimeoutExpired:
        bench.note("gate: not ended, the time was over")
        return
    if done.returncode:
        bench.note(f"gate: failed, exit code {done.returncode}")
        return
    bench.add("gate", {"file": out.name})


def _slug(text: str) -> str:
    return re.sub(r"[^a-z0-9]+", "-", text.lower()).strip("-")


def lacking(provider: str) -> str | None:
    """Return why no session runs on the provider here, or None."""
    node = onnx.helper.make_node("Relu", ["x"], ["y"])
    ends = [onnx.helper.make_tensor_value_info(name, onnx.TensorProto.FLOAT, [1]) for name in "xy"]
    graph = onnx.helper.make_graph([node], "probe", ends[:1], ends[1:])
    model = onnx.helper.make_model(graph, opset_imports=[onnx.helper.make_opsetid("", 17)], ir_version=8)
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "probe.onnx"
        onnx.save(model, path)
        try:
            open_session(path, provider=provider)
        except ModelError as error:
            return str(error).removeprefix(f"{path}: ")
    return None


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--sections", nargs="+", default=list(SECTIONS), choices=SECTIONS)
    parser.add_argument("--networks", nargs="+", default=list(TARGETS), choices=list(TARGETS))
    parser.add_argument("--batches", type=int, nargs="+", default=[64, 1, 8, 256])
    parser.add_argument(
        "--grids", type=int, nargs="+", help="Rank grids to plan on; default: 8, for ResNet-18 also 16, 32, 64."
    )
    names = [mode.name for mode in (*modes("cuda"), *modes("cpu"))]
    parser.add_argument("--modes", nargs="+", choices=names, metavar="MODE", help=f"Default: all of {'; '.join(names[:-2])}.")
    parser.add_argument(
        "--plan-mode",
        default=PLANNED.name,
        choices=[name for name in names if "fp16" not in name],
        metavar="MODE",
        help="What plans are made for.",
    )
    parser.add_argument("--processes", type=int, default=3, help="Fresh ones, for each time.")
    parser.add_argument("--search", default=SEARCHES[0], choices=SEARCHES, help="cuDNN's algorithms while plans are made.")
    parser.add_argument("--formats", nargs="+", default=["auto"], choices=["auto", *FORMATS], help="That plans may have.")
    parser.add_argument("--seconds", type=float, default=1.0, help="Of timing a model in a mode.")
    parser.add_argument("--plan-batch", type=int, default=64)
    parser.add_argument("--plan-seconds", type=float, default=60.0, help="Of timing the layers of one plan.")
    parser.add_argument("--trials", type=int, default=20, help="Of the gate, on equal models and on a slower one.")
    parser.add_argument("--minutes", type=float, default=120.0, help="Nothing is begun after as many.")
    parser.add_argument("--provider", default="cuda", choices=["cuda", "cpu"], help="cpu: a dry run.")
    parser.add_argument("--data", type=Path, default=Path("data/cifar-100-python"))
    parser.add_argument("--recipes", type=Path, nargs="+", default=[], help="To be trained in the time that is left.")
    parser.add_argument("--cache", type=Path, help="Where latency tables are kept.")
    parser.add_argument("--folder", type=Path, default=Path("runs/gpu"), help="Where models are written.")
    parser.add_argument("--resume", action="store_true")
    parser.add_argument("-o", "--out", type=Path, default=Path("results"))
    options = parser.parse_args()
    known = [mode.name for mode in modes(options.provider)]
    if not set(options.modes or ()) <= set(known):
        parser.error(f"--modes: provider {options.provider} has {'; '.join(known)}")
    reason = lacking(options.provider)
    if reason is not None:
        print(f"skipped: {reason}")
        return
    bench = Bench(options)
    parts: dict[str, Callable[[Bench, str], None]] = {"plan": plan, "placement": place, "latency": latency}
    for name in options.networks:
        for section, part in parts.items():
            if section not in options.sections:
                continue
            try:
                part(bench, name)
            except (ModelError, GraphError, PlanError) as error:  # one network less, and the others go on
                bench.note(f"{name}, {section}: {error}")
    for section, whole in {"gate": gate, "training": train}.items():
        if section in options.sections:
            whole(bench)
    bench.write()
    print(bench.stem.with_suffix(".md").read_text())


if __name__ == "__main__":
    main()
