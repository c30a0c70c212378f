"""A recipe that trains a small network on a few images in seconds."""

from __future__ import annotations

from typing import Any


def small_recipe(**train: Any) -> dict[str, Any]:
    """Return the recipe with these settings of its training, which has batches of 32."""
    return {
        "version": 1,
        "name": "small",
        "data": {"name": "digits", "args": {"test_fraction": 0.8, "size": 16}},
        "model": {"name": "small_resnet", "args": {"widths": [8], "blocks": 1, "hidden": 16}},
        "plan": [{"layers": "stages.*.conv?", "ranks": 4}],
        "train": {"batch": 32, **train},
    }
