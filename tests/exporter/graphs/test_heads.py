"""Heads of attentions with fewer values: found in graphs of exporters, exact where nothing is lost, refused with a reason."""

import io
import json
import warnings

import numpy as np
import onnx
import onnxruntime
import pytest
import torch
from conftest import make_model
from onnx import helper
from torch import nn

import tensorrail as tr
from tensorrail_exporter.calibrate.head_inputs import head_moments
from tensorrail_exporter.calibrate.inputs import Calibration
from tensorrail_exporter.graphs.head_pairs import find_pairs
from tensorrail_exporter.graphs.heads import head_inputs, with_heads
from tensorrail_exporter.plans.plan import HeadPlan, LayerPlan, Plan
from tensorrail_exporter.rewrite.narrowed_heads import heads_error
from tensorrail_exporter.rewrite.resolve import resolve
from tensorrail_runtime.errors import GraphError, PlanError
from tensorrail_runtime.sessions.session import Session
from tensorrail_trainer.networks.vit import vit_tiny

HEADS, SIZE, WIDTH = 4, 8, 32
EXACT = 1e-5  # of the largest output: rounding in single precision


class Attention(nn.Module):
    """Self-attention with products of its own; `how` changes what stands between them."""

    def __init__(self, how="plain", *, bias=True):
        super().__init__()
        self.how = how
        self.q, self.k, self.v, self.o = (nn.Linear(WIDTH, WIDTH, bias=bias) for _ in range(4))

    def forward(self, x):
        """Return the attended tokens."""
        q, k, v = (self.apart(layer(x)) for layer in (self.q, self.k, self.v))
        if self.how == "rotary":
            q, k = (t * 0.8 + torch.cat([-t[..., 4:], t[..., :4]], -1) * 0.6 for t in (q, k))
        if self.how == "fused":
            mixed = nn.functional.scaled_dot_product_attention(q, k, v)
        else:
            scores = q @ k.transpose(-1, -2) / SIZE**0.5
            if self.how == "mask":
                scores = scores + torch.triu(torch.full((x.shape[1], x.shape[1]), -1e9), 1)
            mixed = torch.softmax(scores, -1) @ v
        return self.o(mixed.transpose(1, 2).reshape(*x.shape[:2], WIDTH))

    @staticmethod
    def apart(t):
        """Return heads as an axis."""
        return t.view(*t.shape[:2], HEADS, SIZE).transpose(1, 2)


class Packed(nn.Module):
    """Attention as in timm: one product, whose parts get an axis."""

    def __init__(self):
        super().__init__()
        self.qkv, self.o = nn.Linear(WIDTH, 3 * WIDTH), nn.Linear(WIDTH, WIDTH)

    def forward(self, x):
        """Return the attended tokens."""
        q, k, v = self.qkv(x).reshape(*x.shape[:2], 3, HEADS, SIZE).permute(2, 0, 3, 1, 4).unbind(0)
        mixed = nn.functional.scaled_dot_product_attention(q, k, v)
        return self.o(mixed.transpose(1, 2).reshape(x.shape))


class Flat(nn.Module):
    """Attention as in GPT-2: products of matrices, with tokens and samples on one axis, and a Split behind the first."""

    def __init__(self):
        super().__init__()
        self.qkv, self.o = nn.Linear(WIDTH, 3 * WIDTH), nn.Linear(WIDTH, WIDTH)

    def forward(self, x):
        """Return the attended tokens."""
        flat = torch.addmm(self.qkv.bias, x.reshape(-1, WIDTH), self.qkv.weight.T)
        q, k, v = (Attention.apart(part) for part in flat.view(*x.shape[:2], 3 * WIDTH).split(WIDTH, 2))
        mixed = torch.softmax(q @ k.transpose(-1, -2) / SIZE**0.5, -1) @ v
        mixed = mixed.transpose(1, 2).reshape(-1, WIDTH)
        return torch.addmm(self.o.bias, mixed, self.o.weight.T).view(x.shape)


def legacy(module, x):
    """Return the graph of the exporter that traces, with any batch size and length."""
    file = io.BytesIO()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        torch.onnx.export(module, (x,), file, dynamo=False, input_names=["x"], dynamic_axes={"x": {0: "n", 1: "t"}})
    return onnx.load_from_string(file.getvalue())


