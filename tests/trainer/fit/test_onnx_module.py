"""ONNX graphs as torch modules: every operator against ONNX Runtime, parts of graphs, gradients, and writing back."""

import functools
from dataclasses import dataclass, field

import numpy as np
import onnx
import onnxruntime as ort
import pytest
import torch
from cases import MATRIX_ONLY, relative
from onnx import TensorProto, helper, numpy_helper
from onnx.reference import ReferenceEvaluator
from torch import nn

from tensorrail_exporter import FORMATS, GraphError, LayerPlan, Plan, decompose_graph, factorize
from tensorrail_exporter.formats import format_of
from tensorrail_trainer import to_onnx
from tensorrail_trainer.fit.module import OnnxModule
from tensorrail_trainer.fit.operators import OPERATORS
from tensorrail_trainer.networks.resnets import resnet18
from tensorrail_trainer.networks.small_resnet import SmallResNet

TOLERANCE = 1e-5  # relative L2 against ONNX Runtime, in float32
RNG = np.random.default_rng(0)


def normal(*shape):
    return RNG.standard_normal(shape).astype(np.float32)


def positive(*shape):
    return RNG.uniform(0.5, 2.0, shape).astype(np.float32)


def whole(*values):
    return np.array(values, np.int64)


@dataclass(frozen=True)
class Case:
    """One use of an operator: its inputs in order, None for one left out; those at `stored` are initializers."""

    inputs: tuple
    attributes: dict = field(default_factory=dict)
    stored: tuple = ()
    outputs: int = 1
    opset: int = 20


def case(*inputs, stored=(), outputs=1, opset=20, **attributes):
    return Case(inputs, attributes, (stored,) if isinstance(stored, int) else stored, outputs, opset)


def build(op, one):
    """Return the model of one node, and what to feed it."""
    named = {f"x{k}": np.asarray(value) for k, value in enumerate(one.inputs) if value is not None}
    stored = {f"x{k}" for k in one.stored}
    reads = [f"x{k}" if value is not None else "" for k, value in enumerate(one.inputs)]
    writes = [f"y{k}" for k in range(one.outputs)]
    node = helper.make_node(op, reads, writes, "the_node", **one.attributes)
    graph = helper.make_graph(
        [node],
        "graph",
        [
            helper.make_tensor_value_info(name, helper.np_dtype_to_tensor_dtype(value.dtype), value.shape)
            for name, value in named.items()
            if name not in stored
        ],
        [onnx.ValueInfoProto(name=name) for name in writes],
        [numpy_helper.from_array(value, name) for name, value in named.items() if name in stored],
    )
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", one.opset)], ir_version=9)
    return model, {name: value for name, value in named.items() if name not in stored}


def run_ort(model, feeds):
    options = ort.SessionOptions()
    options.log_severity_level = 3
    session = ort.InferenceSession(model.SerializeToString(), options, providers=["CPUExecutionProvider"])
    return dict(zip([value.name for value in session.get_outputs()], session.run(None, feeds), strict=True))


def run_torch(module, feeds, outputs=None):
    with torch.no_grad():
        found = module({name: torch.from_numpy(value) for name, value in feeds.items()}, outputs)
    return {name: value.numpy() for name, value in found.items()}


def same(model, feeds, tolerance=TOLERANCE, **options):
    """Assert that torch computes what ONNX Runtime does: names, types, shapes, values."""
    expected, found = run_ort(model, feeds), run_torch(OnnxModule(model, **options), feeds)
    assert list(found) == list(expected)
    for name, value in expected.items():
        assert (found[name].dtype, found[name].shape) == (value.dtype, value.shape)
        assert relative(found[name].astype(np.float64), value.astype(np.float64)) <= tolerance


def recurrent(op, directions=1, **attributes):
    gates, size, hidden = {"LSTM": 4, "GRU": 3}[op], 5, 6
    rows = gates * hidden
    tensors = (normal(7, 2, size), normal(directions, rows, size), normal(directions, rows, hidden))
    bias, state = normal(directions, 2 * rows), normal(directions, 2, hidden)
    direction = {} if directions == 1 else {"direction": "bidirectional"}
    options = {"stored": (1, 2), "outputs": 3 if op == "LSTM" else 2, "hidden_size": hidden, **direction, **attributes}
    cell = (normal(directions, 2, hidden),) if op == "LSTM" else ()
    return [case(*tensors, **options), case(*tensors, bias, None, state, *cell, **options)]


