"""Whole graphs: bodies of If, Loop and Scan, shared and computed weights, batch norm, opsets, external data, size."""

import itertools
import sys

import numpy as np
import onnx
import onnxruntime as ort
import pytest
from cases import MATRIX_ONLY, random_cores, relative
from conftest import make_model
from onnx import TensorProto, helper, numpy_helper

from tensorrail_exporter import FORMATS, GraphError, LayerPlan, Plan, decompose_graph, factorize, reconstruct
from tensorrail_exporter.graphs.io import load_model, save_model, size_of
from tensorrail_runtime.graphs.cost import cost

OLDEST, NEWEST = 13, 26  # ONNX Runtime 1.31 refuses opset 27 and later as not yet released


def run(model, feeds, path=None):
    source = model.SerializeToString() if path is None else str(path)
    return ort.InferenceSession(source, providers=["CPUExecutionProvider"]).run(None, feeds)


def tensor_type(name, shape, kind=TensorProto.FLOAT):
    return helper.make_tensor_value_info(name, kind, shape)


def tt(name, shape, rank=3):
    modes = FORMATS["tt"].default_modes(shape)
    return LayerPlan(
        name=name, format="tt", modes=modes, ranks=FORMATS["tt"].clamp(shape, modes, FORMATS["tt"].uniform(shape, modes, rank))
    )


def check_exact(model, plan, feeds):
    """Assert that the factored graph equals the one with reconstructed weights and differs from the dense one."""
    cores = decompose_graph(model, plan)
    factored = factorize(model, plan, cores)
    for a, b in zip(run(factored.model, feeds), run(reconstruct(model, plan, cores), feeds), strict=True):
        assert relative(a, b) < 1e-5
    return factored


def test_bodies_of_if_are_reached_with_weights_from_outside_and_of_their_own(rng):
    shape = ["n", 12]
    own = numpy_helper.from_array(rng.standard_normal((12, 12)).astype(np.float32), "own")
    then = helper.make_graph(
        [helper.make_node("MatMul", ["x", "outer"], ["m"], "in_then")], "then", [], [tensor_type("m", shape)]
    )
    other = helper.make_graph(
        [helper.make_node("MatMul", ["x", "own"], ["e"], "in_else")], "else", [], [tensor_type("e", shape)], [own]
    )
    nodes = [
        helper.make_node("Cast", ["flag"], ["condition"], "cast", to=TensorProto.BOOL),
        helper.make_node("If", ["condition"], ["z"], "if", then_branch=then, else_branch=other),
        helper.make_node("MatMul", ["z", "outer"], ["y"], "behind"),
    ]
    weights = {"outer": rng.standard_normal((12, 12)).astype(np.float32)}
    model = make_model(nodes, weights, {"x": shape, "flag": [1]}, {"y": shape})
    plan = Plan(layers=(tt("outer", (12, 12)), tt("own", (12, 12))))
    for flag in (0, 1):
        feeds = {"x": rng.standard_normal((3, 12)).astype(np.float32), "flag": np.array([flag], np.float32)}
        factored = check_exact(model, plan, feeds)
    assert [layer.nodes for layer in factored.layers] == [2, 1]
    (branch,) = [node for node in factored.model.graph.node if node.op_type == "If"]
    bodies = {attribute.name: attribute.g for attribute in branch.attribute}
    assert not bodies["then_branch"].initializer  # its cores are those of the graph around it, once
    assert {tensor.name.partition("/")[0] for tensor in bodies["else_branch"].initializer} <= {"own"}
    assert "outer" not in {tensor.name for tensor in factored.model.graph.initializer}
    onnx.checker.check_model(factored.model, full_check=True)


