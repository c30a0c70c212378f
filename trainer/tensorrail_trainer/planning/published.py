"""Tensor-train ranks published for ResNet-18 and ResNet-50 on ImageNet, and ResNet-32 and ResNet-56 on CIFAR-10, as plans.

The ranks are those of the official code of Yin, Sui, Liao and Yuan, *Towards Efficient Tensor Decomposition-Based DNN Model
Compression with Optimization Framework* (CVPR 2021): its tables with three modes (O, K², I), and those with five modes
(o₁, o₂, K², i₁, i₂) for the 3×3 convolutions. Stem, shortcuts and classifier stay dense; in ResNet-50 the 1×1 convolutions of
the first two stages stay dense, too.

The tables hold the ranks as published. They are clamped where they are used, which matters in ResNet-50's table with three
modes: on the two sides of the single tap of a 1×1 convolution (K² = 1) the ranks 40 and 85 can both be at most 40. The network
has 2.50× fewer weights as published and 2.98× fewer as clamped, for the same function. ResNet-32's first stage with
ranks (16, 16) is larger than dense, 2,816 parameters per layer instead of 2,304; it is kept as published.
"""

from __future__ import annotations

from tensorrail_exporter.plans.plan import LayerPlan, Plan
from tensorrail_runtime.errors import PlanError

# For each layer its modes, and its ranks without the first and the last one, which are 1.
Table = dict[str, tuple[tuple[int, ...], tuple[int, ...]]]


def published_plan(name: str, modes: int = 3) -> Plan:
    """Return the plan that was published for a network.

    Args:
        name: a network of `tensorrail_trainer.networks.registry.MODELS`, at its default width: `resnet18`, `resnet50`,
            `resnet32` or `resnet56`.
        modes: the number of modes of the 3×3 convolutions, 3 (default) or 5.

    Returns:
        The plan, in the format `tt`.

    Raises:
        PlanError: nothing was published for this network and number of modes.

    """
    if (name, modes) not in PUBLISHED:
        known = ", ".join(f"{network} in {count} modes" for network, count in PUBLISHED)
        raise PlanError(f"no published ranks for {name!r} in {modes} modes; expected one of {known}")
    table = PUBLISHED[name, modes]
    layers = (LayerPlan(name=layer, format="tt", modes=sizes, ranks=(1, *ranks, 1)) for layer, (sizes, ranks) in table.items())
    return Plan(layers=tuple(layers))


