"""What a model is, apart from how fast it runs: its interface, cost, placement, outputs and score, and the limits for them."""

from __future__ import annotations

import hashlib
import math
from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np
import onnxruntime as ort
from pydantic import Field

from tensorrail_runtime.errors import ModelError
from tensorrail_runtime.graphs.cost import cost
from tensorrail_runtime.graphs.files import sha256_of
from tensorrail_runtime.measure.accuracy import evaluate
from tensorrail_runtime.measure.parity import is_exact, relative_l2
from tensorrail_runtime.measure.placement import placement
from tensorrail_runtime.records import Record
from tensorrail_runtime.sessions.inputs import Shapes, random_inputs
from tensorrail_runtime.sessions.session import PROVIDERS, Session, open_session, require_tensors, run

_KEPT = 1024  # numbers kept of an output, for parity
_NOISE = 1e-4  # kernels that add up in another order differ by less from run to run
_CHUNK = 2**20  # values that are summed up at a time

Data = tuple[Mapping[str, np.ndarray], np.ndarray, str]
"""Input arrays, labels and the metric."""


class Tensor(Record):
    """An input as the model declares it, or an output as it ran; None is an axis of any size."""

    type: str  # in ONNX Runtime's words
    shape: tuple[int | None, ...]

    def takes(self, other: Tensor) -> bool:
        """Whether what could be given to `other` could be given to this one."""
        return (
            self.type == other.type
            and len(self.shape) == len(other.shape)
            and all(mine in (None, its) for mine, its in zip(self.shape, other.shape, strict=True))
        )

    def at(self, batch: int, shape: Sequence[int] | None = None) -> tuple[int, ...]:
        """Return the shape that it has in a run: `shape` where it is given, else with dynamic axes of `batch`."""
        return tuple(shape or (batch if size is None else size for size in self.shape))

    def __str__(self) -> str:
        return f"{self.type.removeprefix('tensor')} {'×'.join('?' if size is None else str(size) for size in self.shape)}"


class Output(Tensor):
    """An output on random inputs of seed 0, its shape as it ran; `values` are what `sketch` keeps of it.

    Of an output that is compared exactly, as indices are, numbers are kept that are drawn by its values.
    """

    declared: tuple[int | None, ...]
    values: tuple[float, ...]
    exact: bool
    infinite: str = ""  # digest of where it is, which counts as 0 in the values

    def apart(self, other: Output) -> float:
        """Return the relative L2 difference of `other`, or of exact ones the share of entries that differ, both estimated."""
        a, b = np.array(self.values), np.array(other.values)
        if not self.exact:
            return relative_l2(a, b)
        count = math.prod(size or 0 for size in self.shape)
        return float((a != b).sum() / max(count, 1)) if count <= _KEPT else float(np.square(b - a).sum() / (2 * count))


class Facts(Record):
    """What does not vary between runs of one model."""

    sha256: str  # of its files, external data included
    flops: int
    uncounted: tuple[str, ...]  # operators that may multiply and are not in the FLOPs
    params: int
    bytes: int
    nodes: int
    placement: dict[str, int]  # nodes by provider, as ONNX Runtime ran them
    inputs: dict[str, Tensor]
    outputs: dict[str, Output]
    varying: tuple[str, ...]  # outputs that are others when the model runs again on the same inputs
    score: float | None = None  # mean of the metric, where data came
    metric: str = ""
    data: str = ""  # the SHA-256 of the data that were scored


class Limits(Record):
    """What a model is held to. `max_slowdown` is the slow-down to be found: an alarm is raised from half of it on."""

    max_slowdown: float = Field(default=0.05, gt=0)
    flops: float = Field(default=0.0, ge=0)  # how much more is allowed, as a share
    params: float = Field(default=0.0, ge=0)
    bytes: float = Field(default=0.01, ge=0)  # names and metadata move a few
    nodes: float = Field(default=0.0, ge=0)
    score: float = Field(default=0.005, ge=0)  # how much lower the metric's mean may be
    tolerance: float | None = 1e-3  # relative L2 difference of the outputs; None for a model that was trained again


class Finding(Record):
    """One thing that was held to a limit."""

    name: str
    baseline: str
    measured: str
    limit: str
    holds: bool


