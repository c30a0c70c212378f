"""Which axis is the batch, what is run together, and what waits while the model is busy."""

import asyncio
import threading

import numpy as np
import onnx
import pytest
from conftest import make_model
from onnx import TensorProto, helper

from tensorrail_runtime.errors import ModelError
from tensorrail_runtime.serve.http.options import RequestLimits, ServeOptions
from tensorrail_runtime.serve.protocol.signature import Signature
from tensorrail_runtime.serve.replicas.batch_axis import find_batch_axis
from tensorrail_runtime.serve.replicas.batching import Answer, pack, run_batch
from tensorrail_runtime.serve.replicas.differences import differences
from tensorrail_runtime.serve.replicas.gathering import Gathering, Waiting
from tensorrail_runtime.sessions.session import open_session


def opened(path, model):
    onnx.save(model, path)
    session = open_session(path, threads=1)
    return session, Signature.of(session)


def one_node(op, inputs, outputs, weights=None, types=None, opset=20, **attributes):
    """Return a model of one node with the shapes given, float unless `types` says otherwise."""
    node = helper.make_node(op, [*inputs, *(weights or {})], list(outputs), "node", **attributes)
    return of_nodes([node], inputs, outputs, weights, types, opset)


def of_nodes(nodes, inputs, outputs, weights=None, types=None, opset=20):
    kinds = dict.fromkeys([*inputs, *outputs], TensorProto.FLOAT) | (types or {})
    graph = helper.make_graph(
        nodes,
        "graph",
        [helper.make_tensor_value_info(name, kinds[name], shape) for name, shape in inputs.items()],
        [helper.make_tensor_value_info(name, kinds[name], shape) for name, shape in outputs.items()],
        [onnx.numpy_helper.from_array(value, name) for name, value in (weights or {}).items()],
    )
    return helper.make_model(graph, opset_imports=[helper.make_opsetid("", opset)], ir_version=9)


def test_the_first_axis_is_the_batch_of_an_ordinary_network(small_path):
    session = open_session(small_path, threads=1)
    assert find_batch_axis(session, Signature.of(session)) == ({"x": 0, "y": 0}, "along axis 0 (batch)")


def test_time_is_not_taken_for_the_batch(tmp_path, rng):
    weights = {
        "W": rng.standard_normal((1, 16, 3)).astype(np.float32),
        "R": rng.standard_normal((1, 16, 4)).astype(np.float32),
    }
    node = helper.make_node("LSTM", ["x", "W", "R"], ["y"], "lstm", hidden_size=4)
    model = make_model([node], weights, {"x": ["time", "batch", 3]}, {"y": ["time", 1, "batch", 4]})
    session, signature = opened(tmp_path / "m.onnx", model)
    assert find_batch_axis(session, signature) == ({"x": 1, "y": 2}, "along axis batch")


def test_a_network_that_looks_at_the_whole_batch_is_not_batched(tmp_path, rng):
    inputs, outputs = {"x": ["batch", 4]}, {"y": ["batch", 4]}
    session, signature = opened(tmp_path / "s.onnx", one_node("Softmax", inputs, outputs, axis=0))
    axes, reason = find_batch_axis(session, signature)
    assert axes is None
    assert reason.startswith("axis 0 (batch): output 'y' differs between a batch and its parts")
    # One scale for all rows, as dynamic quantization has.
    nodes = [
        helper.make_node("DynamicQuantizeLinear", ["x"], ["q", "scale", "zero"]),
        helper.make_node("DequantizeLinear", ["q", "scale", "zero"], ["y"]),
    ]
    session, signature = opened(tmp_path / "q.onnx", make_model(nodes, {}, inputs, outputs))
    assert find_batch_axis(session, signature)[0] is None


