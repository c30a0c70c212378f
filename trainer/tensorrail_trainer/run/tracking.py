"""Curves, residuals and the final report in TensorBoard or MLflow, through accelerate's trackers."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

from accelerate import Accelerator
from accelerate.tracking import get_available_trackers

from tensorrail_runtime.errors import RecipeError, first_line
from tensorrail_runtime.progress import Progress, silent
from tensorrail_trainer.recipes.recipe import Recipe
from tensorrail_trainer.run.report import Report
from tensorrail_trainer.training.epochs import Epoch

TRACKERS = ("tensorboard", "mlflow")
"""What a run can be logged to; each is an extra of the installation."""


LOGGED = tuple(f"logs/{place}" for place in ("*/events.out.tfevents.*", "*/*/events.out.tfevents.*", "*/*/hparams.yml"))
"""Patterns of the files that TensorBoard's tracker writes in the folder of a run."""


def check_trackers(names: Sequence[str]) -> None:
    """Raise `RecipeError` for a tracker that is unknown or not installed."""
    available = {str(getattr(name, "value", name)) for name in get_available_trackers()}
    for name in names:
        if name not in TRACKERS:
            raise RecipeError(f"track: unknown tracker {name!r}: expected {' or '.join(TRACKERS)}")
        if name not in available:
            raise RecipeError(f"track: {name} is not installed: install the extra `{name}`, as in pip install '.[{name}]'")


class Tracking:
    """Logs a run, in a `with` statement. Without trackers it does nothing. A tracker that fails later ends no training.

    Args:
        accelerator: the accelerator, made with these trackers.
        recipe: the recipe of the run, whose settings are logged.
        names: the trackers.
        progress: told of a tracker that fails; default: nobody.

    """

    def __init__(self, accelerator: Accelerator, recipe: Recipe, names: Sequence[str], progress: Progress = silent) -> None:
        self.accelerator, self.recipe, self.names, self.progress = accelerator, recipe, names, progress
        self.active = False

    def start(self) -> None:
        """Start the trackers, which write to the folder of the run; before, nothing is logged.

        Raises `RecipeError` if a tracker cannot be used, such as a server that does not answer.
        """
        if not self.names:
            return
        own = {"mlflow": {"run_name": self.recipe.name}}
        kwargs = {name: own[name] for name in self.names if name in own}
        try:
            self.accelerator.init_trackers(self.recipe.name, settings_of(self.recipe), kwargs)
        except Exception as error:  # noqa: BLE001 - each tracker raises errors of its own
            raise RecipeError(f"track: {', '.join(self.names)} cannot be used: {first_line(error)}") from None
        self.active = True

    def epoch(self, row: Epoch, step: int) -> None:
        """Log an epoch; `step` counts the epochs of all phases, from 1."""
        if not self.active:
            return
        values = {name: getattr(row, name) for name in ("loss", "train_accuracy", "test_accuracy", "lr", "seconds")}
        if row.rho is not None:
            values["rho"] = row.rho
        for layer, (primal, dual) in row.residuals.items():
            values |= {f"primal/{layer}": primal, f"dual/{layer}": dual}
        self._log(row.phase, values, step)

    def report(self, report: Report, step: int) -> None:
        """Log what the whole run came to: accuracies, sizes, speed-ups and numerical errors."""
        if not self.active:
            return
        values: dict[str, float] = {"numerical_error": report.numerical.worst, "approximation": report.approximation.worst}
        for model in report.models:
            name = model.label.replace(" ", "_")
            values |= {
                f"{name}/test_accuracy": model.accuracy.percent,
                f"{name}/parameters": model.cost.params,
                f"{name}/flops": model.cost.flops,
                f"{name}/bytes": model.cost.bytes,
            }
        for run in report.latency:
            values |= {
                f"batch_{run.batch}/speed_up": run.ratios[0].value,
                f"batch_{run.batch}/speed_up_low": run.ratios[0].low,
                f"batch_{run.batch}/speed_up_high": run.ratios[0].high,
            }
        values["holds"] = float(report.holds)
        self._log("report", values, step)

    def _log(self, what: str, values: Mapping[str, float], step: int) -> None:
        try:
            self.accelerator.log({f"{what}/{name}": float(value) for name, value in values.items()}, step=step)
        except Exception as error:  # noqa: BLE001 - each tracker raises errors of its own
            self.active = False
            self.progress("note", 1.0, f"nothing more is logged: {first_line(error)}")

    def __enter__(self) -> Tracking:
        return self

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        """Write out what was logged; a run that ends with an error is marked as failed where a tracker knows such a mark."""
        for tracker in self.accelerator.trackers if self.active else ():
            if kind is not None and tracker.name == "mlflow":
                import mlflow

                mlflow.end_run("FAILED")
            else:
                tracker.finish()


def settings_of(recipe: Recipe) -> dict[str, str | int | float | bool]:
    """Return the settings of a recipe by their dotted keys, as trackers take them."""
    flat: dict[str, str | int | float | bool] = {}

    def walk(key: str, value: object) -> None:
        if isinstance(value, dict):
            for name, inner in value.items():
                walk(f"{key}.{name}" if key else str(name), inner)
        elif isinstance(value, str | int | float | bool):
            flat[key] = value
        elif value is not None:
            flat[key] = str(value)

    walk("", recipe.model_dump(mode="json", exclude_none=True))
    return flat


def folder_of(folder: Path) -> Path:
    """Return where TensorBoard's files of a run are written."""
    return folder / "logs"
