"""A Triton model repository: `config.pbtxt` by Triton's own schema, field by field, and what is never written."""

import importlib.util
import warnings
from pathlib import Path

import numpy as np
import onnx
import onnxruntime as ort
import pytest
from conftest import make_model
from google.protobuf import text_format
from onnx import TensorProto, helper, numpy_helper

from tensorrail_runtime import ModelError, Session
from tensorrail_runtime.triton.package import Repository, Serving, package


@pytest.fixture(scope="module")
def schema():
    """Triton's `ModelConfig` and its enums. The file alone is loaded: its package would start gRPC."""
    (root,) = importlib.util.find_spec("tritonclient").submodule_search_locations
    spec = importlib.util.spec_from_file_location("model_config_pb2", Path(root) / "grpc" / "model_config_pb2.py")
    module = importlib.util.module_from_spec(spec)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # generated for an older protobuf
        spec.loader.exec_module(module)
    return module


@pytest.fixture
def parsed(schema):
    """Return a function that reads a model's configuration as Triton does: an unknown field or value is an error."""
    return lambda folder: text_format.Parse((folder / "config.pbtxt").read_text(), schema.ModelConfig())


@pytest.fixture
def repository(tmp_path):
    return tmp_path / "repository"


def save(path, nodes, inputs, outputs, weights=None, kinds=None):
    """Save a model; `kinds` gives the element types of tensors that are not fp32, and None as a shape leaves it out."""
    kind = (kinds or {}).get
    graph = helper.make_graph(
        nodes,
        "graph",
        [helper.make_tensor_value_info(name, kind(name, TensorProto.FLOAT), shape) for name, shape in inputs.items()],
        [helper.make_tensor_value_info(name, kind(name, TensorProto.FLOAT), shape) for name, shape in outputs.items()],
        [numpy_helper.from_array(value, name) for name, value in (weights or {}).items()],
    )
    onnx.save(helper.make_model(graph, opset_imports=[helper.make_opsetid("", 20)], ir_version=9), path)
    return path


def listing(folder):
    return sorted(path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.is_file())


def test_the_defaults_field_by_field(small_path, repository, schema, parsed):
    made = package(small_path, repository)
    pb = schema
    expected = pb.ModelConfig(
        name="dense",
        backend="onnxruntime",
        default_model_filename="model.onnx",
        max_batch_size=8,
        input=[pb.ModelInput(name="x", data_type=pb.TYPE_FP32, dims=[16, 8, 8])],
        output=[pb.ModelOutput(name="y", data_type=pb.TYPE_FP32, dims=[10])],
        version_policy=pb.ModelVersionPolicy(latest=pb.ModelVersionPolicy.Latest(num_versions=1)),
        instance_group=[pb.ModelInstanceGroup(count=1, kind=pb.ModelInstanceGroup.KIND_CPU)],
        dynamic_batching=pb.ModelDynamicBatching(),
        model_warmup=[
            pb.ModelWarmup(
                name=f"batch {size}",
                batch_size=size,
                count=1,
                inputs={"x": pb.ModelWarmup.Input(data_type=pb.TYPE_FP32, dims=[16, 8, 8], zero_data=True)},
            )
            for size in (1, 8)
        ],
    )
    expected.parameters["execution_mode"].string_value = "0"
    found = parsed(repository / "dense")
    assert found == expected
    assert found.HasField("dynamic_batching")
    assert listing(repository) == ["dense/1/model.onnx", "dense/config.pbtxt"]
    assert (repository / "dense" / "1" / "model.onnx").read_bytes() == small_path.read_bytes()
    (one,) = made.models
    assert (one.max_batch, one.inputs, one.outputs) == (8, {"x": (16, 8, 8)}, {"y": (10,)})
    assert one.batch_difference < 1e-5