@pytest.mark.parametrize("op", ["Loop", "Scan"])
def test_bodies_of_loops_are_reached(op, rng):
    """y ← y·W, three times: as Loop with a trip count, as Scan over three rows that are added."""
    weights = {"w": rng.standard_normal((8, 8)).astype(np.float32) / 3}
    product = helper.make_node("MatMul", ["state", "w"], ["next"], "product")
    if op == "Loop":
        body = helper.make_graph(
            [product, helper.make_node("Identity", ["go"], ["on"])],
            "body",
            [
                tensor_type("i", [], TensorProto.INT64),
                tensor_type("go", [], TensorProto.BOOL),
                tensor_type("state", ["n", 8]),
            ],
            [tensor_type("on", [], TensorProto.BOOL), tensor_type("next", ["n", 8])],
        )
        weights["trips"] = np.array(3)
        nodes = [helper.make_node("Loop", ["trips", "", "x"], ["y"], "loop", body=body)]
    else:
        body = helper.make_graph(
            [product, helper.make_node("Add", ["next", "row"], ["sum"], "add")],
            "body",
            [tensor_type("state", ["n", 8]), tensor_type("row", [8])],
            [tensor_type("sum", ["n", 8])],
        )
        weights["rows"] = rng.standard_normal((3, 8)).astype(np.float32)
        nodes = [helper.make_node("Scan", ["x", "rows"], ["y"], "scan", num_scan_inputs=1, body=body)]
    model = make_model(nodes, weights, {"x": ["n", 8]}, {"y": ["n", 8]})
    check_exact(model, Plan(layers=(tt("w", (8, 8)),)), {"x": rng.standard_normal((2, 8)).astype(np.float32)})


def test_weights_that_are_computed_from_constants_are_folded(rng):
    stored = rng.standard_normal((2, 12, 8))
    nodes = [
        helper.make_node("Cast", ["stored"], ["single"], "cast", to=TensorProto.FLOAT),
        helper.make_node("Split", ["single"], ["a", "b"], "split", axis=0, num_outputs=2),
        helper.make_node("Squeeze", ["a", "axis"], ["matrix"], "squeeze"),
        helper.make_node("Transpose", ["matrix"], ["w"], "transpose", perm=[1, 0]),
        helper.make_node("MatMul", ["x", "w"], ["m"], "layer"),
        helper.make_node("ReduceSum", ["b"], ["s"], "sum"),
        helper.make_node("Add", ["m", "s"], ["y"], "add"),
    ]
    weights = {"stored": stored, "axis": np.array([0])}
    model = make_model(nodes, weights, {"x": ["n", 8]}, {"y": [None] * 3})
    feeds = {"x": rng.standard_normal((2, 8)).astype(np.float32)}
    for name in ("stored", "layer"):
        factored = check_exact(model, Plan(layers=(tt(name, (12, 8)),)), feeds)
    ops = {node.op_type for node in factored.model.graph.node}
    assert "Transpose" not in ops
    assert "Split" in ops  # the other half is still used


def test_a_tied_embedding_keeps_its_table(rng):
    """One matrix is looked up and, transposed, the head: only the product is rewritten."""
    nodes = [
        helper.make_node("Cast", ["ids_f"], ["ids"], "cast", to=TensorProto.INT64),
        helper.make_node("Gather", ["table", "ids"], ["e"], "gather"),
        helper.make_node("Transpose", ["table"], ["head"], "transpose", perm=[1, 0]),
        helper.make_node("MatMul", ["e", "head"], ["y"], "product"),
    ]
    model = make_model(nodes, {"table": rng.standard_normal((20, 8)).astype(np.float32)}, {"ids_f": ["n"]}, {"y": ["n", 20]})
    factored = check_exact(model, Plan(layers=(tt("product", (20, 8)),)), {"ids_f": np.array([3, 17, 0], np.float32)})
    assert "table" in {tensor.name for tensor in factored.model.graph.initializer}


def test_attention_products_of_activations_stay_and_projections_are_rewritten(rng):
    """A head of attention on (n, 5, 16): q, k and v are factored, q·kᵀ is not a layer."""
    nodes, weights = [], {}
    for name in "qkv":
        weights[f"{name}.weight"] = rng.standard_normal((16, 16)).astype(np.float32) / 4
        nodes.append(helper.make_node("MatMul", ["x", f"{name}.weight"], [name], f"node_{name}"))
    nodes += [
        helper.make_node("Transpose", ["k"], ["kt"], "kt", perm=[0, 2, 1]),
        helper.make_node("MatMul", ["q", "kt"], ["scores"], "scores"),
        helper.make_node("Softmax", ["scores"], ["p"], "softmax"),
        helper.make_node("MatMul", ["p", "v"], ["y"], "values"),
    ]
    model = make_model(nodes, weights, {"x": ["n", 5, 16]}, {"y": ["n", 5, 16]})
    feeds = {"x": rng.standard_normal((2, 5, 16)).astype(np.float32)}
    check_exact(model, Plan(layers=tuple(tt(name, (16, 16)) for name in "qkv")), feeds)
    with pytest.raises(GraphError, match="layer scores: cannot be rewritten: neither operand is a constant"):
        decompose_graph(model, Plan(layers=(tt("scores", (16, 16)),)))


