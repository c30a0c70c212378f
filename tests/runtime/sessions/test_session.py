"""Sessions run where they were asked to, inputs fit, and the profile says where every node was."""

import contextlib
import os
import struct
import zipfile
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import onnx
import onnxruntime as ort
import pydantic
import pytest
from conftest import make_model
from onnx import TensorProto, helper

from tensorrail_runtime import ModelError, Session, bench, footprint, open_session, parity, placement, random_inputs
from tensorrail_runtime.feeds.loading import load_batches
from tensorrail_runtime.measure.timing import Timing
from tensorrail_runtime.records import first_problem, write_text
from tensorrail_runtime.sessions.fresh import fresh
from tensorrail_runtime.sessions.inputs import load_arrays, parse_shapes
from tensorrail_runtime.sessions.machine import gpu_memory_used, machine, processors

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
    settings = Session(provider="cuda")
    assert placement(small_path, settings=settings).elsewhere == ()
    found = bench([small_path, small_path], Timing(seconds=0.2, io_binding=True), settings)
    assert not found.transfers
    assert found.machine.gpu is not None
    assert parity(small_path, small_path, settings=settings).holds


def test_settings_that_do_not_fit_together_are_refused(small_path):
    for settings, reason in (
        (Session(level="most"), "unknown graph optimization level 'most': expected one of none, basic"),
        (Session(threads=-1), "threads, got -1"),
        (Session(cuda_graph=True), "need the CUDA provider"),
        (Session(provider="tensorrt", tf32=True), "TensorRT chooses layouts by itself, and uses TF32 unless"),
        (Session(provider="tensorrt", nhwc=True), "TensorRT chooses layouts by itself"),
    ):
        with pytest.raises(ModelError, match=reason):
            open_session(small_path, settings=settings)


def test_what_tensorrt_does_not_take_runs_on_cuda(small_path, monkeypatch):
    asked = []

    def opened(*_, providers, **__):
        asked.extend(providers)
        raise RuntimeError("no device")

    monkeypatch.setattr(ort, "get_available_providers", lambda: ["TensorrtExecutionProvider", "CUDAExecutionProvider"])
    monkeypatch.setattr(ort, "InferenceSession", opened)
    with pytest.raises(ModelError, match="no device"):
        open_session(small_path, provider="tensorrt")
    assert asked == [
        ("TensorrtExecutionProvider", {"trt_cuda_graph_enable": "0"}),
        ("CUDAExecutionProvider", {"use_tf32": "0"}),
    ]


@pytest.mark.parametrize(("visible", "asked"), [("", "0"), ("1", "1"), ("GPU-3f2,0", "GPU-3f2"), ("MIG-1", "0")])
def test_the_gpu_that_is_described_is_the_one_that_cuda_uses(visible, asked, tmp_path, monkeypatch):
    program = tmp_path / "nvidia-smi"
    program.write_text(f'#!/bin/sh\necho "$@" > {tmp_path}/asked\necho "7 MiB"\n')
    program.chmod(0o755)
    monkeypatch.setenv("PATH", str(tmp_path), prepend=os.pathsep)
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", visible)
    assert gpu_memory_used() == 7
    assert f"--id={asked}\n" in (tmp_path / "asked").read_text()
    assert machine(gpu=True).gpu is None  # what it says is no description
    program.write_text("#!/bin/sh\necho '[N/A]'\n")
    assert gpu_memory_used() is None


def test_a_linked_model_is_read_beside_its_link_in_a_fresh_process_too(small_model, tmp_path):
    """As in the Hugging Face cache, where files are links to blobs that have other names."""
    copy = onnx.ModelProto.FromString(small_model.SerializeToString())  # saving so moves the weights out of the model
    (tmp_path / "blobs").mkdir()
    onnx.save(copy, tmp_path / "net.onnx", save_as_external_data=True, location="net.bin", size_threshold=0)
    for name in ("net.onnx", "net.bin"):
        blob = tmp_path / "blobs" / f"{len(name)}{name[-1]}"
        (tmp_path / name).rename(blob)
        (tmp_path / name).symlink_to(blob)
    assert len(bench([tmp_path / "net.onnx"], Timing(seconds=0.05, processes=2)).latencies) == 1


