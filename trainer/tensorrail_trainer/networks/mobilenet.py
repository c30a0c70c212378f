"""MobileNetV2 (Sandler et al., CVPR 2018), with torchvision's parameter names, so that its state dicts load unchanged.

An inverted residual block expands its input by a 1×1 convolution, filters each channel separately (depthwise 3×3), and reduces
the channels by a 1×1 convolution without an activation. The 1×1 convolutions hold nearly all parameters and MACs and can be
factored; the depthwise convolutions stay dense.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

_STAGES = (  # expansion t, channels c, blocks n, stride of the first block s: Table 2 of the paper
    (1, 16, 1, 1),
    (6, 24, 2, 2),
    (6, 32, 3, 2),
    (6, 64, 4, 2),
    (6, 96, 3, 1),
    (6, 160, 3, 2),
    (6, 320, 1, 1),
)


class InvertedResidual(nn.Module):
    """1×1, depthwise 3×3, 1×1, and a shortcut if the shape does not change: (B, I, H, W) → (B, O, H / stride, W / stride)."""

    def __init__(self, inputs: int, outputs: int, stride: int, expansion: int) -> None:
        super().__init__()
        self.residual = stride == 1 and inputs == outputs
        hidden = inputs * expansion
        expand = [_conv(inputs, hidden, 1)] if expansion != 1 else []
        reduce = nn.Conv2d(hidden, outputs, 1, bias=False)
        self.conv = nn.Sequential(*expand, _conv(hidden, hidden, 3, stride, hidden), reduce, nn.BatchNorm2d(outputs))

    def forward(self, x: Tensor) -> Tensor:
        """Return the block's output."""
        out: Tensor = self.conv(x)
        return x + out if self.residual else out


class MobileNetV2(nn.Module):
    """Seven stages of inverted residuals between two plain convolutions: (B, channels, H, W) → (B, classes).

    `width` multiplies the channels of every layer, rounded to multiples of 8; the last convolution has at least 1,280.
    `blocks` is the largest number of blocks per stage: 1 gives a shallow network for small images.
    """

    def __init__(self, channels: int = 3, classes: int = 1000, width: float = 1.0, blocks: int = 4) -> None:
        super().__init__()
        inputs, last = _round(32 * width), _round(1280 * max(1.0, width))
        features: list[nn.Module] = [_conv(channels, inputs, 3, 2)]
        for expansion, planes, count, stride in _STAGES:
            outputs = _round(planes * width)
            for k in range(min(count, blocks)):
                features.append(InvertedResidual(inputs, outputs, stride if k == 0 else 1, expansion))
                inputs = outputs
        self.features = nn.Sequential(*features, _conv(inputs, last, 1))
        self.classifier = nn.Sequential(nn.Dropout(0.2), nn.Linear(last, classes))
        for module in self.modules():
            if isinstance(module, nn.Conv2d):
                nn.init.kaiming_normal_(module.weight, mode="fan_out")
            elif isinstance(module, nn.Linear):
                nn.init.normal_(module.weight, 0.0, 0.01)
                nn.init.zeros_(module.bias)

    def forward(self, x: Tensor) -> Tensor:
        """Return the class scores."""
        pooled = nn.functional.adaptive_avg_pool2d(self.features(x), 1)
        scores: Tensor = self.classifier(torch.flatten(pooled, 1))
        return scores


def _conv(inputs: int, outputs: int, kernel: int, stride: int = 1, groups: int = 1) -> nn.Sequential:
    """Return a convolution with padding (k − 1) / 2, batch-norm and ReLU6."""
    conv = nn.Conv2d(inputs, outputs, kernel, stride, kernel // 2, groups=groups, bias=False)
    return nn.Sequential(conv, nn.BatchNorm2d(outputs), nn.ReLU6(inplace=True))


def _round(channels: float) -> int:
    """Return the nearest multiple of 8 that is at least 8 and at least nine tenths of `channels`."""
    rounded = max(8, int(channels + 4) // 8 * 8)
    return rounded + 8 if rounded < 0.9 * channels else rounded
