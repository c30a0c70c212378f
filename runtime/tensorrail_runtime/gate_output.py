"""A verdict in the forms that CI systems read: JUnit XML, and the JSON of github-action-benchmark."""

from __future__ import annotations

import json
from xml.etree import ElementTree as ET

from tensorrail_runtime.regress import Verdict


def junit(verdict: Verdict) -> str:
    """Return one test suite with a test case a finding."""
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
    ET.indent(root)
    return '<?xml version="1.0" encoding="utf-8"?>\n' + ET.tostring(root, encoding="unicode") + "\n"


def smaller_is_better(verdict: Verdict) -> str:
    """Return the `customSmallerIsBetter` list of github-action-benchmark: the median latency, and the relative time."""
    half = (verdict.high - verdict.low) / 2
    rows = [
        {"name": f"{verdict.model}: latency p50", "unit": "ms", "value": verdict.p50_ms},
        {
            "name": f"{verdict.model}: time relative to the baseline",
            "unit": "×",
            "value": 1 + verdict.slowdown,
            "range": f"± {half:.4f}",
            "extra": f"p = {verdict.p_value:.3g}",
        },
    ]
    return json.dumps(rows, indent=1, ensure_ascii=False) + "\n"
