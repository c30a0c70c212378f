"""Measures what the basis between layers and the rounding by outputs bring to low-rank networks in int8, against neither.

    python benchmarks/gauge.py DENSE.onnx [MORE.onnx …] [--flops 2] [--samples 256] [-o results/gauge]

Beside each DENSE.onnx lies DENSE.calibration.npz, with inputs by name, and DENSE.test.npz, with other inputs. A plan with FLOPs
÷ 2 is chosen, and its cores are fitted to half of the calibration inputs, which also give the ranges of activations, the basis
and the rounding. Every model in int8 is then compared with the same model in fp32, on the test inputs, with 8 and with 7 bits
for weights (as on processors without VNNI), with one scale per output channel and with one per weight.
"""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

import onnx
from pages import parser_of, write_results

from tensorrail_exporter import factorize
from tensorrail_exporter.calibrate.inputs import Calibration, load_calibration
from tensorrail_exporter.calibrate.layerwise import fit_layers
from tensorrail_exporter.calibrate.split import split
from tensorrail_exporter.graphs.io import load_model
from tensorrail_exporter.precision.int8 import to_int8
from tensorrail_exporter.search.losses import agreement_between, outputs_of
from tensorrail_exporter.search.planner import plan_network
from tensorrail_exporter.search.targets import Search
from tensorrail_runtime.errors import TensorrailError
from tensorrail_runtime.measure.timing import Conditions, Timing
from tensorrail_runtime.sessions.machine import machine
from tensorrail_runtime.sessions.session import Session

ONE_THREAD = Session(threads=1)
SCALES = [(bits, per_channel) for bits in (8, 7) for per_channel in (True, False)]
WAYS: dict[str, dict[str, Any]] = {
    "plain": {"gauge": False, "rounding": "nearest"},
    "basis": {"gauge": True, "rounding": "nearest"},
    "rounding": {"gauge": False, "rounding": "outputs"},
    "both": {"gauge": True, "rounding": "outputs"},
}


def measured(path: Path, options: argparse.Namespace) -> list[dict[str, Any]]:
    """Return one record for each way to round, of one network."""
    dense = load_model(path)
    inputs = load_calibration(path.with_suffix(".calibration.npz"), path, most=options.samples)
    others = load_calibration(path.with_suffix(".test.npz"), path, most=options.test_samples, classes=False)
    parts = split(inputs, dense)
    search = Search(cache=options.cache, allow_slower=True)
    conditions = Conditions(Timing(), ONE_THREAD)
    plan = plan_network(dense, {"flops": options.flops}, search, calibration=inputs, conditions=conditions, judge=False).plan
    fitted = fit_layers(dense, plan, parts.fitted, ONE_THREAD, held_out=parts.chosen)
    low_rank = factorize(fitted.model, plan, fitted.cores).model
    records = []
    for bits, per_channel in SCALES:
        record: dict[str, Any] = {"network": path.stem, "layers": len(plan.layers), "bits": bits, "per_channel": per_channel}
        for name, model in (("dense", dense), ("low rank", low_rank)):
            for way, how in WAYS.items():
                small = to_int8(model, parts.fitted.feeds, per_channel=per_channel, reduce_range=bits == 7, **how)
                record[f"{name}, {way}"] = difference(model, small, others)
        records.append(record)
    return records


def difference(model: onnx.ModelProto, small: onnx.ModelProto, inputs: Calibration) -> float:
    """Return the difference of the outputs of a model in int8 from those in fp32, as a multiple of their standard deviation."""
    names = [output.name for output in model.graph.output]
    before, after = (outputs_of(one, names, inputs, ONE_THREAD) for one in (model, small))
    return agreement_between(before, after, inputs).difference


def removed(record: dict[str, Any]) -> float | None:
    """Return the share that goes of what low rank adds to the squared error of the dense network in int8; None for no more."""
    plain, better, dense = (record[key] ** 2 for key in ("low rank, plain", "low rank, both", "dense, plain"))
    return (plain - better) / (plain - dense) if plain > dense else None


def page(records: list[dict[str, Any]], options: argparse.Namespace) -> str:
    """Return the table as Markdown."""
    lines = [
        "# What int8 loses, and what the basis and the rounding take back",
        "",
        f"Command: `python benchmarks/gauge.py {' '.join(one.name for one in options.models)} --flops {options.flops:g} "
        f"--samples {options.samples}`. {machine().processor}.",
        "",
        "Difference of the outputs in int8 from those of the same model in fp32, in standard deviations, on test inputs that",
        "nothing was chosen by. *Basis*: between two layers (`quantize --no-gauge`: none); *rounding*: by the outputs of",
        "layers (`quantize --rounding nearest`: none). *Removed* is the share of what low rank adds to the squared error of",
        "the dense network in int8 that goes with both.",
        "",
        "| network | bits | scales | dense | both | low rank | basis | rounding | both | removed |",
        "|---|--:|---|--:|--:|--:|--:|--:|--:|--:|",
    ]
    for record in records:
        if "failed" in record:
            lines.append(f"| {record['network']} | {record['failed']} |||||||||")
            continue
        share = removed(record)
        keys = ["dense, plain", "dense, both", *(f"low rank, {way}" for way in WAYS)]
        lines.append(
            f"| {record['network']} | {record['bits']} | per {'channel' if record['per_channel'] else 'weight'} "
            f"| {' | '.join(f'{record[key]:.4f}' for key in keys)} | {'–' if share is None else f'{100 * share:.0f} %'} |"
        )
    return "\n".join(lines) + "\n"


def main() -> None:
    """Measure all networks."""
    parser = parser_of(__doc__)
    parser.add_argument("--flops", type=float, default=2.0, help="Target on FLOPs. Default: 2.")
    parser.add_argument("--samples", type=int, default=256, help="Calibration inputs. Default: 256.")
    parser.add_argument("--test-samples", type=int, default=512, help="Test inputs. Default: 512.")
    options = parser.parse_args()
    records: list[dict[str, Any]] = []
    for path in options.models:
        try:
            new = measured(path, options)
        except TensorrailError as error:
            new = [{"network": path.stem, "failed": str(error)}]
        records += new
        print(page(new, options).rpartition("--:|\n")[2], end="", flush=True)
        write_results(options.out, records, page(records, options))


if __name__ == "__main__":
    main()
