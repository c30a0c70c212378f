"""Pixel formats of images that Pillow has opened, for calibration and training."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np

if TYPE_CHECKING:
    from PIL import Image


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
