"""The data sets that a recipe can name, and the sizes that a model needs to know of them."""

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
"""Arguments of a model that follow from the data set: `channels`, `classes`, `inputs`, `size`."""


@dataclass(frozen=True)
class Source:
    """A data set: `make` reads it; `known` returns the arguments of a model, from the same arguments, without reading it."""

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
    """Return the data set of a name.

    Args:
        name: a key of `DATASETS`, or your own function as `module:function`, which returns a `Dataset` or
            `(train, test, classes)` of torch's map-style data sets. With your own function, the recipe must give the model
            all of its arguments.

    Returns:
        The data set, not read yet.

    Raises:
        DataError: there is no such data set or function.

    """
    if name in DATASETS:
        return DATASETS[name]
    if ":" not in name:
        raise DataError(f"unknown data set {name!r}; expected one of {', '.join(sorted(DATASETS))}, or module:function")
    try:
        return Source(dataset_of(imported(name, "data set"), name), lambda **_: {})
    except ModelError as error:
        raise DataError(str(error)) from None