def test_every_option_field_by_field(small_path, repository, schema, parsed):
    serving = Serving(
        settings=Session(provider="tensorrt", threads=3, level="extended", arena=False),
        max_batch=32,
        preferred=(16, 4),
        delay=250,
        instances=2,
        gpus=(1, 0),
        warmup=5,
        warmup_data="random",
        versions=(1,),
    )
    package(small_path, repository, contents=Repository(name="net.v2"), serving=serving)
    found = parsed(repository / "net.v2")
    pb = schema
    accelerators = pb.ModelOptimizationPolicy.ExecutionAccelerators()
    accelerators.gpu_execution_accelerator.add(name="tensorrt").parameters["precision_mode"] = "FP32"
    accelerators.gpu_execution_accelerator.add(name="cuda").parameters["use_tf32"] = "0"
    assert found.name == "net.v2"
    assert found.max_batch_size == 32
    assert found.instance_group == [pb.ModelInstanceGroup(count=2, kind=pb.ModelInstanceGroup.KIND_GPU, gpus=[0, 1])]
    assert found.optimization == pb.ModelOptimizationPolicy(
        graph=pb.ModelOptimizationPolicy.Graph(level=1), execution_accelerators=accelerators
    )
    assert found.dynamic_batching == pb.ModelDynamicBatching(preferred_batch_size=[4, 16], max_queue_delay_microseconds=250)
    assert {key: value.string_value for key, value in found.parameters.items()} == {
        "execution_mode": "0",
        "intra_op_thread_count": "3",
        "enable_mem_arena": "false",
    }
    assert found.version_policy == pb.ModelVersionPolicy(specific=pb.ModelVersionPolicy.Specific(versions=[1]))
    assert [(warmup.batch_size, warmup.count) for warmup in found.model_warmup] == [(1, 5), (4, 5), (16, 5), (32, 5)]
    assert all(w.inputs["x"].WhichOneof("input_data_type") == "random_data" for w in found.model_warmup)


@pytest.mark.parametrize(("level", "number"), [("all", None), ("extended", 1), ("basic", -1), ("none", 2)])
def test_levels_are_the_backends_numbers(level, number, small_path, repository, parsed):
    serving = Serving(settings=Session(level=level), dynamic_batching=False, warmup=0, versions="all")
    package(small_path, repository, serving=serving)
    found = parsed(repository / "dense")
    assert (found.optimization.graph.level if found.optimization.HasField("graph") else None) == number
    assert not found.HasField("dynamic_batching")
    assert found.max_batch_size == 8  # clients may send batches all the same
    assert found.version_policy.HasField("all")
    assert not found.model_warmup


@pytest.mark.parametrize("tf32", [True, False])
def test_tf32_is_off_on_cuda_unless_asked_for(tf32, small_path, repository, parsed):
    package(small_path, repository, serving=Serving(settings=Session(provider="cuda", tf32=tf32, nhwc=tf32)))
    found = parsed(repository / "dense")
    (cuda,) = found.optimization.execution_accelerators.gpu_execution_accelerator
    assert cuda.name == "cuda"
    assert dict(cuda.parameters) == ({"use_tf32": "1", "prefer_nhwc": "1"} if tf32 else {"use_tf32": "0"})
    assert not found.instance_group[0].gpus  # none named: all that are there


def test_a_fixed_batch_is_no_batching(tmp_path, repository, parsed):
    nodes = [helper.make_node("Relu", ["x"], ["y"])]
    path = save(tmp_path / "fixed.onnx", nodes, {"x": [1, 3]}, {"y": [1, 3]})
    package(path, repository)
    found = parsed(repository / "fixed")
    assert found.max_batch_size == 0
    assert not found.HasField("dynamic_batching")
    assert (list(found.input[0].dims), list(found.output[0].dims)) == ([1, 3], [1, 3])
    assert [(warmup.batch_size, list(warmup.inputs["x"].dims)) for warmup in found.model_warmup] == [(1, [1, 3])]
    for asked in (Serving(max_batch=4), Serving(preferred=(2,)), Serving(delay=5)):
        with pytest.raises(ModelError, match=r"'x' has shape \[1, 3\], whose first axis is not dynamic"):
            package(path, repository, contents=Repository(name="asked"), serving=asked)


def test_a_value_a_sample_is_reshaped_and_a_lone_value_is_not(tmp_path, repository, parsed):
    nodes = [helper.make_node("ReduceSum", ["x", "axes"], ["y"], keepdims=0)]
    weights = {"axes": np.array([1], np.int64)}
    package(save(tmp_path / "batched.onnx", nodes, {"x": ["n", 3]}, {"y": ["n"]}, weights), repository)
    output = parsed(repository / "batched").output[0]
    assert list(output.dims) == [1]
    assert output.HasField("reshape")
    assert not output.reshape.shape
    package(save(tmp_path / "lone.onnx", nodes, {"x": [1, 3]}, {"y": []}, {"axes": np.array([0, 1], np.int64)}), repository)
    output = parsed(repository / "lone").output[0]
    assert list(output.dims) == [1]
    assert not output.HasField("reshape")


