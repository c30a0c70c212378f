"""ADMM under Lightning: a convolutional network for the digits of scikit-learn.

    python examples/lightning_images.py [--epochs 8] [--out FOLDER]

The images (8×8) come with scikit-learn; nothing is downloaded. It takes less than a minute.
"""

from __future__ import annotations

import argparse
import logging
import tempfile
import warnings
from pathlib import Path

import torch
from lightning.pytorch import LightningModule, Trainer
from sklearn.datasets import load_digits
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

import tensorrail as tr
from tensorrail.integrations.lightning import ADMMCallback

LR, MOMENTUM, BATCH = 0.05, 0.9, 64


class Digits(LightningModule):
    """Images (batch, 1, 8, 8) → logits (batch, 10)."""

    def __init__(self, lr: float = LR) -> None:
        super().__init__()
        self.lr = lr
        self.model = nn.Sequential(
            nn.Conv2d(1, 32, 3, padding=1), nn.ReLU(), nn.Conv2d(32, 64, 3, padding=1), nn.ReLU(), nn.MaxPool2d(2),
            nn.Conv2d(64, 64, 3, padding=1), nn.ReLU(), nn.Flatten(), nn.Linear(1024, 10),
        )  # fmt: skip

    def forward(self, x: Tensor) -> Tensor:
        """Return the logits."""
        logits: Tensor = self.model(x)
        return logits

    def training_step(self, batch: tuple[Tensor, Tensor], _: int) -> Tensor:
        """Return the loss of a batch."""
        x, y = batch
        return nn.functional.cross_entropy(self(x), y)

    def configure_optimizers(self) -> torch.optim.Optimizer:
        """Return the optimizer of the present parameters: weights, or cores once the network is cut."""
        return torch.optim.SGD(self.parameters(), lr=self.lr, momentum=MOMENTUM)


def images() -> tuple[TensorDataset, tuple[Tensor, Tensor]]:
    """Return the images to train on, and 400 others with their labels."""
    digits = load_digits()
    order = torch.randperm(len(digits.target), generator=torch.Generator().manual_seed(0))
    x = torch.tensor(digits.images, dtype=torch.float32)[order][:, None] / 16
    y = torch.tensor(digits.target)[order]
    return TensorDataset(x[400:], y[400:]), (x[:400], y[:400])


def main() -> None:
    """Train a dense network, train it toward low rank, cut and fine-tune it, and export it."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--epochs", type=int, default=8, help="Epochs of the ADMM phase.")
    parser.add_argument("--out", type=Path, help="Folder for the exported model. Default: none is kept.")
    options = parser.parse_args()
    logging.getLogger("lightning.pytorch").setLevel(logging.ERROR)
    warnings.filterwarnings("ignore", module="lightning")
    data, (x, y) = images()
    torch.manual_seed(0)
    module, loader = Digits(), DataLoader(data, batch_size=BATCH, shuffle=True)

    def trainer_of(epochs: int, *callbacks: ADMMCallback) -> Trainer:
        return Trainer(
            max_epochs=epochs, callbacks=list(callbacks), accelerator="cpu", logger=False, enable_checkpointing=False,
            enable_progress_bar=False, enable_model_summary=False,
        )  # fmt: skip

    @torch.no_grad()
    def accuracy() -> float:
        return 100 * float((module.eval()(x).argmax(1) == y).float().mean())

    trainer_of(6).fit(module, loader)
    print(f"dense: {accuracy():.1f} %")
    plan = tr.Plan(layers=tr.plan_layers(module, "model.[25]", ranks=16))
    rho = (1 - MOMENTUM) / LR / len(loader)  # so that rho · lr · steps / (1 − momentum) = 1
    callback = ADMMCallback(plan, rho=rho)
    module.train()
    trainer_of(options.epochs, callback).fit(module, loader)
    largest = max(residual.primal for residual in callback.residuals)
    print(f"after ADMM, still dense: {accuracy():.1f} %, largest primal residual {largest:.3f}")
    module.lr = LR / 5
    callback.finish(trainer_of(3), module.train(), loader)
    print(f"cut into cores and fine-tuned: {accuracy():.1f} %")
    with tempfile.TemporaryDirectory() as folder:
        report = tr.export_trained(module.model, x[:2], options.out or Path(folder) / "exported")
        print(f"model.onnx differs from the module by {report.torch_difference:.1e}; {report.layers} layers made of cores")


if __name__ == "__main__":
    main()
