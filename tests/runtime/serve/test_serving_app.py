"""The HTTP side over a session in this process: routes, limits, refusals, metrics, shadow. No Ray."""

import asyncio
import dataclasses
import gzip
import json
import time
import zlib

import numpy as np
import pytest

pytest.importorskip("starlette", reason="the extra `serve` is not installed")
pytest.importorskip("prometheus_client", reason="the extra `serve` is not installed")

from tensorrail_runtime.serve.http import app
from tensorrail_runtime.serve.http._compat_uvicorn import ABORT
from tensorrail_runtime.serve.http.app import Service, create_app
from tensorrail_runtime.serve.http.metrics import Metrics
from tensorrail_runtime.serve.http.options import RequestLimits
from tensorrail_runtime.serve.protocol.signature import Signature
from tensorrail_runtime.serve.replicas.batching import Answer, run_batch
from tensorrail_runtime.serve.replicas.differences import Difference
from tensorrail_runtime.serve.replicas.shadow import Shadow
from tensorrail_runtime.sessions.session import open_session

INFER = "/v2/models/m/infer"
GONE = object()


class Local:
    """A backend that runs the session right here; `hold` is awaited first where a test gives one."""

    def __init__(self, session):
        self.session = session
        self.hold = None
        self.answer = None

    async def infer(self, feed):
        if self.hold is not None:
            await self.hold()
        return self.answer or run_batch(self.session, [feed], None, 1)[0]

    async def ready(self):
        return True


class Client:
    """Calls the application as an HTTP server would, one event loop for all calls of a test."""

    def __init__(self, service):
        self.service = service
        self.app = create_app(service)

    async def ask(self, method, path, body=b"", headers=(), parts=None):
        """Return status, body and headers; `parts` is the body in pieces, None among them the client's going away.

        GONE is its going away when the whole body has come.
        """
        pieces = [body] if parts is None else list(parts)
        scope = {
            "type": "http",
            "asgi": {"version": "3.0"},
            "http_version": "1.1",
            "method": method,
            "path": path,
            "raw_path": path.encode(),
            "query_string": b"",
            "root_path": "",
            "scheme": "http",
            "headers": [(name.lower().encode(), value.encode()) for name, value in dict(headers).items()],
        }
        sent = []

        async def receive():
            if not pieces:
                await asyncio.Event().wait()
            piece = pieces.pop(0)
            if piece is None or piece is GONE:
                return {"type": "http.disconnect"}
            return {"type": "http.request", "body": piece, "more_body": bool(pieces) and pieces[0] is not GONE}

        async def send(message):
            sent.append(message)

        await self.app(scope, receive, send)
        content = b"".join(message.get("body", b"") for message in sent[1:])
        return sent[0]["status"], content, {key.decode(): value.decode() for key, value in sent[0]["headers"]}

    def get(self, path, method="GET"):
        return asyncio.run(self.ask(method, path))

    def infer(self, content, path=INFER, **options):
        body = content if isinstance(content, bytes) else json.dumps(content).encode()
        return asyncio.run(self.ask("POST", path, body, **options))

    def metric(self, name, **labels):
        """Return the value of a sample, 0 when there is none."""
        return self.service.metrics.registry.get_sample_value(f"tensorrail_{name}", {"model": "m", **labels}) or 0.0


@pytest.fixture
def client(small_path):
    session = open_session(small_path, threads=1)
    service = Service(
        "m", Signature.of(session), Local(session), Metrics("m"), RequestLimits(body=100_000, seconds=5, accepted=3)
    )
    service.server_version = "1.2.3"
    return Client(service)


@pytest.fixture
def x(rng):
    return rng.standard_normal((2, 16, 8, 8)).astype(np.float32)


def request(x, **others):
    entry = {"name": "x", "datatype": "FP32", "shape": list(x.shape), "data": x.ravel().tolist()}
    return {"inputs": [entry]} | others


def test_health_and_metadata_are_the_protocols(client):
    assert client.get("/v2/health/live")[:2] == (200, b'{"live":true}')
    assert client.get("/v2/health/ready")[:2] == (200, b'{"ready":true}')
    assert json.loads(client.get("/v2")[1]) == {
        "name": "tensorrail",
        "version": "1.2.3",
        "extensions": ["binary_tensor_data", "classification", "model_configuration", "statistics"],
    }
    for path in ("/v2/models/m", "/v2/models/m/versions/1"):
        assert json.loads(client.get(path)[1]) == {
            "name": "m",
            "versions": ["1"],
            "platform": "onnx_onnxv1",
            "inputs": [{"name": "x", "datatype": "FP32", "shape": [-1, 16, 8, 8]}],
            "outputs": [{"name": "y", "datatype": "FP32", "shape": [-1, 10]}],
        }
    assert json.loads(client.get("/v2/models/m/ready")[1]) == {"name": "m", "ready": True}
    client.service.stopping = True
    assert client.get("/v2/health/ready")[0] == 503
    assert client.get("/v2/models/m/ready")[0] == 503
    assert client.get("/v2/health/live")[0] == 200


