import numpy as np
import onnx
import pytest
import torch
from attention_graphs import FEATURES, attention_model
from conftest import make_model
from onnx import helper, numpy_helper
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

from tensorrail_runtime import ModelError, cost
from tensorrail_runtime.graphs.operators import MACS, NO_MACS, macs_function, operands_of
from tensorrail_trainer import to_onnx


def save(model, tmp_path):
    path = tmp_path / "m.onnx"
    path.write_bytes(model.SerializeToString())
    return path


def test_a_network_costs_what_torch_counts(tmp_path):
    model = nn.Sequential(
        nn.Conv2d(3, 8, 3, 2, 1), nn.ReLU(), nn.Conv2d(8, 8, 3, groups=4), nn.Flatten(), nn.Linear(8 * 36, 10)
    ).eval()
    x = torch.randn(5, 3, 16, 16)
    with FlopCounterMode(display=False) as counter:
        model(x)
    result = cost(save(to_onnx(model, x), tmp_path), batch=5)
    assert result.flops == counter.get_total_flops()
    assert result.uncounted == ()


def test_closed_forms_and_shares(small_path):
    result = cost(small_path, batch=3)
    assert [layer.macs for layer in result.layers] == [3 * 32 * 64 * 16 * 9, 3 * 10 * 32]
    assert [layer.params for layer in result.layers] == [32 * 16 * 9, 320]
    assert result.params == 32 * 16 * 9 + 32 + 320 + 10
    assert result.flops == 2 * result.macs
    assert result.bytes == small_path.stat().st_size


def test_a_transposed_convolution_counts_every_input_value(tmp_path):
    weights = {"w": np.ones((4, 6, 3, 3), np.float32)}
    node = helper.make_node("ConvTranspose", ["x", "w"], ["y"], "n", strides=[2, 2])
    model = make_model([node], weights, {"x": [2, 4, 5, 5]}, {"y": [2, 6, 11, 11]})
    with FlopCounterMode(display=False) as counter:
        torch.nn.functional.conv_transpose2d(torch.ones(2, 4, 5, 5), torch.ones(4, 6, 3, 3), stride=2)
    assert cost(save(model, tmp_path), 2).flops == counter.get_total_flops()


def test_an_operator_that_is_not_known_is_listed(tmp_path):
    result = cost(save(make_model([helper.make_node("Det", ["x"], ["y"])], {}, {"x": [3, 3]}, {"y": []}), tmp_path))
    assert (result.macs, result.uncounted) == (0, ("Det",))


@pytest.mark.parametrize(
    ("equation", "shapes", "macs"),
    [
        ("ij,kj->ik", [(3, 4), (5, 4)], 3 * 4 * 5),
        ("ij,kj", [(3, 4), (5, 4)], 3 * 4 * 5),  # the output's labels are those that come once
        ("b...i, ij -> b...j", [(2, 7, 6, 4), (4, 5)], 2 * 7 * 6 * 4 * 5),
        ("ab,bc,cd->ad", [(2, 3), (3, 4), (4, 5)], 2 * 3 * 4 + 2 * 4 * 5),  # from the left, two at a time
        ("ij->ji", [(3, 4)], 0),
        ("...i,...i->...", [(1, 4), (3, 4)], 3 * 4),
        ("bij,jk->bk", [(2, 10, 6), (6, 5)], 2 * 6 * 5),  # what one operand alone has is summed up before
    ],
)
def test_einsum_counts_the_products_of_its_operands(equation, shapes, macs, tmp_path):
    names = [f"x{k}" for k in range(len(shapes))]
    node = helper.make_node("Einsum", names, ["y"], "n", equation=equation)
    out = np.einsum(equation, *(np.ones(shape) for shape in shapes)).shape
    model = make_model([node], {}, {name: list(shape) for name, shape in zip(names, shapes, strict=True)}, {"y": list(out)})
    result = cost(save(model, tmp_path))
    assert (result.macs, result.uncounted) == (macs, ())


