"""One step of the work on one network, in a process of its own: compress, or convert to int8.

    python benchmarks/real/child.py request.json

The request says what to do; the answer is written beside it. A refusal of the product is an answer, too. Anything else that
goes wrong ends the process, which counts as a crash.
"""

from __future__ import annotations

import json
import sys
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np

import tensorrail as tr
from tensorrail_runtime.measure.footprint import peak_mib
from tensorrail_runtime.records import write_text


@dataclass(frozen=True)
class Request:
    """What a process is asked to do."""

    do: str
    """`compress`, `static int8` or `dynamic int8`."""
    model: str
    """The dense model."""
    out: str
    """The file to write."""
    calibration: str
    """An npz file of inputs."""
    shapes: dict[str, list[int]]
    """Shapes of inputs with dynamic axes besides the batch."""
    min_agreement: float
    """Smallest share of inputs with the same best class."""
    max_difference: float
    """Largest relative difference of the outputs."""
    seconds: float
    """Seconds of the final comparison of `compress`."""
    cache: str
    """Folder of latency tables."""
    rules: dict[str, Any] = field(default_factory=dict)
    """Arguments of `tr.InputRules`, if any."""


def carried_out(request: Request) -> dict[str, Any]:
    """Return the answer: `written`, and what was found, or why it was refused."""
    options = tr.Options(
        session=tr.Session(threads=1),
        timing=tr.Timing(shapes=request.shapes, seconds=request.seconds),
        search=tr.Search(cache=Path(request.cache)),
        progress=told,
    )
    if request.rules:
        options = replace(options, inputs=tr.InputRules(**request.rules))
    try:
        if request.do == "compress":
            report = compressed(request, options)
            print(report)
            return {"written": True, "message": last_words(report), **facts(report)}
        if request.do == "static int8":
            print(tr.quantize(request.model, request.out, "int8", calibration=request.calibration, options=options))
            return {"written": True, "message": ""}
    except tr.TensorrailError as error:
        return {"written": False, "message": str(error)}
    from onnxruntime.quantization import quantize_dynamic
    from onnxruntime.quantization.shape_inference import quant_pre_process

    ready = Path(request.out).with_suffix(".ready.onnx")
    quant_pre_process(request.model, ready, skip_symbolic_shape=True)  # as ONNX Runtime advises: constants become initializers
    quantize_dynamic(ready, request.out)
    return {"written": True, "message": ""}


def compressed(request: Request, options: tr.Options) -> Any:
    """Return the report of the fastest model that agrees: by best classes, or for other outputs by their difference."""
    guards = tr.Guard(min_agreement=request.min_agreement), tr.Guard(max_difference=request.max_difference)
    try:
        return tr.compress(
            request.model, request.out, calibration=request.calibration, options=replace(options, guard=guards[0])
        )
    except tr.PlanError as error:
        if "give max_difference" not in str(error):
            raise
    return tr.compress(request.model, request.out, calibration=request.calibration, options=replace(options, guard=guards[1]))


def facts(report: Any) -> dict[str, Any]:
    """Return what the page shows of a report of `compress`."""
    planning, aside = report.planning, report.aside
    return {
        "rewritten": len(report.layers),
        "eligible": len(planning.rows),
        "macs_reduction": report.ratios.macs,
        "params_reduction": report.ratios.params,
        "predicted": report.predicted_latency,
        "measured": [report.ratios.latency, report.ratios.latency_low, report.ratios.latency_high],
        "accepted": report.accepted,
        "faster": report.faster,
        "meets": report.meets,
        "agreement": aside.agreement if aside else None,
        "difference": aside.difference if aside else None,
        "warnings": [*planning.warnings, *report.latency.warnings],
    }


def last_words(report: Any) -> str:
    """Return why a model that was written is not good enough; empty if it is."""
    if report.aside is not None and (reason := report.guard.refusal(report.aside)):
        return str(reason)
    return "" if report.faster else "NOT measured to be faster than the dense model"


def told(stage: str, share: float, detail: str = "") -> None:
    """Print notes and warnings of the product, and leave out how far it is."""
    if stage in ("note", "warning"):
        print(f"{stage}: {detail}", flush=True)


def main() -> None:
    path = Path(sys.argv[1])
    request = Request(**json.loads(path.read_text(encoding="utf-8")))
    answer = carried_out(request) | {"peak_mib": peak_mib()}
    write_text(path.with_suffix(".answer.json"), json.dumps(answer, default=np.ndarray.tolist) + "\n")


if __name__ == "__main__":
    main()
