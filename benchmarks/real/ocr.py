"""Text recognition, detection and direction (PP-OCRv4), on words that are rendered."""

from __future__ import annotations

import ast
import sysconfig
from functools import cache
from pathlib import Path
from typing import Any

import matplotlib
import numpy as np
from PIL import Image, ImageDraw, ImageFilter, ImageFont

from real.network import Arrays, Data, Network, Packages, count_of, first, from_wheel

PACKAGE = "rapidocr-onnxruntime==1.4.4"
_FOLDER = "rapidocr_onnxruntime/models"
_HEIGHT, _WIDTH, _SIDE = 48, 320, 320
_FONTS = ("DejaVuSans*.ttf", "DejaVuSerif*.ttf", "STIXGeneral*.ttf")
_TEXT = 0.3  # probability from which a pixel counts as text


def recognition(packages: Packages, share: float) -> Data:
    """Lines of one to three words, 3×48×320, and the strings themselves."""
    lines = [lines_of_text(seed, count_of(count, share)) for seed, count in ((1, 256), (2, 240))]
    calibration, aside = (np.stack([pixels(line(text, seed)) for seed, text in enumerate(part)]) for part in lines)
    return Data({"x": calibration}, {"x": aside}, (lines[1], characters(packages(PACKAGE))))


def direction(packages: Packages, share: float) -> Data:
    """The same lines at 3×48×192, half of them upside down."""
    parts = []
    for seed, count in ((3, 256), (4, 240)):
        texts = lines_of_text(seed, count_of(count, share), words=2)
        images = [line(text, number, 192) for number, text in enumerate(texts)]
        turned = [image.rotate(180 * (number % 2)) for number, image in enumerate(images)]
        parts.append(np.stack([pixels(image) for image in turned]))
    return Data({"x": parts[0]}, {"x": parts[1]}, np.arange(len(parts[1])) % 2)


def detection(packages: Packages, share: float) -> Data:
    """Pages of 3×320×320 with text at any place."""
    calibration, aside = (
        np.stack([pixels(page(2 * (1000 * seed + number) + seed % 2)) for number in range(count_of(count, share))])
        for seed, count in ((5, 64), (6, 64))
    )
    return Data({"x": calibration}, {"x": aside})


def strings_read(outputs: Arrays, dense: Arrays, truth: tuple[list[str], list[str]]) -> float:
    """Share of the strings that are read without any error; spaces around them do not count."""
    texts, letters = truth
    read = decoded(first(outputs), letters)
    return float(np.mean([a.strip() == b for a, b in zip(read, texts, strict=True)]))


def right_direction(outputs: Arrays, dense: Arrays, truth: np.ndarray) -> float:
    """Share of the lines whose direction is found."""
    return float(np.mean(first(outputs).argmax(-1) == truth))


def pixels_of_text(outputs: Arrays, dense: Arrays, truth: Any) -> float:
    """Intersection over union of the pixels that hold text, with those that the dense model finds."""
    found, expected = first(outputs) > _TEXT, first(dense) > _TEXT
    return float((found & expected).sum() / max(1, (found | expected).sum()))


def decoded(scores: np.ndarray, letters: list[str]) -> list[str]:
    """Return the strings of scores (N, T, classes): best class, repetitions and blanks (class 0) removed."""
    best = scores.argmax(-1)
    kept = (best != 0) & np.concatenate([np.ones_like(best[:, :1], bool), best[:, 1:] != best[:, :-1]], 1)
    return ["".join(letters[k] for k in row[keep]) for row, keep in zip(best, kept, strict=True)]


def characters(package: Path) -> list[str]:
    """Return the character of every class; the model file holds them."""
    import onnx

    model = onnx.load(package / _FOLDER / "ch_PP-OCRv4_rec_infer.onnx")
    listed = next(prop.value for prop in model.metadata_props if prop.key == "character")
    return ["", *listed.splitlines(), " "]


def lines_of_text(seed: int, count: int, words: int = 3) -> list[str]:
    """Return lines of one to `words` words of the standard library's docstrings; even seeds use other words than odd ones."""
    random = np.random.default_rng(seed)
    known = _words()[seed % 2 :: 2]
    return [" ".join(random.choice(known, random.integers(1, words + 1)))[:24].strip() for _ in range(count)]


@cache
def _words() -> tuple[str, ...]:
    return tuple(sorted({word for text in docstrings() for word in text.split() if word.isascii() and 2 < len(word) < 12}))


