"""The errors that a caller may want to tell apart. Each message says what was expected, what came and what to try."""


class PlanError(ValueError):
    """A plan, its modes, ranks or cores do not fit the layer that they name."""


class GraphError(ValueError):
    """A graph cannot be rewritten as the plan says; the message names the layer and the reason."""
