"""What a connection may take before a request is whole: bytes and time. A real server on loopback, no Ray."""

import contextlib
import http.client
import socket
import threading
import time

import pytest

pytest.importorskip("uvicorn", reason="the extra `serve` is not installed")
pytest.importorskip("httptools", reason="uvicorn reads HTTP with h11 here, which has limits of its own")

import uvicorn

from tensorrail_runtime.serve.http._compat_uvicorn import http_protocol


async def echo(scope, receive, send):
    size = 0
    while True:
        message = await receive()
        size += len(message.get("body", b""))
        if not message.get("more_body"):
            break
    await send({"type": "http.response.start", "status": 200, "headers": []})
    await send({"type": "http.response.body", "body": str(size).encode()})


@pytest.fixture
def port(request):
    """Serve `echo` with half a second for the head of a request, or as long as a test says, and return the port."""
    listening = socket.create_server(("127.0.0.1", 0))
    config = uvicorn.Config(
        echo, http=http_protocol(getattr(request, "param", 0.5)), lifespan="off", log_level="critical", ws="none"
    )
    server = uvicorn.Server(config)
    thread = threading.Thread(target=server.run, kwargs={"sockets": [listening]})
    thread.start()
    yield listening.getsockname()[1]
    server.should_exit = True
    thread.join(30)


def ended(connection):
    """Return what comes until the server closes the connection."""
    connection.settimeout(20)
    content = b""
    with contextlib.suppress(ConnectionResetError):
        while part := connection.recv(1 << 16):
            content += part
    return content


def test_long_bodies_and_several_requests_a_connection_are_no_matter(port):
    connection = http.client.HTTPConnection("127.0.0.1", port, timeout=20)
    for size in (0, 1 << 20, 3, 1 << 18):
        connection.request("POST", "/", b"x" * size)
        assert connection.getresponse().read() == str(size).encode()
    time.sleep(0.8)  # between requests there is more time
    connection.request("POST", "/", b"x")
    assert connection.getresponse().read() == b"1"
    connection.close()


@pytest.mark.parametrize("port", [600.0], indirect=True)
@pytest.mark.parametrize("head", [b"a: b\r\n" * 20_000, b"a: " + b"b" * 120_000])
def test_a_head_of_more_than_64_kib_is_refused(port, head):
    with socket.create_connection(("127.0.0.1", port)) as connection:
        with contextlib.suppress(ConnectionError):
            connection.sendall(b"GET / HTTP/1.1\r\n" + head)
        content = ended(connection)  # which waits for less than a head may take
    assert not content or content.startswith(b"HTTP/1.1 431")  # a reset may come before it


@pytest.mark.parametrize("port", [600.0], indirect=True)
def test_trailers_of_any_length_are_not_taken(port):
    with socket.create_connection(("127.0.0.1", port)) as connection:
        connection.sendall(b"POST / HTTP/1.1\r\nhost: x\r\ntransfer-encoding: chunked\r\n\r\n3\r\nabc\r\n0\r\n")
        with contextlib.suppress(ConnectionError):
            for _ in range(2000):
                connection.sendall(b"a: " + b"b" * 100_000 + b"\r\n")
            pytest.fail("200 MB of trailers were read")
    with socket.create_connection(("127.0.0.1", port)) as connection:  # small chunks have more around them than in them
        chunks = b"1\r\nx\r\n" * 50_000 + b"0\r\nt: u\r\n\r\n"
        connection.sendall(b"POST / HTTP/1.1\r\nhost: x\r\nconnection: close\r\ntransfer-encoding: chunked\r\n\r\n" + chunks)
        assert b"50000" in ended(connection)


def test_a_body_that_does_not_come_closes_its_connection(port):
    with socket.create_connection(("127.0.0.1", port)) as connection:
        connection.sendall(b"POST / HTTP/1.1\r\nhost: x\r\ncontent-length: 100000\r\n\r\n")
        begin = time.monotonic()
        with contextlib.suppress(ConnectionError):
            while time.monotonic() - begin < 20:
                connection.sendall(b"x")
                time.sleep(0.1)
        assert time.monotonic() - begin < 10


def test_a_head_that_does_not_come_closes_its_connection(port):
    with socket.create_connection(("127.0.0.1", port)) as connection:
        connection.sendall(b"GET / HTTP/1.1\r\nhost: x\r\n")
        begin = time.monotonic()
        assert ended(connection) == b""
        assert time.monotonic() - begin < 15
