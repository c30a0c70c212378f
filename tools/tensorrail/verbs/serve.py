"""`tensorrail.serve`: a model over HTTP."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

from tensorrail.models import require_finite_weights
from tensorrail_runtime.serve.http.launch import Started, serve_model
from tensorrail_runtime.serve.http.options import ServeOptions


def serve(
    model: Path | str, serving: ServeOptions | None = None, *, on_start: Callable[[Started], None] = lambda _: None
) -> None:
    """Serve a model over HTTP (Open Inference Protocol 2) on Ray Serve until Ctrl-C or SIGTERM.

    Args:
        model: the model's file.
        serving: name, address, replicas, batching and limits; default: the file's name on 127.0.0.1:8000.
        on_start: called once the server is ready, with its address.

    Raises:
        ModelError: the model cannot be served as asked.

    """
    require_finite_weights(Path(model))
    serve_model(Path(model), serving or ServeOptions(name=Path(model).stem), on_start)