def test_a_scale_or_a_length_that_integers_share_is_no_batch(tmp_path, rng):
    """A dark image beside a bright one, and a short sequence beside a long one."""
    scale = [
        helper.make_node("Cast", ["x"], ["f"], to=TensorProto.FLOAT),
        helper.make_node("DynamicQuantizeLinear", ["f"], ["q", "scale", "zero"]),
        helper.make_node("MatMulInteger", ["q", "w", "zero"], ["i"]),
        helper.make_node("Cast", ["i"], ["p"], to=TensorProto.FLOAT),
        helper.make_node("Mul", ["p", "scale"], ["y"]),
    ]
    weights = {"w": rng.integers(-100, 100, (16, 4)).astype(np.int8)}
    types = {"x": TensorProto.UINT8}
    session, signature = opened(tmp_path / "s.onnx", of_nodes(scale, {"x": ["N", 16]}, {"y": ["N", 4]}, weights, types))
    assert find_batch_axis(session, signature)[0] is None
    longest = [
        helper.make_node("ReduceMax", ["x"], ["most"], keepdims=0),
        helper.make_node("Add", ["x", "most"], ["y"]),
    ]
    types = {"x": TensorProto.INT64, "y": TensorProto.INT64}
    session, signature = opened(tmp_path / "l.onnx", of_nodes(longest, {"x": ["N"]}, {"y": ["N"]}, {}, types))
    assert find_batch_axis(session, signature)[0] is None
    table = {"w": rng.standard_normal((2, 8)).astype(np.float32)}  # an index of two values: no larger one runs
    nodes = [helper.make_node("Gather", ["w", "x"], ["y"])]
    types = {"x": TensorProto.INT64}
    session, signature = opened(tmp_path / "g.onnx", of_nodes(nodes, {"x": ["N", 3]}, {"y": ["N", 3, 8]}, table, types))
    assert find_batch_axis(session, signature)[0] == {"x": 0, "y": 0}


@pytest.mark.parametrize(
    ("model", "reason"),
    [
        (one_node("Relu", {"x": [2, 4]}, {"y": [2, 4]}), "no dynamic axis is shared by all inputs and outputs"),
        (one_node("Relu", {"x": []}, {"y": []}), "no dynamic axis is shared by all inputs and outputs"),
        (
            one_node("ReduceSum", {"x": ["n", 4]}, {"y": [1, 1]}, opset=13),
            "no dynamic axis is shared by all inputs and outputs",
        ),
        (one_node("Reshape", {"x": ["n", 4]}, {"y": ["m"]}, {"shape": np.array([-1])}), "a different length along it"),
        (
            one_node("Identity", {"x": ["n"]}, {"y": ["n"]}, types={"x": TensorProto.STRING, "y": TensorProto.STRING}),
            "it could not be tested (input 'x' has type tensor(string)",
        ),
    ],
)
def test_why_a_model_is_not_batched_is_said(tmp_path, model, reason):
    axes, why = find_batch_axis(*opened(tmp_path / "m.onnx", model))
    assert axes is None
    assert reason in why


def test_other_dynamic_axes_are_tried_larger_when_they_must_be(tmp_path, rng):
    weights = {"w": rng.standard_normal((2, 3, 11, 11)).astype(np.float32)}
    inputs, outputs = {"x": ["n", 3, "height", "width"]}, {"y": ["n", 2, "h", "w_"]}
    session, signature = opened(tmp_path / "m.onnx", one_node("Conv", inputs, outputs, weights))
    assert find_batch_axis(session, signature)[0] == {"x": 0, "y": 0}


def feeds(*rows, width=2):
    return [{"x": np.full((count, width), index, np.float32)} for index, count in enumerate(rows)]


def waiting(*rows):
    return [Waiting(feed) for feed in feeds(*rows)]


def test_requests_are_packed_up_to_the_limit_and_only_with_their_like():
    axes = {"x": 0, "y": 0}
    assert pack(feeds(1, 1, 1, 1, 1), axes, 2) == [[0, 1], [2, 3], [4]]
    assert pack(feeds(1, 2, 1), axes, 3) == [[0, 1], [2]]
    assert pack(feeds(9, 1), axes, 4) == [[0], [1]]  # more than the limit: a run of its own
    mixed = [feeds(1)[0], feeds(1, width=3)[0], feeds(1)[0], feeds(1, width=3)[0]]
    assert pack(mixed, axes, 4) == [[0, 2], [1, 3]]
    assert pack(feeds(1, 1), None, 4) == [[0], [1]]


