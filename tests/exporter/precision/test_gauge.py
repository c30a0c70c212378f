"""The basis between two layers: it changes nothing in fp32, and int8 loses less for it."""

import numpy as np
import onnx
import pytest
from cases import MATRIX_ONLY, relative
from conftest import make_model
from onnx import helper

from tensorrail_exporter import FORMATS, LayerPlan, Plan, decompose_graph, factorize
from tensorrail_exporter.precision.gauge import bonds, gauged
from tensorrail_exporter.precision.int8 import to_int8
from tensorrail_exporter.precision.weights import with_names
from tensorrail_runtime.sessions.session import Session, open_session, run

UNEQUAL = np.array([3.0, 1.0, 0.1, 0.03, 1.0, 0.01], np.float32)


def outputs(model, feed, tmp_path, level="all"):
    path = tmp_path / "run.onnx"
    onnx.save(model, path)
    return run(open_session(path, settings=Session(level=level)), feed)


def difference(model, other, feed, tmp_path):
    """Return the relative difference of the outputs, computed in floats: it is the same on every processor."""
    first, second = (outputs(one, feed, tmp_path, level) for one, level in ((model, "all"), (other, "none")))
    return max(relative(second[name], first[name]) for name in first)


def feeds_of(rng, *shape, batches=(16, 16)):
    return [{"x": rng.standard_normal((batch, *shape)).astype(np.float32)} for batch in batches]


def normal(rng, *shape):
    return (rng.standard_normal(shape) / np.sqrt(np.prod(shape[1:]))).astype(np.float32)


def conv(name, data, weight, out, *, bias=False, **attributes):
    inputs = [data, weight, f"{name}.b"] if bias else [data, weight]
    return helper.make_node("Conv", inputs, [out], name, **attributes)


def chain(rng, *nodes, weights=(), shape=(12, 6, 6), out=(20, 6, 6)):
    return make_model(list(nodes), dict(weights), {"x": ["n", *shape]}, {"y": ["n", *out]})


def low_rank(rng, spread=(1.0, 0.3, 0.1, 0.03, 0.01, 0.003)):
    """Two convolutions whose inner channels vary by very different amounts, as those of a singular value decomposition."""
    first, second = normal(rng, 6, 12, 1, 1), normal(rng, 20, 6, 3, 3)
    scales = np.array(spread, np.float32)
    weights = {
        "a": first * scales[:, None, None, None],
        "a.b": normal(rng, 6) * 0.1,
        "b": second / np.sqrt(scales)[:, None, None],
    }
    nodes = conv("a", "x", "a", "t", bias=True), conv("b", "t", "b", "y", pads=[1] * 4)
    return chain(rng, *nodes, weights=weights)


def test_int8_loses_less_between_cores_of_unequal_size(rng, tmp_path):
    model, feeds = low_rank(rng), feeds_of(rng, 12, 6, 6)
    (bond,) = bonds(model, feeds)
    assert (bond.tensor, bond.size, bond.mixes) == ("t", 6, True)
    others = feeds_of(rng, 12, 6, 6)[0]  # which nothing was chosen by
    plain, better = (to_int8(model, feeds, gauge=gauge, reduce_range=False) for gauge in (False, True))
    losses = [difference(model, one, others, tmp_path) for one in (plain, better)]
    assert losses[1] < losses[0] / 2


LAYERS = {"conv": ((24, 16, 3, 3), [16, 6, 6], [24, 6, 6]), "linear": ((24, 36), [36], [24])}
FORMS = [
    (form, kind, merge)
    for form in FORMATS
    for kind in LAYERS
    if kind == "linear" or form not in MATRIX_ONLY
    for merge in dict.fromkeys(FORMATS[form].merges(kind))
]