def test_an_answer_is_the_sessions_in_both_forms(client, x):
    wanted = client.service.backend.session.run(None, {"x": x})[0]
    status, content, headers = client.infer(request(x, id="7"))
    found = json.loads(content)
    assert (status, headers["content-type"], found["id"]) == (200, "application/json", "7")
    np.testing.assert_array_equal(np.array(found["outputs"][0]["data"], np.float32).reshape(2, 10), wanted)
    head = {
        "inputs": [{"name": "x", "datatype": "FP32", "shape": [2, 16, 8, 8], "parameters": {"binary_data_size": x.nbytes}}],
        "parameters": {"binary_data_output": True},
    }
    text = json.dumps(head).encode() + b" "  # so that the values do not begin where floats like to lie
    length = len(text)
    status, content, headers = client.infer(text + x.tobytes(), headers={"Inference-Header-Content-Length": str(length)})
    at = int(headers["inference-header-content-length"])
    assert (status, headers["content-type"], int(headers["content-length"])) == (200, "application/octet-stream", len(content))
    np.testing.assert_array_equal(np.frombuffer(content[at:], np.float32).reshape(2, 10), wanted)


def test_what_cannot_be_answered_is_refused_with_the_reason_as_json(client, x):
    entry = request(x)["inputs"][0]
    cases = [
        (INFER, b"{", 400, "the request is not JSON"),
        (INFER, {"inputs": [entry | {"datatype": "FP64"}]}, 400, "input 'x': expected datatype FP32, got FP64"),
        (INFER, {"inputs": [entry | {"shape": [2, 16, 64]}]}, 400, "expected shape [-1, 16, 8, 8], got [2, 16, 64]"),
        (INFER, {"inputs": [entry | {"name": "z"}]}, 400, "the model has no input 'z'; its inputs are x"),
        (INFER, request(x, outputs=[{"name": "z"}]), 400, "the model has no output 'z'; its outputs are y"),
        (INFER, request(x, model_name="other"), 400, "the request is for model 'other': this server serves 'm'"),
        ("/v2/models/other/infer", request(x), 400, "unknown model 'other': this server serves 'm'"),
        ("/v2/models/m/versions/2/infer", request(x), 400, "unknown version '2' of 'm': expected version 1"),
        ("/v2/models/m/generate", request(x), 404, "unknown path '/v2/models/m/generate'"),
        ("/v2/models/m", request(x), 405, "POST is not allowed for '/v2/models/m'"),
    ]
    for path, content, status, reason in cases:
        found, text, headers = client.infer(content, path)
        assert (found, headers["content-type"]) == (status, "application/json"), reason
        assert list(json.loads(text)) == ["error"]
        assert reason in json.loads(text)["error"]
    assert client.get(INFER)[0] == 405
    assert client.metric("requests_total", code="400") == 8
    assert client.metric("request_seconds_count") == 8


def test_a_head_of_more_than_64_kib_is_refused_although_it_came_at_once(client, x):
    for headers in ({"a": "b" * (1 << 16)}, {f"a{k}": "b" * 600 for k in range(110)}):
        status, body, answered = client.infer(request(x), headers=headers)
        assert (status, answered["connection"]) == (431, "close")
        assert "headers of at most 65536 bytes, got" in json.loads(body)["error"]
    assert client.infer(request(x), headers={"a": "b" * 60_000})[0] == 200


@pytest.mark.parametrize(("encoding", "packed"), [("gzip", gzip.compress), ("deflate", zlib.compress), ("GZIP", gzip.compress)])
def test_compressed_bodies_are_read_within_the_limit(client, x, encoding, packed):
    plain, headers = json.dumps(request(x)).encode(), {"content-encoding": encoding}
    assert client.infer(packed(plain), headers=headers)[1] == client.infer(plain)[1]
    values = x.tobytes()
    entry = {"name": "x", "datatype": "FP32", "shape": list(x.shape), "parameters": {"binary_data_size": len(values)}}
    head = json.dumps({"inputs": [entry]}).encode()
    length = {"inference-header-content-length": str(len(head))}
    assert client.infer(packed(head + values), headers=headers | length)[1] == client.infer(plain)[1]
    for body, status, reason in (
        (packed(b" " * 100_001), 413, "at most 100000 bytes, got more after"),
        (packed(plain)[:-5], 400, "got one that ends too early or late"),
        (packed(plain) + b"more", 400, "got one that ends too early or late"),
        (plain, 400, "as its Content-Encoding says"),
    ):
        found, text, _ = client.infer(body, headers=headers)
        assert found == status
        assert reason in json.loads(text)["error"]
    found, text, _ = client.infer(plain, headers={"content-encoding": "br"})
    assert (found, "expected a body in identity, gzip, deflate, got Content-Encoding 'br'" in json.loads(text)["error"]) == (
        415,
        True,
    )


