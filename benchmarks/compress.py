"""Is the planned network faster than dense, than published ranks, and than other tools' exports? All in one interleaved run.

    python benchmarks/compress.py [--batch 1] [--seconds 30] [--networks resnet18 …] [-o results/compress]

ResNet-18 at 224²: dense; the published tensor-train ranks (Yin et al., CVPR 2021) as they are, and padded with zeros where that
is measured to be faster; tensorly-torch's factorized Tucker and TT at about the same MACs (left out with a note when
tensorly-torch is not installed); and `tensorrail plan --target latency=2.4`. Other networks: the plan for the highest of a few
targets that can be met. All networks also in int8: dense, with the plan for fp32, and with a plan for int8. Weights are random:
times do not depend on them, losses do, and so does which plan is chosen.
"""

from __future__ import annotations

import argparse
import json
import tempfile
import time
from pathlib import Path

import networks
import onnx

from tensorrail_exporter import GraphError, PlanError, factorize
from tensorrail_exporter.graphs.io import load_model, save_model
from tensorrail_exporter.graphs.joint import with_joint
from tensorrail_exporter.plans.costs import dense_cost
from tensorrail_exporter.precision.int8 import to_int8
from tensorrail_exporter.rewrite.survey import survey
from tensorrail_exporter.search.fastest_form import Form, fastest_blocks
from tensorrail_exporter.search.knapsack import Limit, choose
from tensorrail_exporter.search.latency_table import LatencyTable
from tensorrail_exporter.search.layer_profile import layer_times, slower_layers
from tensorrail_exporter.search.options import options_of
from tensorrail_exporter.search.planner import plan_network
from tensorrail_exporter.search.report import PlanReport
from tensorrail_exporter.search.targets import Search
from tensorrail_exporter.search.verification import random_cores
from tensorrail_runtime.graphs.cost import cost
from tensorrail_runtime.measure.latency import bench
from tensorrail_runtime.measure.timing import Conditions, Timing
from tensorrail_runtime.records import write_text
from tensorrail_runtime.sessions.inputs import random_inputs
from tensorrail_runtime.sessions.machine import machine
from tensorrail_runtime.sessions.session import Session, open_session

TARGETS = {
    "resnet18": (2.4,),
    "resnet50": (2.4, 2.0, 1.5),
    "mobilenet_v2": (2.0, 1.5, 1.25, 1.1),
    "vit_tiny": (2.4, 2.0, 1.5, 1.25),
    "lstm": (20.0, 10.0, 4.0),
}
IN_INT8 = (8.0, 6.0, 5.0, 4.0, 3.0, 2.4, 2.0, 1.5)
"""Targets of a plan for int8, from the dense network in fp32."""


def planned(model: onnx.ModelProto, name: str, batch: int, cache: Path | None):
    """Return the report of the first target that can be met, the notes of those that cannot, and the seconds it took."""
    notes = []
    start = time.perf_counter()
    for target in TARGETS[name]:
        try:
            report = plan_network(model, {"latency": target}, Search(cache=cache), conditions=Conditions(Timing(batch)))
        except PlanError as error:
            notes.append(f"latency={target:g}: {error}")
            continue
        if not report.meets and target != TARGETS[name][-1]:
            found = report.measured.value if report.measured else 1.0
            notes.append(
                f"latency={target:g}: promised by the table, but the networks chosen were measured {found:.2f}× faster at most"
            )
            continue
        return target, report, notes, time.perf_counter() - start
    return None, None, notes, time.perf_counter() - start


def least_cut(model: onnx.ModelProto, report: PlanReport, batch: int, cache: Path | None) -> float:
    """Return how many times fewer MACs a network at least has that is as fast as the plan, by the latency table.

    Of all the forms that were offered, losses aside: speed-up over MACs is at most the speed-up over this.
    """
    layers = [layer for layer in survey(model, batch) if layer.output is not None and layer.inputs[layer.data] is not None]
    offered = {layer: options_of(layer, ("auto",), report.grid) for layer in layers}
    table = LatencyTable.open(Session(), cache).with_estimates(offered)  # not every form is timed
    times, cuts = [], []
    for layer, options in offered.items():
        times.append([layer.nodes * table.milliseconds(layer, option) for option in (None, *options)])
        dense = max(1, dense_cost(layer.spec).macs)
        cuts.append([0.0, *(max(0.0, layer.macs * (1 - option.macs / dense)) for option in options)])
    beside = report.dense.milliseconds - sum(row[0] for row in times)
    picks = choose(cuts, [Limit("latency", times, report.planned.milliseconds - beside)])
    return report.dense.macs / (report.dense.macs - sum(row[pick] for row, pick in zip(cuts, picks, strict=True)))