@pytest.mark.parametrize(("form", "kind", "merge"), FORMS)
def test_between_the_cores_of_every_format(form, kind, merge, rng, tmp_path):
    shape, inside, out = LAYERS[kind]
    weight = normal(rng, *shape)
    op, stored, more = ("Conv", weight, {"pads": [1] * 4}) if kind == "conv" else ("MatMul", weight.T.copy(), {})
    node = helper.make_node(op, ["x", "layer.weight"], ["y"], "layer", **more)
    model = make_model([node], {"layer.weight": stored}, {"x": ["n", *inside]}, {"y": ["n", *out]})
    rule = FORMATS[form]
    modes = rule.default_modes(shape)
    ranks = rule.clamp(shape, modes, rule.uniform(shape, modes, 4))
    plan = Plan(layers=(LayerPlan(name="layer", format=form, modes=modes, ranks=ranks, merge=merge),))
    factored = factorize(model, plan, decompose_graph(model, plan)).model
    feeds = feeds_of(rng, *inside)
    named = with_names(factored)
    assert bonds(named, feeds)
    changed = gauged(named, feeds)
    assert changed != named or form in ("tt", "tucker", "svd")  # which are orthogonal bases to begin with
    assert difference(factored, changed, feeds[0], tmp_path) < 1e-5


@pytest.mark.parametrize("spread", [(1.0, 0.3, 0.1, 0.03, 0.01, 0.003), (1.0,) * 6])
def test_in_fp32_nothing_changes(spread, rng, tmp_path):
    model, feeds = low_rank(rng, spread), feeds_of(rng, 12, 6, 6)
    assert difference(model, gauged(model, feeds), feeds[0], tmp_path) < 1e-5


def test_behind_a_relu_channels_are_scaled_and_not_mixed(rng, tmp_path):
    scales = UNEQUAL[:, None, None, None]
    weights = {"a": normal(rng, 6, 12, 1, 1) * scales, "b": normal(rng, 20, 6, 1, 1) / scales[:, 0]}
    nodes = (
        conv("a", "x", "a", "t"),
        helper.make_node("Relu", ["t"], ["r"], "relu"),
        helper.make_node("MaxPool", ["r"], ["p"], "pool", kernel_shape=[1, 1]),
        conv("b", "p", "b", "y"),
    )
    model, feeds = chain(rng, *nodes, weights=weights), feeds_of(rng, 12, 6, 6)
    (bond,) = bonds(model, feeds)
    assert (bond.tensor, bond.mixes) == ("p", False)
    changed = gauged(model, feeds)
    assert difference(model, changed, feeds[0], tmp_path) < 1e-5
    values = {tensor.name: onnx.numpy_helper.to_array(tensor) for tensor in changed.graph.initializer}
    factors = values["a"] / weights["a"]
    assert (factors > 0).all()
    np.testing.assert_allclose(factors.max((1, 2, 3)), factors.min((1, 2, 3)), rtol=1e-5)
    others = feeds_of(rng, 12, 6, 6)[0]
    losses = [difference(model, to_int8(model, feeds, gauge=gauge), others, tmp_path) for gauge in (False, True)]
    assert losses[1] < losses[0] / 2


@pytest.mark.parametrize("first", [{}, {"transB": 1, "alpha": 0.5, "beta": 2.0}])
@pytest.mark.parametrize("bias", [(6,), (1, 6)])
def test_gemm_with_all_its_attributes(first, bias, rng, tmp_path):
    before = normal(rng, 6, 12) * UNEQUAL[:, None]
    weights = {
        "a": before if first else before.T.copy(),
        "a.b": normal(rng, *bias),
        "b": normal(rng, 20, 6),
        "b.b": normal(rng, 20),
    }
    nodes = [
        helper.make_node("Gemm", ["x", "a", "a.b"], ["t"], "a", **first),
        helper.make_node("Gemm", ["t", "b", "b.b"], ["y"], "b", transB=1, alpha=2.0),
    ]
    model, feeds = make_model(nodes, weights, {"x": ["n", 12]}, {"y": ["n", 20]}), feeds_of(rng, 12)
    assert [(bond.size, bond.mixes) for bond in bonds(model, feeds)] == [(6, True)]
    changed = gauged(model, feeds)
    assert changed != model
    assert difference(model, changed, feeds[0], tmp_path) < 1e-5


