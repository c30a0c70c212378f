"""Reading and writing ONNX files: whole, checked, and never outside the model's folder."""

from __future__ import annotations

from pathlib import Path

import onnx
from google.protobuf.message import DecodeError

from tensorrail_exporter.errors import GraphError
from tensorrail_runtime.records import write_bytes


def load_model(path: Path | str) -> onnx.ModelProto:
    """Read and check an ONNX file; `GraphError` in one line when it is not one.

    External data is read through onnx's own resolver, which refuses absolute paths, links and paths that leave the folder.
    """
    path = Path(path)
    try:
        model = onnx.load(path)
        onnx.checker.check_model(model)
    except OSError as error:
        raise GraphError(f"{path}: cannot be read ({error.strerror or error}): expected an ONNX model") from None
    except DecodeError:
        raise GraphError(f"{path}: not an ONNX model, or a truncated one: its protobuf cannot be parsed") from None
    except onnx.checker.ValidationError as error:
        raise GraphError(f"{path}: not a valid ONNX model ({_first_line(error)})") from None
    if not model.graph.node:
        raise GraphError(f"{path}: an ONNX model without a node: nothing to run or rewrite")
    return model


def save_model(model: onnx.ModelProto, path: Path | str) -> None:
    """Write an ONNX file whole or not at all."""
    write_bytes(path, model.SerializeToString())


def check_model(model: onnx.ModelProto) -> None:
    """Run onnx's full check, shapes included; `GraphError` says what it found."""
    try:
        onnx.checker.check_model(model, full_check=True)
    except (onnx.checker.ValidationError, onnx.shape_inference.InferenceError) as error:
        raise GraphError(f"the rewritten graph does not pass onnx.checker ({_first_line(error)})") from None


def _first_line(error: Exception) -> str:
    return str(error).strip().partition("\n")[0]
