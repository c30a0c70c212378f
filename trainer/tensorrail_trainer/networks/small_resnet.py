"""A residual network for small images, which trains in minutes on a CPU: the network of the demo."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from tensorrail_trainer.networks.resnets import BasicBlock


class SmallResNet(nn.Module):
    """A residual network for small images with a linear head: (B, C, H, W) → (B, classes).

    The stem and each stage after the first one halve the image. Stage k has `blocks` blocks of `widths[k]` channels. Average
    pooling to 4×4, a hidden linear layer and the classifier follow.
    """

    def __init__(self, channels: int, classes: int, widths: Sequence[int], blocks: int, hidden: int) -> None:
        super().__init__()
        self.stem = nn.Sequential(nn.Conv2d(channels, widths[0], 3, 2, 1, bias=False), nn.BatchNorm2d(widths[0]), nn.ReLU())
        stages = []
        previous = widths[0]
        for index, width in enumerate(widths):
            sizes = [previous, *[width] * blocks]
            stages.append(
                nn.Sequential(
                    *(BasicBlock(sizes[k], width, 2 if index and k == 0 else 1) for k in range(blocks)),
                )
            )
            previous = width
        self.stages = nn.Sequential(*stages)
        self.pool = nn.AdaptiveAvgPool2d(4)
        self.hidden = nn.Linear(16 * previous, hidden)
        self.classifier = nn.Linear(hidden, classes)

    def forward(self, x: Tensor) -> Tensor:
        """Return the class scores."""
        x = self.pool(self.stages(self.stem(x)))
        scores: Tensor = self.classifier(torch.relu(self.hidden(torch.flatten(x, 1))))
        return scores