NETWORKS = {
    "plain": Attention,
    "no bias": lambda: Attention(bias=False),
    "mask": lambda: Attention("mask"),
    "fused": lambda: Attention("fused"),
    "packed": Packed,
    "flat": Flat,
    "encoder layer": lambda: nn.TransformerEncoderLayer(WIDTH, HEADS, 64, batch_first=True),
    "vit": lambda: vit_tiny(size=32, depth=2, dim=48, classes=5),
}
CASES = [(name, "dynamo") for name in NETWORKS] + [(name, "legacy") for name in ("plain", "no bias", "fused", "packed", "flat")]


def inputs_of(name):
    torch.manual_seed(1)
    return torch.randn(2, 3, 32, 32) if name == "vit" else torch.randn(2, 6, WIDTH)


def exported(name, exporter="dynamo", rank=None):
    torch.manual_seed(0)
    module, x = NETWORKS[name]().eval(), inputs_of(name)
    for parameter in module.parameters():  # biases of 0 would hide errors
        parameter.data += 0.05 * torch.randn_like(parameter)
    if rank is not None:
        to_low_rank(module, rank)
    return tr.to_onnx(module, x, input_names=["x"]) if exporter == "dynamo" else legacy(module, x)


def outputs_of(model, x):
    session = onnxruntime.InferenceSession(model.SerializeToString(), providers=["CPUExecutionProvider"])
    return session.run(None, {"x": np.asarray(x)})[0]


def difference(model, other, x):
    expected = outputs_of(model, x)
    return np.abs(outputs_of(other, x) - expected).max() / np.abs(expected).max()


def sizes_of(model, less=0):
    return {pair.names: pair.size - less for pair in find_pairs(model).found}


@pytest.mark.parametrize(("name", "exporter"), CASES)
def test_nothing_is_lost_at_full_size(name, exporter):
    model = exported(name, exporter)
    before = model.SerializeToString()
    pairs = find_pairs(model)
    layers = 2 if name == "vit" else 1
    assert [pair.scores for pair in pairs.found] == [True, False] * layers
    assert {(pair.heads, pair.size) for pair in pairs.found} == ({(3, 16)} if name == "vit" else {(HEADS, SIZE)})
    same = with_heads(model, sizes_of(model))
    onnx.checker.check_model(same, full_check=True)
    assert model.SerializeToString() == before
    assert difference(model, same, inputs_of(name)) < EXACT


@pytest.mark.parametrize(("name", "exporter"), CASES)
def test_smaller_heads_have_fewer_weights_and_the_scale_of_the_large_ones(name, exporter):
    model = exported(name, exporter, rank=5)
    narrow = with_heads(model, dict.fromkeys(sizes_of(model), 6))
    onnx.checker.check_model(narrow, full_check=True)
    assert difference(model, narrow, inputs_of(name)) < EXACT
    floats = [sum(np.prod(t.dims) for t in m.graph.initializer if t.data_type == 1) for m in (model, narrow)]
    width, heads, layers, size = (48, 3, 2, 16) if name == "vit" else (WIDTH, HEADS, 1, SIZE)
    rows = 4 * width + 3 * (name != "no bias")
    assert floats[0] - floats[1] == layers * heads * (size - 6) * rows


def to_low_rank(module, rank):
    """Project what queries and values are made of, so that both products of every head have a lower rank."""
    for name, parameter in module.named_parameters():
        heads, size = (3, 16) if "blocks." in name else (HEADS, SIZE)
        count = 3 if "qkv" in name or "in_proj" in name else 1
        if count == 3 or name[0] in "qv":
            generator = torch.Generator().manual_seed(0)  # the same for weights and biases
            basis = torch.linalg.qr(torch.randn(size, rank, generator=generator))[0]
            parts = parameter.data.view(count, heads, size, -1)
            for part in (0, 2) if count == 3 else (0,):
                parts[part] = basis @ (basis.T @ parts[part])


def test_biases_count():
    model = exported("plain")
    narrow = with_heads(model, {("v", "o"): 7})
    x = np.zeros((2, 6, WIDTH), np.float32)  # only biases are left of the values
    assert difference(model, narrow, x) < 0.5
    assert outputs_of(narrow, x).std(1).max() < 1e-6  # the same for all tokens


def read_by_shape(model):
    """Let the packed product be read by a node that takes no part of it."""
    moved = next(node for node in model.graph.node if node.op_type == "Transpose" and len(node.attribute[0].ints) == 5)
    model.graph.node.append(helper.make_node("Shape", [moved.output[0]], ["sizes"]))
    model.graph.output.append(helper.make_tensor_value_info("sizes", onnx.TensorProto.INT64, None))


