"""One tensor, several nodes: each node keeps its own part, orientation, stride and dilation of the weight that it shares."""

import numpy as np
import onnx
import onnxruntime as ort
import pytest
from cases import relative
from conftest import make_model
from onnx import TensorProto, helper, numpy_helper

from tensorrail_exporter import FORMATS, GraphError, LayerPlan, Plan, decompose_graph, factorize, reconstruct
from tensorrail_exporter.rewrite.survey import survey


def weight(rng, *shape):
    return (rng.standard_normal(shape) / np.sqrt(np.prod(shape[1:]))).astype(np.float32)


def values(rng, *shape):
    return rng.standard_normal(shape).astype(np.float32)


def split_matrix(rng, *, name="attn.in_proj_weight", nodes=("", "", "")):
    """Split(W) → wq, wk, wv → three products, as exporters write torch's MultiheadAttention."""
    made = [helper.make_node("Split", [name, "sizes"], ["wq", "wk", "wv"], axis=1)]
    made += [helper.make_node("MatMul", ["x", f"w{part}"], [part], node) for part, node in zip("qkv", nodes, strict=True)]
    outs = {part: ["n", 5, 8] for part in "qkv"}
    model = make_model(made, {name: weight(rng, 8, 24), "sizes": np.array([8, 8, 8])}, {"x": ["n", 5, 8]}, outs)
    return model, {"x": values(rng, 2, 5, 8)}, ["wq", "wk", "wv"]


def kernel_of_two_dilations(rng):
    """Conv(x, W) with dilation 1, then with dilation 2 and stride 2."""
    nodes = [
        helper.make_node("Conv", ["x", "c.weight"], ["a"], pads=[1] * 4),
        helper.make_node("Conv", ["a", "c.weight"], ["y"], pads=[2] * 4, dilations=[2, 2], strides=[2, 2]),
    ]
    model = make_model(nodes, {"c.weight": weight(rng, 8, 8, 3, 3)}, {"x": ["n", 8, 12, 12]}, {"y": ["n", 8, 6, 6]})
    return model, {"x": values(rng, 2, 8, 12, 12)}, ["c"]


def tied_autoencoder(rng, hidden=8, *, nodes=("", "")):
    """Gemm(x, W, transB=1), then Gemm(h, W): the second layer's weight is the first one's transposed."""
    made = [
        helper.make_node("Gemm", ["x", "c.weight"], ["h"], nodes[0], transB=1),
        helper.make_node("Gemm", ["h", "c.weight"], ["y"], nodes[1]),
    ]
    model = make_model(made, {"c.weight": weight(rng, hidden, 8)}, {"x": ["n", 8]}, {"y": ["n", 8]})
    return model, {"x": values(rng, 3, 8)}, [name or out for name, out in zip(nodes, "hy", strict=True)]


def both_sides(rng):
    """MatMul(x, W) and MatMul(W, x2)."""
    nodes = [
        helper.make_node("MatMul", ["x", "c.weight"], ["a"]),
        helper.make_node("MatMul", ["c.weight", "x2"], ["b"]),
    ]
    model = make_model(nodes, {"c.weight": weight(rng, 8, 8)}, {"x": ["n", 8], "x2": [8, 3]}, {"a": ["n", 8], "b": [8, 3]})
    return model, {"x": values(rng, 3, 8), "x2": values(rng, 8, 3)}, ["a", "b"]


def two_bodies(rng, flag=1.0):
    """Both branches of an If hold a `c.weight` of their own."""
    branches = {}
    for name in ("else_branch", "then_branch"):  # as `make_node` orders them
        own = numpy_helper.from_array(weight(rng, 8, 8), "c.weight")
        node = helper.make_node("Gemm", ["x", "c.weight"], [name], transB=1)
        branches[name] = helper.make_graph(
            [node], name, [], [helper.make_tensor_value_info(name, TensorProto.FLOAT, ["n", 8])], [own]
        )
    nodes = [
        helper.make_node("Cast", ["flag"], ["condition"], to=TensorProto.BOOL),
        helper.make_node("If", ["condition"], ["y"], **branches),
    ]
    model = make_model(nodes, {}, {"x": ["n", 8], "flag": [1]}, {"y": ["n", 8]})
    return model, {"x": values(rng, 3, 8), "flag": np.array([flag], np.float32)}, ["else_branch", "then_branch"]


def two_ranks(rng):
    """MatMul(x, W) and MatMul(y, W), the rows of y behind one axis more."""
    nodes = [helper.make_node("MatMul", ["x", "c.weight"], ["a"]), helper.make_node("MatMul", ["y", "c.weight"], ["b"])]
    inputs, outputs = {"x": ["n", 8], "y": ["n", 5, 8]}, {"a": ["n", 8], "b": ["n", 5, 8]}
    model = make_model(nodes, {"c.weight": weight(rng, 8, 8)}, inputs, outputs)
    return model, {"x": values(rng, 3, 8), "y": values(rng, 2, 5, 8)}, ["c"]