@pytest.mark.parametrize(
    ("kind", "name"),
    [
        (TensorProto.BOOL, "BOOL"),
        (TensorProto.UINT8, "UINT8"),
        (TensorProto.UINT16, "UINT16"),
        (TensorProto.UINT32, "UINT32"),
        (TensorProto.UINT64, "UINT64"),
        (TensorProto.INT8, "INT8"),
        (TensorProto.INT16, "INT16"),
        (TensorProto.INT32, "INT32"),
        (TensorProto.INT64, "INT64"),
        (TensorProto.FLOAT16, "FP16"),
        (TensorProto.FLOAT, "FP32"),
        (TensorProto.DOUBLE, "FP64"),
        (TensorProto.STRING, "STRING"),
    ],
)
def test_every_type_that_the_backend_takes(kind, name, tmp_path, repository, schema, parsed):
    nodes = [helper.make_node("Identity", ["x"], ["y"])]
    path = save(tmp_path / "typed.onnx", nodes, {"x": ["n", 2]}, {"y": ["n", 2]}, kinds={"x": kind, "y": kind})
    package(path, repository, serving=Serving(warmup_data="random"))
    found = parsed(repository / "typed")
    assert found.input[0].data_type == found.output[0].data_type == schema.DataType.Value(f"TYPE_{name}")
    how = found.model_warmup[0].inputs["x"].WhichOneof("input_data_type")
    assert how == ("random_data" if name.startswith("FP") else "zero_data")


def test_names_may_hold_anything(tmp_path, repository, parsed):
    inputs = 'x"\n} name: "é\\', "a b\x01'"
    nodes = [helper.make_node("Add", list(inputs), ["sum: {"])]
    path = save(tmp_path / "odd.onnx", nodes, {name: ["n", 2] for name in inputs}, {"sum: {": ["n", 2]})
    package(path, repository)
    found = parsed(repository / "odd")
    assert tuple(tensor.name for tensor in found.input) == inputs
    assert [tensor.name for tensor in found.output] == ["sum: {"]
    assert set(found.model_warmup[0].inputs) == set(inputs)


@pytest.mark.parametrize(
    ("versions", "policy"), [(None, ("specific", [1, 2])), ("latest", ("latest", None)), ((1,), ("specific", [1]))]
)
def test_dense_and_factored_are_two_versions(versions, policy, small_path, tmp_path, repository, parsed):
    factored = tmp_path / "factored.onnx"
    model = onnx.load(small_path)
    model.doc_string = "factored"
    onnx.save(model, factored)
    made = package(factored, repository, contents=Repository(name="net", dense=small_path), serving=Serving(versions=versions))
    assert listing(repository) == ["net/1/model.onnx", "net/2/model.onnx", "net/config.pbtxt"]
    assert (repository / "net/1/model.onnx").read_bytes() == small_path.read_bytes()
    assert (repository / "net/2/model.onnx").read_bytes() == factored.read_bytes()
    assert made.models[0].versions == {1: str(small_path), 2: str(factored)}
    found = parsed(repository / "net").version_policy
    assert found.WhichOneof("policy_choice") == policy[0]
    assert list(found.specific.versions) == (policy[1] or [])


def test_dense_and_factored_may_be_two_models(small_path, repository, parsed):
    made = package(small_path, repository, contents=Repository(name="net", dense=small_path, separate=True))
    assert [model.name for model in made.models] == ["net", "net-dense"]
    assert [parsed(repository / name).name for name in ("net", "net-dense")] == ["net", "net-dense"]
    with pytest.raises(ModelError, match="expected two models to package separately, got one"):
        package(small_path, repository, contents=Repository(name="other", separate=True))


def test_versions_that_take_other_things_are_refused(small_path, tmp_path, repository):
    other = save(tmp_path / "other.onnx", [helper.make_node("Relu", ["x"], ["y"])], {"x": ["n", 3]}, {"y": ["n", 3]})
    with pytest.raises(ModelError, match=r"got .* and x TYPE_FP32 \[-1, 3\] in .*other\.onnx: .*as two separate models"):
        package(other, repository, contents=Repository(dense=small_path))
    with pytest.raises(ModelError, match=r"expected versions latest, all, or some of \[1\], got \[1, 3\]"):
        package(other, repository, serving=Serving(versions=(1, 3)))
    assert not repository.exists()


