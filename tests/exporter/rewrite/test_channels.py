"""Layers that read fewer channels: nothing computes the others, and outputs are those of the reconstructed weight."""

import json

import numpy as np
import onnx
import onnxruntime as ort
import pytest
from conftest import make_model
from onnx import helper, numpy_helper

from tensorrail_exporter import LayerPlan, Plan, PlanError, decompose_graph, factorize, reconstruct
from tensorrail_exporter.graphs.io import import_graph
from tensorrail_exporter.rewrite.channels import channels_of
from tensorrail_exporter.rewrite.sites import NamedLayers
from tensorrail_exporter.rewrite.survey import survey
from tensorrail_exporter.search.verification import random_cores
from tensorrail_runtime.errors import TensorrailError
from tensorrail_runtime.graphs.cost import cost

C = 12  # channels between the two layers


def f32(rng, *shape):
    return rng.standard_normal(shape).astype(np.float32)


def node(op, inputs, out, name="", **attributes):
    return helper.make_node(op, inputs, [out], name or out, **attributes)


def convolutions(rng, between, weights=(), second=None, **more):
    """A convolution of 3 to 12 channels, nodes from tensor `a` to tensor `t`, and one of 12 to 5."""
    first = [node("Conv", ["x", "first.weight", "first.bias"], "a", "first", pads=[1, 1, 1, 1])]
    last = second or [node("Conv", ["t", "second.weight"], "y", "second", pads=[1, 1, 1, 1])]
    values = {"first.weight": f32(rng, C, 3, 3, 3), "first.bias": f32(rng, C), "second.weight": f32(rng, 5, C, 3, 3)}
    return make_model(
        [*first, *between, *last], values | dict(weights), {"x": ["n", 3, 8, 8]}, {"y": ["n", None, None, None]}, **more
    )


def linears(rng, between, weights=(), first=None):
    begin = first or [node("MatMul", ["x", "first.weight"], "p", "first"), node("Add", ["p", "first.bias"], "a")]
    values = {"first.weight": f32(rng, 7, C), "first.bias": f32(rng, C), "second.weight": f32(rng, C, 5)}
    nodes = [*begin, *between, node("MatMul", ["t", "second.weight"], "y", "second")]
    return make_model(nodes, values | dict(weights), {"x": ["n", 4, 7]}, {"y": ["n", 4, 5]})


def gelu():
    return [
        node("Div", ["a", "root"], "d"),
        node("Erf", ["d"], "e"),
        node("Add", ["e", "one"], "f"),
        node("Mul", ["a", "f"], "g"),
        node("Mul", ["g", "half"], "t"),
    ], {"root": np.float32(2**0.5), "one": np.float32(1), "half": np.float32(0.5)}


def norm(rng):
    return {"s": f32(rng, C), "b": f32(rng, C), "m": f32(rng, C), "v": np.abs(f32(rng, C)) + 0.5}


def gated(rng):
    """SwiGLU: two products of the same input, one of which gates the other."""
    nodes = [
        node("MatMul", ["x", "gate.weight"], "u", "gate"),
        node("MatMul", ["x", "first.weight"], "a", "first"),
        node("Sigmoid", ["u"], "s"),
        node("Mul", ["u", "s"], "w"),
    ]
    return linears(rng, [node("Mul", ["w", "a"], "t")], {"gate.weight": f32(rng, 7, C)}, first=nodes)


def depthwise(rng):
    between = [
        node("Relu", ["a"], "r"),
        node("Conv", ["r", "depth.weight", "depth.bias"], "c", "depth", group=C, pads=[1, 1, 1, 1], strides=[2, 2]),
        node("Clip", ["c", "zero", "six"], "t"),
    ]
    values = {"depth.weight": f32(rng, C, 1, 3, 3), "depth.bias": f32(rng, C), "zero": np.float32(0), "six": np.float32(6)}
    return convolutions(rng, between, values)


def gemms(rng):
    nodes = [
        node("Gemm", ["x", "first.weight", "first.bias"], "a", "first", transB=1),
        node("BatchNormalization", ["a", "s", "b", "m", "v"], "n"),
        node("PRelu", ["n", "slope"], "t"),
        node("Gemm", ["t", "second.weight", "c"], "y", "second"),
    ]
    values = {"first.weight": f32(rng, C, 7), "first.bias": f32(rng, C), "second.weight": f32(rng, C, 5), "c": f32(rng, 5)}
    return make_model(nodes, values | norm(rng) | {"slope": f32(rng, C)}, {"x": ["n", 7]}, {"y": ["n", 5]})