def facts_of(
    path: Path | str, settings: Session, batch: int = 1, data: Data | None = None, shapes: Shapes | None = None
) -> Facts:
    """Return the facts of a model; `ModelError` when it cannot be run, or its outputs are no tensors of numbers."""
    found = cost(path, batch, shapes)
    session = open_session(path, settings=settings)
    require_tensors(path, session)
    declared = {entry.name: _declared(entry) for entry in session.get_outputs()}
    inputs = random_inputs(session, batch, shapes=shapes)
    outputs = {name: _output(path, name, array, declared[name]) for name, array in run(session, inputs).items()}
    again = {name: _output(path, name, array, declared[name]) for name, array in run(session, inputs).items()}
    placed = placement(path, settings=settings, batch=batch, shapes=shapes)
    score = None
    if data is not None:
        score = evaluate(path, data[0], data[1], metric=data[2], settings=settings).mean
    return Facts(
        sha256=sha256_of(Path(path)),
        flops=found.flops,
        uncounted=found.uncounted,
        params=found.params,
        bytes=found.bytes,
        nodes=found.nodes,
        placement=placed.providers,
        inputs={entry.name: _declared(entry) for entry in session.get_inputs()},
        outputs=outputs,
        varying=tuple(name for name, one in outputs.items() if not _alike(one, again[name], _NOISE)),
        score=score,
        metric=data[2] if data is not None else "",
        data=sha256_of_data(data) if data is not None else "",
    )


def _output(path: Path | str, name: str, array: np.ndarray, declared: Tensor) -> Output:
    if array.dtype.kind not in "fiub":
        raise ModelError(f"{path}: output {name!r} has type {declared.type}: only numbers can be compared")
    if np.isnan(array).any():
        raise ModelError(f"{path}: output {name!r} holds NaN")
    exact = is_exact(array.dtype)
    return Output(
        type=declared.type,
        shape=array.shape,
        declared=declared.shape,
        values=tuple(sketch(_drawn(array) if exact else np.where(np.isinf(array), 0, array)).tolist()),
        exact=exact,
        infinite="" if np.isfinite(array).all() else _digest(np.isposinf(array), np.isneginf(array)),
    )


def _drawn(array: np.ndarray) -> np.ndarray:
    """Return a number an entry, of mean 0 and variance 1, the same where the same value stands and else independent of it."""
    values = array.ravel()
    places = np.arange(len(values), dtype=np.uint64)
    drawn = _hashed(_hashed(values.astype(np.int64).view(np.uint64)) ^ places)
    return np.asarray((drawn / 2.0**64 - 0.5) * math.sqrt(12))


def sketch(array: np.ndarray) -> np.ndarray:
    """Return the values themselves up to 1024, or 1024 sums of them all, each value with a sign, both drawn by its index.

    The sums of a difference have the same L2 norm as the difference itself, to within some per cent (a count sketch: Charikar,
    Chen and Farach-Colton 2002), so a change of any value shows, of whatever size the output is.
    """
    values = array.ravel().astype(np.float64)
    if len(values) <= _KEPT:
        return values
    sums = np.zeros(_KEPT)
    for start in range(0, len(values), _CHUNK):
        part = values[start : start + _CHUNK]
        drawn = _hashed(np.arange(start, start + len(part), dtype=np.uint64))
        signed = np.where(drawn & np.uint64(1), part, -part)
        sums += np.bincount((drawn >> np.uint64(54)).astype(np.int64), weights=signed, minlength=_KEPT)
    return sums


def held(before: Facts, after: Facts, limits: Limits, provider: str) -> list[Finding]:
    """Return what the facts of a model are beside those before, everything but time."""
    return [
        *(_size(name, before, after, getattr(limits, name)) for name in ("flops", "params", "bytes", "nodes")),
        _placed(before, after, PROVIDERS[provider]),
        _interface(before, after),
        *([_same_outputs(before, after, limits.tolerance)] if limits.tolerance is not None else []),
        *([_score(before.score, after, limits.score)] if before.score is not None and after.score is not None else []),
    ]


def sha256_of_data(data: Data) -> str:
    """Return the digest of arrays and labels, so that a score is only held against one on the same data."""
    found = hashlib.sha256()
    for name, array in [*sorted(data[0].items()), ("labels", data[1])]:
        found.update(f"{name} {array.dtype.str} {array.shape}\n".encode())
        found.update(np.ascontiguousarray(array).tobytes())
    return found.hexdigest()


def _digest(*masks: np.ndarray) -> str:
    return hashlib.sha256(b"".join(np.packbits(mask).tobytes() for mask in masks)).hexdigest()


def _declared(entry: ort.NodeArg) -> Tensor:
    return Tensor(type=entry.type, shape=tuple(size if isinstance(size, int) and size >= 0 else None for size in entry.shape))