IMAGE, SIGNAL, VOLUME = normal(2, 4, 9, 8), normal(2, 4, 11), normal(2, 4, 5, 6, 5)
TABLE, TRUTH, COUNTS = normal(3, 4), np.array([[True, False, True, False]]), np.arange(12).reshape(3, 4)
PAIR = [case(TABLE, normal(3, 4)), case(normal(2, 3, 4), normal(3, 1), stored=1), case(TABLE, np.float32(0.5), opset=7)]
UNARY = [case(TABLE), case(normal(2, 3, 4, 5), opset=9)]
REDUCED = [
    case(IMAGE),
    case(IMAGE, whole(2, 3), stored=1),
    case(IMAGE, whole(-1), stored=1, keepdims=0),
    case(IMAGE, whole(1)),
    case(IMAGE, noop_with_empty_axes=1),
    case(IMAGE, axes=[2, 3], opset=11),
    case(IMAGE, keepdims=0, opset=11),
]
POOL = [
    case(IMAGE, kernel_shape=[3, 3], strides=[2, 2], pads=[1, 1, 1, 1]),
    case(IMAGE, kernel_shape=[2, 2]),
    case(IMAGE, kernel_shape=[3, 2], strides=[2, 3], pads=[0, 1, 2, 0]),
    case(IMAGE, kernel_shape=[2, 2], strides=[2, 2], ceil_mode=1),
    case(IMAGE, kernel_shape=[3, 3], strides=[2, 2], pads=[1, 1, 1, 1], ceil_mode=1),
    case(IMAGE, kernel_shape=[2, 2], strides=[3, 3], pads=[0, 0, 1, 1], ceil_mode=1),
    case(IMAGE, kernel_shape=[3, 3], strides=[2, 2], auto_pad="SAME_UPPER"),
    case(IMAGE, kernel_shape=[2, 3], strides=[2, 1], auto_pad="SAME_LOWER"),
    case(IMAGE, kernel_shape=[3, 3], strides=[2, 2], auto_pad="VALID"),
    case(SIGNAL, kernel_shape=[3], strides=[2], pads=[1, 1], opset=8),
    case(SIGNAL, kernel_shape=[3], strides=[2], pads=[0, 1]),
    case(VOLUME, kernel_shape=[2, 3, 2], strides=[1, 2, 2], pads=[0, 1, 0, 1, 1, 1]),
]
SOFTMAX = [case(IMAGE), case(IMAGE, axis=1), case(TABLE, opset=11), case(IMAGE, opset=11), case(IMAGE, axis=2, opset=9)]
MANY = [case(TABLE), case(TABLE, normal(3, 4)), case(TABLE, normal(2, 3, 4), normal(4))]
LOGICAL = [case(TRUTH, ~TRUTH), case(np.array([[True], [False]]), TRUTH)]
COMPARED = [case(TABLE, normal(3, 4)), case(COUNTS, whole(3, 5, 2, 3), stored=1), case(TABLE, TABLE[:1])]
KERNEL, BIAS = normal(6, 4, 3, 3), normal(6)