NETWORKS = {
    "relu": lambda rng: convolutions(rng, [node("Relu", ["a"], "t")]),
    "nothing between": lambda rng: convolutions(rng, [node("Identity", ["a"], "t")]),
    "batch norm, pool": lambda rng: convolutions(
        rng,
        [
            node("BatchNormalization", ["a", "s", "b", "m", "v"], "n"),
            node("LeakyRelu", ["n"], "l"),
            node("MaxPool", ["l"], "t", kernel_shape=[2, 2]),
        ],
        norm(rng),
    ),
    "scale of each channel": lambda rng: convolutions(
        rng, [node("Mul", ["a", "scale"], "m"), node("HardSwish", ["m"], "t")], {"scale": f32(rng, C, 1, 1)}
    ),
    "pad": lambda rng: convolutions(
        rng, [node("Pad", ["a", "pads"], "t")], {"pads": np.array([0, 0, 1, 0, 0, 0, 0, 1], np.int64)}
    ),
    "transposed": lambda rng: make_model(
        [
            node("ConvTranspose", ["x", "first.weight", "first.bias"], "a", "first", strides=[2, 2]),
            node("Relu", ["a"], "t"),
            node("Conv", ["t", "second.weight"], "y", "second"),
        ],
        {"first.weight": f32(rng, 3, C, 2, 2), "first.bias": f32(rng, C), "second.weight": f32(rng, 5, C, 1, 1)},
        {"x": ["n", 3, 4, 4]},
        {"y": ["n", 5, 8, 8]},
    ),
    "depthwise": depthwise,
    "gelu": lambda rng: linears(rng, *gelu()),
    "gated": gated,
    "gemm": gemms,
    "Constant nodes": lambda rng: convolutions(
        rng,
        [
            helper.make_node("Constant", [], ["six"], value=numpy_helper.from_array(np.float32(6))),
            helper.make_node("Constant", [], ["scale"], value=numpy_helper.from_array(f32(rng, C, 1, 1))),
            node("Clip", ["a", "", "six"], "c"),
            node("Mul", ["c", "scale"], "t"),
        ],
    ),
    "a weight that is computed": lambda rng: linears(
        rng,
        [node("Tanh", ["a"], "t")],
        {"stored": f32(rng, C, 7)},
        first=[node("Transpose", ["stored"], "turned"), node("MatMul", ["x", "turned"], "a", "first")],
    ),
}


def plan_of(count, layer="second"):
    return LayerPlan(name=layer, format="width", modes=(C,), ranks=(count,))


def run(model, rng_seed=3):
    session = ort.InferenceSession(model.SerializeToString(), providers=["CPUExecutionProvider"])
    (entry,) = session.get_inputs()
    shape = [2 if not isinstance(axis, int) else axis for axis in entry.shape]
    x = np.random.default_rng(rng_seed).standard_normal(shape).astype(np.float32)
    return session.run(None, {entry.name: x})[0]


def constants(model):
    return {tensor.name: tuple(tensor.dims) for tensor in model.graph.initializer}


@pytest.mark.parametrize("name", NETWORKS)
def test_outputs_are_those_of_the_reconstructed_weight_and_no_kernel_is_added(name, rng, tmp_path):
    model = NETWORKS[name](rng)
    plan = Plan(layers=(plan_of(5),))
    cores = decompose_graph(model, plan)
    factored = factorize(model, plan, cores)
    np.testing.assert_allclose(run(factored.model), run(reconstruct(model, plan, cores)), rtol=1e-4, atol=1e-4)
    assert len(factored.model.graph.node) <= len(model.graph.node)  # Constant nodes and computed weights become constants
    (row,) = factored.layers
    assert row.steps.startswith("5 of 12 channels: ")
    for path, graph in (("dense.onnx", model), ("narrow.onnx", factored.model)):
        onnx.save(graph, tmp_path / path)
    assert cost(tmp_path / "narrow.onnx", 1).macs < 0.6 * cost(tmp_path / "dense.onnx", 1).macs  # both layers are narrower
    read = {name for node in factored.model.graph.node for name in node.input if node.op_type != "Transpose"}
    assert not any(C in shape for name, shape in constants(factored.model).items() if name in read)
    before = {name for node in model.graph.node for name in node.output}
    assert not {"a", "t"} & {name for node in factored.model.graph.node for name in node.output}  # they hold something else
    assert {"a", "t"} <= before


@pytest.mark.parametrize("name", NETWORKS)
def test_all_channels_are_exact(name, rng):
    model = NETWORKS[name](rng)
    plan = Plan(layers=(plan_of(C),))
    factored = factorize(model, plan, decompose_graph(model, plan)).model
    np.testing.assert_allclose(run(factored), run(model), rtol=1e-5, atol=1e-5)


