"""Export a torch module to a plain ONNX graph whose weights have the names of the module's parameters."""

from __future__ import annotations

import contextlib
import copy
import inspect
import io
import logging
import warnings
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any

import onnx
import torch
from torch import Tensor, nn

from tensorrail_exporter.formats.contraction import LayerSpec
from tensorrail_runtime.errors import GraphError, PlanError
from tensorrail_trainer.layers.dense import pads
from tensorrail_trainer.layers.fused import attention_in_parts
from tensorrail_trainer.layers.recurrent import INPUTS, LOOPS
from tensorrail_trainer.layers.swap import require_copyable
from tensorrail_trainer.layers.torchs_own import CONVOLUTIONS
from tensorrail_trainer.run._compat_onnxscript import simplification_rules
from tensorrail_trainer.run._compat_torch import forget_recurrent_kernels, operators_read_once

_OPSET = 20


Example = Tensor | Sequence[Tensor] | Mapping[str, Tensor]


def to_onnx(
    module: nn.Module,
    example: Example,
    *,
    input_names: Sequence[str] | None = None,
    output_names: Sequence[str] | None = None,
    dynamic_axes: Mapping[str, Mapping[int, str]] | None = None,
) -> onnx.ModelProto:
    """Return the ONNX graph of a module; the weights have the names of the module's parameters.

    Batch-norm stays a separate node: if it were folded into a convolution, the weight would change under the same name and the
    cores would no longer belong to it. ONNX Runtime folds it when it loads the model.

    Args:
        module: any module that `torch.export` can trace; it is exported in evaluation mode and is not changed.
        example: one input (batch, …), several inputs by position, or several by the name of the argument of `forward`. Each
            dynamic axis must have a size of two or more, since `torch.export` treats smaller sizes as constants.
        input_names: names of the graph's inputs; default `image` for a single tensor, else the names of the arguments of
            `forward`.
        output_names: names of the graph's outputs; default `logits` for one output, else `output_0`, `output_1`, ….
        dynamic_axes: for each input, the dynamic axes with their names; axes with the same name have the same size. Default:
            axis 0 of every input is dynamic and named `batch`.

    Returns:
        The model; its metadata holds no paths or source lines.

    Raises:
        GraphError: the module cannot be traced with these inputs, or a name or an axis does not exist.

    """
    return Tracing(module, example, input_names=input_names, output_names=output_names, dynamic_axes=dynamic_axes).graph()


def require_in_graph(dense: onnx.ModelProto, specs: Mapping[str, LayerSpec], instead: str) -> None:
    """Raise `GraphError` for a layer whose weight a dense graph does not hold as a whole: it has no place for the cores.

    Args:
        dense: the graph of a dense module, from `to_onnx`.
        specs: what the layers that are made of cores compute, by name.
        instead: what to do instead, as the end of the message.

    """
    split = {node.input[0] for node in dense.graph.node if node.op_type == "Split"}
    tables = {node.input[0] for node in dense.graph.node if node.op_type == "Gather"}
    for name, spec in specs.items():
        if name in split:
            raise GraphError(
                f"layer {name}: expected attention whose query, key and value are one tensor, got different ones; a dense "
                f"graph multiplies them by parts of this weight, which have no cores of their own: {instead}"
            )
        if spec.gathers and f"{name}.weight" not in tables:
            raise GraphError(
                f"layer {name}: expected an embedding of indices that a run gives, got indices that the module stores, such as "
                f"positions; a dense graph holds their rows instead of the table: {instead}"
            )


