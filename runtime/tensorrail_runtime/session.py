"""The one place that opens ONNX Runtime sessions."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import numpy as np
import onnxruntime as ort

PROVIDERS = {"cpu": "CPUExecutionProvider", "cuda": "CUDAExecutionProvider"}


class ModelError(ValueError):
    """A model cannot be loaded or run as asked; one line that says why."""


def open_session(
    path: Path | str,
    *,
    provider: str = "cpu",
    threads: int = 0,
    tf32: bool = False,
    optimized: Path | str | None = None,
    optimize: bool = True,
) -> ort.InferenceSession:
    """Open a model on one provider; `ModelError` when it is no model or the provider is not really there.

    `threads` is the number of intra-op threads, 0 for ONNX Runtime's own choice; TF32 is off unless asked for, since it
    changes results in the fourth digit. `optimized` names a file for the graph as ONNX Runtime runs it.
    """
    if provider not in PROVIDERS:
        raise ModelError(f"unknown provider {provider!r}: expected one of {', '.join(PROVIDERS)}")
    name = PROVIDERS[provider]
    if name not in ort.get_available_providers():
        raise ModelError(f"provider {provider!r} is not in this ONNX Runtime, which has {ort.get_available_providers()}")
    options = ort.SessionOptions()
    options.log_severity_level = 3
    options.intra_op_num_threads = threads
    if not optimize:
        options.graph_optimization_level = ort.GraphOptimizationLevel.ORT_DISABLE_ALL
    if optimized is not None:
        options.optimized_model_filepath = str(optimized)
    entry = (name, {"use_tf32": str(int(tf32))}) if provider == "cuda" else name
    try:
        session = ort.InferenceSession(str(path), options, providers=[entry])
    except Exception as error:  # noqa: BLE001 - ONNX Runtime raises a dozen unrelated classes from its C++ side
        raise ModelError(f"{path}: ONNX Runtime cannot load it ({_first_line(error)})") from None
    if session.get_providers()[0] != name:
        raise ModelError(f"{path}: asked for {name}, and ONNX Runtime fell back to {session.get_providers()}")
    return session


def run(session: ort.InferenceSession, inputs: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
    """Run a session once and return its outputs by name; `ModelError` names an input that does not fit."""
    wanted = [entry.name for entry in session.get_inputs()]
    if set(wanted) != set(inputs):
        raise ModelError(f"the model's inputs are {', '.join(wanted)}, and {', '.join(inputs) or 'none'} came")
    names = [entry.name for entry in session.get_outputs()]
    try:
        return dict(zip(names, session.run(names, dict(inputs)), strict=True))
    except Exception as error:  # noqa: BLE001 - as above
        raise ModelError(f"ONNX Runtime cannot run the model on these inputs ({_first_line(error)})") from None


def _first_line(error: Exception) -> str:
    return str(error).strip().partition("\n")[0]
