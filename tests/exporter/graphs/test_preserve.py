"""What onnx-graphsurgeon does not carry stays in the graph, and what a foreign operator is called like is not rewritten."""

import numpy as np
import onnx
import onnxruntime as ort
import pytest
from onnx import AttributeProto, TensorProto, helper, numpy_helper

from tensorrail_exporter import GraphError, LayerPlan, Plan, decompose_graph, factorize
from tensorrail_exporter.graphs.io import load_model
from tensorrail_exporter.graphs.preserve import presentable
from tensorrail_exporter.rewrite.survey import survey

FULL = Plan(layers=(LayerPlan(name="fc", format="svd", modes=(6, 8), ranks=(6,)),))
FLOAT = TensorProto.FLOAT


@pytest.fixture
def weight(rng):
    return rng.standard_normal((8, 6)).astype(np.float32)


@pytest.fixture
def x(rng):
    return rng.standard_normal((4, 8)).astype(np.float32)


def model_of(nodes, inputs, outputs, weights, opset=18, domains=(), ir_version=10):
    """Return a model whose values may be of any type: `inputs` and `outputs` are declarations, or shapes of floats."""
    values = [
        [v if isinstance(v, onnx.ValueInfoProto) else helper.make_tensor_value_info(v[0], FLOAT, v[1]) for v in declared]
        for declared in (inputs, outputs)
    ]
    stored = [numpy_helper.from_array(value, name) for name, value in weights.items()]
    opsets = [helper.make_opsetid("", opset), *(helper.make_opsetid(domain, 1) for domain in domains)]
    return helper.make_model(helper.make_graph(nodes, "g", *values, stored), opset_imports=opsets, ir_version=ir_version)


def product(x="x", y="h"):
    return helper.make_node("MatMul", [x, "fc.weight"], [y], "fc")


def factored(model, plan=FULL):
    return factorize(model, plan, decompose_graph(model, plan)).model


def outputs(model, **feed):
    return ort.InferenceSession(model.SerializeToString(), providers=["CPUExecutionProvider"]).run(None, feed)


def empty(node, name, kind):
    node.attribute.append(AttributeProto(name=name, type=kind))
    return node


def with_optional():
    kind = helper.make_attribute("type", helper.make_tensor_type_proto(FLOAT, ["n", 8]))
    node = helper.make_node("Optional", [], ["o"])
    node.attribute.append(kind)
    return node


@pytest.mark.parametrize("kind", ["no values", "type", "no activations"])
def test_attributes_that_it_does_not_know_are_kept(kind, weight, x):
    weights = {"fc.weight": weight}
    match kind:
        case "no values":
            none = empty(helper.make_node("Constant", [], ["e"]), "value_ints", AttributeProto.INTS)
            others = [none, helper.make_node("ReduceSum", ["h", "e"], ["y"], keepdims=1, noop_with_empty_axes=1)]
        case "type":
            others = [
                with_optional(),
                helper.make_node("OptionalHasElement", ["o"], ["b"]),
                helper.make_node("Cast", ["b"], ["bf"], to=FLOAT),
                helper.make_node("Add", ["h", "bf"], ["y"]),
            ]
        case _:
            weights |= {"w": weight[None, :, :6].repeat(1, 0), "r": np.ones((1, 8, 2), np.float32)}
            recurrent = helper.make_node("LSTM", ["s", "w", "r"], ["l"], hidden_size=2)
            axes = {"first": np.array([0]), "last": np.array([0, 1])}
            weights |= axes
            others = [
                helper.make_node("Unsqueeze", ["h", "first"], ["s"]),
                empty(recurrent, "activation_alpha", AttributeProto.FLOATS),
                helper.make_node("Squeeze", ["l", "last"], ["y"]),
            ]
    model = model_of([product(), *others], [("x", ["n", 8])], [("y", ["n", None])], weights)
    made = factored(model)
    assert [a.name for node in made.graph.node for a in node.attribute if not a.ByteSize()] == []
    before, after = {n.output[0]: n for n in model.graph.node}, {n.output[0]: n for n in made.graph.node}
    for node in others:
        assert after[node.output[0]].attribute == before[node.output[0]].attribute
    np.testing.assert_allclose(outputs(made, x=x)[0], outputs(model, x=x)[0], atol=1e-5)