CASES: dict[str, list[Case]] = {
    "Abs": UNARY,
    "Add": [*PAIR, case(COUNTS, whole(1), stored=1)],
    "And": LOGICAL,
    "AveragePool": [
        *POOL,
        *(
            Case(p.inputs, {**p.attributes, "count_include_pad": 1}, opset=p.opset)
            for p in POOL
            if "auto_pad" not in p.attributes
        ),
    ],
    "BatchNormalization": [
        case(x, normal(4), normal(4), normal(4), positive(4), stored=(1, 2, 3, 4), epsilon=1e-3, opset=opset)
        for x, opset in ((IMAGE, 20), (SIGNAL, 14), (VOLUME, 9), (TABLE, 15))
    ],
    "Cast": [
        case(TABLE, to=TensorProto.INT64),
        case(TABLE, to=TensorProto.DOUBLE),
        case(COUNTS, to=TensorProto.FLOAT, opset=9),
        case(COUNTS, to=TensorProto.BOOL),
        case(TRUTH, to=TensorProto.FLOAT),
    ],
    "CastLike": [case(COUNTS, normal(1))],
    "Clip": [
        case(TABLE, np.float32(-0.5), np.float32(0.5), stored=(1, 2)),
        case(TABLE, np.float32(0), stored=1),
        case(TABLE, None, np.float32(0.2)),
        case(TABLE),
        case(COUNTS, np.int64(3), np.int64(7), stored=(1, 2)),
        case(TABLE, min=0.0, max=6.0, opset=6),
        case(TABLE, max=0.5, opset=10),
    ],
    "Concat": [case(TABLE, normal(3, 2), axis=1), case(IMAGE, IMAGE, IMAGE, axis=-3), case(COUNTS, COUNTS, axis=0, opset=4)],
    "Constant": [
        case(value=numpy_helper.from_array(TABLE)),
        case(value=numpy_helper.from_array(COUNTS), opset=9),
        case(value_float=0.5),
        case(value_floats=[0.5, 2.0]),
        case(value_int=3),
        case(value_ints=[3, 4]),
    ],
    "ConstantOfShape": [
        case(whole(2, 3), stored=0),
        case(whole(2, 3), value=numpy_helper.from_array(whole(7))),
        case(np.zeros(0, np.int64), stored=0, value=numpy_helper.from_array(np.array([2.5], np.float32))),
    ],
    "Conv": [
        case(IMAGE, KERNEL, BIAS, stored=(1, 2), kernel_shape=[3, 3], pads=[1, 1, 1, 1]),
        case(IMAGE, KERNEL, stored=1, strides=[2, 1], dilations=[1, 2]),
        case(IMAGE, KERNEL, None, pads=[0, 1, 2, 0], strides=[2, 2]),
        case(IMAGE, normal(8, 1, 3, 3), stored=1, group=4, pads=[1, 1, 1, 1]),
        case(IMAGE, normal(6, 2, 1, 1), stored=1, group=2),
        case(IMAGE, KERNEL, BIAS, stored=(1, 2), auto_pad="SAME_UPPER", strides=[2, 2]),
        case(IMAGE, normal(6, 4, 2, 2), stored=1, auto_pad="SAME_LOWER"),
        case(IMAGE, KERNEL, stored=1, auto_pad="VALID", opset=9),
        case(SIGNAL, normal(6, 4, 3), BIAS, stored=(1, 2), pads=[2, 1], strides=[2]),
        case(VOLUME, normal(6, 4, 3, 1, 2), BIAS, stored=(1, 2), pads=[1, 0, 1, 1, 0, 1]),
    ],
    "ConvTranspose": [
        case(IMAGE, normal(4, 3, 3, 3), normal(3), stored=(1, 2), strides=[2, 2], pads=[1, 1, 1, 1], output_padding=[1, 1]),
        case(IMAGE, normal(4, 3, 2, 3), stored=1, pads=[0, 1, 1, 0], strides=[2, 1]),
        case(IMAGE, normal(4, 2, 3, 3), stored=1, group=2, dilations=[2, 1], opset=9),
        case(SIGNAL, normal(4, 3, 4), stored=1, strides=[2], pads=[1, 1]),
    ],
    "Div": [*PAIR, case(np.array([-7, 7, 8]), whole(2, -2, 3))],
    "Dropout": [case(TABLE), case(TABLE, np.float32(0.4), stored=1, outputs=2), case(TABLE, ratio=0.3, opset=7)],
    "Elu": [case(TABLE), case(TABLE, alpha=0.7)],
    "Equal": COMPARED,
    "Erf": UNARY[:1],
    "Exp": UNARY,
    "EyeLike": [
        case(IMAGE[0, 0], dtype=int(TensorProto.FLOAT)),
        case(IMAGE[0, 0], k=1, dtype=int(TensorProto.FLOAT)),
        case(IMAGE[0, 0], k=-2, dtype=int(TensorProto.FLOAT)),
        case(np.arange(6).reshape(2, 3)),  # without dtype: the type of the input
    ],
    "Expand": [case(normal(3, 1), whole(2, 3, 4), stored=1), case(normal(2, 3, 1), whole(4)), case(TABLE, whole(1, 1))],
    "Flatten": [case(IMAGE), case(IMAGE, axis=0), case(IMAGE, axis=-1), case(IMAGE, axis=2, opset=9)],
    "GRU": [
        *(
            one
            for before in (0, 1)
            for directions in (1, 2)
            for one in recurrent("GRU", directions, linear_before_reset=before)
        ),
        *(one for before in (0, 1) for one in recurrent("GRU", 1, linear_before_reset=before, direction="reverse")),
        *recurrent("GRU", 1, opset=7),
    ],
    "Gather": [
        case(TABLE, whole(2, 0, -1), stored=1),
        case(TABLE, np.int64(1), stored=1, axis=1),
        case(TABLE, np.int64(-1), axis=1),
        case(IMAGE, np.array([[0, 1], [2, -1]]), axis=1),
        case(TABLE, np.array([1, 2], np.int32), stored=1, opset=9),
    ],
    "Gelu": [case(TABLE), case(TABLE, approximate="tanh")],
    "Gemm": [
        case(TABLE, normal(5, 4), normal(5), stored=(1, 2), transB=1),
        case(TABLE, normal(4, 5), normal(5), stored=(1, 2)),
        case(normal(4, 3), normal(4, 5), normal(3, 1), transA=1, alpha=0.5, beta=2.0),
        case(TABLE, normal(5, 4), stored=1, transB=1, alpha=0.5),
        case(TABLE, normal(5, 4), np.float32(2), stored=(1, 2), transB=1),
        case(TABLE, normal(5, 4), normal(3, 5), transB=1, beta=0.5, opset=7),
    ],
    "GlobalAveragePool": [case(IMAGE), case(SIGNAL), case(VOLUME)],
    "GlobalMaxPool": [case(IMAGE), case(SIGNAL), case(VOLUME)],
    "Greater": [case(*one.inputs, opset=9) for one in COMPARED],
    "HardSigmoid": [case(TABLE), case(TABLE, alpha=1 / 6, beta=0.5)],
    "HardSwish": [case(4 * TABLE)],
    "Identity": UNARY,
    "InstanceNormalization": [case(x, normal(4), normal(4), stored=(1, 2), epsilon=1e-3) for x in (IMAGE, SIGNAL)],
    "LRN": [case(IMAGE, size=3, alpha=0.1, beta=0.6, bias=2.0)],
    "LSTM": [
        *(one for directions in (1, 2) for one in recurrent("LSTM", directions)),
        *recurrent("LSTM", 1, direction="reverse"),
        *recurrent("LSTM", 1, opset=7),
    ],
    "LayerNormalization": [
        case(TABLE, normal(4), normal(4), stored=(1, 2)),
        case(IMAGE, normal(9, 8), axis=2, epsilon=1e-3, stored=1),
        case(IMAGE, normal(8), normal(8), axis=-1, opset=17),
    ],
    "LeakyRelu": [case(TABLE), case(TABLE, alpha=0.3)],
    "Less": [case(*one.inputs, opset=9) for one in COMPARED],
    "Log": [case(positive(3, 4))],
    "LogSoftmax": SOFTMAX,
    "MatMul": [
        case(TABLE, normal(4, 5), stored=1),
        case(normal(2, 3, 4), normal(4, 5), stored=1),
        case(normal(5, 3), normal(2, 3, 4), stored=0),
        case(normal(2, 2, 3, 4), normal(2, 1, 4, 3)),
        case(normal(4), normal(4, 5)),
    ],
    "Max": MANY,
    "MaxPool": [*POOL, case(IMAGE, kernel_shape=[3, 2], dilations=[2, 3], strides=[1, 2])],
    "Min": MANY,
    "Mish": UNARY[:1],
    "Mod": [case(np.array([-7, 7, 8]), whole(2, -2, 3)), case(TABLE, normal(4), fmod=1)],
    "Mul": PAIR,
    "Neg": UNARY,
    "Not": [case(TRUTH)],
    "Or": LOGICAL,
    "PRelu": [case(IMAGE, normal(4, 1, 1), stored=1), case(TABLE, normal(1), opset=9)],
    "Pad": [
        case(IMAGE, whole(0, 0, 1, 2, 0, 0, 0, 1), stored=1),
        case(IMAGE, whole(0, 0, -1, 2, 0, 0, 0, -3), np.float32(1.5), stored=(1, 2)),
        case(IMAGE, whole(1, 2, 2, 1), None, whole(-1, 2), stored=(1, 3)),
        case(IMAGE, whole(1, 0, 2, 3, 0, 1, 4, 2), stored=1, mode="reflect"),
        case(IMAGE, whole(0, 2, 2, 1, 3, 1, 0, 12), stored=1, mode="edge"),
        case(IMAGE, whole(0, 0, 2, 1, 0, 1, 0, 2), stored=1, mode="wrap"),
        case(TABLE, pads=[1, 0, 0, 2], value=2.0, opset=10),
        case(TABLE, pads=[1, 0, 0, 2], mode="reflect", opset=2),
    ],
    "Pow": [
        case(TABLE, np.float32(2), stored=1),
        case(positive(3, 4), normal(4)),
        case(COUNTS, np.float32(2), stored=1),
        case(TABLE, np.array([3], np.int64), stored=1, opset=12),
    ],
    "Range": [case(np.int64(2), np.int64(11), np.int64(3)), case(np.float32(3), np.float32(0), np.float32(-0.5), opset=11)],
    "Reciprocal": [case(positive(3, 4))],
    "ReduceL1": REDUCED[:4],
    "ReduceL2": REDUCED[:4],
    "ReduceMax": REDUCED,
    "ReduceMean": REDUCED,
    "ReduceMin": REDUCED,
    "ReduceSum": REDUCED,
    "Relu": UNARY,
    "Reshape": [
        case(IMAGE, whole(0, -1), stored=1),
        case(IMAGE, whole(-1, 2, 0, 0), stored=1),
        case(IMAGE, whole(3, 4, 6, 8)),
        case(normal(0, 3), whole(3, 0), stored=1, allowzero=1),
        case(IMAGE, whole(2, -1), opset=5),
    ],
    "Selu": UNARY[:1],
    "Shape": [case(IMAGE), case(IMAGE, start=1, end=-1), case(IMAGE, start=-2, opset=15), case(IMAGE, opset=9)],
    "Sigmoid": UNARY,
    "Slice": [
        case(IMAGE, whole(1), whole(3), whole(1), stored=(1, 2, 3)),
        case(IMAGE, whole(0, -3), whole(2**62, -1), whole(2, -1), whole(2, 1)),
        case(IMAGE, whole(-1), whole(-(2**62)), whole(3), whole(-2), stored=(1, 2, 3, 4)),
        case(IMAGE, whole(0, 1), whole(1, 3)),
        case(IMAGE, whole(20), whole(30), whole(3), stored=(1, 2, 3)),
        case(IMAGE, starts=[1, -4], ends=[3, 100], axes=[1, 2], opset=9),
        case(IMAGE, starts=[1], ends=[2], opset=1),
    ],
    "Softmax": SOFTMAX,
    "Softplus": UNARY[:1],
    "Split": [
        case(IMAGE, whole(1, 3), stored=1, outputs=2, axis=1),
        case(IMAGE, outputs=4, axis=1, num_outputs=4),
        case(IMAGE, outputs=2, axis=2, num_outputs=2),
        case(IMAGE, outputs=2, axis=-1, opset=13),
        case(IMAGE, outputs=2, axis=1, split=[3, 1], opset=11),
    ],
    "Sqrt": [case(positive(3, 4))],
    "Squeeze": [
        case(normal(1, 3, 1, 4)),
        case(normal(1, 3, 1, 4), whole(-2), stored=1),
        case(normal(1, 3, 1, 4), whole(0, 2)),
        case(normal(1, 3, 1, 4), axes=[0], opset=11),
    ],
    "Sub": PAIR,
    "Sum": MANY,
    "Tanh": UNARY,
    "Tile": [case(TABLE, whole(2, 3), stored=1), case(TABLE, whole(1, 2))],
    "Transpose": [case(IMAGE), case(IMAGE, perm=[0, 2, 3, 1]), case(COUNTS, perm=[1, 0], opset=9)],
    "Unsqueeze": [
        case(TABLE, whole(0, -1), stored=1),
        case(TABLE, whole(2)),
        case(np.int64(3), whole(0), stored=1),
        case(TABLE, axes=[2, 0], opset=11),
    ],
    "Where": [case(TRUTH, TABLE, normal(3, 1)), case(TRUTH, COUNTS, whole(1), stored=2, opset=9)],
}


