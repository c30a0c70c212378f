"""Checks everything about a model but its speed: interface, cost, placement, outputs and score, and their limits."""

from __future__ import annotations

import hashlib
import math
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path

import numpy as np
import onnxruntime as ort
from pydantic import Field

from tensorrail_runtime.errors import ModelError
from tensorrail_runtime.graphs.cost import cost
from tensorrail_runtime.graphs.files import sha256_of
from tensorrail_runtime.measure.accuracy import Labelled, evaluate, within_drop
from tensorrail_runtime.measure.parity import is_exact, relative_l2
from tensorrail_runtime.measure.placement import placement
from tensorrail_runtime.records import Record
from tensorrail_runtime.sessions.inputs import Shapes, random_inputs
from tensorrail_runtime.sessions.session import PROVIDERS, Session, open_session, require_tensors, run
from tensorrail_runtime.sessions.values import Values, native

_SKETCH_SIZE = 1024  # numbers kept of an output, for parity
_NOISE = 1e-4  # sums in another order differ by less between runs
_CHUNK = 2**20  # values that are processed at a time


class Tensor(Record):
    """The type and shape of an input as the model declares it, or of an output in a run; None is a dynamic axis."""

    type: str  # ONNX Runtime's name, such as tensor(float)
    shape: tuple[int | None, ...]

    def takes(self, other: Tensor) -> bool:
        """Return whether every array that fits `other` fits this tensor too."""
        return (
            self.type == other.type
            and len(self.shape) == len(other.shape)
            and all(own in (None, size) for own, size in zip(self.shape, other.shape, strict=True))
        )

    def at(self, batch: int, shape: Sequence[int] | None = None) -> tuple[int, ...]:
        """Return the shape in a run: `shape` if given, else the declared one with dynamic axes of size `batch`."""
        return tuple(shape or (batch if size is None else size for size in self.shape))

    def __str__(self) -> str:
        return f"{self.type.removeprefix('tensor')} {'×'.join('?' if size is None else str(size) for size in self.shape)}"


class Output(Tensor):
    """An output on random inputs of seed 0, or known ones, with its shape in that run; `values` is its sketch.

    For an output that is compared exactly, such as indices, the sketch is of random numbers that depend on its values.
    """

    declared: tuple[int | None, ...]
    values: tuple[float, ...]
    exact: bool
    infinite: str = ""  # digest of where it is infinite; such values count as 0 in `values`

    def apart(self, other: Output) -> float:
        """Estimate the relative L2 difference of `other`, or the share of entries that differ for exact outputs."""
        a, b = np.array(self.values), np.array(other.values)
        if not self.exact:
            return relative_l2(a, b)
        count = math.prod(size or 0 for size in self.shape)
        return float((a != b).sum() / max(count, 1)) if count <= _SKETCH_SIZE else float(np.square(b - a).sum() / (2 * count))


class Facts(Record):
    """The properties of a model that do not vary between runs."""

    sha256: str  # of its files, including external data
    flops: int
    uncounted: tuple[str, ...]  # operators that may multiply and that `flops` does not contain
    params: int
    bytes: int
    nodes: int
    placement: dict[str, int]  # nodes by provider, as ONNX Runtime ran them
    inputs: dict[str, Tensor]
    outputs: dict[str, Output]
    varying: tuple[str, ...]  # outputs that differ when the model runs again on the same inputs
    score: float | None = None  # mean of the metric; None without data
    metric: str = ""
    data: str = ""  # SHA-256 of the scored data


class Limits(Record):
    """The limits for a model, relative to the baseline.

    Attributes:
        max_slowdown: the slow-down that the check must detect, as a share; it fails above half of it.
        flops: the allowed increase of the FLOPs, as a share.
        params: the allowed increase of the parameters, as a share.
        bytes: the allowed increase of the files' size, as a share; names and metadata change a few bytes.
        nodes: the allowed increase of the number of nodes, as a share.
        score: the allowed decrease of the metric's mean.
        tolerance: the largest relative L2 difference of an output; None for a model that was trained again.

    """

    max_slowdown: float = Field(default=0.05, gt=0, allow_inf_nan=False)
    flops: float = Field(default=0.0, ge=0, allow_inf_nan=False)
    params: float = Field(default=0.0, ge=0, allow_inf_nan=False)
    bytes: float = Field(default=0.01, ge=0, allow_inf_nan=False)
    nodes: float = Field(default=0.0, ge=0, allow_inf_nan=False)
    score: float = Field(default=0.005, ge=0, allow_inf_nan=False)
    tolerance: float | None = Field(default=1e-3, ge=0, allow_inf_nan=False)