@cache
def docstrings() -> tuple[str, ...]:
    """Return the docstrings of the modules and functions of Python's standard library."""
    found = []
    for path in sorted(Path(sysconfig.get_paths()["stdlib"]).glob("*.py")):
        for node in ast.walk(ast.parse(path.read_bytes())):
            if isinstance(node, ast.Module | ast.FunctionDef | ast.ClassDef) and (text := ast.get_docstring(node)):
                found.append(text)
    return tuple(found)


def line(text: str, seed: int, width: int = _WIDTH) -> Image.Image:
    """Return an image of one line of text, 48 pixels high: dark on light or light on dark, a little blurred and noisy."""
    random = np.random.default_rng([seed, len(text)])
    ink, paper = _colours(random)
    size = int(random.integers(26, 36))
    while (font := _font(random, size)).getlength(text) > width - 16 and size > 10:
        size -= 2
    image = Image.new("RGB", (width, _HEIGHT), paper)
    top = (_HEIGHT - size) // 2 - size // 8
    ImageDraw.Draw(image).text((int(random.integers(4, 12)), top), text, ink, font)
    return _worn(image, random)


def page(seed: int) -> Image.Image:
    """Return an image of 320×320 pixels with two to six lines of text."""
    random = np.random.default_rng(seed)
    ink, paper = _colours(random)
    image = Image.new("RGB", (_SIDE, _SIDE), paper)
    draw = ImageDraw.Draw(image)
    for _ in range(random.integers(0, 4)):  # not text
        x, y, w, h = (int(v) for v in random.integers(0, 160, 4))
        draw.rectangle((x + 80, y + 80, x + 80 + w, y + 80 + h), outline=tuple(int(v) for v in random.integers(0, 256, 3)))
    y = int(random.integers(8, 40))
    for text in lines_of_text(seed, int(random.integers(2, 7))):
        size = int(random.integers(14, 30))
        if y + size > _SIDE - 8:
            break
        draw.text((int(random.integers(4, 60)), y), text, ink, _font(random, size))
        y += size + int(random.integers(6, 40))
    return _worn(image, random)


def pixels(image: Image.Image) -> np.ndarray:
    """Return an image as (3, height, width) from −1 to 1, blue first."""
    return np.ascontiguousarray((np.asarray(image, np.float32)[:, :, ::-1] / 127.5 - 1).transpose(2, 0, 1))


def _colours(random: np.random.Generator) -> tuple[tuple[int, ...], tuple[int, ...]]:
    dark, light = (tuple(int(v) for v in random.integers(*bounds, 3)) for bounds in ((0, 90), (170, 256)))
    return (dark, light) if random.random() < 0.8 else (light, dark)


def _font(random: np.random.Generator, size: int) -> ImageFont.FreeTypeFont:
    files = _fonts()
    return ImageFont.truetype(files[int(random.integers(len(files)))], size)


@cache
def _fonts() -> tuple[Path, ...]:
    folder = Path(matplotlib.get_data_path()) / "fonts" / "ttf"
    return tuple(sorted(path for pattern in _FONTS for path in folder.glob(pattern) if "Display" not in path.name))


def _worn(image: Image.Image, random: np.random.Generator) -> Image.Image:
    blurred = image.filter(ImageFilter.GaussianBlur(float(random.uniform(0, 0.8))))
    values = np.asarray(blurred, np.float32) + random.normal(0, random.uniform(0, 8), (*blurred.size[::-1], 3))
    return Image.fromarray(values.clip(0, 255).astype(np.uint8))


NETWORKS = {
    "PP-OCRv4 recognition": Network(
        PACKAGE,
        from_wheel(f"{_FOLDER}/ch_PP-OCRv4_rec_infer.onnx"),
        recognition,
        strings_read,
        "strings read without error",
        "rendered words",
        {"x": (1, 3, _HEIGHT, _WIDTH)},
    ),
    "PP-OCRv4 detection": Network(
        PACKAGE,
        from_wheel(f"{_FOLDER}/ch_PP-OCRv4_det_infer.onnx"),
        detection,
        pixels_of_text,
        "pixels of text, IoU with dense",
        "rendered pages",
        {"x": (1, 3, _SIDE, _SIDE)},
    ),
    "PP-OCR direction": Network(
        PACKAGE,
        from_wheel(f"{_FOLDER}/ch_ppocr_mobile_v2.0_cls_infer.onnx"),
        direction,
        right_direction,
        "directions found",
        "rendered words",
        {"x": (1, 3, _HEIGHT, 192)},
    ),
}
