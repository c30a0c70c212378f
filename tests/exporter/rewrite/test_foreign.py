"""Models that nobody here made: the test models of the onnx package, of several exporters and of opsets from 6 on."""

import functools
import os
from pathlib import Path

import numpy as np
import onnx
import onnxruntime as ort
import pytest
from cases import MATRIX_ONLY, relative
from onnx import helper, numpy_helper
from onnx.reference import ReferenceEvaluator
from onnxruntime.capi.onnxruntime_pybind11_state import Fail
from onnxruntime.capi.onnxruntime_pybind11_state import NotImplemented as NotImplemented_

from tensorrail_exporter import FORMATS, LayerPlan, Plan, decompose_graph, factorize, reconstruct
from tensorrail_exporter.formats import format_of
from tensorrail_exporter.graphs.io import import_graph, load_model
from tensorrail_exporter.rewrite.rules import RULES
from tensorrail_exporter.rewrite.sites import NamedLayers

DATA = Path(onnx.__file__).parent / "backend" / "test" / "data"
MODELS = sorted(DATA.glob("light/*.onnx")) + sorted(
    path for folder in ("simple", "pytorch-operator", "pytorch-converted") for path in DATA.glob(f"{folder}/*/model.onnx")
)
LARGE = ("light_vgg19", "light_bvlc_alexnet", "light_densenet121", "light_zfnet512")
SLOW = {"light_resnet50", "light_inception_v2"}
SLOW_AS_MATRICES = {"light_inception_v1", "light_shufflenet"}  # the same graphs are quick to rewrite in `tt`
EVERY_FORMAT = os.environ.get("TENSORRAIL_CASES") == "all"
RULE_OF = {op: rule for rule in RULES for op in rule.OPS}


def label(path):
    return path.stem if path.parent.name == "light" else path.parent.name


@functools.cache
def stored_specs(path):
    """Return what all layers of a file that can be rewritten compute, by their names."""
    return specs_of(load_model(path))


def specs_of(model):
    graph = import_graph(model)
    specs = {}
    for name, node in NamedLayers(graph).rewritable().items():
        specs[name] = RULE_OF[node.op].layer(node) if hasattr(node.inputs[1], "values") else None
    computed = [name for name, spec in specs.items() if spec is None]  # their shapes are known when they have been folded
    if computed:
        named = NamedLayers(import_graph(model))
        for name in computed:
            rule, sites = named.find(name)
            specs[name] = rule.layer(sites[0].node)
    return specs


def plan_for(specs, form_name, largest):
    """Return a plan for all that can be rewritten, at the largest ranks that exist, `largest` at most."""
    layers = []
    for name, spec in specs.items():
        shape, form = spec.shape, format_of(form_name, spec.groups)
        if len(shape) > 2 and form_name in MATRIX_ONLY:
            continue
        modes = form.default_modes(shape)
        ranks = form.clamp(shape, modes, form.uniform(shape, modes, largest))
        layers.append(LayerPlan(name=name, format=form_name, modes=modes, ranks=ranks))
    return Plan(layers=tuple(layers))


def inputs_of(path, model):
    """Return the inputs that come with the model, or random ones for images."""
    stored = {tensor.name for tensor in model.graph.initializer}
    free = [value for value in model.graph.input if value.name not in stored]
    if path.parent.name == "light":
        rng = np.random.default_rng(0)
        shapes = {value.name: [axis.dim_value for axis in value.type.tensor_type.shape.dim] for value in free}
        return {name: rng.standard_normal(shape).astype(np.float32) for name, shape in shapes.items()}
    given = sorted(path.parent.glob("test_data_set_0/input_*.pb"))
    tensors = [numpy_helper.to_array(onnx.load_tensor(str(file))) for file in given]
    return {value.name: tensor for value, tensor in zip(free, tensors, strict=True)}


def outputs_of(models, feeds):
    """Return each model's outputs: by ONNX Runtime, or by onnx's reference where the first one's operators are too old."""
    options = ort.SessionOptions()
    options.log_severity_level = 3  # unused initializers of old exporters
    make = lambda model: ort.InferenceSession(model.SerializeToString(), options, providers=["CPUExecutionProvider"])  # noqa: E731
    try:
        first = make(models[0])
    except (NotImplemented_, Fail):  # an old operator, or a locale of StringNormalizer that this machine lacks
        make = ReferenceEvaluator
        first = make(models[0])
    return [first.run(None, feeds), *(make(model).run(None, feeds) for model in models[1:])]


def drop_softmax(model):
    """Make the logits the output: they are large and all equal, and their softmax shows nothing but rounding."""
    last = model.graph.node[-1]
    if last.op_type == "Softmax":
        model.graph.output[0].name = last.input[0]
        del model.graph.node[-1]


