"""Pixels of images that Pillow has opened, for calibration and training alike."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np

if TYPE_CHECKING:
    from PIL import Image


def eight_bits(image: Image.Image) -> Image.Image:
    """Return an image of 16-bit greys in 8 bits, any other as it is; `ValueError` for pixels that have no largest value.

    Pillow's own conversion cuts such greys off at 255: nearly all of them become white.
    """
    from PIL import Image as Images

    if image.mode == "F":
        raise ValueError("expected pixels of 8 or 16 bits, got floating-point pixels")
    if image.mode != "I" and not image.mode.startswith("I;16"):
        return image
    return Images.fromarray((np.clip(np.asarray(image), 0, 65535).astype(np.uint16) >> 8).astype(np.uint8))