def baselines(folder: Path, dense: Path, batch: int, cache: Path | None) -> tuple[dict[str, Path], list[str]]:
    """Write ResNet-18's other forms and return their paths, and notes on those that could not be made."""
    model, plan, notes = onnx.load(dense), networks.published_plan("resnet18"), []
    cores = random_cores(model, plan)
    blocks = fastest_blocks(model, plan, Form(block="auto", batch=batch, cache=cache))
    made = {"published": folder / "published.onnx", "published, padded": folder / "padded.onnx"}
    save_model(factorize(model, plan, cores).model, made["published"])
    save_model(factorize(model, plan, cores, block=blocks).model, made["published, padded"])
    notes.append("padded to multiples of: " + ", ".join(f"{layer} {block}" for layer, block in blocks.items()))
    for kind in ("tucker", "tt"):
        try:
            import tensorly_torch

            made[f"tensorly-torch {kind}"] = tensorly_torch.write(kind, folder)
        except (ImportError, RuntimeError, SystemExit) as error:
            notes.append(f"tensorly-torch {kind}: left out ({error})")
    return made, notes


def int8_forms(
    model: onnx.ModelProto, plain: dict[str, Path], batch: int, cache: Path | None, folder: Path
) -> tuple[dict[str, Path], dict[str, Path], list[str]]:
    """Write the dense network and the planned one in int8, and the plan for the highest target in int8 that can be met.

    Args:
        model: the dense graph.
        plain: the files of the dense network, and of the planned one under a name that starts with `planned`.
        batch: the batch size.
        cache: the folder of latency tables.
        folder: where files are written.

    Returns:
        The files by their names, the file in fp32 of each, and notes.

    """
    feeds = [random_inputs(open_session(plain["dense"]), batch)]
    made, twins, notes = {}, {}, []

    def add(label: str, path: Path) -> None:
        made[label] = folder / f"int8-{len(made)}.onnx"
        twins[label] = path
        save_model(to_int8(onnx.load(path), feeds, gauge=False, rounding="nearest"), made[label])

    for label, path in plain.items():
        if label.startswith(("dense", "planned")):
            add(f"{label}, in int8", path)
    conditions = Conditions(Timing(batch))
    for target in IN_INT8:
        try:
            report = plan_network(model, {"latency": target}, Search(cache=cache, precision="int8"), conditions=conditions)
        except PlanError as error:
            notes.append(f"in int8, latency={target:g}: {error}")
            continue
        if not report.plan.layers:
            notes.append(f"in int8, latency={target:g}: the dense network is fast enough")
            break
        if report.meets or target == IN_INT8[-1]:
            save_model(factorize(model, report.plan, random_cores(model, report.plan)).model, folder / "for-int8.onnx")
            add(f"planned in int8, latency={target:g}", folder / "for-int8.onnx")
            break
        notes.append(f"in int8, latency={target:g}: the networks chosen were measured {report.reached['latency']:.2f}× faster")
    return made, twins, notes


