"""Training toward low tensor rank: ADMM, layers made of cores, recipes and the run from data to report."""

from tensorrail_trainer.admm import ADMM, Residual
from tensorrail_trainer.layers import FactoredLayer, cores_of, to_dense
from tensorrail_trainer.planning import plan_layers
from tensorrail_trainer.recipe import Recipe
from tensorrail_trainer.torch_export import to_onnx

__all__ = ["ADMM", "FactoredLayer", "Recipe", "Residual", "cores_of", "plan_layers", "to_dense", "to_onnx"]