def test_an_attribute_with_several_tensors_is_kept(weight):
    tensors = [numpy_helper.from_array(np.full((2, 3), k, np.float32), f"t{k}") for k in range(2)]
    foreign = helper.make_node("Lookup", ["h"], ["y"], "foreign", domain="my.ops", tensors=tensors)
    model = model_of([product(), foreign], [("x", ["n", 8])], [("y", ["n", 6])], {"fc.weight": weight}, domains=["my.ops"])
    assert factored(model).graph.node[-1].attribute == foreign.attribute


def test_an_attribute_with_several_graphs_is_refused(weight):
    """What only these graphs read would be removed."""
    body = helper.make_graph([helper.make_node("Mul", ["h", "scale"], ["t"])], "body", [], [])
    foreign = helper.make_node("Switch", ["h"], ["y"], "foreign", domain="my.ops", cases=[body, body])
    weights = {"fc.weight": weight, "scale": np.ones(6, np.float32)}
    model = model_of([product(), foreign], [("x", ["n", 8])], [("y", ["n", 6])], weights, domains=["my.ops"])
    with pytest.raises(GraphError, match="node foreign: its attribute 'cases' is a list of graphs, which would be lost"):
        factored(model)


def test_text_that_is_no_utf_8_is_kept(weight):
    coded = helper.make_node("Tokenizer", ["h"], ["y"], domain="my.ops", model=b"\x80\xff\x00")
    model = model_of([product(), coded], [("x", ["n", 8])], [("y", ["n", 6])], {"fc.weight": weight}, domains=["my.ops"])
    assert factored(model).graph.node[-1].attribute[0].s == b"\x80\xff\x00"
    assert presentable(model) is not model
    assert model.graph.node[-1].attribute[0].s == b"\x80\xff\x00"  # the argument is not changed


def test_inputs_and_outputs_that_are_no_tensors_are_kept(weight, x):
    tensor = helper.make_tensor_type_proto(FLOAT, ["n", 8])
    optional = helper.make_value_info("x", helper.make_optional_type_proto(tensor))
    scores = helper.make_sequence_type_proto(
        helper.make_map_type_proto(TensorProto.INT64, helper.make_tensor_type_proto(FLOAT, []))
    )
    nodes = [
        helper.make_node("OptionalGetElement", ["x"], ["xx"]),
        product("xx"),
        helper.make_node("ZipMap", ["h"], ["y"], domain="ai.onnx.ml", classlabels_int64s=list(range(6))),
    ]
    out = helper.make_value_info("y", scores)
    model = model_of(nodes, [optional], [out], {"fc.weight": weight}, domains=["ai.onnx.ml"])
    made = factored(model)
    assert made.graph.input[0] == model.graph.input[0]
    assert made.graph.output[0] == model.graph.output[0]
    before, after = (outputs(one, x=x)[0] for one in (model, made))
    assert after[3][5] == pytest.approx(before[3][5], abs=1e-5)


def test_overloads_and_metadata_are_kept(weight, x):
    functions = []
    for overload, op in (("", "Relu"), ("b", "Neg")):
        function = helper.make_function(
            "my", "act", ["i"], ["o"], [helper.make_node(op, ["i"], ["o"])], [helper.make_opsetid("", 18)]
        )
        function.overload = overload
        functions.append(function)
    act = helper.make_node("act", ["h"], ["y"], domain="my", doc_string="what it is")
    act.overload = "b"
    act.metadata_props.add(key="k", value="v")
    model = model_of([product(), act], [("x", ["n", 8])], [("y", ["n", 6])], {"fc.weight": weight}, domains=["my"])
    model.functions.extend(functions)
    model.graph.metadata_props.add(key="a", value="b")
    made = factored(model)
    assert made.graph.node[-1] == act
    assert made.graph.metadata_props == model.graph.metadata_props
    np.testing.assert_allclose(outputs(made, x=x)[0], outputs(model, x=x)[0], atol=1e-5)


