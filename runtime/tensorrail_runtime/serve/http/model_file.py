"""Reads and tests the model to be served, so that problems are reported before anything starts."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import onnx

from tensorrail_runtime.errors import ModelError, first_line
from tensorrail_runtime.serve.http.options import ServeOptions
from tensorrail_runtime.serve.protocol.signature import Signature
from tensorrail_runtime.serve.replicas.batch_axis import Axes, find_batch_axis
from tensorrail_runtime.sessions.session import Session, open_session


@dataclass(frozen=True)
class Model:
    """A tested model: its bytes with all weights, its signature, its batch axes, and a text about batching."""

    content: bytes
    signature: Signature
    axes: Axes | None
    batching: str


def read_model(path: Path, options: ServeOptions) -> Model:
    """Read and test a model; raises `ModelError` if it cannot be served.

    On a cluster, the model is tested on the CPU, since the provider of the replicas may not be available on this node.
    """
    provider = options.provider if options.address is None else "cpu"
    session = open_session(path, settings=Session(provider=provider, threads=1, linger=False))
    signature = Signature.of(session)
    axes, batching = find_batch_axis(session, signature)
    if options.max_batch == 1:  # the axes still tell the samples of a request
        batching = "the largest batch is 1"
    try:
        content = onnx.load(path, format="protobuf").SerializeToString()
    except Exception as error:  # noqa: BLE001 - protobuf and onnx raise unrelated classes, the last for more than 2 GiB
        raise ModelError(f"{path}: cannot be sent to the replicas ({first_line(error)})") from None
    return Model(content, signature, axes, batching)


def read_shadow(path: Path, served: Model, options: ServeOptions) -> Model:
    """Read a shadow model; raises `ModelError` if its inputs or outputs differ from those of the served model."""
    model = read_model(path, options)
    problem = served.signature.like(model.signature)
    if problem:
        raise ModelError(f"{path}: cannot shadow the served model: {problem}")
    return model
