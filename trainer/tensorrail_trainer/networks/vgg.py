"""VGG-16 with batch-norm (Simonyan and Zisserman, ICLR 2015), with torchvision's names, so that its state dicts load unchanged.

`head="large"` is torchvision's head: 7×7 average pooling and three linear layers, with 124 of the 138 million parameters.
`head="small"` is the head that is usual for CIFAR: global average pooling and one linear layer, named `classifier`.
"""

from __future__ import annotations

from typing import Literal, get_args

import torch
from torch import Tensor, nn

Head = Literal["large", "small"]

_STAGES = ((1, 2), (2, 2), (4, 3), (8, 3), (8, 3))  # channels in units of the width, and convolutions: configuration D


class VGG(nn.Module):
    """Thirteen 3×3 convolutions in five stages, each followed by pooling, and a head: (B, channels, H, W) → (B, classes).

    The stages have `width` to 8·width channels. The large head has `hidden` units and is for images of 224 pixels. Raises
    `ValueError` for an unknown head.
    """

    def __init__(
        self, channels: int = 3, classes: int = 1000, head: Head = "large", width: int = 64, hidden: int = 4096
    ) -> None:
        super().__init__()
        if head not in get_args(Head):
            raise ValueError(f"VGG: unknown head {head!r}; expected one of {', '.join(get_args(Head))}")
        features: list[nn.Module] = []
        inputs = channels
        for factor, count in _STAGES:
            for _ in range(count):
                outputs = factor * width
                features += [nn.Conv2d(inputs, outputs, 3, 1, 1), nn.BatchNorm2d(outputs), nn.ReLU(inplace=True)]
                inputs = outputs
            features.append(nn.MaxPool2d(2, 2))
        self.features = nn.Sequential(*features)
        self.avgpool = nn.AdaptiveAvgPool2d(7 if head == "large" else 1)
        self.classifier: nn.Module = nn.Linear(inputs, classes)
        if head == "large":
            layers = (nn.Linear(49 * inputs, hidden), nn.ReLU(inplace=True), nn.Dropout(0.5))
            more = (nn.Linear(hidden, hidden), nn.ReLU(inplace=True), nn.Dropout(0.5))
            self.classifier = nn.Sequential(*layers, *more, nn.Linear(hidden, classes))
        for module in self.modules():
            if isinstance(module, nn.Conv2d):
                nn.init.kaiming_normal_(module.weight, mode="fan_out", nonlinearity="relu")
            elif isinstance(module, nn.Linear):
                nn.init.normal_(module.weight, 0.0, 0.01)
            if isinstance(module, nn.Conv2d | nn.Linear) and module.bias is not None:
                nn.init.zeros_(module.bias)

    def forward(self, x: Tensor) -> Tensor:
        """Return the class scores."""
        scores: Tensor = self.classifier(torch.flatten(self.avgpool(self.features(x)), 1))
        return scores


def vgg16_bn(channels: int = 3, classes: int = 1000, head: Head = "large", width: int = 64, hidden: int = 4096) -> VGG:
    """Return VGG-16 with batch-norm."""
    return VGG(channels, classes, head, width, hidden)
