"""Tensorrail: low-rank networks from training to ONNX Runtime.

    import tensorrail as tr

    report = tr.compress("dense.onnx", "model.onnx", {"latency": 2.0}, calibration="inputs.npz")
    print(report)

    admm = tr.ADMM(model, tr.Plan(layers=tr.plan_layers(model, "2", ranks=16)), rho=0.1)

There is one function for each verb of the command line, with the same defaults and the same record; `print` shows a record as
the command does. Each name is loaded when it is first used: `import tensorrail` imports no other library, and a base install
(without torch) has every name that it can serve.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from tensorrail.extras import MissingExtraError
    from tensorrail.options import Fit, Options
    from tensorrail.verbs import regress
    from tensorrail.verbs.accuracy import accuracy
    from tensorrail.verbs.bench import bench
    from tensorrail.verbs.check import Layers, check
    from tensorrail.verbs.compress import compress
    from tensorrail.verbs.export import export
    from tensorrail.verbs.export_trained import export_trained
    from tensorrail.verbs.inspect import inspect
    from tensorrail.verbs.package import package
    from tensorrail.verbs.plan import plan
    from tensorrail.verbs.quantize import quantize
    from tensorrail.verbs.run import run, train
    from tensorrail.verbs.serve import serve
    from tensorrail_exporter.calibrate.inputs import Calibration, load_calibration
    from tensorrail_exporter.formats import FORMATS
    from tensorrail_exporter.graphs.io import load_model, save_model
    from tensorrail_exporter.plans.cores import load_cores, save_cores
    from tensorrail_exporter.plans.plan import HeadPlan, LayerPlan, Plan
    from tensorrail_exporter.precision.reduce import Quantization
    from tensorrail_exporter.rewrite.rewriter import decompose_graph, factorize, reconstruct
    from tensorrail_exporter.search.fastest_form import Form
    from tensorrail_exporter.search.guard import Guard
    from tensorrail_exporter.search.targets import Search
    from tensorrail_runtime.errors import (
        CacheError,
        CheckpointError,
        DataError,
        GraphError,
        ModelError,
        PlanError,
        RecipeError,
        TargetError,
        TensorrailError,
        TrainingError,
        UsageError,
    )
    from tensorrail_runtime.feeds.rules import InputRules
    from tensorrail_runtime.gate.regress import Limits
    from tensorrail_runtime.measure.accuracy import Labelled
    from tensorrail_runtime.measure.parity import Tolerances
    from tensorrail_runtime.measure.timing import Timing
    from tensorrail_runtime.serve.http.options import ServeOptions
    from tensorrail_runtime.sessions.session import Session
    from tensorrail_runtime.triton.package import Repository, Serving
    from tensorrail_trainer.admm.admm import ADMM
    from tensorrail_trainer.layers.dense import dense_layers
    from tensorrail_trainer.layers.swap import cores_of, to_dense
    from tensorrail_trainer.planning.ranks import plan_layers, plan_to_size
    from tensorrail_trainer.recipes.recipe import Recipe
    from tensorrail_trainer.run.export import to_onnx

__all__ = [
    "ADMM",
    "FORMATS",
    "CacheError",
    "Calibration",
    "CheckpointError",
    "DataError",
    "Fit",
    "Form",
    "GraphError",
    "Guard",
    "HeadPlan",
    "InputRules",
    "Labelled",
    "LayerPlan",
    "Layers",
    "Limits",
    "MissingExtraError",
    "ModelError",
    "Options",
    "Plan",
    "PlanError",
    "Quantization",
    "Recipe",
    "RecipeError",
    "Repository",
    "Search",
    "ServeOptions",
    "Serving",
    "Session",
    "TargetError",
    "TensorrailError",
    "Timing",
    "Tolerances",
    "TrainingError",
    "UsageError",
    "accuracy",
    "bench",
    "check",
    "compress",
    "cores_of",
    "decompose_graph",
    "dense_layers",
    "export",
    "export_trained",
    "factorize",
    "inspect",
    "load_calibration",
    "load_cores",
    "load_model",
    "package",
    "plan",
    "plan_layers",
    "plan_to_size",
    "quantize",
    "reconstruct",
    "regress",
    "run",
    "save_cores",
    "save_model",
    "serve",
    "to_dense",
    "to_onnx",
    "train",
]

_MODULES = {
    "tensorrail.extras": ("MissingExtraError",),
    "tensorrail.options": (
        "Fit",
        "Options",
    ),
    "tensorrail.verbs.accuracy": ("accuracy",),
    "tensorrail.verbs.bench": ("bench",),
    "tensorrail.verbs.check": (
        "Layers",
        "check",
    ),
    "tensorrail.verbs.compress": ("compress",),
    "tensorrail.verbs.export": ("export",),
    "tensorrail.verbs.export_trained": ("export_trained",),
    "tensorrail.verbs.inspect": ("inspect",),
    "tensorrail.verbs.package": ("package",),
    "tensorrail.verbs.plan": ("plan",),
    "tensorrail.verbs.quantize": ("quantize",),
    "tensorrail.verbs.run": (
        "run",
        "train",
    ),
    "tensorrail.verbs.serve": ("serve",),
    "tensorrail_exporter.calibrate.inputs": (
        "Calibration",
        "load_calibration",
    ),
    "tensorrail_exporter.search.guard": ("Guard",),
    "tensorrail_exporter.formats": ("FORMATS",),
    "tensorrail_exporter.graphs.io": (
        "load_model",
        "save_model",
    ),
    "tensorrail_exporter.plans.cores": (
        "load_cores",
        "save_cores",
    ),
    "tensorrail_exporter.plans.plan": (
        "HeadPlan",
        "LayerPlan",
        "Plan",
    ),
    "tensorrail_exporter.precision.reduce": ("Quantization",),
    "tensorrail_exporter.rewrite.rewriter": (
        "decompose_graph",
        "factorize",
        "reconstruct",
    ),
    "tensorrail_exporter.search.fastest_form": ("Form",),
    "tensorrail_exporter.search.targets": ("Search",),
    "tensorrail_runtime.errors": (
        "CacheError",
        "CheckpointError",
        "DataError",
        "GraphError",
        "ModelError",
        "PlanError",
        "RecipeError",
        "TargetError",
        "TensorrailError",
        "TrainingError",
        "UsageError",
    ),
    "tensorrail_runtime.gate.regress": ("Limits",),
    "tensorrail_runtime.measure.accuracy": ("Labelled",),
    "tensorrail_runtime.measure.parity": ("Tolerances",),
    "tensorrail_runtime.measure.timing": ("Timing",),
    "tensorrail_runtime.serve.http.options": ("ServeOptions",),
    "tensorrail_runtime.feeds.rules": ("InputRules",),
    "tensorrail_runtime.sessions.session": ("Session",),
    "tensorrail_runtime.triton.package": (
        "Repository",
        "Serving",
    ),
    "tensorrail_trainer.admm.admm": ("ADMM",),
    "tensorrail_trainer.layers.dense": ("dense_layers",),
    "tensorrail_trainer.layers.swap": (
        "cores_of",
        "to_dense",
    ),
    "tensorrail_trainer.planning.ranks": (
        "plan_layers",
        "plan_to_size",
    ),
    "tensorrail_trainer.recipes.recipe": ("Recipe",),
    "tensorrail_trainer.run.export": ("to_onnx",),
}
_MODULE_OF = {name: module for module, names in _MODULES.items() for name in names} | {"regress": "tensorrail.verbs.regress"}


def __getattr__(name: str) -> object:
    """Load a public name from its module when it is first used."""
    if name not in _MODULE_OF:
        raise AttributeError(f"module 'tensorrail' has no attribute {name!r}; its names are {', '.join(__all__)}")
    from tensorrail.extras import MissingExtraError, missing_extra

    try:
        module = import_module(_MODULE_OF[name])
        value: object = module if name == "regress" else getattr(module, name)
    except ModuleNotFoundError as error:
        if missing_extra(error) is None:
            raise
        raise MissingExtraError(f"tensorrail.{name}", error) from None
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    """Return the public names, for completion."""
    return list(__all__)
