"""What it brings to measure losses as curves, to verify the chosen network, and to search on from there.

    python benchmarks/search.py DENSE.onnx [MORE.onnx …] [--flops 1.7 2.3] [--latency 1.5] [--samples 250] [--search-seconds 60]
        [-o results/search]

Beside each DENSE.onnx lies DENSE.calibration.npz, with inputs by name, and DENSE.test.npz, with other inputs, and `labels`
where there are any. For each network and budget, one plan is chosen in each of four ways, from the same latency table:

- *in proportion*: the effect of a layer is measured at the option that loses nearest to 5 % of its output, and extended in
  proportion to that share; as it was done before losses were measured as curves;
- *curves*: the effect is measured at several options;
- *verified*: the chosen network is run as a whole, losses of layers are corrected, and the choice is repeated;
- *searched*: a local search follows.

All are fitted layer by layer and compared with the dense network on the test inputs, which nothing was chosen by or fitted to.
At last dense and chosen networks are timed in interleaved runs. Results are written after each budget.
"""

from __future__ import annotations

import argparse
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any
from unittest.mock import patch

import numpy as np
from pages import parser_of, write_results

from tensorrail_exporter import factorize
from tensorrail_exporter.calibrate.inputs import load_calibration
from tensorrail_exporter.calibrate.layerwise import fit_layers
from tensorrail_exporter.calibrate.split import split
from tensorrail_exporter.graphs.io import load_model, save_model
from tensorrail_exporter.search import planner, verified_choice
from tensorrail_exporter.search.losses import Losses, Probe, measured_losses
from tensorrail_exporter.search.report import PlanReport
from tensorrail_exporter.search.targets import Search
from tensorrail_runtime.errors import TargetError
from tensorrail_runtime.measure.accuracy import Labelled, evaluate
from tensorrail_runtime.measure.agreement import agreement
from tensorrail_runtime.measure.latency import bench
from tensorrail_runtime.measure.timing import Conditions, Timing
from tensorrail_runtime.progress import Progress, silent
from tensorrail_runtime.sessions.machine import machine
from tensorrail_runtime.sessions.session import Session

SHARE = 0.05  # of a layer's output that the one measured option loses, nearly, where losses are extended in proportion
ONE_THREAD = Session(threads=1)


@dataclass(frozen=True)
class Way:
    """One way to choose a plan."""

    name: str
    proportional: bool = False
    corrections: bool = True
    search: bool = False


WAYS = (
    Way("in proportion", proportional=True, corrections=False),
    Way("curves", corrections=False),
    Way("verified"),
    Way("searched", search=True),
)


def in_proportion(wanted: Any, probe: Probe, progress: Progress = silent) -> Losses:
    """Return losses from one measured option of each layer."""
    values = {}
    by_name = {layer.name: tuple(options) for layer, options in wanted.items() if options}
    for name in (name for name in (*probe.network.layers, *by_name) if name in by_name and name not in values):
        shares = np.array([probe.approximations[name].share(option) for option in by_name[name]])
        place = int(np.argmin(np.abs(np.log(np.maximum(shares, 1e-12) / SHARE))))
        (effect,) = probe.effects(name, [by_name[name][place]])
        values[name] = tuple(float(effect * share / max(shares[place], 1e-12)) for share in shares)
    progress("measuring losses", 1.0)
    return Losses("calibration", values, probe.divergence.unit)


def planned(dense: Any, target: dict[str, float], way: Way, inputs: Any, options: argparse.Namespace) -> PlanReport:
    """Return the plan that one way chooses."""
    search = Search(
        cache=options.cache,
        seconds=options.seconds,
        improve_seconds=options.search_seconds if way.search else 0.0,
        allow_slower="latency" not in target,
    )
    with ExitStack() as stack:
        stack.enter_context(patch.object(planner, "measured_losses", in_proportion if way.proportional else measured_losses))
        if not way.corrections:
            stack.enter_context(patch.object(verified_choice, "_CORRECTIONS", 0))
        conditions = Conditions(Timing(), ONE_THREAD)
        return planner.plan_network(dense, target, search, calibration=inputs, conditions=conditions, judge=False)