CASES = {
    "a matrix split in three": split_matrix,
    "a kernel of two dilations": kernel_of_two_dilations,
    "a tied autoencoder": tied_autoencoder,
    "a tied autoencoder of named layers": lambda rng: tied_autoencoder(rng, nodes=("encoder", "decoder")),
    "a tied autoencoder, not square": lambda rng: tied_autoencoder(rng, 6),
    "a matrix on both sides": both_sides,
    "the then of two bodies": two_bodies,
    "the else of two bodies": lambda rng: two_bodies(rng, 0.0),
    "inputs of two ranks": two_ranks,
}


def full_rank(model, form_name):
    """Return a plan of all that the survey finds, at the largest ranks that exist, every core run by itself."""
    form, layers = FORMATS[form_name], []
    for layer in survey(model):
        modes = form.default_modes(layer.spec.shape)
        ranks = form.clamp(layer.spec.shape, modes, form.uniform(layer.spec.shape, modes, 999))
        merge = "none" if "none" in form.merges(layer.spec.op) else "auto"
        layers.append(LayerPlan(name=layer.name, format=form_name, modes=modes, ranks=ranks, merge=merge))
    return Plan(layers=tuple(layers))


def run(model, feeds):
    return ort.InferenceSession(model.SerializeToString(), providers=["CPUExecutionProvider"]).run(None, feeds)


@pytest.mark.parametrize("form_name", ["svd", "tt", "tucker"])
@pytest.mark.parametrize("case", CASES)
def test_full_rank_is_the_dense_network(case, form_name, rng):
    model, feeds, names = CASES[case](rng)
    plan = full_rank(model, form_name)
    assert [layer.name for layer in plan.layers] == names
    cores = decompose_graph(model, plan)
    factored = factorize(model, plan, cores)
    assert all(layer.weight_error < 1e-5 for layer in factored.layers)
    expected = run(model, feeds)
    for made in (factored.model, reconstruct(model, plan, cores)):
        for a, b in zip(run(made, feeds), expected, strict=True):
            assert relative(a, b) < 1e-5
    stored = {tensor.name for tensor in factored.model.graph.initializer}
    assert not stored & {"attn.in_proj_weight", "c.weight"}


@pytest.mark.parametrize(
    ("case", "name", "nodes", "own"),
    [
        ("a matrix split in three", "attn.in_proj_weight", 3, "wq, wk, wv"),
        ("a tied autoencoder", "c", 2, "h, y"),
        ("a tied autoencoder of named layers", "c.weight", 2, "encoder, decoder"),
        ("a matrix on both sides", "c", 2, "a, b"),
        ("the then of two bodies", "c", 2, "else_branch, then_branch"),
    ],
)
def test_a_name_of_several_weights_is_refused_with_the_names_to_take(case, name, nodes, own, rng):
    plan = Plan(layers=(LayerPlan(name=name, format="svd", modes=(8, 8), ranks=(8,)),))
    reason = (
        f"layer {name}: expected nodes that share one weight, got {nodes} nodes with {nodes} different weights; "
        f"plan each weight by its own name: {own}$"
    )
    with pytest.raises(GraphError, match=reason):
        decompose_graph(CASES[case](rng)[0], plan)


def test_one_part_of_a_split_matrix_can_be_planned_alone(rng):
    model, feeds, _ = split_matrix(rng)
    plan = Plan(layers=(LayerPlan(name="wk", format="svd", modes=(8, 8), ranks=(8,)),))
    factored = factorize(model, plan, decompose_graph(model, plan))
    assert [layer.nodes for layer in factored.layers] == [1]
    for a, b in zip(run(factored.model, feeds), run(model, feeds), strict=True):
        assert relative(a, b) < 1e-5


def test_a_matrix_that_equals_its_transpose_is_one_layer(rng):
    model, feeds, _ = tied_autoencoder(rng)
    square = numpy_helper.to_array(model.graph.initializer[0])
    model.graph.initializer[0].CopyFrom(numpy_helper.from_array(square + square.T, "c.weight"))
    plan = full_rank(model, "svd")
    assert [(layer.name, layer.nodes) for layer in survey(model)] == [("c", 2)]
    factored = factorize(model, plan, decompose_graph(model, plan))
    assert len(factored.model.graph.initializer) == 2  # both nodes have the same cores
    assert relative(run(factored.model, feeds)[0], run(model, feeds)[0]) < 1e-5


def test_a_layer_planned_by_two_of_its_names_is_refused(small_model):
    parts = [LayerPlan(name=name, format="svd", modes=(10, 32), ranks=(4,)) for name in ("fc", "fc.weight")]
    with pytest.raises(GraphError, match=r"layer fc\.weight: is also planned as fc; plan it under one of these names"):
        factorize(small_model, Plan(layers=tuple(parts)), decompose_graph(small_model, Plan(layers=tuple(parts))))


def test_siblings_without_any_name_of_their_own_are_left_out_and_refused(rng):
    model, _, _ = two_bodies(rng)
    for attribute in model.graph.node[1].attribute:
        attribute.g.node[0].output[0] = attribute.g.output[0].name = "same"
    onnx.checker.check_model(model)
    assert survey(model) == ()
    with pytest.raises(GraphError, match=r"2 different weights; .*: none has one: give the nodes names"):
        decompose_graph(model, Plan(layers=(LayerPlan(name="c", format="svd", modes=(8, 8), ranks=(8,)),)))
