"""`import tensorrail`: every public name is there, and nothing is imported before it is used."""

from __future__ import annotations

import ast
import importlib
import importlib.util
import re
import subprocess
import sys
from pathlib import Path

import pytest

import tensorrail

PACKAGES = ("tensorrail", "tensorrail_trainer", "tensorrail_exporter", "tensorrail_runtime")
PUBLIC = {
    "tensorrail": """
        ADMM FORMATS Calibration CacheError CheckpointError DataError Fit Form GraphError Guard HeadPlan InputRules Labelled
        LayerPlan Layers Limits MissingExtraError ModelError Options Plan PlanError Quantization Recipe RecipeError Repository
        Search ServeOptions Serving Session TargetError TensorrailError Timing Tolerances TrainingError UsageError accuracy
        bench check compress cores_of decompose_graph dense_layers export export_trained factorize inspect load_calibration
        load_cores load_model package plan plan_layers plan_to_size quantize reconstruct regress run save_cores save_model serve
        to_dense to_onnx train
    """,
    "tensorrail_trainer": "ADMM FactoredLayer Recipe Residual cores_of plan_layers to_dense to_onnx",
    "tensorrail_exporter": """
        FORMATS ContractionCost Conv Factored Format GraphError HeadPlan LayerPlan LayerRewrite LayerSpec MatMul Plan PlanError
        Reshape Step contraction_cost decompose_graph factorize load_cores pad_ranks project reconstruct save_cores
    """,
    "tensorrail_runtime": """
        Accuracy Comparison Evaluation Footprint GraphCost LatencyReport ModelError Parity Placement Session Tolerances accuracy
        bench compare_scores cost evaluate footprint open_session parity placement random_inputs
    """,
}


@pytest.mark.parametrize("package", PACKAGES)
def test_the_public_names_are_these(package):
    module = importlib.import_module(package)
    assert sorted(module.__all__) == sorted(PUBLIC[package].split())
    for name in module.__all__:
        assert getattr(module, name) is not None
        assert importlib.util.find_spec(f"{package}.{name}") is None, f"{name} is the name of a module too"


def test_names_of_the_front_door_are_those_of_the_packages():
    for name in tensorrail.__all__:
        for package in PACKAGES[1:]:
            module = importlib.import_module(package)
            value = getattr(tensorrail, name)
            if name in module.__all__ and not getattr(value, "__module__", "").startswith("tensorrail.verbs"):
                assert value is getattr(module, name)
    assert set(tensorrail.__all__) <= set(dir(tensorrail))
    with pytest.raises(AttributeError, match=r"no attribute 'Plam'; its names are ADMM, FORMATS, .*train"):
        _ = tensorrail.Plam


def test_nothing_is_imported_before_it_is_used():
    heavy = ("numpy", "torch", "onnx", "onnxruntime", "rich", "tensorrail_runtime")
    code = f"import sys, tensorrail; print([name for name in {heavy} if name in sys.modules])"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"


def test_every_error_is_of_one_family():
    errors = importlib.import_module("tensorrail_runtime.errors")
    classes = [value for value in vars(errors).values() if isinstance(value, type) and value.__module__ == errors.__name__]
    assert all(issubclass(one, errors.TensorrailError) for one in classes)
    assert {one.__name__: one.exit_code for one in classes if one.exit_code != 2} == {"TargetError": 1}


def test_messages_of_the_library_name_no_command_line_options():
    """They are read in Python, too, where a setting is a parameter."""
    elsewhere = {"cli.py", "pytest_plugin.py", "machine.py"}  # say which options exist, or call a program
    options = []
    for package in PACKAGES:
        folder = Path(importlib.import_module(package).__file__).parent
        for path in folder.rglob("*.py"):
            if path.name in elsewhere or path.parent.name == "commands":
                continue
            tree = ast.parse(path.read_text(encoding="utf-8"))
            prose = {id(node.value) for node in ast.walk(tree) if isinstance(node, ast.Expr)}
            texts = (node for node in ast.walk(tree) if isinstance(node, ast.Constant) and isinstance(node.value, str))
            options += [
                f"{path}:{text.lineno}"
                for text in texts
                if id(text) not in prose and re.search(r"(?<![\w-])--[a-z]", text.value)
            ]
    assert options == []