class Finding(Record):
    """The result of one check: the baseline, the measured value, its limit, and whether it holds."""

    name: str
    baseline: str
    measured: str
    limit: str
    holds: bool


def facts_of(
    path: Path | str,
    settings: Session,
    batch: int = 1,
    data: Labelled | None = None,
    shapes: Shapes | None = None,
    values: Values | None = None,
    order: Iterable[str] = (),
) -> Facts:
    """Measure the properties of a model.

    Args:
        path: the ONNX file.
        settings: the options of the session.
        batch: the size of dynamic axes that `shapes` does not set.
        data: labelled inputs of the score; without them there is none.
        shapes: shapes of inputs, by name.
        values: known values of inputs by name, in place of random ones.
        order: the names of the inputs in the order in which random ones are drawn; default: that of the model.

    Returns:
        The properties that do not vary between runs.

    Raises:
        ModelError: the model cannot be run, or an output is not a tensor of numbers.

    """
    graph_cost = cost(path, batch, shapes, values)
    session = open_session(path, settings=settings)
    require_tensors(path, session)
    declared = {entry.name: _declared(entry) for entry in session.get_outputs()}
    inputs = random_inputs(session, batch, shapes=shapes, values=values, order=order)
    outputs = {name: _output(path, name, array, declared[name]) for name, array in run(session, inputs).items()}
    again = {name: _output(path, name, array, declared[name]) for name, array in run(session, inputs).items()}
    placed = placement(path, settings=settings, batch=batch, shapes=shapes, values=values)
    score = None
    if data is not None:
        score = evaluate(path, data, settings=settings).mean
    return Facts(
        sha256=sha256_of(Path(path)),
        flops=graph_cost.flops,
        uncounted=graph_cost.uncounted,
        params=graph_cost.params,
        bytes=graph_cost.bytes,
        nodes=graph_cost.nodes,
        placement=placed.providers,
        inputs={entry.name: _declared(entry) for entry in session.get_inputs()},
        outputs=outputs,
        varying=tuple(name for name, output in outputs.items() if not _alike(output, again[name], _NOISE)),
        score=score,
        metric=data.metric if data is not None else "",
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
    """Return a random number of mean 0 and variance 1 for each entry, which depends only on its value and its place."""
    values = array.ravel()
    places = np.arange(len(values), dtype=np.uint64)
    bits = _hashed(_hashed(values.astype(np.int64).view(np.uint64)) ^ places)
    return np.asarray((bits / 2.0**64 - 0.5) * math.sqrt(12))


def sketch(array: np.ndarray) -> np.ndarray:
    """Return up to 1024 values as they are, or a count sketch of more: 1024 sums, of values with random signs.

    The index of a value decides its sum and its sign. The sketch of a difference has the same L2 norm as the difference, to
    within some per cent (Charikar, Chen and Farach-Colton 2002), so a change of any value is visible in an output of any size.
    """
    values = array.ravel().astype(np.float64)
    if len(values) <= _SKETCH_SIZE:
        return values
    sums = np.zeros(_SKETCH_SIZE)
    for start in range(0, len(values), _CHUNK):
        chunk = values[start : start + _CHUNK]
        bits = _hashed(np.arange(start, start + len(chunk), dtype=np.uint64))
        signed = np.where(bits & np.uint64(1), chunk, -chunk)
        sums += np.bincount((bits >> np.uint64(54)).astype(np.int64), weights=signed, minlength=_SKETCH_SIZE)
    return sums


def held(before: Facts, after: Facts, limits: Limits, provider: str) -> list[Finding]:
    """Compare the properties of a model with those of the baseline: everything but time.

    Args:
        before: the properties of the baseline's model.
        after: the properties of the checked model.
        limits: the limits for the differences.
        provider: the provider on which the nodes should run.

    Returns:
        One finding per property.

    """
    return [
        *(_size(name, before, after, getattr(limits, name)) for name in ("flops", "params", "bytes", "nodes")),
        _placed(before, after, PROVIDERS[provider]),
        _interface(before, after),
        *([_same_outputs(before, after, limits.tolerance)] if limits.tolerance is not None else []),
        *([_score(before.score, after, limits.score)] if before.score is not None and after.score is not None else []),
    ]


def sha256_of_data(data: Labelled) -> str:
    """Return the SHA-256 of arrays and labels: only scores on the same data are compared."""
    digest = hashlib.sha256()
    parts = [data.inputs] if isinstance(data.inputs, Mapping) else data.inputs
    for name, values in [*(item for part in parts for item in sorted(part.items())), ("labels", data.labels)]:
        array = native(values)
        digest.update(f"{name} {array.dtype.str} {array.shape}\n".encode())
        digest.update(array.tobytes())
    return digest.hexdigest()


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
    """Return a failed finding if a model does not take every input that the baseline's model took, else None."""
    if not Path(path).is_file():
        raise ModelError(f"{path}: cannot be read (no such file): expected an ONNX model")
    entries = open_session(path, settings=settings).get_inputs()
    inputs = {entry.name: _declared(entry) for entry in entries}
    if _takes(before, inputs):
        return None
    old, new = ("; ".join(f"{name} {tensor}" for name, tensor in tensors.items()) for tensors in (before.inputs, inputs))
    return Finding(name="interface", baseline=old, measured=new, limit="the same", holds=False)


def _takes(before: Facts, inputs: Mapping[str, Tensor]) -> bool:
    same = before.inputs.keys() == inputs.keys()
    return same and all(inputs[name].takes(tensor) for name, tensor in before.inputs.items())


def _interface(before: Facts, after: Facts) -> Finding:
    """Compare inputs and outputs: a program that uses the baseline's model must be able to use this one instead."""
    same = (
        _takes(before, after.inputs)
        and list(before.outputs) == list(after.outputs)
        and all(_reads_alike(output, after.outputs[name]) for name, output in before.outputs.items())
    )
    old, new = (
        f"{'; '.join(f'{name} {tensor}' for name, tensor in facts.inputs.items())} → "
        f"{'; '.join(f'{name} {Tensor(type=output.type, shape=output.declared)}' for name, output in facts.outputs.items())}"
        for facts in (before, after)
    )
    return Finding(name="interface", baseline=old, measured="the same" if old == new else new, limit="the same", holds=same)


def _reads_alike(before: Output, after: Output) -> bool:
    """Return whether a reader of one output can read the other; the size of a dynamic axis may depend on the weights.

    ONNX Runtime declares a scalar where the number of axes is not known.
    """
    declared = before.declared or (None,) * len(before.shape)
    return (
        before.type == after.type
        and len(declared) == len(before.shape) == len(after.shape)
        and all(own in (None, size) for own, size in zip(declared, after.shape, strict=True))
    )


def _same_outputs(before: Facts, after: Facts, tolerance: float) -> Finding:
    pairs = [(output, after.outputs.get(name)) for name, output in before.outputs.items()]
    measured, holds = "different outputs", False
    if varying := sorted({*before.varying, *after.varying}):
        measured = f"{', '.join(varying)} vary from run to run; for a retrained model, skip this check (retrained)"
    elif not any(output.values for output in before.outputs.values()):
        measured = "no output has a value on random inputs; for a retrained model, skip this check (retrained)"
    elif before.outputs.keys() == after.outputs.keys() and all(_same_form(*pair) for pair in pairs):
        worst = float(np.max([old.apart(new) for old, new in pairs if new is not None]))  # NaN if one of them is
        measured, holds = f"{worst:.1e} relative difference", worst <= tolerance
    names = ", ".join(before.outputs)
    return Finding(name="parity", baseline=names, measured=measured, limit=f"{tolerance:g} relative", holds=holds)


def _same_form(old: Output, new: Output | None) -> bool:
    forms = [(output.shape, output.exact, len(output.values), output.infinite) for output in (old, new) if output is not None]
    return new is not None and forms[0] == forms[1]


def _alike(old: Output, new: Output, tolerance: float) -> bool:
    return _same_form(old, new) and old.apart(new) <= tolerance


def _score(old: float, after: Facts, drop: float) -> Finding:
    new = after.score if after.score is not None else float("nan")
    return Finding(
        name=f"accuracy ({after.metric})",
        baseline=f"{old:.4f}",
        measured=f"{new:.4f}",
        limit=f"−{drop:g}",
        holds=within_drop(old, new, drop),
    )
