"""An existing ONNX file: plan by measured time, compress with calibration inputs, check, time. Needs no torch.

    python examples/onnx_file.py [MODEL.onnx --inputs X.npz] [--latency 1.5] [--out model.onnx]

Without a file, the script writes a small network, whose weights are nearly of low rank, and inputs for it.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

import numpy as np
import onnx
from onnx import TensorProto, helper, numpy_helper

import tensorrail as tr


def stand_in(folder: Path) -> tuple[Path, Path]:
    """Write a small network and inputs for it, and return their paths; they stand in for your own files."""
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
    shapes = {"image": ["batch", 3, 16, 16], "logits": ["batch", 10]}
    image, logits = (helper.make_tensor_value_info(name, TensorProto.FLOAT, shape) for name, shape in shapes.items())
    graph = helper.make_graph(nodes, "stand-in", [image], [logits], constants)
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 20)], ir_version=9)
    onnx.checker.check_model(model, full_check=True)
    tr.save_model(model, folder / "dense.onnx")
    np.savez(folder / "inputs.npz", image=rng.standard_normal((128, 3, 16, 16)).astype(np.float32))
    return folder / "dense.onnx", folder / "inputs.npz"


def main() -> None:
    """Plan, compress, check, time; exit code 1 when the target was not measured."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("model", type=Path, nargs="?")
    parser.add_argument("--inputs", type=Path, help="An npz file with arrays by input name, or a folder of files or images.")
    parser.add_argument("--latency", type=float, default=1.5, help="How many times lower the latency should be.")
    parser.add_argument("--seconds", type=float, default=10.0, help="Seconds of each step that takes its time.")
    parser.add_argument("--out", type=Path, default=Path("model.onnx"))
    options = parser.parse_args()
    if options.model is None:
        folder = options.out.parent / "stand-in"  # a folder of its own, so that no file of yours is overwritten
        folder.mkdir(parents=True, exist_ok=True)
        options.model, options.inputs = stand_in(folder)

    settings = tr.Options(
        timing=tr.Timing(seconds=options.seconds),
        search=tr.Search(seconds=options.seconds, improve_seconds=options.seconds, check_seconds=options.seconds),
        fit=tr.Fit(seconds=0),  # 0: cores are fitted layer by layer, in NumPy; a further fit needs torch
    )
    target = {"latency": options.latency}
    try:
        report = tr.compress(options.model, options.out, target, calibration=options.inputs, options=settings)
    except tr.TensorrailError as error:  # for a target that cannot be met, the message says what can
        print(error)
        sys.exit(error.exit_code)
    for row in report.planned:
        print(f"{row.layer}: {row.what} runs as {row.steps or f'dense, {row.reason}'}")
    print(f"parameters ÷ {report.ratios.params:.2f}, FLOPs ÷ {report.ratios.flops:.2f}")

    # The same as `tensorrail check` and `tensorrail bench`, on the inputs and at the batch size that you serve:
    inputs = options.inputs if options.inputs and options.inputs.is_file() else None  # None: random inputs
    parity = tr.check(options.model, options.out, inputs=inputs, tolerance=None)
    share = parity.outputs[0].top1_agreement  # None: the outputs are no scores of classes
    agreement = "" if share is None else f"; top-1 agreement {100 * share:.0f} %"
    print(f"outputs differ by {parity.worst:.3f} (relative L2){agreement}")
    timing = tr.Timing(batch=8, seconds=options.seconds)
    ratio = tr.bench([options.model, options.out], options=tr.Options(timing=timing)).ratios[0]
    print(f"speed-up {ratio.value:.2f}× [{ratio.low:.2f}, {ratio.high:.2f}] at batch 8")
    sys.exit(0 if report.meets and report.faster else 1)


if __name__ == "__main__":
    main()
