"""A real server: `tensorrail serve` in a process of its own, two replicas on its own Ray, clients over HTTP on loopback."""

import contextlib
import http.client
import json
import os
import re
import secrets
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import onnx
import psutil
import pytest
from conftest import make_model
from onnx import helper

from tensorrail_runtime.sessions.session import open_session

pytest.importorskip("ray.serve", reason="the extra `serve` is not installed")

DEADLINE = 240  # seconds until a server that does not come, or go, is a failure: a busy machine may take its time
RTOL = 1e-5  # of an output's largest value: a batch rounds otherwise than its parts
START = "from tensorrail.cli import main; main()"


@dataclass
class Server:
    """A server process and the session that says what its answers must be."""

    process: subprocess.Popen
    port: int
    said: list[str]
    reference: object
    log: Path
    children: list = field(default_factory=list)

    def connect(self):
        return http.client.HTTPConnection("127.0.0.1", self.port, timeout=DEADLINE)

    def ask(self, method, path, body=None, headers=None, connection=None):
        """Return status, body and headers."""
        made = connection or self.connect()
        made.request(method, path, body, headers or {})
        response = made.getresponse()
        found = response.status, response.read(), response.headers
        if connection is None:
            made.close()
        return found

    def infer(self, x, binary=True, connection=None):
        """Return the output for an input; an answer that is no answer fails the test."""
        head = {
            "inputs": [{"name": "x", "datatype": "FP32", "shape": list(x.shape)}],
            "parameters": {"binary_data_output": binary},
        }
        headers, tail = {}, b""
        if binary:
            head["inputs"][0]["parameters"] = {"binary_data_size": x.nbytes}
            tail = x.tobytes()
            headers = {"Inference-Header-Content-Length": str(len(json.dumps(head)))}
        else:
            head["inputs"][0]["data"] = x.tolist()
        status, content, given = self.ask("POST", "/v2/models/net/infer", json.dumps(head).encode() + tail, headers, connection)
        assert status == 200, content
        length = int(given.get("Inference-Header-Content-Length", len(content)))
        output = json.loads(content[:length])["outputs"][0]
        values = np.frombuffer(content[length:], "<f4") if binary else np.array(output["data"], np.float32)
        return values.reshape(output["shape"])

    def check(self, x, found):
        wanted = self.reference.run(None, {"x": x})[0]
        np.testing.assert_allclose(found, wanted, rtol=0, atol=RTOL * np.abs(wanted).max())

    def metrics(self):
        """Return the samples of /metrics by name and labels, the model's left out."""
        text = self.ask("GET", "/metrics")[1].decode()
        found = {}
        for line in text.splitlines():
            if not line.startswith("#"):
                name, value = line.rsplit(" ", 1)
                found[re.sub(r'model="net",?', "", name).replace(",}", "}").replace("{}", "")] = float(value)
        return found

    def tree(self):
        own = psutil.Process(self.process.pid)
        return [own, *own.children(recursive=True)]


def network(path, seed=0, change=0.0):
    """Write convolution, pooling and two outputs' worth of weights; `change` moves the weights by that share."""
    rng = np.random.default_rng(seed)
    weights = {
        "conv.weight": rng.standard_normal((32, 16, 3, 3)).astype(np.float32),
        "fc.weight": rng.standard_normal((10, 32)).astype(np.float32),
    }
    other = np.random.default_rng(seed + 1)
    weights = {k: (w + change * other.standard_normal(w.shape)).astype(np.float32) for k, w in weights.items()}
    nodes = [
        helper.make_node("Conv", ["x", "conv.weight"], ["a"], "conv", pads=[1, 1, 1, 1]),
        helper.make_node("Relu", ["a"], ["b"], "relu"),
        helper.make_node("GlobalAveragePool", ["b"], ["c"], "pool"),
        helper.make_node("Flatten", ["c"], ["d"], "flatten"),
        helper.make_node("Gemm", ["d", "fc.weight"], ["y"], "fc", transB=1),
    ]
    onnx.save(make_model(nodes, weights, {"x": ["batch", 16, 8, 8]}, {"y": ["batch", 10]}), path)
    return path


def start(folder, *arguments, **environment):
    """Start `tensorrail serve` and return it once it says where it listens."""
    log = folder / "stderr.txt"
    with log.open("w") as file:
        process = subprocess.Popen(
            [sys.executable, "-c", START, "serve", *map(str, arguments)],
            stdout=subprocess.PIPE,
            stderr=file,
            text=True,
            start_new_session=True,  # a process group of its own, as a terminal makes it
            cwd=folder,
            env=os.environ | environment,
        )
    said = []
    killer = threading.Timer(DEADLINE, process.kill)
    killer.start()
    try:
        for line in process.stdout:
            said.append(line.rstrip())
            if "metrics at" in line:
                break
        else:
            pytest.fail(f"the server ended with {process.wait()}: {said} {log.read_text()}")
    finally:
        killer.cancel()
    port = int(re.search(r":(\d+)/v2/", said[0]).group(1))
    return process, port, said, log