@pytest.mark.parametrize("op", OPERATORS)
def test_every_operator_computes_what_onnx_runtime_does(op):
    assert CASES.get(op), f"{op} has no case here"
    for one in CASES[op]:
        model, feeds = build(op, one)
        try:
            same(model, feeds)
        except Exception as error:
            raise AssertionError(f"{op} {one.attributes}, opset {one.opset}: {error}") from error


def network(seed=0):
    """Return a small residual-free network with batch-norm whose statistics are not those of a new one."""
    torch.manual_seed(seed)
    norms = [nn.BatchNorm2d(12), nn.BatchNorm2d(16)]
    layers = [nn.Conv2d(8, 12, 3, padding=1), norms[0], nn.ReLU(), nn.Conv2d(12, 16, 3, 2, 1, bias=False), norms[1], nn.ReLU()]
    for norm in norms:
        nn.init.normal_(norm.running_mean)
        nn.init.uniform_(norm.running_var, 0.5, 2.0)
    return nn.Sequential(*layers, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(16, 12))


def exported(model, *shape):
    return to_onnx(model.eval(), torch.randn(2, *shape))


@functools.cache
def dense():
    """Return the exported `network`, which no test changes."""
    return exported(network(), 8, 9, 9)


def plan_for(model, form_name, rank=4, merge="auto"):
    """Return a plan for all layers of `network` that the format takes."""
    form, plans = format_of(form_name), []
    for tensor in model.graph.initializer:
        if tensor.name in ("0.weight", "3.weight", "8.weight") and (len(tensor.dims) == 2 or form_name not in MATRIX_ONLY):
            shape = tuple(tensor.dims)
            modes = form.default_modes(shape)
            ranks = form.clamp(shape, modes, form.uniform(shape, modes, rank))
            own = merge if merge in form.merges("linear" if len(shape) == 2 else "conv") else "auto"
            name = tensor.name.removesuffix(".weight")
            plans.append(LayerPlan(name=name, format=form_name, modes=modes, ranks=ranks, merge=own))
    return Plan(layers=tuple(plans))


