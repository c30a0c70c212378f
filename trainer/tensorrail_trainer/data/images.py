"""Folders of images in ImageNet's layout, read from their files as they are needed.

Training images are cut at random as Szegedy et al. (CVPR 2015) do: a window of 8 % to 100 % of the area and of an aspect of
3/4 to 4/3, drawn to the size that is asked for, mirrored half of the time. Test images are drawn to 256/224 of the size along
their shorter side and cut in the middle. Colours are standardised by ImageNet's mean and deviation, as published weights want
it.
"""

from __future__ import annotations

import math
import random
import warnings
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from tensorrail_exporter.calibrate.pictures import eight_bits
from tensorrail_runtime.errors import DataError
from tensorrail_trainer.data.files import Files, class_folders, unreadable
from tensorrail_trainer.data.splits import Dataset

SUFFIXES = frozenset({".jpg", ".jpeg", ".png", ".webp", ".bmp"})
_FORMATS = ("JPEG", "PNG", "WEBP", "BMP")  # no others are tried: some of Pillow's readers start other programs
_PIXELS = 89_478_485  # Pillow's own limit, from which on it only warns
_MEAN, _DEVIATION = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
_LAYOUT = "the layout <split>/<class>/<image>.jpg"
_LONGEST = 8  # times the shorter side
_TRIES = 10  # windows that may fall outside the image before the middle is taken


def images(root: str, size: int = 224, smallest: float = 0.08, test: str = "val", workers: int | None = None) -> Dataset:
    """Return `root/train/<class>/*` and `root/val/<class>/*` as images (3, size, size), classes by their sorted names.

    `smallest` is the least share of the area that a training window has; `test` names the folder of the test split.
    `DataError` when a folder is missing or empty, or the test split has a class that the training split lacks.
    """
    if size < 1 or not 0 < smallest <= 1:
        raise DataError(f"images: expected size ≥ 1 and smallest in (0, 1], got size={size} and smallest={smallest}")
    folder = Path(root)
    classes = class_folders(folder / "train", _LAYOUT)
    mean, deviation = (torch.tensor(values).mul(255).reshape(1, 3, 1, 1) for values in (_MEAN, _DEVIATION))
    splits = []
    for name in ("train", test):
        found = class_folders(folder / name, _LAYOUT)
        unknown = [one for one in found if one not in classes]
        if unknown:
            raise DataError(
                f"{folder / name / unknown[0]}: not one of the {len(classes)} classes of {folder / 'train'}; expected the same "
                "classes in both splits"
            )
        files = {one: _images_in(folder / name / one) for one in found}
        paths = [path for one in found for path in files[one]]
        labels = torch.tensor([classes.index(one) for one in found for _ in files[one]])
        splits.append(Files(paths, labels, ImageReader(size, smallest), mean, deviation, workers))
    counts = " and ".join(f"{len(split)} {kind}" for split, kind in zip(splits, ("training", "test images"), strict=True))
    return Dataset(f"images of {len(classes)} classes ({folder.name}), {size}×{size}; {counts}", len(classes), *splits)


def images_known(root: str, size: int = 224, **_: Any) -> Mapping[str, int]:
    """Return what a model must know of `images`, from the names of the folders."""
    return {"channels": 3, "classes": len(class_folders(Path(root) / "train", _LAYOUT)), "size": size}


@dataclass(frozen=True)
class ImageReader:
    """Reads an image file as bytes (3, size, size): a random window and mirror by a seed, or the middle without one."""

    size: int
    smallest: float

    def __call__(self, path: Path, seed: int | None) -> Tensor:
        """Return the image; `DataError` in one line for a file that is none."""
        image = decoded(path)
        if seed is None:
            image = _middle(image, self.size)
        else:
            chance = random.Random(seed)  # noqa: S311 - augmentation
            box = _window(image.width, image.height, self.smallest, chance)
            image = image.crop(box).resize((self.size, self.size), Image.Resampling.BILINEAR)
            if chance.random() < 0.5:
                image = image.transpose(Image.Transpose.FLIP_LEFT_RIGHT)
        return torch.from_numpy(np.array(image)).permute(2, 0, 1).contiguous()


def decoded(path: Path) -> Image.Image:
    """Return an image file in RGB; `DataError` when it is no image, broken, or far larger than it looks."""
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # notes about metadata that is not used
            with Image.open(path, formats=_FORMATS) as image:
                if image.width * image.height <= _PIXELS:
                    return eight_bits(image).convert("RGB")
                width, height = image.size
    except Exception as error:  # noqa: BLE001 - a broken image raises whatever its bytes say
        raise unreadable(path, error, "a JPEG, PNG, WebP or BMP image") from None
    raise DataError(f"{path}: expected at most {_PIXELS} pixels, got {width}×{height}; make the image smaller")


def _images_in(folder: Path) -> list[Path]:
    found = sorted(path for path in folder.iterdir() if path.suffix.lower() in SUFFIXES and not path.name.startswith("."))
    if not found:
        raise DataError(f"{folder}: no images found; expected files ending in {', '.join(sorted(SUFFIXES))}")
    return found


def _middle(image: Image.Image, size: int) -> Image.Image:
    """Return the middle (size, size) of the image drawn to 256/224 of the size along its shorter side."""
    longest = _LONGEST * min(image.size)
    if max(image.size) > longest:  # else drawn at up to millions of pixels of which a square is kept
        left, top = (max(0, side - longest) // 2 for side in image.size)
        image = image.crop((left, top, min(image.width, left + longest), min(image.height, top + longest)))
    short = round(size * 256 / 224)
    scale = short / min(image.size)
    width, height = (max(short, int(side * scale)) for side in image.size)
    left, top = round((width - size) / 2), round((height - size) / 2)
    return image.resize((width, height), Image.Resampling.BILINEAR).crop((left, top, left + size, top + size))


def _window(width: int, height: int, smallest: float, chance: random.Random) -> tuple[int, int, int, int]:
    """Return a random window (left, top, right, bottom) inside the image."""
    for _ in range(_TRIES):
        area = width * height * chance.uniform(smallest, 1.0)
        aspect = math.exp(chance.uniform(math.log(3 / 4), math.log(4 / 3)))
        w, h = round(math.sqrt(area * aspect)), round(math.sqrt(area / aspect))
        if 0 < w <= width and 0 < h <= height:
            left, top = chance.randint(0, width - w), chance.randint(0, height - h)
            return left, top, left + w, top + h
    w, h = min(width, round(height * 4 / 3)), min(height, round(width * 4 / 3))
    left, top = (width - w) // 2, (height - h) // 2
    return left, top, left + w, top + h
