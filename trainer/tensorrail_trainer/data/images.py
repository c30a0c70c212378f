"""Folders of images in the layout of ImageNet, read from their files when they are needed.

Training images are random crops as in Szegedy et al. (CVPR 2015), with 8 % to 100 % of the area and an aspect ratio of 3/4 to
4/3, resized to `size` and mirrored with probability 0.5. Test images are resized so that the shorter side is 256/224 · `size`,
and cropped in the centre. Colours are standardized by ImageNet's mean and deviation, as published weights expect. Images are
turned as their EXIF orientation says; of an animation the first frame is read.
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

from tensorrail_runtime.errors import DataError
from tensorrail_runtime.feeds.folders import Listing, left_out
from tensorrail_runtime.feeds.pictures import FORMATS, SUFFIXES, eight_bits, upright
from tensorrail_trainer.data.files import Files, class_folders, files_below, loose_files, unreadable
from tensorrail_trainer.data.splits import Dataset

_PIXELS = 89_478_485  # Pillow's limit, above which Pillow only warns
_MEAN, _DEVIATION = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
_LAYOUT = "the layout <split>/<class>/<image>.jpg"
_LONGEST = 8  # the longest side of a test image, in units of its shorter side
_TRIES = 10  # random windows, before the centre of the image is used


def images(root: str, size: int = 224, smallest: float = 0.08, test: str = "val", workers: int | None = None) -> Dataset:
    """Return the images of `root/train/<class>/*` and `root/val/<class>/*`; the classes are in the order of their names.

    Images in subfolders of a class belong to it. Files of other kinds are left out, and named in `Dataset.left_out`.

    Args:
        root: the folder of both splits.
        size: height and width of the images in pixels; default 224.
        smallest: the smallest share of the area of a random crop, in (0, 1]; default 0.08.
        test: the name of the folder of the test split; default `val`.
        workers: the number of processes that read files; default one per core, at most four.

    Returns:
        Images (N, 3, size, size).

    Raises:
        DataError: a folder is missing or empty, or the test split has a class that the training split does not have.

    """
    if size < 1 or not 0 < smallest <= 1:
        raise DataError(f"images: expected size ≥ 1 and smallest in (0, 1], got size={size} and smallest={smallest}")
    folder = Path(root)
    classes = class_folders(folder / "train", _LAYOUT)
    mean, deviation = (torch.tensor(values).mul(255).reshape(1, 3, 1, 1) for values in (_MEAN, _DEVIATION))
    splits, notes = [], []
    for name in ("train", test):
        split_classes = class_folders(folder / name, _LAYOUT)
        unknown = [class_name for class_name in split_classes if class_name not in classes]
        if unknown:
            raise DataError(
                f"{folder / name / unknown[0]}: not one of the {len(classes)} classes of {folder / 'train'}; expected the same "
                "classes in both splits"
            )
        others = loose_files(folder / name)
        files = {}
        for class_name in split_classes:
            listing = _images_in(folder / name / class_name)
            files[class_name] = listing.files
            others += listing.others
        notes.append(left_out(folder / name, others, f"images in folders of classes ({', '.join(sorted(SUFFIXES))})"))
        paths = [path for class_name in split_classes for path in files[class_name]]
        numbers = {class_name: number for number, class_name in enumerate(classes)}
        labels = torch.tensor([numbers[class_name] for class_name in split_classes for _ in files[class_name]])
        splits.append(Files(paths, labels, ImageReader(size, smallest), mean, deviation, workers))
    counts = " and ".join(f"{len(split)} {kind}" for split, kind in zip(splits, ("training", "test images"), strict=True))
    source = f"images of {len(classes)} classes ({folder.name}), {size}×{size}; {counts}"
    return Dataset(source, len(classes), *splits, left_out=tuple(note for note in notes if note))


def images_known(root: str, size: int = 224, **_: Any) -> Mapping[str, int]:
    """Return the arguments of a model for `images`, from the names of the folders."""
    return {"channels": 3, "classes": len(class_folders(Path(root) / "train", _LAYOUT)), "size": size}


@dataclass(frozen=True)
class ImageReader:
    """Reads an image file as uint8 (3, size, size): with a seed a random crop, perhaps mirrored; otherwise the centre."""

    size: int
    smallest: float

    def __call__(self, path: Path, seed: int | None) -> Tensor:
        """Return the image. Raises `DataError` if the file is not an image."""
        image = decoded(path)
        if seed is None:
            image = _middle(image, self.size)
        else:
            generator = random.Random(seed)  # noqa: S311 - augmentation
            box = _window(image.width, image.height, self.smallest, generator)
            image = image.crop(box).resize((self.size, self.size), Image.Resampling.BILINEAR)
            if generator.random() < 0.5:
                image = image.transpose(Image.Transpose.FLIP_LEFT_RIGHT)
        return torch.from_numpy(np.array(image)).permute(2, 0, 1).contiguous()


def decoded(path: Path) -> Image.Image:
    """Return an image file in RGB. Raises `DataError` if it is not an image, broken, or too large when decoded."""
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # warnings about metadata that is not used
            with Image.open(path, formats=FORMATS) as image:
                if image.width * image.height <= _PIXELS:
                    return eight_bits(upright(image)).convert("RGB")
                width, height = image.size
    except Exception as error:  # noqa: BLE001 - a broken image can raise any exception
        raise unreadable(path, error, "a JPEG, PNG, WebP, BMP, TIFF, GIF or PPM image") from None
    raise DataError(f"{path}: expected at most {_PIXELS} pixels, got {width}×{height}; make the image smaller")


def _images_in(folder: Path) -> Listing:
    listing = files_below(folder, SUFFIXES, _LAYOUT)
    if not listing.files:
        found = f"; found {len(listing.others)} other files, such as {listing.others[0].name}" if listing.others else ""
        raise DataError(f"{folder}: no images found; expected files ending in {', '.join(sorted(SUFFIXES))}{found}")
    return listing


def _middle(image: Image.Image, size: int) -> Image.Image:
    """Resize an image so that its shorter side is 256/224 · size, and return its centre (size, size)."""
    longest = _LONGEST * min(image.size)
    if max(image.size) > longest:  # otherwise millions of pixels might be resized, of which only a square is used
        left, top = (max(0, side - longest) // 2 for side in image.size)
        image = image.crop((left, top, min(image.width, left + longest), min(image.height, top + longest)))
    short = round(size * 256 / 224)
    scale = short / min(image.size)
    width, height = (max(short, int(side * scale)) for side in image.size)
    left, top = round((width - size) / 2), round((height - size) / 2)
    return image.resize((width, height), Image.Resampling.BILINEAR).crop((left, top, left + size, top + size))


def _window(width: int, height: int, smallest: float, generator: random.Random) -> tuple[int, int, int, int]:
    """Return a random window (left, top, right, bottom) inside the image."""
    for _ in range(_TRIES):
        area = width * height * generator.uniform(smallest, 1.0)
        aspect = math.exp(generator.uniform(math.log(3 / 4), math.log(4 / 3)))
        w, h = round(math.sqrt(area * aspect)), round(math.sqrt(area / aspect))
        if 0 < w <= width and 0 < h <= height:
            left, top = generator.randint(0, width - w), generator.randint(0, height - h)
            return left, top, left + w, top + h
    w, h = min(width, round(height * 4 / 3)), min(height, round(width * 4 / 3))
    left, top = (width - w) // 2, (height - h) // 2
    return left, top, left + w, top + h
