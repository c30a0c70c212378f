"""What decomposition without training keeps of a network's accuracy, step by step: plain, layer by layer, fitted.

    python benchmarks/calibration.py DENSE.onnx --calibration X.npz --test TEST.npz [--flops 2.3] [--samples 500]
        [--published resnet18] [-o results/calibration.md]

X.npz holds unlabelled inputs by name, TEST.npz inputs and `labels` that nothing here is fitted to. For each plan (our own for
the target on FLOPs; with `--published` the published tensor-train ranks as well) the same graph is made in several ways: every
weight cut by itself; layer by layer in the metric of the real inputs, the bias refitted; that followed by the block-wise fit of
the cores; and that followed by a fit of the whole graph.
"""

from __future__ import annotations

import argparse
import tempfile
import time
from pathlib import Path

from tensorrail_exporter import Plan, decompose_graph, factorize
from tensorrail_exporter.calibrate.inputs import load_calibration
from tensorrail_exporter.calibrate.layerwise import fit_layers
from tensorrail_exporter.graphs.io import load_model, save_model
from tensorrail_exporter.search.planner import plan_network
from tensorrail_exporter.search.targets import Search
from tensorrail_runtime.graphs.cost import cost
from tensorrail_runtime.measure.accuracy import Labelled, evaluate
from tensorrail_runtime.records import write_text
from tensorrail_trainer.fit.blocks import FitSettings, fit_blocks
from tensorrail_trainer.fit.network import NetworkFit, fit_network
from tensorrail_trainer.planning.published import published_plan


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("dense", type=Path)
    parser.add_argument("--calibration", type=Path, required=True)
    parser.add_argument("--test", type=Path, required=True)
    parser.add_argument("--flops", type=float, nargs="*", default=[2.3])
    parser.add_argument("--samples", type=int, default=500)
    parser.add_argument("--published")
    parser.add_argument("--cache", type=Path)
    parser.add_argument("--data", default="", help="What the data and the network are, for the text.")
    parser.add_argument("-o", "--out", type=Path)
    options = parser.parse_args()
    dense, inputs = load_model(options.dense), load_calibration(options.calibration, options.dense, most=options.samples)
    test = Labelled.load(options.test)
    total = cost(options.dense).macs
    lines = [
        "# Accuracy without training",
        "",
        "Command: `python benchmarks/calibration.py DENSE.onnx --calibration X.npz --test TEST.npz "
        f"--samples {options.samples} --flops {' '.join(f'{one:g}' for one in options.flops)} "
        f"--published {options.published}`. {options.data} "
        f"{inputs.count} unlabelled inputs, accuracy on {len(test.labels)} others.",
        "",
        "| plan | MACs reduction | dense | every weight by itself | layer by layer | + 12 epochs a block "
        "| + 600 steps of the whole |",
        "|---|---|---|---|---|---|---|",
    ]
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "model.onnx"

        def top1(model) -> str:
            save_model(model, path)
            return f"{100 * evaluate(path, test).mean:.2f} %"

        plans: dict[str, Plan] = {}
        if options.published:
            plans["published TT ranks"] = published_plan(options.published)
        for flops in options.flops:
            search = Search(cache=options.cache, check_seconds=1.0)
            report = plan_network(dense, {"flops": flops}, search, calibration=inputs.first(128))
            plans[f"`--target flops={flops:g}`"] = report.plan
        for name, plan in plans.items():
            plain = factorize(dense, plan, decompose_graph(dense, plan)).model
            start = time.perf_counter()
            fitted = fit_layers(dense, plan, inputs)
            layered = factorize(fitted.model, plan, fitted.cores).model
            between = time.perf_counter()
            blocks = fit_blocks(dense, layered, plan, inputs, FitSettings(seconds=600)).model
            end = time.perf_counter()
            whole = fit_network(dense, blocks, plan, inputs, NetworkFit(steps=600, seconds=600))
            scores = [top1(one) for one in (dense, plain, layered, blocks, whole)]
            save_model(plain, path)
            lines.append(f"| {name} | {total / cost(path).macs:.2f} | {' | '.join(scores)} |")
            print(lines[-1], f"layer by layer {between - start:.0f} s, blocks {end - between:.0f} s", flush=True)
    if options.out:
        write_text(options.out, "\n".join(lines) + "\n")


if __name__ == "__main__":
    main()