def test_a_batch_gives_each_request_what_it_would_get_alone(small_path, rng):
    session = open_session(small_path, threads=1)
    sent = [{"x": rng.standard_normal((rows, 16, 8, 8)).astype(np.float32)} for rows in (1, 3, 2, 1)]
    answers = run_batch(session, sent, {"x": 0, "y": 0}, 6)
    assert [(answer.rows, answer.first) for answer in answers] == [(6, True), (6, False), (6, False), (1, True)]
    for feed, answer in zip(sent, answers, strict=True):
        np.testing.assert_allclose(answer.outputs["y"], session.run(None, feed)[0], rtol=1e-5, atol=1e-5)


def test_one_requests_values_do_not_fail_anothers(tmp_path, rng):
    table = rng.standard_normal((5, 2)).astype(np.float32)
    model = one_node("Gather", {}, {"y": ["n", 2]}, {"table": table})
    model.graph.node[0].input.append("i")
    model.graph.input.append(helper.make_tensor_value_info("i", TensorProto.INT64, ["n"]))
    session, signature = opened(tmp_path / "m.onnx", model)
    axes, _ = find_batch_axis(session, signature)
    answers = run_batch(session, [{"i": np.array([index])} for index in (4, 5, 0)], axes, 8)
    np.testing.assert_array_equal(answers[0].outputs["y"], table[4:5])
    np.testing.assert_array_equal(answers[2].outputs["y"], table[:1])
    assert answers[1].outputs is None
    assert answers[1].invalid
    assert "out of data bounds" in answers[1].reason


def test_requests_whose_inputs_differ_in_length_never_meet_those_of_others(tmp_path):
    """y = a + b with two axes of two names: one row is broadcast to three, and would be to a neighbour's."""
    node = helper.make_node("Add", ["a", "b"], ["y"])
    model = make_model([node], {}, {"a": ["n", 2], "b": ["m", 2]}, {"y": ["k", 2]})
    session, signature = opened(tmp_path / "add.onnx", model)
    axes, _ = find_batch_axis(session, signature)
    assert axes == {"a": 0, "b": 0, "y": 0}

    def request(value, a, b):
        return {"a": np.full((a, 2), value, np.float32), "b": np.full((b, 2), value, np.float32)}

    sent = [request(500, 1, 3), request(1.5, 2, 2), request(500, 3, 1), request(2, 1, 1)]
    answers = run_batch(session, sent, axes, 8)
    for answer, feed in zip(answers, sent, strict=True):
        np.testing.assert_array_equal(answer.outputs["y"], feed["a"] + feed["b"])
    assert pack(sent, axes, 8) == [[0], [1, 3], [2]]


def test_what_nobody_waits_for_is_not_run():
    ran, started, go_on = [], threading.Event(), threading.Event()

    def work(taken):
        ran.extend(float(feed["x"][0, 0]) for feed in taken)
        started.set()
        assert go_on.wait(10)
        return [Answer({"y": feed["x"]}) for feed in taken]

    async def scenario():
        runs = Gathering(work, 1)
        requests = waiting(1, 1, 1, 1)
        requests[3].seconds = 0.0
        tasks = [asyncio.create_task(runs.answer([one])) for one in requests]
        await asyncio.to_thread(started.wait, 10)
        requests[1].gone = True
        go_on.set()
        return await asyncio.gather(*tasks)

    answers = [one for (one,) in asyncio.run(scenario())]
    assert ran == [0, 2]
    assert [answer.outputs is None for answer in answers] == [False, True, False, True]
    assert "no longer waits" in answers[1].reason


def test_what_waits_while_the_model_is_busy_is_run_together():
    started, go_on, sizes = threading.Event(), threading.Event(), []

    def work(taken):
        sizes.append(len(taken))
        started.set()
        assert go_on.wait(10)
        return [Answer({"y": feed["x"]}) for feed in taken]

    async def scenario():
        runs = Gathering(work, 3)
        first = asyncio.create_task(runs.answer(waiting(1)))
        await asyncio.to_thread(started.wait, 10)
        rest = [asyncio.create_task(runs.answer([one])) for one in waiting(1, 1, 1, 1)]
        rest[0].cancel()  # who waited has gone: the others are answered all the same
        await asyncio.sleep(0)
        go_on.set()
        return await asyncio.gather(first, *rest, return_exceptions=True)

    first, *rest = asyncio.run(scenario())
    assert [answers[0].outputs["y"][0, 0] for answers in rest[1:]] == [1, 2, 3]
    assert first[0].outputs["y"].shape == (1, 2)
    assert max(sizes) == 3
    assert sum(sizes) in (4, 5)  # the cancelled one was taken, or never joined


