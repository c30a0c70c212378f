"""The latency of every layer, dense and in every possible form, measured on the target and stored on disk.

A time is measured once per distinct layer, form and target. Everything that it depends on is part of its key or of the name
of the file, so that a table is never used on another machine, provider, precision or version of ONNX Runtime.
"""

from __future__ import annotations

import math
import os
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Literal

import numpy as np
from pydantic import ValidationError

from tensorrail_exporter.formats import WIDTH
from tensorrail_exporter.plans.plan import Precision
from tensorrail_exporter.rewrite.survey import DenseLayer
from tensorrail_exporter.search.layer_timing import (
    SKETCHED,
    How,
    dense_times,
    layer_times,
    loaded_together,
    sketch_groups,
    sketch_seconds,
    sketched,
    timed_together,
)
from tensorrail_exporter.search.options import Option, families
from tensorrail_exporter.search.timed_layers import (
    DENSE,
    Timed,
    as_layers,
    digest_of,
    form_of,
    key_of,
    keys_of,
    makers_of,
    narrow_pairs,
    side_by_side,
    without_narrow,
)
from tensorrail_runtime.errors import CacheError
from tensorrail_runtime.measure.turns import BURST_ROUNDS, PRECISE
from tensorrail_runtime.progress import Progress, silent
from tensorrail_runtime.records import Record, first_problem, write_text
from tensorrail_runtime.sessions.machine import machine
from tensorrail_runtime.sessions.session import Session

