"""Compressed bodies of requests, as clients of Triton send them."""

from __future__ import annotations

import zlib

from tensorrail_runtime.serve.protocol.errors import ProtocolError

ENCODINGS = {"identity": 0, "gzip": 16 + zlib.MAX_WBITS, "deflate": zlib.MAX_WBITS}
"""The values of `Content-Encoding` that are read, with zlib's name of the format."""


def expanded(body: bytes, encoding: str, limit: int) -> bytes:
    """Return the content of a compressed body, of which no more than the limit is ever held.

    Args:
        body: the body as it was sent.
        encoding: `gzip` or `deflate`.
        limit: the largest content, in bytes.

    Raises:
        ProtocolError: the body is not of this format, incomplete, or its content is longer than the limit.

    """
    reader = zlib.decompressobj(ENCODINGS[encoding])
    try:
        content = reader.decompress(body, limit + 1)
    except zlib.error as error:
        raise ProtocolError(f"expected a body in {encoding}, as its Content-Encoding says ({error})") from None
    if len(content) > limit:
        raise ProtocolError(f"expected a request of at most {limit} bytes, got more after {encoding}", 413)
    if not reader.eof or reader.unused_data:
        raise ProtocolError(f"expected a body in {encoding}, as its Content-Encoding says, got one that ends too early or late")
    return content
