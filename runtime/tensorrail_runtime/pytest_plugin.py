"""A pytest fixture that fails a test when a model became slower, larger or wrong.

    def test_the_detector_is_as_fast_as_before(latency_gate):
        latency_gate("detector.onnx", "baselines/detector.json")

`pytest --latency-record` records the baselines again instead of checking against them: at the same batch sizes and shapes, with
the same inputs, threads and provider.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

if TYPE_CHECKING:
    from tensorrail_runtime.feeds.rules import InputRules
    from tensorrail_runtime.gate.regress import Limits, Verdict
    from tensorrail_runtime.measure.accuracy import Labelled
    from tensorrail_runtime.measure.timing import Conditions


def pytest_addoption(parser: pytest.Parser) -> None:
    """Add the option `--latency-record`, which records baselines."""
    parser.addoption(
        "--latency-record", action="store_true", help="record the baselines of latency_gate again instead of checking them"
    )


@pytest.fixture
def latency_gate(request: pytest.FixtureRequest) -> Callable[..., Verdict | None]:
    """Return a function that fails the test when `regress.check` of a model against a baseline fails."""

    def gate(
        model: Path | str,
        baseline: Path | str,
        *,
        limits: Limits | None = None,
        conditions: Conditions | None = None,
        data: Labelled | None = None,
        rules: InputRules | None = None,
    ) -> Verdict | None:
        from tensorrail_runtime.errors import ModelError, UsageError
        from tensorrail_runtime.gate import regress

        try:
            if request.config.getoption("--latency-record") and Path(baseline).suffix != ".onnx":
                regress.record(model, baseline, conditions=conditions, data=data, rules=rules, again=True)
                return None
            verdict = regress.check(baseline, model, limits=limits, conditions=conditions, data=data, rules=rules)
        except (ModelError, UsageError) as error:
            pytest.fail(str(error), pytrace=False)
        if not verdict.holds:
            pytest.fail(verdict.reason, pytrace=False)
        return verdict

    return gate