def factored(form_name="tt", merge="auto", double=False):
    """Return the factored graph of `network`, and the names of its cores."""
    model = as_type(dense(), np.float64) if double else dense()
    plan = plan_for(model, form_name, merge=merge)
    model = factorize(model, plan, decompose_graph(model, plan)).model
    layers = tuple(f"{layer.name}/" for layer in plan.layers)
    cores = [t.name for t in model.graph.initializer if t.name.startswith(layers) and t.data_type != TensorProto.INT64]
    return model, cores


def as_type(model, dtype):
    """Return the model with all float tensors, inputs and outputs in another type."""
    changed = onnx.ModelProto()
    changed.CopyFrom(model)
    kind = helper.np_dtype_to_tensor_dtype(np.dtype(dtype))
    for tensor in changed.graph.initializer:
        if tensor.data_type == TensorProto.FLOAT:
            tensor.CopyFrom(numpy_helper.from_array(numpy_helper.to_array(tensor).astype(dtype), tensor.name))
    for value in (*changed.graph.input, *changed.graph.output, *changed.graph.value_info):
        if value.type.tensor_type.elem_type == TensorProto.FLOAT:
            value.type.tensor_type.elem_type = kind
    return changed


class Recurrent(nn.Module):
    def __init__(self, kind, layers, **options):
        super().__init__()
        self.rnn = kind(5, 6, layers, batch_first=True, **options)
        self.head = nn.Linear(6 * (1 + self.rnn.bidirectional), 3)

    def forward(self, x):
        return self.head(self.rnn(x)[0][:, -1])


class Attention(nn.Module):
    def __init__(self):
        super().__init__()
        self.patches, self.norm = nn.Conv2d(3, 16, 4, 4), nn.LayerNorm(16)
        self.token = nn.Parameter(torch.randn(1, 1, 16))
        self.qkv, self.head = nn.Linear(16, 48), nn.Linear(16, 3)

    def forward(self, x):
        x = self.patches(x).flatten(2).transpose(1, 2)
        x = torch.cat([self.token.expand(x.shape[0], -1, -1), x], 1)
        q, k, v = self.qkv(self.norm(x)).reshape(-1, 17, 3, 4, 4).permute(2, 0, 3, 1, 4).unbind(0)
        x = x + nn.functional.scaled_dot_product_attention(q, k, v).transpose(1, 2).reshape(-1, 17, 16)
        return self.head(nn.functional.gelu(x[:, 0]))


