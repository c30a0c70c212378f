"""An ONNX file from elsewhere: plan by measured time, compress with calibration inputs, check, time. Needs no torch.

    python examples/onnx_file.py [MODEL.onnx --inputs X.npz] [--latency 1.5] [--out model.onnx]

Without a file it makes a small one, whose weights are nearly of low rank, and inputs for it.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

import numpy as np
import onnx
from onnx import TensorProto, helper, numpy_helper

from tensorrail_exporter.calibrate.inputs import load_calibration
from tensorrail_exporter.graphs.io import load_model, save_model
from tensorrail_exporter.search.planner import Search, plan_network
from tensorrail_exporter.workflow import compress
from tensorrail_runtime import bench, parity
from tensorrail_runtime.errors import TargetError


def stand_in(folder: Path) -> tuple[Path, Path]:
    """Write a small network and inputs for it, and return their paths: what you would have already."""
    rng = np.random.default_rng(0)
    weights = {"stem": (64, 3), "body.0": (64, 64), "body.1": (64, 64)}
    constants, nodes, last = [], [], "image"
    for name, (out, inputs) in weights.items():
        low = rng.standard_normal((out, 8)) @ rng.standard_normal((8, inputs * 9)) / np.sqrt(8 * inputs * 9)
        values = low + 0.01 * rng.standard_normal(low.shape) / np.sqrt(inputs)
        constants.append(numpy_helper.from_array(values.reshape(out, inputs, 3, 3).astype(np.float32), f"{name}.weight"))
        nodes.append(helper.make_node("Conv", [last, f"{name}.weight"], [f"{name}/conv"], name, pads=[1] * 4))
        nodes.append(helper.make_node("Relu", [f"{name}/conv"], [f"{name}/relu"], f"{name}/act"))
        last = f"{name}/relu"
    constants.append(numpy_helper.from_array(rng.standard_normal((64, 10)).astype(np.float32), "head.weight"))
    nodes += [
        helper.make_node("GlobalAveragePool", [last], ["pooled"], "pool"),
        helper.make_node("Flatten", ["pooled"], ["flat"], "flatten"),
        helper.make_node("MatMul", ["flat", "head.weight"], ["logits"], "head"),
    ]
    shapes = {"image": ["batch", 3, 32, 32], "logits": ["batch", 10]}
    image, logits = (helper.make_tensor_value_info(name, TensorProto.FLOAT, shape) for name, shape in shapes.items())
    graph = helper.make_graph(nodes, "stand-in", [image], [logits], constants)
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 20)], ir_version=9)
    onnx.checker.check_model(model, full_check=True)
    save_model(model, folder / "dense.onnx")
    np.savez(folder / "inputs.npz", image=rng.standard_normal((128, 3, 32, 32)).astype(np.float32))
    return folder / "dense.onnx", folder / "inputs.npz"


def main() -> None:
    """Plan, compress, check, time; exit code 1 when the target was not measured."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("model", type=Path, nargs="?")
    parser.add_argument("--inputs", type=Path, help="An npz file, arrays by input name; or a folder of files or images.")
    parser.add_argument("--latency", type=float, default=1.5, help="How many times less.")
    parser.add_argument("--seconds", type=float, default=10.0, help="Of timing layers, and of the final comparison.")
    parser.add_argument("--out", type=Path, default=Path("model.onnx"))
    options = parser.parse_args()
    if options.model is None:
        folder = options.out.parent / "stand-in"  # apart: your own file may be called the same
        folder.mkdir(exist_ok=True)
        options.model, options.inputs = stand_in(folder)

    dense = load_model(options.model)
    calibration = load_calibration(options.inputs, options.model) if options.inputs else None
    search = Search(targets={"latency": options.latency}, seconds=options.seconds, check_seconds=options.seconds)
    try:
        planned = plan_network(dense, search, calibration=calibration)
    except TargetError as error:  # the message says how far one can go on this machine
        print(error)
        sys.exit(1)
    for row in planned.rows:
        print(f"{row.layer}: {row.what} runs as {row.steps or f'dense, {row.reason}'}")
    report = compress(
        dense, planned.plan, options.out, calibration=calibration, targets=planned.targets, seconds=options.seconds
    )
    print(f"parameters ÷ {report.ratios.params:.2f}, FLOPs ÷ {report.ratios.flops:.2f}")

    # What `tensorrail check` and `tensorrail bench` do, on the inputs and at the batch size that you serve:
    feeds = list(calibration.first(64).feeds) if calibration else None
    found = parity(options.model, options.out, inputs=feeds, tolerance=None)
    print(
        f"outputs differ by {found.worst:.3f} relative; the largest score agrees on {_percent(found.outputs[0].top1_agreement)}"
    )
    ratio = bench([options.model, options.out], batch=8, seconds=options.seconds).ratios[0]
    print(f"speed-up {ratio.value:.2f}× [{ratio.low:.2f}, {ratio.high:.2f}] at batch 8")
    sys.exit(0 if report.meets and report.faster else 1)


def _percent(share: float | None) -> str:
    return "no scores" if share is None else f"{100 * share:.0f} %"


if __name__ == "__main__":
    main()
