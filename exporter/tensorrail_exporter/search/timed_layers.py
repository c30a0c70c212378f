"""What is timed: a layer, dense, in a form or with fewer channels, and the key by which its time is stored."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace

from pydantic import Field

from tensorrail_exporter.formats import WIDTH
from tensorrail_exporter.rewrite.survey import DenseLayer
from tensorrail_exporter.search.options import Option
from tensorrail_runtime.records import Record

DENSE = "dense"  # the form of a layer that is not factorized

_VERSION = 2


class Timed(Record):
    """The time of one layer in one form: what one node adds to the latency of a network, at the layer's batch size."""

    key: str
    layer: str  # in words
    form: str
    milliseconds: float = Field(gt=0, allow_inf_nan=False)


def makers_of(layer: DenseLayer, option: Option) -> tuple[DenseLayer, ...]:
    """Return the layers before a layer that compute fewer channels with an option."""
    return layer.makers if option.format == WIDTH else ()


def as_layers(
    wanted: Mapping[DenseLayer, Sequence[Option]],
) -> Iterator[tuple[DenseLayer, Sequence[Option]]]:
    """Yield the layers with their options; an option that reads fewer channels is timed as dense layers, see `_parts`."""
    for layer, options in wanted.items():
        narrow = [option for option in options if makers_of(layer, option)]
        yield layer, [option for option in options if option not in narrow]
        for option in narrow:
            yield from ((part, ()) for part in _parts(layer, option))


def without_narrow(wanted: Mapping[DenseLayer, Sequence[Option]]) -> Iterator[tuple[DenseLayer, Sequence[Option]]]:
    """Yield the layers and the makers of narrower ones, with the options that are forms of one layer."""
    for layer, options in wanted.items():
        narrow = [option for option in options if makers_of(layer, option)]
        yield layer, [option for option in options if option not in narrow]
        yield from ((maker, ()) for maker in (layer.makers if narrow else ()))


def narrow_pairs(layer: DenseLayer, option: Option) -> Iterator[tuple[DenseLayer, DenseLayer]]:
    """Yield the layers that an option makes narrower, each as it is timed whole, and with fewer channels."""
    if makers_of(layer, option):
        yield side_by_side(layer), layer.with_inputs(option.ranks[0])
        yield from ((side_by_side(maker), maker.with_outputs(option.ranks[0])) for maker in layer.makers)


def _parts(layer: DenseLayer, option: Option) -> list[DenseLayer]:
    """Return what an option that reads fewer channels is timed as: its layer and those before it, whole and with fewer."""
    (count,) = option.ranks
    before = [part for maker in layer.makers for part in (maker, side_by_side(maker), maker.with_outputs(count))]
    return [layer, side_by_side(layer), layer.with_inputs(count), *before]


def side_by_side(layer: DenseLayer) -> DenseLayer:
    """Return a layer that is timed as its narrower variants are, whose copies cannot form a chain."""
    return replace(layer, side_by_side=True, makers=()) if layer.source == layer.output else layer


def keys_of(layer: DenseLayer, option: Option) -> list[str]:
    """Return the keys of all times that an option needs."""
    if makers_of(layer, option):
        return [key_of(part, None) for part in _parts(layer, option)]
    return [key_of(layer, option)]


def form_of(option: Option) -> str:
    """Return what runs, in words; equal forms take equal time."""
    padded = f", ranks padded to {option.block}" if option.block > 1 else ""
    chain = f", modes {option.modes} {option.merge}" if len(option.modes) > 3 else ""  # the steps do not show folded axes
    return option.steps + padded + chain


def key_of(layer: DenseLayer, option: Option | None) -> str:
    """Return the key of the time of a layer, dense or with an option.

    The form, not the format, is part of it: equal steps of two formats are measured once.
    """
    form = DENSE if option is None else form_of(option)
    return digest_of({"version": _VERSION, "layer": layer.signature, "form": form})


def digest_of(value: object) -> str:
    """Return a short text that differs for any two values that JSON can hold."""
    return hashlib.sha256(json.dumps(value, sort_keys=True, default=str).encode()).hexdigest()[:24]
