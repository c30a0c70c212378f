"""`tensorrail.export_trained`: a trained network of cores becomes an ONNX model, in one call."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from tensorrail.options import Options
from tensorrail.verbs.check import Layers, check
from tensorrail_runtime.errors import GraphError, ModelError, PlanError
from tensorrail_runtime.measure.parity import Parity, relative_l2
from tensorrail_runtime.scratch import scratch
from tensorrail_runtime.sessions.session import Session, open_session, run
from tensorrail_runtime.tables import Part, PrintedRecord

if TYPE_CHECKING:
    from torch import nn

    from tensorrail_exporter.plans.plan import Plan
    from tensorrail_trainer.run.export import Example

FILES = ("dense.onnx", "model.onnx", "plan.json", "cores.safetensors")


class TrainedExport(PrintedRecord):
    """The files that were written, and how far their outputs are from the module's."""

    folder: str
    files: tuple[str, ...]
    layers: int
    """Layers made of cores."""
    torch_difference: float
    """Largest relative L2 difference of an output of `model.onnx` in ONNX Runtime from the module's in torch."""
    tolerance: float
    """The largest difference that holds, from torch and from the dense form."""
    parity: Parity
    """`model.onnx` against `dense.onnx`, in which each weight is reconstructed from its cores."""

    @property
    def holds(self) -> bool:
        """Whether outputs are those of the module and of its dense form, within the tolerance."""
        return self.parity.holds and self.torch_difference <= self.tolerance

    def shown(self) -> tuple[Part, ...]:
        """Return the parity with the dense form, the difference from torch, and the files."""
        words = "within" if self.torch_difference <= self.tolerance else "OUT OF"
        return (
            *self.parity.shown(),
            f"model.onnx differs from the module in torch by {self.torch_difference:.1e} (relative L2), {words} tolerance "
            f"{self.tolerance:g}",
            f"{self.layers} layers made of cores; {', '.join(self.files)} are in {self.folder}",
        )


def export_trained(
    model: nn.Module,
    example: Example,
    folder: Path | str,
    *,
    input_names: Sequence[str] | None = None,
    output_names: Sequence[str] | None = None,
    dynamic_axes: Mapping[str, Mapping[int, str]] | None = None,
    tolerance: float = 1e-4,
    options: Options | None = None,
) -> TrainedExport:
    """Write a trained network with layers made of cores as ONNX, with its plan and its cores, and compare the outputs.

    Args:
        model: the network, as `ADMM.factorize` returns it; it is not changed.
        example: inputs (batch, …) with two samples or more, as for `to_onnx`; outputs are compared on them.
        folder: where `model.onnx`, `dense.onnx` (each weight reconstructed from its cores), `plan.json` and `cores.safetensors`
            are written; it is made if it is not there. Files with these names are replaced.
        input_names: names of the graph's inputs, as for `to_onnx`.
        output_names: names of the graph's outputs, as for `to_onnx`.
        dynamic_axes: the dynamic axes of each input, as for `to_onnx`.
        tolerance: the largest relative L2 difference of an output that holds; default 1e-4.
        options: `session` and `progress`.

    Returns:
        The differences of the outputs, at each layer as well; `print(report)` shows the table, `report.holds` says whether they
        are within the tolerance.

    Raises:
        PlanError: no layer of the network is made of cores.
        GraphError: the network cannot be exported, or a layer cannot be rewritten; nothing is written.
        ModelError: the folder cannot be made, or a model does not run.

    """
    from tensorrail_exporter.graphs.io import save_model
    from tensorrail_exporter.plans.cores import save_cores
    from tensorrail_exporter.rewrite.rewriter import factorize
    from tensorrail_trainer.layers.factored import FactoredLayer
    from tensorrail_trainer.layers.swap import cores_of, to_dense
    from tensorrail_trainer.run.export import require_in_graph, to_onnx

    options = options or Options()
    plan = _plan_of(model)
    cores = {name: [core.numpy() for core in layer] for name, layer in cores_of(model).items()}
    named: dict[str, Any] = {"input_names": input_names, "output_names": output_names, "dynamic_axes": dynamic_axes}
    dense = to_onnx(to_dense(model), example, **named)
    feed, expected = _run_in_torch(model, example, [value.name for value in dense.graph.input])
    specs = {name: module.spec for name, module in model.named_modules() if isinstance(module, FactoredLayer)}
    require_in_graph(dense, specs, "write the network of cores itself, with to_onnx(model, example)")
    factored = factorize(dense, plan, cores)
    with scratch() as place:
        paths = [Path(place) / name for name in FILES[:2]]
        save_model(dense, paths[0])
        save_model(factored.model, paths[1])
        parity = check(*paths, inputs=feed, tolerance=tolerance, layers=Layers(plan, cores), options=options)
        difference = _from_torch(paths[1], feed, expected, options.session)
    folder = Path(folder)
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise ModelError(f"{folder}: cannot be made ({error.strerror or error}): expected a folder to write to") from None
    save_model(dense, folder / FILES[0])
    save_model(factored.model, folder / FILES[1])
    plan.save(folder / FILES[2])
    save_cores(folder / FILES[3], cores)
    return TrainedExport(
        folder=str(folder),
        files=FILES,
        layers=len(plan.layers),
        torch_difference=difference,
        tolerance=tolerance,
        parity=parity,
    )