class Tracing:
    """A module that is traced once, to export it and modules that differ only in their weights.

    It takes the arguments of `to_onnx` and raises the same errors.
    """

    def __init__(
        self,
        module: nn.Module,
        example: Example,
        *,
        input_names: Sequence[str] | None = None,
        output_names: Sequence[str] | None = None,
        dynamic_axes: Mapping[str, Mapping[int, str]] | None = None,
    ) -> None:
        try:
            require_copyable(module)
        except PlanError as error:
            raise GraphError(f"{type(module).__name__} cannot be exported: {error}") from None
        self._architecture = _architecture(module)
        arguments = arguments_of(module, example)
        names = tuple(input_names or (("image",) if isinstance(example, Tensor) else arguments))
        if len(names) != len(arguments):
            raise GraphError(f"input_names: expected {len(arguments)} names, one per input, got {len(names)}")
        axes = {name: {0: "batch"} for name in names} if dynamic_axes is None else dynamic_axes
        _check_axes(axes, dict(zip(names, arguments.values(), strict=True)))
        sizes = {axis: torch.export.Dim(axis) for named in axes.values() for axis in named.values()}
        shapes = tuple({k: sizes[axis] for k, axis in axes.get(name, {}).items()} for name in names)
        by_name = isinstance(example, Mapping)
        _require_operators(module)
        has_lengths = any(set(named) - {0} for named in axes.values())  # or other dynamic axes that are not the batch
        # Weights in channels_last memory format would be written as strided views.
        plain = copy.deepcopy(module).cpu().eval().to(memory_format=torch.contiguous_format)  # type: ignore[call-overload]
        with _quiet(), attention_in_parts(), operators_read_once():
            if has_lengths and any(isinstance(part, nn.RNNBase) for part in plain.modules()):
                forget_recurrent_kernels()
            try:
                program = torch.onnx.export(
                    plain,
                    () if by_name else tuple(arguments.values()),
                    kwargs=arguments if by_name else None,
                    dynamo=True,
                    optimize=False,
                    opset_version=_OPSET,
                    dynamic_shapes=dict(zip(arguments, shapes, strict=True)) if by_name else _as_signature(plain, shapes),
                    input_names=names,
                    output_names=output_names,
                    verbose=False,
                )
            except torch.onnx.OnnxExporterError as error:
                raise GraphError(f"{type(module).__name__} cannot be exported: {_reason(error)}") from error
        if program is None:
            raise GraphError(f"{type(module).__name__} cannot be exported: torch.onnx.export returned no program")
        _require_dynamic(axes, program.model.graph.inputs)
        if output_names is None and len(program.model.graph.outputs) == 1:
            program.model.graph.outputs[0].name = "logits"
        self._program = program.model
        self._inferred = has_lengths and _forget_lengths(self._program.graph)

    def graph(self, module: nn.Module | None = None) -> onnx.ModelProto:
        """Return the graph of the traced module, or of a module that differs only in its weights.

        Args:
            module: a module of the same architecture; default the traced module.

        Returns:
            The model, as from `to_onnx`.

        Raises:
            GraphError: the module has another architecture.

        """
        from onnxscript import ir, optimizer
        from onnxscript.rewriter import rewrite

        model = self._program.clone()
        if module is not None:
            if not self.fits(module):
                raise GraphError(
                    f"expected a module of the architecture that was traced, got a {type(module).__name__} of another one"
                )
            tensors = {**dict(module.named_parameters()), **dict(module.named_buffers())}
            for name, value in model.graph.initializers.items():
                if name in tensors:
                    value.const_value = ir.tensor(tensors[name].detach().cpu().contiguous(), name=name)
        with _quiet():
            named = _name_by_weights(model.graph)
            optimizer.fold_constants(model, onnx_shape_inference=True)
            rewrite(model, simplification_rules())
            optimizer.remove_unused_nodes(model)
            _name_folded(model.graph, named)
        proto = ir.to_proto(model)
        return _without_traces(onnx.shape_inference.infer_shapes(proto, data_prop=True) if self._inferred else proto)

    def fits(self, module: nn.Module) -> bool:
        """Return whether a module has the same layers and weight shapes as the traced module."""
        return self._architecture == _architecture(module)


def _architecture(module: nn.Module) -> tuple[tuple[object, ...], ...]:
    """Return what a module computes, without the values of its tensors."""
    tensors = (*module.named_parameters(), *module.named_buffers())
    layers = ((name, _computes(part)) for name, part in module.named_modules())
    return (*layers, *((name, tensor.shape, tensor.dtype) for name, tensor in tensors))