def norm_model(rng, bias=True):
    weights = {"w": rng.standard_normal((16, 8, 3, 3)).astype(np.float32)}
    if bias:
        weights["b"] = rng.standard_normal(16).astype(np.float32)
    norm = {name: rng.uniform(0.5, 2, 16).astype(np.float32) for name in ("scale", "shift", "mean", "variance")}
    nodes = [
        helper.make_node("Conv", ["x", *weights], ["a"], "conv", pads=[1] * 4),
        helper.make_node("BatchNormalization", ["a", *norm], ["c"], "norm", epsilon=1e-3),
        helper.make_node("Relu", ["c"], ["y"], "relu"),
    ]
    return make_model(nodes, weights | norm, {"x": ["n", 8, 6, 6]}, {"y": ["n", 16, 6, 6]})


@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("form_name", sorted(set(FORMATS) - MATRIX_ONLY))
def test_batch_norm_is_folded_into_the_last_core_only(form_name, bias, rng):
    model = norm_model(rng, bias)
    form, shape = FORMATS[form_name], (16, 8, 3, 3)
    modes = form.default_modes(shape)
    plan = Plan(
        layers=(
            LayerPlan(name="w", format=form_name, modes=modes, ranks=form.clamp(shape, modes, form.uniform(shape, modes, 4))),
        )
    )
    cores = {"w": random_cores(plan.layers[0], shape, rng)}
    x = {"x": rng.standard_normal((2, 8, 6, 6)).astype(np.float32)}
    kept, folded = (factorize(model, plan, cores, fold_batch_norm=fold) for fold in (False, True))
    expected = run(reconstruct(model, plan, cores), x)[0]
    for factored in (kept, folded):
        assert relative(run(factored.model, x)[0], expected) < 1e-5
    assert (kept.layers[0].batch_norm, folded.layers[0].batch_norm) == (False, True)
    assert "BatchNormalization" in {node.op_type for node in kept.model.graph.node}
    assert "BatchNormalization" not in {node.op_type for node in folded.model.graph.node}
    stored = [{t.name: numpy_helper.to_array(t) for t in one.model.graph.initializer} for one in (kept, folded)]
    same = [name for name in stored[1] if name in stored[0] and np.array_equal(stored[0][name], stored[1][name])]
    assert len(same) == len([name for name in stored[1] if name.startswith("w/")]) - 1 - ("w/bias" in stored[1])


def test_batch_norm_stays_where_another_node_needs_the_convolution(rng):
    model = norm_model(rng)
    model.graph.output.append(tensor_type("a", ["n", 16, 6, 6]))
    plan = Plan(layers=(tt("w", (16, 8, 3, 3)),))
    factored = factorize(model, plan, decompose_graph(model, plan), fold_batch_norm=True)
    assert not factored.layers[0].batch_norm
    assert "BatchNormalization" in {node.op_type for node in factored.model.graph.node}