def test_the_best_classes_of_an_output_are_strings(client, x):
    scores = np.array(json.loads(client.infer(request(x))[1])["outputs"][0]["data"], np.float32).reshape(2, 10)
    wish = {"name": "y", "parameters": {"classification": 3}}
    (output,) = json.loads(client.infer(request(x, outputs=[wish]))[1])["outputs"]
    assert (output["datatype"], output["shape"]) == ("BYTES", [2, 3])
    order = (-scores).argsort(1)[:, :3]
    assert [int(text.partition(":")[2]) for text in output["data"]] == order.ravel().tolist()
    best = np.take_along_axis(scores, order, 1).ravel()
    assert [float(text.partition(":")[0]) for text in output["data"]] == pytest.approx(best.tolist(), abs=1e-6)
    wish["parameters"] |= {"binary_data": True, "classification": 99}
    _, body, headers = client.infer(request(x, outputs=[wish]))
    head = json.loads(body[: int(headers["inference-header-content-length"])])
    assert head["outputs"][0]["shape"] == [2, 10]
    assert f":{order[1, 0]}".encode() in body
    for classes, reason in ((-1, "as a number of classes, got -1"), ("a", "as a number of classes, got 'a'")):
        wish["parameters"] = {"classification": classes}
        status, text, _ = client.infer(request(x, outputs=[wish]))
        assert (status, reason in json.loads(text)["error"]) == (400, True)


def test_clients_of_triton_find_configuration_statistics_and_index(client, x):
    for path in ("/v2/models/m/config", "/v2/models/m/versions/1/config"):
        assert json.loads(client.get(path)[1]) == {
            "name": "m",
            "platform": "onnxruntime_onnx",
            "backend": "onnxruntime",
            "max_batch_size": 0,
            "input": [{"name": "x", "data_type": "TYPE_FP32", "dims": [-1, 16, 8, 8]}],
            "output": [{"name": "y", "data_type": "TYPE_FP32", "dims": [-1, 10]}],
        }
    client.infer(request(x))
    client.infer(b"{")
    for path in ("/v2/models/stats", "/v2/models/m/stats", "/v2/models/m/versions/1/stats"):
        (found,) = json.loads(client.get(path)[1])["model_stats"]
        assert (found["name"], found["version"], found["inference_count"], found["execution_count"]) == (
            "m",
            "1",
            1,
            1,
        )  # without batches a run counts as one
        counts = {kind: entry["count"] for kind, entry in found["inference_stats"].items() if entry["count"]}
        assert counts == {"success": 1, "fail": 1, "queue": 1, "compute_infer": 1}
        assert found["inference_stats"]["success"]["ns"] > found["inference_stats"]["compute_infer"]["ns"] > 0
        assert abs(found["last_inference"] / 1e3 - time.time()) < 60
    assert client.get("/v2/models/other/stats")[0] == 400
    index = [{"name": "m", "version": "1", "state": "READY", "reason": ""}]
    assert json.loads(client.infer({}, "/v2/repository/index")[1]) == index
    client.service.stopping = True
    assert json.loads(client.infer(b"", "/v2/repository/index")[1])[0]["state"] == "UNAVAILABLE"
    named = Client(dataclasses.replace(client.service, name="stats"))
    assert json.loads(named.get("/v2/models/stats")[1])["platform"] == "onnx_onnxv1"


def test_bodies_that_are_too_long_are_never_held(client, x):
    big = [b" " * 60_000, b" " * 60_000]
    status, text, _ = client.infer(b"", parts=big)  # of unknown length, as chunks
    assert (status, json.loads(text)["error"]) == (413, "expected a request of at most 100000 bytes, got more")
    status, text, _ = client.infer(b"", parts=big, headers={"content-length": "120000"})
    assert (status, json.loads(text)["error"]) == (413, "expected a request of at most 100000 bytes, got 120000")
    for headers in ({"content-length": "1000000"}, {"content-length": "120000", "expect": "100-continue"}):
        assert client.infer(b"", parts=[None], headers=headers)[0] == 413  # not one byte was read
    left = [b" " * 100_000] * 10
    assert client.infer(b"", parts=left)[0] == 413
    assert client.metric("requests_total", code="413") == 5


