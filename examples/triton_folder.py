"""A Triton model repository with one model, or with a dense and a factored version; Triton is not needed to write it.

    python examples/triton_folder.py [MODEL.onnx] [--dense DENSE.onnx] [--name NAME] [--repository FOLDER]

The same as `tensorrail package MODEL.onnx --triton FOLDER --dense DENSE.onnx`; without a file, the script writes a
small model.
"""

from __future__ import annotations

import argparse
import sys
import tempfile
from pathlib import Path

import numpy as np
import onnx
from onnx import TensorProto, helper, numpy_helper

import tensorrail as tr


def stand_in(folder: Path) -> tuple[Path, Path]:
    """Write a matrix product, dense and as two factors of rank 8, and return both paths; they stand in for your own files."""
    rng = np.random.default_rng(0)
    left, right = (rng.standard_normal(shape).astype(np.float32) for shape in ((256, 8), (8, 64)))
    paths = []
    for name, weights in (("dense.onnx", [left @ right]), ("model.onnx", [left, right])):
        tensors = ["features", *(f"step.{k}" for k in range(len(weights) - 1)), "scores"]
        nodes = [helper.make_node("MatMul", [tensors[k], f"weight.{k}"], [tensors[k + 1]]) for k in range(len(weights))]
        ends = [
            helper.make_tensor_value_info(tensor, TensorProto.FLOAT, ["batch", size])
            for tensor, size in (("features", 256), ("scores", 64))
        ]
        constants = [numpy_helper.from_array(weight, f"weight.{k}") for k, weight in enumerate(weights)]
        graph = helper.make_graph(nodes, "stand-in", ends[:1], ends[1:], constants)
        model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 20)], ir_version=9)
        onnx.checker.check_model(model, full_check=True)
        onnx.save(model, folder / name)
        paths.append(folder / name)
    return paths[1], paths[0]


def main() -> None:
    """Write the repository and show its configuration."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("model", type=Path, nargs="?")
    parser.add_argument("--dense", type=Path, help="The dense model: it becomes version 1, and MODEL version 2.")
    parser.add_argument("--name", default="factored")
    parser.add_argument("--repository", type=Path, default=Path("repository"))
    options = parser.parse_args()
    serving = tr.Serving(settings=tr.Session(threads=1), max_batch=16, delay=500, instances=2)
    with tempfile.TemporaryDirectory() as folder:
        if options.model is None:
            options.model, options.dense = stand_in(Path(folder))
        try:
            contents = tr.Repository(name=options.name, dense=options.dense)
            written = tr.package(options.model, options.repository, contents=contents, serving=serving)
        except tr.ModelError as error:
            sys.exit(str(error))
    for model in written.models:
        print(f"{model.folder}: versions {model.versions}")
        print((Path(model.folder) / "config.pbtxt").read_text(encoding="utf-8"))
    print(f"serve it with: tritonserver --model-repository={options.repository}")


if __name__ == "__main__":
    main()
