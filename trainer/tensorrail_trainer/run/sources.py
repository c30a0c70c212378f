"""The files that a run starts from: weights and plans that its recipe names.

A recipe holds their paths, and another run may have written other weights to the same path. A run therefore keeps their
checksums, and is not resumed with files that have changed.
"""

from __future__ import annotations

import hashlib
from pathlib import Path
from typing import Literal

from pydantic import ValidationError

from tensorrail_runtime.errors import CheckpointError, RecipeError
from tensorrail_runtime.records import Record, first_problem
from tensorrail_trainer.recipes.recipe import Recipe


class Sources(Record):
    """The files that a recipe names, as they are at one time.

    Attributes:
        version: the version of the file format, 1.
        sha256: the SHA-256 of each file, by its key in the recipe, such as `model.weights`.

    """

    version: Literal[1] = 1
    sha256: dict[str, str]

    @classmethod
    def of(cls, recipe: Recipe) -> Sources:
        """Return the checksums of the files that a recipe names. Raises `RecipeError` for a file that cannot be read."""
        return cls(sha256={key: _sha256(key, Path(name)) for key, name in recipe.files()})

    def require_same(self, recipe: Recipe, kept: Path) -> None:
        """Raise an error if the files are others than when the run of this recipe started.

        Args:
            recipe: the recipe that names them.
            kept: the file of the run's own `Sources`. Runs of earlier versions have none, and nothing is compared then.

        Raises:
            RecipeError: a file has changed.
            CheckpointError: `kept` is damaged.

        """
        if not kept.exists():
            return
        try:
            before = Sources.model_validate_json(kept.read_bytes()).sha256
        except ValidationError as error:
            raise CheckpointError(f"{kept}: {first_problem(error)}; delete it if no file of the recipe has changed") from None
        for key, name in recipe.files():
            if before.get(key) != self.sha256[key]:
                raise RecipeError(
                    f"{key}: {name} is not the file that the run in {kept.parent.parent} started from: its content has "
                    "changed; restore it, give the run another name, or overwrite this run to start again"
                )


def _sha256(key: str, path: Path) -> str:
    try:
        with path.open("rb") as file:
            return hashlib.file_digest(file, "sha256").hexdigest()
    except OSError as error:
        raise RecipeError(f"{key}: {path} cannot be read ({error.strerror or error}); expected a file") from None