BUSY = 0.1  # share of the time that a process waits for a processor, above which other programs disturb it
_SHARE = 0.002  # of a network's time: a layer's times need not be more precise
_LEAST_PRECISE = 0.03  # half the 95 % interval of a ratio, however small the layer
_MOST_NARROW_ROUNDS = 200  # of a layer with fewer channels, in turn with the whole one
_ROUGH = 3  # rounds at least of rough times, of which the first is left out


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
        name = f"latency-{digest_of(target.model_dump(exclude_defaults=True))}.json"
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
        return self.times[key_of(layer, option)].milliseconds

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
        share = self.milliseconds(narrow) / self.milliseconds(side_by_side(layer))
        return self.milliseconds(layer) * share

    def missing(self, layer: DenseLayer, options: Sequence[Option]) -> list[Option]:
        """Return the options that were not measured yet."""
        return [option for option in options if any(key not in self.times for key in keys_of(layer, option))]

    def lacks(self, wanted: Mapping[DenseLayer, Sequence[Option]]) -> bool:
        """Return whether a layer, dense or with one of its options, was not measured yet."""
        return any(key_of(layer, None) not in self.times or self.missing(layer, options) for layer, options in wanted.items())

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
            nodes[digest_of(layer.signature)] += layer.nodes
        for layer, options in without_narrow(wanted):
            digest, missing = digest_of(layer.signature), self.missing(layer, options)
            if missing or key_of(layer, None) not in self.times:
                _, queued = jobs.setdefault(digest, (layer, []))
                forms = {form_of(option): option for option in (*queued, *missing)}  # equal layers may have different options
                queued[:] = forms.values()
        narrow = self._missing_narrow(wanted)
        if jobs or narrow:
            self._begin(progress)
        total = sum(1 + len(options) for _, options in jobs.values()) + sum(1 + len(own) for _, own in narrow.values())
        done = 0
        waits: list[float] = []
        unknown = [layer for layer, _ in jobs.values() if key_of(layer, None) not in self.times]
        if len(unknown) > 1 and not self.rough:
            progress("timing layers", 0.0, f"{len(unknown)} dense layers in turn")
            together, waited = dense_times(unknown, settings, seconds / total, self.target.precision)
            self.times |= {timed.key: timed for timed in together}
            waits.append(waited)
        for digest, (layer, options) in jobs.items():
            if not options and key_of(layer, None) in self.times:
                done += 1
                continue
            progress("timing layers", done / total, layer.describe())
            rounds = _ROUGH if self.rough else BURST_ROUNDS
            precise = self._precision_for(layer, nodes[digest], whole)
            how = How(settings, seconds / total, rounds, precise, self.target.precision)
            in_turn, waited = layer_times(layer, options, how)
            for timed in self._as_before(layer, in_turn):
                self.times[timed.key] = timed
            done += 1 + len(options)
            waits.append(waited)
            # Times that were measured beside other programs serve this run alone.
            if not self.busy and np.median(waits) <= BUSY:
                self.save()
        for base, variants in narrow.values():
            progress("timing layers", done / total, f"{base.describe()} with fewer channels")
            layer = replace(base, side_by_side=False)
            precise = self._precision_for(layer, nodes[digest_of(layer.signature)] or 1, whole)
            rounds = _ROUGH if self.rough else BURST_ROUNDS
            how = How(settings, seconds / total, rounds, precise, self.target.precision)
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
                for base, variant in narrow_pairs(layer, option):
                    known = all(key_of(one, None) in self.times for one in (base, variant))
                    if not known:
                        _, variants = groups.setdefault(key_of(base, None), (base, {}))
                        variants[key_of(variant, None)] = variant
        return {key: (base, list(variants.values())) for key, (base, variants) in groups.items()}

    def _time_narrow(self, base: DenseLayer, variants: Sequence[DenseLayer], how: How) -> float:
        """Measure a layer with fewer channels in turn with the whole one; return the share that was spent waiting."""
        times, waited = timed_together([base, *variants], how, (how.precise, _MOST_NARROW_ROUNDS, 0.0))
        known = self.times.get(key_of(base, None))
        factor = 1.0 if known is None else known.milliseconds / times[0]
        for layer, time in zip((base, *variants), times, strict=True):
            key = key_of(layer, None)
            timed = Timed(key=key, layer=layer.describe(), form=DENSE, milliseconds=time * factor)
            self.times.setdefault(key, timed)
        return waited

    def _precision_for(self, layer: DenseLayer, nodes: int, whole: float | None) -> float:
        """Return how precise the ratios of the times of a layer must be; the network has so many such nodes."""
        known = self.times.get(key_of(layer, None))
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
                known = [option for option in family if key_of(layer, option) in self.times]
                logs = np.log([(option.macs, self.milliseconds(layer, option)) for option in known])
                for option in self.missing(layer, family):
                    time = float(np.exp(np.interp(math.log(option.macs), logs[:, 0], logs[:, 1])))
                    key = key_of(layer, option)
                    times[key] = Timed(key=key, layer=layer.describe(), form=form_of(option), milliseconds=time)
        return LatencyTable(self.target, times=times, busy=self.busy)

    def _narrow_estimates(self, layer: DenseLayer, family: Sequence[Option]) -> dict[str, Timed]:
        """Return the times of a layer with fewer inputs and of those before with fewer outputs, between those measured."""
        counts = [option.ranks[0] for option in family]
        found: dict[str, Timed] = {}
        for whole, variants in (
            (layer, [layer.with_inputs(count) for count in counts]),
            *((maker, [maker.with_outputs(count) for count in counts]) for maker in layer.makers),
        ):
            known = [one for one in (*variants, side_by_side(whole)) if key_of(one, None) in self.times]
            logs = np.log([(one.params, self.milliseconds(one)) for one in known])
            for one in variants:
                key = key_of(one, None)
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
        for layer, options in as_layers(wanted):
            if key_of(layer, None) not in self.times or self.missing(layer, options):
                for together in loaded_together(layer, options, SKETCHED):
                    missing[digest_of((layer.signature, [form_of(option) for option in together]))] = layer, tuple(together)
        if sum(sketch_seconds(*job) for job in missing.values()) > seconds:
            return None
        times, groups = dict(self.times), sketch_groups(missing.values())
        for number, group in enumerate(groups):
            progress("estimating what can be reached", number / len(groups), f"{len(group)} layers")
            times |= {timed.key: timed for timed in sketched(group, settings, self.target.precision)}
        progress("estimating what can be reached", 1.0)
        return LatencyTable(self.target, times=times)

    def _as_before(self, layer: DenseLayer, measured: Sequence[Timed]) -> list[Timed]:
        """Return new times of a layer scaled to the time of the dense layer that is in the table already, if there is one.

        What was measured is how many times faster a form is than the dense layer, which other load changes less than times.
        """
        before = self.times.get(key_of(layer, None))
        if before is None:
            return list(measured)
        factor = before.milliseconds / next(timed.milliseconds for timed in measured if timed.form == DENSE)
        return [
            before if timed.form == DENSE else timed.model_copy(update={"milliseconds": timed.milliseconds * factor})
            for timed in measured
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