def test_every_operator_of_onnx_is_counted_or_known_to_multiply_nothing_or_named():
    known = {schema.name for schema in onnx.defs.get_all_schemas() if schema.domain == ""}
    assert not NO_MACS - known
    contrib = {"DynamicQuantizeMatMul", "FusedConv", "FusedGemm", "FusedMatMul", "MatMulIntegerToFloat"}
    assert MACS.keys() - known == contrib
    assert not NO_MACS & MACS.keys()


@pytest.mark.parametrize(
    ("op", "shapes", "width", "macs"),
    [  # 2 samples, 5 tokens, 12 features, and an output of so many; all tokens and those before are scored
        ("Attention", [(2, 5, 12), (12, 36)], 12, 2 * 5 * (12 * 36 + 5 * 24)),
        ("Attention", [(2, 5, 12), (12, 30)], 6, 2 * 5 * (12 * 30 + 5 * 18)),
        ("Attention", [(2, 5, 12), (12, 36), (36,), None, (2, 2, 3, 7, 4)], 12, 2 * 5 * (12 * 36 + 12 * 24)),
        ("MultiHeadAttention", [(2, 5, 12), (2, 5, 12), (2, 5, 6)], 6, 2 * 5 * 5 * 18),
        ("MultiHeadAttention", [(2, 5, 12), (2, 9, 12), (2, 9, 12)], 12, 2 * 5 * 9 * 24),
        ("MultiHeadAttention", [(2, 5, 12), (2, 3, 9, 4), (2, 3, 9, 4)], 12, 2 * 5 * 9 * 24),
        ("MultiHeadAttention", [(2, 5, 12), (2, 9, 3, 2, 4)], 12, 2 * 5 * 9 * 24),
        ("MultiHeadAttention", [(2, 5, 3, 3, 4)], 12, 2 * 5 * 5 * 24),
    ],
)
def test_attention_of_onnx_runtime_counts_its_products(op, shapes, width, macs):
    names = ["" if shape is None else f"in{place}" for place, shape in enumerate(shapes)]
    attributes = {"qkv_hidden_sizes": [12, 12, width]} if op == "Attention" else {}
    node = helper.make_node(op, names, ["y"], "n", domain="com.microsoft", num_heads=3, **attributes)
    known = dict(zip(names, shapes, strict=True)) | {"": ()}
    count = macs_function(node)
    assert count is not None
    assert count(node, [known[name] for name in operands_of(node)], (2, 5, width)) == macs


def test_attention_without_a_bias_is_not_run(rng, tmp_path):
    path = save(attention_model(rng, bias=False), tmp_path)  # ONNX Runtime's kernel would end this process
    assert cost(path).uncounted == ("Attention",)
    path = save(attention_model(rng), tmp_path)
    counted = cost(path, 2, {"x": (2, 6, FEATURES)})
    assert (counted.macs, counted.uncounted) == (2 * 6 * (3 * FEATURES**2 + 6 * 2 * FEATURES), ())


def test_attention_of_onnx_itself_is_named(tmp_path):
    node = helper.make_node("Attention", ["q", "k", "v"], ["y"], "n", q_num_heads=1, kv_num_heads=1)
    shape = [1, 4, 8]
    model = make_model([node], {}, dict.fromkeys("qkv", shape), {"y": shape}, opset=23)
    assert cost(save(model, tmp_path)).uncounted == ("Attention",)


def test_functions_of_the_model_are_looked_into(tmp_path):
    opsets = [helper.make_opsetid("", 20), helper.make_opsetid("mine", 1)]
    names = ["a", *(f"t{k}" for k in range(4)), "b"]
    body = [helper.make_node("MatMul", [names[k], "w"], [names[k + 1]]) for k in range(5)]
    function = helper.make_function("mine", "Chain", ["a", "w"], ["b"], body, opsets[:1])
    free = [helper.make_tensor_value_info("x", onnx.TensorProto.FLOAT, [3, 4])]
    out = [helper.make_tensor_value_info("y", onnx.TensorProto.FLOAT, [3, 4])]
    stored = [numpy_helper.from_array(np.ones((4, 4), np.float32), "w")]
    graph = helper.make_graph([helper.make_node("Chain", ["x", "w"], ["y"], "n", domain="mine")], "g", free, out, stored)
    model = helper.make_model(graph, opset_imports=opsets, ir_version=9, functions=[function])
    result = cost(save(model, tmp_path))
    assert (result.macs, result.params, result.nodes, result.uncounted) == (5 * 3 * 4 * 4, 16, 5, ())


