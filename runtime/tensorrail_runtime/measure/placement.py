"""Reports on which provider each node ran and how long it took, from ONNX Runtime's own profile."""

from __future__ import annotations

import json
from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np
import onnx

from tensorrail_runtime.records import Record
from tensorrail_runtime.scratch import scratch
from tensorrail_runtime.sessions.inputs import Shapes, random_inputs
from tensorrail_runtime.sessions.session import PROVIDERS, Session, open_session, run
from tensorrail_runtime.sessions.values import Values
from tensorrail_runtime.tables import Part, PrintedRecord, Table

_RUNS = 10
_WARMUP = 3


class PlacedNode(Record):
    """One node as it ran, after ONNX Runtime's own graph optimization: a fused node is named after what it was made from."""

    name: str
    op: str
    provider: str
    microseconds: float  # median time of its kernel over the profiled runs
    share: float  # of the sum of all nodes' times


class Placement(PrintedRecord):
    """All nodes of a model that ran, in order."""

    model: str
    provider: str
    nodes: tuple[PlacedNode, ...]

    @property
    def providers(self) -> dict[str, int]:
        """The number of nodes that ran on each provider."""
        counts: dict[str, int] = defaultdict(int)
        for node in self.nodes:
            counts[node.provider] += 1
        return dict(counts)

    @property
    def elsewhere(self) -> tuple[PlacedNode, ...]:
        """The nodes that ran on another provider than the one asked for."""
        return tuple(node for node in self.nodes if node.provider != PROVIDERS[self.provider])

    def shown(self) -> tuple[Part, ...]:
        """Return the table of nodes, and how many ran elsewhere than asked."""
        rows = [
            (
                node.name,
                node.op,
                node.provider.removesuffix("ExecutionProvider"),
                f"{node.microseconds:,.0f}",
                f"{node.share:.1%}",
            )
            for node in self.nodes
        ]
        counts = ", ".join(f"{count} on {name.removesuffix('ExecutionProvider')}" for name, count in self.providers.items())
        time = "time (µs)" if self.provider == "cpu" else "time to launch (µs)"
        table = Table(f"{self.model}: {counts}", ("node as it ran", "op", "provider", time, "share"), rows)
        elsewhere = len(self.elsewhere)
        return (table, f"{elsewhere} nodes ran elsewhere than on {self.provider}") if elsewhere else (table,)


def placement(
    path: Path | str,
    *,
    settings: Session | None = None,
    inputs: Mapping[str, np.ndarray] | None = None,
    batch: int = 1,
    shapes: Shapes | None = None,
    values: Values | None = None,
) -> Placement:
    """Run a model with ONNX Runtime's profiler and return where each node ran.

    On a GPU, the time of a node is that of launching its kernels, which run asynchronously: it does not say how long they take
    (github.com/microsoft/onnxruntime/issues/20398).

    Args:
        path: the ONNX file.
        settings: the options of the session; CUDA graphs are turned off, since the profiler does not see kernels in them.
        inputs: the inputs by name; without them, random ones.
        batch: the size of dynamic axes that `shapes` does not set, for random inputs.
        shapes: shapes of inputs by name, for random inputs.
        values: known values of inputs by name, in place of random ones.

    Returns:
        The nodes in the order in which they ran.

    Raises:
        ModelError: the model cannot be loaded or run.

    """
    settings = replace(settings or Session(), cuda_graph=False)
    with scratch() as folder:
        session = open_session(path, settings=settings, profile=Path(folder) / "profile")
        feed = dict(inputs) if inputs is not None else random_inputs(session, batch, shapes=shapes, values=values)
        for _ in range(_WARMUP + _RUNS):
            run(session, feed)
        events = json.loads(Path(session.end_profiling()).read_text(encoding="utf-8"))
    times: dict[str, list[float]] = defaultdict(list)
    kinds: dict[str, tuple[str, str]] = {}
    for event in events:
        if event.get("cat") == "Node" and event["name"].endswith("_kernel_time"):
            name = event["name"].removesuffix("_kernel_time")
            times[name].append(float(event["dur"]))
            kinds[name] = (event["args"].get("op_name", ""), event["args"].get("provider", ""))
    # A node in the body of a loop runs several times in each run of the model: its time is their sum per run.
    medians = {name: _per_run(values) for name, values in times.items()}
    total = sum(medians.values()) or 1.0
    nodes = [
        PlacedNode(name=name, op=kinds[name][0], provider=kinds[name][1], microseconds=value, share=value / total)
        for name, value in medians.items()
    ]
    return Placement(model=Path(path).name, provider=settings.provider, nodes=tuple(nodes))


def time_shares(
    path: Path | str, placed: Placement, layers: Sequence[str], outputs: Mapping[str, str] | None = None
) -> dict[str, float]:
    """Return the share of the time that each layer's nodes took, by the name of the layer; the rest is that of other nodes.

    ONNX Runtime names a fused node after its output tensor, so the product in it is found by walking up the graph from there.

    Args:
        path: the ONNX file of the placement.
        placed: where the nodes ran and how long they took.
        layers: names of layers, whose nodes are named `<layer>/…`.
        outputs: the layer that computes a tensor, by the name of the tensor: for a dense graph without such node names.

    """
    graph = onnx.load(path, format="protobuf", load_external_data=False).graph
    nodes_by_name = {node.name: node for node in graph.node if node.name}
    producers = {output: node for node in graph.node for output in node.output}
    shares = dict.fromkeys(layers, 0.0)
    for node in placed.nodes:
        origin = nodes_by_name.get(node.name) or producers.get(node.name.removesuffix("_nchwc"))
        while origin is not None and _is_product(node.op) and not _is_product(origin.op_type):
            origin = producers.get(origin.input[0]) if origin.input else None
        if origin is None:
            continue
        owner = next((layer for layer in layers if origin.name.startswith(f"{layer}/")), None)
        owner = owner or next((outputs[name] for name in origin.output if outputs and name in outputs), None)
        if owner in shares:
            shares[owner] += node.share
    return shares


def _is_product(op: str) -> bool:
    return any(kind in op for kind in ("Conv", "Gemm", "MatMul", "LSTM", "GRU"))


def _per_run(values: list[float]) -> float:
    runs = _WARMUP + _RUNS
    if len(values) % runs:
        return sum(values) / runs
    return float(np.median(np.reshape(values, (runs, -1)).sum(1)[_WARMUP:]))
