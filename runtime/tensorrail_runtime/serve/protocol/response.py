"""Writes the answer to an inference request, each output as JSON or as binary data, as requested."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
from pydantic_core import to_json as write_json

from tensorrail_runtime.serve.protocol import datatypes
from tensorrail_runtime.serve.protocol.request import InferRequest, Wish
from tensorrail_runtime.serve.protocol.signature import Signature

VERSION = "1"  # the server has one version of one model


def render_response(
    model: str, signature: Signature, request: InferRequest, outputs: Mapping[str, np.ndarray]
) -> tuple[bytes, dict[str, str]]:
    """Return the body and the headers of the answer; raises `ProtocolError` for values that JSON cannot represent.

    The outputs are in the order in which they were requested, else in the order of the model.
    """
    kinds = {tensor.name: tensor.datatype for tensor in signature.outputs}
    entries: list[dict[str, Any]] = []
    binary: list[bytes] = []
    for wish in request.outputs or tuple(Wish(tensor.name) for tensor in signature.outputs):
        array = outputs[wish.name]
        entry: dict[str, Any] = {"name": wish.name, "datatype": kinds[wish.name], "shape": list(array.shape)}
        if request.binary if wish.binary is None else wish.binary:
            binary.append(datatypes.to_binary(array))
            entry["parameters"] = {"binary_data_size": len(binary[-1])}
        else:
            entry["data"] = datatypes.to_json(wish.name, array)
        entries.append(entry)
    content: dict[str, Any] = {"model_name": model, "model_version": VERSION, "outputs": entries}
    if request.id is not None:
        content["id"] = request.id
    head = write_json(content)
    if not binary:
        return head, {"content-type": "application/json"}
    headers = {"content-type": "application/octet-stream", "inference-header-content-length": str(len(head))}
    return b"".join((head, *binary)), headers
