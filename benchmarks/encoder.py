"""A small transformer over sequences, for the speech task of `admm.py`."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from tensorrail_trainer.networks.vit import Block


class Encoder(nn.Module):
    """Linear embedding, learned positions, pre-norm blocks, mean over the steps, classifier: (B, T, I) → (B, classes)."""

    def __init__(self, inputs: int, steps: int, classes: int, dim: int, depth: int) -> None:
        super().__init__()
        self.embed = nn.Linear(inputs, dim)
        self.positions = nn.Parameter(0.02 * torch.randn(1, steps, dim))
        self.blocks = nn.Sequential(*(Block(dim, dim // 32, 4 * dim) for _ in range(depth)))
        self.norm = nn.LayerNorm(dim)
        self.head = nn.Linear(dim, classes)

    def forward(self, x: Tensor) -> Tensor:
        """Return the scores of the classes."""
        scores: Tensor = self.head(self.norm(self.blocks(self.embed(x) + self.positions)).mean(1))
        return scores


def encoder(inputs: int = 80, steps: int = 32, classes: int = 10, dim: int = 96, depth: int = 3) -> Encoder:
    """Return a fresh network."""
    return Encoder(inputs, steps, classes, dim, depth)
