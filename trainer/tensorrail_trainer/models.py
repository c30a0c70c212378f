"""The networks that recipes can name."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor, nn

from tensorrail_trainer.mobilenet import MobileNetV2
from tensorrail_trainer.resnets import resnet18, resnet50
from tensorrail_trainer.vit import vit_tiny


class BasicBlock(nn.Module):
    """Two 3×3 convolutions with batch-norm and a shortcut, 1×1 where the shape changes (He et al., CVPR 2016)."""

    def __init__(self, inputs: int, outputs: int, stride: int) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(inputs, outputs, 3, stride, 1, bias=False)
        self.bn1 = nn.BatchNorm2d(outputs)
        self.conv2 = nn.Conv2d(outputs, outputs, 3, 1, 1, bias=False)
        self.bn2 = nn.BatchNorm2d(outputs)
        self.shortcut: nn.Module = nn.Identity()
        if stride != 1 or inputs != outputs:
            conv = nn.Conv2d(inputs, outputs, 1, stride, bias=False)
            self.shortcut = nn.Sequential(conv, nn.BatchNorm2d(outputs))

    def forward(self, x: Tensor) -> Tensor:
        """Map (B, I, H, W) to (B, O, H / stride, W / stride)."""
        y = torch.relu(self.bn1(self.conv1(x)))
        return torch.relu(self.bn2(self.conv2(y)) + self.shortcut(x))


class SmallResNet(nn.Module):
    """A residual network for small images with a linear head: (B, C, H, W) → (B, classes).

    The stem halves the image; stage k has `blocks` blocks of `widths[k]` channels, each stage after the first halves
    again; a 4×4 average pooling, a hidden linear layer and the classifier follow.
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


class LSTMClassifier(nn.Module):
    """One LSTM layer over a sequence and a linear head on its last hidden state: (B, T, inputs) → (B, classes)."""

    def __init__(self, inputs: int, hidden: int, classes: int) -> None:
        super().__init__()
        self.rnn = nn.LSTM(inputs, hidden, batch_first=True)
        self.classifier = nn.Linear(hidden, classes)

    def forward(self, x: Tensor) -> Tensor:
        """Return the class scores."""
        _, (last, _) = self.rnn(x)
        scores: Tensor = self.classifier(last[-1])
        return scores


MODELS: dict[str, Callable[..., nn.Module]] = {
    "lstm": LSTMClassifier,
    "mobilenet_v2": MobileNetV2,
    "resnet18": resnet18,
    "resnet50": resnet50,
    "small_resnet": SmallResNet,
    "vit_tiny": vit_tiny,
}