def measured(path: Path, target: dict[str, float], options: argparse.Namespace, folder: Path) -> list[dict[str, Any]]:
    """Return the records of all ways for one network and budget."""
    dense = load_model(path)
    inputs = load_calibration(path.with_suffix(".calibration.npz"), path, most=options.samples)
    others = load_calibration(path.with_suffix(".test.npz"), path)
    with np.load(path.with_suffix(".test.npz")) as arrays:
        labelled = "labels" in arrays
    test = Labelled.load(path.with_suffix(".test.npz")) if labelled else None
    dense_top1 = None if test is None else evaluate(path, test).mean
    parts = split(inputs, dense)
    records, files = [], [path]
    for way in WAYS:
        record: dict[str, Any] = {"network": path.stem, "target": target, "way": way.name}
        records.append(record)
        try:
            report = planned(dense, target, way, inputs, options)
        except TargetError as error:
            record["refused"] = str(error)
            continue
        fitted = fit_layers(dense, report.plan, parts.fitted, ONE_THREAD, held_out=parts.chosen)
        files.append(folder / f"{way.name.replace(' ', '-')}.onnx")
        save_model(factorize(fitted.model, report.plan, fitted.cores).model, files[-1])
        found = agreement(path, files[-1], others.feeds, ONE_THREAD, others.axes)
        verified = report.verified
        record |= {
            "reached": report.reached,
            "layers": len(report.plan.layers),
            "predicted_loss": None if verified is None else verified.predicted,
            "verified_loss": None if verified is None else verified.loss,
            "agreement": found.agreement,
            "difference": found.difference,
            "top1": None if test is None else evaluate(files[-1], test).mean,
            "dense_top1": dense_top1,
            "file": files[-1].name,
        }
    times = bench(files, Timing(seconds=options.bench_seconds, processes=5), ONE_THREAD) if len(files) > 1 else None
    for record in records:
        if times is not None and "file" in record:
            ratio = times.ratios[[one.name for one in files].index(record.pop("file")) - 1]
            record["speed"] = [ratio.value, ratio.low, ratio.high]
    return records


def page(records: list[dict[str, Any]], options: argparse.Namespace) -> str:
    """Return the table as Markdown."""
    lines = [
        "# How plans are chosen",
        "",
        f"Command: `python benchmarks/search.py {' '.join(one.name for one in options.models)} "
        f"--flops {' '.join(f'{one:g}' for one in options.flops)} --latency {' '.join(f'{one:g}' for one in options.latency)} "
        f"--samples {options.samples} --search-seconds {options.search_seconds:g}`. "
        f"{machine().processor}, one thread, batch 1.",
        "",
        "All figures but the losses are of inputs that nothing was fitted to or chosen by. Speed-ups are measured interleaved,",
        "with 95 % intervals. *Losses* are those of the whole network on the inputs that plans are chosen by.",
        "",
        "| network | target | way | FLOPs reduction (×) | speed-up | loss predicted | loss verified | same class as dense "
        "| outputs differ | top-1 (dense) |",
        "|---|---|---|---|---|---|---|---|---|---|",
    ]
    for one in records:
        target = ", ".join(f"{name}={value:g}" for name, value in one["target"].items())
        if "refused" in one:
            lines.append(f"| {one['network']} | {target} | {one['way']} | refused: {one['refused']} ||||||||")
            continue
        speed = "{:.2f}× [{:.2f}, {:.2f}]".format(*one["speed"])
        top1 = "–" if one["top1"] is None else f"{100 * one['top1']:.1f} % ({100 * one['dense_top1']:.1f})"
        same = "–" if one["agreement"] is None else f"{100 * one['agreement']:.1f} %"
        losses = ("–" if one[key] is None else f"{one[key]:.3g}" for key in ("predicted_loss", "verified_loss"))
        lines.append(
            f"| {one['network']} | {target} | {one['way']} | {one['reached']['flops']:.2f} | {speed} "
            f"| {' | '.join(losses)} | {same} | {one['difference']:.3f} | {top1} |"
        )
    return "\n".join(lines) + "\n"


def main() -> None:
    """Measure all networks and budgets."""
    parser = parser_of(__doc__)
    parser.add_argument("--flops", type=float, nargs="*", default=[1.7, 2.3], help="Targets on FLOPs. Default: 1.7 2.3.")
    parser.add_argument("--latency", type=float, nargs="*", default=[], help="Targets on the latency. Default: none.")
    parser.add_argument("--samples", type=int, default=250, help="Calibration inputs. Default: 250.")
    parser.add_argument("--seconds", type=float, default=60.0, help="Seconds of timing layers. Default: 60.")
    parser.add_argument("--search-seconds", type=float, default=60.0, help="Seconds of the local search. Default: 60.")
    parser.add_argument("--bench-seconds", type=float, default=20.0, help="Seconds of the comparison of times. Default: 20.")
    options = parser.parse_args()
    records: list[dict[str, Any]] = []
    targets = [{"flops": one} for one in options.flops] + [{"latency": one} for one in options.latency]
    for path in options.models:
        for target in targets:
            with TemporaryDirectory() as folder:
                records += measured(path, target, options, Path(folder))
            print(page(records[-len(WAYS) :], options).rpartition("|---|\n")[2], end="", flush=True)
            write_results(options.out, records, page(records, options))


if __name__ == "__main__":
    main()
