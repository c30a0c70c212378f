"""Serves a model over HTTP by the Open Inference Protocol 2, with replicas and dynamic batching on Ray Serve.

Needs the extra `serve`. This package, the protocol, the signature and the batch axis can be imported without Ray.
"""

from tensorrail_runtime.serve.http.options import RequestLimits, ServeOptions
from tensorrail_runtime.serve.protocol.errors import ProtocolError

__all__ = ["ProtocolError", "RequestLimits", "ServeOptions"]