_RESNET18_3: Table = {
    "layer1.0.conv1": ((64, 9, 64), (45, 45)),
    "layer1.0.conv2": ((64, 9, 64), (36, 36)),
    "layer1.1.conv1": ((64, 9, 64), (32, 32)),
    "layer1.1.conv2": ((64, 9, 64), (32, 32)),
    "layer2.0.conv1": ((128, 9, 64), (80, 40)),
    "layer2.0.conv2": ((128, 9, 128), (70, 70)),
    "layer2.1.conv1": ((128, 9, 128), (65, 65)),
    "layer2.1.conv2": ((128, 9, 128), (64, 64)),
    "layer3.0.conv1": ((256, 9, 128), (130, 65)),
    "layer3.0.conv2": ((256, 9, 256), (120, 120)),
    "layer3.1.conv1": ((256, 9, 256), (120, 120)),
    "layer3.1.conv2": ((256, 9, 256), (115, 115)),
    "layer4.0.conv1": ((512, 9, 256), (250, 122)),
    "layer4.0.conv2": ((512, 9, 512), (240, 240)),
    "layer4.1.conv1": ((512, 9, 512), (230, 230)),
    "layer4.1.conv2": ((512, 9, 512), (220, 220)),
}
_RESNET18_5: Table = {
    "layer1.0.conv1": ((8, 8, 9, 8, 8), (8, 45, 45, 8)),
    "layer1.0.conv2": ((8, 8, 9, 8, 8), (7, 36, 36, 7)),
    "layer1.1.conv1": ((8, 8, 9, 8, 8), (7, 36, 36, 7)),
    "layer1.1.conv2": ((8, 8, 9, 8, 8), (7, 36, 36, 7)),
    "layer2.0.conv1": ((16, 8, 9, 8, 8), (15, 80, 40, 8)),
    "layer2.0.conv2": ((16, 8, 9, 8, 16), (15, 72, 72, 15)),
    "layer2.1.conv1": ((16, 8, 9, 8, 16), (15, 72, 72, 15)),
    "layer2.1.conv2": ((16, 8, 9, 8, 16), (15, 72, 72, 15)),
    "layer3.0.conv1": ((16, 16, 9, 8, 16), (15, 160, 80, 15)),
    "layer3.0.conv2": ((16, 16, 9, 16, 16), (15, 138, 138, 15)),
    "layer3.1.conv1": ((16, 16, 9, 16, 16), (15, 138, 138, 15)),
    "layer3.1.conv2": ((16, 16, 9, 16, 16), (15, 138, 138, 15)),
    "layer4.0.conv1": ((32, 16, 9, 16, 16), (30, 236, 138, 15)),
    "layer4.0.conv2": ((32, 16, 9, 16, 32), (30, 220, 220, 30)),
    "layer4.1.conv1": ((32, 16, 9, 16, 32), (30, 220, 220, 30)),
    "layer4.1.conv2": ((32, 16, 9, 16, 32), (30, 210, 210, 30)),
}
_RESNET50_3: Table = {
    "layer1.0.conv2": ((64, 9, 64), (60, 60)),
    "layer1.1.conv2": ((64, 9, 64), (50, 50)),
    "layer1.2.conv2": ((64, 9, 64), (50, 50)),
    "layer2.0.conv2": ((128, 9, 128), (80, 80)),
    "layer2.1.conv2": ((128, 9, 128), (70, 70)),
    "layer2.2.conv2": ((128, 9, 128), (70, 70)),
    "layer2.3.conv2": ((128, 9, 128), (70, 70)),
    "layer3.0.conv2": ((256, 9, 256), (82, 82)),
    "layer3.1.conv2": ((256, 9, 256), (82, 82)),
    "layer3.2.conv2": ((256, 9, 256), (82, 82)),
    "layer3.3.conv2": ((256, 9, 256), (82, 82)),
    "layer3.4.conv2": ((256, 9, 256), (82, 82)),
    "layer3.5.conv2": ((256, 9, 256), (82, 82)),
    "layer4.0.conv2": ((512, 9, 512), (100, 100)),
    "layer4.1.conv2": ((512, 9, 512), (100, 100)),
    "layer4.2.conv2": ((512, 9, 512), (100, 100)),
    "layer3.0.conv1": ((256, 1, 512), (40, 85)),
    "layer3.1.conv1": ((256, 1, 1024), (40, 85)),
    "layer3.2.conv1": ((256, 1, 1024), (40, 85)),
    "layer3.3.conv1": ((256, 1, 1024), (40, 85)),
    "layer3.4.conv1": ((256, 1, 1024), (40, 85)),
    "layer3.5.conv1": ((256, 1, 1024), (40, 85)),
    "layer3.0.conv3": ((1024, 1, 256), (85, 40)),
    "layer3.1.conv3": ((1024, 1, 256), (85, 40)),
    "layer3.2.conv3": ((1024, 1, 256), (85, 40)),
    "layer3.3.conv3": ((1024, 1, 256), (85, 40)),
    "layer3.4.conv3": ((1024, 1, 256), (85, 40)),
    "layer3.5.conv3": ((1024, 1, 256), (85, 40)),
    "layer4.0.conv1": ((512, 1, 1024), (70, 160)),
    "layer4.1.conv1": ((512, 1, 2048), (70, 160)),
    "layer4.2.conv1": ((512, 1, 2048), (70, 160)),
    "layer4.0.conv3": ((2048, 1, 512), (160, 70)),
    "layer4.1.conv3": ((2048, 1, 512), (160, 70)),
    "layer4.2.conv3": ((2048, 1, 512), (160, 70)),
}
_RESNET50_5: Table = {
    "layer1.0.conv2": ((8, 8, 9, 8, 8), (8, 64, 64, 8)),
    "layer1.1.conv2": ((8, 8, 9, 8, 8), (8, 55, 55, 8)),
    "layer1.2.conv2": ((8, 8, 9, 8, 8), (8, 55, 55, 8)),
    "layer2.0.conv2": ((16, 8, 9, 8, 16), (15, 80, 80, 15)),
    "layer2.1.conv2": ((16, 8, 9, 8, 16), (15, 70, 70, 15)),
    "layer2.2.conv2": ((16, 8, 9, 8, 16), (15, 70, 70, 15)),
    "layer2.3.conv2": ((16, 8, 9, 8, 16), (15, 70, 70, 15)),
    "layer3.0.conv2": ((16, 16, 9, 16, 16), (15, 82, 82, 15)),
    "layer3.1.conv2": ((16, 16, 9, 16, 16), (15, 82, 82, 15)),
    "layer3.2.conv2": ((16, 16, 9, 16, 16), (15, 82, 82, 15)),
    "layer3.3.conv2": ((16, 16, 9, 16, 16), (15, 82, 82, 15)),
    "layer3.4.conv2": ((16, 16, 9, 16, 16), (15, 82, 82, 15)),
    "layer3.5.conv2": ((16, 16, 9, 16, 16), (15, 82, 82, 15)),
    "layer4.0.conv2": ((32, 16, 9, 16, 32), (30, 105, 105, 30)),
    "layer4.1.conv2": ((32, 16, 9, 16, 32), (30, 105, 105, 30)),
    "layer4.2.conv2": ((32, 16, 9, 16, 32), (30, 105, 105, 30)),
    "layer3.0.conv1": ((256, 1, 512), (75, 75)),
    "layer3.1.conv1": ((256, 1, 1024), (75, 75)),
    "layer3.2.conv1": ((256, 1, 1024), (75, 75)),
    "layer3.3.conv1": ((256, 1, 1024), (75, 75)),
    "layer3.4.conv1": ((256, 1, 1024), (75, 75)),
    "layer3.5.conv1": ((256, 1, 1024), (75, 75)),
    "layer3.0.conv3": ((1024, 1, 256), (75, 75)),
    "layer3.1.conv3": ((1024, 1, 256), (75, 75)),
    "layer3.2.conv3": ((1024, 1, 256), (75, 75)),
    "layer3.3.conv3": ((1024, 1, 256), (75, 75)),
    "layer3.4.conv3": ((1024, 1, 256), (75, 75)),
    "layer3.5.conv3": ((1024, 1, 256), (75, 75)),
    "layer4.0.conv1": ((512, 1, 1024), (130, 130)),
    "layer4.1.conv1": ((512, 1, 2048), (130, 130)),
    "layer4.2.conv1": ((512, 1, 2048), (130, 130)),
    "layer4.0.conv3": ((2048, 1, 512), (130, 130)),
    "layer4.1.conv3": ((2048, 1, 512), (130, 130)),
    "layer4.2.conv3": ((2048, 1, 512), (130, 130)),
}