def _computes(module: nn.Module) -> tuple[object, ...]:
    """Return the class whose `forward` a module has, and its options; equal paddings may be written differently."""
    kind = next(kind for kind in type(module).__mro__ if "forward" in vars(kind))
    if not isinstance(module, CONVOLUTIONS):
        return kind, module.extra_repr()
    padding = pads(module)
    names = ("in_channels", "out_channels", "kernel_size", "stride", "dilation", "groups", "padding_mode", "output_padding")
    return (kind, padding, module.bias is not None, *(getattr(module, name) for name in names))


def arguments_of(module: nn.Module, example: Example) -> dict[str, Tensor]:
    """Return the inputs on the CPU, by the names of the arguments of `forward`."""
    if isinstance(example, Mapping):
        given = dict(example)
    else:
        values = (example,) if isinstance(example, Tensor) else tuple(example)
        try:
            bound = inspect.signature(module.forward).bind(*values).arguments
        except TypeError as error:
            raise GraphError(f"{type(module).__name__}.forward cannot take {len(values)} inputs: {error}") from None
        given = {}
        for name, value in bound.items():
            given |= {f"{name}_{k}": item for k, item in enumerate(value)} if isinstance(value, tuple) else {name: value}
    for name, value in given.items():
        if not isinstance(value, Tensor):
            raise GraphError(f"input {name}: expected a tensor, got {type(value).__name__}")
    return {name: value.cpu().contiguous() for name, value in given.items()}


def _as_signature(module: nn.Module, shapes: tuple[dict[int, Any], ...]) -> tuple[Any, ...]:
    """Return the axes of positional inputs as `torch.export` expects them: the axes of `*args` in a nested tuple."""
    kinds = [parameter.kind for parameter in inspect.signature(module.forward).parameters.values()]
    first = kinds.index(inspect.Parameter.VAR_POSITIONAL) if inspect.Parameter.VAR_POSITIONAL in kinds else len(shapes)
    return (*shapes[:first], shapes[first:]) if first < len(shapes) else shapes


def _check_axes(axes: Mapping[str, Mapping[int, str]], inputs: Mapping[str, Tensor]) -> None:
    for name, named in axes.items():
        if name not in inputs:
            raise GraphError(f"dynamic_axes: {name} is not an input; the inputs are {', '.join(inputs)}")
        for axis, label in named.items():
            shape = list(inputs[name].shape)
            if not 0 <= axis < len(shape):
                raise GraphError(f"dynamic_axes: input {name} of shape {shape} has no axis {axis}")
            if shape[axis] < 2:
                raise GraphError(
                    f"dynamic_axes: axis {axis} ({label}) of input {name} has size {shape[axis]} in the example, which "
                    "torch.export takes for a constant; give an example with size 2 or more"
                )


def _require_dynamic(axes: Mapping[str, Mapping[int, str]], inputs: Iterable[Any]) -> None:
    """Raise `GraphError` if a dynamic axis became fixed in the graph, which the exporter does not always report."""
    shapes = {value.name: [str(size) for size in value.shape] for value in inputs}
    for name, named in axes.items():
        for axis, label in named.items():
            if name in shapes and shapes[name][axis].isdigit():
                raise GraphError(
                    f"axis {axis} ({label}) of input {name} is {shapes[name][axis]} in the graph: the module computes with the "
                    "example's size as a constant; leave the axis out of dynamic_axes, or change the module"
                )


def _require_operators(module: nn.Module) -> None:
    """Raise `GraphError` for a layer for which torch's exporter would write a graph that does not run."""
    for name, part in module.named_modules():
        if isinstance(part, nn.LSTM) and part.proj_size:
            raise GraphError(
                f"{type(module).__name__} cannot be exported: {name or 'it'} is an LSTM with proj_size={part.proj_size}, and "
                "ONNX's LSTM has no projection; use proj_size=0, and factor its recurrent weight for a smaller one"
            )


