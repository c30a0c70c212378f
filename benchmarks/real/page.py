"""Writes the tables of `results/real-models.md`, and the sentence of the README."""

from __future__ import annotations

import textwrap
from collections.abc import Mapping, Sequence
from typing import Any

from real.measure import INT8, MAX_DIFFERENCE, MIN_AGREEMENT
from tensorrail_runtime.sessions.machine import Machine

Record = Mapping[str, Any]

KEPT = 0.97  # of the dense model's quality
BEGIN, END = "<!-- made by `python benchmarks/real_models.py` from results/ -->", "<!-- end of real models -->"
_WIDTH = 100
_SOON = 60.0  # seconds within which a refusal should come


def text(records: Sequence[Record], where: Machine, seconds: float) -> str:
    """Return the page.

    Args:
        records: the records of the networks.
        where: the machine that they were measured on.
        seconds: seconds of each comparison.

    """
    head = (
        f"Command: `python benchmarks/real_models.py`. {where.processor}, {where.cores} cores, ONNX Runtime "
        f"{where.onnxruntime}, CPU provider, one thread, batch 1; dense, factored and int8 models interleaved, {seconds:g} s, "
        "in five fresh processes. The networks are those that packages on PyPI carry. A model is accepted if its top-1 "
        f"agreement with the dense model is at least {100 * MIN_AGREEMENT:g} % on held-out calibration inputs, or, where "
        f"outputs are no scores of classes, if they differ by at most {MAX_DIFFERENCE:g} of their standard deviation; "
        "`compress` looks for the fastest such model. The quality is measured on other inputs, which compression never saw."
    )
    lines = ["# Networks from packages on PyPI", "", *textwrap.wrap(head, _WIDTH, break_long_words=False), ""]
    lines += ["## Result", "", *textwrap.wrap(sentence(records), _WIDTH), "", *summary(records)]
    lines += ["", "Speed-ups are dense time divided by time, with their 95 % interval; quality is as below.", ""]
    lines += ["## Beside int8", "", *beside_int8(records), "", "## Inputs and quality", "", *inputs(records)]
    lines += ["", "## What `compress` reported", "", *calls(records), "", *said(records)]
    return "\n".join(lines) + "\n"


def summary(records: Sequence[Record]) -> list[str]:
    """Return the table of what compression brought."""
    lines = [
        "| network | layers rewritten / eligible | MACs reduction (×) | predicted | speed-up [95 % CI] | quality, dense "
        "| quality, factored |",
        "|---|---|---|---|---|---|---|",
    ]
    for record in records:
        chosen, quality = record["chosen"], record["quality"]
        if chosen is None:
            ended = "not accepted" if record["call"]["written"] else "refused"
            lines.append(f"| {record['network']} | {ended} | – | – | – | {_share(quality, 'dense')} | – |")
            continue
        lines.append(
            f"| {record['network']} | {chosen['rewritten']} / {chosen['eligible']} | {chosen['macs_reduction']:.2f} "
            f"| {chosen['predicted']:.2f}× | {_speed(record, 'factored')} | {_share(quality, 'dense')} "
            f"| {_share(quality, 'factored')} |"
        )
    return lines


def beside_int8(records: Sequence[Record]) -> list[str]:
    """Return the table of the int8 models."""
    lines = ["| network | dense p50 (ms) | " + " | ".join(f"{kind}, speed-up [95 % CI] | quality" for kind in INT8) + " |"]
    lines.append("|---" * (2 + 2 * len(INT8)) + "|")
    for record in records:
        cells = [cell for kind in INT8 for cell in (_speed(record, kind), _share(record["quality"], kind))]
        lines.append(f"| {record['network']} | {record['speed']['dense'][0]:.2f} | {' | '.join(cells)} |")
    return lines


def inputs(records: Sequence[Record]) -> list[str]:
    """Return the table of inputs and of what the quality is."""
    lines = ["| network | package | file (MB) | MMACs | inputs | calibration / test | quality |", "|---" * 7 + "|"]
    lines += [
        f"| {record['network']} | {record['package']} | {record['bytes'] / 1e6:.1f} | {record['macs'] / 1e6:.1f} "
        f"| {record['samples']} | {record['calibration']} / {record['aside']} | {record['metric']} |"
        for record in records
    ]
    return lines


