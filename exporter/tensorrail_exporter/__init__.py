"""Formats, plans and the rewriting of ONNX graphs: dense layers become subgraphs of core contractions."""

from tensorrail_exporter.formats import FORMATS, Format, project
from tensorrail_exporter.formats.contraction import Conv, LayerSpec, MatMul, Reshape, Step
from tensorrail_exporter.plans.cores import load_cores, save_cores
from tensorrail_exporter.plans.costs import ContractionCost, contraction_cost
from tensorrail_exporter.plans.padding import pad_ranks
from tensorrail_exporter.plans.plan import HeadPlan, LayerPlan, Plan
from tensorrail_exporter.rewrite.rewriter import Factored, LayerRewrite, decompose_graph, factorize, reconstruct
from tensorrail_runtime.errors import GraphError, PlanError

__all__ = [
    "FORMATS",
    "ContractionCost",
    "Conv",
    "Factored",
    "Format",
    "GraphError",
    "HeadPlan",
    "LayerPlan",
    "LayerRewrite",
    "LayerSpec",
    "MatMul",
    "Plan",
    "PlanError",
    "Reshape",
    "Step",
    "contraction_cost",
    "decompose_graph",
    "factorize",
    "load_cores",
    "pad_ranks",
    "project",
    "reconstruct",
    "save_cores",
]
