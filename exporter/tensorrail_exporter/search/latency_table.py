"""The latency of every layer, dense and in every possible form, measured on the target and stored on disk.

A time is measured once per distinct layer, form and target. Everything that it depends on is part of its key or of the name
of the file, so that a table is never used on another machine, provider, precision or version of ONNX Runtime.
"""

from __future__ import annotations

import hashlib
import json
import math
import os
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Literal

import numpy as np
import onnx
from pydantic import Field, ValidationError

from tensorrail_exporter.formats import WIDTH
from tensorrail_exporter.graphs.io import save_model
from tensorrail_exporter.plans.costs import dense_cost
from tensorrail_exporter.plans.plan import Precision
from tensorrail_exporter.precision.planned import PRECISIONS
from tensorrail_exporter.rewrite.survey import DenseLayer
from tensorrail_exporter.search.context import copies_of, dense_context, factored_context
from tensorrail_exporter.search.options import Option, families
from tensorrail_runtime.errors import CacheError
from tensorrail_runtime.measure.turns import BURST_ROUNDS, PRECISE, fresh_bursts
from tensorrail_runtime.progress import Progress, silent
from tensorrail_runtime.records import Record, first_problem, write_text
from tensorrail_runtime.scratch import scratch
from tensorrail_runtime.sessions.machine import machine
from tensorrail_runtime.sessions.session import Session

DENSE = "dense"  # the form of a layer that is not factorized

_VERSION = 2
_TOGETHER = 10  # forms in one process, timed in turn with the dense layer
BUSY = 0.1  # share of the time that a process waits for a processor, above which other programs disturb it
_LOADED = 2**29  # bytes of weights in one process, where layers are timed in turn
_SHARE = 0.002  # of a network's time: a layer's times need not be more precise
_LEAST_PRECISE = 0.03  # half the 95 % interval of a ratio, however small the layer
_DENSE_PRECISE = 0.02  # the same of dense layers among each other
_DENSE_OF_ALL = 0.001  # the same, of the time of all of them: small layers need not be as precise
_MOST_NARROW_ROUNDS = 200  # of a layer with fewer channels, in turn with the whole one
_DENSE_ROUNDS = 40  # at most: a network's time is a sum of many layers'
_ROUGH = 3  # rounds at least of rough times, of which the first is left out
_SKETCHED = 96  # models in one process that sketches times
_BURSTS = 20  # runs of a model at least, see `fresh_bursts`
_RATE = 1e10  # multiply-accumulates per second of a slow processor core, to estimate how long a sketch takes
_ON_GPU = 12  # the same on a GPU, where a process takes seconds to start; every form needs workspaces in its memory


class Target(Record):
    """Where and how a model will run: the hardware and the settings of the session, see `Session`."""

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
    precision: Precision = "fp32"

    @classmethod
    def here(cls, settings: Session, precision: Precision = "fp32") -> Target:
        """Return the target of a session with these settings, and networks of this precision, on this machine."""
        host = machine(gpu=settings.on_gpu)
        gpu = "" if host.gpu is None else f"{host.gpu.name}, driver {host.gpu.driver}"
        return cls(
            provider=settings.provider,
            device=gpu or host.processor,
            cores=host.cores,
            threads=settings.threads,
            onnxruntime=host.onnxruntime,
            level=settings.level,
            tf32=settings.tf32,
            nhwc=settings.nhwc,
            cuda_graph=settings.cuda_graph,
            arena=settings.arena,
            conv_search=settings.conv_search,
            precision=precision,
        )