def _hashed(index: np.ndarray) -> np.ndarray:
    """Return 64 well-mixed bits of each index: the finalizer of SplitMix64 (Steele, Lea and Flood 2014)."""
    mixed = (index + np.uint64(1)) * np.uint64(0x9E3779B97F4A7C15)
    mixed = (mixed ^ (mixed >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    mixed = (mixed ^ (mixed >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return np.asarray(mixed ^ (mixed >> np.uint64(31)))


def _size(name: str, before: Facts, after: Facts, share: float) -> Finding:
    old, new = getattr(before, name), getattr(after, name)
    holds, measured = new <= old * (1 + share), f"{new:,}"
    if name == "flops" and (more := sorted(set(after.uncounted) - set(before.uncounted))):
        holds, measured = False, f"{measured} plus operators that cannot be counted: {', '.join(more)}"
    return Finding(name=name, baseline=f"{old:,}", measured=measured, limit=f"{share:+.1%}", holds=holds)


def _placed(before: Facts, after: Facts, provider: str) -> Finding:
    return Finding(
        name="placement",
        baseline=_counts(before.placement),
        measured=_counts(after.placement),
        limit=f"no more nodes outside {provider.removesuffix('ExecutionProvider')}",
        holds=all(name == provider or count <= before.placement.get(name, 0) for name, count in after.placement.items()),
    )


def _counts(placement: Mapping[str, int]) -> str:
    return ", ".join(f"{count} on {name.removesuffix('ExecutionProvider')}" for name, count in placement.items())


def interface_of(path: Path | str, settings: Session, before: Facts) -> Finding | None:
    """Return what falls short in the inputs of a model, None where it takes what the one before took."""
    if not Path(path).is_file():
        raise ModelError(f"{path}: cannot be read (no such file): expected an ONNX model")
    entries = open_session(path, settings=settings).get_inputs()
    inputs = {entry.name: _declared(entry) for entry in entries}
    if _takes(before, inputs):
        return None
    old, new = ("; ".join(f"{name} {tensor}" for name, tensor in some.items()) for some in (before.inputs, inputs))
    return Finding(name="interface", baseline=old, measured=new, limit="the same", holds=False)


def _takes(before: Facts, inputs: Mapping[str, Tensor]) -> bool:
    same = before.inputs.keys() == inputs.keys()
    return same and all(inputs[name].takes(tensor) for name, tensor in before.inputs.items())


def _interface(before: Facts, after: Facts) -> Finding:
    """Hold inputs and outputs to those before: whoever ran that model must be able to run this one, and read its answers."""
    same = (
        _takes(before, after.inputs)
        and list(before.outputs) == list(after.outputs)
        and all(_reads_alike(output, after.outputs[name]) for name, output in before.outputs.items())
    )
    old, new = (
        f"{'; '.join(f'{name} {tensor}' for name, tensor in facts.inputs.items())} → "
        f"{'; '.join(f'{name} {Tensor(type=o.type, shape=o.declared)}' for name, o in facts.outputs.items())}"
        for facts in (before, after)
    )
    return Finding(name="interface", baseline=old, measured="the same" if old == new else new, limit="the same", holds=same)


def _reads_alike(before: Output, after: Output) -> bool:
    """Return whether who reads one output can read the other: how many entries a dynamic axis has may depend on the weights."""
    return (
        before.type == after.type
        and len(before.declared) == len(before.shape) == len(after.shape)
        and all(size in (None, ran) for size, ran in zip(before.declared, after.shape, strict=True))
    )


def _same_outputs(before: Facts, after: Facts, tolerance: float) -> Finding:
    pairs = [(one, after.outputs.get(name)) for name, one in before.outputs.items()]
    measured, holds = "different outputs", False
    if varying := sorted({*before.varying, *after.varying}):
        measured = f"{', '.join(varying)} vary from run to run; use --retrained to skip this check"
    elif not any(one.values for one in before.outputs.values()):
        measured = "no output has a value on random inputs; use --retrained to skip this check"
    elif before.outputs.keys() == after.outputs.keys() and all(_same_form(*pair) for pair in pairs):
        worst = float(np.max([one.apart(other) for one, other in pairs if other is not None]))  # NaN where one is
        measured, holds = f"{worst:.1e} relative difference", worst <= tolerance
    names = ", ".join(before.outputs)
    return Finding(name="parity", baseline=names, measured=measured, limit=f"{tolerance:g} relative", holds=holds)


def _same_form(one: Output, other: Output | None) -> bool:
    mine, its = ((o.shape, o.exact, len(o.values), o.infinite) if o is not None else None for o in (one, other))
    return mine == its


def _alike(one: Output, other: Output, tolerance: float) -> bool:
    return _same_form(one, other) and one.apart(other) <= tolerance


def _score(old: float, after: Facts, drop: float) -> Finding:
    new = after.score if after.score is not None else float("nan")
    return Finding(
        name=f"accuracy ({after.metric})",
        baseline=f"{old:.4f}",
        measured=f"{new:.4f}",
        limit=f"−{drop:g}",
        holds=new >= old - drop,
    )
