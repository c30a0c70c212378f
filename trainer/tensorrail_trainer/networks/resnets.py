"""Residual networks (He et al., CVPR 2016), with torchvision's parameter names, so that its state dicts load unchanged.

ResNet-18 and ResNet-50 are for large images; the stride of a bottleneck is in its 3×3 convolution. `stem="small"` replaces the
7×7 convolution and the pooling by one 3×3 convolution with stride 2, for images of 32 to 64 pixels. ResNet-20, -32 and -56 are
the paper's networks for CIFAR, with 6n + 2 layers in three stages. Where the shape changes, `shortcut="A"` has no parameters:
it takes every second pixel and fills the new channels with zeros. `shortcut="B"` uses 1×1 convolutions.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal, get_args

import torch
from torch import Tensor, nn

Stem = Literal["large", "small"]
Shortcut = Literal["A", "B"]


class BasicBlock(nn.Module):
    """Two 3×3 convolutions and a shortcut: (B, I, H, W) → (B, O, H / stride, W / stride)."""

    expansion = 1

    def __init__(self, inputs: int, width: int, stride: int, shortcut: Shortcut = "B") -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(inputs, width, 3, stride, 1, bias=False)
        self.bn1 = nn.BatchNorm2d(width)
        self.relu = nn.ReLU(inplace=True)
        self.conv2 = nn.Conv2d(width, width, 3, 1, 1, bias=False)
        self.bn2 = nn.BatchNorm2d(width)
        self.downsample = _shortcut(inputs, width, stride, shortcut)

    def forward(self, x: Tensor) -> Tensor:
        """Return the block's output."""
        y = self.bn2(self.conv2(self.relu(self.bn1(self.conv1(x)))))
        out: Tensor = self.relu(y + (x if self.downsample is None else self.downsample(x)))
        return out


class Subsample(nn.Module):
    """Take every `stride`-th pixel and add channels of zeros: (B, I, H, W) → (B, O, H / stride, W / stride)."""

    def __init__(self, inputs: int, outputs: int, stride: int) -> None:
        super().__init__()
        self.stride = stride
        self.before = (outputs - inputs) // 2
        self.after = outputs - inputs - self.before

    def forward(self, x: Tensor) -> Tensor:
        """Return the shortcut's output."""
        return nn.functional.pad(x[:, :, :: self.stride, :: self.stride], (0, 0, 0, 0, self.before, self.after))


class Bottleneck(nn.Module):
    """1×1, 3×3 and 1×1 convolutions and a shortcut: (B, I, H, W) → (B, 4·width, H / stride, W / stride)."""

    expansion = 4

    def __init__(self, inputs: int, width: int, stride: int) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(inputs, width, 1, bias=False)
        self.bn1 = nn.BatchNorm2d(width)
        self.conv2 = nn.Conv2d(width, width, 3, stride, 1, bias=False)
        self.bn2 = nn.BatchNorm2d(width)
        self.conv3 = nn.Conv2d(width, 4 * width, 1, bias=False)
        self.bn3 = nn.BatchNorm2d(4 * width)
        self.relu = nn.ReLU(inplace=True)
        self.downsample = _shortcut(inputs, 4 * width, stride)

    def forward(self, x: Tensor) -> Tensor:
        """Return the block's output."""
        y = self.relu(self.bn1(self.conv1(x)))
        y = self.bn3(self.conv3(self.relu(self.bn2(self.conv2(y)))))
        out: Tensor = self.relu(y + (x if self.downsample is None else self.downsample(x)))
        return out


class ResNet(nn.Module):
    """Four stages of residual blocks: (B, channels, H, W) → (B, classes). Raises `ValueError` for an unknown stem."""

    layer1: nn.Sequential
    layer2: nn.Sequential
    layer3: nn.Sequential
    layer4: nn.Sequential

    def __init__(
        self,
        block: type[BasicBlock | Bottleneck],
        blocks: Sequence[int],
        channels: int = 3,
        classes: int = 1000,
        stem: Stem = "large",
        width: int = 64,
    ) -> None:
        super().__init__()
        if stem not in get_args(Stem):
            raise ValueError(f"ResNet: unknown stem {stem!r}; expected one of {', '.join(get_args(Stem))}")
        large = stem == "large"
        self.conv1 = nn.Conv2d(channels, width, 7 if large else 3, 2, 3 if large else 1, bias=False)
        self.bn1 = nn.BatchNorm2d(width)
        self.relu = nn.ReLU(inplace=True)
        self.maxpool = nn.MaxPool2d(3, 2, 1) if large else nn.Identity()
        inputs = width
        for stage, count in enumerate(blocks):
            planes = width << stage
            layers = []
            for k in range(count):
                layers.append(block(inputs, planes, 2 if stage and k == 0 else 1))
                inputs = planes * block.expansion
            self.add_module(f"layer{stage + 1}", nn.Sequential(*layers))
        self.avgpool = nn.AdaptiveAvgPool2d(1)
        self.fc = nn.Linear(inputs, classes)
        _initialize(self)

    def forward(self, x: Tensor) -> Tensor:
        """Return the class scores."""
        x = self.maxpool(self.relu(self.bn1(self.conv1(x))))
        for stage in (self.layer1, self.layer2, self.layer3, self.layer4):
            x = stage(x)
        scores: Tensor = self.fc(torch.flatten(self.avgpool(x), 1))
        return scores