def unnamed(model):
    """Take the names of dynamic axes away."""
    for value in (*model.graph.input, *model.graph.output, *model.graph.value_info):
        for dim in value.type.tensor_type.shape.dim:
            if dim.dim_param:
                dim.ClearField("dim_param")


@pytest.mark.parametrize("change", [read_by_shape, unnamed])
def test_a_packed_product_that_is_not_fully_understood_stays(change):
    model, x = exported("packed", "legacy"), inputs_of("packed")
    change(model)
    before = outputs_of(model, x)
    found = find_pairs(model).found
    sizes = {pair.names: pair.size for pair in found}
    if sizes:  # what is found stays exact
        np.testing.assert_allclose(outputs_of(with_heads(model, sizes), x), before, rtol=0, atol=EXACT * np.abs(before).max())


def test_a_part_of_a_shape_is_not_taken_for_the_size_of_heads():
    """Shape with `end` gives the tokens as its last number, and the size of heads for the whole."""
    model = legacy(Attention("fused"), torch.randn(2, 5, WIDTH))
    found = 0
    for node in model.graph.node:
        if node.op_type == "Shape":
            node.attribute.append(helper.make_attribute("start", 0))
            found += 1
    pairs = find_pairs(model)
    assert found
    assert not any(pair.scores for pair in pairs.found)


def test_heads_at_full_size_are_compared_with_the_dense_model(tmp_path):
    model, x = exported("plain"), inputs_of("plain")
    plans = [HeadPlan(weights=pair.names, size=2) for pair in find_pairs(model).found]
    dense = tmp_path / "dense.onnx"
    onnx.save(model, dense)
    feeds = [{"x": x.numpy()}]
    assert heads_error(dense, model, plans, feeds) < EXACT
    other = onnx.ModelProto.FromString(model.SerializeToString())
    weight = next(tensor for tensor in other.graph.initializer if len(tensor.dims) == 2)
    weight.CopyFrom(onnx.numpy_helper.from_array(1.5 * onnx.numpy_helper.to_array(weight), weight.name))
    with pytest.raises(GraphError, match="expected heads of the same size to differ from the dense ones by at most"):
        heads_error(dense, other, plans, feeds)


def test_rotary_embeddings_leave_values_and_outputs():
    model = tr.to_onnx(Attention("rotary").eval(), inputs_of("plain"), input_names=["x"])
    pairs = find_pairs(model)
    assert [pair.names for pair in pairs.found] == [("v", "o")]
    assert "is read by several nodes" in pairs.refused["q"]
    with pytest.raises(GraphError, match=r"layers q and k: expected query and key.*\(q: .* is read by several nodes.*v and o"):
        with_heads(model, {("q", "k"): 4})


def grouped_queries():
    """Return a graph in which two query heads share one key head and one value head."""
    rng = np.random.default_rng(0)
    weights = {
        name: rng.standard_normal((16, width)).astype(np.float32)
        for name, width in {"q.weight": 16, "k.weight": 8, "v.weight": 8, "o.weight": 16}.items()
    }
    weights |= {
        "four": np.array([0, 0, 4, 4], np.int64),
        "two": np.array([0, 0, 2, 4], np.int64),
        "flat": np.array([0, 0, 16], np.int64),
    }
    nodes = [helper.make_node("MatMul", ["x", f"{name}.weight"], [name]) for name in "qkv"]
    nodes += [
        helper.make_node("Reshape", ["q", "four"], ["qh"]),
        helper.make_node("Transpose", ["qh"], ["qt"], perm=[0, 2, 1, 3]),
    ]
    for name in "kv":
        nodes += [
            helper.make_node("Reshape", [name, "two"], [f"{name}h"]),
            helper.make_node("Transpose", [f"{name}h"], [f"{name}t"], perm=[0, 2, 1, 3]),
            helper.make_node("Concat", [f"{name}t", f"{name}t"], [f"{name}r"], axis=1),
        ]
    nodes += [
        helper.make_node("Transpose", ["kr"], ["kx"], perm=[0, 1, 3, 2]),
        helper.make_node("MatMul", ["qt", "kx"], ["scores"]),
        helper.make_node("Softmax", ["scores"], ["p"]),
        helper.make_node("MatMul", ["p", "vr"], ["m"]),
        helper.make_node("Transpose", ["m"], ["mt"], perm=[0, 2, 1, 3]),
        helper.make_node("Reshape", ["mt", "flat"], ["f"]),
        helper.make_node("MatMul", ["f", "o.weight"], ["y"]),
    ]
    return make_model(nodes, weights, {"x": ["n", 6, 16]}, {"y": ["n", 6, 16]})


