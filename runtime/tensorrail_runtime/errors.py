"""The errors that tensorrail raises on purpose, all subclasses of `TensorrailError`.

Each message has three parts: what was expected, what was found and where, and what to do next.
"""

from __future__ import annotations

import traceback
from pathlib import Path


class TensorrailError(Exception):
    """An error with a known cause: invalid input, or a target that cannot be met.

    `exit_code` is the exit code of the command line: 2 for invalid input.
    """

    exit_code = 2


class ModelError(TensorrailError, ValueError):
    """A model cannot be loaded, or cannot run with the given options or inputs."""


class MetricError(ModelError):
    """A metric of the user fails, or gives other than one finite number per sample."""


class DataError(TensorrailError, ValueError):
    """The training data of a recipe, or weights to start from, cannot be read or do not fit the network."""


class PlanError(TensorrailError, ValueError):
    """A plan, or the modes, ranks or cores in it, do not fit the layer that they name."""


class TargetError(PlanError):
    """A target cannot be met; the message says what can be reached. The input itself is valid, so the exit code is 1."""

    exit_code = 1


class GraphError(TensorrailError, ValueError):
    """A graph cannot be rewritten as the plan says; the message names the layer and gives the reason."""


class CacheError(TensorrailError, ValueError):
    """A table of layer times cannot be read or written."""


class UsageError(TensorrailError, ValueError):
    """Options of a command contradict each other, have no effect, or are not written as expected."""


class RecipeError(TensorrailError, ValueError):
    """A recipe cannot be read, or names something that does not exist."""


class NetworkError(ModelError):
    """The network of a recipe cannot be built with the given options."""


class WeightsError(DataError):
    """The weights in a file do not fit the network."""


class TrainingError(TensorrailError, RuntimeError):
    """Training cannot continue, for example because the loss is not finite."""


class CheckpointError(TensorrailError, RuntimeError):
    """A checkpoint cannot be read, or training cannot resume from it."""


def first_line(error: BaseException) -> str:
    """Return the first line of an error's message, without surrounding blanks; empty for an error without a message."""
    return str(error).strip().partition("\n")[0]


OWN_CODE: tuple[type[BaseException], ...] = (Exception, SystemExit)
"""What a function of the user may raise. `SystemExit` would otherwise end the command, with exit code 0 as if all were well."""


def in_words(error: BaseException) -> str:
    """Return what a function of the user raised, in one line: class, message, and the place where it was raised."""
    message = " ".join(str(error).split())[:200]
    what = f"{type(error).__name__}: {message}" if message else type(error).__name__
    frames = traceback.extract_tb(error.__traceback__)
    place = f" at {Path(frames[-1].filename).name}, line {frames[-1].lineno}" if len(frames) > 1 else ""
    return f"({what}){place}"
