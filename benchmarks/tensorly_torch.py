"""The field's own factorized layers as a baseline: ResNet-18 with its 3×3 convolutions made by tensorly-torch, as ONNX.

    from tensorly_torch import write

`tucker` has the ranks published for the tensor train of three modes, so that it does the very same MACs. `tt` is
tensorly-torch's own train (I, K_h, K_w, O), whose kernel is two one-dimensional ones: cheaper at the same ranks, so they are
raised by one common factor until the whole network has as many MACs. Both run core by core (`implementation="factorized"`);
with "reconstructed" the weights are multiplied back to dense ones when ONNX Runtime loads the graph. The cores are random,
for time does not depend on them, at the scale of the weights that they stand for.

tensorly-torch is no dependency of this project: `pip install '.[bench]'`.
"""

from __future__ import annotations

import copy
import math
import warnings
from pathlib import Path
from typing import Any, Literal, get_args

import onnx
import torch
from networks import NETWORKS, network
from torch import Tensor, nn

from tensorrail_exporter.graphs.io import save_model
from tensorrail_trainer.planning.published import PUBLISHED

Kind = Literal["tucker", "tt"]
NETWORK = "resnet18"


def write(kind: Kind, folder: Path | str) -> Path:
    """Write `<folder>/tensorly_torch_<kind>.onnx`, all but its cores with the weights that `networks.write` gives ResNet-18.

    Raises `ModuleNotFoundError` where tensorly-torch is not installed.
    """
    if kind not in get_args(Kind):
        raise ValueError(f"unknown factorization {kind!r}: expected one of {', '.join(get_args(Kind))}")
    _factorized_conv()  # says what is missing before anything is made
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = factorized(network(NETWORK), kind)
    path = Path(folder) / f"tensorly_torch_{kind}.onnx"
    path.parent.mkdir(parents=True, exist_ok=True)
    save_model(_export(model, torch.zeros(2, *NETWORKS[NETWORK][1])), path)
    return path


def factorized(model: nn.Module, kind: Kind) -> nn.Module:
    """Return a copy of ResNet-18 whose published layers are `tltorch.FactorizedConv`s, their cores random."""
    layer_type = _factorized_conv()
    model = copy.deepcopy(model)
    for name, ranks in _ranks(model, kind).items():
        parent, _, leaf = name.rpartition(".")
        conv = model.get_submodule(name)
        options = {"implementation": "factorized", "factorization": kind, "decompose_weights": False}
        layer = layer_type.from_conv(conv, rank=ranks, **options)
        # Its own scale of a train is too small by the root of the product of the ranks.
        layer.weight.normal_(0, conv.weight.std().item() * (math.prod(ranks) ** 0.5 if kind == "tt" else 1.0))
        setattr(model.get_submodule(parent), leaf, layer)
    return model.eval()


def _factorized_conv() -> Any:
    try:
        from tltorch import FactorizedConv
    except ModuleNotFoundError as error:
        raise ModuleNotFoundError(f"tensorly-torch cannot be imported ({error}): pip install 'tensorly-torch>=0.5'") from None
    return FactorizedConv


def _ranks(model: nn.Module, kind: Kind) -> dict[str, tuple[int, ...]]:
    """Return the ranks of every published layer in tensorly-torch's order of modes."""
    published = {name: ranks for name, (_, ranks) in PUBLISHED[NETWORK, 3].items()}
    if kind == "tucker":
        return {name: (left, right, 3, 3) for name, (left, right) in published.items()}
    layers = _layers(model, published)
    budget = sum(
        (left * o + right * left * 9) * after + i * right * before
        for (left, right), (o, i, before, after) in zip(published.values(), layers.values(), strict=True)
    )
    low, high = 1.0, 2.0
    while high - low > 1e-4:  # MACs grow with the factor
        factor = (low + high) / 2
        low, high = (factor, high) if _train_macs(published, layers, factor) < budget else (low, factor)
    return {name: _train(ranks, layers[name], low) for name, ranks in published.items()}


def _train(ranks: tuple[int, ...], layer: tuple[int, int, int, int], factor: float) -> tuple[int, ...]:
    """Return the ranks (1, a, b, c, 1) of a train (I, K_h, K_w, O), raised by a factor, at most those that exist."""
    left, right = (math.floor(factor * rank) for rank in ranks)
    first, last = min(right, layer[1]), min(left, layer[0])
    return (1, first, min(max(first, last), 3 * first, 3 * last), last, 1)


def _train_macs(published: dict[str, tuple[int, ...]], layers: dict[str, tuple[int, int, int, int]], factor: float) -> int:
    """Return the MACs of all trains for one sample; the first of the two kernels strides along the rows alone."""
    macs = 0
    for name, ranks in published.items():
        o, i, before, after = layers[name]
        _, a, b, c, _ = _train(ranks, layers[name], factor)
        between = math.isqrt(before * after)
        macs += i * a * before + 3 * a * b * between + 3 * b * c * after + c * o * after
    return macs


def _layers(model: nn.Module, names: dict[str, tuple[int, ...]]) -> dict[str, tuple[int, int, int, int]]:
    """Return (O, I) of every layer and the positions that it reads and writes."""
    found: dict[str, tuple[int, int, int, int]] = {}

    def note(name: str, x: Tensor, y: Tensor) -> None:
        found[name] = (y.shape[1], x.shape[1], x.shape[2] * x.shape[3], y.shape[2] * y.shape[3])

    hooks = [model.get_submodule(name).register_forward_hook(lambda _, x, y, name=name: note(name, x[0], y)) for name in names]
    with torch.no_grad():
        model(torch.zeros(1, *NETWORKS[NETWORK][1]))
    for hook in hooks:
        hook.remove()
    return {name: found[name] for name in names}


def _export(model: nn.Module, example: Tensor) -> onnx.ModelProto:
    """Return the graph that `torch.onnx.export` makes by itself: what a user of tensorly-torch would serve."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # torch.export's notes about its own tree specs
        program = torch.onnx.export(
            model,
            (example,),
            dynamo=True,
            opset_version=20,
            dynamic_shapes=({0: torch.export.Dim("batch")},),
            input_names=["image"],
            output_names=["logits"],
            verbose=False,
        )
    if program is None:
        raise RuntimeError("torch.onnx.export returned no program")
    return program.model_proto
