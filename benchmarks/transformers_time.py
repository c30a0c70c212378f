"""What exact changes and low rank do to the time of transformers, with the operators that ONNX Runtime fuses.

    python benchmarks/transformers_time.py [--only NAME …] [--batch 1 8] [--seconds 4] [-o results/transformers.md]

Networks of the `transformers` package with random weights: times do not depend on their values. Every variant of a network is
timed in turns with the dense one, in fresh processes: the network as exported; without the shapes of inner tensors in its file;
attention heads of three quarters of their size; query, key and value as one layer; and all products at half the
multiply-accumulates, with separate factors and with one joint factor for query, key and value.
"""

from __future__ import annotations

import argparse
import tempfile
from collections.abc import Callable
from pathlib import Path

import onnx
import torch
import transformers
from torch import nn

import tensorrail as tr
from tensorrail_exporter.graphs.head_pairs import find_pairs
from tensorrail_exporter.graphs.heads import with_heads
from tensorrail_exporter.graphs.joint import joint_groups, with_joint, without_inner_shapes
from tensorrail_exporter.rewrite.rewriter import factorize
from tensorrail_exporter.rewrite.survey import survey
from tensorrail_exporter.search.verification import random_cores
from tensorrail_runtime.graphs.cost import cost
from tensorrail_runtime.measure.fusions import fused_operators
from tensorrail_runtime.records import write_text
from tensorrail_runtime.sessions.machine import machine

TOKENS = 128
GRID = 16


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


NETWORKS: dict[str, tuple[Callable[[], nn.Module], Callable[[int], torch.Tensor]]] = {
    "MiniLM-L6 (as BERT)": (_bert(384, 6), tokens),
    "BERT-base": (_bert(768, 12), tokens),
    "DeiT-S": (_vit(384, 6), images),
}


def half(model: onnx.ModelProto, batch: int) -> onnx.ModelProto:
    """Return a network in which every product has half the multiply-accumulates, with random cores of rank r."""
    layers = []
    for layer in survey(model, batch, {}):
        if layer.spec.op != "linear" or layer.spec.gathers:
            continue
        outputs, inputs = layer.spec.shape
        rank = max(GRID, round(outputs * inputs / (2 * (outputs + inputs)) / GRID) * GRID)
        layers.append(tr.LayerPlan(name=layer.name, format="svd", modes=(outputs, inputs), ranks=(rank,)))
    plan = tr.Plan(layers=tuple(layers))
    return factorize(model, plan, random_cores(model, plan)).model


def three_quarters(model: onnx.ModelProto) -> onnx.ModelProto:
    """Return a network in which every attention head has three quarters of its values."""
    return with_heads(model, {pair.names: 3 * pair.size // 4 for pair in find_pairs(model).found})


def rows_of(name: str, batch: int, seconds: float, folder: Path) -> list[str]:
    """Return the rows of a network at a batch size."""
    make, inputs = NETWORKS[name]
    torch.manual_seed(0)
    dense = tr.to_onnx(Only(make().eval()), inputs(2), input_names=["x"])
    joint = with_joint(dense, joint_groups(dense))
    variants = {
        "dense": dense,
        "dense, no inner shapes": without_inner_shapes(dense),
        "heads of three quarters": three_quarters(dense),
        "dense, joint Q/K/V": joint,
        "dense, joint Q/K/V, no inner shapes": without_inner_shapes(joint),
        "half, separate factors": half(dense, batch),
        "half, separate factors, no inner shapes": without_inner_shapes(half(dense, batch)),
        "half, joint Q/K/V factor": half(joint, batch),
        "half, joint Q/K/V factor, no inner shapes": without_inner_shapes(half(joint, batch)),
    }
    paths = []
    for number, model in enumerate(variants.values()):
        paths.append(folder / f"{number}.onnx")
        tr.save_model(model, paths[-1])
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
    return f"{only}--batch {' '.join(map(str, options.batch))} --seconds {options.seconds:g}"


def main() -> None:
    """Measure, and print or write the page."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--only", nargs="+", choices=NETWORKS, default=list(NETWORKS))
    parser.add_argument("--batch", nargs="+", type=int, default=[1, 8])
    parser.add_argument("--seconds", type=float, default=4.0, help="Of each variant.")
    parser.add_argument("-o", "--out", type=Path)
    options = parser.parse_args()
    here = machine()
    lines = [
        "# Transformers: exact changes, separate and joint factors",
        "",
        f"Command: `python benchmarks/transformers_time.py {_asked(options)}`. {here.processor}, one thread, ONNX "
        f"Runtime {here.onnxruntime}. Random weights, {TOKENS} tokens or images of 224 × 224; all variants of a network in "
        "turns, in three fresh processes; 95 % intervals.",
        "",
        "| network | batch | variant | MACs ÷ | p50 (ms) | speed-up over dense | fused operators |",
        "|---|--:|---|--:|--:|---|---|",
    ]
    for name in options.only:
        for batch in options.batch:
            with tempfile.TemporaryDirectory() as folder:
                lines += rows_of(name, batch, options.seconds, Path(folder))
            print("\n".join(lines[-9:]), flush=True)
    if options.out:
        write_text(options.out, "\n".join(lines) + "\n")


if __name__ == "__main__":
    main()
