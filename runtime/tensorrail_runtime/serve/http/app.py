"""The HTTP application: the Open Inference Protocol 2 in ASGI, on top of any `Backend` that answers requests.

It reads requests, applies the limits, counts requests, and turns every error into `{"error": reason}`. It does not depend on
Ray: the backend may run in a replica or, in tests, in the same process.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Coroutine
from dataclasses import dataclass, field
from functools import partial
from typing import Any, Protocol

from starlette.applications import Starlette
from starlette.background import BackgroundTask
from starlette.exceptions import HTTPException
from starlette.middleware import Middleware
from starlette.requests import ClientDisconnect, Request
from starlette.responses import JSONResponse, Response
from starlette.routing import Route
from starlette.types import ASGIApp, Receive, Scope, Send

from tensorrail_runtime.serve.http._compat_uvicorn import ABORT, LARGEST_HEAD
from tensorrail_runtime.serve.http.metrics import CONTENT_TYPE_LATEST, Metrics
from tensorrail_runtime.serve.http.options import RequestLimits
from tensorrail_runtime.serve.protocol.encodings import ENCODINGS, expanded
from tensorrail_runtime.serve.protocol.errors import ProtocolError
from tensorrail_runtime.serve.protocol.request import InferRequest, parse_request
from tensorrail_runtime.serve.protocol.response import VERSION, render_response
from tensorrail_runtime.serve.protocol.signature import Signature
from tensorrail_runtime.serve.replicas.batching import Answer, Feed
from tensorrail_runtime.serve.replicas.shadow import Shadow

EXTENSIONS = ["binary_tensor_data", "classification", "model_configuration", "statistics"]
_GONE = 499  # the client has left; only the metrics show this status
_PART = 1 << 18  # bytes of an answer that are sent at a time
_MANY = 1 << 16  # values of an answer from which it is written in a thread
_LARGE = 1 << 18  # bytes of a request from which it is parsed in a thread, so that others are answered meanwhile
_DISCARD = 4  # times the limit: this much of a body that is too long is still read, so that its sender gets the error


class Backend(Protocol):
    """Answers requests."""

    async def infer(self, feed: Feed) -> Answer:
        """Return the answer to a request, given as the inputs of the model by name."""

    async def ready(self) -> bool:
        """Return whether requests are answered now."""


@dataclass
class Service:
    """One served model, with everything that the application needs."""

    name: str
    signature: Signature
    backend: Backend
    metrics: Metrics
    limits: RequestLimits = field(default_factory=RequestLimits)
    shadow: Shadow | None = None
    server_version: str = ""
    stopping: bool = False


def create_app(service: Service) -> Starlette:
    """Return the ASGI application that serves the model."""

    async def live(_: Request) -> Response:
        return JSONResponse({"live": True})

    async def ready(_: Request) -> Response:
        answers = not service.stopping and await service.backend.ready()
        return JSONResponse({"ready": answers}, 200 if answers else 503)

    async def model_ready(request: Request) -> Response:
        _check_model(service, request)
        answers = not service.stopping and await service.backend.ready()
        return JSONResponse({"name": service.name, "ready": answers}, 200 if answers else 503)

    async def server(_: Request) -> Response:
        return JSONResponse({"name": "tensorrail", "version": service.server_version, "extensions": EXTENSIONS})

    async def model(request: Request) -> Response:
        _check_model(service, request)
        return JSONResponse(
            {
                "name": service.name,
                "versions": [VERSION],
                "platform": "onnx_onnxv1",
                "inputs": [tensor.metadata() for tensor in service.signature.inputs],
                "outputs": [tensor.metadata() for tensor in service.signature.outputs],
            }
        )

    async def config(request: Request) -> Response:
        _check_model(service, request)
        return JSONResponse(service.signature.configuration(service.name))

    async def model_stats(request: Request) -> Response:
        _check_model(service, request)
        return await stats(request)

    async def stats(_: Request) -> Response:
        return JSONResponse({"model_stats": [{"name": service.name, "version": VERSION, **service.metrics.statistics()}]})

    async def index(_: Request) -> Response:
        answers = not service.stopping and await service.backend.ready()
        state = {"state": "READY", "reason": ""} if answers else {"state": "UNAVAILABLE", "reason": "no replica answers"}
        return JSONResponse([{"name": service.name, "version": VERSION, **state}])

    async def metrics(_: Request) -> Response:
        return Response(service.metrics.exposition(), media_type=CONTENT_TYPE_LATEST)

    async def infer(request: Request) -> Response:
        return await _infer(service, request)

    models = [
        (path + end, call, methods)
        for path in ("/v2/models/{model}", "/v2/models/{model}/versions/{version}")
        for end, call, methods in (
            ("", model, ["GET"]),
            ("/ready", model_ready, ["GET"]),
            ("/config", config, ["GET"]),
            ("/stats", model_stats, ["GET"]),
            ("/infer", infer, ["POST"]),
        )
    ]
    of_all = [] if service.name == "stats" else [("/v2/models/stats", stats, ["GET"])]  # which would hide a model of this name
    routes = [
        ("/v2/health/live", live, ["GET"]),
        ("/v2/health/ready", ready, ["GET"]),
        ("/v2", server, ["GET"]),
        ("/v2/repository/index", index, ["POST"]),
        *of_all,
        *models,
        ("/metrics", metrics, ["GET"]),
    ]
    return Starlette(
        routes=[Route(path, call, methods=methods) for path, call, methods in routes],
        middleware=[Middleware(HeadLimit)],
        exception_handlers={ProtocolError: _refused, HTTPException: _http, Exception: _failed},
    )


class HeadLimit:
    """Refuses a request whose line and headers have more than 64 KiB.

    The server that reads the bytes bounds a head that is still incomplete; one that came at once it has read already.
    """

    def __init__(self, app: ASGIApp) -> None:
        self._app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Answer 431, and close the connection, or pass the request on."""
        headers = scope.get("headers", ())
        size = sum(len(name) + len(value) + 4 for name, value in headers)
        size += len(scope.get("raw_path") or b"") + len(scope.get("query_string", b""))
        if scope["type"] != "http" or size <= LARGEST_HEAD:
            await self._app(scope, receive, send)
            return
        reason = f"expected a request line and headers of at most {LARGEST_HEAD} bytes, got {size}"
        await JSONResponse({"error": reason}, 431, {"connection": "close"})(scope, receive, send)