@pytest.fixture(scope="module")
def servers(tmp_path_factory):
    """Yield a list for the one server that several tests ask; one that a test has stopped is replaced by the next test."""
    made = [start_server(tmp_path_factory.mktemp("served"))]
    yield made
    for server in made:
        for process in [*server.children, *(server.tree() if server.process.poll() is None else [])]:
            if process.is_running():
                process.kill()
        server.process.wait(DEADLINE)
        server.process.stdout.close()


@pytest.fixture
def server(servers, tmp_path_factory):
    """Return a server that answers: that of the tests before, or a new one."""
    if servers[-1].process.poll() is not None:
        servers.append(start_server(tmp_path_factory.mktemp("served")))
    return servers[-1]


def start_server(folder):
    model, dense = network(folder / "net.onnx"), network(folder / "dense.onnx", change=0.01)
    process, port, said, log = start(
        folder,
        model,
        *("--port", 0, "--replicas", 2, "--cpus", 0.25, "--threads", 1, "--max-batch", 4, "--batch-wait", 50),
        *("--max-mib", 8, "--shadow", dense, "--fraction", 1),
    )
    made = Server(process, port, said, open_session(model, threads=1), log)
    made.children = made.tree()
    return made


def listens(port):
    with socket.socket() as made:
        return made.connect_ex(("127.0.0.1", port)) == 0


def samples(count, seed=0):
    rng = np.random.default_rng(seed)
    return [rng.standard_normal((1 + index % 3, 16, 8, 8)).astype(np.float32) for index in range(count)]


def test_concurrent_clients_get_what_the_session_says(server):
    assert server.said[0].startswith("net: ")
    assert "2 × 1 threads" in server.said[0]
    assert server.said[1] == "batches of up to 4 along axis 0 (batch), waiting at most 50 ms"
    assert server.ask("GET", "/v2/health/ready")[:2] == (200, b'{"ready":true}')
    inputs, before = samples(48), server.metrics()

    def client(number):
        connection = server.connect()
        for index in range(number, len(inputs), 8):
            server.check(inputs[index], server.infer(inputs[index], binary=bool(index % 2), connection=connection))
        connection.close()

    with ThreadPoolExecutor(8) as clients:
        list(clients.map(client, range(8)))
    after = server.metrics()
    found = {name: value - before.get(name, 0) for name, value in after.items()}
    assert found['tensorrail_requests_total{code="200"}'] == 48
    assert found["tensorrail_batch_size_sum"] == sum(len(x) for x in inputs)
    assert found["tensorrail_batch_size_count"] < 48  # requests were put together
    assert found['tensorrail_batch_size_bucket{le="4.0"}'] == found["tensorrail_batch_size_count"]
    assert found["tensorrail_request_seconds_count"] == 48
    assert after["tensorrail_queue_length"] == 0


def test_refusals_come_over_http_as_json(server):
    entry = {"name": "x", "datatype": "FP32", "shape": [1, 16, 8, 8], "data": [0] * 1024}
    for content, path, status, reason in (
        ({"inputs": [entry | {"datatype": "INT32"}]}, "net", 400, "input 'x': expected datatype FP32, got INT32"),
        ({"inputs": [entry | {"shape": [16, 8, 8]}]}, "net", 400, "expected shape [-1, 16, 8, 8], got [16, 8, 8]"),
        ({"inputs": [entry | {"name": "z"}]}, "net", 400, "the model has no input 'z'"),
        ({"inputs": [entry]}, "other", 400, "unknown model 'other'"),
        ({"inputs": [entry], "padding": " " * (8 << 20)}, "net", 413, "expected a request of at most 8388608 bytes"),
    ):
        found, text, headers = server.ask("POST", f"/v2/models/{path}/infer", json.dumps(content))
        assert (found, headers["Content-Type"]) == (status, "application/json")
        assert reason in json.loads(text)["error"]
    (x,) = samples(1)
    server.check(x, server.infer(x))


def compared_by_the_shadow(server, x):
    """Check the answer to a request; return the metrics before it and once the shadow has compared it."""
    before = server.metrics()
    server.check(x, server.infer(x))
    end = time.monotonic() + DEADLINE
    compared = 'tensorrail_shadow_total{outcome="compared"}'
    while (after := server.metrics())[compared] <= before[compared]:
        assert time.monotonic() < end, server.log.read_text()
        time.sleep(0.05)
    return before, after


