"""Your own data set: a function `module:function` that returns torch's map-style data sets, or a `Dataset`.

    def load(root: str):
        return train, test, 10

`train[i]` is a tensor and a label. The number of classes can also be an attribute `classes` of `train`, a number or a list of
names, as in torchvision's data sets, instead of the third entry.
"""

from __future__ import annotations

import functools
import random
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch
from torch import Tensor

from tensorrail_runtime.errors import OWN_CODE, DataError, in_words
from tensorrail_trainer.data.loading import ALONE, CPU, loaded, used_gpus, workers_of
from tensorrail_trainer.data.splits import Augment, Dataset, Share, tensor_of


@dataclass(frozen=True)
class Mapped:
    """A split made of a torch map-style data set, whose entries are values (…) and an integer label.

    The generators of torch, NumPy and Python are seeded for each sample by its index and the seed of the batches; without
    augmentation by its index and 0, since the data set cannot be told not to augment.
    """

    data: Any
    classes: int
    workers: int | None = 0
    device: torch.device = CPU

    def __post_init__(self) -> None:
        try:
            usable = hasattr(self.data, "__getitem__") and hasattr(self.data, "__len__") and len(self.data) > 0
        except OWN_CODE as error:
            raise DataError(f"{type(self.data).__name__}: its number of samples cannot be read {in_words(error)}") from None
        if not usable:
            raise DataError(f"expected a data set with samples, __getitem__ and __len__, got a {type(self.data).__name__}")
        workers_of(self.workers)

    def __len__(self) -> int:
        """Return the number of samples."""
        return len(self.data)

    def batches(
        self, picks: Sequence[Tensor], share: Share = ALONE, augment: Augment | None = None, seed: int = 0
    ) -> Iterator[tuple[Tensor, Tensor]]:
        """Yield samples and labels. Raises `DataError` for a sample that is not a tensor with a label from 0 to classes − 1."""
        own = 0 if augment is None else seed
        for x, y in loaded(self.sample, picks, share, own, workers_of(self.workers), self.device):
            yield x.float(), y

    def to(self, device: torch.device) -> Mapped:
        """Return the same split with batches on a device."""
        return replace(self, device=device)

    def sample(self, index: int, seed: int | None) -> tuple[Tensor, int]:
        """Return one sample and its label, read with seeded generators."""
        where = f"sample {index} of {type(self.data).__name__}"
        try:
            values = _seeded(lambda: self.data[index], 0 if seed is None else seed)
            x, label = values
        except OWN_CODE as error:
            raise DataError(f"{where}: cannot be read {in_words(error)}") from None
        if isinstance(x, np.ndarray):
            try:
                x = tensor_of(x)
            except (TypeError, ValueError) as error:
                raise DataError(f"{where}: not an array of numbers ({error})") from None
        if not isinstance(x, Tensor):
            raise DataError(
                f"{where}: expected a tensor, got a {type(x).__name__}; give the data set a transform that returns a tensor"
            )
        if isinstance(label, Tensor | np.ndarray) and label.shape in ((), (1,)):
            label = label.item()
        if isinstance(label, bool) or not isinstance(label, int | np.integer):
            raise DataError(f"{where}: expected an integer label, got {label!r:.40}")
        if not 0 <= label < self.classes:
            raise DataError(f"{where}: expected a label from 0 to {self.classes - 1} ({self.classes} classes), got {label}")
        return x, int(label)


def dataset_of(function: Callable[..., Any], name: str) -> Callable[..., Dataset]:
    """Return a function with the same arguments that converts the result of `function` into a `Dataset`."""

    @functools.wraps(function)
    def make(*args: Any, **kwargs: Any) -> Dataset:
        result = function(*args, **kwargs)
        if isinstance(result, Dataset):
            return result
        if not isinstance(result, tuple | list) or len(result) not in (2, 3):
            raise DataError(
                f"{name}: expected it to return a Dataset, (train, test) or (train, test, classes), got {type(result).__name__}"
            )
        classes = result[2] if len(result) == 3 else getattr(result[0], "classes", None)
        if isinstance(classes, Sequence) and not isinstance(classes, str):
            classes = len(classes)
        if isinstance(classes, bool) or not isinstance(classes, int | np.integer) or classes < 1:
            raise DataError(
                f"{name}: expected the number of classes, or a list of them, as the third entry of the result or as the "
                f"attribute `classes` of the training data, got {classes!r:.40}"
            )
        classes = int(classes)
        train, test = (Mapped(data, classes) for data in result[:2])
        return Dataset(f"{name}, {len(train)} training and {len(test)} test samples", classes, train, test)

    return make


def _seeded(call: Callable[[], Any], seed: int) -> Any:
    """Return the result of a call with all generators seeded, and restore their states."""
    states = random.getstate(), np.random.get_state()  # noqa: NPY002 - a user's code may use it
    with torch.random.fork_rng(devices=used_gpus()):
        torch.manual_seed(seed)
        random.seed(seed)
        np.random.seed(seed)  # noqa: NPY002
        try:
            return call()
        finally:
            random.setstate(states[0])
            np.random.set_state(states[1])  # noqa: NPY002