def _plan_of(model: nn.Module) -> Plan:
    """Return the plan of all layers that are made of cores; raises `PlanError` where there are none."""
    from tensorrail_exporter.plans.plan import Plan
    from tensorrail_trainer.layers.factored import FactoredLayer
    from tensorrail_trainer.layers.recurrent import FactoredRecurrent

    layers = []
    for name, module in model.named_modules():
        if isinstance(module, FactoredLayer):
            layers.append(module.plan.model_copy(update={"name": name}))
        elif isinstance(module, FactoredRecurrent):
            own = module.plans.items()
            layers += [plan.model_copy(update={"name": f"{name}.{leaf}".removeprefix(".")}) for leaf, plan in own]
    if not layers:
        raise PlanError(f"{type(model).__name__} has no layer made of cores: factorize it first, as with ADMM.factorize")
    return Plan(layers=tuple(layers))


def _run_in_torch(model: nn.Module, example: Example, names: Sequence[str]) -> tuple[dict[str, np.ndarray], list[np.ndarray]]:
    """Return the example as arrays by the names of the graph's inputs, and the outputs of the module in evaluation mode."""
    import torch
    from torch.utils._pytree import tree_leaves

    from tensorrail_trainer.run.export import arguments_of

    where = next((tensor.device for tensor in model.parameters()), torch.device("cpu"))
    values = arguments_of(model, example)  # in the order of the graph's inputs
    moved = {name: value.to(where) for name, value in values.items()}
    arguments, keywords = ((), moved) if isinstance(example, Mapping) else (tuple(moved.values()), {})
    training = {name: module.training for name, module in model.named_modules()}
    model.eval()
    try:
        with torch.no_grad():
            outputs = model(*arguments, **keywords)
    finally:
        for name, module in model.named_modules():
            module.training = training[name]
    found = [leaf.detach().cpu().numpy() for leaf in tree_leaves(outputs) if isinstance(leaf, torch.Tensor)]
    return {name: value.detach().cpu().numpy() for name, value in zip(names, values.values(), strict=True)}, found


def _from_torch(path: Path, feed: Mapping[str, np.ndarray], expected: Sequence[np.ndarray], settings: Session) -> float:
    """Return the largest relative L2 difference of an output from that of the module."""
    found = list(run(open_session(path, settings=settings.exact), feed).values())
    if len(found) != len(expected):
        raise GraphError(f"the graph has {len(found)} outputs, but the module returns {len(expected)} tensors")
    return max(
        relative_l2(before.astype(np.float64), after.astype(np.float64)) if before.shape == after.shape else float("inf")
        for before, after in zip(expected, found, strict=True)
    )