def test_a_request_that_takes_too_long_ends_with_504_or_408(client, x):
    client.service.limits = RequestLimits(seconds=0.01)
    client.service.backend.hold = asyncio.Event().wait  # for ever
    status, text, _ = client.infer(request(x))
    assert (status, json.loads(text)["error"]) == (504, "no answer within 0.01 s")
    status, text, _ = client.infer(b"", parts=[])  # a body that never comes
    assert (status, json.loads(text)["error"]) == (408, "the request was not received within 0.01 s")
    assert client.metric("queue_length") == 0


def test_more_requests_than_are_accepted_get_503_and_the_others_their_answers(client, x):
    async def scenario():
        go_on = asyncio.Event()
        client.service.backend.hold = go_on.wait
        body = json.dumps(request(x)).encode()
        waiting = [asyncio.create_task(client.ask("POST", INFER, body)) for _ in range(3)]
        await asyncio.sleep(0)
        length = client.metric("queue_length")
        refused = await client.ask("POST", INFER, body)
        go_on.set()
        return length, refused, await asyncio.gather(*waiting)

    length, refused, answered = asyncio.run(scenario())
    assert length == 3
    assert refused[0] == 503
    assert "the server is busy with 3 requests, its limit: try again later" in json.loads(refused[1])["error"]
    assert [status for status, _, _ in answered] == [200] * 3


def test_an_answer_counts_until_its_client_has_read_it(client, x):
    service = client.service
    service.limits = RequestLimits(seconds=0.3)
    held, dropped = [], []

    async def scenario():
        app, stuck = create_app(service), asyncio.Event()

        async def send(message):
            held.append(service.metrics.in_flight)
            if message.get("body"):
                await stuck.wait()  # the client reads nothing

        pieces = [{"type": "http.request", "body": json.dumps(request(x)).encode(), "more_body": False}]

        async def receive():
            return pieces.pop(0) if pieces else await asyncio.Event().wait()

        scope = {
            "type": "http",
            "method": "POST",
            "path": INFER,
            "raw_path": INFER.encode(),
            "query_string": b"",
            "headers": [],
        }
        others = {"http_version": "1.1", "root_path": "", "scheme": "http"}
        extensions = {"extensions": {ABORT: {"drop": lambda: dropped.append(True)}}}
        await app(scope | others | extensions, receive, send)

    asyncio.run(scenario())
    assert dropped == [True]
    assert held[-1] == 1
    assert service.metrics.in_flight == 0  # it was given up


def test_json_has_a_limit_of_its_own_and_names_and_versions_are_checked(client, x, monkeypatch):
    monkeypatch.setattr("tensorrail_runtime.serve.protocol.request.MOST_JSON", len(json.dumps(request(x))) - 1)
    status, content, _ = client.infer(request(x))
    assert status == 413
    assert "send large tensors as binary data" in json.loads(content)["error"]
    monkeypatch.undo()
    status, content, _ = client.infer(request(x, model_version="99"))
    assert (status, json.loads(content)["error"]) == (400, "the request is for version '99': expected version 1")
    named = request(x)
    named["inputs"][0]["name"] = "n" * 30_000
    status, content, _ = client.infer(named)
    assert status == 400
    assert len(content) < 300
    status, _, headers = client.get(INFER)
    assert (status, headers["allow"]) == (405, "POST")


def test_nothing_is_computed_for_a_client_that_has_gone(client, x):
    ended = []

    async def forever():
        try:
            await asyncio.sleep(20)
        except asyncio.CancelledError:
            ended.append("cancelled")
            raise

    client.service.backend.hold = forever
    body = json.dumps(request(x)).encode()
    begin = time.monotonic()
    assert asyncio.run(client.ask("POST", INFER, parts=[body, GONE]))[0] == 499
    assert time.monotonic() - begin < 5
    assert ended == ["cancelled"]
    assert client.service.metrics.in_flight == 0


def test_a_large_request_is_read_beside_the_others(client, rng):
    client.service.limits = RequestLimits(body=10_000_000)
    x = rng.standard_normal((200, 16, 8, 8)).astype(np.float32)
    answer = json.loads(client.infer(request(x))[1])["outputs"][0]["data"]
    expected = client.service.backend.session.run(None, {"x": x})[0]
    np.testing.assert_allclose(np.array(answer), expected.ravel(), rtol=1e-4, atol=1e-5)