def test_requests_above_the_usual_limit_of_grpc_reach_a_replica_and_the_shadow(server):
    x = np.random.default_rng(5).standard_normal((1500, 16, 8, 8)).astype(np.float32)
    assert x.nbytes > 5 * 2**20
    before, after = compared_by_the_shadow(server, x)
    assert after["tensorrail_retries_total"] == before["tensorrail_retries_total"]
    assert after['tensorrail_shadow_total{outcome="failed"}'] == 0


def test_nothing_listens_beyond_this_machine(server):
    assert "127.0.0.1" in server.said[0]
    assert not any("warning" in line for line in server.said)
    open_at = set()
    for process in server.tree():
        with contextlib.suppress(psutil.NoSuchProcess):  # one that ended meanwhile
            connections = process.net_connections("inet")
            open_at |= {(process.name(), one.laddr) for one in connections if one.status == psutil.CONN_LISTEN}
    assert any(address.port == server.port for _, address in open_at)
    assert {address.ip.removeprefix("::ffff:") for _, address in open_at} <= {"127.0.0.1", "::1"}, open_at


def test_the_shadows_differences_are_in_the_metrics(server):
    (x,) = samples(1, seed=7)
    _, found = compared_by_the_shadow(server, x)
    dense = open_session(server.log.parent / "dense.onnx", threads=1).run(None, {"x": x})[0]
    wanted = np.linalg.norm(server.reference.run(None, {"x": x})[0] - dense) / np.linalg.norm(dense)
    mean = found['tensorrail_shadow_relative_l2_sum{output="y"}'] / found['tensorrail_shadow_relative_l2_count{output="y"}']
    assert wanted > 1e-3
    assert wanted / 4 < mean < wanted * 4  # the mean of other inputs' differences as well
    assert found['tensorrail_shadow_max_abs{output="y"}'] > 0
    assert found['tensorrail_shadow_total{outcome="failed"}'] == 0


def test_a_killed_replica_loses_no_accepted_request(server):
    inputs, stop, answered = samples(24, seed=3), threading.Event(), []

    def client(number):
        connection = server.connect()
        while not stop.is_set():
            x = inputs[number]
            server.check(x, server.infer(x, connection=connection))
            answered.append(number)
        connection.close()

    def answers(more):
        end, until = time.monotonic() + DEADLINE, len(answered) + more
        while len(answered) < until:
            assert time.monotonic() < end
            time.sleep(0.01)

    replicas = [
        one for one in server.tree() if "ServeReplica" in one.name() + " ".join(one.cmdline()) and "model" in one.cmdline()[0]
    ]
    assert len(replicas) == 2
    with ThreadPoolExecutor(24) as clients:
        tasks = [clients.submit(client, number) for number in range(24)]
        try:
            answers(48)
            for replica in replicas:  # a second one where the first had no request just then
                replica.kill()
                answers(96)
                if server.metrics()["tensorrail_retries_total"]:
                    break
        finally:
            stop.set()
        for task in tasks:
            task.result()
    found = server.metrics()
    assert found["tensorrail_retries_total"] >= 1  # it did have requests
    assert not any(found.get(f'tensorrail_requests_total{{code="{code}"}}') for code in (500, 503, 504))


def test_told_to_stop_it_answers_what_it_accepted_and_leaves_nothing_behind(server):
    (x,) = samples(1, seed=5)
    head = json.dumps(
        {"inputs": [{"name": "x", "datatype": "FP32", "shape": list(x.shape), "parameters": {"binary_data_size": x.nbytes}}]}
    ).encode()
    server.children = server.tree()
    connection = server.connect()
    connection.putrequest("POST", "/v2/models/net/infer")
    connection.putheader("Content-Length", str(len(head) + x.nbytes))
    connection.putheader("Inference-Header-Content-Length", str(len(head)))
    connection.endheaders(head)
    end = time.monotonic() + DEADLINE
    while server.metrics()["tensorrail_queue_length"] < 1:  # it has begun to read it
        assert time.monotonic() < end
    os.killpg(server.process.pid, signal.SIGINT)  # Ctrl-C: a terminal tells all processes of the group
    while listens(server.port):  # until nothing new is accepted
        assert time.monotonic() < end
        time.sleep(0.05)
    connection.send(x.tobytes())
    response = connection.getresponse()
    content = json.loads(response.read())
    assert response.status == 200, content
    server.check(x, np.array(content["outputs"][0]["data"], np.float32).reshape(1, 10))
    assert server.process.wait(DEADLINE) == 0
    assert server.process.stdout.read().splitlines()[-1] == "net: stopped"
    _, alive = psutil.wait_procs(server.children, timeout=DEADLINE)
    assert not alive


