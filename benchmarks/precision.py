"""What rank and precision bring together, beside dense int8 and low rank in fp32: the whole front of several networks.

    python benchmarks/precision.py DENSE.onnx [MORE.onnx …] [--fit 60] [--seconds 60] [-o results/precision]

Beside each DENSE.onnx lies DENSE.calibration.npz, with inputs by name, and perhaps DENSE.test.npz, with other inputs
and `labels`. `tr.compress` walks targets with `Options(precision="auto", front=True)`: cores are fitted to a part of
the calibration inputs, ranks are chosen by others, and agreement is measured on a quarter that is held out. All models
of a network are timed in interleaved runs, in fresh processes with one thread. Results are written after each network, with a
picture of each front.
"""

from __future__ import annotations

import argparse
import time
from dataclasses import replace
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import numpy as np
from pages import parser_of, write_results

import tensorrail as tr
from tensorrail.front import drawn
from tensorrail_exporter.compressed import Front, Point
from tensorrail_runtime.errors import TensorrailError
from tensorrail_runtime.measure.agreement import Agreement
from tensorrail_runtime.records import write_text
from tensorrail_runtime.sessions.machine import machine, processor

ALIKE, NEAR = 0.97, 0.05  # agreement and difference that are enough, where dense int8 is nearer to the dense network


def measured(path: Path, options: argparse.Namespace, folder: Path) -> tuple[Front, float | None]:
    """Return the front of one network, and the score of the dense one where there are labels."""
    test = path.with_suffix(".test.npz")
    labelled = test.exists()
    if labelled:
        with np.load(test) as arrays:
            labelled = "labels" in arrays
    how = tr.Options(
        session=tr.Session(threads=1),
        timing=tr.Timing(seconds=options.bench_seconds, processes=5),
        search=tr.Search(seconds=options.seconds, cache=options.cache),
        fit=tr.Fit(seconds=options.fit, samples=options.samples),
        precision="auto",
        front=True,
    )

    def compressed(guard: tr.Guard) -> Any:
        inputs, data = path.with_suffix(".calibration.npz"), test if labelled else None
        return tr.compress(path, folder / "out.onnx", calibration=inputs, data=data, options=replace(how, guard=guard))

    try:
        report = compressed(tr.Guard())
    except tr.PlanError as error:  # outputs are no scores of classes
        if "give max_difference" not in str(error):
            raise
        report = compressed(tr.Guard(max_difference=NEAR))
    if options.out:
        write_text(options.out / f"{path.stem}.svg", drawn(report.front))
    dense = None if report.accuracy is None else report.accuracy.reference.mean
    return Front(model=path.stem, dense=report.dense, points=report.front, machine=report.latency.machine), dense


def best(front: Front) -> Point | None:
    """Return the fastest factored model that is as good as dense int8 on the inputs that models are chosen by.

    It agrees on as large a share of these as the dense network in int8, or on 97 %; where outputs are no scores of classes,
    they differ by no more, or by 0.05 of their standard deviation.
    """
    int8 = dense_int8(front)
    other = None if int8 is None else int8.chosen

    def is_good(one: Agreement) -> bool:
        if one.agreement is None:
            return one.difference <= (NEAR if other is None else max(NEAR, other.difference))
        return one.agreement >= (ALIKE if other is None or other.agreement is None else min(ALIKE, other.agreement))

    good = [one for one in front.points if one.layers and one.chosen is not None and is_good(one.chosen)]
    return max(good, key=lambda point: point.ratios.latency, default=None)


def dense_int8(front: Front) -> Point | None:
    """Return the fastest dense network in int8, all of it or with layers in fp32."""
    dense = [point for point in front.points if point.precision == "int8" and not point.layers]
    return max(dense, key=lambda point: point.ratios.latency, default=None)