class Timed(Record):
    """The time of one layer in one form: what one node adds to the latency of a network, at the layer's batch size."""

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
    """The times of layers and forms on one target. `LatencyTable.open` reads earlier measurements.

    Attributes:
        target: the target that all times are of.
        path: the file of the table; None for a table that is not stored.
        times: the times by their keys.
        rough: whether times are measured in few turns.
        unstored: why the times are not stored, for the user; empty where they are.
        busy: what was noticed of other load while times were measured, for the user; empty for none. Such times are not stored.

    """

    target: Target
    path: Path | None = None
    times: dict[str, Timed] = field(default_factory=dict)
    rough: bool = False
    unstored: str = ""
    busy: str = ""

    @classmethod
    def open(
        cls, settings: Session, folder: Path | str | None = None, *, rough: bool = False, precision: Precision = "fp32"
    ) -> LatencyTable:
        """Return the table of this machine, with the times that were stored before.

        Args:
            settings: settings of the sessions.
            folder: folder of the tables; default the user's cache folder, see `cache_folder`. Where nobody chose a folder
                and that one cannot be written, as without a home folder, the table is not stored.
            rough: measure in fewer turns; such times have a file of their own, and are only used where there are no others.
            precision: the precision that layers are timed in, between layers of the same precision; default fp32.

        Raises:
            CacheError: the file of the table cannot be read, is not a latency table, or is one of another target.

        """
        target = Target.here(settings, precision)
        name = f"latency-{_digest(target.model_dump(exclude_defaults=True))}.json"
        if not folder and not os.environ.get("TENSORRAIL_CACHE") and (problem := _default_folder_problem()):
            return cls(
                target,
                rough=rough,
                unstored=f"warning: the times of layers are not stored and will be measured again next time: {problem}; "
                "to keep them, set the environment variable TENSORRAIL_CACHE to a writable folder",
            )
        files = [Path(folder or cache_folder()) / (prefix + name) for prefix in (("rough-", "") if rough else ("",))]
        table = cls(target, files[0], rough=rough)
        for path in files:
            stored = _read(path)
            if stored is not None and stored.target != target:
                raise CacheError(
                    f"{path}: the latency table of another target ({stored.target}); remove it to measure again on this one"
                )
            table.times |= {timed.key: timed for timed in stored.times} if stored else {}
        return table

    def save(self) -> None:
        """Write the table completely or not at all, and keep the times that another process has added in the meantime.

        Raises:
            CacheError: the file cannot be written, or is not a latency table.

        """
        if self.path is None:
            return
        before = _read(self.path)
        if before is not None:
            self.times = {timed.key: timed for timed in before.times} | self.times
        stored = _Stored(target=self.target, times=tuple(self.times.values()))
        try:
            self.path.parent.mkdir(parents=True, exist_ok=True)
            write_text(self.path, stored.model_dump_json(indent=1) + "\n")
        except OSError as error:
            raise CacheError(
                f"{self.path}: the latency table cannot be written ({error.strerror or error}): choose a writable "
                "folder, or set $TENSORRAIL_CACHE to one"
            ) from None

    def milliseconds(self, layer: DenseLayer, option: Option | None = None) -> float:
        """Return the time of one node of the layer, dense or with an option; raise `KeyError` if it was not measured.

        What the layers before it save is not in it, see `saved_before`.
        """
        if option is not None and makers_of(layer, option):
            return self._of_narrow(layer, layer.with_inputs(option.ranks[0]))
        return self.times[_key(layer, option)].milliseconds

    def saved_before(self, layer: DenseLayer, option: Option) -> dict[str, float]:
        """Return the milliseconds that the layers before one node of this layer save with an option, by their names.

        Raises `KeyError` if they were not measured with so few outputs.
        """
        return {
            maker.name: self.milliseconds(maker) - self._of_narrow(maker, maker.with_outputs(option.ranks[0]))
            for maker in makers_of(layer, option)
        }

    def added(self, layer: DenseLayer, option: Option) -> float:
        """Return the time of one node of the layer with an option, less what the layers before it save."""
        return self.milliseconds(layer, option) - sum(self.saved_before(layer, option).values())

    def _of_narrow(self, layer: DenseLayer, narrow: DenseLayer) -> float:
        """Return the time of a layer with fewer channels: its share of the whole layer's in copies side by side."""
        share = self.milliseconds(narrow) / self.milliseconds(_side_by_side(layer))
        return self.milliseconds(layer) * share

    def missing(self, layer: DenseLayer, options: Sequence[Option]) -> list[Option]:
        """Return the options that were not measured yet."""
        return [option for option in options if any(key not in self.times for key in _keys(layer, option))]

    def lacks(self, wanted: Mapping[DenseLayer, Sequence[Option]]) -> bool:
        """Return whether a layer, dense or with one of its options, was not measured yet."""
        return any(_key(layer, None) not in self.times or self.missing(layer, options) for layer, options in wanted.items())

    def measure(
        self,
        wanted: Mapping[DenseLayer, Sequence[Option]],
        settings: Session,
        *,
        seconds: float = 60.0,
        whole: float | None = None,
        progress: Progress = silent,
    ) -> None:
        """Measure the missing times and save the table after every layer.

        The dense layers are timed first, all in turn; each form is then timed in turn with its dense layer. So neither two
        layers nor two forms are compared by times that were measured minutes apart.

        Args:
            wanted: the options of every layer; the dense layer is always measured, too.
            settings: settings of the sessions.
            seconds: time for all measurements, to which that of opening the models is added; default 60.
            whole: milliseconds of the network: layers are timed until their times are known within 0.2 % of it, but within 3 %
                of themselves, which takes less time for small layers. Default: within 0.5 % of themselves.
            progress: told what is measured next.

        Raises:
            CacheError: the table cannot be written.
            GraphError: a layer cannot be timed because its shapes are unknown.


        """
        jobs: dict[str, tuple[DenseLayer, list[Option]]] = {}
        nodes: Counter[str] = Counter()  # of the network, by the digest of their layer
        for layer in wanted:
            nodes[_digest(layer.signature)] += layer.nodes
        for layer, options in _without_narrow(wanted):
            digest, missing = _digest(layer.signature), self.missing(layer, options)
            if missing or _key(layer, None) not in self.times:
                _, queued = jobs.setdefault(digest, (layer, []))
                forms = {_form(option): option for option in (*queued, *missing)}  # equal layers may have different options
                queued[:] = forms.values()
        narrow = self._missing_narrow(wanted)
        if jobs or narrow:
            self._begin(progress)
        total = sum(1 + len(options) for _, options in jobs.values()) + sum(1 + len(own) for _, own in narrow.values())
        done = 0
        waits: list[float] = []
        unknown = [layer for layer, _ in jobs.values() if _key(layer, None) not in self.times]
        if len(unknown) > 1 and not self.rough:
            progress("timing layers", 0.0, f"{len(unknown)} dense layers in turn")
            dense_times, waited = _dense_times(unknown, settings, seconds / total, self.target.precision)
            self.times |= {timed.key: timed for timed in dense_times}
            waits.append(waited)
        for digest, (layer, options) in jobs.items():
            if not options and _key(layer, None) in self.times:
                done += 1
                continue
            progress("timing layers", done / total, layer.describe())
            rounds = _ROUGH if self.rough else BURST_ROUNDS
            precise = self._precision_for(layer, nodes[digest], whole)
            how = _How(settings, seconds / total, rounds, precise, self.target.precision)
            layer_times, waited = _layer_times(layer, options, how)
            for timed in self._as_before(layer, layer_times):
                self.times[timed.key] = timed
            done += 1 + len(options)
            waits.append(waited)
            # Times that were measured beside other programs serve this run alone.
            if not self.busy and np.median(waits) <= BUSY:
                self.save()
        for base, variants in narrow.values():
            progress("timing layers", done / total, f"{base.describe()} with fewer channels")
            layer = replace(base, side_by_side=False)
            precise = self._precision_for(layer, nodes[_digest(layer.signature)] or 1, whole)
            rounds = _ROUGH if self.rough else BURST_ROUNDS
            how = _How(settings, seconds / total, rounds, precise, self.target.precision)
            waits.append(self._time_narrow(base, variants, how))
            done += 1 + len(variants)
            if not self.busy and np.median(waits) <= BUSY:
                self.save()
        if waits and not self.busy and np.median(waits) > BUSY:
            self.busy = (
                "other programs were running: processes that timed layers waited for a processor "
                f"{100 * np.median(waits):.0f} % of the time; these times are not kept, measure again when the machine is idle"
            )
            progress("note", 1.0, self.busy)
        progress("timing layers", 1.0)

    def _begin(self, progress: Progress) -> None:
        """Say why times are not stored, once; report a folder that cannot be written before anything is measured."""
        if self.unstored:
            progress("note", 1.0, self.unstored)
            self.unstored = ""
        if not self.busy:
            self.save()

    def _missing_narrow(self, wanted: Mapping[DenseLayer, Sequence[Option]]) -> dict[str, tuple[DenseLayer, list[DenseLayer]]]:
        """Return the layers with fewer channels that were not measured yet, beside the layers that they are made of."""
        groups: dict[str, tuple[DenseLayer, dict[str, DenseLayer]]] = {}
        for layer, options in wanted.items():
            for option in options:
                for base, variant in _narrow_pairs(layer, option):
                    known = all(_key(one, None) in self.times for one in (base, variant))
                    if not known:
                        _, variants = groups.setdefault(_key(base, None), (base, {}))
                        variants[_key(variant, None)] = variant
        return {key: (base, list(variants.values())) for key, (base, variants) in groups.items()}

    def _time_narrow(self, base: DenseLayer, variants: Sequence[DenseLayer], how: _How) -> float:
        """Measure a layer with fewer channels in turn with the whole one; return the share that was spent waiting."""
        times, waited = _timed_together([base, *variants], how, (how.precise, _MOST_NARROW_ROUNDS, 0.0))
        known = self.times.get(_key(base, None))
        factor = 1.0 if known is None else known.milliseconds / times[0]
        for layer, time in zip((base, *variants), times, strict=True):
            key = _key(layer, None)
            timed = Timed(key=key, layer=layer.describe(), form=DENSE, milliseconds=time * factor)
            self.times.setdefault(key, timed)
        return waited

    def _precision_for(self, layer: DenseLayer, nodes: int, whole: float | None) -> float:
        """Return how precise the ratios of the times of a layer must be; the network has so many such nodes."""
        known = self.times.get(_key(layer, None))
        if whole is None or known is None:
            return PRECISE
        return min(max(_SHARE * whole / (nodes * known.milliseconds), PRECISE), _LEAST_PRECISE)

    def with_estimates(self, options: Mapping[DenseLayer, Sequence[Option]]) -> LatencyTable:
        """Return a table, which is not stored, that also has the times of options between two that were measured.

        Logarithms are interpolated, time against MACs, among the options of a layer with the same format and modes.

        Args:
            options: the options of every layer, those with the fewest MACs first; of each format and modes, the first and the
                last one were measured, as were those that `thinned` returns.

        """
        times = dict(self.times)
        for layer, own in options.items():
            for family in families(own):
                if family[0].format == WIDTH:
                    times |= self._narrow_estimates(layer, family)
                    continue
                known = [option for option in family if _key(layer, option) in self.times]
                logs = np.log([(option.macs, self.milliseconds(layer, option)) for option in known])
                for option in self.missing(layer, family):
                    time = float(np.exp(np.interp(math.log(option.macs), logs[:, 0], logs[:, 1])))
                    key = _key(layer, option)
                    times[key] = Timed(key=key, layer=layer.describe(), form=_form(option), milliseconds=time)
        return LatencyTable(self.target, times=times, busy=self.busy)

    def _narrow_estimates(self, layer: DenseLayer, family: Sequence[Option]) -> dict[str, Timed]:
        """Return the times of a layer with fewer inputs and of those before with fewer outputs, between those measured."""
        counts = [option.ranks[0] for option in family]
        found: dict[str, Timed] = {}
        for whole, variants in (
            (layer, [layer.with_inputs(count) for count in counts]),
            *((maker, [maker.with_outputs(count) for count in counts]) for maker in layer.makers),
        ):
            known = [one for one in (*variants, _side_by_side(whole)) if _key(one, None) in self.times]
            logs = np.log([(one.params, self.milliseconds(one)) for one in known])
            for one in variants:
                key = _key(one, None)
                if key not in self.times:
                    time = float(np.exp(np.interp(math.log(one.params), logs[:, 0], logs[:, 1])))
                    found[key] = Timed(key=key, layer=one.describe(), form=DENSE, milliseconds=time)
        return found

    def sketch(
        self, wanted: Mapping[DenseLayer, Sequence[Option]], settings: Session, seconds: float, progress: Progress = silent
    ) -> LatencyTable | None:
        """Return a table with rough times of what is missing, which is not stored: for bounds, not for choices.

        Many layers and forms are timed in turn in one process, a few runs each.

        Args:
            wanted: the options of every layer.
            settings: settings of the sessions.
            seconds: how long the models may run; None is returned where they need longer by their MACs.
            progress: told what is done.

        """
        missing: dict[str, tuple[DenseLayer, tuple[Option, ...]]] = {}
        for layer, options in _as_layers(wanted):
            if _key(layer, None) not in self.times or self.missing(layer, options):
                for together in _loaded_together(layer, options, _SKETCHED):
                    missing[_digest((layer.signature, [_form(option) for option in together]))] = layer, tuple(together)
        if sum(_sketch_seconds(*job) for job in missing.values()) > seconds:
            return None
        times = dict(self.times)
        groups: list[list[tuple[DenseLayer, tuple[Option, ...]]]] = []
        models = loaded = 0
        for layer, options in missing.values():
            size = copies_of(layer) * layer.bytes * (1 + len(options))
            if not groups or models + 2 + len(options) > _SKETCHED or loaded + size > _LOADED:
                groups.append([])
                models = loaded = 0
            groups[-1].append((layer, options))
            models, loaded = models + 2 + len(options), loaded + size
        for number, group in enumerate(groups):
            progress("estimating what can be reached", number / len(groups), f"{len(group)} layers")
            times |= {timed.key: timed for timed in _sketched(group, settings, self.target.precision)}
        progress("estimating what can be reached", 1.0)
        return LatencyTable(self.target, times=times)

    def _as_before(self, layer: DenseLayer, layer_times: Sequence[Timed]) -> list[Timed]:
        """Return new times of a layer scaled to the time of the dense layer that is in the table already, if there is one.

        What was measured is how many times faster a form is than the dense layer, which other load changes less than times.
        """
        before = self.times.get(_key(layer, None))
        if before is None:
            return list(layer_times)
        factor = before.milliseconds / next(timed.milliseconds for timed in layer_times if timed.form == DENSE)
        return [
            before if timed.form == DENSE else timed.model_copy(update={"milliseconds": timed.milliseconds * factor})
            for timed in layer_times
        ]


