"""Puts the bodies of a model's functions in place of their calls."""

from __future__ import annotations

from contextlib import suppress

import onnx
import onnx.inliner


def without_functions(model: onnx.ModelProto) -> onnx.ModelProto:
    """Return the model with the bodies of its functions in place of their calls; the model itself if it has none.

    A function of another opset stays if onnx cannot convert it.
    """
    if not model.functions:
        return model
    light = onnx.ModelProto()  # the inliner cannot read a message above 2 GiB
    for field, value in model.ListFields():
        if field.name != "graph":
            getattr(light, field.name).MergeFrom(value) if field.is_repeated else setattr(light, field.name, value)
    for field, value in model.graph.ListFields():
        if field.name != "initializer":
            target = getattr(light.graph, field.name)
            target.MergeFrom(value) if field.is_repeated else setattr(light.graph, field.name, value)
    light.graph.initializer.extend(
        onnx.TensorProto(name=tensor.name, data_type=tensor.data_type, dims=[0]) for tensor in model.graph.initializer
    )
    inlined = onnx.inliner.inline_local_functions(light)
    if inlined.functions:
        with suppress(RuntimeError, onnx.shape_inference.InferenceError):
            inlined = onnx.inliner.inline_local_functions(onnx.shape_inference.infer_shapes(light), convert_version=True)
    known = {opset.domain for opset in inlined.opset_import}
    for opset in (opset for function in model.functions for opset in function.opset_import):
        if opset.domain not in known:
            inlined.opset_import.append(opset)
            known.add(opset.domain)
    del inlined.graph.initializer[:]
    inlined.graph.initializer.extend(model.graph.initializer)
    return inlined
