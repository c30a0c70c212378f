"""What exact changes, low rank and int8 do to the time of transformers, with the operators that ONNX Runtime fuses.

    python benchmarks/transformers_time.py [--only NAME …] [--batch 1 8] [--seconds 4] [--few] [-o FILE.md]

Networks of the `transformers` package, and a U-Net, with random weights: times do not depend on their values. Every variant of
a network is timed interleaved with the dense one, in fresh processes: the network as exported; without the shapes of inner
tensors in its file; attention heads of three quarters of their size; query, key and value as one layer; all products and
convolutions at half the multiply-accumulates, with separate factors and with one joint factor for query, key and value; and in
int8.
"""

from __future__ import annotations

import argparse
import math
import tempfile
from collections.abc import Callable, Sequence
from itertools import pairwise
from pathlib import Path

import onnx
import torch
import transformers
from torch import nn

import tensorrail as tr
from tensorrail_exporter.graphs.head_pairs import find_pairs
from tensorrail_exporter.graphs.heads import with_heads
from tensorrail_exporter.graphs.joint import joint_groups, with_joint, without_inner_shapes
from tensorrail_exporter.precision.int8 import to_int8
from tensorrail_exporter.rewrite.rewriter import factorize
from tensorrail_exporter.rewrite.survey import survey
from tensorrail_exporter.search.verification import random_cores
from tensorrail_runtime.graphs.cost import cost
from tensorrail_runtime.measure.fusions import fused_operators
from tensorrail_runtime.records import write_text
from tensorrail_runtime.sessions.machine import machine

TOKENS = 128
GRID = 16
SAMPLES = 4  # inputs that ranges in int8 are taken from
FEW = (
    "dense",
    "dense, no inner shapes",
    "half, separate factors, no inner shapes",
    "dense, int8, no inner shapes",
    "half, separate factors, int8, no inner shapes",
)


class Only(nn.Module):
    """A model of `transformers` that returns its last hidden state alone."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Return the last hidden state of tokens, images or spectrograms."""
        return self.model(x).last_hidden_state


def tokens(batch: int) -> torch.Tensor:
    return torch.randint(0, 1000, (batch, TOKENS))


def images(batch: int) -> torch.Tensor:
    return torch.randn(batch, 3, 224, 224)


def _bert(hidden: int, layers: int) -> Callable[[], nn.Module]:
    config = transformers.BertConfig(
        hidden_size=hidden, num_hidden_layers=layers, num_attention_heads=hidden // 32 if hidden < 512 else 12,
        intermediate_size=4 * hidden, attn_implementation="eager",
    )  # fmt: skip
    return lambda: transformers.BertModel(config, add_pooling_layer=False)


def _vit(hidden: int, heads: int) -> Callable[[], nn.Module]:
    config = transformers.ViTConfig(
        hidden_size=hidden, num_attention_heads=heads, intermediate_size=4 * hidden, attn_implementation="eager"
    )
    return lambda: transformers.ViTModel(config, add_pooling_layer=False)


def _whisper() -> nn.Module:
    """Return an encoder of the size of Whisper-tiny's, for 30 seconds of sound: 1,500 frames."""
    config = transformers.WhisperConfig(
        d_model=384, encoder_layers=4, encoder_attention_heads=6, encoder_ffn_dim=1536, attn_implementation="eager"
    )
    return transformers.WhisperModel(config).encoder


