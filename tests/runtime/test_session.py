"""Sessions run where they were asked to, inputs fit, and the profile says where every node was."""

import contextlib

import numpy as np
import onnx
import onnxruntime as ort
import pytest
from conftest import make_model
from onnx import TensorProto, helper

from tensorrail_runtime import ModelError, Settings, bench, footprint, open_session, parity, placement, random_inputs
from tensorrail_runtime.inputs import batches_of, load_arrays, parse_shapes

HAS_PROVIDER = "CUDAExecutionProvider" in ort.get_available_providers()


@pytest.mark.skipif(not HAS_PROVIDER, reason="this ONNX Runtime has no CUDA provider to fall back from")
def test_a_silent_fallback_is_an_error_with_onnx_runtimes_reason(small_path, capfd):
    reason = ""
    try:
        open_session(small_path, provider="cuda")
    except ModelError as error:
        reason = str(error)
    if not reason:
        pytest.skip("there is a GPU here, and no fallback")
    assert "fell back to CPUExecutionProvider" in reason
    assert any(word in reason for word in ("libcu", "CUDA", "cuda", "driver")), reason
    assert "\n" not in reason
    assert capfd.readouterr().err == ""  # the reason is in the error, not beside it


def test_libraries_of_cuda_are_found_wherever_they_are_installed(small_path, tmp_path, monkeypatch):
    libraries = tmp_path / "nvidia" / "cudnn" / "lib"
    libraries.mkdir(parents=True)
    asked = []
    monkeypatch.syspath_prepend(str(tmp_path))
    monkeypatch.setattr(ort, "get_available_providers", lambda: ["CUDAExecutionProvider"])
    monkeypatch.setattr(ort, "preload_dlls", lambda directory=None: asked.append(directory), raising=False)
    with contextlib.suppress(ModelError):  # there may be no GPU here
        open_session(small_path, provider="cuda")
    assert asked[0] is None
    assert str(libraries) in asked


@pytest.mark.gpu
def test_a_gpu_runs_every_node_and_its_outputs_stay_there(small_path):
    settings = Settings(provider="cuda")
    assert placement(small_path, settings=settings).elsewhere == ()
    found = bench([small_path, small_path], seconds=0.2, settings=settings, io_binding=True)
    assert not found.transfers
    assert found.machine.gpu is not None
    assert parity(small_path, small_path, settings=settings).holds


def test_settings_that_do_not_fit_together_are_refused(small_path):
    for settings, reason in (
        (Settings(level="most"), "unknown graph optimization level 'most': expected one of none, basic"),
        (Settings(threads=-1), "threads are 0"),
        (Settings(cuda_graph=True), "of the CUDA provider"),
    ):
        with pytest.raises(ModelError, match=reason):
            open_session(small_path, settings=settings)


def test_levels_and_threads_reach_the_session(small_path):
    session = open_session(small_path, settings=Settings(level="none", threads=1, arena=False))
    options = session.get_session_options()
    assert options.graph_optimization_level == ort.GraphOptimizationLevel.ORT_DISABLE_ALL
    assert (options.intra_op_num_threads, options.enable_cpu_mem_arena) == (1, False)


def test_every_node_that_ran_is_placed(small_path):
    placed = placement(small_path, settings=Settings(level="none"), batch=2)
    assert [node.op for node in placed.nodes] == ["Conv", "Relu", "GlobalAveragePool", "Flatten", "Gemm"]
    assert placed.providers == {"CPUExecutionProvider": 5}
    assert placed.elsewhere == ()
    assert sum(node.share for node in placed.nodes) == pytest.approx(1)