@dataclass
class Cluster:
    """A Ray that runs already, one node on loopback."""

    address: str
    environment: dict[str, str]  # what its users have in their environment
    head: subprocess.Popen
    node: psutil.Process
    folder: str


def start_cluster(logs):
    """Start a Ray and return it once it runs."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    environment = {
        "RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER": "0",
        "RAY_AUTH_MODE": "token",
        "RAY_AUTH_TOKEN": secrets.token_hex(16),
        "RAY_USAGE_STATS_ENABLED": "0",
    }
    folder = tempfile.mkdtemp(prefix="ray")  # short, for sockets lie there, and not where a user's own Ray is looked for
    options = ("--head", "--block", "--num-cpus=2", "--include-dashboard=false", "--node-ip-address=127.0.0.1")
    options += (f"--port={port}", f"--temp-dir={folder}")
    with (logs / "ray.txt").open("w") as log:
        head = subprocess.Popen(
            [sys.executable, "-m", "ray.scripts.scripts", "start", *options],
            stdout=log,
            stderr=log,
            env=os.environ | environment,
        )
    end = time.monotonic() + DEADLINE
    while "Ray runtime started" not in (logs / "ray.txt").read_text():
        assert head.poll() is None, (logs / "ray.txt").read_text()
        assert time.monotonic() < end
        time.sleep(0.1)
    return Cluster(f"127.0.0.1:{port}", environment, head, psutil.Process(head.pid), folder)


def stop_cluster(cluster):
    for one in [*cluster.node.children(recursive=True), cluster.node]:
        with contextlib.suppress(psutil.NoSuchProcess):
            one.kill()
    cluster.head.wait(DEADLINE)
    shutil.rmtree(cluster.folder, ignore_errors=True)


@pytest.fixture
def cluster(tmp_path_factory):
    """Run a Ray that is no server's own."""
    started = start_cluster(tmp_path_factory.mktemp("cluster"))
    yield started
    stop_cluster(started)


@pytest.mark.slow
def test_on_a_cluster_a_model_without_a_batch_axis(cluster, tmp_path):
    address, environment, node = cluster.address, cluster.environment, cluster.node
    table = np.random.default_rng(0).standard_normal((5, 2)).astype(np.float32)
    graph = helper.make_graph(
        [helper.make_node("Gather", ["table", "i"], ["y"])],
        "graph",
        [helper.make_tensor_value_info("i", onnx.TensorProto.INT64, [1])],
        [helper.make_tensor_value_info("y", onnx.TensorProto.FLOAT, [1, 2])],
        [onnx.numpy_helper.from_array(table, "table")],
    )
    onnx.save(helper.make_model(graph, opset_imports=[helper.make_opsetid("", 20)], ir_version=9), tmp_path / "m.onnx")
    arguments = (tmp_path / "m.onnx", "--name", "table", "--port", 0, "--threads", 1, "--cpus", 0.5, "--address", address)
    process, port, said, log = start(tmp_path, *arguments, **environment)
    server = Server(process, port, said, None, log)
    try:
        assert said[1] == "no batching: no dynamic axis is shared by all inputs and outputs"

        def ask(index):
            content = {"inputs": [{"name": "i", "datatype": "INT64", "shape": [1], "data": [index]}]}
            status, text, _ = server.ask("POST", "/v2/models/table/infer", json.dumps(content))
            return status, json.loads(text)

        with ThreadPoolExecutor(5) as clients:
            for index, (status, content) in enumerate(clients.map(ask, range(5))):
                assert status == 200
                np.testing.assert_array_equal(np.array(content["outputs"][0]["data"], np.float32), table[index])
        status, content = ask(7)
        assert status == 400
        assert "out of data bounds" in content["error"]
        assert serving(node)
        process.terminate()
        assert process.wait(DEADLINE) == 0
        end = time.monotonic() + DEADLINE
        while serving(node):  # its replicas go, and Serve with them, for nothing else uses it
            assert time.monotonic() < end
            time.sleep(0.05)
        assert node.is_running()
    finally:
        process.kill()
        process.wait(DEADLINE)
        process.stdout.close()


def serving(node):
    """Return the processes of Ray Serve below a node's."""
    names = [" ".join(one.cmdline()) for one in node.children(recursive=True) if one.status() != psutil.STATUS_ZOMBIE]
    return [name for name in names if name.startswith("ray::Serve")]