def test_what_onnx_runtimes_optimizer_writes_is_counted(tmp_path):
    """Operators of its own, whose shapes a run shows: a product with its first operand turned, and an activation."""
    nodes = [
        helper.make_node("FusedMatMul", ["x", "w"], ["h"], "n", domain="com.microsoft", transA=1),
        helper.make_node("FastGelu", ["h"], ["g"], domain="com.microsoft"),
        helper.make_node("BlackmanWindow", ["size"], ["window"]),
        helper.make_node("Mul", ["g", "window"], ["y"]),
    ]
    free = [helper.make_tensor_value_info("x", onnx.TensorProto.FLOAT, [3, 4])]
    out = [helper.make_tensor_value_info("y", onnx.TensorProto.FLOAT, [4, 5])]
    stored = [numpy_helper.from_array(np.ones((3, 5), np.float32), "w"), numpy_helper.from_array(np.int64(5), "size")]
    opsets = [helper.make_opsetid("", 20), helper.make_opsetid("com.microsoft", 1)]
    model = helper.make_model(helper.make_graph(nodes, "g", free, out, stored), opset_imports=opsets, ir_version=9)
    result = cost(save(model, tmp_path))
    assert (result.macs, result.uncounted) == (4 * 3 * 5, ())


def test_a_sequence_may_be_an_output_and_an_empty_file_is_no_model(tmp_path):
    node = helper.make_node("SequenceConstruct", ["x", "x"], ["y"], "n")
    x = helper.make_tensor_value_info("x", onnx.TensorProto.FLOAT, [2, 3])
    y = helper.make_tensor_sequence_value_info("y", onnx.TensorProto.FLOAT, None)
    opsets = [helper.make_opsetid("", 20)]
    model = helper.make_model(helper.make_graph([node], "g", [x], [y]), opset_imports=opsets, ir_version=9)
    assert cost(save(model, tmp_path)).nodes == 1
    (tmp_path / "empty.onnx").touch()
    with pytest.raises(ModelError, match="contains no nodes"):
        cost(tmp_path / "empty.onnx")


def test_the_batch_is_that_of_the_model_where_it_is_fixed(tmp_path):
    weights = {"w": np.ones((4, 5), np.float32)}
    model = make_model([helper.make_node("MatMul", ["x", "w"], ["y"], "n")], weights, {"x": [3, 4]}, {"y": [3, 5]})
    path = save(model, tmp_path)
    assert cost(path).batch == 3
    with pytest.raises(ModelError, match="expected batch 3, got 8"):
        cost(path, 8)


def test_bytes_moved_and_kernels_are_those_of_the_shapes(small_path):
    result = cost(small_path, batch=3)
    conv, relu, pool, gemm = 16 * 64 + 32 * 64, 2 * 32 * 64, 32 * 64 + 32, 32 + 10  # read and written; Flatten is a view
    assert result.activation_bytes == 4 * 3 * (conv + relu + pool + gemm)
    assert (result.kernels, result.nodes, result.unshaped) == (4, 5, 0)


@pytest.mark.parametrize(("kind", "gates"), [(nn.LSTM, 4), (nn.GRU, 3), (nn.RNN, 1)])
def test_recurrent_layers_count_every_step_and_direction(kind, gates, tmp_path):
    steps, batch, inputs, hidden = 7, 3, 12, 8
    weights = {
        "w": np.ones((2, gates * hidden, inputs), np.float32),
        "r": np.ones((2, gates * hidden, hidden), np.float32),
    }
    node = helper.make_node(kind.__name__, ["x", "w", "r"], ["y"], "n", hidden_size=hidden, direction="bidirectional")
    model = make_model([node], weights, {"x": ["t", "n", inputs]}, {"y": ["t", 2, "n", hidden]})
    result = cost(save(model, tmp_path), shapes={"x": (steps, batch, inputs)})
    assert result.macs == 2 * steps * batch * gates * hidden * (inputs + hidden)
    assert result.params == 2 * gates * hidden * (inputs + hidden)


