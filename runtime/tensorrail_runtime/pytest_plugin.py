"""A pytest fixture that fails a test when a model became slower, larger or wrong.

    def test_the_detector_is_as_fast_as_before(latency_gate):
        latency_gate("detector.onnx", "baselines/detector.json")

`pytest --latency-record` records the baselines again instead of checking against them.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest

if TYPE_CHECKING:
    from tensorrail_runtime.gate.regress import Verdict


def pytest_addoption(parser: pytest.Parser) -> None:
    """Add the option `--latency-record`, which records baselines."""
    parser.addoption(
        "--latency-record", action="store_true", help="record the baselines of latency_gate again instead of checking them"
    )


@pytest.fixture
def latency_gate(request: pytest.FixtureRequest) -> Callable[..., Verdict | None]:
    """Return a function (model, baseline, **options of `regress.check`) that fails the test when the check fails."""

    def gate(model: Path | str, baseline: Path | str, **options: Any) -> Verdict | None:
        from tensorrail_runtime.errors import ModelError
        from tensorrail_runtime.gate import regress

        try:
            if request.config.getoption("--latency-record") and Path(baseline).suffix != ".onnx":
                recordable = ("settings", "batch", "shapes", "effort", "data")
                regress.record(model, baseline, **{name: value for name, value in options.items() if name in recordable})
                return None
            verdict = regress.check(baseline, model, **options)
        except ModelError as error:
            pytest.fail(str(error), pytrace=False)
        if not verdict.holds:
            pytest.fail(verdict.reason, pytrace=False)
        return verdict

    return gate