class UNet(nn.Module):
    """A U-Net (Ronneberger et al. 2015) of four sizes, with transposed convolutions on the way up."""

    def __init__(self, channels: tuple[int, ...] = (32, 64, 128, 256), classes: int = 4) -> None:
        super().__init__()
        self.down = nn.ModuleList(self._block(i, o) for i, o in pairwise((3, *channels)))
        rising = [*pairwise(reversed(channels))]
        self.up = nn.ModuleList(nn.ConvTranspose2d(i, o, 2, 2) for i, o in rising)
        self.joined = nn.ModuleList(self._block(2 * o, o) for _, o in rising)
        self.head = nn.Conv2d(channels[0], classes, 1)

    @staticmethod
    def _block(inputs: int, outputs: int) -> nn.Module:
        return nn.Sequential(nn.Conv2d(inputs, outputs, 3, 1, 1), nn.ReLU(), nn.Conv2d(outputs, outputs, 3, 1, 1), nn.ReLU())

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Map (B, 3, H, W) to scores (B, classes, H, W)."""
        kept = []
        for number, block in enumerate(self.down):
            x = block(x if number == 0 else nn.functional.max_pool2d(x, 2))
            kept.append(x)
        for up, joined, side in zip(self.up, self.joined, reversed(kept[:-1]), strict=True):
            x = joined(torch.cat([up(x), side], 1))
        scores: torch.Tensor = self.head(x)
        return scores


NETWORKS: dict[str, tuple[Callable[[], nn.Module], Callable[[int], torch.Tensor]]] = {
    "MiniLM-L6 (as BERT)": (_bert(384, 6), tokens),
    "BERT-base": (_bert(768, 12), tokens),
    "DeiT-S": (_vit(384, 6), images),
    "Whisper-tiny encoder": (_whisper, lambda batch: torch.randn(batch, 80, 3000)),
    "U-Net": (UNet, lambda batch: torch.randn(batch, 3, 128, 128)),
}


def half(model: onnx.ModelProto, batch: int) -> onnx.ModelProto:
    """Return a network whose products and convolutions have half the multiply-accumulates, with random cores of rank r.

    Layers of fewer than 32 inputs or outputs stay dense.
    """
    layers = []
    for layer in survey(model, batch, {}):
        outputs, inputs, *kernel = layer.spec.shape
        if layer.spec.gathers or min(outputs, inputs) < 2 * GRID:
            continue
        taps = math.prod(kernel)
        bound = outputs * inputs * taps / 2
        if taps == 1:
            rank = bound / (outputs + inputs)
        else:  # taps · r² + (outputs + inputs) · r = bound
            both = outputs + inputs
            rank = (math.sqrt(both**2 + 4 * taps * bound) - both) / (2 * taps)
        rank = max(GRID, round(rank / GRID) * GRID)
        how = {"format": "svd", "ranks": (rank,)} if taps == 1 else {"format": "tt", "ranks": (1, rank, rank, 1)}
        modes = (outputs, *((taps,) if taps > 1 else ()), inputs)
        layers.append(tr.LayerPlan(name=layer.name, modes=modes, **how))
    plan = tr.Plan(layers=tuple(layers))
    return factorize(model, plan, random_cores(model, plan)).model


def in_int8(model: onnx.ModelProto, x: torch.Tensor) -> onnx.ModelProto:
    """Return a network in int8, with ranges from a few random inputs."""
    return to_int8(model, [{"x": x.numpy()}], gauge=False, rounding="nearest")


def three_quarters(model: onnx.ModelProto) -> onnx.ModelProto:
    """Return a network in which every attention head has three quarters of its values."""
    return with_heads(model, {pair.names: 3 * pair.size // 4 for pair in find_pairs(model).found})


def half_as_wide(model: onnx.ModelProto, batch: int) -> onnx.ModelProto:
    """Return a network in which half of the channels are left between two layers, wherever nothing else reads them."""
    wide = [layer for layer in survey(model, batch, {}) if layer.makers]
    inputs = {layer.name: layer.spec.shape[1] for layer in wide}
    layers = [tr.LayerPlan(name=name, format="width", modes=(n,), ranks=(n // 2,)) for name, n in inputs.items()]
    plan = tr.Plan(layers=tuple(layers))
    return factorize(model, plan, random_cores(model, plan)).model


def variants_of(dense: onnx.ModelProto, x: torch.Tensor, batch: int) -> dict[str, onnx.ModelProto]:
    """Return what is timed, the dense network first."""
    plain = without_inner_shapes
    variants = {"dense": dense, "dense, no inner shapes": plain(dense)}
    variants |= {
        "half, separate factors": half(dense, batch),
        "half, separate factors, no inner shapes": plain(half(dense, batch)),
    }
    if find_pairs(dense).found:
        variants["heads of three quarters, no inner shapes"] = plain(three_quarters(dense))
    variants["half the channels between two layers, no inner shapes"] = plain(half_as_wide(dense, batch))
    if groups := joint_groups(dense):
        joint = with_joint(dense, groups)
        variants["dense, joint Q/K/V, no inner shapes"] = plain(joint)
        variants["half, joint Q/K/V factor, no inner shapes"] = plain(half(joint, batch))
    variants["dense, int8, no inner shapes"] = plain(in_int8(dense, x))
    variants["half, separate factors, int8, no inner shapes"] = plain(in_int8(half(dense, batch), x))
    return variants


def rows_of(
    name: str, batch: int, seconds: float, folder: Path, *, few: bool = False, without: Sequence[str] = ()
) -> list[str]:
    """Return the rows of a network at a batch size; with `few`, of the variants that `FEW` names; without some of them."""
    make, inputs = NETWORKS[name]
    torch.manual_seed(0)
    model = make().eval()
    dense = tr.to_onnx(model if isinstance(model, UNet) else Only(model), inputs(2), input_names=["x"])
    variants = variants_of(dense, inputs(SAMPLES), batch)
    kept = [what for what in variants if what not in without and (what in FEW or not few)]
    variants = {what: variants[what] for what in kept}
    paths = []
    for number, variant in enumerate(variants.values()):
        paths.append(folder / f"{number}.onnx")
        tr.save_model(variant, paths[-1])
    timing = tr.Timing(batch=batch, seconds=seconds * len(paths), processes=3)
    report = tr.bench(paths, options=tr.Options(session=tr.Session(threads=1), timing=timing))
    macs = [cost(path, batch).macs for path in paths]
    rows = []
    for k, (what, path, latency) in enumerate(zip(variants, paths, report.latencies, strict=True)):
        ratio = report.ratios[k - 1] if k else None
        speed = "1" if ratio is None else f"{ratio.value:.2f}× [{ratio.low:.2f}, {ratio.high:.2f}]"
        fused = ", ".join(f"{op} {count}" for op, count in sorted(fused_operators(path).counts.items())) or "none"
        rows.append(f"| {name} | {batch} | {what} | {macs[0] / macs[k]:.2f} | {latency.p50:.2f} | {speed} | {fused} |")
    return rows


def _asked(options: argparse.Namespace) -> str:
    only = "" if options.only == list(NETWORKS) else "--only " + " ".join(repr(name) for name in options.only) + " "
    few = " --few" if options.few else ""
    few += f" --without {' '.join(map(repr, options.without))}" if options.without else ""
    return f"{only}--batch {' '.join(map(str, options.batch))} --seconds {options.seconds:g}{few}"


def main() -> None:
    """Measure, and print or write the page."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--only", nargs="+", choices=NETWORKS, default=list(NETWORKS))
    parser.add_argument("--batch", nargs="+", type=int, default=[1, 8])
    parser.add_argument("--seconds", type=float, default=4.0, help="Of each variant.")
    parser.add_argument("--few", action="store_true", help="Five variants alone, for networks that take long.")
    parser.add_argument("--without", nargs="+", default=[], metavar="VARIANT", help="Leave variants out.")
    parser.add_argument("-o", "--out", type=Path)
    options = parser.parse_args()
    here = machine()
    lines = [
        "# Transformers: exact changes, separate and joint factors, int8",
        "",
        f"Command: `python benchmarks/transformers_time.py {_asked(options)}`. {here.processor}, one thread, ONNX "
        f"Runtime {here.onnxruntime}. Random weights; {TOKENS} tokens, images of 224 × 224 (U-Net: 128 × 128), or 3,000 frames "
        "of sound; all variants of a network in interleaved runs, in three fresh processes; 95 % intervals.",
        "",
        "| network | batch | variant | MACs reduction (×) | p50 (ms) | speed-up over dense | fused operators |",
        "|---|--:|---|--:|--:|---|---|",
    ]
    for name in options.only:
        for batch in options.batch:
            with tempfile.TemporaryDirectory() as folder:
                rows = rows_of(name, batch, options.seconds, Path(folder), few=options.few, without=options.without)
            lines += rows
            print("\n".join(rows), flush=True)
            if options.out:
                write_text(options.out, "\n".join(lines) + "\n")


if __name__ == "__main__":
    main()
