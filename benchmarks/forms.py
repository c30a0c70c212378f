"""What does each format cost on each kind of layer, and is it faster? Interleaved, on this machine's CPU.

    python benchmarks/forms.py [--seconds 2] [--threads 0] [-o results/forms.md]

Ranks are the largest of one number that keeps a quarter of the dense weight's parameters. FLOPs, activation bytes and
kernels are those of the contraction for one sample, as the exporter counts them. A chain of four equal layers is timed at
batch 1. Weights are random: time does not depend on them.
"""

from __future__ import annotations

import argparse
import tempfile
from pathlib import Path

import numpy as np
import onnx
from onnx import TensorProto, helper, numpy_helper

from tensorrail_exporter import FORMATS, LayerPlan, Plan, PlanError, factorize
from tensorrail_exporter.graphs.io import save_model
from tensorrail_runtime.measure.latency import bench
from tensorrail_runtime.measure.timing import Timing
from tensorrail_runtime.records import write_text
from tensorrail_runtime.sessions.machine import machine
from tensorrail_runtime.sessions.session import Session

DEPTH = 4
SHARE = 0.25  # of the dense parameters
LAYERS = {
    "Conv 128→128, 3×3, on 28²": ("Conv", (128, 128, 3, 3), ["batch", 128, 28, 28]),
    "Gemm 1024→1024, 1 row": ("Gemm", (1024, 1024), ["batch", 1024]),
    "MatMul 1024→1024, 64 tokens": ("MatMul", (1024, 1024), ["batch", 64, 1024]),
    "LSTM 256→256, 50 steps": ("LSTM", (1024, 256), [50, "batch", 256]),
}


def chain(op: str, shape: tuple[int, ...], ends: list[int | str]) -> onnx.ModelProto:
    """Return DEPTH layers in a row, each with its own weight."""
    rng = np.random.default_rng(0)
    nodes, stored = [], []
    scale = 1 / float(np.prod(shape[1:])) ** 0.5
    for k in range(DEPTH):
        weight = (scale * rng.standard_normal(shape)).astype(np.float32)
        match op:
            case "Conv":
                nodes.append(helper.make_node("Conv", [f"x{k}", f"w{k}"], [f"c{k}"], pads=[1] * 4))
                nodes.append(helper.make_node("Relu", [f"c{k}"], [f"x{k + 1}"]))
            case "Gemm":
                nodes.append(helper.make_node("Gemm", [f"x{k}", f"w{k}"], [f"x{k + 1}"], transB=1))
            case "MatMul":
                nodes.append(helper.make_node("MatMul", [f"x{k}", f"w{k}"], [f"x{k + 1}"]))
                weight = weight.T
            case "LSTM":
                hidden = shape[0] // 4
                recurrent = (scale * rng.standard_normal((1, shape[0], hidden))).astype(np.float32)
                stored.append(numpy_helper.from_array(recurrent, f"r{k}"))
                nodes.append(helper.make_node("LSTM", [f"x{k}", f"w{k}", f"r{k}"], [f"c{k}"], hidden_size=hidden))
                nodes.append(helper.make_node("Squeeze", [f"c{k}", "axis"], [f"x{k + 1}"]))
                weight = weight[None]
        stored.append(numpy_helper.from_array(np.ascontiguousarray(weight), f"w{k}"))
    if op == "LSTM":
        stored.append(numpy_helper.from_array(np.array([1]), "axis"))
    values = [helper.make_tensor_value_info(name, TensorProto.FLOAT, ends) for name in ("x0", f"x{DEPTH}")]
    graph = helper.make_graph(nodes, "chain", values[:1], values[1:], stored)
    return helper.make_model(graph, opset_imports=[helper.make_opsetid("", 20)], ir_version=10)


def largest(name: str, form_name: str, shape: tuple[int, ...]) -> LayerPlan:
    """Return the plan with the format's usual modes whose cores hold at most SHARE of the dense parameters."""
    form = FORMATS[form_name]
    modes = form.default_modes(shape)
    budget = SHARE * float(np.prod(shape))
    plan = None
    for rank in range(1, 4096):
        ranks = form.clamp(shape, modes, form.uniform(shape, modes, rank))
        candidate = LayerPlan(name=name, format=form_name, modes=modes, ranks=ranks)
        if candidate.params(shape) > budget or (plan is not None and candidate.ranks == plan.ranks):
            break
        plan = candidate
    if plan is None:
        raise PlanError(f"layer {name}: rank 1 in {form_name} already has more than {SHARE} of the parameters")
    return plan


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--seconds", type=float, default=2.0)
    parser.add_argument("--threads", type=int, default=0)
    parser.add_argument("-o", "--out", type=Path)
    options = parser.parse_args()
    sections = []
    rng = np.random.default_rng(0)
    for title, (op, shape, ends) in LAYERS.items():
        dense = chain(op, shape, ends)
        rows, labels = [], []
        with tempfile.TemporaryDirectory() as folder:
            paths = [Path(folder) / "dense.onnx"]
            save_model(dense, paths[0])
            for form_name in FORMATS:
                if form_name == "ttm" and len(shape) > 2:
                    continue
                layers = [largest(f"w{k}", form_name, shape) for k in range(DEPTH)]
                cores = {
                    layer.name: [(rng.standard_normal(s) / s[-1] ** 0.5).astype(np.float32) for s in layer.core_shapes(shape)]
                    for layer in layers
                }
                factored = factorize(dense, Plan(layers=tuple(layers)), cores)
                paths.append(Path(folder) / f"{form_name}.onnx")
                save_model(factored.model, paths[-1])
                record = factored.layers[0]
                modes, ranks = (" ".join(map(str, sizes)) for sizes in (record.modes, record.ranks))
                labels.append(
                    f"| `{form_name}` | {modes} | {ranks} | {record.steps} | {record.stored_params:,} "
                    f"| {record.flops / 1e6:,.2f} | {record.activation_bytes / 1e3:,.0f} | {record.kernels} |"
                )
            run = bench(paths, Timing(seconds=options.seconds * len(paths)), Session(threads=options.threads))
        for label, found in zip(labels, run.ratios, strict=True):
            rows.append(f"{label} {found.value:.2f}× | {found.low:.2f}–{found.high:.2f} |")
        head = (
            f"## {title}\n\nDense: {int(np.prod(shape)):,} parameters, {run.latencies[0].p50 / DEPTH:.3f} ms.\n\n"
            "| format | modes | ranks | runs as | stored parameters | MFLOPs | activation kB | kernels | speed-up | 95 % |\n"
            "|---|---|---|---|---|---|---|---|---|---|\n"
        )
        sections.append(head + "\n".join(rows) + "\n")
        print(sections[-1], flush=True)
    where = machine()
    text = (
        f"# Every format on every kind of layer, at a quarter of the parameters\n\nCommand: `python benchmarks/forms.py`. "
        f"{where.processor}, {where.cores} cores, ONNX Runtime {where.onnxruntime}, {options.threads or 'default'} threads, "
        f"batch 1.\n\n" + "\n".join(sections)
    )
    if options.out:
        write_text(options.out, text)


if __name__ == "__main__":
    main()