NETWORKS = {
    "small resnet": (lambda: SmallResNet(3, 10, (8, 16), 1, 32), (3, 32, 32)),
    "resnet-18": (lambda: resnet18(3, 10, width=8), (3, 64, 64)),
    "lstm": (lambda: Recurrent(nn.LSTM, 2), (3, 5)),
    "gru, both directions": (lambda: Recurrent(nn.GRU, 1, bidirectional=True), (3, 5)),
    "attention": (Attention, (3, 16, 16)),
}


SLOW = {"small resnet", "lstm"}  # as the larger network, and as the layer in both directions


@pytest.mark.parametrize("name", [pytest.param(name, marks=pytest.mark.slow if name in SLOW else ()) for name in NETWORKS])
def test_an_exported_network_computes_what_onnx_runtime_does(name):
    torch.manual_seed(0)
    make, shape = NETWORKS[name]
    same(exported(make(), *shape), {"image": normal(3, *shape)})


MERGED = [
    (form, merge)
    for form in FORMATS
    for merge in dict.fromkeys((*FORMATS[form].merges("conv"), *FORMATS[form].merges("linear")))
]


@pytest.mark.parametrize(("form_name", "merge"), MERGED)
def test_a_factored_graph_computes_what_onnx_runtime_does_and_its_cores_have_gradients(form_name, merge):
    model, cores = factored(form_name, merge)
    feeds = {"image": normal(3, 8, 9, 9)}
    same(model, feeds, trainable=cores)
    module = OnnxModule(model, cores)
    assert set(module.parameters_by_name()) == set(cores)
    module({"image": torch.from_numpy(feeds["image"])})["logits"].square().sum().backward()
    for name, parameter in module.parameters_by_name().items():
        assert parameter.grad is not None, name
        assert parameter.grad.abs().sum() > 0, name


def test_gradients_are_those_of_finite_differences():
    model, cores = factored(double=True)
    module = OnnxModule(model, cores)
    torch.manual_seed(1)
    feeds, target = {"image": torch.randn(4, 8, 9, 9, dtype=torch.float64)}, torch.randn(4, 12, dtype=torch.float64)

    def loss():
        return (module(feeds)["logits"] - target).square().mean()

    loss().backward()
    for name, parameter in module.parameters_by_name().items():
        direction, step = torch.randn_like(parameter), 1e-6
        with torch.no_grad():
            parameter.add_(direction, alpha=step)
            above = loss()
            parameter.sub_(direction, alpha=2 * step)
            below = loss()
            parameter.add_(direction, alpha=step)
            expected = (above - below) / (2 * step)
        assert parameter.grad.mul(direction).sum().item() == pytest.approx(expected.item(), rel=1e-5, abs=1e-9), name


def test_cores_can_be_fitted_to_the_dense_graph():
    teacher = OnnxModule(dense())
    model, cores = factored()
    module = OnnxModule(model, cores)
    feeds = {"image": torch.from_numpy(normal(16, 8, 9, 9))}
    with torch.no_grad():
        target = teacher(feeds)["logits"]
    optimizer = torch.optim.Adam(module.parameters(), lr=0.01)
    losses = []
    for _ in range(20):
        optimizer.zero_grad()
        loss = (module(feeds)["logits"] - target).square().mean()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < 0.5 * losses[0]


def test_any_tensor_can_be_asked_for_and_fed():
    model, _ = factored()
    module = OnnxModule(model)
    names = [name for node in model.graph.node if node.op_type != "Constant" for name in node.output]
    with torch.no_grad():
        found = module({"image": torch.from_numpy(normal(3, 8, 9, 9))}, names)
        assert list(found) == names
        for name in names:
            again = module({name: found[name]})["logits"]  # nothing above it can run: the image is not there
            assert torch.equal(again, found["logits"]), name


def test_a_residual_block_runs_on_its_own():
    torch.manual_seed(0)
    model = exported(SmallResNet(3, 10, (8, 16), 2, 32), 3, 32, 32)
    adds = [node.output[0] for node in model.graph.node if node.op_type == "Add"]
    relus = {node.input[0]: node.output[0] for node in model.graph.node if node.op_type == "Relu"}
    start, end = relus[adds[2]], relus[adds[3]]
    module = OnnxModule(model)
    with torch.no_grad():
        found = module({"image": torch.randn(2, 3, 32, 32)}, [start, end, "logits"])
        assert torch.equal(module({start: found[start]}, [end])[end], found[end])
        assert torch.equal(module({end: found[end]})["logits"], found["logits"])
        assert torch.equal(module({start: found[start], end: found[start]}, [end])[end], found[start])


def test_names_that_are_not_there_are_refused(small_model):
    module = OnnxModule(small_model)
    x = torch.zeros(2, 16, 8, 8)
    with pytest.raises(GraphError, match="tensor 'z' is not in the graph; the graph's inputs are x"):
        module({"x": x}, ["z"])
    with pytest.raises(GraphError, match="tensor 'z' is not in the graph"):
        module({"z": x})
    with pytest.raises(GraphError, match="y: expected 'x' among the inputs that are fed, got none"):
        module({})
    with pytest.raises(GraphError, match=r"'conv.weight' is an initializer and cannot be fed"):
        module({"x": x, "conv.weight": x})
    with pytest.raises(GraphError, match=r"node 'conv' \(Conv\): .*input shapes: \[2, 3, 8, 8\]"):
        module({"x": torch.zeros(2, 3, 8, 8)})
    assert torch.equal(module({}, ["fc.bias"])["fc.bias"], module({"x": x}, ["fc.bias"])["fc.bias"])


