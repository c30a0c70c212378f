"""Compresses one network as a user would, and measures speed and quality of what came out."""

from __future__ import annotations

import json
import os
import resource
import subprocess
import sys
import threading
import time
from collections.abc import Mapping
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np

import tensorrail as tr
from real.child import Request
from real.network import Data, Network, Packages, outputs_of
from tensorrail_runtime.records import write_text

MIN_AGREEMENT, MAX_DIFFERENCE = 0.97, 0.05
"""A model is accepted if its outputs agree with the dense model's so closely: by best classes, or else by their difference."""
INT8 = ("static int8", "dynamic int8")


@dataclass(frozen=True)
class How:
    """How long and where networks are measured."""

    share: float
    """Share of the samples of a whole run."""
    seconds: float
    """Seconds of the interleaved comparison at the end."""
    limit: float
    """Seconds after which a process is stopped."""
    cache: Path
    """Folder of latency tables."""


def measured(name: str, network: Network, packages: Packages, folder: Path, how: How) -> dict[str, Any]:
    """Return the record of one network.

    Args:
        name: its name.
        network: the network.
        packages: returns the folder of a package.
        folder: an empty folder for models and inputs.
        how: how it is measured.

    """
    dense, inputs = folder / "dense.onnx", folder / "calibration.npz"
    network.write(packages(network.package), dense)
    data = network.data(packages, how.share)
    np.savez(inputs, **data.calibration)
    request = Request(
        "compress",
        *(str(path) for path in (dense, folder / "factored.onnx", inputs)),
        {key: list(shape) for key, shape in network.shapes.items()},
        *(MIN_AGREEMENT, MAX_DIFFERENCE, max(2.0, how.seconds / 4), str(how.cache)),
        {key: dict(values) for key, values in network.rules.items()},
    )
    call = process(request, folder, "compress", how.limit)
    call["good"] = call["written"] and call["accepted"] and call["faster"]
    models = {"dense": dense}
    if call["good"]:
        models["factored"] = folder / "factored.onnx"
    int8 = {}
    for kind in INT8:
        path = folder / f"{kind.replace(' ', '-')}.onnx"
        int8[kind] = process(Request(**(asdict(request) | {"do": kind, "out": str(path)})), folder, kind, how.limit)
        if int8[kind]["written"]:
            models[kind] = path
    quality, failed = qualities(models, network, data)
    models = {kind: path for kind, path in models.items() if kind not in failed}
    return {
        "network": name,
        "package": network.package,
        "bytes": dense.stat().st_size,
        "macs": counted(dense, network.shapes),
        "calibration": len(next(iter(data.calibration.values()))),
        "aside": len(next(iter(data.aside.values()))),
        "samples": network.samples,
        "metric": network.quality,
        "quality": quality,
        "failed": failed | {kind: answer["message"] for kind, answer in int8.items() if not answer["written"]},
        "call": call,
        "int8": int8,
        "chosen": call if call["good"] else None,
        "speed": speeds(models, network, how.seconds),
    }


def process(request: Request, folder: Path, name: str, limit: float) -> dict[str, Any]:
    """Carry out a request in a process of its own.

    Args:
        request: the request.
        folder: where request, answer and log are written.
        name: the name of the step.
        limit: seconds after which the process is stopped.

    Returns:
        The answer of the process, and `step`, `ended` (`done`, `crashed` or `stopped`), `seconds` and `cpu_seconds`.

    """
    path = folder / f"{name.replace(' ', '-')}.json"
    answer, log = path.with_suffix(".answer.json"), path.with_suffix(".log")
    answer.unlink(missing_ok=True)
    write_text(path, json.dumps(asdict(request)) + "\n")
    begin = time.monotonic()
    stopped = threading.Event()
    with log.open("w", encoding="utf-8") as out:
        child = subprocess.Popen(
            [sys.executable, Path(__file__).with_name("child.py"), path], stdout=out, stderr=out, env=environment()
        )
        timer = threading.Timer(limit, lambda: (stopped.set(), child.kill()))
        timer.start()
        _, status, used = os.wait4(child.pid, 0)
        timer.cancel()
        child.returncode = os.waitstatus_to_exitcode(status)
    found = json.loads(answer.read_text(encoding="utf-8")) if answer.exists() else {"written": False}
    ended = "done" if child.returncode == 0 and answer.exists() else "stopped" if stopped.is_set() else "crashed"
    if ended != "done":
        lines = log.read_text(encoding="utf-8", errors="replace").strip().splitlines()
        last = next((line for line in reversed(lines) if not line.startswith(" ")), f"exit code {child.returncode}")
        found |= {"written": False, "message": f"stopped after {limit:g} s" if ended == "stopped" else last}
    return found | {
        "step": name,
        "ended": ended,
        "seconds": time.monotonic() - begin,
        "cpu_seconds": used.ru_utime + used.ru_stime,
    }


def environment() -> dict[str, str]:
    """Return the environment of a child: it finds the modules of this folder's parent and of the project."""
    here = Path(__file__).parents[1]
    places = [str(here), *(str(here.parent / room) for room in ("tools", "trainer", "exporter", "runtime"))]
    return os.environ | {"PYTHONPATH": os.pathsep.join(places)}


def qualities(models: Mapping[str, Path], network: Network, data: Data) -> tuple[dict[str, float], dict[str, str]]:
    """Return the quality of each model on the held-out inputs, and why a model has none."""
    found, failed = {}, {}
    run = network.run or outputs_of
    dense = run(models["dense"], data.aside)
    for kind, path in models.items():
        try:
            outputs = dense if kind == "dense" else run(path, data.aside)
        except Exception as error:  # noqa: BLE001  # ONNX Runtime's exceptions have no common class of their own
            failed[kind] = str(error).partition("\n")[0]
            continue
        found[kind] = network.judge(outputs, dense, data.truth)
    return found, failed


def speeds(models: Mapping[str, Path], network: Network, seconds: float) -> dict[str, list[float]]:
    """Return the milliseconds (p50) and the speed-up over dense with its 95 % interval, of all models in interleaved runs."""
    options = tr.Options(session=tr.Session(threads=1), timing=tr.Timing(shapes=network.shapes, seconds=seconds, processes=5))
    if network.rules:
        options = replace(options, inputs=tr.InputRules(**network.rules))
    report = tr.bench(list(models.values()), labels=list(models), options=options)
    found = {"dense": [report.latencies[0].p50, 1.0, 1.0, 1.0]}
    for latency, ratio in zip(report.latencies[1:], report.ratios, strict=True):
        found[latency.model] = [latency.p50, ratio.value, ratio.low, ratio.high]
    return found


def counted(path: Path, shapes: Mapping[str, tuple[int, ...]]) -> int:
    """Return the MACs of one sample."""
    from tensorrail_runtime.graphs.cost import cost

    return cost(path, 1, shapes).macs


def cpu_seconds() -> float:
    """Return the CPU seconds of this process and of its children that have ended."""
    return sum(
        usage.ru_utime + usage.ru_stime for usage in map(resource.getrusage, (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN))
    )
