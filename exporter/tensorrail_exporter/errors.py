"""The errors that a caller may want to tell apart. Each message says what was expected, what came and what to try."""


class PlanError(ValueError):
    """A plan, its modes, ranks or cores do not fit the layer that they name."""


class GraphError(ValueError):
    """A graph cannot be rewritten as the plan says; the message names the layer and the reason."""


class TargetError(PlanError):
    """A target that was measured to be out of reach; the message says what can be reached. No bad input: exit code 1."""

    exit_code = 1
