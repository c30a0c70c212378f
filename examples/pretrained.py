"""A timm or torchvision network: decomposed to low rank, exported, checked and timed.

    python examples/pretrained.py [torchvision/resnet18 | timm/resnet18] [--params 2.3] [--image 64] [--weights] [--out FOLDER]

It needs torchvision or timm, and prints one line if the package is not installed. --weights downloads the published weights.
Decomposition alone loses accuracy: fine-tune afterwards, or train toward low rank first (own_loop.py).
"""

from __future__ import annotations

import argparse
import importlib
import sys
from pathlib import Path

import torch
from torch import nn

import tensorrail as tr


def make(name: str, weights: bool) -> nn.Module | None:
    """Return the network `torchvision/NAME` or `timm/NAME`; None, with a printed reason, if the package is missing."""
    package, _, model = name.partition("/")
    if package not in ("torchvision", "timm"):
        sys.exit(f"expected torchvision/NAME or timm/NAME, got {name!r}")
    try:
        module = importlib.import_module(package)
    except ModuleNotFoundError as error:
        print(f"skipped: {error.name} is not installed (pip install {error.name})")
        return None
    except RuntimeError as error:  # its operators were built for another version of torch
        print(f"skipped: {package} does not fit this version of torch ({error})")
        return None
    if package == "timm":
        network: nn.Module = module.create_model(model, pretrained=weights)
    else:
        network = module.models.get_model(model, weights="DEFAULT" if weights else None)
    return network.eval()


def main() -> None:
    """Plan by size, rewrite the ONNX graph, and print the errors and the speed-up."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("name", nargs="?", default="torchvision/resnet18")
    parser.add_argument("--params", type=float, default=2.3, help="How many times fewer parameters the network should have.")
    parser.add_argument("--image", type=int, default=64, help="Height and width of the images.")
    parser.add_argument("--seconds", type=float, default=2.0, help="Seconds of timing.")
    parser.add_argument("--weights", action="store_true", help="Download and use trained weights.")
    parser.add_argument("--out", type=Path, default=Path("runs/pretrained"), help="Folder for dense.onnx and model.onnx.")
    options = parser.parse_args()
    options.out.mkdir(parents=True, exist_ok=True)
    torch.manual_seed(0)
    model = make(options.name, options.weights)
    if model is None:
        return
    # Ranks from the singular values of the weights, chosen over all 3×3 convolutions together; use trained weights for this.
    plan = tr.Plan(layers=tr.plan_to_size(model, "layer*.conv?", options.params))
    dense = tr.to_onnx(model, torch.randn(2, 3, options.image, options.image))
    paths = options.out / "dense.onnx", options.out / "model.onnx"
    tr.save_model(dense, paths[0])
    factored = tr.factorize(dense, plan, tr.decompose_graph(dense, plan))
    tr.save_model(factored.model, paths[1])
    sizes = [tr.inspect(path) for path in paths]
    print(f"{len(factored.layers)} layers factorized; parameters ÷ {sizes[0].params / sizes[1].params:.2f}", end=", ")
    print(f"FLOPs ÷ {sizes[0].flops / sizes[1].flops:.2f}")
    print(f"outputs differ by {tr.check(*paths, tolerance=None).worst:.2f} (relative L2) before any training")
    ratio = tr.bench(paths, options=tr.Options(timing=tr.Timing(seconds=options.seconds))).ratios[0]
    print(f"speed-up {ratio.value:.2f}× [{ratio.low:.2f}, {ratio.high:.2f}] at batch 1")


if __name__ == "__main__":
    main()