def test_an_error_of_a_run_reaches_those_who_wait_and_nobody_else():
    def work(taken):
        if any(feed["x"].size > 2 for feed in taken):
            raise ModelError("too long")
        return [Answer({"y": feed["x"]}) for feed in taken]

    async def scenario():
        runs = Gathering(work, 1)
        return await asyncio.gather(*(runs.answer([one]) for one in waiting(1, 2, 1)), return_exceptions=True)

    first, second, third = asyncio.run(scenario())
    assert isinstance(second, ModelError)
    assert first[0].outputs is not None
    assert third[0].outputs is not None


def test_differences_are_relative_and_by_output():
    served = {"y": np.array([3.0, 4.0], np.float32), "c": np.array([1, 2])}
    found = differences(served, {"y": np.array([0.0, 5.0], np.float32), "c": np.array([1, 2])})
    assert [one.output for one in found] == ["y", "c"]
    assert found[0].relative_l2 == pytest.approx(np.hypot(3, 1) / 5)
    assert found[0].max_abs == 3
    assert (found[1].relative_l2, found[1].max_abs) == (0, 0)
    assert differences({"y": np.array([np.nan])}, {"y": np.array([1.0])})[0].relative_l2 == np.inf
    assert differences({"y": np.ones(2)}, {"y": np.ones(3)})[0].relative_l2 == np.inf
    masked, other = np.array([-np.inf, 3.0, 4.0]), np.array([3.0, 3.0, 4.0])
    assert differences({"y": masked}, {"y": masked})[0].max_abs == 0
    moved = np.array([-np.inf, 4.0, 4.0])
    assert differences({"y": masked}, {"y": moved})[0].relative_l2 == pytest.approx(1 / np.hypot(4, 4))
    assert differences({"y": masked}, {"y": other})[0].relative_l2 == np.inf
    assert differences({"s": np.array(["a", "b"], object)}, {"s": np.array(["a", "c"], object)})[0].max_abs == 1


@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        ({"name": "a/b"}, "expected a model name of letters, digits"),
        ({"name": ""}, "expected a model name of letters, digits"),
        ({"port": 70000}, "expected a port from 0"),
        ({"replicas": 0}, "expected 1 or more replicas"),
        ({"max_batch": 0}, "expected a largest batch of 1 or more samples"),
        ({"wait": -1.0}, "expected a batch to wait 0 to 60 seconds"),
        ({"wait": float("nan")}, "expected a batch to wait 0 to 60 seconds"),
        ({"fraction": 0.0}, "expected a share of shadowed requests"),
        ({"cpus": 0.0}, "expected more than 0 CPUs per replica"),
        ({"address": "ray://head:10001"}, "expected `auto` or HOST:PORT"),
        ({"limits": RequestLimits(seconds=float("inf"))}, "expected limits of at least 1 byte"),
        ({"limits": RequestLimits(body=0)}, "expected limits of at least 1 byte"),
    ],
)
def test_options_that_cannot_be_are_refused(changes, reason):
    ServeOptions(name="m").check()
    with pytest.raises(ModelError) as refused:
        ServeOptions(**({"name": "m"} | changes)).check()
    assert reason in str(refused.value)


def test_only_this_machine_is_served_unless_told_otherwise():
    assert ServeOptions(name="m").host == "127.0.0.1"


def test_samples_are_counted_where_requests_are_not_joined(small_path, rng):
    session = open_session(small_path)
    name = session.get_inputs()[0].name
    feed = {name: rng.standard_normal((16, 16, 8, 8)).astype(np.float32)}
    answers = run_batch(session, [feed, feed], {name: 0, session.get_outputs()[0].name: 0}, 1)
    assert [(answer.rows, answer.first) for answer in answers] == [(16, True), (16, True)]
    assert run_batch(session, [feed], None, 1)[0].rows == 1
