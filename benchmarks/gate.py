"""How often is the regression gate wrong? False alarms on equal models, and injected slow-downs that it finds.

    python benchmarks/gate.py [--alarms 200] [--finds 100] [--processes 4] [--seconds 0.25] [--threads 1] [--provider cpu]
        [--python PYTHON] [-o results/gate.md]

The model is a chain of 40 equal matrix products, so that 2 more are 5 % more work of the same kind. A trial is one `tensorrail
regress check A.onnx B.onnx`: fresh processes, both models interleaved. False alarms are counted on two copies of the same file,
finds on the chain of 42. What the two more products really cost is measured by a run of its own. From the trials' estimates it
follows what other thresholds, with the same effort, would have done. With `--python`, the first model runs under another
interpreter (`--against-python`), in processes of its own.
"""

from __future__ import annotations

import argparse
import shutil
import tempfile
import time
from pathlib import Path

import numpy as np
import onnx
from onnx import TensorProto, helper, numpy_helper

from tensorrail_runtime.gate.environments import check_environments
from tensorrail_runtime.gate.regress import Limits, Verdict, check
from tensorrail_runtime.gate.times import TimeChange
from tensorrail_runtime.measure.latency import bench
from tensorrail_runtime.measure.timing import Conditions, Timing
from tensorrail_runtime.records import write_text
from tensorrail_runtime.sessions.machine import machine
from tensorrail_runtime.sessions.session import PROVIDERS, Session

LENGTH, EXTRA, SIZE, ROWS = 40, 2, 192, 64
STEPS = (0.02, 0.03, 0.05, 0.08)


def chain(length: int) -> onnx.ModelProto:
    """Return `length` products with ReLU, on (ROWS, SIZE)."""
    rng = np.random.default_rng(0)
    nodes = []
    for k in range(length):
        nodes.append(helper.make_node("MatMul", [f"x{k}", f"w{k}"], [f"m{k}"], f"matmul{k}"))
        nodes.append(helper.make_node("Relu", [f"m{k}"], ["y" if k + 1 == length else f"x{k + 1}"], f"relu{k}"))
    weights = [(rng.standard_normal((SIZE, SIZE)) * (2 / SIZE) ** 0.5).astype(np.float32) for _ in range(length)]
    ends = [helper.make_tensor_value_info(name, TensorProto.FLOAT, [ROWS, SIZE]) for name in ("x0", "y")]
    stored = [numpy_helper.from_array(weight, f"w{k}") for k, weight in enumerate(weights)]
    graph = helper.make_graph(nodes, "chain", ends[:1], ends[1:], stored)
    return helper.make_model(graph, opset_imports=[helper.make_opsetid("", 20)], ir_version=10)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--alarms", type=int, default=200)
    parser.add_argument("--finds", type=int, default=100)
    parser.add_argument("--processes", type=int, default=4)
    parser.add_argument("--seconds", type=float, default=0.25)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--provider", default="cpu", choices=list(PROVIDERS))
    parser.add_argument("--python", help="Run the first model of each trial under this interpreter.")
    parser.add_argument("-o", "--out", type=Path)
    options = parser.parse_args()
    limits = Limits(tolerance=None, flops=1, params=1, bytes=1, nodes=1)  # time alone is in question
    with tempfile.TemporaryDirectory() as folder:
        a, same, slower = (Path(folder) / name for name in ("a.onnx", "same.onnx", "slower.onnx"))
        onnx.save(chain(LENGTH), a)
        shutil.copy(a, same)
        onnx.save(chain(LENGTH + EXTRA), slower)
        settings = Session(provider=options.provider, threads=options.threads)
        conditions = Conditions(Timing(seconds=options.seconds, processes=options.processes), settings)
        truth = bench([a, slower], Timing(seconds=20), settings)
        injected = 1 / truth.ratios[0].value - 1
        start = time.perf_counter()
        equal = _trials("equal", a, same, options.alarms, limits, conditions, options.python)
        found = _trials("slower", a, slower, options.finds, limits, conditions, options.python)
        each = (time.perf_counter() - start) / (len(equal) + len(found))
    where = machine(gpu=options.provider != "cpu")
    device = f"{where.processor}, {where.cores} cores" if where.gpu is None else where.gpu.name
    python = " --python PYTHON" if options.python else ""
    provider = "" if options.provider == "cpu" else f" --provider {options.provider}"
    # Of the finding on time: the others are held too, and are not in question here.
    alarms, finds = ([not verdict.findings[0].holds for verdict in side] for side in (equal, found))
    rows = [
        "| trials | of | alarms | share | median estimate | standard deviation |",
        "|---|---|---|---|---|---|",
        _row("equal models", equal, alarms),
        _row(f"{EXTRA} products more", found, finds),
    ]
    other = [f"| {step:.0%} | {step / 2:.1%} | {_share(equal, step)} | {_share(found, step)} |" for step in STEPS]
    text = (
        f"# The regression gate's errors\n\nCommand: `python benchmarks/gate.py --alarms {options.alarms} --finds "
        f"{options.finds} --threads {options.threads} --processes {options.processes} --seconds "
        f"{options.seconds}{provider}{python}`. {device}, ONNX Runtime {where.onnxruntime}; "
        f"{truth.latencies[0].p50:.3f} ms a run; {options.processes} to {4 * options.processes} fresh processes of "
        f"{options.seconds} s a trial, {each:.1f} s a trial.\n\n"
        f"{EXTRA} products more in {LENGTH} took {injected:+.2%} time (interval of the speed-up "
        f"[{truth.ratios[0].low:.4f}, {truth.ratios[0].high:.4f}], 20 s interleaved). With its "
        "defaults the gate fails above +2.5 %, to detect slow-downs of 5 % or more.\n\n"
        + "\n".join(rows)
        + "\n\nThe same trials under other limits: a small limit finds more and errs more often; more processes or seconds "
        "narrow the estimates.\n\n"
        "| detects slow-downs of | fails above | alarms on equal models | alarms on the slower model |\n"
        "|---|---|---|---|\n" + "\n".join(other) + "\n"
    )
    print(text)
    if options.out:
        write_text(options.out, text)


def _trials(
    name: str, a: Path, b: Path, count: int, limits: Limits, conditions: Conditions, python: str | None
) -> list[Verdict]:
    verdicts: list[Verdict] = []
    for number in range(count):
        if python is None:
            verdicts.append(check(a, b, limits=limits, conditions=conditions))
        else:
            verdicts.append(check_environments(b, [python], there=a, limits=limits, conditions=conditions))
        last = _timing(verdicts[-1])
        print(f"{name} {number + 1}/{count}: {last.slowdown:+.2%}, p = {last.p_value:.2g}", flush=True)
    return verdicts


def _timing(verdict: Verdict) -> TimeChange:
    if verdict.timing is None:
        raise SystemExit(f"a trial was not timed: {verdict.reason}")
    return verdict.timing


def _row(name: str, verdicts: list[Verdict], alarms: list[bool]) -> str:
    estimates = [_timing(verdict).slowdown for verdict in verdicts]
    share = f"{np.mean(alarms):.1%}"
    return f"| {name} | {len(alarms)} | {sum(alarms)} | {share} | {np.median(estimates):+.2%} | {np.std(estimates):.2%} |"


def _share(verdicts: list[Verdict], step: float) -> str:
    return f"{np.mean([one.slowdown > step / 2 and one.p_value < 0.01 for one in map(_timing, verdicts)]):.1%}"


if __name__ == "__main__":
    main()