def test_operators_of_other_domains_are_other_operators(weight):
    for op, count in (("MatMul", 2), ("LSTM", 1)):
        other = helper.make_node(op, ["h", "fc.weight"][:count], ["y"], "other", domain="my.ops")
        first = helper.make_node("Identity", ["x"], ["h"])
        model = model_of([first, other], [("x", ["n", 8])], [("y", ["n", 6])], {"fc.weight": weight}, domains=["my.ops"])
        assert survey(model) == ()
        with pytest.raises(GraphError, match=f"no rule rewrites my.ops:{op}"):
            factored(model, Plan(layers=(FULL.layers[0].model_copy(update={"name": "other"}),)))
    beside = [product(), helper.make_node("LSTM", ["h"], ["y"], domain="my.ops")]
    model = model_of(beside, [("x", ["n", 8])], [("y", ["n", 6])], {"fc.weight": weight}, domains=["my.ops"])
    assert factored(model).graph.node[-1].domain == "my.ops"


@pytest.mark.parametrize("kind", [TensorProto.BFLOAT16, TensorProto.FLOAT8E4M3FN])
def test_types_that_numpy_has_not_do_not_disturb_other_layers(kind, weight, x):
    narrow = helper.make_tensor("other.weight", kind, weight.shape, weight.ravel().tolist())
    nodes = [
        product(),
        helper.make_node("Cast", ["other.weight"], ["wide"], to=FLOAT),
        helper.make_node("MatMul", ["x", "wide"], ["o"], "other"),
        helper.make_node("Add", ["h", "o"], ["y"]),
    ]
    model = model_of(nodes, [("x", ["n", 8])], [("y", ["n", 6])], {"fc.weight": weight}, opset=19)
    model.graph.initializer.append(narrow)
    assert {layer.name for layer in survey(model)} == {"fc", "other"}
    np.testing.assert_allclose(outputs(factored(model), x=x)[0], outputs(model, x=x)[0], rtol=1e-4, atol=1e-4)
    direct = model_of([product()], [("x", ["n", 8])], [("h", ["n", 6])], {})
    direct.graph.initializer.append(helper.make_tensor("fc.weight", kind, weight.shape, weight.ravel().tolist()))
    with pytest.raises(GraphError, match=f"its weight is of type {TensorProto.DataType.Name(kind).lower()}; expected float16"):
        factored(direct)


def test_the_constant_of_a_product_may_be_computed_on_either_side(rng, weight):
    turned = [
        helper.make_node("Transpose", ["fc.weight"], ["w"], perm=[1, 0]),
        helper.make_node("MatMul", ["w", "x"], ["y"], "fc"),
    ]
    model = model_of(turned, [("x", ["n", 8, 5])], [("y", ["n", 6, 5])], {"fc.weight": weight})
    x = rng.standard_normal((2, 8, 5)).astype(np.float32)
    np.testing.assert_allclose(outputs(factored(model), x=x)[0], outputs(model, x=x)[0], atol=1e-5)


def test_a_layer_on_a_tensor_of_a_body_is_reached(weight, x):
    """Both branches call their tensors alike, and give them other shapes."""
    out = [helper.make_tensor_value_info("t", FLOAT, None)]
    then = helper.make_graph([helper.make_node("Relu", ["x"], ["r"]), product("r", "t")], "then", [], out)
    rest = [helper.make_node("Unsqueeze", ["x", "zero"], ["r"]), helper.make_node("Squeeze", ["r", "zero"], ["t"])]
    other = helper.make_graph(rest, "else", [], out)
    node = helper.make_node("If", ["is"], ["y"], then_branch=then, else_branch=other)
    flag = helper.make_tensor_value_info("is", TensorProto.BOOL, [])
    weights = {"fc.weight": weight, "zero": np.array([0])}
    model = model_of([node], [("x", ["n", 8]), flag], [("y", ["n", "k"])], weights)
    made = factored(model)
    for value in (True, False):
        before, after = (outputs(one, x=x, **{"is": np.array(value)})[0] for one in (model, made))
        np.testing.assert_allclose(after, before, atol=1e-5)