class CifarResNet(nn.Module):
    """Three stages of `blocks` blocks each, of `width`, 2·width and 4·width channels: (B, channels, H, W) → (B, classes).

    Raises `ValueError` for an unknown shortcut.
    """

    layer1: nn.Sequential
    layer2: nn.Sequential
    layer3: nn.Sequential

    def __init__(self, blocks: int, channels: int = 3, classes: int = 10, shortcut: Shortcut = "A", width: int = 16) -> None:
        super().__init__()
        if shortcut not in get_args(Shortcut):
            raise ValueError(f"CifarResNet: unknown shortcut {shortcut!r}; expected one of {', '.join(get_args(Shortcut))}")
        self.conv1 = nn.Conv2d(channels, width, 3, 1, 1, bias=False)
        self.bn1 = nn.BatchNorm2d(width)
        self.relu = nn.ReLU(inplace=True)
        inputs = width
        for stage in range(3):
            planes = width << stage
            sizes = [inputs, *[planes] * (blocks - 1)]
            layers = [BasicBlock(size, planes, 2 if stage and k == 0 else 1, shortcut) for k, size in enumerate(sizes)]
            self.add_module(f"layer{stage + 1}", nn.Sequential(*layers))
            inputs = planes
        self.avgpool = nn.AdaptiveAvgPool2d(1)
        self.fc = nn.Linear(inputs, classes)
        _initialize(self)

    def forward(self, x: Tensor) -> Tensor:
        """Return the class scores."""
        x = self.relu(self.bn1(self.conv1(x)))
        x = self.layer3(self.layer2(self.layer1(x)))
        scores: Tensor = self.fc(torch.flatten(self.avgpool(x), 1))
        return scores


def resnet18(channels: int = 3, classes: int = 1000, stem: Stem = "large", width: int = 64) -> ResNet:
    """Return ResNet-18."""
    return ResNet(BasicBlock, (2, 2, 2, 2), channels, classes, stem, width)


def resnet50(channels: int = 3, classes: int = 1000, stem: Stem = "large", width: int = 64) -> ResNet:
    """Return ResNet-50."""
    return ResNet(Bottleneck, (3, 4, 6, 3), channels, classes, stem, width)


def resnet20(channels: int = 3, classes: int = 10, shortcut: Shortcut = "A", width: int = 16) -> CifarResNet:
    """Return ResNet-20 for images of 32 pixels."""
    return CifarResNet(3, channels, classes, shortcut, width)


def resnet32(channels: int = 3, classes: int = 10, shortcut: Shortcut = "A", width: int = 16) -> CifarResNet:
    """Return ResNet-32 for images of 32 pixels."""
    return CifarResNet(5, channels, classes, shortcut, width)


def resnet56(channels: int = 3, classes: int = 10, shortcut: Shortcut = "A", width: int = 16) -> CifarResNet:
    """Return ResNet-56 for images of 32 pixels."""
    return CifarResNet(9, channels, classes, shortcut, width)


def _shortcut(inputs: int, outputs: int, stride: int, kind: Shortcut = "B") -> nn.Module | None:
    if stride == 1 and inputs == outputs:
        return None
    if kind == "A":
        return Subsample(inputs, outputs, stride)
    return nn.Sequential(nn.Conv2d(inputs, outputs, 1, stride, bias=False), nn.BatchNorm2d(outputs))


def _initialize(model: nn.Module) -> None:
    """Initialize the weights of the convolutions as in He et al. (ICCV 2015)."""
    for module in model.modules():
        if isinstance(module, nn.Conv2d):
            nn.init.kaiming_normal_(module.weight, mode="fan_out", nonlinearity="relu")
