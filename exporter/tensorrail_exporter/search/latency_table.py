"""How long each layer takes, dense and in every form that it could have: measured on the target, and kept on disk.

A time is measured once for each distinct layer, form and target; everything that it depends on is in the key, so that a
table made on one machine, provider, precision or version of ONNX Runtime is never read on another.
"""

from __future__ import annotations

import hashlib
import json
import os
import tempfile
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

import numpy as np
from pydantic import Field, ValidationError

from tensorrail_exporter.graphs.io import save_model
from tensorrail_exporter.plans.costs import dense_cost
from tensorrail_exporter.rewrite.survey import DenseLayer
from tensorrail_exporter.search.context import copies_of, dense_context, factored_context
from tensorrail_exporter.search.options import Option
from tensorrail_runtime.errors import GraphError
from tensorrail_runtime.measure.latency import fresh_bursts
from tensorrail_runtime.records import Record, first_problem, write_text
from tensorrail_runtime.sessions.machine import machine
from tensorrail_runtime.sessions.session import Session

DENSE = "dense"  # the form of a layer that stays as it is

_VERSION = 2
_TOGETHER = 6  # forms that are timed in turns with the dense one
_ON_GPU = 12  # the same on a GPU, where a process takes seconds to begin; each form has workspaces in its memory


class Target(Record):
    """Where and how a model will run, apart from the model itself."""

    provider: str
    device: str  # processor, or GPU with its driver
    cores: int
    threads: int
    onnxruntime: str
    level: str
    tf32: bool
    nhwc: bool
    cuda_graph: bool
    arena: bool
    conv_search: str

    @classmethod
    def here(cls, settings: Session) -> Target:
        """Return this machine under these settings."""
        found = machine(gpu=settings.on_gpu)
        gpu = "" if found.gpu is None else f"{found.gpu.name}, driver {found.gpu.driver}"
        return cls(
            provider=settings.provider,
            device=gpu or found.processor,
            cores=found.cores,
            threads=settings.threads,
            onnxruntime=found.onnxruntime,
            level=settings.level,
            tf32=settings.tf32,
            nhwc=settings.nhwc,
            cuda_graph=settings.cuda_graph,
            arena=settings.arena,
            conv_search=settings.conv_search,
        )


class Timed(Record):
    """One layer in one form; `milliseconds` is what one node adds to a network at the batch size of the shapes."""

    key: str
    layer: str  # in words
    form: str
    milliseconds: float = Field(gt=0, allow_inf_nan=False)


class _Stored(Record):
    version: Literal[1] = 1
    target: Target
    times: tuple[Timed, ...]


@dataclass
class LatencyTable:
    """Times by layer and form for one target. `LatencyTable.open` reads what was measured before."""

    target: Target
    path: Path | None = None
    times: dict[str, Timed] = field(default_factory=dict)

    @classmethod
    def open(cls, settings: Session, folder: Path | str | None = None) -> LatencyTable:
        """Return the table of this machine; `folder` is where tables are kept, by default the user's cache folder.

        Raises `GraphError` for a file there that is no latency table, or one of another target.
        """
        target = Target.here(settings)
        name = f"latency-{_digest(target.model_dump())}.json"
        path = Path(folder or cache_folder()) / name
        table = cls(target, path)
        stored = _read(path)
        if stored is not None and stored.target != target:
            raise GraphError(
                f"{path}: the latency table of another target ({stored.target}); remove it to measure again on this one"
            )
        table.times = {one.key: one for one in stored.times} if stored else {}
        return table

    def save(self) -> None:
        """Write the table whole; what another process wrote meanwhile is kept. Raises `GraphError` as `open` does."""
        if self.path is None:
            return
        before = _read(self.path)
        if before is not None:
            self.times = {one.key: one for one in before.times} | self.times
        stored = _Stored(target=self.target, times=tuple(self.times.values()))
        try:
            self.path.parent.mkdir(parents=True, exist_ok=True)
            write_text(self.path, stored.model_dump_json(indent=1) + "\n")
        except OSError as error:
            raise GraphError(
                f"{self.path}: the latency table cannot be written ({error.strerror or error}): choose a writable "
                "folder, or set $TENSORRAIL_CACHE to one"
            ) from None

    def milliseconds(self, layer: DenseLayer, option: Option | None = None) -> float:
        """Return the time of one node of the layer, dense or in a form; `KeyError` when it was not measured."""
        return self.times[_key(layer, option)].milliseconds

    def missing(self, layer: DenseLayer, options: Sequence[Option]) -> list[Option]:
        """Return the options that have no time yet."""
        return [option for option in options if _key(layer, option) not in self.times]

    def measure(
        self,
        wanted: Mapping[DenseLayer, Sequence[Option]],
        settings: Session,
        *,
        seconds: float = 150.0,
        on_share: Callable[[float, str], None] = lambda _, __: None,
    ) -> None:
        """Measure what is missing, in about `seconds` and the time that opening the models takes, and save the table.

        `on_share` is told the share that is done and what is measured next.
        """
        jobs: dict[str, tuple[DenseLayer, list[Option]]] = {}
        for layer, options in wanted.items():
            missing = self.missing(layer, options)
            if missing or _key(layer, None) not in self.times:
                _, found = jobs.setdefault(_digest(layer.signature), (layer, []))
                forms = {_form(option): option for option in (*found, *missing)}  # equal layers may be planned differently
                found[:] = forms.values()
        if jobs:
            self.save()  # a folder that cannot be written is told before anything is measured
        total = sum(1 + len(options) for _, options in jobs.values())
        done = 0
        for layer, options in jobs.values():
            on_share(done / total, layer.describe())
            each = seconds / total
            for timed in _layer_times(layer, options, settings, each):
                self.times[timed.key] = timed
            done += 1 + len(options)
            self.save()
        on_share(1.0, "")