def old_broadcast(rng):
    """Before opset 7 an attribute says along which axis a vector lies."""
    nodes = [
        node("Conv", ["x", "first.weight"], "a", "first"),
        node("Mul", ["a", "scale"], "t", broadcast=1, axis=1),
        node("Conv", ["t", "second.weight"], "y", "second"),
    ]
    weights = {"first.weight": f32(rng, C, 3, 1, 1), "scale": f32(rng, C), "second.weight": f32(rng, 5, C, 1, 1)}
    return make_model(nodes, weights, {"x": ["n", 3, 4, 4]}, {"y": ["n", 5, 4, 4]}, opset=6)


REFUSED = {
    "vectors of old opsets": old_broadcast,
    "read elsewhere": lambda rng: convolutions(
        rng,
        [node("Relu", ["a"], "t")],
        {"other.weight": f32(rng, 5, C, 3, 3)},
        second=[
            node("Conv", ["t", "second.weight"], "p", "second", pads=[1, 1, 1, 1]),
            node("Conv", ["t", "other.weight"], "q", "other", pads=[1, 1, 1, 1]),
            node("Add", ["p", "q"], "y"),
        ],
    ),
    "an output": lambda rng: make_model(
        [
            node("Conv", ["x", "first.weight"], "t", "first"),
            node("Conv", ["t", "second.weight"], "y", "second"),
        ],
        {"first.weight": f32(rng, C, 3, 1, 1), "second.weight": f32(rng, 5, C, 1, 1)},
        {"x": ["n", 3, 4, 4]},
        {"y": ["n", 5, 4, 4], "t": ["n", C, 4, 4]},
    ),
    "convolution in groups": lambda rng: convolutions(
        rng, [node("Conv", ["a", "grouped.weight"], "t", "grouped", group=3)], {"grouped.weight": f32(rng, C, C // 3, 1, 1)}
    ),
    "softmax over channels": lambda rng: convolutions(rng, [node("Softmax", ["a"], "t", axis=1)]),
    "squeeze and excitation": lambda rng: convolutions(
        rng,
        [
            node("GlobalAveragePool", ["a"], "g"),
            node("Conv", ["g", "gate.weight"], "h", "gate"),
            node("Mul", ["a", "h"], "t"),
        ],
        {"gate.weight": f32(rng, C, C, 1, 1)},
    ),
    "residual": lambda rng: make_model(
        [
            node("Conv", ["x", "first.weight"], "a", "first"),
            node("Add", ["a", "x"], "t"),
            node("Conv", ["t", "second.weight"], "y", "second"),
        ],
        {"first.weight": f32(rng, C, C, 1, 1), "second.weight": f32(rng, 5, C, 1, 1)},
        {"x": ["n", C, 4, 4]},
        {"y": ["n", 5, 4, 4]},
    ),
    "pad of channels": lambda rng: convolutions(
        rng,
        [node("Pad", ["a", "pads"], "t")],
        {"pads": np.array([0, 1, 0, 0, 0, 0, 0, 0], np.int64), "second.weight": f32(rng, 5, C + 1, 3, 3)},
    ),
}


@pytest.mark.parametrize("name", REFUSED)
def test_where_the_channels_are_needed_the_selection_is_a_product(name, rng):
    model = REFUSED[name](rng)
    rule, sites = NamedLayers(import_graph(model)).find("second")
    assert channels_of(sites[0]) is None
    assert not next(layer for layer in survey(model) if layer.name == "second").makers
    if model.opset_import[0].version < 7:
        return  # ONNX Runtime does not run it
    inputs = rule.layer(sites[0].node).shape[1]
    plan = Plan(layers=(LayerPlan(name="second", format="width", modes=(inputs,), ranks=(5,)),))
    cores = decompose_graph(model, plan)
    factored = factorize(model, plan, cores)
    np.testing.assert_allclose(run(factored.model), run(reconstruct(model, plan, cores)), rtol=1e-4, atol=1e-4)
    assert len(factored.model.graph.node) == len(model.graph.node) + 1


def test_a_matrix_that_selects_no_channels_is_a_product(rng):
    model = NETWORKS["relu"](rng)
    plan = Plan(layers=(plan_of(5),))
    cores = decompose_graph(model, plan)
    cores["second"][1] = cores["second"][1] + np.float32(0.01)
    factored = factorize(model, plan, cores).model
    assert len(factored.graph.node) == len(model.graph.node) + 1
    np.testing.assert_allclose(run(factored), run(reconstruct(model, plan, cores)), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("order", [("first", "second", "third"), ("third", "second", "first")])
@pytest.mark.parametrize("form", ["width", "svd", "tt"])
def test_layers_in_a_row_may_all_be_narrower_or_factored(form, order, rng):
    """The layer between is narrowed on both sides, whatever the order of the plan and its own form."""
    values = {
        "first.weight": f32(rng, C, 3, 3, 3),
        "second.weight": f32(rng, C, C, 3, 3),
        "second.bias": f32(rng, C),
        "third.weight": f32(rng, 5, C, 1, 1),
    }
    nodes = [
        node("Conv", ["x", "first.weight"], "a", "first"),
        node("Relu", ["a"], "b"),
        node("Conv", ["b", "second.weight", "second.bias"], "c", "second"),
        node("Relu", ["c"], "d"),
        node("Conv", ["d", "third.weight"], "y", "third"),
    ]
    model = make_model(nodes, values, {"x": ["n", 3, 8, 8]}, {"y": ["n", 5, 4, 4]})
    between = {
        "width": plan_of(7),
        "svd": LayerPlan(name="second", format="svd", modes=(C * 3, C * 3), ranks=(6,)),
        "tt": LayerPlan(name="second", format="tt", modes=(C, 9, C), ranks=(1, 6, 6, 1)),
    }[form]
    plans = {
        "first": LayerPlan(name="first", format="svd", modes=(C, 27), ranks=(4,)),
        "second": between,
        "third": plan_of(6, "third"),
    }
    plan = Plan(layers=tuple(plans[name] for name in order))
    cores = decompose_graph(model, plan)
    factored = factorize(model, plan, cores)
    np.testing.assert_allclose(run(factored.model), run(reconstruct(model, plan, cores)), rtol=1e-4, atol=1e-4)
    assert [row.layer for row in factored.layers] == list(order)
    assert onnx.shape_inference.infer_shapes(factored.model, strict_mode=True)


def test_the_weight_of_another_node_keeps_its_channels(rng):
    """A bias that is also read elsewhere is copied, not changed."""
    model = NETWORKS["relu"](rng)
    model.graph.node.append(node("Identity", ["first.bias"], "bias_out"))
    model.graph.output.append(helper.make_tensor_value_info("bias_out", onnx.TensorProto.FLOAT, [C]))
    plan = Plan(layers=(plan_of(5),))
    factored = factorize(model, plan, decompose_graph(model, plan)).model
    assert constants(factored)["first.bias"] == (C,)
    assert run(factored).shape == (2, 5, 8, 8)


def test_random_cores_select_channels(rng):
    model = NETWORKS["gated"](rng)
    plan = Plan(layers=(plan_of(5),))
    assert len(factorize(model, plan, random_cores(model, plan)).model.graph.node) == len(model.graph.node)


def timed_as(layer):
    """Return what the time of a layer depends on, and its MACs."""
    kept = {
        key: value for key, value in layer.signature.items() if key not in ("attrs", "side_by_side")
    }  # rewriting writes defaults out
    return json.dumps(kept | {"macs": layer.macs, "output": layer.output})


@pytest.mark.parametrize(("name", "makers"), [("relu", ["first"]), ("gated", ["first", "gate"]), ("gemm", ["first"])])
def test_the_survey_names_the_layers_before_and_what_they_become(name, makers, rng):
    layers = {layer.name: layer for layer in survey(NETWORKS[name](rng), 2)}
    second = layers["second"]
    assert sorted(maker.name for maker in second.makers) == makers
    model = NETWORKS[name](rng)
    plan = Plan(layers=(plan_of(5),))
    narrow = [layer for layer in survey(factorize(model, plan, decompose_graph(model, plan)).model, 2) if layer.output]
    expected = [second.with_inputs(5), *(maker.with_outputs(5) for maker in second.makers)]
    assert sorted(timed_as(layer) for layer in narrow) == sorted(timed_as(layer) for layer in expected)


def test_a_wrong_width_is_refused(rng):
    model = NETWORKS["relu"](rng)
    with pytest.raises(PlanError, match=r"modes \[5\] do not fit a weight of shape \[5, 12, 3, 3\]: expected \[12\]"):
        factorize(model, Plan(layers=(LayerPlan(name="second", format="width", modes=(5,), ranks=(3,)),)), {})
    with pytest.raises(TensorrailError, match=r"expected 1 ranks \(width: the number of channels that are read"):
        factorize(model, Plan(layers=(LayerPlan(name="second", format="width", modes=(C,), ranks=(3, 3)),)), {})
