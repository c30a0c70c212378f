"""Images as inputs: their pixel formats, size and scale."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from tensorrail_runtime.errors import ModelError, first_line

if TYPE_CHECKING:
    from PIL import Image


SUFFIXES = frozenset({".jpg", ".jpeg", ".png", ".webp", ".bmp", ".tif", ".tiff", ".gif", ".ppm", ".pgm"})
FORMATS = ("JPEG", "PNG", "WEBP", "BMP", "TIFF", "GIF", "PPM")  # the only ones: some of Pillow's readers start other programs

_MOST_PIXELS = 2**26  # of a resized image
_ORIENTATION = 0x0112  # the EXIF tag of how a camera was held


def upright(image: Image.Image) -> Image.Image:
    """Return an image turned as its EXIF orientation says: cameras and phones store most images as their sensor lies."""
    from PIL.Image import Transpose

    image.load()  # Pillow turns TIFF images here by itself, and reads what follows the pixels of a PNG image
    try:
        orientation = image.getexif().get(_ORIENTATION)
    except Exception:  # noqa: BLE001 - broken metadata can raise any exception; the pixels are read all the same
        return image
    turns = {
        2: Transpose.FLIP_LEFT_RIGHT,
        3: Transpose.ROTATE_180,
        4: Transpose.FLIP_TOP_BOTTOM,
        5: Transpose.TRANSPOSE,
        6: Transpose.ROTATE_270,
        7: Transpose.TRANSVERSE,
        8: Transpose.ROTATE_90,
    }
    return image.transpose(turns[orientation]) if orientation in turns else image


def eight_bits(image: Image.Image) -> Image.Image:
    """Return an image of 16-bit grey values converted to 8 bits, and any other image unchanged.

    Pillow's own conversion clips such values at 255, so that nearly all of them become white.

    Raises:
        ValueError: the pixels are floating-point numbers, which have no largest value.

    """
    from PIL import Image as Images

    if image.mode == "F":
        raise ValueError("expected pixels of 8 or 16 bits, got floating-point pixels")
    if image.mode != "I" and not image.mode.startswith("I;16"):
        return image
    return Images.fromarray((np.clip(np.asarray(image), 0, 65535).astype(np.uint16) >> 8).astype(np.uint8))


@dataclass(frozen=True)
class Preprocessing:
    """How an image becomes an input: resized, cropped at its centre, scaled as (x / 255 − mean) / std.

    The defaults are those of ImageNet models.

    Attributes:
        mean: mean of every channel, for values between 0 and 1.
        std: standard deviation of every channel, for values between 0 and 1.
        resize: length of the image's shorter side in pixels before the crop; 0, the default, is 256/224 of the input's.

    """

    mean: tuple[float, ...] = (0.485, 0.456, 0.406)
    std: tuple[float, ...] = (0.229, 0.224, 0.225)
    resize: int = 0


def picture(path: Path, shape: Sequence[int], how: Preprocessing) -> np.ndarray:
    """Return the image of a file as an input (channels, height, width); `ModelError` if it cannot be read."""
    from PIL import Image

    channels, height, width = shape
    try:
        with Image.open(path, formats=FORMATS) as opened:
            image = eight_bits(upright(opened)).convert("RGB" if channels == 3 else "L")
    except (OSError, SyntaxError, ValueError, EOFError, MemoryError, Image.DecompressionBombError) as error:  # all of Pillow's
        raise ModelError(f"{path}: not a readable image ({first_line(error)})") from None
    short = how.resize or round(min(height, width) * 256 / 224)
    scale = short / min(image.size)
    size = (max(width, round(image.width * scale)), max(height, round(image.height * scale)))
    if size[0] * size[1] > _MOST_PIXELS:  # a few hundred bytes of a long, narrow image could ask for gigabytes
        raise ModelError(
            f"{path}: resized to {short} pixels along its shorter side, this image of {image.width}×{image.height} would have "
            f"{size[0]}×{size[1]}: crop it, or leave it out"
        )
    image = image.resize(size, Image.Resampling.BILINEAR)
    left, top = (image.width - width) // 2, (image.height - height) // 2
    values = np.asarray(image.crop((left, top, left + width, top + height)), np.float32).reshape(height, width, channels) / 255
    mean, std = (np.resize(np.array(values_of, np.float32), channels) for values_of in (how.mean, how.std))
    return np.ascontiguousarray(((values - mean) / std).transpose(2, 0, 1))