def _read(path: Path) -> _Stored | None:
    """Return the table in a file, or None if the file does not exist."""
    try:
        return _Stored.model_validate_json(path.read_bytes())
    except FileNotFoundError:
        return None
    except OSError as error:
        raise CacheError(
            f"{path}: cannot be read ({error.strerror or error}): expected a readable latency table, or no file"
        ) from None
    except ValidationError as error:
        raise CacheError(f"{path}: not a latency table ({first_problem(error)}): remove it to measure again") from None


def cache_folder() -> Path:
    """Return the folder of the tables: $TENSORRAIL_CACHE, else `tensorrail` in $XDG_CACHE_HOME or in ~/.cache."""
    chosen = os.environ.get("TENSORRAIL_CACHE")
    if chosen:
        return Path(chosen)
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "tensorrail"


def _default_folder_problem() -> str:
    """Return why the default cache folder cannot be used, or an empty string; the folder is created."""
    try:
        folder = cache_folder()
    except RuntimeError:  # of Path.home()
        return "this user has no home folder"
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        return f"the cache folder {folder} cannot be created ({error.strerror or error})"
    return "" if os.access(folder, os.R_OK | os.W_OK | os.X_OK) else f"the cache folder {folder} is not writable"


def _dense_times(
    layers: Sequence[DenseLayer], settings: Session, seconds: float, precision: Precision
) -> tuple[list[Timed], float]:
    """Return the times of dense layers, and the share of the time that was spent waiting; each is timed for about `seconds`.

    All of them run in turn in one process, so that they are comparable, whatever else the machine does in the meantime. Where
    their weights are too large to be loaded together, each group is timed beside the first layer, and its times are those that
    it would take if the first layer took its usual time.
    """
    groups: list[list[DenseLayer]] = [[layers[0]]]
    for layer in layers[1:]:
        if sum(copies_of(other) * other.bytes for other in (*groups[-1], layer)) > _LOADED and len(groups[-1]) > 1:
            groups.append([layers[0]])
        groups[-1].append(layer)
    how = _How(settings, seconds, BURST_ROUNDS, _DENSE_PRECISE, precision)
    results = [_timed_together(group, how, (_DENSE_PRECISE, _DENSE_ROUNDS, _DENSE_OF_ALL)) for group in groups]
    usual = float(np.median([times[0] for times, _ in results]))
    milliseconds = [usual]
    for times, _ in results:
        milliseconds += [time * usual / times[0] for time in times[1:]]
    timed = [
        Timed(key=_key(layer, None), layer=layer.describe(), form=DENSE, milliseconds=time)
        for layer, time in zip(layers, milliseconds, strict=True)
    ]
    return timed, float(np.median([waited for _, waited in results]))