def _reason(error: BaseException) -> str:
    """Return the first line of the original cause of an error."""
    while error.__cause__ is not None:
        error = error.__cause__
    return next((line.strip() for line in str(error).splitlines() if line.strip()), type(error).__name__)


def _forget_lengths(graph: Any) -> bool:
    """Remove the shapes of all tensors that depend on a recurrent layer: torch stores the example's length as a constant.

    Returns whether there are such tensors; ONNX then infers their shapes.
    """
    affected: set[Any] = set()
    for node in graph:
        if node.op_type in ("LSTM", "GRU", "RNN") or not affected.isdisjoint(node.inputs):
            affected.update(node.outputs)
    for value in affected:
        value.shape = None
    return bool(affected)


def _name_by_weights(graph: Any) -> list[tuple[Any, int, str]]:
    """Name nodes after their weights, before constant folding turns a transposed or concatenated weight into a new constant.

    A MatMul gets the name of its layer, an LSTM or GRU the name of its forward input weight. Returns the nodes, the places of
    their weights among the inputs, and the names of the weights.
    """
    named = []
    for node in graph:
        if node.op_type not in ("MatMul", "LSTM", "GRU"):
            continue
        if node.op_type == "MatMul":
            for value in _above(node.inputs[1], through=("Transpose",)):
                if value.name in graph.initializers:
                    node.name = value.name.removesuffix(".weight")
                    named.append((node, 1, value.name))
            continue
        for place, start in ((1, INPUTS), (2, LOOPS)):
            for value in _above(node.inputs[place]):
                leaf = (value.name or "").rpartition(".")[2]  # cores have names such as `cores.weight_hh_l0.1`
                if leaf.startswith(start) and not leaf.endswith("_reverse"):
                    node.name = value.name if place == 1 else node.name
                    named.append((node, place, value.name))
    return named


def _above(value: Any, through: Sequence[str] | None = None) -> Iterator[Any]:
    """Yield the values that a value is computed from by operators of some kinds; default: of any kind."""
    pending = [value]
    while pending:
        value = pending.pop()
        if value is None:
            continue
        producer = value.producer()
        if producer is not None and (through is None or producer.op_type in through):
            pending += list(producer.inputs)
        else:
            yield value


def _name_folded(graph: Any, named: list[tuple[Any, int, str]]) -> None:
    """Give a weight that was folded into a new constant the name of its parameter, if the parameter was removed."""
    for node, place, name in named:
        weight = node.inputs[place]
        if weight.name in graph.initializers and name not in graph.initializers:
            weight.name = name


def _without_traces(model: onnx.ModelProto) -> onnx.ModelProto:
    """Remove the debugging metadata of the exporter, which holds source lines and paths of the exporting machine.

    The shapes of weights among those of intermediate values are removed as well: the weights have shapes of their own, and
    tools that transpose a weight, such as ONNX Runtime's `quantize_dynamic`, leave the other shape as it was.
    """
    stored = {tensor.name for tensor in model.graph.initializer}
    between = [value for value in model.graph.value_info if value.name not in stored]
    del model.graph.value_info[:]
    model.graph.value_info.extend(between)
    del model.metadata_props[:]
    del model.graph.metadata_props[:]
    records = [*model.graph.node, *model.graph.value_info, *model.graph.input, *model.graph.output]
    for record in [*records, *model.graph.initializer]:
        del record.metadata_props[:]
        record.doc_string = ""
    return model


@contextlib.contextmanager
def _quiet():  # type: ignore[no-untyped-def] # a generator that yields nothing of use
    """Suppress the exporter's progress lines and its warnings about missing packages."""
    level = logging.root.manager.disable
    logging.disable(logging.ERROR)  # errors are raised as exceptions
    try:
        with warnings.catch_warnings(), contextlib.redirect_stdout(io.StringIO()):
            warnings.simplefilter("ignore")
            yield
    finally:
        logging.disable(level)
