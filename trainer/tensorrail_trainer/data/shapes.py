"""Generated videos with the sizes of UCF11: a moving shape; the class is the kind of the shape and of its motion.

Every motion is periodic and starts at a random point of its period. A single frame, or all frames without their order, do not
show the direction of a rotation: a clip played backwards belongs to the opposite class. Colours, positions, sizes, speeds,
background and noise are random and independent of the class.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import torch

from tensorrail_runtime.errors import DataError
from tensorrail_trainer.data.splits import Dataset, InMemory

SHAPES = ("disc", "ring", "cross", "bar")
MOTIONS = ("clockwise", "counterclockwise", "across", "upright", "pulsing", "resting")


def moving_shapes(
    seed: int,
    samples: int = 600,
    test_samples: int = 300,
    frames: int = 6,
    size: Sequence[int] = (120, 160),
    classes: int = 11,
    noise: float = 0.1,
) -> Dataset:
    """Generate clips as sequences of flattened images. Class c is shape c mod 4 with motion c div 4.

    Args:
        seed: the seed; it determines all clips.
        samples: the number of training clips; default 600.
        test_samples: the number of test clips, from the same distribution; default 300.
        frames: the number of frames per clip; default 6.
        size: height and width in pixels; default (120, 160).
        classes: the number of classes, 2 to 24; default 11.
        noise: the standard deviation of the noise, for values from 0 to 1; default 0.1.

    Returns:
        Clips (N, frames, height · width · 3), stored as uint8 and standardized in each batch.

    Raises:
        DataError: an argument is out of range.

    """
    height, width = _sizes(size, frames, classes)
    if min(samples, test_samples) < classes or not 0 <= noise < 1:
        raise DataError(
            f"moving_shapes: expected samples and test_samples ≥ {classes} (one per class) and noise in [0, 1), got "
            f"samples={samples}, test_samples={test_samples}, noise={noise}"
        )
    splits = []
    counts = np.zeros((2, 256), np.int64)  # histogram of the bytes of each split
    for split, count in enumerate((samples, test_samples)):
        generator = np.random.default_rng((seed, split))
        labels = generator.permutation(np.arange(count) % classes)
        clips = np.empty((count, frames, height * width * 3), np.uint8)
        for k, label in enumerate(labels):
            clips[k] = _clip(int(label), frames, height, width, noise, generator).reshape(frames, -1)
            counts[split] += np.bincount(clips[k].ravel(), minlength=256)
        splits.append((torch.from_numpy(clips), torch.from_numpy(labels)))
    values, shares = np.arange(256), counts[0] / counts[0].sum()
    mean = shares @ values
    statistics = [torch.tensor(value, dtype=torch.float32) for value in (mean, np.sqrt(shares @ values**2 - mean**2))]
    source = f"generated: {frames} frames of {width}×{height} of moving shapes, seed {seed}; {samples} training"
    return Dataset(f"{source} and {test_samples} test clips", classes, *(InMemory(x, y, *statistics) for x, y in splits))


def moving_shapes_known(size: Sequence[int] = (120, 160), classes: int = 11, **_: Any) -> Mapping[str, int]:
    """Return the arguments of a model for `moving_shapes`."""
    height, width = _sizes(size, 1, classes)
    return {"inputs": 3 * height * width, "classes": classes}


def _sizes(size: Sequence[int], frames: int, classes: int) -> tuple[int, int]:
    most = len(SHAPES) * len(MOTIONS)
    if len(size) != 2 or min(size) < 8 or frames < 1 or not 2 <= classes <= most:
        raise DataError(
            f"moving_shapes: expected size [height, width] of 8 or more, 1 or more frames and 2 to {most} classes, got "
            f"size={list(size)}, frames={frames}, classes={classes}"
        )
    return size[0], size[1]


def _clip(label: int, frames: int, height: int, width: int, noise: float, generator: np.random.Generator) -> np.ndarray:
    """Return one clip (frames, height, width, 3), uint8."""
    shape, motion = SHAPES[label % len(SHAPES)], MOTIONS[label // len(SHAPES)]
    turns = generator.uniform() + np.linspace(0, generator.uniform(0.5, 0.9), frames)  # half to nine tenths of a period
    # The reach is relative to the image, the radius to its height.
    reach, radius = generator.uniform(0.2, 0.3), generator.uniform(0.2, 0.28)
    x, y = generator.uniform(-0.06, 0.06, 2)
    background, colour = generator.uniform(0.05, 0.4, 3), generator.uniform(0.6, 0.95, 3)
    cosine, sine, none = np.cos(2 * np.pi * turns), np.sin(2 * np.pi * turns), np.zeros(frames)
    right, down, larger = {
        "clockwise": (cosine, sine, none),
        "counterclockwise": (cosine, -sine, none),
        "across": (cosine, none, none),
        "upright": (none, sine, none),
        "pulsing": (none, none, cosine),
        "resting": (none, none, none),
    }[motion]
    columns, rows = (np.arange(width) + 0.5) / width - 0.5, (np.arange(height) + 0.5) / height - 0.5
    radii = radius * (1 + 0.4 * larger)[:, None, None]
    dx = np.abs(columns - (x + reach * right)[:, None])[:, None, :] * width / height / radii  # (frames, 1, W), in radii
    dy = np.abs(rows - (y + reach * down)[:, None])[:, :, None] / radii  # (frames, H, 1)
    clip = np.where(_inside(shape, dx, dy)[..., None], colour, background).astype(np.float32)
    clip += np.float32(noise) * generator.standard_normal(clip.shape, dtype=np.float32)
    return np.asarray((clip.clip(0, 1) * 255).astype(np.uint8))


def _inside(shape: str, dx: np.ndarray, dy: np.ndarray) -> np.ndarray:
    """Return the mask of the shape, (frames, H, W), from the distances to its centre in units of its radius."""
    inside: np.ndarray
    match shape:
        case "disc":
            inside = dx**2 + dy**2 < 1
        case "ring":
            inside = np.abs(dx**2 + dy**2 - 1) < 0.4
        case "cross":
            inside = (np.minimum(dx, dy) < 0.25) & (np.maximum(dx, dy) < 1)
        case _:
            inside = (dx < 1.3) & (dy < 0.35)
    return inside