def difference(a, b):
    """Return the relative difference; NaN, infinity and values near 1e38, which some models give, stand in the same places."""
    np.testing.assert_array_equal(np.isfinite(a), np.isfinite(b))
    finite = [np.where(np.isfinite(one), one, 0).astype(np.float64) for one in (a, b)]
    scale = np.abs(finite[1]).max(initial=0) or 1.0
    return relative(*(one / scale for one in finite))


def pairs():
    """Return (format, model): two formats on each, or all of them; the larger models are slow."""
    for path in MODELS:
        large = label(path) in LARGE
        for form_name in FORMATS if EVERY_FORMAT and not large else ["tt", "svd"]:
            slow = label(path) in (SLOW if form_name == "tt" else SLOW | SLOW_AS_MATRICES)
            marks = [pytest.mark.slow] if large or slow else []
            yield pytest.param(form_name, path, id=f"{form_name}-{label(path)}", marks=marks)


@pytest.mark.parametrize(("form_name", "path"), list(pairs()))
def test_full_rank_keeps_the_outputs_and_all_else_is_untouched(form_name, path):
    model = load_model(path)
    light = path.parent.name == "light"  # its weights are constants, of rank 1
    if light:
        drop_softmax(model)
    plan = plan_for(stored_specs(path), form_name, 4 if light else 999)
    cores = decompose_graph(model, plan)
    factored = factorize(model, plan, cores)
    before, after = ([node.op_type for node in graph.graph.node] for graph in (model, factored.model))
    if not plan.layers:
        assert sorted(before) == sorted(after)
    rewritten = [layer.op for layer in factored.layers for _ in range(layer.nodes)]
    for op in set(before) - {"Conv", "ConvTranspose", "Gemm", "MatMul", "Reshape", "Transpose", "Constant", "ConstantOfShape"}:
        added = "Gemm" in rewritten and op == "Add"  # the bias, where the chain of products ends in a Reshape
        assert before.count(op) <= after.count(op) if added else before.count(op) == after.count(op), op
    assert all(op in ("Conv", "ConvTranspose", "Gather", "Gemm", "MatMul", "LSTM", "GRU") for op in rewritten)
    if any(node.op_type == "Gradient" for node in model.graph.node):
        return  # nothing here runs it; its graph has been compared
    models = model, factored.model, reconstruct(model, plan, cores)
    dense, actual, expected = outputs_of(models, inputs_of(path, model))
    for a, b, c in zip(dense, actual, expected, strict=True):
        assert b.dtype == a.dtype
        assert b.shape == a.shape
        if np.issubdtype(a.dtype, np.floating):
            assert difference(b, c) < 1e-4
            if form_name != "cp" or light:  # found by alternating least squares, which stops near the weight
                assert difference(b, a) < 1e-4
        else:
            np.testing.assert_array_equal(a, b)


def test_the_models_are_there_and_most_of_their_layers_are_rewritten():
    counts = {label(path): len(stored_specs(path)) for path in MODELS}
    assert len(counts) >= 140
    assert counts["light_resnet50"] == 54
    assert counts["light_vgg19"] == 19
    assert sum(map(bool, counts.values())) >= 30


@pytest.mark.parametrize(
    ("form_name", "name", "layers"),
    [
        ("tt", "light_squeezenet", 26),
        ("svd", "light_squeezenet", 26),
        pytest.param("tucker", "light_squeezenet", 26, marks=pytest.mark.slow),
        ("tucker", "light_shufflenet", 34),
    ],
)
def test_networks_with_random_weights_at_full_rank(name, layers, form_name):
    """The weights of these models are constants; with random ones, full rank is full. Depthwise convolutions stay dense."""
    model = onnx.load(DATA / "light" / f"{name}.onnx")
    rng = np.random.default_rng(0)
    stored = {tensor.name: numpy_helper.to_array(tensor) for tensor in model.graph.initializer}
    nodes = []
    for node in model.graph.node:
        if node.op_type == "ConstantOfShape":
            shape = stored[node.input[0]]
            values = rng.standard_normal(shape) / np.prod(shape[1:]) ** 0.5 if len(shape) > 1 else np.ones(shape)
            value = numpy_helper.from_array(values.astype(np.float32))
            nodes.insert(0, helper.make_node("Constant", [], node.output, value=value))
        else:
            nodes.append(onnx.NodeProto.FromString(node.SerializeToString()))
    del model.graph.node[:]
    model.graph.node.extend(nodes)
    plan = plan_for(specs_of(model), form_name, 9999)
    assert len(plan.layers) == layers
    factored = factorize(model, plan, decompose_graph(model, plan))
    (value,) = [value for value in model.graph.input if value.name not in stored]
    x = {value.name: rng.standard_normal([axis.dim_value for axis in value.type.tensor_type.shape.dim]).astype(np.float32)}
    (dense,), (actual,) = outputs_of((model, factored.model), x)
    assert difference(actual, dense) < 1e-4
