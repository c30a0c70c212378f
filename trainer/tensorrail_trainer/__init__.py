"""Training toward low tensor rank: ADMM, layers made of tensor cores, recipes, and runs from data to report."""

from tensorrail_trainer.admm.admm import ADMM, Residual
from tensorrail_trainer.layers.factored import FactoredLayer
from tensorrail_trainer.layers.swap import cores_of, to_dense
from tensorrail_trainer.planning.ranks import plan_layers
from tensorrail_trainer.recipes.recipe import Recipe
from tensorrail_trainer.run.export import to_onnx

__all__ = ["ADMM", "FactoredLayer", "Recipe", "Residual", "cores_of", "plan_layers", "to_dense", "to_onnx"]