def measure(name: str, batch: int, seconds: float, cache: Path | None) -> tuple[list[str], dict]:
    """Measure one network at one batch size; lines of Markdown and the record behind them."""
    with tempfile.TemporaryDirectory() as text:
        folder = Path(text)
        dense = networks.write(name, folder)
        model = onnx.load(dense)
        target, report, notes, took = planned(model, name, batch, cache)
        paths = {"dense": dense}
        if name == "resnet18":
            more, said = baselines(folder, dense, batch, cache)
            paths |= more
            notes += said
        if report is not None and report.plan.layers:
            paths[f"planned, latency={target:g}"] = folder / "planned.onnx"
            save_model(factorize(model, report.plan, random_cores(model, report.plan)).model, folder / "planned.onnx")
        try:
            small, twins, said = int8_forms(model, paths, batch, cache, folder)
        except GraphError as error:
            small, twins, said = {}, {}, [f"in int8: {error}"]
        plain = paths | twins
        paths |= small
        notes += said
        run = bench(list(paths.values()), Timing(batch, seconds=seconds, processes=5), labels=list(paths))
        costs = [cost(plain[label], batch) for label in paths]  # weights in int8 do not count as parameters
        lines = [
            f"### {name}, batch {batch}",
            "",
            "| form | MACs reduction | parameter reduction (×) | p50 | speed-up | 95 % | speed-up divided by MACs reduction |",
        ]
        lines.append("|---|---|---|---|---|---|---|")
        rows = []
        for k, (label, found) in enumerate(zip(paths, costs, strict=True)):
            ratio = run.ratios[k - 1] if k else None
            macs, params = costs[0].macs / found.macs, costs[0].params / found.params
            speed, low, high = (ratio.value, ratio.low, ratio.high) if ratio else (1.0, 1.0, 1.0)
            lines.append(
                f"| {label} | {macs:.2f} | {params:.2f} | {run.latencies[k].p50:.2f} ms | {speed:.2f}× "
                f"| {low:.2f}–{high:.2f} | {speed / macs:.2f} |"
            )
            rows.append(
                {
                    "form": label,
                    "macs": found.macs,
                    "params": found.params,
                    "p50": run.latencies[k].p50,
                    "speed_up": [speed, low, high],
                }
            )
        record = {"network": name, "batch": batch, "rows": rows, "notes": notes, "seconds_to_plan": took}
        if report is not None and report.plan.layers:
            predicted = report.predicted
            final = run.ratios[list(paths).index(f"planned, latency={target:g}") - 1].value
            fewest = least_cut(model, report, batch, cache)
            conditions = Conditions(Timing(batch))
            before = dense
            if report.plan.joint:
                before = folder / "joint.onnx"
                save_model(with_joint(load_model(dense), report.plan.joint), before)
            slow = slower_layers(layer_times(before, folder / "planned.onnx", report.plan, conditions=conditions))
            lines += [
                "",
                f"Predicted {predicted:.2f}×: its time {100 * (final / predicted - 1):+.1f} % off the measured one. "
                f"{len(report.plan.layers)} layers rewritten; slower than dense by the profile: {', '.join(slow) or 'none'}. "
                f"Planning took {took:.0f} s. By the latency table, losses aside, a network of that speed has a "
                f"MACs reduction of at least {fewest:.2f}: the speed-up divided by MACs reduction is at most "
                f"{predicted / fewest:.2f}.",
            ]
            record |= {
                "least_cut": fewest,
                "target": target,
                "predicted": predicted,
                "slower": slow,
                "plan": report.plan.model_dump(mode="json"),
            }
        for note in notes:
            lines += ["", f"- {note}"]
        return [*lines, ""], record


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--batch", type=int, nargs="+", help="Default: 1, and for ResNet-18 also 8.")
    parser.add_argument("--seconds", type=float, default=30.0)
    parser.add_argument("--networks", nargs="+", default=list(TARGETS), choices=list(TARGETS))
    parser.add_argument("--cache", type=Path)
    parser.add_argument("-o", "--out", type=Path, help="Without suffix: FILE.md and FILE.json are written.")
    options = parser.parse_args()
    where = machine()
    given = {"--networks": [] if options.networks == list(TARGETS) else options.networks, "--batch": options.batch or []}
    words = [word for name, values in given.items() if values for word in (name, *map(str, values))]
    command = f"`{' '.join(['python benchmarks/compress.py', *words])}`" if words else "`make bench`"
    text = [
        "# Planned networks against dense, published ranks and tensorly-torch",
        "",
        f"Command: {command} ({options.seconds:g} s a row). {where.processor}, "
        f"{where.cores} cores, ONNX Runtime {where.onnxruntime}, CPU provider, default threads; all forms of a network in "
        "turns, in five fresh processes; random weights.",
        "",
    ]
    records = []
    for name in options.networks:
        for batch in options.batch or ([1, 8] if name == "resnet18" else [1]):
            try:
                lines, record = measure(name, batch, options.seconds, options.cache)
            except (GraphError, PlanError) as error:
                lines, record = [f"### {name}, batch {batch}", "", str(error), ""], {"network": name, "error": str(error)}
            print("\n".join(lines), flush=True)
            text += lines
            records.append(record)
            if options.out:
                write_text(options.out.with_suffix(".md"), "\n".join(text))
                write_text(options.out.with_suffix(".json"), json.dumps(records, indent=1) + "\n")


if __name__ == "__main__":
    main()
