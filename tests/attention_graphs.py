"""Graphs with `com.microsoft.Attention`, as `onnxruntime.transformers` writes them, and the attention in NumPy."""

from __future__ import annotations

import numpy as np
from onnx import TensorProto, helper, numpy_helper

BATCH, TOKENS, FEATURES, HEADS = 2, 6, 16, 4
PADDED = np.array([[1, 1, 1, 1, 0, 0], [1, 1, 1, 0, 0, 0]], np.int32)
MASKS = {
    "none": None,
    "padding": PADDED,
    "padding on the left": PADDED[:, ::-1],
    "a sample without tokens": PADDED * np.array([[1], [0]], np.int32),
    "lengths": np.array([4, 3], np.int32),
    "of each token": np.tril(np.ones((BATCH, TOKENS, TOKENS), np.int32)),
}


def attention_model(rng, *, sizes=None, bias=True, mask=None, scores=None, opset=17, tail=False, **attributes):
    """Return a model of one attention over x (B, S, 16), whose weight is `qkv.weight`.

    `sizes` are the numbers of outputs of query, key and value; `mask` and `scores` (what is added to the scores) are arrays of
    the shapes that its inputs of these names have; `tail`: a product and a normalisation of ONNX Runtime's own follow.
    """
    parts = sizes or (FEATURES,) * 3
    constants = {"qkv.weight": rng.standard_normal((FEATURES, sum(parts))) / FEATURES**0.5}
    constants |= {"qkv.bias": rng.standard_normal(sum(parts))} if bias else {}
    inputs = [helper.make_tensor_value_info("x", TensorProto.FLOAT, ["batch", "tokens", FEATURES])]
    names = ["x", "qkv.weight", "qkv.bias" if bias else ""]
    if mask is not None:
        axes = {1: ["batch" if len(mask) == BATCH else len(mask)], 2: ["batch", "tokens"], 3: ["batch", "tokens", "tokens"]}
        inputs.append(helper.make_tensor_value_info("mask", TensorProto.INT32, axes.get(mask.ndim, list(mask.shape))))
    if scores is not None:
        inputs.append(helper.make_tensor_value_info("scores", TensorProto.FLOAT, list(scores.shape)))
    names += ["" if mask is None else "mask", "", "" if scores is None else "scores"]
    while not names[-1]:
        names.pop()
    attributes |= {"qkv_hidden_sizes": sizes} if sizes else {}
    attention = {"num_heads": HEADS, **attributes}
    nodes = [helper.make_node("Attention", names, ["attended"], "attention", domain="com.microsoft", **attention)]
    out, width = "attended", parts[2]
    if tail:
        constants |= {"out.weight": rng.standard_normal((width, FEATURES)) / width**0.5, "gamma": np.ones(FEATURES)}
        nodes.append(helper.make_node("MatMul", [out, "out.weight"], ["projected"], "out"))
        nodes.append(
            helper.make_node("SkipLayerNormalization", ["projected", "x", "gamma"], ["y"], "norm", domain="com.microsoft")
        )
        out, width = "y", FEATURES
    graph = helper.make_graph(
        nodes,
        "attention",
        inputs,
        [helper.make_tensor_value_info(out, TensorProto.FLOAT, ["batch", "tokens", width])],
        [numpy_helper.from_array(values.astype(np.float32), name) for name, values in constants.items()],
    )
    opsets = [helper.make_opsetid("", opset), helper.make_opsetid("com.microsoft", 1)]
    return helper.make_model(graph, opset_imports=opsets, ir_version=8)


def behind_an_embedding(rng, model):
    """Return such a model with a mask of lengths behind an EmbedLayerNormalization, which counts them, and random inputs."""
    tables = {"words": (20, FEATURES), "places": (TOKENS, FEATURES), "gamma": (FEATURES,), "beta": (FEATURES,)}
    model.graph.initializer.extend(
        numpy_helper.from_array(rng.standard_normal(shape).astype(np.float32), name) for name, shape in tables.items()
    )
    names = ["ids", "", "words", "places", "", "gamma", "beta", "counts"]
    model.graph.node.insert(
        0, helper.make_node("EmbedLayerNormalization", names, ["x", "mask"], "embed", domain="com.microsoft")
    )
    del model.graph.input[:]
    model.graph.input.extend(
        helper.make_tensor_value_info(name, TensorProto.INT32, ["batch", "tokens"]) for name in ("ids", "counts")
    )
    return model, {"ids": rng.integers(0, 20, (BATCH, TOKENS)).astype(np.int32), "counts": PADDED}


def feed_of(rng, mask=None, scores=None, batch=BATCH, tokens=TOKENS):
    """Return random inputs of such a model."""
    feed = {"x": rng.standard_normal((batch, tokens, FEATURES)).astype(np.float32)}
    return feed | ({} if mask is None else {"mask": mask}) | ({} if scores is None else {"scores": scores.astype(np.float32)})


def attended(x, weight, bias=None, *, heads=HEADS):
    """Return the attention without a mask in float64: softmax(Q Kᵀ / √d) V of each head."""
    product = x.astype(np.float64) @ weight.astype(np.float64) + (0 if bias is None else bias)
    query, key, value = (
        part.reshape(*part.shape[:2], heads, -1).transpose(0, 2, 1, 3) for part in np.split(product, 3, axis=-1)
    )
    scores = query @ key.transpose(0, 1, 3, 2) / query.shape[-1] ** 0.5
    shares = np.exp(scores - scores.max(-1, keepdims=True))
    out = (shares / shares.sum(-1, keepdims=True)) @ value
    return out.transpose(0, 2, 1, 3).reshape(*x.shape[:2], -1)