@pytest.mark.parametrize("opset", range(OLDEST, NEWEST + 1))
def test_every_opset_that_onnx_runtime_takes(opset, rng):
    weights = {
        "conv": rng.standard_normal((8, 4, 3, 3)).astype(np.float32),
        "fc": rng.standard_normal((6, 8)).astype(np.float32),
        "w": rng.standard_normal((1, 16, 6)).astype(np.float32),
        "r": rng.standard_normal((1, 16, 4)).astype(np.float32),
        "tokens": np.array([0, 1, 6]),
    }
    nodes = [
        helper.make_node("Conv", ["x", "conv"], ["a"], "node_conv", pads=[1] * 4),
        helper.make_node("GlobalAveragePool", ["a"], ["p"], "pool"),
        helper.make_node("Flatten", ["p"], ["f"], "flatten"),
        helper.make_node("Gemm", ["f", "fc"], ["g"], "node_fc", transB=1),
        helper.make_node("Reshape", ["g", "tokens"], ["s"], "reshape", **({"allowzero": 0} if opset >= 14 else {})),
        helper.make_node("LSTM", ["s", "w", "r"], ["y"], "rnn", hidden_size=4),
    ]
    weights["tokens"] = np.array([1, -1, 6])
    model = make_model(nodes, weights, {"x": ["n", 4, 6, 6]}, {"y": [1, 1, "n", 4]}, opset)
    model.ir_version = {13: 7, 14: 7, 15: 8}.get(opset, 10)
    plan = Plan(layers=(tt("conv", (8, 4, 3, 3)), tt("fc", (6, 8)), tt("w", (16, 6))))
    factored = check_exact(model, plan, {"x": rng.standard_normal((3, 4, 6, 6)).astype(np.float32)})
    assert factored.model.opset_import[0].version == opset
    assert factored.model.ir_version == model.ir_version


@pytest.mark.parametrize(
    ("form_name", "op"),
    [(name, op) for name in FORMATS for op in ("conv", "linear") if op == "linear" or name not in MATRIX_ONLY],
)
def test_onnx_runtime_does_not_fold_the_cores_back(form_name, op, rng, tmp_path):
    if op == "conv":
        shape, ends = (32, 32, 3, 3), {"x": ["n", 32, 8, 8]}
        node = helper.make_node("Conv", ["x", "w"], ["y"], "n", pads=[1] * 4)
    else:
        shape, ends = (64, 64), {"x": ["n", 64]}
        node = helper.make_node("Gemm", ["x", "w"], ["y"], "n", transB=1)
    model = make_model([node], {"w": rng.standard_normal(shape).astype(np.float32)}, ends, {"y": ends["x"]})
    form = FORMATS[form_name]
    modes = form.default_modes(shape)
    ranks = form.clamp(shape, modes, form.uniform(shape, modes, 4))
    plan = Plan(layers=(LayerPlan(name="w", format=form_name, modes=modes, ranks=ranks),))
    cores = {"w": random_cores(plan.layers[0], shape, rng)}
    factored = factorize(model, plan, cores)
    stored = sum(int(np.prod(t.dims)) for t in factored.model.graph.initializer if t.data_type == TensorProto.FLOAT)
    assert stored == factored.layers[0].stored_params < factored.layers[0].dense_params
    assert not {node.op_type for node in factored.model.graph.node} & {"Einsum"}
    options = ort.SessionOptions()
    options.optimized_model_filepath = str(tmp_path / "optimized.onnx")
    options.log_severity_level = 3  # it warns that the optimized file is for this machine only
    ort.InferenceSession(factored.model.SerializeToString(), options, providers=["CPUExecutionProvider"])
    optimized = onnx.load(tmp_path / "optimized.onnx")
    sizes = [int(np.prod(tensor.dims)) for tensor in optimized.graph.initializer]
    # its blocked layout rounds channels up to 16, which is no folding: dense weights are larger than all cores so rounded
    assert max(sizes) < factored.layers[0].dense_params
    products = [node for node in optimized.graph.node if any(op in node.op_type for op in ("Conv", "MatMul", "Gemm"))]
    assert len(products) == len(factored.layers[0].merged)


def test_external_data_is_read_and_kept_beside_the_model(rng, tmp_path):
    model = norm_model(rng)
    onnx.save(model, tmp_path / "dense.onnx", save_as_external_data=True, location="weights.bin", size_threshold=0)
    assert (tmp_path / "weights.bin").stat().st_size > 4000
    loaded = load_model(tmp_path / "dense.onnx")
    plan = Plan(layers=(tt("w", (16, 8, 3, 3)),))
    x = {"x": rng.standard_normal((2, 8, 6, 6)).astype(np.float32)}
    cores = decompose_graph(loaded, plan)
    save_model(factorize(loaded, plan, cores).model, tmp_path / "model.onnx")
    expected = run(reconstruct(loaded, plan, cores), x)[0]
    assert relative(run(None, x, tmp_path / "model.onnx")[0], expected) < 1e-5


