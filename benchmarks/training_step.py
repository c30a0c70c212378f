"""A training step of a small network on an NVIDIA GPU, its kernels launched one by one or as one CUDA graph.

    python benchmarks/training_step.py [--model resnet20] [--batches 128 256 512] [--steps 40] -o results/training-step

Writes `<out>.json` and `<out>.md`. Both ways start from the same weights and see the same batches of noise, so that their
losses have to be equal; bf16 autocast, SGD with Nesterov momentum, channels last.
"""

from __future__ import annotations

import argparse
import json
import time
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from tensorrail_runtime.records import write_text
from tensorrail_runtime.sessions.machine import machine
from tensorrail_trainer.networks.registry import MODELS
from tensorrail_trainer.training.cuda_graph import Replay, on_device

Log = dict[str, Any]
WARMUP = 20
BATCHES = 4  # that take turns


def timed(name: str, size: int, steps: int, *, graph: bool) -> tuple[float, list[float]]:
    """Return the milliseconds of a step, and every tenth loss."""
    torch.manual_seed(0)
    model = MODELS[name](classes=100).cuda().to(memory_format=torch.channels_last).train()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.05, momentum=0.9, nesterov=True, weight_decay=5e-4)
    if graph:
        on_device(optimizer, torch.device("cuda"))
    noise = torch.Generator().manual_seed(1)
    images = [
        torch.randn(size, 3, 32, 32, generator=noise).cuda().contiguous(memory_format=torch.channels_last)
        for _ in range(BATCHES)
    ]
    labels = [torch.randint(0, 100, (size,), generator=noise).cuda() for _ in range(BATCHES)]

    def step(x: Tensor, y: Tensor) -> tuple[Tensor, ...]:
        with torch.autocast("cuda", torch.bfloat16):
            loss = F.cross_entropy(model(x), y)
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        optimizer.step()
        return (loss.detach(),)

    replay = Replay() if graph else None
    losses = []
    begin = 0.0
    for k in range(WARMUP + steps):
        if k == WARMUP:
            torch.cuda.synchronize()
            begin = time.perf_counter()
        x, y = images[k % BATCHES], labels[k % BATCHES]
        losses.append((step(x, y) if replay is None else replay(step, x, y))[0])
    torch.cuda.synchronize()
    return 1e3 * (time.perf_counter() - begin) / steps, [float(loss) for loss in losses[::10]]


def page(log: Log) -> str:
    """Return the page of what was measured."""
    lines = [
        f"| {row['batch']} | {row['eager']:.2f} ms | {row['graph']:.2f} ms | {row['eager'] / row['graph']:.2f}× "
        f"| {'yes' if row['equal'] else 'no'} |"
        for row in log["rows"]
    ]
    batches = " ".join(str(row["batch"]) for row in log["rows"])
    return "\n".join(
        [
            "# A training step as one CUDA graph",
            "",
            f"Command: `python benchmarks/training_step.py --model {log['model']} --batches {batches} --steps {log['steps']}`. "
            f"{log['gpu']}, torch {log['torch']}; mean of {log['steps']} steps after {WARMUP}, one measurement each. What "
            "`cuda_graph: true` does in a recipe: the graph, and SGD's fused kernels in place of those that torch chooses.",
            "",
            "| batch | launched one by one | as one graph | faster | same losses |",
            "|---|---|---|---|---|",
            *lines,
            "",
        ]
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--model", default="resnet20", choices=[name for name in MODELS if name.startswith("resnet")])
    parser.add_argument("--batches", type=int, nargs="+", default=[128, 256, 512])
    parser.add_argument("--steps", type=int, default=40)
    parser.add_argument("-o", "--out", type=Path, default=Path("results/training-step"))
    options = parser.parse_args()
    if not torch.cuda.is_available():
        print("skipped: torch has no GPU here")
        return
    if options.steps < 1:
        parser.error(f"--steps: expected 1 or more, got {options.steps}")
    rows: list[Log] = []
    for size in options.batches:
        found = {graph: timed(options.model, size, options.steps, graph=graph) for graph in (False, True)}
        (eager, plain), (replayed, graphed) = found[False], found[True]
        rows.append({"batch": size, "eager": eager, "graph": replayed, "equal": plain == graphed})
    gpu = machine(gpu=True).gpu
    log: Log = {"model": options.model, "steps": options.steps, "torch": torch.__version__, "gpu": gpu.name if gpu else "a GPU"}
    log["rows"] = rows
    write_text(options.out.with_suffix(".json"), json.dumps(log, indent=1) + "\n")
    write_text(options.out.with_suffix(".md"), page(log))
    print(page(log))


if __name__ == "__main__":
    main()
