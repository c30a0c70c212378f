"""Writes the answer to an inference request, each output as JSON or as binary data, as requested."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
from pydantic_core import to_json as write_json

from tensorrail_runtime.serve.protocol import datatypes
from tensorrail_runtime.serve.protocol.errors import ProtocolError
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
        array, kind = outputs[wish.name], kinds[wish.name]
        if wish.classes:
            array, kind = best_classes(wish.name, array, wish.classes), "BYTES"
        entry: dict[str, Any] = {"name": wish.name, "datatype": kind, "shape": list(array.shape)}
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


def best_classes(name: str, scores: np.ndarray, count: int) -> np.ndarray:
    """Return the best classes of an output as strings `score:class`, the best one first.

    Args:
        name: the name of the output.
        scores: the scores, (…, classes).
        count: the number of classes to return; at most all.

    Returns:
        Strings, (…, count).

    Raises:
        ProtocolError: the output has no axis of classes, or its values are no numbers.

    """
    if not scores.ndim or scores.dtype.kind not in "fiu":
        raise ProtocolError(f"output {name!r}: `classification` expects scores of shape (…, classes), got {list(scores.shape)}")
    order = np.argsort(-scores.astype(np.float64), -1, kind="stable")[..., :count]
    best = np.take_along_axis(scores, order, -1)
    texts = [f"{score:f}:{index}" for score, index in zip(best.ravel().tolist(), order.ravel().tolist(), strict=True)]
    return np.array(texts, object).reshape(order.shape)
