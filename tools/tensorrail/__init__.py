"""Tensorrail: low-rank networks from training to ONNX Runtime.

    import tensorrail as tr

    admm = tr.ADMM(model, tr.Plan(layers=tr.plan_layers(model, "2", ranks=16)), rho=0.1)

Each name is loaded when it is first used: `import tensorrail` imports no other library, and a base install (without torch)
has every name that it can serve.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from tensorrail_exporter.formats import FORMATS
    from tensorrail_exporter.graphs.io import load_model, save_model
    from tensorrail_exporter.plans.cores import load_cores, save_cores
    from tensorrail_exporter.plans.plan import LayerPlan, Plan
    from tensorrail_exporter.rewrite.rewriter import decompose_graph, factorize, reconstruct
    from tensorrail_runtime.errors import (
        CheckpointError,
        DataError,
        GraphError,
        ModelError,
        PlanError,
        RecipeError,
        TargetError,
        TensorrailError,
        TrainingError,
    )
    from tensorrail_runtime.sessions.session import Session
    from tensorrail_trainer.admm.admm import ADMM
    from tensorrail_trainer.layers.dense import dense_layers
    from tensorrail_trainer.layers.swap import cores_of, to_dense
    from tensorrail_trainer.planning.ranks import plan_layers, plan_to_size
    from tensorrail_trainer.run.export import to_onnx

__all__ = [
    "ADMM",
    "FORMATS",
    "CheckpointError",
    "DataError",
    "GraphError",
    "LayerPlan",
    "ModelError",
    "Plan",
    "PlanError",
    "RecipeError",
    "Session",
    "TargetError",
    "TensorrailError",
    "TrainingError",
    "cores_of",
    "decompose_graph",
    "dense_layers",
    "factorize",
    "load_cores",
    "load_model",
    "plan_layers",
    "plan_to_size",
    "reconstruct",
    "save_cores",
    "save_model",
    "to_dense",
    "to_onnx",
]

_MODULES = {
    "tensorrail_exporter.formats": ("FORMATS",),
    "tensorrail_exporter.graphs.io": ("load_model", "save_model"),
    "tensorrail_exporter.plans.cores": ("load_cores", "save_cores"),
    "tensorrail_exporter.plans.plan": ("LayerPlan", "Plan"),
    "tensorrail_exporter.rewrite.rewriter": ("decompose_graph", "factorize", "reconstruct"),
    "tensorrail_runtime.errors": tuple(name for name in __all__ if name.endswith("Error")),
    "tensorrail_runtime.sessions.session": ("Session",),
    "tensorrail_trainer.admm.admm": ("ADMM",),
    "tensorrail_trainer.layers.dense": ("dense_layers",),
    "tensorrail_trainer.layers.swap": ("cores_of", "to_dense"),
    "tensorrail_trainer.planning.ranks": ("plan_layers", "plan_to_size"),
    "tensorrail_trainer.run.export": ("to_onnx",),
}
_MODULE_OF = {name: module for module, names in _MODULES.items() for name in names}


def __getattr__(name: str) -> object:
    """Load a public name from its module when it is first used."""
    if name not in _MODULE_OF:
        raise AttributeError(f"module 'tensorrail' has no attribute {name!r}; its names are {', '.join(__all__)}")
    from tensorrail.extras import MissingExtraError, missing_extra

    try:
        value: object = getattr(import_module(_MODULE_OF[name]), name)
    except ModuleNotFoundError as error:
        if missing_extra(error) is None:
            raise
        raise MissingExtraError(f"tensorrail.{name}", error) from None
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    """Return the public names, for completion."""
    return list(__all__)