def large_model(count, size):
    """Return `count` products of size² weights in a row, of one constant value each so that the memory is all they take."""
    names = [f"w{k}" for k in range(count)]
    nodes = [
        helper.make_node("MatMul", [before, name], [after], f"n{name}")
        for name, (before, after) in zip(
            names, itertools.pairwise(["x", *[f"a{k}" for k in range(1, count)], "y"]), strict=True
        )
    ]
    graph = helper.make_graph(nodes, "large", [tensor_type("x", ["n", size])], [tensor_type("y", ["n", size])])
    for k, name in enumerate(names):
        tensor = graph.initializer.add()
        tensor.name, tensor.data_type = name, TensorProto.FLOAT
        tensor.dims.extend([size, size])
        tensor.raw_data = np.full((size, size), (k + 1) / size, np.float32).tobytes()
    return helper.make_model(graph, opset_imports=[helper.make_opsetid("", 20)], ir_version=9)


@pytest.mark.slow
def test_a_model_above_two_gigabytes_is_read_rewritten_and_written(tmp_path):
    size = 8192
    model = large_model(9, size)
    assert size_of(model) > 2**31
    save_model(model, tmp_path / "dense.onnx")
    assert (tmp_path / "dense.onnx").stat().st_size < 2**20
    del model
    loaded = load_model(tmp_path / "dense.onnx")
    # every weight is a constant, hence of rank 1: rank-1 cores keep the outputs; one is factored, the rest stays large
    plan = Plan(layers=(LayerPlan(name="w0", format="svd", modes=(size, size), ranks=(1,)),))
    cores = {"w0": [np.full((size, 1), 1 / size, np.float32), np.ones((1, size), np.float32)]}
    factored = factorize(loaded, plan, cores)
    assert factored.layers[0].weight_error < 1e-6
    del loaded
    save_model(factored.model, tmp_path / "model.onnx")
    assert (tmp_path / "model.onnx.data").stat().st_size >= 8 * 4 * size**2 == 2**31
    x = {"x": np.ones((1, size), np.float32)}
    expected = run(None, x, tmp_path / "dense.onnx")[0]
    assert expected.max() > 0
    assert relative(run(None, x, tmp_path / "model.onnx")[0], expected) < 1e-4
    assert cost(tmp_path / "model.onnx").macs == (8 * size + 2) * size


def test_the_two_gigabyte_path_on_a_small_model(tmp_path, monkeypatch):
    """The same code, its limit set low: what the slow test does at full size."""
    from tensorrail_exporter.graphs import io as graph_io

    monkeypatch.setattr(graph_io, "_LARGEST_FILE", 10_000)
    size = 32
    save_model(large_model(4, size), tmp_path / "dense.onnx")
    assert (tmp_path / "dense.onnx.data").exists()
    plan = Plan(layers=(LayerPlan(name="w0", format="svd", modes=(size, size), ranks=(1,)),))
    loaded = load_model(tmp_path / "dense.onnx")
    save_model(factorize(loaded, plan, decompose_graph(loaded, plan)).model, tmp_path / "model.onnx")
    assert (tmp_path / "model.onnx.data").stat().st_size >= 3 * 4 * size**2
    x = {"x": np.ones((1, size), np.float32)}
    assert relative(run(None, x, tmp_path / "model.onnx")[0], run(None, x, tmp_path / "dense.onnx")[0]) < 1e-5
    assert not list(tmp_path.glob(".*"))


def test_a_large_model_replaces_another_one_completely_or_not_at_all(tmp_path, monkeypatch):
    from tensorrail_exporter.graphs import io as graph_io

    monkeypatch.setattr(graph_io, "_LARGEST_FILE", 10_000)
    size, path = 64, tmp_path / "m.onnx"
    x = {"x": np.ones((1, size), np.float32)}
    save_model(large_model(2, size), path)
    before = run(None, x, path)[0]

    def fail(*_):
        raise OSError("no space left on device")

    with monkeypatch.context() as full:
        full.setattr(graph_io, "write_bytes", fail)
        with pytest.raises(OSError, match="no space left"):
            save_model(large_model(3, size), path)
    assert {file.name for file in tmp_path.iterdir()} == {"m.onnx", "m.onnx.data"}
    np.testing.assert_array_equal(run(None, x, path)[0], before)
    (tmp_path / "other.onnx").write_bytes(path.read_bytes())  # reads the same data
    for names in ({"m.onnx.2.data"}, {"m.onnx.3.data"}, {"m.onnx.2.data"}):
        save_model(large_model(3, size), path)
        assert {file.name for file in tmp_path.iterdir()} == {"m.onnx", "other.onnx", "m.onnx.data"} | names
        assert run(None, x, path)[0].max() > before.max()
        np.testing.assert_array_equal(run(None, x, tmp_path / "other.onnx")[0], before)