def test_grouped_queries_are_refused():
    pairs = find_pairs(grouped_queries())
    assert pairs.found == ()
    assert "'kt' is read by several nodes" in pairs.refused["k"]


def change_output(model):
    model.graph.output.append(helper.make_tensor_value_info("view", onnx.TensorProto.FLOAT, None))


def change_reader(model):
    model.graph.node.append(helper.make_node("Identity", ["view"], ["copy"]))
    model.graph.output.append(helper.make_tensor_value_info("copy", onnx.TensorProto.FLOAT, None))


@pytest.mark.parametrize("change", [change_output, change_reader])
def test_values_that_others_read_stay(change):
    model = exported("plain")
    change(model)
    assert [pair.names for pair in find_pairs(model).found] == [("v", "o")]


@pytest.mark.parametrize("scale", [None, 0.0, 0.3])
def test_an_operator_for_attention_keeps_its_scale(scale, rng):
    weights = {f"{name}.weight": rng.standard_normal((16, 16)).astype(np.float32) for name in "qkvo"}
    for name in "qk":  # rank 2 of 4 in every head
        heads = [part[:, :2] @ rng.standard_normal((2, 4)) for part in np.split(weights[f"{name}.weight"], 4, 1)]
        weights[f"{name}.weight"] = np.concatenate(heads, 1).astype(np.float32)
    nodes = [helper.make_node("MatMul", ["x", f"{name}.weight"], [name]) for name in "qkv"]
    given = {} if scale is None else {"scale": scale}
    nodes += [
        helper.make_node("MultiHeadAttention", ["q", "k", "v"], ["m"], domain="com.microsoft", num_heads=4, **given),
        helper.make_node("MatMul", ["m", "o.weight"], ["y"]),
    ]
    ends = [[helper.make_tensor_value_info(name, onnx.TensorProto.FLOAT, ["n", 6, 16])] for name in "xy"]
    stored = [onnx.numpy_helper.from_array(values, name) for name, values in weights.items()]
    opsets = [helper.make_opsetid("", 20), helper.make_opsetid("com.microsoft", 1)]
    model = helper.make_model(helper.make_graph(nodes, "g", *ends, stored), opset_imports=opsets, ir_version=8)
    assert sizes_of(model) == {("q", "k"): 4, ("v", "o"): 4}
    x = rng.standard_normal((2, 6, 16)).astype(np.float32)
    narrow = with_heads(model, {("q", "k"): 2, ("v", "o"): 4})
    assert difference(model, narrow, x) < EXACT
    (node,) = (node for node in narrow.graph.node if node.op_type == "MultiHeadAttention")
    (written,) = (attribute.f for attribute in node.attribute if attribute.name == "scale")
    assert written == pytest.approx(scale or 0.5, rel=1e-6)


def test_a_size_that_does_not_fit_is_named():
    model = exported("plain")
    with pytest.raises(GraphError, match="layers q and k: expected heads of 1 to 8 values, got 9"):
        with_heads(model, {("q", "k"): 9})
    with pytest.raises(GraphError, match=r"layers a and b: expected query and key.* has these pairs: q and k, v and o"):
        with_heads(model, {("a", "b"): 4})
    model.graph.initializer[0].CopyFrom(
        onnx.numpy_helper.from_array(np.full(WIDTH, np.nan, np.float32), model.graph.initializer[0].name)
    )
    with pytest.raises(GraphError, match="weights hold NaN or infinite values"):
        with_heads(model, sizes_of(model))


def test_the_metric_of_inputs_beats_the_weights_alone(rng):
    model = exported("plain")
    assert head_inputs(model, [("q", "k"), ("v", "o")]) == ("x",)
    basis = rng.standard_normal((5, WIDTH))
    draw = lambda count: (rng.standard_normal((count, 6, 5)) @ basis).astype(np.float32)  # noqa: E731 - twice
    sizes = sizes_of(model, less=3)
    moments = head_moments(model, sizes, Calibration(tuple({"x": draw(4)} for _ in range(20))), Session())
    x = draw(4)
    fitted, plain = (difference(model, with_heads(model, sizes, given), x) for given in (moments, None))
    assert fitted < 0.5 * plain


