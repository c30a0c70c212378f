"""Einsums of an activation and a stored tensor are read as matrix products."""

from __future__ import annotations

import numpy as np
import onnx
import pytest
from cases import cases
from hypothesis import given
from hypothesis import strategies as st
from onnx import TensorProto, helper, numpy_helper

import tensorrail as tr
from tensorrail_exporter.graphs.einsum import products_of_einsums
from tensorrail_exporter.rewrite.survey import survey
from tensorrail_runtime.sessions.session import open_session, run

SIZES = dict(zip("abcdefgh", (2, 3, 4, 5, 2, 3, 4, 6), strict=True))


def einsum_model(equation, *weights, nodes=(), shape=None, output="y", axes=None, place=1):
    """A model of one Einsum of the input x and the weight w, and further nodes; the output has a number of axes."""
    left, arrow, right = equation.replace(" ", "").partition("->")
    terms = left.split(",")
    names = ["x", "w"] if place == 1 else ["w", "x"]
    first = helper.make_node("Einsum", names, ["y"], "product", equation=equation)
    shape = shape or [SIZES[label] for label in terms[1 - place]]
    axes = (len(right) if arrow else 3) if axes is None else axes
    graph = helper.make_graph(
        [first, *nodes],
        "g",
        [helper.make_tensor_value_info("x", TensorProto.FLOAT, shape)],
        [helper.make_tensor_value_info(output, TensorProto.FLOAT, [None] * axes)],
        list(weights),
    )
    return helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=9)


def weight_of(rng, labels, name="w"):
    return numpy_helper.from_array(rng.standard_normal([SIZES[label] for label in labels]).astype(np.float32), name)


def outputs(tmp_path, model, feed):
    path = tmp_path / "model.onnx"
    onnx.save(model, path)
    return run(open_session(path), feed)


def fed(rng, labels):
    return {"x": rng.standard_normal([SIZES[label] for label in labels]).astype(np.float32)}


EQUATIONS = {
    "abc,cde->abde": ["MatMul", "Reshape"],  # query, key and value of Keras
    "abcd,cde->abe": ["Reshape", "MatMul"],  # its output
    "abc,cd->abd": ["MatMul"],
    "abc,cd": ["MatMul"],  # the labels that occur once are those of the output
    "abc,dc->abd": ["MatMul"],
    "abc,bd->acd": ["Transpose", "MatMul"],
    "abc,cd->adb": ["MatMul", "Transpose"],
    "abcd,dbe->eac": ["Transpose", "Reshape", "MatMul", "Transpose"],
    "abc,c->ab": ["MatMul", "Reshape"],
    "c,cd->d": ["MatMul"],
    "ab,ab->": ["Reshape", "MatMul", "Reshape"],
    "c,c->": ["MatMul", "Reshape"],
}