@pytest.mark.parametrize(("pool", "mixes"), [("AveragePool", True), ("GlobalAveragePool", True), ("MaxPool", False)])
def test_behind_a_pool_that_changes_the_size(pool, mixes, rng, tmp_path):
    attributes = {} if pool.startswith("Global") else {"kernel_shape": [2, 2], "strides": [2, 2]}
    side = 1 if pool.startswith("Global") else 3
    weights = {"a": normal(rng, 6, 12, 1, 1) * UNEQUAL[:, None, None, None], "b": normal(rng, 20, 6, 1, 1)}
    nodes = conv("a", "x", "a", "t"), helper.make_node(pool, ["t"], ["p"], "pool", **attributes), conv("b", "p", "b", "y")
    model, feeds = chain(rng, *nodes, weights=weights, out=(20, side, side)), feeds_of(rng, 12, 6, 6)
    assert [(bond.size, bond.mixes) for bond in bonds(model, feeds)] == [(6, mixes)]
    changed = gauged(model, feeds)
    assert changed != model
    assert difference(model, changed, feeds[0], tmp_path) < 1e-5


def test_a_pool_along_another_axis_is_no_bond(rng):
    """As many positions are left as there are channels; the product behind the pool is along the positions."""
    nodes = [
        helper.make_node("Conv", ["x", "a"], ["t"], "a"),
        helper.make_node("AveragePool", ["t"], ["p"], "pool", kernel_shape=[2], strides=[2]),
        helper.make_node("MatMul", ["p", "b"], ["y"], "b"),
    ]
    weights = {"a": normal(rng, 8, 4, 1), "b": normal(rng, 8, 5)}
    model = make_model(nodes, weights, {"x": ["n", 4, 16]}, {"y": ["n", 8, 5]})
    assert bonds(model, feeds_of(rng, 4, 16)) == ()


def test_products_of_vectors_and_reshapes_of_unknown_sizes_are_no_bonds(rng):
    vector = make_model(
        [helper.make_node("MatMul", ["a", "x"], ["t"], "a"), helper.make_node("MatMul", ["b", "t"], ["y"], "b")],
        {"a": normal(rng, 6, 12), "b": normal(rng, 20, 6)},
        {"x": [12]},
        {"y": [20]},
    )
    assert bonds(vector, [{"x": normal(rng, 12)}]) == ()
    nodes = [
        helper.make_node("MatMul", ["x", "a"], ["t"], "a"),
        helper.make_node("Reshape", ["t", "shape"], ["u"], "reshape"),
        helper.make_node("Conv", ["u", "b"], ["y"], "b"),
    ]
    weights = {"a": normal(rng, 12, 16), "shape": np.array([0, 16, -1]), "b": normal(rng, 20, 16, 1)}
    for length, expected in (("t", 0), (4, 1)):
        model = make_model(nodes, weights, {"x": ["n", length, 12]}, {"y": ["n", 20, length]})
        assert len(bonds(model, feeds_of(rng, 4, 12))) == expected


def test_a_channel_that_is_seldom_active_is_not_blown_up(rng, tmp_path):
    """Of 20,000 positions one is above 0 in channel 0: in a sample of them it looks as if it were always 0."""
    weights = {"a": np.eye(6, dtype=np.float32)[:, :, None, None], "b": normal(rng, 20, 6, 1, 1)}
    nodes = conv("a", "x", "a", "t"), helper.make_node("Relu", ["t"], ["r"], "relu"), conv("b", "r", "b", "y")
    model = chain(rng, *nodes, weights=weights, shape=(6, 25, 25), out=(20, 25, 25))
    feeds = feeds_of(rng, 6, 25, 25)
    for feed in feeds:
        feed["x"][:, 0] = -1.0
    feeds[0]["x"][3, 0, 7, 7] = 2.0
    losses = [difference(model, to_int8(model, feeds, gauge=gauge), feeds[0], tmp_path) for gauge in (False, True)]
    assert losses[1] < 1.05 * losses[0]


