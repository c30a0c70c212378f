"""What accelerate keeps private and a run needs. Tested with accelerate 1.15.0."""

from __future__ import annotations

from accelerate.state import AcceleratorState


def forget_other_precision(precision: str) -> None:
    """Reset accelerate's global state if an earlier run of this process used another precision than `precision`.

    accelerate refuses a second precision in one process otherwise.
    """
    if AcceleratorState._shared_state.get("_mixed_precision", precision) != precision:
        AcceleratorState._reset_state()
