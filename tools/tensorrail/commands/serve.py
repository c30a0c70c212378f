"""`tensorrail serve`: a model over HTTP."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from tensorrail.commands.arguments import Provider
from tensorrail.commands.groups import Group, grouped
from tensorrail.terminal import console, say

if TYPE_CHECKING:
    from tensorrail_runtime.serve.http.launch import Started
    from tensorrail_runtime.serve.http.options import ServeOptions


def serving_options(
    model: Annotated[Path, typer.Argument(metavar="MODEL.onnx", help="The model to serve.")],
    name: Annotated[str | None, typer.Option(help="The model's name in URLs; default the file's stem.")] = None,
    host: Annotated[str, typer.Option(help="Where to listen; anything but loopback lets others send requests.")] = "127.0.0.1",
    port: Annotated[int, typer.Option(min=0, max=65535, help="Port to listen on; 0: any free port.")] = 8000,
    address: Annotated[
        str | None,
        typer.Option(metavar="auto|HOST:PORT", help="Address of a Ray cluster; default: a local Ray, on loopback."),
    ] = None,
    replicas: Annotated[int, typer.Option(min=1, help="Processes that run the model.")] = 1,
    max_batch: Annotated[int, typer.Option(min=1, help="Samples that are run at once; 1: no batching.")] = 8,
    wait: Annotated[
        float, typer.Option("--batch-wait", min=0, max=60_000, help="Milliseconds that a batch which is not full waits.")
    ] = 5.0,
    threads: Annotated[
        int,
        typer.Option(
            min=0,
            help="Intra-op threads of each replica; 0: the processors that this process may use, shared among the replicas.",
        ),
    ] = 0,
    provider: Provider = "cpu",
    cpus: Annotated[float, typer.Option(min=0.01, help="CPUs that Ray reserves for a replica.")] = 1.0,
    gpus: Annotated[
        float | None, typer.Option(min=0, help="GPUs that Ray reserves for a replica; default 1 with cuda or tensorrt, else 0.")
    ] = None,
    max_mib: Annotated[float, typer.Option("--max-mib", min=0.001, max=2**20, help="Largest request, in MiB.")] = 64.0,
    timeout: Annotated[float, typer.Option(min=0.001, help="Seconds until a request must be answered.")] = 30.0,
    max_requests: Annotated[int, typer.Option(min=1, help="Requests accepted at a time; further ones get 503.")] = 256,
    grace: Annotated[float, typer.Option(min=0, help="Seconds to finish accepted requests after Ctrl-C or SIGTERM.")] = 30.0,
    shadow: Annotated[
        Path | None,
        typer.Option(
            metavar="DENSE.onnx",
            help="Second model that also answers a sample of the requests, for /metrics.",
        ),
    ] = None,
    fraction: Annotated[
        float | None, typer.Option(min=0, max=1, help="The share of requests that the shadow gets; default 0.01.")
    ] = None,
) -> tuple[Path, ServeOptions]:
    """Return the model and how it is served."""
    from tensorrail_runtime.errors import UsageError
    from tensorrail_runtime.serve.http.options import MIB, RequestLimits, ServeOptions

    if fraction is not None and shadow is None:
        raise UsageError("--fraction is the share of requests that a second model gets: give --shadow DENSE.onnx as well")
    return model, ServeOptions(
        name=name or model.stem,
        host=host,
        port=port,
        address=address,
        replicas=replicas,
        max_batch=max_batch,
        wait=wait / 1000,
        threads=threads,
        provider=provider,
        cpus=cpus,
        gpus=gpus,
        limits=RequestLimits(body=int(max_mib * MIB), seconds=timeout, accepted=max_requests),
        shadow=shadow,
        fraction=0.01 if fraction is None else fraction,
        grace=grace,
    )


@grouped
def command(served: Any = Group(serving_options)) -> None:
    """Serve a model over HTTP (Open Inference Protocol 2) on Ray Serve until Ctrl-C or SIGTERM."""
    from tensorrail.verbs.serve import serve

    model, options = served
    serve(model, options, on_start=lambda started: _show(started, options))
    say(f"{options.name}: stopped")


def _show(started: Started, options: ServeOptions) -> None:
    lines = [
        f"{started.name}: {started.model} at {started.url}/v2/models/{started.name}/infer, "
        f"{started.replicas} × {started.threads} threads",
        f"batches of up to {options.max_batch} {started.batching}, waiting at most {1e3 * options.wait:g} ms"
        if started.batched
        else f"no batching: {started.batching}",
        f"metrics at {started.url}/metrics; Ctrl-C or SIGTERM: accepted requests are answered first",
    ]
    if not started.loopback:
        lines.append(
            f"warning: {started.host} is not loopback and there is no authentication: anyone who reaches it may send requests"
        )
    for line in lines:
        say(line)
    console().file.flush()
