"""Serving a model over HTTP: Open Inference Protocol 2, replicas and dynamic batching on Ray Serve. The extra `serve`.

What needs no Ray (the protocol, the signature, the batch axis) is importable without it, and so is this package.
"""

from tensorrail_runtime.serve.http.options import Limits, ServeOptions
from tensorrail_runtime.serve.protocol.errors import ProtocolError

__all__ = ["Limits", "ProtocolError", "ServeOptions"]