def scan(scanned):
    """Return a node h ← tanh(h·R + x) over the first axis of a tensor, its weight in the body."""
    inner = [
        helper.make_node("MatMul", ["h", "r"], ["product"], "product"),
        helper.make_node("Add", ["product", "x_t"], ["sum"]),
        helper.make_node("Tanh", ["sum"], ["next"]),
    ]
    ends = [helper.make_tensor_value_info(name, onnx.TensorProto.FLOAT, None) for name in ("h", "x_t", "next")]
    body = helper.make_graph(inner, "body", ends[:2], ends[2:], [numpy_helper.from_array(np.eye(4, dtype=np.float32), "r")])
    return helper.make_node("Scan", ["first", scanned], ["y"], "scan", body=body, num_scan_inputs=1)


def test_the_body_of_a_scan_counts_at_every_step(tmp_path):
    model = make_model([scan("x")], {}, {"first": ["n", 4], "x": ["t", "n", 4]}, {"y": ["n", 4]})
    result = cost(save(model, tmp_path), shapes={"first": (3, 4), "x": (7, 3, 4)})
    assert result.uncounted == ()
    assert (result.params, result.macs) == (16, 7 * 3 * 4 * 4)
    assert (result.kernels, result.nodes) == (7 * 3, 4)
    assert result.activation_bytes == 7 * 4 * 12 * (2 + 3 + 2)  # MatMul, Add, Tanh: tensors of 3×4, read and written
    (product,) = result.layers
    assert (product.name, product.weight, product.params, product.input) == ("product", "r", 16, (3, 4))


def test_a_scan_whose_length_only_a_run_shows_counts_that_often(tmp_path):
    nodes = [
        helper.make_node("NonZero", ["x"], ["places"]),  # (4, N): as many as there are values that are not zero
        helper.make_node("Transpose", ["places"], ["turned"], perm=[1, 0]),
        helper.make_node("Cast", ["turned"], ["steps"], to=onnx.TensorProto.FLOAT),
        scan("steps"),
    ]
    model = make_model(nodes, {}, {"first": [4], "x": [2, 2, 2, 2]}, {"y": [4]})
    result = cost(save(model, tmp_path))
    assert result.uncounted == ()
    assert (result.params, result.macs) == (16, 16 * 16)


def foreign(node, inputs, domain="x.y"):
    """Return a model of one node of another domain, which onnx's checker knows nothing of."""
    node.domain = domain
    free = [helper.make_tensor_value_info(name, onnx.TensorProto.FLOAT, shape) for name, shape in inputs.items()]
    out = helper.make_tensor_value_info("y", onnx.TensorProto.FLOAT, [1, 4])
    opsets = [helper.make_opsetid("", 20), helper.make_opsetid(domain, 1)]
    return helper.make_model(helper.make_graph([node], "g", free, [out]), opset_imports=opsets, ir_version=9)


def test_a_foreign_scan_is_named_and_its_constants_count(tmp_path):
    result = cost(save(foreign(scan("x"), {"first": [1, 4], "x": [7, 1, 4]}), tmp_path))
    assert result.uncounted == ("x.y:Scan",)
    assert (result.params, result.macs) == (16, 0)


def test_a_node_without_its_inputs_is_refused(tmp_path):
    with pytest.raises(ModelError, match="contains a node that is not valid ONNX"):
        cost(save(foreign(helper.make_node("MatMul", ["x"], ["y"]), {"x": [2, 2]}, "com.microsoft"), tmp_path))


