"""Writes a verdict in the formats of CI systems: JUnit XML, JSON for github-action-benchmark, a summary and annotations.

Names in a verdict come from the checked files, which may be untrusted: each format escapes them.
"""

from __future__ import annotations

import json
import re
from xml.etree import ElementTree as ET

from tensorrail_runtime.gate.regress import Verdict

_NOT_XML = re.compile("[^\t\n\r\u0020-\ud7ff\ue000-\ufffd\U00010000-\U0010ffff]")


def junit(verdict: Verdict) -> str:
    """Return JUnit XML: one test suite with one test case per finding."""
    failed = [finding for finding in verdict.findings if not finding.holds]
    suite = ET.Element(
        "testsuite", name=f"tensorrail regress {verdict.model}", tests=str(len(verdict.findings)), failures=str(len(failed))
    )
    for finding in verdict.findings:
        case = ET.SubElement(suite, "testcase", classname=verdict.model, name=finding.name)
        text = f"measured {finding.measured}, baseline {finding.baseline}, limit {finding.limit}"
        if finding.holds:
            ET.SubElement(case, "system-out").text = text
        else:
            ET.SubElement(case, "failure", message=text).text = text
    root = ET.Element("testsuites")
    root.append(suite)
    for element in root.iter():  # XML cannot represent control characters
        element.attrib.update({key: _NOT_XML.sub("\ufffd", value) for key, value in element.attrib.items()})
        element.text = _NOT_XML.sub("\ufffd", element.text) if element.text else element.text
    ET.indent(root)
    return '<?xml version="1.0" encoding="utf-8"?>\n' + ET.tostring(root, encoding="unicode") + "\n"


def smaller_is_better(verdict: Verdict) -> str:
    """Return the JSON list `customSmallerIsBetter` of github-action-benchmark: the median latency and the relative time.

    The list is empty for a model that was not timed.
    """
    timing = verdict.timing
    if timing is None:
        return "[]\n"
    rows = [
        {"name": f"{verdict.model}: latency p50", "unit": "ms", "value": timing.p50_ms},
        {
            "name": f"{verdict.model}: time relative to the baseline",
            "unit": "×",
            "value": 1 + timing.slowdown,
            "range": f"± {(timing.high - timing.low) / 2:.4f}",
            "extra": f"p = {timing.p_value:.3g}",
        },
    ]
    return json.dumps(rows, indent=1, ensure_ascii=False) + "\n"


def markdown(verdict: Verdict) -> str:
    """Return the verdict as GitHub Markdown for the summary of a job: one row per finding."""
    rows = [
        f"| {' | '.join(map(_cell, (f.name, f.baseline, f.measured, f.limit)))} | {'yes' if f.holds else '**NO**'} |"
        for f in verdict.findings
    ]
    lines = [
        f"### {'✅' if verdict.holds else '❌'} {_cell(verdict.model)}: {'no regression' if verdict.holds else 'regression'}",
        "",
        "| check | baseline | measured | limit | within limit |",
        "|---|---|---|---|---|",
        *rows,
        "",
        f"{_times(verdict)} on {_cell(_where(verdict))}.",
        *(line for warning in verdict.warnings for line in ("", f"⚠️ {_cell(warning)}")),
    ]
    return "\n".join(lines) + "\n\n"


def workflow_commands(verdict: Verdict) -> str:
    """Return GitHub's workflow commands, one per line: an error for each failed finding, and the warnings."""
    lines = [
        _command("error", f"{f.name} of {verdict.model}", f"measured {f.measured}, baseline {f.baseline}, limit {f.limit}")
        for f in verdict.findings
        if not f.holds
    ]
    lines += [_command("warning", f"latency of {verdict.model}", warning) for warning in verdict.warnings]
    return "".join(f"{line}\n" for line in lines)


def _times(verdict: Verdict) -> str:
    timing = verdict.timing
    if timing is None:
        return "Not timed"
    return f"p50 {timing.p50_ms:.4f} ms, baseline {timing.baseline_p50_ms:.4f} ms, measured {verdict.how}"


def _where(verdict: Verdict) -> str:
    machine = verdict.machine
    return f"{machine.processor}, {machine.cores} cores, ONNX Runtime {machine.onnxruntime}"


def _cell(text: str) -> str:
    """Escape text so that it is one cell of a table: no line break, no Markdown, no HTML."""
    return re.sub(r"([\\`*_{}\[\]<>|#!~&@])", r"\\\1", " ".join(text.split()))


def _command(kind: str, title: str, message: str) -> str:
    """Return one workflow command; line breaks are escaped, since they would start another command."""

    def escaped(text: str) -> str:
        return text.replace("%", "%25").replace("\r", "%0D").replace("\n", "%0A")

    return f"::{kind} title={escaped(title).replace(':', '%3A').replace(',', '%2C')}::{escaped(message)}"