def _timed_together(layers: Sequence[DenseLayer], how: _How, precise: tuple[float, int, float]) -> tuple[list[float], float]:
    """Return the milliseconds of one copy of each dense layer, timed in turn, and the share that was spent waiting.

    `precise` are the last arguments of `fresh_bursts`.
    """
    with scratch() as folder:
        paths: list[Path] = []
        for layer in layers:
            for copies in dict.fromkeys((copies_of(layer), 1)):
                paths.append(Path(folder) / f"{len(paths)}.onnx")
                _write(dense_context(layer, copies), paths[-1], how.precision)
        measured, waited = fresh_bursts(paths, how.settings, how.seconds * len(layers), how.rounds, *precise)
    rows = iter(measured)
    per_copy = []
    for layer in layers:
        whole, copies = next(rows), copies_of(layer)
        per_copy.append(np.maximum((whole - next(rows)) / (copies - 1) if copies > 1 else whole, 1e-6))
    # Each layer's time is a multiple of the first one's in the same rounds, which may be fewer than that one's.
    first = float(np.nanmedian(per_copy[0]))
    return [max(first * float(np.nanmedian(own / per_copy[0])), 1e-6) for own in per_copy], waited


@dataclass(frozen=True)
class _How:
    """How the forms of a layer are timed."""

    settings: Session
    seconds: float  # of each form, about
    rounds: int  # at least
    precise: float  # half the 95 % interval of a ratio of times
    precision: Precision


