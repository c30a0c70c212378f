"""Counts the operators that ONNX Runtime fuses from several nodes of a graph, and compares two models in that.

ONNX Runtime rewrites a graph before it runs it: a convolution takes in the activation behind it, the products and the softmax
of an attention become one `Attention`. A fusion is found by the pattern of its nodes, which a rewritten layer may no longer
match; nothing is said then, and the network may be slower. So the graphs that run are compared.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path

import onnx

from tensorrail_runtime.errors import ModelError
from tensorrail_runtime.graphs.files import descendants
from tensorrail_runtime.graphs.inlining import without_functions
from tensorrail_runtime.records import Record
from tensorrail_runtime.scratch import scratch
from tensorrail_runtime.sessions.session import Session, open_session
from tensorrail_runtime.tables import Part, PrintedRecord, Table

_STANDARD = ("", "ai.onnx")
_STANDARD_FUSED = frozenset(
    {
        *("Attention", "ConvInteger", "Gelu", "Gemm", "GroupNormalization", "InstanceNormalization", "LayerNormalization"),
        *("MatMulInteger", "QLinearConv", "QLinearMatMul", "RMSNormalization", "RotaryEmbedding"),
        "SimplifiedLayerNormalization",
    }
)
"""Operators without a domain that ONNX Runtime may make of several nodes."""
_MOVES = frozenset({"DequantizeLinear", "QuantizeLinear", "ReorderInput", "ReorderOutput"})
"""Operators of ONNX Runtime's own that change the layout or the type of data, and nothing else."""
_PRODUCTS = ("Conv", "Gemm", "FusedMatMul")
_QUANTIZED = ("QLinear", "QAttention", "QGemm", "MatMulInteger", "ConvInteger", "DynamicQuantize")


class FusedOperators(PrintedRecord):
    """The fused operators of a model as ONNX Runtime runs it: those that it makes, not those that the file has."""

    model: str
    provider: str
    counts: dict[str, int]
    """How many there are, by operator; one that takes in an activation or a sum is named so: `Conv + Add + Relu`."""

    def shown(self) -> tuple[Part, ...]:
        """Return the table of fused operators."""
        if not self.counts:
            return (f"{self.model}: ONNX Runtime fuses no nodes on {self.provider}",)
        rows = [(name, str(count)) for name, count in sorted(self.counts.items())]
        return (Table(f"{self.model}: operators that ONNX Runtime fuses on {self.provider}", ("operator", "count"), rows),)


class Fusions(Record):
    """The fused operators of a model and of one that was made from it."""

    before: dict[str, int]
    """How many the first model has, by operator."""
    after: dict[str, int]
    """The same of the second model."""
    unknown: str = ""
    """Why they could not be counted; empty where they were."""

    @property
    def compared(self) -> dict[str, int]:
        """The operators of the first model that the second one may have: in int8, products are fused in other operators."""
        quantized = any(name.startswith(_QUANTIZED) for name in self.after)
        return {name: count for name, count in self.before.items() if not (quantized and name.startswith(_PRODUCTS))}

    @property
    def lost(self) -> dict[str, int]:
        """How many fewer of each the second model has."""
        return {name: n - self.after.get(name, 0) for name, n in self.compared.items() if n > self.after.get(name, 0)}

    def described(self) -> str:
        """Return one line for people; empty where the first model has none that are compared."""
        if self.unknown:
            return f"fused operators of ONNX Runtime are not compared: {self.unknown}"
        if not self.compared:
            return ""
        if not self.lost:
            return f"fused operators of ONNX Runtime: all {sum(self.compared.values())} are still there"
        names = ", ".join(f"{name} {self.before[name]} → {self.after.get(name, 0)}" for name in sorted(self.lost))
        return f"fused operators of ONNX Runtime that are LOST: {names}"


def fused_operators(path: Path | str, settings: Session | None = None) -> FusedOperators:
    """Count the operators that ONNX Runtime fuses when it optimizes a model.

    Args:
        path: the ONNX file.
        settings: how the model runs; default `Session()`: the CPU provider, all optimizations.

    Returns:
        The operators, by name, that the graph that runs has more of than the file.

    Raises:
        ModelError: ONNX Runtime cannot load the model, or the provider is TensorRT, which compiles whole parts of it.

    """
    settings = replace(settings or Session(), cuda_graph=False)
    if settings.provider == "tensorrt":
        raise ModelError("TensorRT compiles whole parts of a model, whose operators it does not tell: use provider 'cuda'")
    with scratch() as folder:
        optimized = Path(folder) / "optimized.onnx"
        open_session(path, settings=settings, optimized=optimized)
        counts = operators_made(path, optimized)
    return FusedOperators(model=Path(path).name, provider=settings.provider, counts=counts)


def operators_made(path: Path | str, optimized: Path | str) -> dict[str, int]:
    """Return how many more operators that may be fused a model has as ONNX Runtime runs it, by name.

    Args:
        path: the ONNX file.
        optimized: the graph that ONNX Runtime made of it.

    """
    before, after = _counted(path), _counted(optimized)
    return {name: count - before.get(name, 0) for name, count in after.items() if count > before.get(name, 0)}


def compared_fusions(before: Path | str, after: Path | str, settings: Session | None = None) -> Fusions:
    """Compare the fused operators of two models.

    Args:
        before: the file of a model.
        after: the file of one that was made from it.
        settings: how both run, as for `fused_operators`.

    Returns:
        The operators of both; or why they are not known, as where ONNX Runtime cannot load a model.

    """
    try:
        one, other = (fused_operators(path, settings) for path in (before, after))
    except (ModelError, OSError) as error:
        return Fusions(before={}, after={}, unknown=str(error))
    return Fusions(before=one.counts, after=other.counts)


def _counted(path: Path | str) -> Mapping[str, int]:
    """Return how many nodes of each kind that may be fused a file has, bodies included."""
    model = without_functions(onnx.load(path, format="protobuf", load_external_data=False))
    graphs = [model.graph, *descendants(model.graph)]
    return Counter(name for graph in graphs for node in graph.node if (name := _kind(node)))


def _kind(node: onnx.NodeProto) -> str:
    """Return the name of a node that may be fused, with what it takes in; empty for any other."""
    taken = _taken_in(node)
    if node.op_type in ("Conv", "FusedConv"):
        return " + ".join(("Conv", *taken)) if taken else ""
    if node.op_type in _MOVES or (node.domain in _STANDARD and node.op_type not in _STANDARD_FUSED):
        return ""
    if node.domain.endswith(("nchwc", "nhwc")) or node.op_type.startswith("Nhwc"):  # operators of ONNX in another layout
        return ""
    return " + ".join((node.op_type.replace("FusedGemm", "Gemm"), *taken))


def _taken_in(node: onnx.NodeProto) -> list[str]:
    """Return what a product takes in besides its bias: a sum, an activation."""
    if node.domain in _STANDARD:
        return []
    sums = ["Add"] if node.op_type in ("Conv", "FusedConv") and len(node.input) > _WITH_BIAS and node.input[_WITH_BIAS] else []
    names = [attribute.s.decode() for attribute in node.attribute if attribute.name == "activation" and attribute.s]
    return [*sums, *names]


_WITH_BIAS = 3  # inputs of a convolution: data, weight, bias