@pytest.mark.parametrize("equation", EQUATIONS)
@pytest.mark.parametrize("place", [0, 1])
def test_an_einsum_is_a_product(equation, place, rng, tmp_path):
    left, arrow, right = equation.partition("->")
    data, weight = left.split(",")
    if place == 0:
        equation = f"{weight},{data}{arrow}{right}"
    model = einsum_model(equation, weight_of(rng, weight), place=place)
    before = model.SerializeToString()
    changed = products_of_einsums(model)
    assert model.SerializeToString() == before
    onnx.checker.check_model(changed, full_check=True)
    if place == 1:
        assert [node.op_type for node in changed.graph.node] == EQUATIONS[equation]
    product = next(node for node in changed.graph.node if node.op_type == "MatMul")
    assert (product.name, product.input[1]) == ("product", "w")
    feed = fed(rng, data)
    np.testing.assert_allclose(outputs(tmp_path, changed, feed)["y"], outputs(tmp_path, model, feed)["y"], rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(
    ("equation", "data", "weight"),
    [
        ("abc,abd->abcd", "abc", "abd"),  # axes of both that are not summed
        ("aab,bc->ac", "aab", "bc"),  # a trace
        ("abc,cd->ad", "abc", "cd"),  # a sum over an axis of the data alone
        ("ab,bcd->ac", "ab", "bcd"),  # a sum over an axis of the weight alone
        ("ab,cd->abcd", "ab", "cd"),  # nothing is summed
        ("...c,cde->...de", "abc", "cde"),  # the number of axes is not in the equation
        ("aa,aa->", "aa", "aa"),  # traces of both
    ],
)
def test_others_stay(equation, data, weight, rng):
    model = einsum_model(equation, weight_of(rng, weight), shape=[SIZES[label] for label in data])
    assert products_of_einsums(model) is model


def test_any_number_of_axes(rng, tmp_path):
    model = einsum_model("...c, cd -> ...d", weight_of(rng, "cd"), shape=[2, 3, 5, 4], axes=4)
    changed = products_of_einsums(model)
    assert [node.op_type for node in changed.graph.node] == ["MatMul"]
    feed = {"x": rng.standard_normal((2, 3, 5, 4)).astype(np.float32)}
    np.testing.assert_allclose(outputs(tmp_path, changed, feed)["y"], outputs(tmp_path, model, feed)["y"], rtol=1e-4, atol=1e-5)


@cases(20, 400)
@given(st.data())
def test_random_equations(tmp_path_factory, data):
    labels = data.draw(st.permutations("abcdefgh"))
    kept, summed, made = (data.draw(st.integers(low, 3), label=name) for low, name in ((0, "kept"), (1, "summed"), (0, "made")))
    groups = labels[:kept], labels[kept : kept + summed], labels[kept + summed : kept + summed + made]
    terms = [data.draw(st.permutations([*groups[one], *groups[other]])) for one, other in ((0, 1), (1, 2), (0, 2))]
    activation, weight, out = ("".join(term) for term in terms)
    rng = np.random.default_rng(data.draw(st.integers(0, 99)))
    model = einsum_model(f"{activation},{weight}->{out}", weight_of(rng, weight))
    changed = products_of_einsums(model)
    assert "Einsum" not in {node.op_type for node in changed.graph.node}
    feed, folder = fed(rng, activation), tmp_path_factory.mktemp("einsum")
    values = numpy_helper.to_array(model.graph.initializer[0])
    expected = np.einsum(f"{activation},{weight}->{out}", feed["x"], values)
    np.testing.assert_allclose(outputs(folder, changed, feed)["y"], expected, rtol=1e-4, atol=1e-4)


def test_a_weight_that_two_products_share(rng, tmp_path):
    relu = helper.make_node("Relu", ["y"], ["z"])
    again = helper.make_node("Einsum", ["z", "w"], ["out"], "again", equation="xyd,de->xye")
    weight = numpy_helper.from_array(rng.standard_normal((4, 4)).astype(np.float32), "w")
    model = einsum_model("abc,cd->abd", weight, nodes=[relu, again], output="out")
    changed = products_of_einsums(model)
    assert [node.op_type for node in changed.graph.node] == ["MatMul", "Relu", "MatMul"]
    assert [tensor.name for tensor in changed.graph.initializer] == ["w"]
    feed = fed(rng, "abc")
    expected = outputs(tmp_path, model, feed)["out"]
    np.testing.assert_allclose(outputs(tmp_path, changed, feed)["out"], expected, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("equation", ["abd,cd->abc", "abd,ce->abde"])
def test_a_weight_that_is_read_in_another_way_is_not_stored_twice(equation, rng):
    other = helper.make_node("Einsum", ["y", "w"], ["z"], "other", equation=equation)
    model = einsum_model("abc,cd->abd", weight_of(rng, "cd"), nodes=[other], output="z", axes=len(equation.partition("->")[2]))
    assert products_of_einsums(model) is model


def test_in_branches(rng, tmp_path):
    """A Constant is a stored tensor as well when a file is read."""
    branches = {}
    for key in ("then_branch", "else_branch"):
        node = helper.make_node("Einsum", ["x", key], [f"{key}/y"], key, equation="abc,cde->abde")
        info = helper.make_tensor_value_info(f"{key}/y", TensorProto.FLOAT, [None] * 4)
        branches[key] = helper.make_graph([node], key, [], [info], [weight_of(rng, "cde", key)])
    constant = helper.make_node("Constant", [], ["u"], "stored", value=weight_of(rng, "ed", "u"))
    choice = helper.make_node("If", ["yes"], ["chosen"], "choice", **branches)
    last = helper.make_node("Einsum", ["chosen", "u"], ["y"], "last", equation="abde,ed->ab")
    graph = helper.make_graph(
        [constant, choice, last],
        "g",
        [
            helper.make_tensor_value_info("x", TensorProto.FLOAT, [2, 3, 4]),
            helper.make_tensor_value_info("yes", TensorProto.BOOL, []),
        ],
        [helper.make_tensor_value_info("y", TensorProto.FLOAT, [None, None])],
    )
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=9)
    onnx.save(model, tmp_path / "branches.onnx")
    changed = tr.load_model(tmp_path / "branches.onnx")
    onnx.checker.check_model(changed, full_check=True)
    for yes in (True, False):
        feed = {**fed(rng, "abc"), "yes": np.array(yes)}
        np.testing.assert_allclose(
            outputs(tmp_path, changed, feed)["y"], outputs(tmp_path, model, feed)["y"], rtol=1e-4, atol=1e-4
        )
    text = str(changed)
    assert "Einsum" not in text
    assert "MatMul" in text


def test_a_weight_that_users_may_set_stays(rng):
    model = einsum_model("abc,cd->abd", weight_of(rng, "cd"))
    model.graph.input.append(helper.make_tensor_value_info("w", TensorProto.FLOAT, [4, 5]))
    assert products_of_einsums(model) is model


def test_branches_with_one_name_for_two_weights_stay(rng):
    def branch(key):
        node = helper.make_node("Einsum", ["x", "w"], [f"{key}/y"], key, equation="abc,cde->abde")
        info = helper.make_tensor_value_info(f"{key}/y", TensorProto.FLOAT, [None] * 4)
        return helper.make_graph([node], key, [], [info], [weight_of(rng, "cde")])

    choice = helper.make_node("If", ["yes"], ["y"], "choice", then_branch=branch("a"), else_branch=branch("b"))
    inputs = [
        helper.make_tensor_value_info("x", TensorProto.FLOAT, [2, 3, 4]),
        helper.make_tensor_value_info("yes", TensorProto.BOOL, []),
    ]
    graph = helper.make_graph([choice], "g", inputs, [helper.make_tensor_value_info("y", TensorProto.FLOAT, [None] * 4)])
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=9)
    assert products_of_einsums(model) is model


def test_layers_of_einsums_are_planned_and_written(rng, tmp_path):
    nodes = [helper.make_node("Einsum", ["y", "v"], ["z"], "back", equation="abde,dec->abc")]
    model = einsum_model("abc,cde->abde", weight_of(rng, "cde"), weight_of(rng, "dec", "v"), nodes=nodes, output="z")
    path = tmp_path / "dense.onnx"
    onnx.save(model, path)
    assert {layer.name for layer in survey(tr.load_model(path))} == {"w", "v"}
    modes = {"w": (10, 4), "v": (4, 10)}
    layers = tuple(tr.LayerPlan(name=name, format="svd", modes=modes[name], ranks=(4,)) for name in modes)
    tr.export(path, tmp_path / "out.onnx", tr.Plan(layers=layers))
    feed = fed(rng, "abc")
    expected = run(open_session(path), feed)["z"]
    np.testing.assert_allclose(run(open_session(tmp_path / "out.onnx"), feed)["z"], expected, rtol=1e-3, atol=1e-4)
    factored = onnx.load(tmp_path / "out.onnx")
    assert [node.op_type for node in factored.graph.node] == ["MatMul", "MatMul", "Reshape", "Reshape", "MatMul", "MatMul"]
