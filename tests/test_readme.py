import re
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
BLOCKS = re.findall(r"```python\n(.*?)```", (ROOT / "README.md").read_text(encoding="utf-8"), re.DOTALL)


@pytest.mark.parametrize("block", BLOCKS)
def test_the_readmes_python_runs(block):
    names: dict = {}
    exec(compile(block, "README.md", "exec"), names)  # noqa: S102 - it is our own README
    assert type(names["model"][2]).__name__ == "FactoredLayer"
    assert len(names["residuals"]) == 1


def test_there_is_an_example():
    assert BLOCKS


def test_imports_run_one_way():
    order = ["tensorrail", "tensorrail_trainer", "tensorrail_exporter", "tensorrail_runtime"]
    homes = {"tensorrail": "tools", "tensorrail_trainer": "trainer", "tensorrail_exporter": "exporter"}
    homes["tensorrail_runtime"] = "runtime"
    for place, package in enumerate(order):
        for path in (ROOT / homes[package] / package).rglob("*.py"):
            found = set(re.findall(r"^\s*(?:from|import) (tensorrail\w*)", path.read_text(encoding="utf-8"), re.MULTILINE))
            assert found <= set(order[place:]), path
    runtime = "".join(path.read_text(encoding="utf-8") for path in (ROOT / "runtime").rglob("*.py"))
    assert not re.search(r"^\s*(from|import) (torch|tensorly|onnx_graphsurgeon)", runtime, re.MULTILINE)