@pytest.fixture
def external_path(small_model, tmp_path):
    """The small model with its weights in a folder beside it."""
    (tmp_path / "model" / "weights").mkdir(parents=True)
    path = tmp_path / "model" / "net.onnx"
    copy = onnx.ModelProto.FromString(small_model.SerializeToString())  # saving so moves the weights out of the model
    onnx.save(copy, path, save_as_external_data=True, location="weights/all.bin", size_threshold=0)
    return path


def test_external_data_come_along(external_path, small_path, repository):
    package(external_path, repository)
    assert listing(repository) == ["net/1/model.onnx", "net/1/weights/all.bin", "net/config.pbtxt"]
    feed = {"x": np.ones((2, 16, 8, 8), np.float32)}
    sessions = [ort.InferenceSession(str(p)) for p in (repository / "net/1/model.onnx", small_path)]
    np.testing.assert_array_equal(*(session.run(None, feed)[0] for session in sessions))


@pytest.mark.parametrize(
    ("location", "reason"),
    [
        ("../secret.bin", "are outside the model's folder"),
        ("/etc/hostname", "are outside the model's folder"),
        ("link.bin", "or a link"),
        ("none.bin", "are missing: expected a file"),
        ("", "are outside the model's folder"),
        ("./model.onnx", "are named model.onnx"),
    ],
)
def test_external_data_elsewhere_are_refused(location, reason, external_path, tmp_path, repository):
    data = external_path.parent / "weights" / "all.bin"
    (tmp_path / "secret.bin").write_bytes(data.read_bytes())
    (external_path.parent / "model.onnx").write_bytes(data.read_bytes())
    (external_path.parent / "link.bin").symlink_to(tmp_path / "secret.bin")
    model = onnx.load(external_path, load_external_data=False)
    for tensor in model.graph.initializer:
        next(entry for entry in tensor.external_data if entry.key == "location").value = location
    external_path.write_bytes(model.SerializeToString())
    with pytest.raises(ModelError, match=reason):
        package(external_path, repository)
    assert not repository.exists()
    assert not list(tmp_path.glob(".*"))


@pytest.mark.parametrize("kind", [TensorProto.FLOAT, TensorProto.INT64])
def test_an_answer_that_depends_on_its_neighbour_is_refused(kind, tmp_path, repository, parsed):
    nodes = [
        helper.make_node("Cast", ["x"], ["floats"], to=TensorProto.FLOAT),
        helper.make_node("ReduceMean", ["floats", "axes"], ["mean"], keepdims=1),
        helper.make_node("Sub", ["floats", "mean"], ["y"]),
    ]
    weights = {"axes": np.array([0], np.int64)}
    path = save(tmp_path / "mixing.onnx", nodes, {"x": ["n", 3]}, {"y": ["n", 3]}, weights, {"x": kind})
    with pytest.raises(ModelError, match=r"mixing\.onnx: an answer changes by .* with another request in its batch"):
        package(path, repository)
    assert not repository.exists()
    package(path, repository, contents=Repository(shapes={"x": (1, 3)}), serving=Serving(max_batch=0))
    assert list(parsed(repository / "mixing").input[0].dims) == [-1, 3]
    package(path, repository / "alone", serving=Serving(dynamic_batching=False))  # a client's own batches
    assert list(parsed(repository / "alone" / "mixing").input[0].dims) == [3]


@pytest.mark.parametrize("kind", [TensorProto.FLOAT, TensorProto.INT64])
def test_an_answer_that_depends_on_those_before_it_is_refused(kind, tmp_path, repository):
    """A sum along the first axis, as a network that takes time first: the first answer is right, the second one is not."""
    nodes = [helper.make_node("CumSum", ["x", "axis"], ["y"])]
    weights = {"axis": np.int64(0)}
    path = save(tmp_path / "causal.onnx", nodes, {"x": ["n", 3]}, {"y": ["n", 3]}, weights, {"x": kind, "y": kind})
    with pytest.raises(ModelError, match=r"causal\.onnx: an answer changes by .* with another request in its batch"):
        package(path, repository)


def test_integers_that_share_a_scale_and_answers_of_nan_are_refused(tmp_path, repository):
    nodes = [
        helper.make_node("Cast", ["x"], ["f"], to=TensorProto.FLOAT),
        helper.make_node("ReduceMax", ["f"], ["most"], keepdims=0),
        helper.make_node("Max", ["most", "one"], ["scale"]),
        helper.make_node("Div", ["f", "scale"], ["y"]),
    ]
    weights = {"one": np.float32(1)}
    path = save(tmp_path / "pixels.onnx", nodes, {"x": ["n", 30]}, {"y": ["n", 30]}, weights, {"x": TensorProto.UINT8})
    with pytest.raises(ModelError, match=r"pixels\.onnx: an answer changes by"):
        package(path, repository)
    nodes = [helper.make_node("Div", ["x", "zero"], ["q"]), helper.make_node("Sub", ["q", "q"], ["y"])]
    path = save(tmp_path / "nan.onnx", nodes, {"x": ["n", 3]}, {"y": ["n", 3]}, {"zero": np.float32(0)})
    with pytest.raises(ModelError, match=r"nan\.onnx: output 'y' is NaN on random inputs, so batching cannot be checked"):
        package(path, repository)


