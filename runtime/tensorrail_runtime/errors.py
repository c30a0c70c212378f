"""The errors that a caller may want to tell apart: one family, below `TensorrailError`.

Each message has three parts: what was expected, what was found and where, and what to do next.
"""

from __future__ import annotations


class TensorrailError(Exception):
    """An error that tensorrail expects: bad input, or a target that cannot be met.

    `exit_code` is what the command line ends with: 2 for bad input.
    """

    exit_code = 2


class ModelError(TensorrailError, ValueError):
    """A model cannot be loaded or run as asked."""


class DataError(TensorrailError, ValueError):
    """Data cannot be read, or do not fit the model."""


class PlanError(TensorrailError, ValueError):
    """A plan, its modes, ranks or cores do not fit the layer that they name."""


class TargetError(PlanError):
    """A target was measured to be out of reach; the message says what can be reached. This is no bad input: exit code 1."""

    exit_code = 1


class GraphError(TensorrailError, ValueError):
    """A graph cannot be rewritten as the plan says; the message names the layer and the reason."""


class RecipeError(TensorrailError, ValueError):
    """A recipe cannot be read, or asks for something that does not exist."""


class NetworkError(ModelError):
    """A network of a recipe cannot be made from the options given."""


class WeightsError(DataError):
    """Weights in a file do not fit the network."""


class TrainingError(TensorrailError, RuntimeError):
    """Training cannot go on, for example because the loss is not finite."""


class CheckpointError(TensorrailError, RuntimeError):
    """A checkpoint cannot be read or resumed from."""


def first_line(error: BaseException) -> str:
    """Return the first line of an error's message, without surrounding blanks; empty for an error without a message."""
    return str(error).strip().partition("\n")[0]
