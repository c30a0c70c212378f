"""Dense graph + plan + cores → factored graph: rewrite → remove unused → check."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

import numpy as np
import onnx
import onnx_graphsurgeon as gs

from tensorrail_exporter.formats import WIDTH, format_of
from tensorrail_exporter.formats.contraction import Conv, LayerSpec, Reshape, SplitIndex, Step, describe, runs_in_scan
from tensorrail_exporter.formats.width import describe_narrow, selected, with_inputs
from tensorrail_exporter.graphs.fold import is_standard
from tensorrail_exporter.graphs.io import check_model, export_graph
from tensorrail_exporter.plans.cores import Cores, check_cores
from tensorrail_exporter.plans.costs import contraction_cost
from tensorrail_exporter.plans.padding import pad_ranks
from tensorrail_exporter.plans.plan import LayerPlan, Plan
from tensorrail_exporter.rewrite.channels import channels_of
from tensorrail_exporter.rewrite.narrowed_heads import NarrowedHeads, heads_table
from tensorrail_exporter.rewrite.negligible import without_negligible
from tensorrail_exporter.rewrite.resolve import ResolvedLayer, ResolvedPlan, resolve
from tensorrail_exporter.rewrite.rules.emit import Site
from tensorrail_exporter.rewrite.rules.scan import holds_scan, why_no_scan
from tensorrail_runtime.errors import GraphError, PlanError
from tensorrail_runtime.measure.fusions import Fusions
from tensorrail_runtime.records import Record
from tensorrail_runtime.tables import Part, PrintedRecord, Table


class LayerRewrite(Record):
    """How one layer was rewritten. Parameters count the weight without the bias; FLOPs are 2 × MACs of one sample.

    If several nodes share the weight and differ in stride or dilation, steps and FLOPs are those of the first node.
    """

    layer: str
    op: str
    nodes: int  # number of nodes that share the weight; all were rewritten
    shape: tuple[int, ...]
    format: str
    modes: tuple[int, ...]
    ranks: tuple[int, ...]  # as in the cores, after clamping
    block: int  # ranks are padded with zeros to multiples of it
    merge: str
    merged: tuple[tuple[int, ...], ...]  # cores in each stored constant; one: the trained core, in the node's order of axes
    batch_norm: bool  # whether the batch norm after it was folded into the last constant
    scan: bool = False  # whether it runs as a Scan
    steps: str
    kernels: int
    flops: int
    activation_bytes: int
    dense_params: int
    core_params: int
    stored_params: int
    weight_error: float  # ‖W − reconstruct(cores)‖ / ‖W‖, with W from the dense graph


class Rewrites(PrintedRecord):
    """All rewritten layers of a graph, as a file. `dense` lists planned layers that run with a reconstructed weight."""

    layers: tuple[LayerRewrite, ...]
    dense: tuple[LayerPlan, ...] = ()
    heads: tuple[NarrowedHeads, ...] = ()  # attention heads of a smaller size
    fusions: Fusions | None = None  # the operators that ONNX Runtime fuses in the dense and in the factored model
    model: str = ""  # the file that was written

    def shown(self) -> tuple[Part, ...]:
        """Return the table of planned layers."""
        rows = [
            (r.layer, r.op, r.format, r.steps, f"{r.dense_params:,}", f"{r.stored_params:,}", f"{r.weight_error:.1e}")
            for r in self.layers
        ]
        rows += [(layer.name, "", layer.format, "dense weight, faster here", "", "", "") for layer in self.dense]
        head = ("layer", "op", "format", "runs as", "dense parameters", "stored parameters", "weight error")
        heads = (heads_table(self.heads),) if self.heads else ()
        line = "" if self.fusions is None else self.fusions.described()
        return (Table(self.model, head, rows), *heads, *((line,) if line else ()))


@dataclass(frozen=True)
class Factored:
    """The factored graph, and how each layer was rewritten."""

    model: onnx.ModelProto
    layers: tuple[LayerRewrite, ...]


def factorize(
    model: onnx.ModelProto,
    plan: Plan,
    cores: Cores,
    *,
    block: int | Mapping[str, int] = 1,
    fold_batch_norm: bool = False,
    scan: bool = True,
) -> Factored:
    """Return the graph with every planned layer rewritten to the contraction of its cores.

    Args:
        model: the dense graph; it is not changed.
        plan: the layers, formats, modes and ranks.
        cores: the cores of each planned layer, by name.
        block: ranks are padded with zeros to multiples of it, which changes no output; one number for all layers, or one per
            layer name (1 for a layer without an entry); default 1.
        fold_batch_norm: whether a batch norm that is the only consumer of a rewritten convolution is folded into its last core;
            default False, which keeps every trained core unchanged.
        scan: whether a recurrent layer may run as a Scan, which is fast on CPUs only: one without a rank between input and
            output, or with a factored recurrent weight; default True.

    Returns:
        The factored graph, and how each layer was rewritten.

    Raises:
        GraphError: a planned layer is not in the graph, has no cores or cannot be rewritten, such as a recurrent weight without
            a Scan.
        PlanError: modes, ranks or cores do not fit the weight.

    """
    return rewrite(resolve(model, plan), cores, block=block, fold_batch_norm=fold_batch_norm, scan=scan)


def reconstruct(model: onnx.ModelProto, plan: Plan, cores: Cores) -> onnx.ModelProto:
    """Return the graph with every planned weight replaced by the dense weight reconstructed from its cores.

    Its outputs differ from the dense graph's by the approximation error, and from the factored graph's by the numerical error.

    Args:
        model: the dense graph; it is not changed.
        plan: the layers, formats, modes and ranks.
        cores: the cores of each planned layer, by name.

    Returns:
        The graph with reconstructed weights.

    Raises:
        GraphError: a planned layer is not in the graph or cannot be rewritten.
        PlanError: modes, ranks or cores do not fit the weight.

    """
    return with_cores(resolve(model, plan), cores)


def decompose_graph(model: onnx.ModelProto, plan: Plan) -> dict[str, list[np.ndarray]]:
    """Decompose the weight of every planned layer.

    Args:
        model: the dense graph; it is not changed.
        plan: the layers, formats, modes and ranks.

    Returns:
        The cores of each planned layer, by name.

    Raises:
        GraphError: a planned layer is not in the graph, cannot be rewritten, or has NaN or infinite weights.
        PlanError: modes or ranks do not fit the weight.

    """
    return decompose(resolve(model, plan))


def rewrite(
    resolved: ResolvedPlan,
    cores: Cores,
    *,
    block: int | Mapping[str, int] = 1,
    fold_batch_norm: bool = False,
    scan: bool = True,
) -> Factored:
    """Do the same as `factorize` for a resolved plan, which is not changed."""
    work = resolved.copy()
    require_scan(work, scan)
    scan = scan and holds_scan(work.model)
    loops = {id(site.node) for layer in work.layers.values() if layer.spec.state_products for site in layer.sites}
    rewrites = {}
    for layer in _in_order(work):
        layer_plan, spec = layer.plan, layer.spec
        _require_cores(layer_plan.name, cores)
        check_cores(layer_plan, cores[layer_plan.name], spec.shape, spec.groups)
        specs = [node_spec if scan else replace(node_spec, scan=False) for node_spec in layer.specs]
        weight = layer.weight
        layer_block = block if isinstance(block, int) else block.get(layer_plan.name, 1)
        merged = layer_plan.model_copy(update={"merge": layer_plan.merge_for(specs[0])})
        padded = pad_ranks(layer_plan, cores[layer_plan.name], spec.shape, layer_block, spec.groups)
        # Nodes that share a weight may differ in stride, dilation or the axes of their input.
        steps = [merged.contraction(padded, node_spec) for node_spec in specs]
        narrow = layer_plan.format == WIDTH and _narrow_before(layer, cores[layer_plan.name])
        if narrow:
            steps = [node_steps[1:] for node_steps in steps]
        folded = []
        for site, node_spec, node_steps in zip(layer.sites, specs, steps, strict=True):
            final_steps = _with_batch_norm(site, node_steps) if fold_batch_norm else node_steps
            folded.append(final_steps is not node_steps)
            gates = id(site.node) in loops and not node_spec.state_products
            in_scan = runs_in_scan(node_steps, node_spec)
            layer.rule.rewrite(replace(site, scan=in_scan, gates=gates), final_steps, layer_plan.name)
        rewrites[layer_plan.name] = _record(
            merged,
            layer.sites,
            specs[0],
            weight,
            cores[layer_plan.name],
            steps[0],
            block=layer_block,
            batch_norm=all(folded),
            narrow=narrow,
        )
    factored = export_graph(work.graph, work.model)
    check_model(factored, work.model)
    return Factored(factored, tuple(rewrites[name] for name in work.layers))


def _in_order(work: ResolvedPlan) -> list[ResolvedLayer]:
    """Return the layers in the order of the plan, but for two kinds that come last.

    Those that read fewer channels change the layers before them. A recurrent weight replaces its node, after the input weight.
    """
    narrow = [layer for layer in work.in_graph_order if layer.plan.format == WIDTH]
    loops = [layer for layer in work.layers.values() if layer.spec.state_products]
    last = {layer.plan.name for layer in (*narrow, *loops)}
    return [*(layer for name, layer in work.layers.items() if name not in last), *narrow, *loops]


def require_scan(resolved: ResolvedPlan, scan: bool) -> None:
    """Raise `GraphError` if a recurrent weight is planned, and its cores cannot run in a Scan.

    Args:
        resolved: the plan in the dense graph.
        scan: whether a Scan may be written; it is not for a GPU.

    """
    why = why_no_scan(resolved.model, scan)
    for name, layer in resolved.layers.items():
        if layer.spec.state_products and why:
            raise GraphError(f"layer {name}: {why}, or leave the layer out of the plan")


def _narrow_before(layer: ResolvedLayer, cores: Sequence[np.ndarray]) -> bool:
    """Let the layers before a layer compute no channels but those that it selects; return False where that cannot be."""
    kept = selected(cores[1])
    found = channels_of(layer.sites[0]) if len(layer.sites) == 1 and kept is not None else None
    if found is None or kept is None:
        return False
    found.narrow(kept.tolist(), layer.sites[0], layer.plan.name)
    return True


def _require_cores(name: str, cores: Cores) -> None:
    if name not in cores:
        raise GraphError(
            f"layer {name}: expected cores for every planned layer, got cores only for {', '.join(cores) or 'none'}; add this "
            "layer's cores, or remove it from the plan"
        )


def with_cores(resolved: ResolvedPlan, cores: Cores) -> onnx.ModelProto:
    """Do the same as `reconstruct` for a resolved plan, which is not changed."""
    weights = {}
    for name, layer in resolved.layers.items():
        shape, groups = layer.spec.shape, layer.spec.groups
        _require_cores(name, cores)
        check_cores(layer.plan, cores[name], shape, groups)
        weights[name] = np.asarray(layer.plan.reconstruct(cores[name], shape, groups))
    return with_weights(resolved, weights)


def with_weights(resolved: ResolvedPlan, weights: Mapping[str, np.ndarray]) -> onnx.ModelProto:
    """Return the graph with new weights for some planned layers.

    Args:
        resolved: the plan in the dense graph; it is not changed.
        weights: weights (O, I, *K) by layer name, a recurrent layer's gates in torch's order.

    Returns:
        The graph with these weights.

    """
    work = resolved.copy()
    for name, weight in weights.items():
        layer = work.layers[name]
        for site in layer.sites:
            stored = without_negligible(weight.astype(layer.dtype))
            layer.rule.replace_weight(site.node, stored, site.names.unique(f"{name}/dense"))
    return export_graph(work.graph, work.model)


def decompose(resolved: ResolvedPlan) -> dict[str, list[np.ndarray]]:
    """Do the same as `decompose_graph` for a resolved plan."""
    cores = {}
    for name, layer in resolved.layers.items():
        values = layer.weight if layer.weight.dtype == np.float64 else layer.weight.astype(np.float32)
        check_finite(name, values)
        try:
            cores[name] = layer.plan.decompose(values, layer.spec.groups)
        except PlanError as error:
            raise PlanError(f"layer {name}: {error}") from None
    return cores


def check_finite(layer: str, weight: np.ndarray) -> None:
    """Raise `GraphError` if a weight holds NaN or infinite values."""
    if not np.isfinite(weight).all():
        raise GraphError(
            f"layer {layer}: its weight holds NaN or infinite values and cannot be decomposed: "
            "repair the model, or keep the layer dense"
        )


def _with_batch_norm(site: Site, steps: tuple[Step, ...]) -> tuple[Step, ...]:
    """Fold the batch norm after a convolution into its last step and bias; return the same steps if nothing can be folded."""
    node, last = site.node, steps[-1]
    consumers = node.outputs[0].outputs
    if not isinstance(last, Conv) or len(consumers) != 1 or consumers[0].op != "BatchNormalization":
        return steps
    norm = consumers[0]
    if not is_standard(norm) or not any(norm is other for other in site.graph.nodes):  # an output of a body
        return steps
    constants = norm.inputs[1:5]
    bias = node.inputs[2] if len(node.inputs) > 2 and not node.inputs[2].is_empty() else None
    inference = not norm.attrs.get("training_mode", 0) and len(norm.outputs) == 1
    constant_inputs = all(isinstance(tensor, gs.Constant) for tensor in constants) and (
        bias is None or isinstance(bias, gs.Constant)
    )
    constant_inputs = constant_inputs and all(
        tuple(tensor.shape) == last.weight.shape[:1] for tensor in constants
    )  # one value per channel
    if not inference or not constant_inputs or any(node.outputs[0] is out for out in site.graph.outputs):
        return steps
    scale, shift, mean, variance = (np.asarray(tensor.values, np.float64) for tensor in constants)
    factor = scale / np.sqrt(variance + norm.attrs.get("epsilon", 1e-5))
    before = 0.0 if bias is None else np.asarray(bias.values, np.float64)
    values = ((before - mean) * factor + shift).astype(node.inputs[1].dtype)
    folded = gs.Constant(site.names.unique(f"{norm.name or node.name}/folded_bias"), values)
    if len(node.inputs) > 2:
        node.inputs[2] = folded
    else:
        node.inputs.append(folded)
    node.outputs[0] = norm.outputs[0]
    norm.outputs.clear()
    weight = last.weight * factor.reshape(-1, *(1,) * (last.weight.ndim - 1))
    return (*steps[:-1], replace(last, weight=weight))


def _record(
    layer: LayerPlan,
    sites: Sequence[Site],
    spec: LayerSpec,
    weight: np.ndarray,
    cores: Sequence[np.ndarray],
    steps: tuple[Step, ...],
    *,
    block: int,
    batch_norm: bool,
    narrow: bool,
) -> LayerRewrite:
    constants = [step for step in steps if not isinstance(step, Reshape | SplitIndex)]
    cost = contraction_cost(steps, with_inputs(spec, cores[1].shape[0]) if narrow else spec)
    dense_weight = weight.astype(np.float64)
    residual = dense_weight - layer.reconstruct([core.astype(np.float64) for core in cores], spec.shape, spec.groups)
    return LayerRewrite(
        layer=layer.name,
        op=sites[0].node.op,
        nodes=len(sites),
        shape=spec.shape,
        format=layer.format,
        modes=layer.modes,
        ranks=format_of(layer.format, spec.groups).clamp(spec.shape, layer.modes, layer.ranks),
        block=block,
        merge=layer.merge,
        merged=tuple(step.cores for step in constants),
        batch_norm=batch_norm,
        scan=runs_in_scan(steps, spec),
        steps=describe_narrow(steps, spec) if narrow else describe(steps, spec),
        kernels=cost.kernels,
        flops=cost.flops,
        activation_bytes=cost.activation_bytes,
        dense_params=weight.size,
        core_params=sum(core.size for core in cores),
        stored_params=cost.stored_bytes // 4,
        weight_error=float(np.linalg.norm(residual) / (np.linalg.norm(dense_weight) or 1.0)),
    )