def _layer_times(layer: DenseLayer, options: Sequence[Option], how: _How) -> tuple[list[Timed], float]:
    """Return the times of a layer, dense and with these options, and the share of the time that was spent waiting.

    Every form is timed in turn with the dense copies and only the ratio of each pair counts, which cancels other load on the
    machine. The time of the dense layer is the median over all turns. Every group of forms runs in its own process.
    """
    copies = copies_of(layer)
    with scratch() as folder:
        dense_model = dense_context(layer, copies)
        dense, single = Path(folder) / "dense.onnx", Path(folder) / "single.onnx"
        _write(dense_model, dense, how.precision)
        _write(dense_context(layer, 1), single, how.precision)
        groups = _loaded_together(layer, options, _ON_GPU if how.settings.on_gpu else _TOGETHER)
        ratios: list[float] = []
        base: list[float] = []
        waits: list[float] = []
        single_ratio = 0.0  # time of a single copy divided by that of all
        for number, group in enumerate(groups):
            paths = [dense, *(Path(folder) / f"{k}.onnx" for k in range(len(group)))]
            for path, option in zip(paths[1:], group, strict=True):
                _write(factored_context(layer, dense_model, option), path, how.precision)
            if number == 0 and copies > 1:
                paths.append(single)
            times, waited = fresh_bursts(paths, how.settings, how.seconds * len(paths), how.rounds, how.precise)
            waits.append(waited)
            base += list(times[0])
            ratios += [float(np.nanmedian(row / times[0])) for row in times[1 : 1 + len(group)]]
            if number == 0 and copies > 1:
                single_ratio = float(np.nanmedian(times[-1] / times[0]))
    timed = _times_of(layer, options, float(np.median(base)), single_ratio, ratios)
    return timed, float(np.median(waits))