def test_a_client_that_goes_away_is_counted(client):
    assert client.infer(b"", parts=[b"{", None])[0] == 499
    assert client.metric("requests_total", code="499") == 1
    assert client.metric("queue_length") == 0


def test_a_run_that_fails_is_the_servers_fault_unless_onnx_runtime_blames_the_values(client, x):
    for invalid, status in ((True, 400), (False, 500)):
        client.service.backend.answer = Answer(None, "because", invalid)
        found, text, _ = client.infer(request(x))
        assert (found, json.loads(text)) == (status, {"error": "because"})


def test_metrics_are_what_happened(client, x):
    client.service.backend.answer = Answer({"y": np.zeros((2, 10), np.float32)}, rows=4, seconds=0.02, waited=0.003)
    assert client.infer(request(x))[0] == 200
    client.service.backend.answer = Answer({"y": np.zeros((2, 10), np.float32)}, rows=4, seconds=0.02, first=False)
    assert client.infer(request(x))[0] == 200
    status, text, headers = client.get("/metrics")
    assert (status, headers["content-type"].partition(";")[0]) == (200, "text/plain")
    assert b'tensorrail_requests_total{code="200",model="m"} 2.0' in text
    assert client.metric("batch_size_count") == 1  # one run, of two requests
    assert client.metric("batch_size_sum") == 4
    assert client.metric("run_seconds_sum") == pytest.approx(0.02)
    assert client.metric("queue_seconds_sum") == pytest.approx(0.003)
    assert client.metric("queue_seconds_count") == 2
    assert client.metric("retries_total") == 0
    assert b"tensorrail_retries_total" in text


def shadowed(client, compare, fraction=1.0):
    client.service.shadow = Shadow(compare, fraction, client.service.metrics, seed=0)


def test_a_shadow_neither_delays_nor_fails_an_answer(client, x):
    async def slow(feed, served):
        await asyncio.Event().wait()

    async def broken(feed, served):
        raise RuntimeError("no")

    async def scenario():
        body = json.dumps(request(x)).encode()
        shadowed(client, slow)
        answers = [await client.ask("POST", INFER, body) for _ in range(10)]  # none of them waits for the shadow
        await client.service.shadow.close()
        shadowed(client, broken)
        answers.append(await client.ask("POST", INFER, body))
        await asyncio.sleep(0)
        return answers

    wanted = client.service.backend.session.run(None, {"x": x})[0].ravel().tolist()
    for status, content, _ in asyncio.run(scenario()):
        assert status == 200
        assert json.loads(content)["outputs"][0]["data"] == wanted
    assert client.metric("shadow_total", outcome="dropped") == 2  # eight wait at most
    assert client.metric("shadow_total", outcome="failed") == 1
    assert client.metric("shadow_total", outcome="compared") == 0


def test_a_shadow_gets_the_share_that_was_asked_for_and_its_differences_are_counted(client, x):
    async def compare(feed, served):
        np.testing.assert_array_equal(feed["x"], x)
        return [Difference("y", 0.02, 0.5), Difference("z", 0.0, 0.0)]

    async def scenario():
        shadowed(client, compare, fraction=0.25)
        for _ in range(400):
            await client.service.shadow.sample({"x": x}, {})
            await asyncio.sleep(0)

    asyncio.run(scenario())
    count = client.metric("shadow_total", outcome="compared")
    assert 70 <= count <= 130  # 100 ± 3.5 standard deviations, and the seed is fixed
    assert client.metric("shadow_relative_l2_count", output="y") == count
    assert client.metric("shadow_relative_l2_sum", output="y") == pytest.approx(0.02 * count)
    assert client.metric("shadow_max_abs", output="y") == 0.5


def test_a_large_answer_is_written_beside_others_and_within_the_time(client, x, monkeypatch):
    """Written in the event loop, it would hold up every other request, and no limit would end it."""
    client.service.limits = RequestLimits(seconds=0.2)
    client.service.backend.answer = Answer({"y": np.zeros((2, 1 << 16), np.float32)}, rows=2)
    monkeypatch.setattr(app, "render_response", lambda *_: time.sleep(1))

    async def scenario():
        waiting = asyncio.create_task(client.ask("POST", INFER, json.dumps(request(x)).encode()))
        await asyncio.sleep(0.05)
        begin = time.perf_counter()
        live, _, _ = await client.ask("GET", "/v2/health/live")
        waited = time.perf_counter() - begin
        return live, waited, (await waiting)[0]

    live, waited, status = asyncio.run(scenario())
    assert (live, waited < 0.15, status) == (200, True, 504)
