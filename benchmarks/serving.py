"""Served requests a second while p99 stays within a bound, the dense model against the factored one.

    python benchmarks/serving.py [--p99 MS] [--blocks 10] [--seconds 4] [-o results/serving.md]
    python benchmarks/serving.py --dense A.onnx --factored B.onnx …

Both models are served at once by `tensorrail serve`, each by one replica with all of the machine's threads, and get their
load interleaved (A B B A): while one is asked the other is idle. In each block every number of clients (`--clients`) asks for
`--seconds`; a client, Triton's own (`tritonclient`), sends its next request when it has the answer to the last one, binary
tensors of one sample over a kept connection on loopback. The clients share the machine's cores with the server. p99 is of all
a model's requests at a number of clients, and the throughput that counts is the highest at a number of clients whose p99 is
within the bound: by default four times the dense model's p50 with one client. The interval is a bootstrap over the pairs of
blocks, p99 and choice included.

Without models: ResNet-18 at 224², dense and with the published tensor-train ranks, padded to what the CPU computes at once.
"""

from __future__ import annotations

import argparse
import re
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from functools import partial
from importlib.metadata import version
from pathlib import Path

import numpy as np
from tritonclient.http import InferenceServerClient, InferInput, InferResult

from tensorrail_runtime.records import write_text
from tensorrail_runtime.serve.protocol.datatypes import ONNX
from tensorrail_runtime.sessions.inputs import random_inputs
from tensorrail_runtime.sessions.machine import machine, processor
from tensorrail_runtime.sessions.session import open_session

RESAMPLES = 1000
WARM = 0.2  # share of a turn at its beginning that does not count
START = "from tensorrail.cli import main; main()"

Times = np.ndarray  # milliseconds of the requests of one turn
Blocks = list[dict[int, tuple[Times, float]]]  # a block: by number of clients, the times and the answers a second


@contextmanager
def served(model: Path, options: Sequence[str]) -> Iterator[int]:
    """Serve a model as `net` and yield the port."""
    command = [sys.executable, "-c", START, "serve", str(model), "--name", "net", "--port", "0", *options]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, text=True, cwd=model.parent)
    try:
        assert process.stdout is not None
        line = process.stdout.readline()
        found = re.search(r":(\d+)/v2/", line)
        if found is None:
            sys.exit(f"{model}: cannot be served: {line or 'the server printed nothing'}")
        yield int(found.group(1))
    finally:
        process.terminate()
        process.communicate(timeout=60)


@dataclass(frozen=True)
class Request:
    """A request for one sample of random inputs, and what the model answers to it, by the names of its outputs."""

    inputs: list[InferInput]
    wanted: dict[str, np.ndarray]


def request_of(model: Path) -> Request:
    """Return a request for a model, with binary tensors."""
    session = open_session(model)
    feed = random_inputs(session, 1)
    inputs = []
    for entry in session.get_inputs():
        tensor = InferInput(entry.name, list(feed[entry.name].shape), ONNX[entry.type])
        inputs.append(tensor.set_data_from_numpy(feed[entry.name], binary_data=True))
    names = [entry.name for entry in session.get_outputs()]
    return Request(inputs, dict(zip(names, session.run(None, feed), strict=True)))


def asker(port: int, request: Request) -> Callable[[], InferResult]:
    """Return a function that sends the request over a connection of its own and returns the answer."""
    client = InferenceServerClient(f"127.0.0.1:{port}", connection_timeout=120, network_timeout=120)
    return partial(client.infer, "net", request.inputs)


def check(port: int, request: Request) -> None:
    """End unless the server answers what the session does."""
    answer = asker(port, request)()
    for name, wanted in request.wanted.items():
        found = answer.as_numpy(name)
        if found is None or not np.allclose(found, wanted, rtol=1e-4, atol=1e-4):
            sys.exit(f"the server's answer for output {name} is not the session's")


def turn(port: int, request: Request, clients: int, seconds: float) -> tuple[Times, float]:
    """Have so many clients ask for so long; return the times of what was asked after the warm-up, and the answers a second.

    Requests that are under way at the end are waited for and their times count, or the slow ones would be left out; answers
    are counted while all clients ask, whenever they were asked for.
    """
    begin = time.perf_counter()
    counted, end = begin + WARM * seconds, begin + seconds

    def client() -> list[tuple[float, float]]:
        ask = asker(port, request)  # in this thread, to which its connection belongs
        mine = []
        while (start := time.perf_counter()) < end:
            ask()
            mine.append((start, time.perf_counter()))
        return mine

    with ThreadPoolExecutor(clients) as pool:
        asked = [pool.submit(client) for _ in range(clients)]
        spans = np.array([span for one in asked for span in one.result()])  # a client that failed ends it all
    starts, ends = spans.T
    answered = int(((ends >= counted) & (ends <= end)).sum())
    return 1e3 * (ends - starts)[starts >= counted], answered / (end - counted)


def best(blocks: Blocks, bound: float) -> tuple[float, int, float]:
    """Return the highest throughput with p99 within the bound, its number of clients, and its p99; zeros when there is none."""
    found = (0.0, 0, 0.0)
    for clients in blocks[0]:
        times = np.concatenate([block[clients][0] for block in blocks])
        rate = float(np.mean([block[clients][1] for block in blocks]))
        p99 = float(np.percentile(times, 99)) if len(times) else float("inf")
        if p99 <= bound and rate > found[0]:
            found = (rate, clients, p99)
    return found


def interval(dense: Blocks, factored: Blocks, bound: float) -> tuple[float, float]:
    """Return the 95 % bootstrap interval of the ratio of throughputs, pairs of blocks drawn with replacement."""
    rng = np.random.default_rng(0)
    ratios = []
    for _ in range(RESAMPLES):
        picks = rng.integers(0, len(dense), len(dense))
        a, b = (best([blocks[pick] for pick in picks], bound)[0] for blocks in (dense, factored))
        ratios.append(b / a if a else np.inf)
    low, high = np.percentile(ratios, [2.5, 97.5], method="nearest")
    return float(low), float(high)