def _sketched(group: Sequence[tuple[DenseLayer, Sequence[Option]]], settings: Session, precision: Precision) -> list[Timed]:
    """Return rough times of layers and forms: a few runs of each, all in turn in one process."""
    with scratch() as folder:
        paths: list[Path] = []
        for layer, options in group:
            dense = dense_context(layer, copies_of(layer))
            models = [dense, dense_context(layer, 1), *(factored_context(layer, dense, option) for option in options)]
            for model in models:
                paths.append(Path(folder) / f"{len(paths)}.onnx")
                _write(model, paths[-1], precision)
        rows = iter(fresh_bursts(paths, settings, 0.0)[0])
    timed = []
    for layer, options in group:
        whole = next(rows)
        single_ratio, *ratios = (float(np.median(next(rows) / whole)) for _ in range(1 + len(options)))
        timed += _times_of(layer, options, float(np.median(whole)), single_ratio, ratios)
    return timed


def _loaded_together(layer: DenseLayer, options: Sequence[Option], most: int) -> list[Sequence[Option]]:
    """Return the options in groups of at most `most`, smaller ones where each form holds much beside its cores.

    Every form of a recurrent weight holds the input weight of its node, which may be hundreds of times larger.
    """
    beside = copies_of(layer) * max(0, layer.bytes - layer.params * layer.dtype.itemsize)
    count = max(1, min(most, _LOADED // max(1, beside)))
    return [options[k : k + count] for k in range(0, len(options), count)] or [()]


def _write(context: onnx.ModelProto, path: Path, precision: Precision) -> None:
    """Write a small model of copies of a layer in the precision that it is timed in."""
    save_model(PRECISIONS[precision].for_layer(context), path)


def _sketch_seconds(layer: DenseLayer, options: Sequence[Option]) -> float:
    """Return about how long the models of a layer run in a sketch, by their MACs."""
    copies, macs = copies_of(layer), dense_cost(layer.spec).macs
    own, whole = layer.macs / max(1, layer.nodes), layer.node_macs
    factored = sum(whole - own + own * option.macs / max(1, macs) for option in options)
    return _BURSTS * ((copies + 1) * whole + copies * factored) / _RATE


def _times_of(
    layer: DenseLayer, options: Sequence[Option], whole: float, single_ratio: float, ratios: Sequence[float]
) -> list[Timed]:
    """Return the times of a layer, dense and with these options.

    Args:
        layer: the layer.
        options: the options.
        whole: milliseconds of all dense copies.
        single_ratio: time of a single dense copy divided by that of all.
        ratios: time of all copies with each option, divided by that of all dense copies.

    """
    copies = copies_of(layer)
    per_copy = whole * (1 - single_ratio) / (copies - 1) if copies > 1 else whole
    ends = whole - copies * per_copy  # the part that does not depend on the number of copies
    dense_macs = dense_cost(layer.spec).macs
    timed = [Timed(key=_key(layer, None), layer=layer.describe(), form=DENSE, milliseconds=max(per_copy, 1e-6))]
    for option, ratio in zip(options, ratios, strict=True):
        # Noise may hide a layer of microseconds: no form is assumed to be more than twice as efficient as the dense layer.
        least = 0.5 * timed[0].milliseconds * option.macs / dense_macs if dense_macs else 0.0
        milliseconds = max((whole * ratio - ends) / copies, least, 1e-6)
        timed.append(Timed(key=_key(layer, option), layer=layer.describe(), form=_form(option), milliseconds=milliseconds))
    return timed


def makers_of(layer: DenseLayer, option: Option) -> tuple[DenseLayer, ...]:
    """Return the layers before a layer that compute fewer channels with an option."""
    return layer.makers if option.format == WIDTH else ()


def _as_layers(
    wanted: Mapping[DenseLayer, Sequence[Option]],
) -> Iterator[tuple[DenseLayer, Sequence[Option]]]:
    """Yield the layers with their options; an option that reads fewer channels is timed as dense layers, see `_parts`."""
    for layer, options in wanted.items():
        narrow = [option for option in options if makers_of(layer, option)]
        yield layer, [option for option in options if option not in narrow]
        for option in narrow:
            yield from ((part, ()) for part in _parts(layer, option))


def _without_narrow(wanted: Mapping[DenseLayer, Sequence[Option]]) -> Iterator[tuple[DenseLayer, Sequence[Option]]]:
    """Yield the layers and the makers of narrower ones, with the options that are forms of one layer."""
    for layer, options in wanted.items():
        narrow = [option for option in options if makers_of(layer, option)]
        yield layer, [option for option in options if option not in narrow]
        yield from ((maker, ()) for maker in (layer.makers if narrow else ()))


def _narrow_pairs(layer: DenseLayer, option: Option) -> Iterator[tuple[DenseLayer, DenseLayer]]:
    """Yield the layers that an option makes narrower, each as it is timed whole, and with fewer channels."""
    if makers_of(layer, option):
        yield _side_by_side(layer), layer.with_inputs(option.ranks[0])
        yield from ((_side_by_side(maker), maker.with_outputs(option.ranks[0])) for maker in layer.makers)


def _parts(layer: DenseLayer, option: Option) -> list[DenseLayer]:
    """Return what an option that reads fewer channels is timed as: its layer and those before it, whole and with fewer."""
    (count,) = option.ranks
    before = [part for maker in layer.makers for part in (maker, _side_by_side(maker), maker.with_outputs(count))]
    return [layer, _side_by_side(layer), layer.with_inputs(count), *before]


def _side_by_side(layer: DenseLayer) -> DenseLayer:
    """Return a layer that is timed as its narrower variants are, whose copies cannot form a chain."""
    return replace(layer, side_by_side=True, makers=()) if layer.source == layer.output else layer


def _keys(layer: DenseLayer, option: Option) -> list[str]:
    """Return the keys of all times that an option needs."""
    if makers_of(layer, option):
        return [_key(part, None) for part in _parts(layer, option)]
    return [_key(layer, option)]


def _form(option: Option) -> str:
    """Return what runs, in words; equal forms take equal time."""
    padded = f", ranks padded to {option.block}" if option.block > 1 else ""
    chain = f", modes {option.modes} {option.merge}" if len(option.modes) > 3 else ""  # the steps do not show folded axes
    return option.steps + padded + chain


def _key(layer: DenseLayer, option: Option | None) -> str:
    # The form, not the format, is part of the key: equal steps of two formats are measured once.
    form = DENSE if option is None else _form(option)
    return _digest({"version": _VERSION, "layer": layer.signature, "form": form})


def _digest(value: object) -> str:
    return hashlib.sha256(json.dumps(value, sort_keys=True, default=str).encode()).hexdigest()[:24]