def test_levels_and_threads_reach_the_session(small_path):
    session = open_session(small_path, settings=Session(level="none", threads=1, arena=False))
    options = session.get_session_options()
    assert options.graph_optimization_level == ort.GraphOptimizationLevel.ORT_DISABLE_ALL
    assert (options.intra_op_num_threads, options.enable_cpu_mem_arena) == (1, False)


def test_every_node_that_ran_is_placed(small_path):
    placed = placement(small_path, settings=Session(level="none"), batch=2)
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
    names = [node.name for node in placement(tmp_path / "m.onnx", settings=Session(level="none")).nodes]
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
    for shapes, reason in (({"c": (1,)}, "unknown input 'c'"), ({"a": (1, 4)}, r"expected shape \['n', 3\], got \[1, 4\]")):
        with pytest.raises(ModelError, match=reason):
            random_inputs(session, shapes=shapes)


def test_shapes_are_written_with_a_name():
    assert parse_shapes(["x=1,3,8,8", "y=2x4"]) == {"x": (1, 3, 8, 8), "y": (2, 4)}
    for text in ("1,2", "x=1,-2", "x=", "x=a"):
        with pytest.raises(ModelError, match="expected a shape such as name=1,3,224,224"):
            parse_shapes([text])


def test_data_files_are_plain_arrays(tmp_path, small_path, rng):
    np.savez(tmp_path / "x.npz", x=rng.standard_normal((5, 16, 8, 8)).astype(np.float32), labels=np.arange(5))
    loaded = load_batches(tmp_path / "x.npz", open_session(small_path), batch=2)
    assert [feed["x"].shape[0] for feed in loaded.feeds] == [2, 2, 1]
    np.savez(tmp_path / "pickled.npz", x=np.array([{}], object))
    np.savez(tmp_path / "empty.npz", x=np.zeros((0, 3)))
    (tmp_path / "garbage.npz").write_bytes(b"garbage")
    np.save(tmp_path / "single.npy", np.zeros(3))
    for name, reason in (
        ("pickled.npz", "not an npz file of plain arrays"),
        ("empty.npz", "holds no data"),
        ("garbage.npz", "not an npz file"),
        ("single.npy", "expected an npz file of named arrays, got a single array"),
        ("none.npz", "cannot be read"),
    ):
        with pytest.raises(ModelError, match=reason):
            load_arrays(tmp_path / name)
    with pytest.raises(ModelError, match="no array for input 'x'; expected x, got none"):
        load_batches({"labels": np.arange(5)}, open_session(small_path), batch=2)


def npy(shape, descr="<f4", data=b""):
    head = f"{{'descr': {descr!r}, 'fortran_order': False, 'shape': {shape}, }}".ljust(117) + "\n"
    return b"\x93NUMPY\x01\x00" + struct.pack("<H", len(head)) + head.encode() + data


@pytest.mark.parametrize(
    ("name", "content", "reason"),
    [
        ("readme.txt", b"hi", "readme.txt is not an array"),
        ("folder/", b"", "folder/ is not an array"),
        ("x.npy", npy((10**7, 10**7)), r"its header says shape \(10000000, 10000000\), but it has 0 bytes"),
        ("x.npy", npy((2, 2), data=b"\0" * 12), "its header says shape"),
        ("x.npy", npy((0, 10**30)), r"not an npz file of plain arrays \("),
        ("x.npy", npy((-1, 4), data=b"\0" * 16), r"not an npz file of plain arrays \("),
        ("x.npy", npy((1,), "<x9"), r"not an npz file of plain arrays \("),
        ("x.npy", npy("(" * 9), r"not an npz file of plain arrays \("),
        ("x.npy", b"\x93NUMPY\x09\x00", r"not an npz file of plain arrays \("),
    ],
)
def test_members_that_are_no_arrays_or_claim_more_than_they_hold_are_refused(name, content, reason, tmp_path):
    with zipfile.ZipFile(tmp_path / "x.npz", "w") as file:
        file.writestr(name, content)
    with pytest.raises(ModelError, match=reason):
        load_arrays(tmp_path / "x.npz")