def _read(path: Path) -> _Stored | None:
    """Return what a file holds, None where there is none; `GraphError` when it is no latency table."""
    try:
        return _Stored.model_validate_json(path.read_bytes())
    except FileNotFoundError:
        return None
    except OSError as error:
        raise GraphError(
            f"{path}: cannot be read ({error.strerror or error}): expected a readable latency table, or no file"
        ) from None
    except ValidationError as error:
        raise GraphError(f"{path}: not a latency table ({first_problem(error)}): remove it to measure again") from None


def cache_folder() -> Path:
    """Return where tables are kept: $TENSORRAIL_CACHE, or `tensorrail` in $XDG_CACHE_HOME or ~/.cache."""
    own = os.environ.get("TENSORRAIL_CACHE")
    if own:
        return Path(own)
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "tensorrail"


def _layer_times(layer: DenseLayer, options: Sequence[Option], settings: Session, seconds: float) -> list[Timed]:
    """Return the times of a layer, dense and in these forms, each in about `seconds`.

    Each form is timed in turns with the dense copies, and the ratio of each pair counts, so that what the machine does
    meanwhile falls out; the dense layer's own time is that of all turns. Every group of forms has a process of its own.
    """
    copies = copies_of(layer)
    with tempfile.TemporaryDirectory() as folder:
        many = dense_context(layer, copies)
        dense, single = Path(folder) / "dense.onnx", Path(folder) / "single.onnx"
        save_model(many, dense)
        save_model(dense_context(layer, 1), single)
        together = _ON_GPU if settings.on_gpu else _TOGETHER
        groups = [options[k : k + together] for k in range(0, len(options), together)] or [()]
        ratios: list[float] = []
        base: list[float] = []
        alone = 0.0
        for number, group in enumerate(groups):
            paths = [dense, *(Path(folder) / f"{k}.onnx" for k in range(len(group)))]
            for path, option in zip(paths[1:], group, strict=True):
                save_model(factored_context(layer, many, option), path)
            if number == 0 and copies > 1:
                paths.append(single)
            times = fresh_bursts(paths, settings, seconds * len(paths))
            base += list(times[0])
            ratios += [float(np.median(row / times[0])) for row in times[1 : 1 + len(group)]]
            if number == 0 and copies > 1:
                alone = float(np.median(times[-1] / times[0]))
    whole = float(np.median(base))
    one = whole * (1 - alone) / (copies - 1) if copies > 1 else whole
    ends = whole - copies * one  # what does not depend on the number of copies
    dense_macs = dense_cost(layer.spec).macs
    found = [Timed(key=_key(layer, None), layer=layer.describe(), form=DENSE, milliseconds=max(one, 1e-6))]
    for option, ratio in zip(options, ratios, strict=True):
        # A layer of microseconds may drown in noise: no form is taken to be more than twice as efficient as the dense layer.
        least = 0.5 * found[0].milliseconds * option.macs / max(1, dense_macs)
        each = max((whole * ratio - ends) / copies, least, 1e-6)
        found.append(Timed(key=_key(layer, option), layer=layer.describe(), form=_form(option), milliseconds=each))
    return found


def _form(option: Option) -> str:
    padded = f", ranks padded to {option.block}" if option.block > 1 else ""
    chain = f", modes {option.modes} {option.merge}" if len(option.modes) > 3 else ""  # folded axes are not in the steps
    return option.steps + padded + chain


def _key(layer: DenseLayer, option: Option | None) -> str:
    # What runs is said by the steps: equal steps of two formats are one measurement.
    form = DENSE if option is None else _form(option)
    return _digest({"version": _VERSION, "layer": layer.signature, "form": form})


def _digest(value: object) -> str:
    return hashlib.sha256(json.dumps(value, sort_keys=True, default=str).encode()).hexdigest()[:24]