def networks_of(folder: Path) -> tuple[Path, Path]:
    """Write ResNet-18, dense and with the published ranks padded to the CPU's blocks; random weights."""
    import networks
    import onnx

    from tensorrail_exporter import factorize
    from tensorrail_exporter.graphs.io import save_model
    from tensorrail_exporter.search.verification import random_cores

    dense, factored = networks.write("resnet18", folder), folder / "factored.onnx"
    model, plan = onnx.load(dense), networks.published_plan("resnet18")
    save_model(factorize(model, plan, random_cores(model, plan), block=processor().channel_block).model, factored)
    return dense, factored


def pooled(measured: Sequence[Blocks]) -> list[Times]:
    """Return the times of all blocks together, by model and number of clients."""
    return [np.concatenate([block[clients][0] for block in blocks]) for blocks in measured for clients in blocks[0]]


def table(names: Sequence[str], measured: Sequence[Blocks]) -> list[str]:
    """Return all that was measured as lines of Markdown, by number of clients."""
    lines = ["| clients | " + " | ".join(f"{name}: requests/s | p50 | p99" for name in names) + " |"]
    lines.append("|---" * (1 + 3 * len(names)) + "|")
    for clients in measured[0][0]:
        cells = []
        for blocks in measured:
            times = np.concatenate([block[clients][0] for block in blocks])
            rate = float(np.mean([block[clients][1] for block in blocks]))
            cells += [f"{rate:.1f}", *(f"{value:.1f} ms" for value in np.percentile(times, [50, 99]))]
        lines.append(f"| {clients} | " + " | ".join(cells) + " |")
    return lines


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--dense", type=Path)
    parser.add_argument("--factored", type=Path)
    parser.add_argument("--p99", type=float, help="The bound in ms; default four times the dense p50 with one client.")
    parser.add_argument("--clients", type=int, nargs="+", default=[1, 2, 4, 8])
    parser.add_argument("--blocks", type=int, default=10)
    parser.add_argument("--seconds", type=float, default=4.0, help="Of each number of clients in each block.")
    parser.add_argument("--max-batch", type=int, default=4)
    parser.add_argument("--batch-wait", type=float, default=2.0, help="Milliseconds.")
    parser.add_argument("-o", "--out", type=Path)
    options = parser.parse_args()
    if (options.dense is None) != (options.factored is None):
        parser.error("--dense and --factored come together")
    with tempfile.TemporaryDirectory() as text, ExitStack() as servers:
        given = options.dense is not None
        paths = (options.dense, options.factored) if given else networks_of(Path(text))
        paths = tuple(path.resolve() for path in paths)
        extra = ("--max-batch", str(options.max_batch), "--batch-wait", str(options.batch_wait))
        ports = [servers.enter_context(served(path, extra)) for path in paths]
        requests = [request_of(path) for path in paths]
        for port, request in zip(ports, requests, strict=True):
            check(port, request)
            turn(port, request, max(options.clients), options.seconds / 2)
        bound = options.p99 or 4 * float(np.median(turn(ports[0], requests[0], 1, options.seconds)[0]))
        measured: tuple[Blocks, Blocks] = ([], [])
        order = [0, 1]
        for number in range(options.blocks):
            for index in order:
                measured[index].append(
                    {count: turn(ports[index], requests[index], count, options.seconds) for count in options.clients}
                )
            order.reverse()
            print(f"block {number + 1} of {options.blocks}", file=sys.stderr, flush=True)
    where, names = machine(), ("dense", "factored")
    found = [best(blocks, bound) for blocks in measured]
    low, high = interval(*measured, bound)
    what = f"{paths[0].name} against {paths[1].name}" if given else "ResNet-18 at 224², published ranks padded, random weights"
    command = f"python benchmarks/serving.py --clients {' '.join(map(str, options.clients))} --blocks {options.blocks}"
    command += f" --seconds {options.seconds:g} --max-batch {options.max_batch} --batch-wait {options.batch_wait:g}"
    command += f" --p99 {options.p99:g}" if options.p99 else ""
    counts = [sum(len(times) for block in blocks for times, _ in block.values()) for blocks in measured]
    lines = [
        "# Served requests a second within a bound of p99, dense against factored",
        "",
        f"Command: `{command}`. {what}. {where.processor}, {where.cores} cores, shared by server and clients (tritonclient "
        f"{version('tritonclient')}); ONNX Runtime "
        f"{where.onnxruntime}, one replica each, batches of up to {options.max_batch} that wait {options.batch_wait:g} ms; "
        f"{options.blocks} interleaved blocks, {counts[0]:,} and {counts[1]:,} requests.",
        "",
        *table(names, measured),
        "",
    ]
    for name, (rate, clients, p99) in zip(names, found, strict=True):
        held = (
            f"{rate:.1f} requests/s with {clients} clients (p99 {p99:.1f} ms)" if clients else "no number of clients holds it"
        )
        lines.append(f"- {name}, p99 within {bound:.0f} ms: {held}")
    if all(rate for rate, _, _ in found):
        lines.append(f"- factored over dense: {found[1][0] / found[0][0]:.2f}× [{low:.2f}, {high:.2f}] (95 %)")
    if min(len(t) for t in pooled(measured)) < 1000:
        lines.append("- Some rows have fewer than 1,000 requests: their p99 rests on fewer than ten.")
    print("\n".join(lines))
    if options.out:
        write_text(options.out, "\n".join(lines) + "\n")


if __name__ == "__main__":
    main()