def test_a_corrupted_stream_is_refused(tmp_path, rng):
    path = tmp_path / "x.npz"
    np.savez_compressed(path, x=rng.standard_normal((300, 8)))
    content = path.read_bytes()
    entry = content.index(b"PK\x01\x02")  # flags 8 bytes behind it, the compression's method 10
    for start, garbage in ((100, b"\xff" * 300), (entry + 8, b"\x01"), (entry + 10, b"\x62")):
        path.write_bytes(content[:start] + garbage + content[start + len(garbage) :])
        with pytest.raises(ModelError, match="not an npz file of plain arrays"):
            load_arrays(path)


def test_arrays_of_every_plain_type_are_read_as_they_were_written(tmp_path, rng):
    arrays = {
        "a": np.asfortranarray(rng.standard_normal((3, 4)).astype(np.float16)),
        "b": np.arange(5),
        "c": np.array(3.0),
        "d": np.array([True]),
    }
    for save in (np.savez, np.savez_compressed):
        save(tmp_path / "x.npz", **arrays)
        found = load_arrays(tmp_path / "x.npz")
        assert list(found) == list(arrays)
        for name, array in arrays.items():
            assert found[name].dtype == array.dtype
            np.testing.assert_array_equal(found[name], array)


def test_inputs_that_would_take_the_machines_memory_are_refused(tmp_path):
    shape = [10**7, 10**7]
    onnx.save(make_model([helper.make_node("Relu", ["x"], ["y"])], {}, {"x": shape}, {"y": shape}), tmp_path / "huge.onnx")
    for call in (
        lambda: parity(tmp_path / "huge.onnx", tmp_path / "huge.onnx"),
        lambda: bench([tmp_path / "huge.onnx"]),
        lambda: placement(tmp_path / "huge.onnx"),
    ):
        with pytest.raises(ModelError, match=r"input 'x' of shape \[10000000, 10000000\] is too large"):
            call()


def test_what_does_not_run_is_said_once(small_path, tmp_path, capfd):
    node = helper.make_node("Conv", ["x", "w"], ["y"])
    model = make_model([node], {"w": np.ones((2, 3, 3, 3), np.float32)}, {"x": ["n", 3, "h", "w_"]}, {"y": ["n", 2, "p", "q"]})
    onnx.save(model, tmp_path / "m.onnx")
    with pytest.raises(ModelError, match="cannot run the model on these inputs"):
        bench([tmp_path / "m.onnx"])
    assert capfd.readouterr().err == ""


def test_a_fresh_process_imports_nothing_of_the_current_folder(small_path, tmp_path, monkeypatch):
    (tmp_path / "statistics.py").write_text("raise SystemExit(3)\n")
    path = small_path.resolve()
    monkeypatch.chdir(tmp_path)
    assert footprint(path).load_ms > 0


def test_a_footprint_does_not_count_what_this_package_reads_of_the_model(small_path, tmp_path, monkeypatch):
    """Importing onnx takes about as much memory as a small model."""
    (tmp_path / "first").mkdir()
    (tmp_path / "first" / "onnx.py").write_text("raise ImportError('imported while the model was measured')\n")
    paths = [str(tmp_path / "first"), *filter(None, [os.environ.get("PYTHONPATH")])]
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join(paths))
    assert footprint(small_path).load_ms > 0


