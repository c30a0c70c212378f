"""Gates' inputs made outside a recurrent layer's loop: ONNX's own node behind an identity, or a Scan? On this machine's CPU.

    python benchmarks/loops.py [--seconds 1.5] [-o results/loops.md]

The layer's input weight, 1024 inputs, is a TT-matrix of rank 4. Both graphs run the same steps before the loop, interleaved, in
three fresh processes.
"""

from __future__ import annotations

import argparse
import tempfile
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import onnx
from onnx import TensorProto, helper, numpy_helper

from tensorrail_exporter import LayerPlan, Plan, decompose_graph, factorize
from tensorrail_exporter.formats import contraction
from tensorrail_exporter.graphs.io import save_model
from tensorrail_runtime.measure.latency import bench
from tensorrail_runtime.measure.timing import Timing
from tensorrail_runtime.records import write_text
from tensorrail_runtime.sessions.machine import machine

INPUTS = 1024
GATES = {"LSTM": 4, "GRU": 3}


def cases() -> Iterator[tuple[str, int, int, int]]:
    """Yield operator, hidden units, time steps and batch size."""
    for hidden in (64, 128, 192, 256, 512):
        for steps in (6, 50):
            for batch in (1, 32):
                yield "LSTM", hidden, steps, batch
    for hidden in (128, 256, 512):
        yield "GRU", hidden, 50, 1


def network(op: str, hidden: int, steps: int) -> onnx.ModelProto:
    """Return one recurrent layer, (T, B, 1024) to (T, 1, B, H)."""
    rng = np.random.default_rng(0)
    rows = GATES[op] * hidden
    weights = {
        "w": rng.standard_normal((1, rows, INPUTS)) / INPUTS**0.5,
        "r": rng.standard_normal((1, rows, hidden)) / hidden**0.5,
        "b": rng.standard_normal((1, 2 * rows)),
    }
    graph = helper.make_graph(
        [helper.make_node(op, ["x", *weights], ["y"], "rnn", hidden_size=hidden)],
        "layer",
        [helper.make_tensor_value_info("x", TensorProto.FLOAT, [steps, "batch", INPUTS])],
        [helper.make_tensor_value_info("y", TensorProto.FLOAT, [steps, 1, "batch", hidden])],
        [numpy_helper.from_array(value.astype(np.float32), name) for name, value in weights.items()],
    )
    return helper.make_model(graph, opset_imports=[helper.make_opsetid("", 20)], ir_version=10)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--seconds", type=float, default=1.5)
    parser.add_argument("-o", "--out", type=Path)
    options = parser.parse_args()
    contraction.SCAN_FROM = 0
    rows = []
    for op, hidden, steps, batch in cases():
        dense = network(op, hidden, steps)
        modes = (GATES[op] * hidden // 4, 4, INPUTS // 32, 32)
        plan = Plan(layers=(LayerPlan(name="w", format="ttm", modes=modes, ranks=(1, 4, 1)),))
        cores = decompose_graph(dense, plan)
        with tempfile.TemporaryDirectory() as folder:
            paths = [Path(folder) / f"{name}.onnx" for name in ("node", "scan")]
            for path, scan in zip(paths, (False, True), strict=True):
                save_model(factorize(dense, plan, cores, scan=scan).model, path)
            found = bench(paths, Timing(batch, seconds=options.seconds, processes=3))
        (node, scan), ratio = found.latencies, found.ratios[0]
        rows.append(
            f"| {op} | {hidden} | {GATES[op] * hidden} | {steps} | {batch} | {node.p50:.3f} ms | {scan.p50:.3f} ms | "
            f"{ratio.value:.2f}× [{ratio.low:.2f}, {ratio.high:.2f}] |"
        )
        print(rows[-1], flush=True)
    about = (__doc__ or "").split("\n\n")[2].strip().replace("\n", " ")
    text = "\n".join(
        [
            "# The loop of a recurrent layer without a boundary: ONNX's node, or a Scan",
            "",
            f"`python benchmarks/loops.py`, {machine().processor}, CPU provider. {about}",
            "",
            "| layer | hidden units | gates · units | steps | batch | LSTM or GRU on an identity | Scan | Scan is faster by |",
            "|---|---|---|---|---|---|---|---|",
            *rows,
            "",
        ]
    )
    if options.out:
        write_text(options.out, text)


if __name__ == "__main__":
    main()