async def _infer(service: Service, request: Request) -> Response:
    """Answer one inference request within the limits, and count it, whether it succeeds or not."""
    begin = time.perf_counter()
    service.metrics.in_flight += 1
    code, sending = 500, False
    try:
        response = await _answer(service, request)
        code, sending = response.status_code, True
    except ProtocolError as error:
        code = error.status
        raise
    except ClientDisconnect:
        code = _GONE
        return Response(status_code=_GONE)
    finally:
        if not sending:  # an answer is part of the load until it has been sent
            service.metrics.in_flight -= 1
        service.metrics.answered(code, time.perf_counter() - begin)
    return Sent(response, service)


class Sent(Response):
    """An answer that counts as load of the server until its client has read it, at most as long as a request may take.

    It is sent in parts, each after the previous one has left; otherwise the whole answer would be in the buffer of the
    connection, where it is not counted.
    """

    def __init__(self, response: Response, service: Service) -> None:
        self._response, self._service = response, service
        self.status_code, self.background = response.status_code, response.background
        self.raw_headers = response.raw_headers

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Send the answer; the connection of a client that does not read it in time is dropped."""
        body = memoryview(self._response.body)
        try:
            async with asyncio.timeout(self._service.limits.seconds):
                await send({"type": "http.response.start", "status": self.status_code, "headers": self.raw_headers})
                for start in range(0, len(body), _PART):
                    await send({"type": "http.response.body", "body": bytes(body[start : start + _PART]), "more_body": True})
                await send({"type": "http.response.body", "body": b"", "more_body": False})
        except TimeoutError:
            if (extension := scope.get("extensions", {}).get(ABORT)) is not None:
                extension["drop"]()  # closing it would wait until the client has read everything
            return
        finally:
            self._service.metrics.in_flight -= 1
        if self.background is not None:
            await self.background()


async def _answer(service: Service, request: Request) -> Response:
    _check_model(service, request)
    if service.metrics.in_flight > service.limits.accepted:
        raise ProtocolError(f"the server is busy with {service.limits.accepted} requests, its limit: try again later", 503)
    body: bytes | None = None
    try:
        async with asyncio.timeout(service.limits.seconds):
            body = await _read(request, service.limits.body)
            length = request.headers.get("inference-header-content-length")
            read = partial(parse_request, body, length, service.signature.datatypes)
            parsed = await asyncio.to_thread(read) if len(body) > _LARGE else read()
            _check_name(service, parsed)
            feed = service.signature.feed(parsed)
            answer = await _while_wanted(request, service.backend.infer(feed))
            service.metrics.ran(answer)
            if answer.outputs is None:
                raise ProtocolError(answer.reason, 400 if answer.invalid else 500)
            render = partial(render_response, service.name, service.signature, parsed, answer.outputs)
            large = sum(output.size for output in answer.outputs.values()) > _MANY
            content, headers = await asyncio.to_thread(render) if large else render()
    except TimeoutError:
        within = f"within {service.limits.seconds:g} s"
        late = (f"the request was not received {within}", 408) if body is None else (f"no answer {within}", 504)
        raise ProtocolError(*late) from None
    shadow = service.shadow
    task = BackgroundTask(shadow.sample, feed, answer.outputs) if shadow else None
    return Response(content, headers=headers, background=task)


async def _while_wanted(request: Request, answering: Coroutine[Any, Any, Answer]) -> Answer:
    """Return the answer; raises `ClientDisconnect` and cancels `answering` as soon as the client has left."""
    answer, gone = asyncio.create_task(answering), asyncio.create_task(_gone(request))
    try:
        await asyncio.wait({answer, gone}, return_when=asyncio.FIRST_COMPLETED)
        if not answer.done():
            raise ClientDisconnect
        return answer.result()
    finally:
        answer.cancel()
        gone.cancel()


async def _gone(request: Request) -> None:
    """Wait until the client has left; its request must have been read."""
    while (await request.receive())["type"] != "http.disconnect":
        pass


async def _read(request: Request, limit: int) -> bytes:
    """Return the body; raises `ProtocolError` 413 for one over `limit` bytes, without keeping more than that in memory."""
    encoding = request.headers.get("content-encoding", "identity").lower()
    if encoding not in ENCODINGS:
        raise ProtocolError(f"expected a body in {', '.join(ENCODINGS)}, got Content-Encoding {encoding!r:.40}", 415)
    text = request.headers.get("content-length", "")
    announced = int(text) if text.isascii() and text.isdigit() else 0
    refusal = ProtocolError(f"expected a request of at most {limit} bytes, got {announced or 'more'}", 413)
    if announced > limit * _DISCARD or (announced > limit and "expect" in request.headers):
        raise refusal
    chunks: list[bytes] = []
    size = 0
    async for chunk in request.stream():
        size += len(chunk)
        if size <= limit:
            chunks.append(chunk)
        else:
            chunks.clear()
        if size > limit * _DISCARD:
            break
    if size > limit:
        raise refusal
    body = b"".join(chunks)
    if encoding == "identity":
        return body
    return await asyncio.to_thread(expanded, body, encoding, limit)


def _check_model(service: Service, request: Request) -> None:
    name, version = request.path_params["model"], request.path_params.get("version", VERSION)
    if name != service.name:
        raise ProtocolError(f"unknown model {name!r:.80}: this server serves {service.name!r}")
    if version != VERSION:
        raise ProtocolError(f"unknown version {version!r:.40} of {service.name!r}: expected version {VERSION}")


def _check_name(service: Service, parsed: InferRequest) -> None:
    if parsed.model_version not in (None, "", VERSION):
        raise ProtocolError(f"the request is for version {parsed.model_version!r:.40}: expected version {VERSION}")
    if parsed.model_name is not None and parsed.model_name != service.name:
        raise ProtocolError(f"the request is for model {parsed.model_name!r:.80}: this server serves {service.name!r}")


def _refused(_: Request, error: Exception) -> Response:
    status = error.status if isinstance(error, ProtocolError) else 500
    return JSONResponse({"error": str(error)}, status)


def _http(request: Request, error: Exception) -> Response:
    status = error.status_code if isinstance(error, HTTPException) else 500
    reason = {
        404: f"unknown path {request.url.path!r:.80}",
        405: f"{request.method} is not allowed for {request.url.path!r:.80}",
    }
    headers = error.headers if isinstance(error, HTTPException) else None  # a 405 names the allowed methods
    return JSONResponse({"error": reason.get(status, str(error))}, status, headers)


def _failed(_: Request, error: Exception) -> Response:
    return JSONResponse({"error": f"internal error ({type(error).__name__}); see the server's log"}, 500)