def test_only_float_initializers_can_be_trained(small_model):
    small_model.graph.initializer.append(numpy_helper.from_array(whole(1, 2), "numbers"))
    for name in ("no.such", "numbers", "x"):
        with pytest.raises(GraphError, match=rf"'{name}' cannot be trained: expected a float initializer, such as conv.weight"):
            OnnxModule(small_model, [name])


def test_convolutions_stay_channels_last():
    model, cores = factored()
    module = OnnxModule(model, cores)
    last = torch.channels_last
    kernels = [p for p in module.parameters_by_name().values() if p.dim() == 4]
    assert kernels
    assert all(kernel.is_contiguous(memory_format=last) for kernel in kernels)
    names = [node.output[0] for node in model.graph.node if node.op_type in ("Conv", "Relu", "BatchNormalization")]
    x = torch.randn(2, 8, 9, 9)
    found = module({"image": x.contiguous(memory_format=last)}, [*names, "logits"])
    assert all(found[name].is_contiguous(memory_format=last) for name in names)
    torch.testing.assert_close(found["logits"], module({"image": x})["logits"], atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("dtype", [np.float16, np.float32, np.float64])
def test_trained_values_are_written_back(dtype):
    model, cores = factored()
    model = as_type(model, dtype)
    module = OnnxModule(model, cores[1:])
    computed = torch.float64 if dtype is np.float64 else torch.float32
    assert {p.dtype for p in module.parameters()} == {computed}
    x = torch.from_numpy(normal(3, 8, 9, 9)).to(computed)
    module({"image": x})["logits"].square().mean().backward()
    with torch.no_grad():
        for parameter in module.parameters():
            parameter.sub_(parameter.grad / parameter.grad.norm(), alpha=0.01)
    before = model.SerializeToString()
    written = module.write_back(model)
    assert model.SerializeToString() == before
    onnx.checker.check_model(written, full_check=True)
    for old, new in zip(model.graph.initializer, written.graph.initializer, strict=True):
        assert (old.name, old.data_type, list(old.dims)) == (new.name, new.data_type, list(new.dims))
        if new.name in cores[1:]:
            assert old.raw_data != new.raw_data
            expected = module.parameters_by_name()[new.name].detach().numpy().astype(dtype)
            np.testing.assert_array_equal(numpy_helper.to_array(new), expected)
        else:
            assert old.SerializeToString() == new.SerializeToString()
    assert list(written.graph.node) == list(model.graph.node)
    tolerance = 2e-3 if dtype is np.float16 else TOLERANCE  # of weights rounded to float16 and computed in it by ONNX Runtime
    feeds = {"image": x.numpy().astype(dtype)}
    with torch.no_grad():
        found = module({"image": x})["logits"].numpy()
    # ONNX Runtime has no convolution in float64
    expected = ReferenceEvaluator(written).run(None, feeds)[0] if dtype is np.float64 else run_ort(written, feeds)["logits"]
    assert relative(expected.astype(np.float64), found) <= tolerance


def test_write_back_refuses_what_does_not_fit(small_model):
    model = as_type(small_model, np.float16)
    module = OnnxModule(model, ["conv.weight"])
    with torch.no_grad():
        module.parameters_by_name()["conv.weight"].fill_(1e6)
    with pytest.raises(GraphError, match=r"'conv.weight': its trained values are not finite in float16; lower the learning"):
        module.write_back(model)
    other = OnnxModule(factored()[0], ["0.bias"])
    with pytest.raises(GraphError, match=r"initializer '0.bias': expected one of shape \[12\] in the model, found none"):
        other.write_back(model)


def test_bfloat16_weights_are_fitted_in_float32_and_written_back(small_model):
    tensor = next(t for t in small_model.graph.initializer if t.name == "conv.weight")
    values = torch.from_numpy(numpy_helper.to_array(tensor).copy()).bfloat16()
    raw = values.view(torch.int16).numpy().tobytes()
    tensor.CopyFrom(TensorProto(name=tensor.name, dims=tensor.dims, data_type=TensorProto.BFLOAT16, raw_data=raw))
    module = OnnxModule(small_model, ["conv.weight"])
    assert torch.equal(module.parameters_by_name()["conv.weight"], values.float())
    assert module.write_back(small_model) == small_model


def test_float16_graphs_are_computed_in_float32():
    x = helper.make_node("Cast", ["image"], ["half"], to=TensorProto.FLOAT16)
    y = helper.make_node("Mul", ["half", "scale"], ["y"])
    scale = numpy_helper.from_array(np.array([0.1], np.float16), "scale")
    value = helper.make_tensor_value_info
    graph = helper.make_graph(
        [x, y], "g", [value("image", TensorProto.FLOAT, [3])], [value("y", TensorProto.FLOAT16, [3])], [scale]
    )
    found = OnnxModule(helper.make_model(graph))({"image": torch.ones(3, dtype=torch.float16)})["y"]
    assert found.dtype == torch.float32


def one_node(op, inputs=("x",), outputs=("y",), opset=20, domain="", **attributes):
    """Return a model of one node whose first input alone is fed."""
    node = helper.make_node(op, inputs, outputs, "the_node", domain=domain, **attributes)
    value = helper.make_tensor_value_info
    graph = helper.make_graph(
        [node],
        "graph",
        [value(name, TensorProto.FLOAT, None) for name in dict.fromkeys(inputs) if name],
        [value(name, TensorProto.FLOAT, None) for name in outputs],
    )
    return helper.make_model(graph, opset_imports=[helper.make_opsetid("", opset), helper.make_opsetid("com.microsoft", 1)])


BODY = helper.make_graph([], "body", [], [])
REFUSED = [
    (
        one_node("NonZero"),
        r"^node 'the_node' \(NonZero\): this operator is not supported; skip the fit of the cores to compress this model$",
    ),
    (one_node("FusedConv", domain="com.microsoft"), r"\(FusedConv\): .* 'com.microsoft' are not supported, .*; skip the fit"),
    (one_node("Loop", body=BODY), "this operator is not supported"),
    (one_node("Relu", body=BODY), "attribute 'body' is a GraphProto"),
    (one_node("Relu", colour=1), "attribute 'colour' does not exist in opset 20"),
    (one_node("Gelu", opset=17), "opset 17 has no such operator"),
    (one_node("MaxPool"), "attribute 'kernel_shape' is missing"),
    (one_node("Relu", ("x", "w")), "expected 1 to 1 inputs in opset .*, got 2"),
    (one_node("Conv", ("", "w")), "input 'X' is missing"),
    (one_node("Conv", ("x", "w"), auto_pad="SOME"), "expected auto_pad to be 'NOTSET' or .*, got 'SOME'"),
    (one_node("ConvTranspose", ("x", "w"), output_shape=[4, 4]), "output_shape is not supported"),
    (
        one_node("MaxPool", outputs=("y", "places"), kernel_shape=[2, 2]),
        "only its first output .*, but the graph uses y, places",
    ),
    (one_node("AveragePool", kernel_shape=[2, 2], dilations=[2, 2]), r"expected dilations to be \[1, 1\], got \[2, 2\]"),
    (one_node("BatchNormalization", ("x",) * 5, training_mode=1), "expected training_mode to be 0, got 1"),
    (one_node("LSTM", ("x", "w", "r"), hidden_size=2, activations=["Relu"] * 3), "expected the default activations"),
    (one_node("LSTM", ("x", "w", "r"), hidden_size=2, layout=1), "expected layout=0, got 1"),
    (one_node("LSTM", ("x", "w", "r", "b", "", "", "", "p"), hidden_size=2), "input P is not supported"),
    (one_node("GRU", ("x", "w", "r", "", "lens"), hidden_size=2), "input sequence_lens is not supported"),
    (one_node("GRU", ("x", "w", "r"), direction="sideways"), "'bidirectional', got 'sideways'"),
    (one_node("Add", ("x", "w"), opset=6, broadcast=1, axis=1), "broadcasting along an axis \\(before opset 7\\)"),
    (one_node("Cast", to=TensorProto.STRING), "casting to type 8"),
    (one_node("Constant", (), value_string="text"), "got value_string"),
    (one_node("LRN", size=2), "expected an odd size, got 2"),
    (one_node("Relu", outputs=("x",)), "output 'x' already exists"),
]


@pytest.mark.parametrize(("model", "reason"), REFUSED)
def test_what_cannot_be_run_is_refused_when_the_graph_is_read(model, reason):
    with pytest.raises(GraphError, match=reason) as error:
        OnnxModule(model)
    assert "\n" not in str(error.value)


def test_an_attribute_of_a_function_is_refused():
    model = one_node("Elu", alpha=0.5)
    model.graph.node[0].attribute[0].ref_attr_name = "slope"
    with pytest.raises(GraphError, match=r"node 'the_node' \(Elu\): attribute 'alpha' has no value"):
        OnnxModule(model)


def test_tensors_that_cannot_be_read_are_refused(small_model):
    tensor = small_model.graph.initializer[0]
    tensor.data_location = TensorProto.EXTERNAL
    with pytest.raises(GraphError, match="its external data was not loaded"):
        OnnxModule(small_model)
    tensor.data_location = TensorProto.DEFAULT
    tensor.raw_data = tensor.raw_data[:-4]
    with pytest.raises(GraphError, match=r"tensor 'conv.weight': "):
        OnnxModule(small_model)
    tensor.data_type = TensorProto.STRING
    with pytest.raises(GraphError, match=r"expected one of the types FLOAT, .*, got STRING"):
        OnnxModule(small_model)
    small_model.graph.node[0].input[1] = "nowhere"
    del small_model.graph.initializer[0]
    with pytest.raises(GraphError, match="input 'nowhere' is not computed by any earlier node"):
        OnnxModule(small_model)


def test_outputs_that_nothing_reads_are_no_reason_to_refuse():
    model = one_node("MaxPool", outputs=("y", "places"), kernel_shape=[2, 2])
    del model.graph.output[1]
    assert OnnxModule(model)({"x": torch.zeros(1, 1, 4, 4)})["y"].shape == (1, 1, 3, 3)