def test_work_on_stored_weights_grows_linearly():
    """Lines of the module that runs, which no machine changes: a graph of twice the weights takes twice as many."""
    from tensorrail_exporter.graphs import io as graph_io

    counts = []
    for count in (100, 200):
        model = large_model(count, 1)
        graph, lines = graph_io.import_graph(model), 0

        def trace(frame, event, _):
            nonlocal lines
            lines += event == "line"
            return trace if frame.f_code.co_filename == graph_io.__file__ else None

        before = sys.gettrace()
        sys.settrace(trace)
        try:
            graph_io.export_graph(graph, model)
        finally:
            sys.settrace(before)
        counts.append(lines)
    assert counts[1] < 2.2 * counts[0]


def test_layers_that_stay_dense_say_why(rng):
    weights = {
        "up": rng.standard_normal((4, 4, 2, 2)).astype(np.float32),
        "each": rng.standard_normal((4, 1, 3, 3)).astype(np.float32),
    }
    nodes = [
        helper.make_node("ConvTranspose", ["x", "up"], ["a"], "node_up", strides=[2, 2], auto_pad="SAME_UPPER"),
        helper.make_node("Conv", ["a", "each"], ["y"], "node_each", group=4),
    ]
    model = make_model(nodes, weights, {"x": ["n", 4, 4, 4]}, {"y": ["n", 4, 6, 6]})
    layer = LayerPlan(name="up", format="tt", modes=(4, 4, 4), ranks=(1, 2, 2, 1))
    with pytest.raises(
        GraphError, match="layer node_up: cannot be rewritten: its padding follows from auto_pad=SAME_UPPER, which"
    ):
        decompose_graph(model, Plan(layers=(layer.model_copy(update={"name": "node_up"}),)))
    with pytest.raises(GraphError, match=r"layer each: cannot be rewritten: it is a depthwise convolution \(group=4\)"):
        decompose_graph(model, Plan(layers=(layer.model_copy(update={"name": "each"}),)))


def test_sibling_bodies_share_one_copy_and_keep_their_own_of_the_same_name(rng):
    """Both branches use `w` of the graph around them; each has another `c` of its own."""
    branches = {}
    for name, scale in (("then_branch", 2.0), ("else_branch", 3.0)):
        own = numpy_helper.from_array(np.array(scale, np.float32), "c")
        nodes = [
            helper.make_node("MatMul", ["x", "w"], [f"m_{name}"], name),
            helper.make_node("Mul", [f"m_{name}", "c"], [name]),
        ]
        branches[name] = helper.make_graph(nodes, name, [], [tensor_type(name, ["n", 12])], [own])
    nodes = [
        helper.make_node("Cast", ["flag"], ["condition"], "cast", to=TensorProto.BOOL),
        helper.make_node("If", ["condition"], ["y"], "if", **branches),
    ]
    weights = {"w": rng.standard_normal((12, 12)).astype(np.float32)}
    model = make_model(nodes, weights, {"x": ["n", 12], "flag": [1]}, {"y": ["n", 12]})
    x = rng.standard_normal((3, 12)).astype(np.float32)
    results = []
    for flag in (0, 1):
        factored = check_exact(model, Plan(layers=(tt("w", (12, 12)),)), {"x": x, "flag": np.array([flag], np.float32)})
        results.append(run(factored.model, {"x": x, "flag": np.array([flag], np.float32)})[0])
    np.testing.assert_allclose(results[1] * 1.5, results[0], rtol=1e-5)
    assert factored.layers[0].nodes == 2
    (branch,) = [node for node in factored.model.graph.node if node.op_type == "If"]
    assert [[tensor.name for tensor in attribute.g.initializer] for attribute in branch.attribute] == [["c"], ["c"]]
