"""`tensorrail package`: a model as a serving system takes it."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from tensorrail.commands.arguments import Json, Nhwc, Provider, Shape, Tf32
from tensorrail.commands.groups import Group, grouped
from tensorrail.terminal import finish

if TYPE_CHECKING:
    from tensorrail_runtime.sessions.session import Session
    from tensorrail_runtime.triton.package import Repository, Serving


def repository_options(
    name: Annotated[str | None, typer.Option(help="The model's name in Triton; default: the file's.")] = None,
    dense: Annotated[
        Path | None, typer.Option(metavar="DENSE.onnx", help="The dense model beside it: version 1, and MODEL version 2.")
    ] = None,
    separate: Annotated[bool, typer.Option("--separate", help="Two models, NAME and NAME-dense, not two versions.")] = False,
    shape: Shape = None,
    tolerance: Annotated[
        float, typer.Option(min=0, help="Largest relative L2 difference of an answer in a batch from a single one.")
    ] = 1e-3,
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Replace the Triton model of that name.")] = False,
) -> Repository:
    """Return what is written beside the model itself."""
    from tensorrail_runtime.sessions.inputs import parse_shapes
    from tensorrail_runtime.triton.package import Repository

    return Repository(name, dense, separate, parse_shapes(shape or []), tolerance, overwrite)


def session_options(
    threads: Annotated[int, typer.Option(min=0, help="Intra-op threads of an instance; 0: ONNX Runtime's own choice.")] = 0,
    level: Annotated[str, typer.Option(metavar="none|basic|extended|all", help="Graph optimization level.")] = "all",
    provider: Provider = "cpu",
    tf32: Tf32 = False,
    nhwc: Nhwc = False,
) -> Session:
    """Return how the model runs in Triton."""
    from tensorrail_runtime.sessions.session import Session

    return Session(provider=provider, threads=threads, level=level, tf32=tf32, nhwc=nhwc)


def serving_options(
    versions: Annotated[
        str | None, typer.Option(metavar="latest|all|1,2", help="Versions that are served; default: all that are written.")
    ] = None,
    max_batch: Annotated[
        int | None, typer.Option(min=0, help="Largest batch, 0: none; default: 8 where every first axis is dynamic.")
    ] = None,
    preferred: Annotated[
        list[int] | None, typer.Option(min=1, help="A batch size that runs as soon as it is full; may be repeated.")
    ] = None,
    max_delay: Annotated[int, typer.Option(min=0, help="Microseconds that a request waits for others.")] = 0,
    no_dynamic_batching: Annotated[
        bool, typer.Option("--no-dynamic-batching", help="Requests are not put together; clients may still send batches.")
    ] = False,
    instances: Annotated[int, typer.Option(min=1, help="Instances that run at the same time, on each GPU or on the CPU.")] = 1,
    gpu: Annotated[list[int] | None, typer.Option(min=0, help="Number of a GPU; default: all. May be repeated.")] = None,
    warmup: Annotated[int, typer.Option(min=0, help="Warm-up requests of each batch size before the model is ready.")] = 1,
    warmup_data: Annotated[
        str, typer.Option(metavar="zero|random", help="Values of warm-up requests: zeros, or random bytes (integers stay 0).")
    ] = "zero",
) -> Serving:
    """Return how Triton batches and runs the model."""
    from tensorrail_runtime.triton.package import Serving

    return Serving(
        max_batch=max_batch,
        dynamic_batching=not no_dynamic_batching,
        preferred=tuple(preferred or ()),
        delay=max_delay,
        instances=instances,
        gpus=tuple(gpu or ()),
        warmup=warmup,
        warmup_data=warmup_data,  # type: ignore[arg-type] # checked there, with the values that exist
        versions=_versions(versions),  # type: ignore[arg-type] # likewise
    )


@grouped
def command(
    model: Annotated[Path, typer.Argument(metavar="MODEL.onnx", help="The model to serve.")],
    triton: Annotated[Path, typer.Option("--triton", metavar="DIR", help="Triton's model repository; other models stay.")],
    repository: Any = Group(repository_options),
    serving: Any = Group(serving_options),
    session: Any = Group(session_options),
    json: Json = None,
) -> None:
    """Write a model into a Triton model repository: config.pbtxt from the graph, the model and its external data."""
    from dataclasses import replace

    from tensorrail.verbs.package import package

    report = package(model, triton, contents=repository, serving=replace(serving, settings=session))
    finish(report, json)


def _versions(text: str | None) -> str | tuple[int, ...] | None:
    from tensorrail_runtime.errors import UsageError

    if text in (None, "latest", "all"):
        return text
    parts = text.split(",") if text else []
    if not parts or not all(part.strip().isdecimal() for part in parts):
        raise UsageError(f"--versions: expected latest, all, or numbers such as 1,2, got {text!r}")
    return tuple(int(part) for part in parts)