@pytest.mark.parametrize(
    ("function", "request_", "reason"),
    [
        ("signal:raise_signal", 9, r"that ran a\.onnx, b\.onnx was ended by signal 9 \(SIGKILL\), out of memory\?"),
        ("signal:raise_signal", 11, r"that ran a\.onnx, b\.onnx was ended by signal 11 \(SIGSEGV\)$"),
        ("os:_exit", 3, r"that ran a\.onnx, b\.onnx ended with exit code 3 and no message"),
    ],
)
def test_how_a_fresh_process_ended_is_told(function, request_, reason):
    with pytest.raises(ModelError, match=f"the fresh process {reason}"):
        fresh(function, request_, ["a.onnx", "b.onnx"])


def test_a_footprint_is_not_that_of_the_process_that_asks(small_path):
    held = np.ones(2**26)  # 512 MiB here
    found = footprint(small_path)
    assert held[0]
    assert found.host_peak_mib is None or 0 < found.host_peak_mib < 256


def test_a_pipe_is_written_to_and_a_link_stays_a_link(tmp_path):
    os.mkfifo(tmp_path / "pipe")
    with ThreadPoolExecutor(1) as pool:
        read = pool.submit((tmp_path / "pipe").read_text)
        write_text(tmp_path / "pipe", "all of it")
        assert read.result(timeout=30) == "all of it"
    assert (tmp_path / "pipe").is_fifo()
    (tmp_path / "target").write_text("before")
    (tmp_path / "link").symlink_to(tmp_path / "target")
    write_text(tmp_path / "link", "after")
    assert (tmp_path / "link").is_symlink()
    assert (tmp_path / "target").read_text() == "after"


def test_a_footprint_is_taken_in_a_process_of_its_own(small_path, tmp_path):
    found = footprint(small_path)
    assert found.load_ms > 0
    assert found.host_peak_mib is not None
    assert found.gpu_mib is None
    with pytest.raises(ModelError, match=r"expected shape \['batch', 16, 8, 8\], got \[2, 16, 8, 9\]"):
        footprint(small_path, shapes={"x": (2, 16, 8, 9)})
    with pytest.raises(ModelError, match=r"none\.onnx: cannot be read \(No such file or directory\): expected an ONNX model"):
        footprint(tmp_path / "none.onnx")


def test_an_array_of_another_shape_is_named_with_the_shape_of_its_input(small_path):
    for shape in ((4, 3, 8, 8), (4, 16, 8)):
        with pytest.raises(ModelError, match=r"input 'x' expects shape \[batch, 16, 8, 8\], got an array of shape \[4, "):
            load_batches({"x": np.zeros(shape, np.float32)}, open_session(small_path), batch=2)


@pytest.mark.skipif(not hasattr(os, "sched_setaffinity"), reason="this system binds no process to processors")
def test_only_the_processors_that_this_process_may_use_count():
    allowed = os.sched_getaffinity(0)
    assert processors() == len(allowed)
    os.sched_setaffinity(0, {min(allowed)})
    try:
        assert processors() == 1
    finally:
        os.sched_setaffinity(0, allowed)


def test_what_python_prints_at_its_start_is_no_answer(tmp_path, monkeypatch):
    (tmp_path / "sitecustomize.py").write_text("print('hello')\n")
    (tmp_path / "talks.py").write_text("def answer(request):\n    print('by the way')\n    return f'{request}!'\n")
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    assert fresh("talks:answer", "yes") == "yes!"


def test_a_value_in_a_message_takes_no_time_to_write():
    """Ten lists that each hold the one before ten times are a text of 10 GB."""
    nested = ["x"] * 10
    for _ in range(10):
        nested = [nested] * 10

    class Seeded(pydantic.BaseModel):
        seed: int

    with pytest.raises(pydantic.ValidationError) as found:
        Seeded.model_validate({"seed": nested})
    assert first_problem(found.value).startswith("seed: expected a valid integer, got [[[")
    assert len(first_problem(found.value)) < 200
