"""From a torch module to a plain ONNX graph: one dynamic batch axis, weights under the module's own names."""

from __future__ import annotations

import contextlib
import copy
import functools
import importlib
import io
import logging
import warnings
from typing import Any

import onnx
import torch
from torch import Tensor, nn

_OPSET = 20


def to_onnx(model: nn.Module, example: Tensor) -> onnx.ModelProto:
    """Return the ONNX graph of a module with one input `image` (batch, …) and one output `logits` (batch, …).

    Batch-norm stays a node of its own: folded into a convolution it would change the weight behind an unchanged name, and
    the cores would no longer be those of that weight. ONNX Runtime folds it when it loads the model.
    `example` has at least two samples, so that the batch axis is not taken for a constant.
    """
    from onnxscript import optimizer
    from onnxscript.rewriter import rewrite
    from onnxscript.rewriter.rules.common import _materialize_reshape_shape, _no_op

    # Weights with their channels last would be written as strided views of themselves.
    plain = copy.deepcopy(model).cpu().eval().to(memory_format=torch.contiguous_format)  # type: ignore[call-overload]
    with _quiet():
        _read_operators_once()
        program = torch.onnx.export(
            plain,
            (example.cpu().contiguous(),),
            dynamo=True,
            optimize=False,
            opset_version=_OPSET,
            dynamic_shapes=({0: torch.export.Dim("batch")},),
            input_names=["image"],
            output_names=["logits"],
            verbose=False,
        )
        if program is None:
            raise RuntimeError("torch.onnx.export returned no program")
        named = _name_by_weights(program.model.graph)
        optimizer.fold_constants(program.model, onnx_shape_inference=True)
        rewrite(program.model, (*_no_op.rules, *_materialize_reshape_shape.rules))
        optimizer.remove_unused_nodes(program.model)
        _name_folded(program.model.graph, named)
    return _without_traces(program.model_proto)


@functools.cache
def _read_operators_once() -> None:
    """Keep the exporter's list of operators, which it makes for every graph from the source of each: a second of CPU time.

    Tested with torch 2.13 and onnxscript 0.7; with versions that keep the list elsewhere, every export makes it anew.
    """
    with contextlib.suppress(ImportError, AttributeError):
        exporter: Any = importlib.import_module("torch.onnx._internal.exporter._registration")  # Any: untyped and private
        apis = exporter.onnxscript_apis
        apis.get_torchlib_ops = functools.cache(apis.get_torchlib_ops)


def _name_by_weights(graph: Any) -> list[tuple[Any, str]]:
    """Name nodes by the weight that they are made of, before folding turns a transposed or joined weight into a new constant.

    A MatMul gets its layer's name; an LSTM or GRU that of its forward input weight. Returns the nodes and their weights' names.
    """
    named = []
    for node in graph:
        if node.op_type not in ("MatMul", "LSTM", "GRU"):
            continue
        waiting = [node.inputs[1]]
        while waiting:
            value = waiting.pop()
            if value is None:
                continue
            producer = value.producer()
            if producer is not None and (producer.op_type == "Transpose" or node.op_type != "MatMul"):
                waiting += list(producer.inputs)
            elif node.op_type == "MatMul":
                if value.name in graph.initializers:
                    node.name = value.name.removesuffix(".weight")
                    named.append((node, value.name))
            elif "weight_ih_l" in (value.name or "") and not value.name.endswith("_reverse"):
                node.name = value.name
                named.append((node, value.name))
    return named


def _name_folded(graph: Any, named: list[tuple[Any, str]]) -> None:
    """Give a weight that was folded into a new constant its parameter's name, once the parameter itself is gone."""
    for node, name in named:
        weight = node.inputs[1]
        if weight.name in graph.initializers and name not in graph.initializers:
            weight.name = name


def _without_traces(model: onnx.ModelProto) -> onnx.ModelProto:
    """Drop the exporter's debugging metadata: it holds source lines and paths of the machine that exported."""
    del model.metadata_props[:]
    del model.graph.metadata_props[:]
    records = [*model.graph.node, *model.graph.value_info, *model.graph.input, *model.graph.output]
    for record in [*records, *model.graph.initializer]:
        del record.metadata_props[:]
        record.doc_string = ""
    return model


@contextlib.contextmanager
def _quiet():  # type: ignore[no-untyped-def] # a generator that yields nothing of use
    """Keep the exporter's progress lines and notes about absent packages off the terminal."""
    level = logging.root.manager.disable
    logging.disable(logging.WARNING)
    try:
        with warnings.catch_warnings(), contextlib.redirect_stdout(io.StringIO()):
            warnings.simplefilter("ignore")
            yield
    finally:
        logging.disable(level)