def test_nodes_of_a_loop_are_summed_over_its_iterations(tmp_path):
    body = helper.make_graph(
        [helper.make_node("Relu", ["s"], ["t"], "inside"), helper.make_node("Identity", ["go"], ["on"], "go_on")],
        "body",
        [
            helper.make_tensor_value_info("i", TensorProto.INT64, []),
            helper.make_tensor_value_info("go", TensorProto.BOOL, []),
            helper.make_tensor_value_info("s", TensorProto.FLOAT, ["n"]),
        ],
        [
            helper.make_tensor_value_info("on", TensorProto.BOOL, []),
            helper.make_tensor_value_info("t", TensorProto.FLOAT, ["n"]),
        ],
    )
    node = helper.make_node("Loop", ["trips", "", "x"], ["y"], "loop", body=body)
    onnx.save(make_model([node], {"trips": np.array(4)}, {"x": ["n"]}, {"y": ["n"]}), tmp_path / "m.onnx")
    names = [node.name for node in placement(tmp_path / "m.onnx", settings=Settings(level="none")).nodes]
    assert sorted(names) == ["go_on", "inside", "loop"]


def test_random_inputs_have_the_types_and_shapes_asked_for(tmp_path):
    inputs = [
        helper.make_tensor_value_info("a", TensorProto.FLOAT16, ["n", 3]),
        helper.make_tensor_value_info("b", TensorProto.INT64, ["n", "m"]),
    ]
    nodes = [helper.make_node("Identity", ["a"], ["y"]), helper.make_node("Identity", ["b"], ["z"])]
    outputs = [
        helper.make_tensor_value_info("y", TensorProto.FLOAT16, ["n", 3]),
        helper.make_tensor_value_info("z", TensorProto.INT64, ["n", "m"]),
    ]
    model = helper.make_model(
        helper.make_graph(nodes, "g", inputs, outputs), opset_imports=[helper.make_opsetid("", 20)], ir_version=9
    )
    onnx.save(model, tmp_path / "m.onnx")
    session = open_session(tmp_path / "m.onnx")
    feed = random_inputs(session, 2, shapes={"b": (2, 5)})
    assert {name: (value.dtype, value.shape) for name, value in feed.items()} == {
        "a": (np.float16, (2, 3)),
        "b": (np.int64, (2, 5)),
    }
    for shapes, reason in (({"c": (1,)}, "shape came for input 'c'"), ({"a": (1, 4)}, r"has shape \['n', 3\], and \[1, 4\]")):
        with pytest.raises(ModelError, match=reason):
            random_inputs(session, shapes=shapes)


def test_shapes_are_written_with_a_name():
    assert parse_shapes(["x=1,3,8,8", "y=2x4"]) == {"x": (1, 3, 8, 8), "y": (2, 4)}
    for text in ("1,2", "x=1,-2", "x=", "x=a"):
        with pytest.raises(ModelError, match="a shape is written as name=1,3,224,224"):
            parse_shapes([text])


def test_data_files_are_plain_arrays(tmp_path, small_path, rng):
    np.savez(tmp_path / "x.npz", x=rng.standard_normal((5, 16, 8, 8)).astype(np.float32), labels=np.arange(5))
    arrays = load_arrays(tmp_path / "x.npz")
    feeds = batches_of(open_session(small_path), arrays, 2)
    assert [feed["x"].shape[0] for feed in feeds] == [2, 2, 1]
    np.savez(tmp_path / "pickled.npz", x=np.array([{}], object))
    np.savez(tmp_path / "empty.npz", x=np.zeros((0, 3)))
    (tmp_path / "garbage.npz").write_bytes(b"garbage")
    np.save(tmp_path / "single.npy", np.zeros(3))
    for name, reason in (
        ("pickled.npz", "not an npz file of plain arrays"),
        ("empty.npz", "holds no data"),
        ("garbage.npz", "not an npz file"),
        ("single.npy", "a single array came"),
        ("none.npz", "cannot be read"),
    ):
        with pytest.raises(ModelError, match=reason):
            load_arrays(tmp_path / name)
    with pytest.raises(ModelError, match="no array for input 'x'"):
        batches_of(open_session(small_path), {"labels": np.arange(5)}, 2)


def test_a_footprint_is_taken_in_a_process_of_its_own(small_path, tmp_path):
    found = footprint(small_path)
    assert found.load_ms > 0
    assert found.host_peak_mib is not None
    assert found.gpu_mib is None
    with pytest.raises(ModelError, match=r"none\.onnx: ONNX Runtime cannot load it"):
        footprint(tmp_path / "none.onnx")
