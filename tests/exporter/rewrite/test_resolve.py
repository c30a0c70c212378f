"""A plan that meets a model: what is found, what is refused, and a copy that may be changed."""

import numpy as np
import onnxruntime as ort
import pytest
from conftest import make_model
from onnx import TensorProto, helper, numpy_helper

from tensorrail_exporter import FORMATS, GraphError, LayerPlan, Plan, PlanError, decompose_graph
from tensorrail_exporter.graphs.io import export_graph
from tensorrail_exporter.rewrite.resolve import resolve
from tensorrail_exporter.rewrite.rewriter import rewrite, with_cores
from tensorrail_exporter.rewrite.sites import walk

SAME = 1e-5  # relative, between two graphs that compute the same


def weight(rng, *shape):
    return (rng.standard_normal(shape) / np.sqrt(np.prod(shape[1:]))).astype(np.float32)


def plan_of(*names, shape=(8, 8), rank=8):
    modes = FORMATS["svd"].default_modes(shape)
    return Plan(layers=tuple(LayerPlan(name=name, format="svd", modes=modes, ranks=(rank,)) for name in names))


def shared(rng):
    """Gemm(x, W), Relu, Gemm(h, W), then a product whose weight a Transpose makes."""
    nodes = [
        helper.make_node("Gemm", ["x", "w"], ["h"], "first", transB=1),
        helper.make_node("Relu", ["h"], ["r"], "relu"),
        helper.make_node("Gemm", ["r", "w"], ["g"], "second", transB=1),
        helper.make_node("Transpose", ["v"], ["vt"], "turn", perm=[1, 0]),
        helper.make_node("MatMul", ["g", "vt"], ["y"], "last"),
    ]
    return make_model(nodes, {"w": weight(rng, 8, 8), "v": weight(rng, 8, 8)}, {"x": ["n", 8]}, {"y": ["n", 8]})


def in_a_body(rng):
    """Both branches of an If call their tensors alike, and read x and a weight from around them."""
    branches = {}
    for name in ("else_branch", "then_branch"):
        own = numpy_helper.from_array(weight(rng, 8), "bias")
        inner = [
            helper.make_node("MatMul", ["x", "outer"], ["m"], f"{name}/product"),
            helper.make_node("Add", ["m", "bias"], ["out"], f"{name}/add"),
        ]
        result = helper.make_tensor_value_info("out", TensorProto.FLOAT, ["n", 8])
        branches[name] = helper.make_graph(inner, name, [], [result], [own])
    nodes = [
        helper.make_node("Cast", ["flag"], ["condition"], to=TensorProto.BOOL),
        helper.make_node("If", ["condition"], ["y"], "choice", **branches),
    ]
    return make_model(nodes, {"outer": weight(rng, 8, 8)}, {"x": ["n", 8], "flag": [1]}, {"y": ["n", 8]})


def run(model, **feeds):
    session = ort.InferenceSession(model.SerializeToString(), providers=["CPUExecutionProvider"])
    return session.run(None, feeds)[0]


def test_layers_come_in_the_plans_order_and_in_the_graphs(rng):
    model = shared(rng)
    resolved = resolve(model, plan_of("v", "w"))
    assert list(resolved.layers) == ["v", "w"]
    assert [layer.plan.name for layer in resolved.in_graph_order] == ["w", "v"]
    assert [len(layer.sites) for layer in resolved.layers.values()] == [1, 2]
    stored = {tensor.name: numpy_helper.to_array(tensor) for tensor in model.graph.initializer}
    np.testing.assert_array_equal(resolved.layers["w"].weight, stored["w"])
    np.testing.assert_array_equal(resolved.layers["v"].weight, stored["v"])  # MatMul takes it transposed, twice


@pytest.mark.parametrize(
    ("plan", "error", "message"),
    [
        (plan_of("nowhere"), GraphError, "layer nowhere: not in the graph; its layers with weights are "),
        (plan_of("relu"), GraphError, "layer relu: no rule rewrites Relu"),
        (plan_of("w", shape=(8, 9)), PlanError, "layer w: "),
        (plan_of("w", "first"), GraphError, "layer first: is also planned as w;"),
    ],
)
def test_what_does_not_fit_is_refused(plan, error, message, rng):
    with pytest.raises(error, match=message):
        resolve(shared(rng), plan)


@pytest.mark.parametrize("make", [shared, in_a_body])
def test_a_copy_leaves_the_original_as_it_was(make, rng):
    model = make(rng)
    before = model.SerializeToString()
    resolved = resolve(model, plan_of(*(["w", "v"] if make is shared else ["outer"])))
    nodes = [(node.op, [t.name for t in node.inputs], [t.name for t in node.outputs]) for _, node in walk(resolved.graph)]
    originals = {id(node) for _, node in walk(resolved.graph)}
    copy = resolved.copy()
    assert not originals & {id(node) for _, node in walk(copy.graph)}
    for layer in copy.layers.values():
        for site in layer.sites:
            assert any(site.node is node for node in site.graph.nodes)
            layer.rule.replace_weight(site.node, 0 * layer.weight, "zeros")
    changed = export_graph(copy.graph, model)
    feeds = {"x": weight(rng, 3, 8)} | ({} if make is shared else {"flag": np.ones(1, np.float32)})
    assert not np.allclose(run(changed, **feeds), run(model, **feeds), atol=1e-3)
    kept = [(node.op, [t.name for t in node.inputs], [t.name for t in node.outputs]) for _, node in walk(resolved.graph)]
    assert kept == nodes
    assert model.SerializeToString() == before
    np.testing.assert_array_equal(run(export_graph(resolved.copy(folded=False).graph, model), **feeds), run(model, **feeds))


def test_values_are_shared_among_copies(rng):
    resolved = resolve(shared(rng), plan_of("w"))
    assert resolved.layers["w"].constants[0].values is resolved.copy().layers["w"].constants[0].values


def test_computed_weights_are_folded_where_it_is_asked_for(rng):
    resolved = resolve(shared(rng), plan_of("v"))
    ops = [
        [node.op_type for node in export_graph(resolved.copy(folded=f).graph, resolved.model).graph.node] for f in (True, False)
    ]
    assert ["Transpose" in own for own in ops] == [False, True]


@pytest.mark.parametrize("flag", [0.0, 1.0])
@pytest.mark.parametrize("make", [shared, in_a_body])
def test_one_resolved_plan_is_enough_for_all_that_is_made_of_it(make, flag, rng):
    model = make(rng)
    plan = plan_of(*(["w", "v"] if make is shared else ["outer"]))
    resolved = resolve(model, plan)
    cores = decompose_graph(model, plan)
    feeds = {"x": weight(rng, 3, 8)} | ({} if make is shared else {"flag": np.full(1, flag, np.float32)})
    expected = run(model, **feeds)
    for _ in range(2):
        for made in (rewrite(resolved, cores).model, with_cores(resolved, cores)):
            np.testing.assert_allclose(run(made, **feeds), expected, atol=SAME)
