"""The data sets that recipes can name, and what they tell a model before they are read."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass

from tensorrail_runtime.errors import DataError, ModelError
from tensorrail_runtime.measure.accuracy import imported
from tensorrail_trainer.data.cifar import cifar10, cifar100
from tensorrail_trainer.data.digits import digits
from tensorrail_trainer.data.files import Files as Files
from tensorrail_trainer.data.images import images, images_known
from tensorrail_trainer.data.mapped import Mapped as Mapped
from tensorrail_trainer.data.mapped import dataset_of
from tensorrail_trainer.data.shapes import moving_shapes, moving_shapes_known
from tensorrail_trainer.data.speech import speech, speech_known
from tensorrail_trainer.data.splits import Augment as Augment
from tensorrail_trainer.data.splits import Dataset as Dataset
from tensorrail_trainer.data.splits import InMemory as InMemory
from tensorrail_trainer.data.splits import Share as Share
from tensorrail_trainer.data.splits import Split as Split
from tensorrail_trainer.data.video import video, video_known

Known = Mapping[str, int]
"""What a model is told about its input and output, by the names of its arguments: channels, classes, inputs, size."""


@dataclass(frozen=True)
class Source:
    """A data set: `make` reads it, `known` says what a model must know, without reading it, from the same arguments."""

    make: Callable[..., Dataset]
    known: Callable[..., Known]


DATASETS: dict[str, Source] = {
    "cifar10": Source(cifar10, lambda **_: {"channels": 3, "classes": 10}),
    "cifar100": Source(cifar100, lambda **_: {"channels": 3, "classes": 100}),
    "digits": Source(digits, lambda **_: {"channels": 1, "classes": 10}),
    "images": Source(images, images_known),
    "moving_shapes": Source(moving_shapes, moving_shapes_known),
    "speech": Source(speech, speech_known),
    "video": Source(video, video_known),
}


def source_of(name: str) -> Source:
    """Return the data set of that name, or the one that `module:function` makes; `DataError` when there is none.

    The function returns a `Dataset`, or `(train, test, classes)` of torch's map-style data sets; nothing is known about them
    before they are read, so that a recipe says itself what its model must know.
    """
    if name in DATASETS:
        return DATASETS[name]
    if ":" not in name:
        raise DataError(f"unknown data set {name!r}; expected one of {', '.join(sorted(DATASETS))}, or module:function")
    try:
        return Source(dataset_of(imported(name, "data set"), name), lambda **_: {})
    except ModelError as error:
        raise DataError(str(error)) from None
