"""How long does ADMM's Z-step take? Our truncated SVD against full numpy SVDs, on all 3×3 layers of ResNet-18.

    python benchmarks/projection.py [--rounds 7] [-o results/projection.md]

Both project the same random weights to tensor trains (O, 9, I) at ranks (1, O/2, I/2, 1), layer after layer. The two are
run in turn, A B A B, and the ratio of each pair of neighbours is taken; the interval is the bootstrap's, over pairs.
"""

from __future__ import annotations

import argparse
import time
from pathlib import Path

import numpy as np
import torch

from tensorrail_exporter.formats import project
from tensorrail_runtime.measure.latency import Latency, ratio
from tensorrail_runtime.records import write_text
from tensorrail_runtime.sessions.machine import machine

LAYERS = [(64, 64)] * 4 + [(128, 64)] + [(128, 128)] * 3 + [(256, 128)] + [(256, 256)] * 3 + [(512, 256)] + [(512, 512)] * 3


def full_projection(weight: np.ndarray, ranks: tuple[int, ...]) -> np.ndarray:
    """Return the tensor train of (O, 9, I) by one full SVD after the other."""
    o, i = weight.shape[:2]
    tensor = weight.reshape(o, i, -1).transpose(0, 2, 1)
    u, s, v = np.linalg.svd(tensor.reshape(o, -1), full_matrices=False)
    first, rest = u[:, : ranks[1]], (s[: ranks[1], None] * v[: ranks[1]]).reshape(ranks[1] * 9, i)
    u, s, v = np.linalg.svd(rest, full_matrices=False)
    rest = (u[:, : ranks[2]] * s[: ranks[2]]) @ v[: ranks[2]]
    return (first @ rest.reshape(ranks[1], -1)).reshape(o, 9, i).transpose(0, 2, 1).reshape(weight.shape)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("-o", "--out", type=Path)
    options = parser.parse_args()
    rng = np.random.default_rng(0)
    weights = [rng.standard_normal((o, i, 3, 3)).astype(np.float32) for o, i in LAYERS]
    plans = [((o, 9, i), (1, o // 2, i // 2, 1)) for o, i in LAYERS]
    tensors = [torch.from_numpy(weight) for weight in weights]
    ways = {
        "full SVD, numpy": lambda: [full_projection(w, ranks) for w, (_, ranks) in zip(weights, plans, strict=True)],
        "project, numpy": lambda: [project("tt", w, *plan) for w, plan in zip(weights, plans, strict=True)],
        "project, torch": lambda: [project("tt", t, *plan).numpy() for t, plan in zip(tensors, plans, strict=True)],
    }
    times: dict[str, list[float]] = {name: [] for name in ways}
    results = {name: way() for name, way in ways.items()}  # also the warm-up
    for _ in range(options.rounds):
        for name, way in ways.items():
            start = time.perf_counter()
            way()
            times[name].append(1e3 * (time.perf_counter() - start))
    reference = results["full SVD, numpy"]
    lines = ["| way | median, ms | faster | 95 % interval | largest relative difference |", "|---|---|---|---|---|"]
    for name in ways:
        found = ratio(Latency.of("full SVD", times["full SVD, numpy"]), Latency.of(name, times[name]))
        worst = max(float(np.linalg.norm(a - b) / np.linalg.norm(b)) for a, b in zip(results[name], reference, strict=True))
        lines.append(
            f"| {name} | {np.median(times[name]):,.0f} | {found.value:.2f}× | {found.low:.2f}–{found.high:.2f} | {worst:.1e} |"
        )
    where = machine()
    text = (
        "# Projection of all 3×3 layers of ResNet-18 to tensor trains\n\nCommand: `python benchmarks/projection.py`. "
        f"{where.processor}, {where.cores} cores, numpy {np.__version__}, torch {torch.__version__.partition('+')[0]}; "
        f"{options.rounds} interleaved rounds.\n\n" + "\n".join(lines) + "\n"
    )
    print(text)
    if options.out:
        write_text(options.out, text)


if __name__ == "__main__":
    main()
