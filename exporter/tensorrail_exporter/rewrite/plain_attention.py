r"""com.microsoft.Attention in ONNX's own operators, for runtimes that have no others.

    Attention(X, W, B, M) -> softmax(α Q Kᵀ + M') V of each head, with Q, K, V = Split(X W + B)

M' is the node's mask as a number: 0, `mask_filter_value` where a token does not count, and the lowest float behind a token if
each attends to those before it only; in float16 none is below half its lowest number. W is a layer of the same name as before,
since the product reads the same constant.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import onnx
import onnx_graphsurgeon as gs

from tensorrail_exporter.graphs.io import check_model, export_graph, import_graph, save_model
from tensorrail_exporter.graphs.rounding import Rewritten, require_rounding
from tensorrail_exporter.rewrite.rules import attention
from tensorrail_exporter.rewrite.rules.emit import Site
from tensorrail_exporter.rewrite.sites import NamedLayers, walk
from tensorrail_runtime.graphs.files import descendants, opset_of
from tensorrail_runtime.graphs.operators import CONTRIB
from tensorrail_runtime.scratch import scratch
from tensorrail_runtime.sessions.session import Session

_OPSET = 11  # the first with Range, and with axes that are counted from the end
_FILTER = -10000.0  # the default of mask_filter_value
_ROUNDING = 1e-3  # relative L2 of one attention: scores beside -10000 are rounded to 1e-3 in float32


def plain_attention(model: onnx.ModelProto) -> onnx.ModelProto:
    """Return a copy in which ONNX's own operators compute what each `com.microsoft.Attention` does.

    Nodes that a plan could not name either stay as they are, see `contrib_operators`: those with past keys and values, or with
    a mask that is not known; all of them below opset 11.

    Args:
        model: the model; it is not changed.

    Returns:
        The copy; the model itself if no node can be written so.

    """
    if opset_of(model) < _OPSET:
        return model
    graph = import_graph(model)
    names = NamedLayers(graph).names
    found = [(inner, node) for inner, node in walk(graph) if _is_attention(node) and not attention.why_not(node)]
    if not found:
        return model
    for inner, node in found:
        _Writer(Site(inner, node, names), node.name or node.inputs[1].name).write()
    written = export_graph(graph, model)
    if not contrib_operators(written):
        kept = [entry for entry in written.opset_import if entry.domain != CONTRIB]
        del written.opset_import[:]
        written.opset_import.extend(kept)
    check_model(written, model)
    return written


def require_equal(path: Path, plain: onnx.ModelProto, feed: Mapping[str, np.ndarray], settings: Session) -> None:
    """Compare what `plain_attention` returned with the file of the model that it was made from.

    Roundings of different attentions are independent: the limit grows as the root of their number.

    Args:
        path: the file of the model.
        plain: the same model in ONNX's operators.
        feed: inputs by name.
        settings: how both run.

    Raises:
        GraphError: the outputs differ by more than rounding.
        ModelError: a model does not run, or the outputs cannot be compared.

    """
    with scratch() as folder:
        written = Path(folder) / "plain.onnx"
        save_model(plain, written)
        before = contrib_operators(onnx.load(path, load_external_data=False))["Attention"]
        count = before - contrib_operators(plain)["Attention"]
        rewritten = Rewritten(
            "the model in operators of ONNX to differ",
            "keep the operators of com.microsoft",
            _ROUNDING,
            math.sqrt(max(1, count)),
        )
        require_rounding(path, written, [feed], rewritten, settings)


def contrib_operators(model: onnx.ModelProto) -> Counter[str]:
    """Return how many operators of com.microsoft a model has, by their names, those in bodies included."""
    graphs = [model.graph, *descendants(model.graph)]
    return Counter(node.op_type for graph in graphs for node in graph.node if node.domain == CONTRIB)


def _lowest(dtype: np.dtype) -> float:
    """Return the lowest number that hides a token; half the lowest float16, since a score is added to it."""
    lowest = float(np.finfo(dtype).min)
    return lowest / 2 if dtype == np.float16 else lowest


def _is_attention(node: gs.Node) -> bool:
    return bool(node.domain == CONTRIB and node.op == "Attention")


@dataclass(frozen=True)
class _Writer:
    """Writes the operators of one attention; new names begin with `name`."""

    site: Site
    name: str

    def write(self) -> None:
        """Replace the node."""
        node, dtype = self.site.node, np.dtype(self.site.node.inputs[1].dtype)
        target = node.outputs[0]
        heads, sizes = int(node.attrs["num_heads"]), attention.sizes_of(node)
        scale = node.attrs.get("scale", 0.0) or 1 / math.sqrt(sizes[0] // heads)
        data, weight = node.inputs[:2]
        bias, mask, added = (attention.given(node, place) for place in (attention.BIAS, attention.MASK, attention.ADDED))
        node.outputs.clear()
        product = self.add("MatMul", [data, weight], "product", dtype)
        product.inputs[0].name = node.name or product.inputs[0].name  # by which a plan may call the layer
        if bias is not None:
            product = self.add("Add", [product, bias], "biased", dtype)
        parts = self.site.split(product, sizes, 2, f"{self.name}/qkv", dtype)
        query, key, value = (
            self.add("Reshape", [part, self.constant("heads", [0, 0, heads, size // heads])], "part", dtype)
            for part, size in zip(parts, sizes, strict=True)
        )
        query, value = (self.add("Transpose", [part], "by_head", dtype, perm=[0, 2, 1, 3]) for part in (query, value))
        key = self.add("Transpose", [key], "turned", dtype, perm=[0, 2, 3, 1])
        scores = self.add("MatMul", [query, key], "products", dtype)
        scores = self.add("Mul", [scores, self.constant("scale", scale, dtype)], "scores", dtype)
        number = self.mask(mask, scores, dtype)
        for term in (added, number):
            scores = scores if term is None else self.add("Add", [scores, term], "masked", dtype)
        shares = self.add("Softmax", [scores], "shares", dtype, axis=3)
        seen = self.add("MatMul", [shares, value], "seen", dtype)
        seen = self.add("Transpose", [seen], "by_token", dtype, perm=[0, 2, 1, 3])
        self.site.append("Reshape", f"{self.name}/join", [seen, self.constant("joined", [0, 0, sizes[2]])], target)

    def mask(self, mask: gs.Tensor | None, scores: gs.Tensor, dtype: np.dtype) -> gs.Tensor | None:
        """Return what is added to the scores (B, N, S, T): a tensor that has as many axes, or fewer; None for nothing."""
        node = self.site.node
        zero, number = self.constant("nothing", 0, dtype), None
        if mask is not None:
            counts = self.counts(mask, scores)
            hidden = self.constant("filter", max(node.attrs.get("mask_filter_value", _FILTER), _lowest(dtype)), dtype)
            number = self.add("Where", [counts, zero, hidden], "mask", dtype)
        if node.attrs.get("unidirectional", 0):
            rows = self.unsqueezed(self.positions(scores, 2), [1])
            later = self.add("Less", [rows, self.positions(scores, 3)], "later", np.dtype(bool))
            lowest = self.constant("lowest", _lowest(dtype), dtype)
            number = self.add("Where", [later, lowest, zero if number is None else number], "causal", dtype)
        return number

    def counts(self, mask: gs.Tensor, scores: gs.Tensor) -> gs.Tensor:
        """Return whether each token counts, from lengths (B,), or from a mask (B, T) or (B, S, T)."""
        if len(mask.shape) == 1:
            lengths = self.add("Cast", [self.unsqueezed(mask, [1, 2, 3])], "lengths", np.dtype(np.int64), to=7)
            return self.add("Less", [self.positions(scores, 3), lengths], "counts", np.dtype(bool))
        mask = self.unsqueezed(mask, [1] if len(mask.shape) == 3 else [1, 2])
        return self.add("Greater", [mask, self.constant("zero", 0, np.dtype(np.int32))], "counts", np.dtype(bool))

    def positions(self, scores: gs.Tensor, axis: int) -> gs.Tensor:
        """Return 0, 1, … along an axis of the scores."""
        integers = np.dtype(np.int64)
        size = self.add(
            "Gather", [self.add("Shape", [scores], "shape", integers), self.constant("axis", axis)], "size", integers
        )
        return self.add("Range", [self.constant("first", 0), size, self.constant("step", 1)], "positions", integers)

    def unsqueezed(self, tensor: gs.Tensor, axes: Sequence[int]) -> gs.Tensor:
        dtype = np.dtype(tensor.dtype) if tensor.dtype is not None else np.dtype(np.int32)
        return self.site.unsqueezed(tensor, axes, f"{self.name}/unsqueezed", dtype)

    def add(self, op: str, inputs: list[gs.Tensor], what: str, dtype: np.dtype, **attrs: object) -> gs.Tensor:
        out = self.site.variable(f"{self.name}/{what}", dtype)
        self.site.append(op, f"{self.name}/{what}_node", inputs, out, attrs)
        return out

    def constant(self, what: str, values: object, dtype: np.dtype | None = None) -> gs.Constant:
        return self.site.constant(f"{self.name}/{what}", np.array(values, np.int64 if dtype is None else dtype))