def _runs(blocks: int, *runs: tuple[str, tuple[int, ...], tuple[int, ...]]) -> Table:
    """Return the table of a CIFAR network with three stages: an entry applies from its layer on, until the next entry."""
    layers = [f"layer{stage}.{block}.conv{k}" for stage in (1, 2, 3) for block in range(blocks) for k in (1, 2)]
    starts = {layer: (modes, ranks) for layer, modes, ranks in runs}
    table: Table = {}
    for layer in layers:
        table[layer] = starts.get(layer) or table[next(reversed(table))]
    return table


_RESNET32_5 = _runs(
    5,
    ("layer1.0.conv1", (16, 9, 16), (16, 16)),
    ("layer2.0.conv1", (8, 4, 9, 4, 4), (8, 32, 16, 4)),
    ("layer2.0.conv2", (8, 4, 9, 4, 8), (8, 16, 16, 8)),
    ("layer3.0.conv1", (8, 8, 9, 4, 8), (8, 40, 24, 8)),
    ("layer3.0.conv2", (8, 8, 9, 8, 8), (8, 27, 27, 8)),
    ("layer3.2.conv2", (8, 8, 9, 8, 8), (8, 28, 28, 8)),
    ("layer3.3.conv2", (8, 8, 9, 8, 8), (8, 29, 29, 8)),
    ("layer3.4.conv1", (8, 8, 9, 8, 8), (8, 24, 24, 8)),
    ("layer3.4.conv2", (8, 8, 9, 8, 8), (8, 15, 15, 8)),
)
_RESNET56_3 = _runs(
    9,
    ("layer1.0.conv1", (16, 9, 16), (16, 16)),
    ("layer1.1.conv1", (16, 9, 16), (14, 14)),
    ("layer1.5.conv1", (16, 9, 16), (13, 13)),
    ("layer2.0.conv1", (32, 9, 16), (32, 16)),
    ("layer2.0.conv2", (32, 9, 32), (20, 20)),
    ("layer2.5.conv1", (32, 9, 32), (18, 18)),
    ("layer3.0.conv1", (64, 9, 32), (40, 20)),
    ("layer3.0.conv2", (64, 9, 64), (26, 26)),
    ("layer3.3.conv1", (64, 9, 64), (24, 24)),
    ("layer3.5.conv2", (64, 9, 64), (22, 22)),
)
PUBLISHED: dict[tuple[str, int], Table] = {
    ("resnet18", 3): _RESNET18_3,
    ("resnet18", 5): _RESNET18_5,
    ("resnet50", 3): _RESNET50_3,
    ("resnet50", 5): _RESNET50_5,
    ("resnet32", 5): _RESNET32_5,
    ("resnet56", 3): _RESNET56_3,
}
