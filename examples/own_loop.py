"""ADMM in four lines of your own training loop: train, factorize, fine-tune, export, time.

    python examples/own_loop.py [--epochs 8] [--out FOLDER]

The data are generated: blurred blobs in one of eight places, with noise. It takes a few seconds.
"""

from __future__ import annotations

import argparse
import copy
from pathlib import Path

import torch
from torch import Tensor, nn

import tensorrail as tr

LR, MOMENTUM, BATCH = 0.05, 0.9, 32


def blobs(count: int, seed: int) -> tuple[Tensor, Tensor]:
    """Return images (count, 3, 16, 16) with one blob each, and its place on a circle, 0 to 7 (count,)."""
    random = torch.Generator().manual_seed(seed)
    labels = torch.randint(0, 8, (count,), generator=random)
    angle = (labels + 0.8 * (torch.rand(count, generator=random) - 0.5)) * torch.pi / 4
    centre = 7.5 + 4.5 * torch.stack([angle.sin(), angle.cos()], 1)
    axis = torch.arange(16.0)
    far = (axis[None, :, None] - centre[:, 0, None, None]) ** 2 + (axis[None, None, :] - centre[:, 1, None, None]) ** 2
    images = torch.exp(-far / 6)[:, None].repeat(1, 3, 1, 1)
    return images + 0.5 * torch.randn(images.shape, generator=random), labels


def train(model: nn.Module, x: Tensor, y: Tensor, epochs: int, lr: float, admm: tr.ADMM | None = None) -> None:
    """Train the model in place; with ADMM, add its penalty to the loss and update its variables after each epoch."""
    optimizer = torch.optim.SGD(model.parameters(), lr=lr, momentum=MOMENTUM)
    for epoch in range(epochs):
        for batch, labels in zip(x.split(BATCH), y.split(BATCH), strict=True):
            loss = nn.functional.cross_entropy(model(batch), labels)
            if admm is not None:
                loss = loss + admm.penalty()
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
        if admm is not None:
            residuals = admm.update()
            print(f"  epoch {epoch + 1}: largest primal residual {max(r.primal for r in residuals):.3f}")


@torch.no_grad()
def accuracy(model: nn.Module, x: Tensor, y: Tensor) -> float:
    """Return the accuracy in percent."""
    return 100 * float((model(x).argmax(1) == y).float().mean())


def main() -> None:
    """Train a dense network, train it toward low rank, factorize and fine-tune it, and compare it with a dense control."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--epochs", type=int, default=8, help="Epochs of the ADMM phase.")
    parser.add_argument("--out", type=Path, default=Path("runs/own-loop"), help="Folder for dense.onnx and model.onnx.")
    options = parser.parse_args()
    options.out.mkdir(parents=True, exist_ok=True)
    torch.manual_seed(0)
    (x, y), test = blobs(320, seed=0), blobs(320, seed=1)
    model: nn.Module = nn.Sequential(
        nn.Conv2d(3, 32, 3, padding=1), nn.ReLU(), nn.Conv2d(32, 32, 3, padding=1), nn.ReLU(), nn.MaxPool2d(2),
        nn.Conv2d(32, 32, 3, padding=1), nn.ReLU(), nn.AdaptiveAvgPool2d(4), nn.Flatten(), nn.Linear(512, 8),
    )  # fmt: skip
    train(model, x, y, 4, LR)
    control = copy.deepcopy(model)
    print(f"dense: {accuracy(model, *test):.1f} %")

    plan = tr.Plan(layers=tr.plan_layers(model, "[25]", ranks=16))
    rho = (1 - MOMENTUM) / LR / (len(x) / BATCH)  # so that rho · lr · steps / (1 − momentum) = 1
    admm = tr.ADMM(model, plan, rho=rho)
    train(model, x, y, options.epochs, LR, admm)
    print(f"after ADMM, still dense: {accuracy(model, *test):.1f} %")
    model = admm.factorize()
    print(f"cut into cores: {accuracy(model, *test):.1f} %")
    train(model, x, y, 2, LR / 5)
    print(f"fine-tuned: {accuracy(model, *test):.1f} %")
    train(control, x, y, options.epochs, LR)
    train(control, x, y, 2, LR / 5)
    print(f"dense control, as many epochs: {accuracy(control, *test):.1f} %")

    dense = tr.to_onnx(tr.to_dense(model), x[:2])
    cores = {name: [core.numpy() for core in layer] for name, layer in tr.cores_of(model).items()}
    paths = [options.out / "dense.onnx", options.out / "model.onnx"]
    tr.save_model(dense, paths[0])
    tr.save_model(tr.factorize(dense, plan, cores).model, paths[1])
    error = tr.check(*paths, tolerance=1e-4).worst
    ratio = tr.bench(paths, options=tr.Options(timing=tr.Timing(batch=8, seconds=1.0))).ratios[0]
    print(f"numerical error {error:.1e}; speed-up {ratio.value:.2f}× [{ratio.low:.2f}, {ratio.high:.2f}] at batch 8")


if __name__ == "__main__":
    main()