def test_an_input_of_a_weight_that_only_a_body_reads_stays_one(weight, x):
    out = [helper.make_tensor_value_info("t", FLOAT, None)]
    then = helper.make_graph([helper.make_node("Add", ["h", "bias"], ["t"])], "then", [], out)
    rest = helper.make_graph([helper.make_node("Identity", ["h"], ["t"])], "else", [], out)
    node = helper.make_node("If", ["is"], ["y"], then_branch=then, else_branch=rest)
    bias = helper.make_tensor_value_info("bias", FLOAT, [6])
    weights = {"fc.weight": weight, "bias": np.ones(6, np.float32)}
    inputs = [("x", ["n", 8]), helper.make_tensor_value_info("is", TensorProto.BOOL, []), bias]
    made = factored(model_of([product(), node], inputs, [("y", ["n", 6])], weights))
    assert [value.name for value in made.graph.input] == ["x", "is", "bias"]
    feed = {"x": x, "is": np.array(True)}
    plain, other = outputs(made, **feed)[0], outputs(made, **feed, bias=np.full(6, 5, np.float32))[0]
    np.testing.assert_allclose(other - plain, 4, atol=1e-5)


def test_notes_at_tensors_are_kept(weight):
    model = model_of(
        [product(), helper.make_node("Relu", ["h"], ["y"])], [("x", ["n", 8])], [("y", ["n", 6])], {"fc.weight": weight}
    )
    model.graph.input[0].metadata_props.add(key="kind", value="user")
    model.graph.input[0].type.denotation = "IMAGE"
    between = helper.make_tensor_value_info("h", FLOAT, ["n", 6])
    between.metadata_props.add(key="scale", value="layer")
    model.graph.value_info.append(between)
    model.graph.quantization_annotation.add(tensor_name="h")
    made = factored(model)
    assert made.graph.input[0] == model.graph.input[0]
    (kept,) = [value for value in made.graph.value_info if value.name == "h"]
    assert [(entry.key, entry.value) for entry in kept.metadata_props] == [("scale", "layer")]
    assert [one.tensor_name for one in made.graph.quantization_annotation] == ["h"]


def test_a_tensor_of_more_values_than_its_shape_needs_is_refused(weight, tmp_path):
    model = model_of([product()], [("x", ["n", 8])], [("h", ["n", 6])], {})
    model.graph.initializer.add(name="fc.weight", dims=[8, 6], data_type=FLOAT, float_data=[0.5] * 50)
    (tmp_path / "m.onnx").write_bytes(model.SerializeToString())
    with pytest.raises(GraphError, match=r"not a valid ONNX model \(tensor 'fc.weight' of shape \[8, 6\] holds 50 values\)"):
        load_model(tmp_path / "m.onnx")


def test_a_tensor_of_fewer_bytes_than_its_shape_needs_is_refused(weight, tmp_path):
    model = model_of([product()], [("x", ["n", 8])], [("h", ["n", 6])], {"fc.weight": weight})
    onnx.save(model, tmp_path / "m.onnx", save_as_external_data=True, location="d.bin", size_threshold=0)
    short = onnx.load(tmp_path / "m.onnx", load_external_data=False)
    for entry in short.graph.initializer[0].external_data:
        if entry.key == "length":
            entry.value = "40"
    (tmp_path / "m.onnx").write_bytes(short.SerializeToString())
    with pytest.raises(GraphError, match=r"not a valid ONNX model \(tensor 'fc.weight' of shape \[8, 6\] holds 40 bytes\)"):
        load_model(tmp_path / "m.onnx")