def calls(records: Sequence[Record]) -> list[str]:
    """Return the table of the calls of `compress`."""
    lines = [
        "| network | ended | time (s) | CPU time (s) | peak memory (MiB) | agreement | difference | speed-up in its report |",
        "|---" * 8 + "|",
    ]
    for record in records:
        call = record["call"]
        ended = "accepted" if call["good"] else "not accepted" if call["written"] else _ended(call)
        agreement, difference, peak = (call.get(name) for name in ("agreement", "difference", "peak_mib"))
        lines.append(
            f"| {record['network']} | {ended} | {call['seconds']:.0f} | {call['cpu_seconds']:.0f} "
            f"| {'–' if peak is None else f'{peak:.0f}'} "
            f"| {'–' if agreement is None else f'{100 * agreement:.1f} %'} "
            f"| {'–' if difference is None else f'{difference:.3f}'} "
            f"| {'{:.2f}× [{:.2f}, {:.2f}]'.format(*call['measured']) if 'measured' in call else '–'} |"
        )
    return lines


def said(records: Sequence[Record]) -> list[str]:
    """Return the reasons that were given, as a list."""
    lines = []
    for record in records:
        answers = [(record["network"], record["call"]["message"])]
        answers += [(f"{record['network']}, {kind}", reason) for kind, reason in record["failed"].items()]
        for what, reason in answers:
            if reason:
                lines += textwrap.wrap(f"- {what}: {reason}", _WIDTH, subsequent_indent="  ")
    return lines


def sentence(records: Sequence[Record]) -> str:
    """Return what was found in one or two sentences."""
    good = [record for record in records if kept(record)]
    refused = [record for record in records if not record["call"]["written"] and record["call"]["ended"] == "done"]
    written = [record["network"] for record in records if record["call"]["written"] and record not in good]
    stopped = [record["network"] for record in records if record["call"]["ended"] != "done"]
    soon = sum(record["call"]["seconds"] <= _SOON for record in refused)
    speeds = sorted(record["speed"]["factored"][1] for record in good)
    words = [f"Of {len(records)} networks, {len(good)} run faster with at least {100 * KEPT:g} % of their quality"]
    if good:
        words[0] += f" ({speeds[0]:.2f}× to {speeds[-1]:.2f}×)"
    if refused:
        words[0] += f"; {len(refused)} {'is' if len(refused) == 1 else 'are'} refused with the reason, {soon} within a minute"
    words[0] += "."
    if written:
        words.append(f"Written, but slower or less accurate than that: {', '.join(written)}.")
    if stopped:
        words.append(f"Crashed, or stopped at the time limit: {', '.join(stopped)}.")
    return " ".join(words)


def kept(record: Record) -> bool:
    """Return whether the factored model was measured to be faster, with enough of the dense model's quality."""
    if record["chosen"] is None or "factored" not in record["speed"]:
        return False
    quality = record["quality"]
    return bool(record["speed"]["factored"][2] > 1 and quality["factored"] >= KEPT * quality["dense"])


def with_sentence(readme: str, records: Sequence[Record]) -> str:
    """Return the README with the present sentence between its two comments."""
    before, _, rest = readme.partition(BEGIN)
    _, _, after = rest.partition(END)
    linked = f"{sentence(records)} All come from packages on PyPI ([results/real-models.md](results/real-models.md))."
    return "\n".join([before + BEGIN, *textwrap.wrap(linked, _WIDTH, break_on_hyphens=False), END]) + after


def _ended(answer: Record) -> str:
    return "refused" if answer["ended"] == "done" else str(answer["ended"])


def _speed(record: Record, kind: str) -> str:
    if kind not in record["speed"]:
        return "fails" if kind in record["failed"] else "–"
    _, value, low, high = record["speed"][kind]
    return f"{value:.2f}× [{low:.2f}, {high:.2f}]"


def _share(quality: Mapping[str, float], kind: str) -> str:
    return f"{quality[kind]:.3f}" if kind in quality else "–"
