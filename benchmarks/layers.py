"""Is a factored layer faster than the dense one? Interleaved, per layer shape and rank, on this machine's CPU.

    python benchmarks/layers.py [--seconds 2] [--threads 0] [-o results/layers.md]

Each model is a chain of four equal 3×3 convolutions with ReLU, so that layout conversions are paid as in a network. The
factored one is the tensor train (C, 9, C) at ranks (1, r, r, 1). Weights are random: time does not depend on them.
"""

from __future__ import annotations

import argparse
import tempfile
from pathlib import Path

import numpy as np
import onnx
from onnx import TensorProto, helper, numpy_helper

from tensorrail_exporter import LayerPlan, Plan, decompose_graph, factorize
from tensorrail_exporter.graphs.io import save_model
from tensorrail_runtime.measure.latency import bench
from tensorrail_runtime.measure.timing import Timing
from tensorrail_runtime.records import write_text
from tensorrail_runtime.sessions.machine import machine
from tensorrail_runtime.sessions.session import Session

SHAPES = [(64, 56), (128, 28), (256, 14), (512, 7)]  # channels and image size of ResNet-18's stages
FRACTIONS = (0.25, 0.5, 0.56)  # of the channels: two multiples of 16, and one rank that is not
DEPTH = 4


def chain(channels: int, size: int) -> onnx.ModelProto:
    """Return DEPTH convolutions in a row, 3×3, each with its own weight."""
    rng = np.random.default_rng(0)
    scale = (2 / (9 * channels)) ** 0.5
    weights = [rng.normal(0, scale, (channels, channels, 3, 3)).astype(np.float32) for _ in range(DEPTH)]
    nodes = []
    for k in range(DEPTH):
        nodes.append(helper.make_node("Conv", [f"x{k}", f"w{k}"], [f"c{k}"], pads=[1] * 4))
        nodes.append(helper.make_node("Relu", [f"c{k}"], [f"x{k + 1}"]))
    shape = ["batch", channels, size, size]
    ends = [helper.make_tensor_value_info(name, TensorProto.FLOAT, shape) for name in ("x0", f"x{DEPTH}")]
    graph = helper.make_graph(
        nodes, "chain", ends[:1], ends[1:], [numpy_helper.from_array(w, f"w{k}") for k, w in enumerate(weights)]
    )
    return helper.make_model(graph, opset_imports=[helper.make_opsetid("", 20)], ir_version=10)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--seconds", type=float, default=2.0)
    parser.add_argument("--threads", type=int, default=0)
    parser.add_argument("-o", "--out", type=Path)
    options = parser.parse_args()
    lines = ["| layer | rank | MACs reduction | speed-up | 95 % interval |", "|---|---|---|---|---|"]
    with tempfile.TemporaryDirectory() as folder:
        for channels, size in SHAPES:
            dense = chain(channels, size)
            paths = [Path(folder) / "dense.onnx"]
            save_model(dense, paths[0])
            ranks = [int(channels * fraction) for fraction in FRACTIONS]
            for rank in ranks:
                modes, rank_list = (channels, 9, channels), (1, rank, rank, 1)
                plan = Plan(
                    layers=tuple(LayerPlan(name=f"w{k}", format="tt", modes=modes, ranks=rank_list) for k in range(DEPTH))
                )
                paths.append(Path(folder) / f"r{rank}.onnx")
                save_model(factorize(dense, plan, decompose_graph(dense, plan)).model, paths[-1])
            run = bench(paths, Timing(seconds=options.seconds * len(paths)), Session(threads=options.threads))
            for rank, found in zip(ranks, run.ratios, strict=True):
                macs = 9 * channels**2 / (2 * channels * rank + 9 * rank**2)
                lines.append(
                    f"| {channels}@{size}² | {rank} | {macs:.2f} | {found.value:.2f}× | {found.low:.2f}–{found.high:.2f} |"
                )
                print(lines[-1], flush=True)
    where = machine()
    command = "python benchmarks/layers.py"
    text = (
        f"# Factored 3×3 layers against dense, batch 1\n\nCommand: `{command}`. {where.processor}, {where.cores} cores, "
        f"ONNX Runtime {where.onnxruntime}, {options.threads or 'default'} threads.\n\n" + "\n".join(lines) + "\n"
    )
    if options.out:
        write_text(options.out, text)


if __name__ == "__main__":
    main()