def test_an_answer_that_is_infinite_beside_another_one_alone_is_refused(tmp_path, repository):
    """The largest value of the batch scales all answers, and overflows where it is large."""
    nodes = [
        helper.make_node("ReduceMax", ["x"], ["most"], keepdims=0),
        helper.make_node("Mul", ["most", "large"], ["power"]),
        helper.make_node("Exp", ["power"], ["scale"]),
        helper.make_node("Mul", ["x", "scale"], ["h"]),
        helper.make_node("Abs", ["h"], ["y"]),
    ]
    path = save(tmp_path / "inf.onnx", nodes, {"x": ["n", 3]}, {"y": ["n", 3]}, {"large": np.float32(50)})
    with pytest.raises(ModelError, match=r"inf\.onnx: an answer changes by inf"):
        package(path, repository)


def test_an_output_whose_first_axis_is_not_the_batch_is_refused(tmp_path, repository):
    weights = {"shape": np.array([-1, 1], np.int64)}
    nodes = [helper.make_node("Reshape", ["x", "shape"], ["y"])]
    path = save(tmp_path / "flat.onnx", nodes, {"x": ["n", 3]}, {"y": ["m", 1]}, weights)
    with pytest.raises(ModelError, match=r"output 'y' of a batch of 2 has shape \[6, 1\]: its first axis is not the batch"):
        package(path, repository)


def test_a_warm_up_that_fails_here_is_refused(tmp_path, repository, parsed):
    nodes = [helper.make_node("Split", ["x", "sizes"], ["a", "b"], axis=1)]
    inputs, outputs = {"x": [1, 4], "sizes": [2]}, {"a": [1, "k"], "b": [1, "l"]}
    path = save(tmp_path / "split.onnx", nodes, inputs, outputs, kinds={"sizes": TensorProto.INT64})
    with pytest.raises(ModelError, match="a warm-up request with zero data fails, so Triton would not serve the model"):
        package(path, repository)
    package(path, repository, serving=Serving(warmup=0))
    assert not parsed(repository / "split").model_warmup


def test_axes_of_any_size_need_a_shape_to_be_run(tmp_path, repository, parsed):
    path = save(tmp_path / "text.onnx", [helper.make_node("Relu", ["x"], ["y"])], {"x": ["n", "t"]}, {"y": ["n", "t"]})
    with pytest.raises(ModelError, match=r"dynamic axes, \[-1, -1\]: give the shape of one request, such as x=8,8"):
        package(path, repository)
    with pytest.raises(ModelError, match=r"input 'x': expected shape \[-1, -1\], got \[1, 2, 3\]"):
        package(path, repository, contents=Repository(shapes={"x": (1, 2, 3)}))
    with pytest.raises(ModelError, match="shapes: unknown input 'z'"):
        package(path, repository, contents=Repository(shapes={"z": (1, 2)}))
    package(path, repository, contents=Repository(shapes={"x": (1, 7)}))
    found = parsed(repository / "text")
    assert list(found.input[0].dims) == [-1]
    assert list(found.model_warmup[0].inputs["x"].dims) == [7]


@pytest.mark.parametrize(
    ("kind", "shape", "reason"),
    [
        (TensorProto.BFLOAT16, ["n", 2], r"'x' has type tensor\(bfloat16\), which Triton's"),
        (TensorProto.FLOAT, None, "the graph gives no shape for 'x'"),
        (TensorProto.FLOAT, ["n", 0], r"'x' has shape \[-1, 0\]: Triton needs axes of size 1 or more"),
    ],
)
def test_tensors_that_triton_does_not_take(kind, shape, reason, tmp_path, repository):
    nodes = [helper.make_node("Identity", ["x"], ["y"])]
    path = save(tmp_path / "odd.onnx", nodes, {"x": shape}, {"y": shape}, kinds={"x": kind, "y": kind})
    with pytest.raises(ModelError, match=reason):
        package(path, repository)