@pytest.mark.parametrize("group", [6, 3])
def test_channels_that_groups_read_are_scaled(group, rng, tmp_path):
    scales = np.array([3.0, 1.0, 0.1, 0.03, 1.0, 0.01], np.float32)
    weights = {
        "a": normal(rng, 6, 12, 1, 1) * scales[:, None, None, None],
        "b": normal(rng, 6, 6 // group, 3, 3),
        "c": normal(rng, 20, 6, 1, 1),
    }
    nodes = conv("a", "x", "a", "t"), conv("b", "t", "b", "u", group=group, pads=[1] * 4), conv("c", "u", "c", "y")
    model, feeds = chain(rng, *nodes, weights=weights), feeds_of(rng, 12, 6, 6)
    assert [(bond.tensor, bond.mixes) for bond in bonds(model, feeds)] == [("t", False), ("u", False)]
    changed = gauged(model, feeds)
    assert difference(model, changed, feeds[0], tmp_path) < 1e-5
    assert any(t != o for t, o in zip(changed.graph.initializer, model.graph.initializer, strict=True))


@pytest.mark.parametrize("left", [False, True])
def test_products_on_either_side(left, rng, tmp_path):
    scales = np.array([1.0, 0.1, 0.01, 0.001], np.float32)
    first, second = normal(rng, 12, 4) * scales, normal(rng, 4, 20) / np.sqrt(scales)[:, None]
    names = (["a", "x"], ["b", "t"]) if left else (["x", "a"], ["t", "b"])
    weights = {"a": first.T.copy() if left else first, "b": second.T.copy() if left else second}
    nodes = [helper.make_node("MatMul", names[0], ["t"], "a"), helper.make_node("MatMul", names[1], ["y"], "b")]
    shape, out = ([12, 5], [20, 5]) if left else ([5, 12], [5, 20])
    model = make_model(nodes, weights, {"x": ["n", *shape]}, {"y": ["n", *out]})
    feeds = feeds_of(rng, *shape)
    assert [(bond.tensor, bond.size, bond.mixes) for bond in bonds(model, feeds)] == [("t", 4, True)]
    changed = gauged(model, feeds)
    assert difference(model, changed, feeds[0], tmp_path) < 1e-5
    assert changed.graph.initializer[0] != model.graph.initializer[0]


def test_weights_that_are_shared_and_tensors_that_are_read_twice_stay(rng):
    weights = {"a": normal(rng, 12, 12, 1, 1), "b": normal(rng, 20, 12, 1, 1)}
    shared = chain(rng, conv("a", "x", "a", "t"), conv("a2", "t", "a", "u"), conv("b", "u", "b", "y"), weights=weights)
    feeds = feeds_of(rng, 12, 6, 6)
    assert bonds(shared, feeds) == ()
    twice = (
        conv("a", "x", "a", "t"),
        conv("b", "t", "b", "u"),
        helper.make_node("GlobalAveragePool", ["t"], ["g"], "pool"),
        helper.make_node("ReduceSum", ["g"], ["s"], "sum", keepdims=1),
        helper.make_node("Add", ["u", "s"], ["y"], "add"),
    )
    assert bonds(chain(rng, *twice, weights=weights), feeds) == ()
    seen = make_model(
        [conv("a", "x", "a", "t"), conv("b", "t", "b", "y")],
        weights,
        {"x": ["n", 12, 6, 6]},
        {"y": ["n", 20, 6, 6], "t": ["n", 12, 6, 6]},
    )
    assert bonds(seen, feeds) == ()
    assert gauged(seen, feeds) is seen