def page(records: list[dict[str, Any]], options: argparse.Namespace) -> str:
    """Return the tables as Markdown."""
    flags = "" if processor().saturates else ", with VNNI"
    lines = [
        "# Rank and precision together",
        "",
        f"Command: `python benchmarks/precision.py {' '.join(one.name for one in options.models)} --fit {options.fit:g} "
        f"--seconds {options.seconds:g} --samples {options.samples}`. {machine().processor}{flags}, one thread, batch 1.",
        "",
        "All models of a network are timed in interleaved runs; speed-ups over the dense network in fp32 have 95 % intervals.",
        "Agreement is measured on held-out calibration inputs, scores on labelled inputs that nothing was fitted to or",
        "chosen by.",
    ]
    for record in records:
        if "refused" in record:
            lines += ["", f"## {record['network']}", "", f"Refused: {record['refused']}."]
            continue
        front = Front.model_validate(record["front"])
        dense = "" if record["dense_score"] is None else f", top-1 {100 * record['dense_score']:.1f} %"
        lines += [
            "",
            f"## {record['network']}",
            "",
            f"Dense fp32: {front.dense.milliseconds:.3f} ms, {front.dense.bytes:,} bytes{dense}. The whole front took "
            f"{record['seconds']:.0f} s.",
            "",
            "| model | speed-up | bytes reduction (×) | MACs reduction (×) | top-1 agreement | outputs differ | top-1 |",
            "|---|---|--:|--:|--:|--:|--:|",
        ]
        lines += [_row(point) for point in front.points]
        int8, chosen = dense_int8(front), best(front)
        if chosen is not None and int8 is not None:
            times = chosen.ratios.latency / int8.ratios.latency
            lines += [
                "",
                "The fastest low-rank model that is as good as dense int8 on the inputs that models are chosen by, or agrees "
                f"on {100 * ALIKE:.0f} % of them (differs by {NEAR:g}): *{chosen.name}*, {times:.2f} times as fast as "
                f"*{int8.name}*.",
            ]
    return "\n".join(lines) + "\n"


def _row(point: Point) -> str:
    ratios, aside = point.ratios, point.aside
    same = "–" if aside is None or aside.agreement is None else f"{100 * aside.agreement:.1f} %"
    differ = "–" if aside is None else f"{aside.difference:.3f}"
    score = "–" if point.score is None else f"{100 * point.score:.1f} %"
    return (
        f"| {point.name} | {ratios.latency:.2f}× [{ratios.latency_low:.2f}, {ratios.latency_high:.2f}] | {ratios.bytes:.2f} "
        f"| {ratios.macs:.2f} | {same} | {differ} | {score} |"
    )


def main() -> None:
    """Measure all networks."""
    parser = parser_of(__doc__, "FILE.md, FILE.json and FILE/NETWORK.svg")
    parser.add_argument("--samples", type=int, default=512, help="Calibration inputs. Default: 512.")
    parser.add_argument("--seconds", type=float, default=60.0, help="Seconds of timing layers, in each precision. Default: 60.")
    parser.add_argument("--fit", type=float, default=60.0, help="Seconds of fits in torch, of all models. Default: 60.")
    parser.add_argument("--bench-seconds", type=float, default=20.0, help="Seconds of the comparison of times. Default: 20.")
    options = parser.parse_args()
    if options.out:
        options.out.mkdir(parents=True, exist_ok=True)
    records: list[dict[str, Any]] = []
    for path in options.models:
        began = time.monotonic()
        with TemporaryDirectory() as folder:
            try:
                front, dense = measured(path, options, Path(folder))
            except TensorrailError as error:
                record: dict[str, Any] = {"refused": str(error)}
            else:
                record = {"front": front.model_dump(mode="json"), "dense_score": dense}
        records.append({"network": path.stem, "seconds": time.monotonic() - began} | record)
        print(page(records[-1:], options).partition("\n## ")[2], flush=True)
        write_results(options.out, records, page(records, options))


if __name__ == "__main__":
    main()
