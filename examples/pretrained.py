"""A timm or torchvision network: cut to low rank, exported, checked and timed; with --weights its published ones.

    python examples/pretrained.py [torchvision/resnet18 | timm/resnet18] [--params 2.3] [--image 64] [--weights] [--out FOLDER]

Needs torchvision or timm, and says so in one line where neither is installed. --weights downloads. A cut alone loses accuracy:
fine-tune afterwards, or train toward low rank first (own_loop.py).
"""

from __future__ import annotations

import argparse
import importlib
import sys
from pathlib import Path

import torch
from torch import nn

import tensorrail as tr
from tensorrail_runtime import bench, cost, parity


def make(name: str, weights: bool) -> nn.Module | None:
    """Return a network of `torchvision/NAME` or `timm/NAME`; None, and a line that says so, where the package cannot be had."""
    package, _, model = name.partition("/")
    if package not in ("torchvision", "timm"):
        sys.exit(f"expected torchvision/NAME or timm/NAME, and {name!r} came")
    try:
        module = importlib.import_module(package)
    except ModuleNotFoundError as error:
        print(f"left out: {error.name} is not installed (pip install {error.name})")
        return None
    except RuntimeError as error:  # of operators: it was built for another torch than the one that is here
        print(f"left out: {package} does not fit this torch ({error})")
        return None
    if package == "timm":
        made: nn.Module = module.create_model(model, pretrained=weights)
    else:
        made = module.models.get_model(model, weights="DEFAULT" if weights else None)
    return made.eval()


def main() -> None:
    """Plan by size, rewrite the ONNX graph, and print the errors and the speed-up."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("name", nargs="?", default="torchvision/resnet18")
    parser.add_argument("--params", type=float, default=2.3, help="How many times fewer parameters.")
    parser.add_argument("--image", type=int, default=64, help="Height and width of the images.")
    parser.add_argument("--seconds", type=float, default=2.0, help="Of timing.")
    parser.add_argument("--weights", action="store_true", help="Trained weights; downloads them.")
    parser.add_argument("--out", type=Path, default=Path())
    options = parser.parse_args()
    torch.manual_seed(0)
    model = make(options.name, options.weights)
    if model is None:
        return
    # Ranks by the spectrum of the weights, one choice over all 3×3 convolutions; random weights have nothing to tell apart.
    plan = tr.Plan(layers=tr.plan_to_size(model, "layer*.conv?", options.params))
    dense = tr.to_onnx(model, torch.randn(2, 3, options.image, options.image))
    paths = options.out / "dense.onnx", options.out / "model.onnx"
    tr.save_model(dense, paths[0])
    factored = tr.factorize(dense, plan, tr.decompose_graph(dense, plan))
    tr.save_model(factored.model, paths[1])
    sizes = [cost(path) for path in paths]
    print(f"{len(factored.layers)} layers cut; parameters ÷ {sizes[0].params / sizes[1].params:.2f}", end=", ")
    print(f"FLOPs ÷ {sizes[0].flops / sizes[1].flops:.2f}")
    print(f"outputs differ by {parity(*paths, tolerance=None).worst:.2f} relative before any training")
    ratio = bench(paths, seconds=options.seconds).ratios[0]
    print(f"speed-up {ratio.value:.2f}× [{ratio.low:.2f}, {ratio.high:.2f}] at batch 1")


if __name__ == "__main__":
    main()
