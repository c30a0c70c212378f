"""Whether a provider computes in fp16, or converts to fp32 and back around every operator.

ONNX Runtime inserts casts around a node for which the provider has no kernel of its type ("Create Float16 and Mixed Precision
Models", onnxruntime.ai/docs/performance/model-optimizations/float16.html). On x86 the CPU provider has no products in fp16; on
arm64 it has. So nothing is assumed for it: a small model is opened, and the graph that would run is looked at.
"""

from __future__ import annotations

from functools import lru_cache
from pathlib import Path

from tensorrail_runtime.scratch import scratch
from tensorrail_runtime.sessions.session import Session, open_session

_CHANNELS = 16


def computes_in_fp16(settings: Session) -> bool:
    """Return whether convolutions and matrix products in fp16 run in fp16.

    Args:
        settings: how a model would run. GPU providers compute in fp16; for the CPU provider a session is opened.

    """
    return settings.on_gpu or _without_casts(settings.provider)


def runs_with_casts(precision: str, settings: Session) -> bool:
    """Return whether a model is in fp16 and the provider computes it in fp32, with casts around operators."""
    return precision == "fp16" and not computes_in_fp16(settings)


@lru_cache
def _without_casts(provider: str) -> bool:
    import onnx

    with scratch() as folder:
        path, optimized = Path(folder) / "half.onnx", Path(folder) / "optimized.onnx"
        path.write_bytes(_small_model())
        open_session(path, provider=provider, optimized=optimized)
        nodes = onnx.load(optimized).graph.node
    return not any(node.op_type == "Cast" for node in nodes)


def _small_model() -> bytes:
    """Return a model of a convolution and a matrix product, all in fp16."""
    import numpy as np
    from onnx import TensorProto, helper, numpy_helper

    rng = np.random.default_rng(0)
    shapes = {"kernel": (_CHANNELS, _CHANNELS, 3, 3), "matrix": (_CHANNELS, _CHANNELS)}
    weights = [numpy_helper.from_array(rng.standard_normal(shape).astype(np.float16), name) for name, shape in shapes.items()]
    nodes = [
        helper.make_node("Conv", ["x", "kernel"], ["c"], "conv", pads=[1] * 4),
        helper.make_node("MatMul", ["c", "matrix"], ["y"], "product"),
    ]
    shape = [1, _CHANNELS, _CHANNELS, _CHANNELS]
    x, y = (helper.make_tensor_value_info(name, TensorProto.FLOAT16, shape) for name in ("x", "y"))
    graph = helper.make_graph(nodes, "halves", [x], [y], weights)
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=9)
    return bytes(model.SerializeToString())