def test_quantized_products_count_like_others(tmp_path):
    weights = {
        "w": np.ones((6, 4, 3, 3), np.int8),
        **{f"s{k}": np.float32(0.1) for k in range(3)},
        "z": np.uint8(0),
        "zw": np.int8(0),
    }
    nodes = [
        helper.make_node("QuantizeLinear", ["x", "s0", "z"], ["q"]),
        helper.make_node("QLinearConv", ["q", "s0", "z", "w", "s1", "zw", "s2", "z"], ["c"], "conv"),
        helper.make_node("DequantizeLinear", ["c", "s2", "z"], ["y"]),
    ]
    model = make_model(nodes, weights, {"x": [2, 4, 5, 5]}, {"y": [2, 6, 3, 3]})
    result = cost(save(model, tmp_path))
    assert result.macs == 2 * 6 * 9 * 4 * 9
    assert result.uncounted == ()


def test_shapes_are_taken_and_wrong_ones_refused(small_path):
    assert cost(small_path, shapes={"x": (3, 16, 8, 8)}).macs == cost(small_path, batch=3).macs
    for shapes, reason in (
        ({"z": (1,)}, "unknown input 'z'"),
        ({"x": (1, 2)}, "expected a shape of 4 axes"),
        ({"x": (1, 3, 8, 8)}, r"input 'x': expected shape \[batch, 16, 8, 8\], got \[1, 3, 8, 8\]"),
    ):
        with pytest.raises(ModelError, match=reason):
            cost(small_path, shapes=shapes)


def test_what_is_no_model_is_refused(tmp_path):
    (tmp_path / "m.onnx").write_bytes(b"nothing")
    with pytest.raises(ModelError, match="not an ONNX model"):
        cost(tmp_path / "m.onnx")
    with pytest.raises(ModelError, match="cannot be read"):
        cost(tmp_path / "none.onnx")


def test_weights_in_constant_nodes_are_parameters_too(small_model, small_path, tmp_path):
    stored = cost(small_path)
    made = [
        helper.make_node("Constant", [], [tensor.name], value=numpy_helper.from_array(numpy_helper.to_array(tensor)))
        for tensor in small_model.graph.initializer
    ]
    nodes = [*made, *small_model.graph.node]
    model = make_model(nodes, {}, {"x": ["batch", 16, 8, 8]}, {"y": ["batch", 10]})
    found = cost(save(model, tmp_path))
    assert (found.params, found.layers) == (stored.params, stored.layers)
    assert found.activation_bytes == stored.activation_bytes


def test_an_axis_of_minus_one_is_dynamic(tmp_path):
    node = helper.make_node("Gemm", ["x", "w"], ["y"], "n")
    model = make_model([node], {"w": np.ones((8, 4), np.float32)}, {"x": ["n", 8]}, {"y": ["n", 4]})
    for value in (*model.graph.input, *model.graph.output):
        value.type.tensor_type.shape.dim[0].dim_value = -1
    path = save(model, tmp_path)
    assert cost(path, 3).flops == 2 * 3 * 8 * 4
    assert cost(path, shapes={"x": (5, 8)}).flops == 2 * 5 * 8 * 4


def test_bytes_are_those_of_external_data_as_well(small_model, tmp_path):
    path = tmp_path / "apart.onnx"
    onnx.save(small_model, path, save_as_external_data=True, location="apart.data", size_threshold=0)
    assert cost(path).bytes == path.stat().st_size + (tmp_path / "apart.data").stat().st_size


@pytest.mark.parametrize(
    ("flags", "shape", "inner"),
    [
        ({}, (2, 5, 7), 7),
        ({"transA": 1}, (2, 7, 5), 7),
        ({"transBatchA": 1}, (5, 2, 7), 7),
        ({"transA": 1, "transBatchA": 1}, (7, 2, 5), 7),
    ],
)
def test_a_fused_product_counts_the_axis_that_it_adds_up(flags, shape, inner):
    node = helper.make_node("FusedMatMul", ["x", "w"], ["y"], domain="com.microsoft", **flags)
    assert MACS["FusedMatMul"](node, [shape, (2, inner, 3)], (2, 5, 3)) == 2 * 5 * 3 * inner