def test_a_plan_narrows_heads_before_layers(tmp_path):
    plan = Plan(
        layers=(LayerPlan(name="{q,k,v}", format="svd", modes=(2 * 24 + 28, WIDTH), ranks=(WIDTH,)),),
        joint=(("q", "k", "v"),),
        heads=(HeadPlan(weights=("q", "k"), size=6), HeadPlan(weights=("v", "o"), size=7)),
    )
    plan.save(tmp_path / "plan.json")
    assert Plan.load(tmp_path / "plan.json") == plan
    model = exported("plain")
    assert resolve(model, plan).layers["{q,k,v}"].spec.shape == (76, WIDTH)
    onnx.save(model, tmp_path / "dense.onnx")
    report = tr.export(tmp_path / "dense.onnx", tmp_path / "model.onnx", tmp_path / "plan.json")
    assert [(row.layers, row.heads, row.before, row.after) for row in report.heads] == [
        (("q", "k"), 4, 8, 6),
        (("v", "o"), 4, 8, 7),
    ]
    assert "narrowed to" in str(report)
    narrow = with_heads(model, plan.head_sizes)
    assert difference(narrow, onnx.load(tmp_path / "model.onnx"), inputs_of("plain")) < EXACT  # at full rank
    checked = tr.check(
        tmp_path / "dense.onnx", tmp_path / "model.onnx", tolerance=None, layers=tr.Layers(tmp_path / "plan.json")
    )
    assert checked.layers[0].layer == "{q,k,v}"


def test_a_plan_may_narrow_heads_alone(tmp_path):
    plan = Plan(layers=(), heads=(HeadPlan(weights=("v", "o"), size=7),))
    assert plan.changes
    model = exported("plain")
    onnx.save(model, tmp_path / "dense.onnx")
    tr.export(tmp_path / "dense.onnx", tmp_path / "model.onnx", plan)
    written = onnx.load(tmp_path / "model.onnx")
    assert difference(with_heads(model, {("v", "o"): 7}), written, inputs_of("plain")) < EXACT


def test_plans_without_heads_are_written_as_before(tmp_path):
    Plan(layers=()).save(tmp_path / "plan.json")
    assert set(json.loads((tmp_path / "plan.json").read_text())) == {"version", "layers"}


def test_a_pair_has_one_size():
    twice = (HeadPlan(weights=("q", "k"), size=4), HeadPlan(weights=("q", "k"), size=3))
    with pytest.raises(ValueError, match="each pair may have one head size, but q and k appear 2 times"):
        Plan(layers=(), heads=twice)


def test_torch_keeps_its_heads():
    layers = (LayerPlan(name="o", format="svd", modes=(WIDTH, WIDTH), ranks=(8,)),)
    plan = Plan(layers=layers, heads=(HeadPlan(weights=("q", "k"), size=4),))
    with pytest.raises(PlanError, match="narrows the heads between q and k, which a PyTorch module keeps as they are"):
        tr.ADMM(Attention(), plan)


def test_weights_in_constant_nodes(tmp_path):
    """Paddle2ONNX writes weights and biases as Constant nodes."""
    model = exported("plain")
    for tensor in list(model.graph.initializer):
        model.graph.node.insert(0, helper.make_node("Constant", [], [tensor.name], value=tensor))
    names = [pair.names for pair in find_pairs(model).found]
    del model.graph.initializer[:]
    onnx.save(model, tmp_path / "constants.onnx")
    assert not find_pairs(model).found
    assert [pair.names for pair in find_pairs(tr.load_model(tmp_path / "constants.onnx")).found] == names != []


def test_sizes_behind_a_cast_are_refused():
    """tf2onnx casts the shapes of Reshapes; heads of another size would then fail when the network runs."""
    model = exported("plain", "legacy")
    joined = {node.output[0] for node in model.graph.node if node.op_type == "Concat"}
    nodes, cast = [], 0
    for node in model.graph.node:
        if node.op_type == "Reshape" and node.input[1] in joined:
            nodes.append(helper.make_node("Cast", [node.input[1]], [f"cast{cast}"], to=onnx.TensorProto.INT64))
            node.input[1], cast = f"cast{cast}", cast + 1
        nodes.append(onnx.NodeProto.FromString(node.SerializeToString()))
    assert cast
    del model.graph.node[:]
    model.graph.node.extend(nodes)
    onnx.checker.check_model(model, full_check=True)
    pairs = find_pairs(model)
    assert not pairs.found
    assert set(pairs.refused.values()) == {"the size of heads is computed in the graph from another shape"}