def test_what_is_there_stays_unless_it_is_to_be_overwritten(small_path, tmp_path, repository):
    package(small_path, repository, contents=Repository(name="net", dense=small_path))
    package(small_path, repository, contents=Repository(name="other"))
    with pytest.raises(ModelError, match="net: is not empty"):
        package(small_path, repository, contents=Repository(name="net"))
    garbage = tmp_path / "garbage.onnx"
    garbage.write_bytes(b"garbage")
    before = listing(repository)
    with pytest.raises(ModelError, match=r"garbage\.onnx: not an ONNX model"):
        package(garbage, repository, contents=Repository(name="net", overwrite=True))
    assert listing(repository) == before
    package(small_path, repository, contents=Repository(name="net", overwrite=True))
    assert listing(repository) == ["net/1/model.onnx", "net/config.pbtxt", "other/1/model.onnx", "other/config.pbtxt"]
    assert not list(tmp_path.glob(".*"))


def test_a_folder_that_is_no_triton_model_is_never_removed(small_path, tmp_path, repository):
    (repository / "home").mkdir(parents=True)
    (repository / "home" / "letter.txt").write_text("dear")
    (repository / "link").symlink_to(tmp_path)
    (repository / "file").write_text("")
    for name, reason in (("home", "holds no config.pbtxt"), ("link", "not a folder"), ("file", "not a folder")):
        with pytest.raises(ModelError, match=reason):
            package(small_path, repository, contents=Repository(name=name, overwrite=True))
    with pytest.raises(ModelError, match="not a folder: expected a Triton model repository"):
        package(small_path, repository / "file")
    with pytest.raises(ModelError, match=r"repository: the folder .*missing does not exist: create it"):
        package(small_path, tmp_path / "missing" / "repository")
    (repository / "empty").mkdir()
    package(small_path, repository, contents=Repository(name="empty"))
    assert (repository / "home" / "letter.txt").read_text() == "dear"


@pytest.mark.parametrize("name", ["../up", "a/b", ".hidden", "with space", "-x", "ü"])
def test_names_stay_in_the_repository(name, small_path, tmp_path, repository):
    with pytest.raises(ModelError, match="expected a model name of letters"):
        package(small_path, repository, contents=Repository(name=name))
    assert not repository.exists()


@pytest.mark.parametrize(
    ("serving", "reason"),
    [
        (Serving(settings=Session(provider="tpu")), "unknown provider 'tpu'"),
        (Serving(settings=Session(provider="cuda", cuda_graph=True)), "CUDA graphs need inputs at fixed addresses"),
        (Serving(settings=Session(provider="cuda", conv_search="heuristic")), "has no place in config.pbtxt: omit conv_search"),
        (Serving(gpus=(0,)), r"expected provider cuda or tensorrt for GPUs \[0\], got 'cpu'"),
        (Serving(instances=0), "expected 1 or more instances, got 0"),
        (Serving(delay=-1), "got a negative number"),
        (Serving(max_batch=-1), "got a negative number"),
        (Serving(warmup_data="ones"), "expected warm-up data zero or random, got 'ones'"),
        (Serving(preferred=(2,), dynamic_batching=False), "need dynamic batching, which is off"),
        (Serving(preferred=(16,), max_batch=8), "from 1 to the largest batch, 8, got 16"),
        (Serving(preferred=(0,)), "from 1 to the largest batch, 8, got 0"),
    ],
)
def test_what_triton_would_refuse_is_refused_here(serving, reason, small_path, repository):
    with pytest.raises(ModelError, match=reason):
        package(small_path, repository, serving=serving)
    assert not repository.exists()


def test_preferred_sizes_raise_the_default_batch(small_path, repository, parsed):
    package(small_path, repository, serving=Serving(preferred=(32,)))
    assert parsed(repository / "dense").max_batch_size == 32


def test_weights_listed_as_inputs_are_not_asked_of_clients(tmp_path, repository, parsed):
    model = make_model(
        [helper.make_node("MatMul", ["x", "w"], ["y"])], {"w": np.eye(3, dtype=np.float32)}, {"x": ["n", 3]}, {"y": ["n", 3]}
    )
    model.graph.input.append(helper.make_tensor_value_info("w", TensorProto.FLOAT, [3, 3]))
    onnx.save(model, tmp_path / "old.onnx")
    package(tmp_path / "old.onnx", repository)
    assert [tensor.name for tensor in parsed(repository / "old").input] == ["x"]
