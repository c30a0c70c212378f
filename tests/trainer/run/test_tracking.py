"""Curves, residuals and the report of a run, read back from TensorBoard's files and MLflow's store."""

import pytest

import tensorrail as tr
from tensorrail_runtime.errors import RecipeError
from tensorrail_trainer.recipes.recipe import Recipe
from tensorrail_trainer.run import tracking
from tensorrail_trainer.run.tracking import settings_of

pytestmark = pytest.mark.filterwarnings("ignore::UserWarning", "ignore::FutureWarning", "ignore::DeprecationWarning")

RECIPE = """
version: 1
name: tracked
seed: 0
data: {name: digits, args: {size: 16}}
model: {name: small_resnet, args: {widths: [8, 16], blocks: 1, hidden: 16}}
plan: [{layers: hidden, ranks: 4, format: svd}]
train:
  batch: 128
  dense: {epochs: 1, lr: 0.1}
  admm: {epochs: 2, lr: 0.05, rho: 0.1}
  finetune: {epochs: 1, lr: 0.01}
"""


@pytest.fixture
def recipe(tmp_path):
    (tmp_path / "recipe.yaml").write_text(RECIPE)
    return Recipe.load(tmp_path / "recipe.yaml")


def test_curves_and_residuals_are_in_tensorboards_files(recipe, tmp_path):
    pytest.importorskip("tensorboard")
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    log = tr.train(recipe, tmp_path / "run", track=["tensorboard"])
    events = EventAccumulator(str(tmp_path / "run" / "logs" / "tracked"))
    events.Reload()
    assert [(event.step, pytest.approx(event.value)) for event in events.Scalars("admm/loss")] == [
        (2, log.epochs[1].loss),
        (3, log.epochs[2].loss),
    ]
    assert events.Scalars("admm/primal/hidden")[-1].value == pytest.approx(log.epochs[2].residuals["hidden"][0], rel=1e-5)
    assert [event.step for event in events.Scalars("finetune/test_accuracy")] == [4]


@pytest.fixture
def mlflow(tmp_path, monkeypatch):
    mlflow = pytest.importorskip("mlflow")
    monkeypatch.setenv("MLFLOW_TRACKING_URI", f"sqlite:///{tmp_path / 'store.db'}")
    mlflow.set_tracking_uri(f"sqlite:///{tmp_path / 'store.db'}")
    monkeypatch.chdir(tmp_path)  # artifacts would lie here
    return mlflow


def runs_of(mlflow):
    client = mlflow.MlflowClient()
    (experiment,) = [one for one in client.search_experiments() if one.name == "tracked"]
    return client, client.search_runs([experiment.experiment_id])


def test_curves_and_settings_are_in_mlflow(recipe, tmp_path, mlflow):
    log = tr.train(recipe, tmp_path / "run", track=["mlflow"])
    client, (run,) = runs_of(mlflow)
    assert run.info.status == "FINISHED"
    assert run.data.params["train.batch"] == "128"
    assert run.data.metrics["admm/test_accuracy"] == pytest.approx(log.epochs[2].test_accuracy)
    assert [one.step for one in client.get_metric_history(run.info.run_id, "admm/loss")] == [2, 3]


def test_a_run_that_fails_is_marked_and_the_next_one_is_logged(recipe, tmp_path, mlflow, monkeypatch):
    def interrupted(*_):
        raise KeyboardInterrupt

    with monkeypatch.context() as patched:
        patched.setattr("tensorrail_trainer.run.phases.save_cores", interrupted)
        with pytest.raises(KeyboardInterrupt):
            tr.train(recipe, tmp_path / "run", track=["mlflow"])
    tr.train(recipe, tmp_path / "run", resume=True, track=["mlflow"])
    _, runs = runs_of(mlflow)
    assert sorted(run.info.status for run in runs) == ["FAILED", "FINISHED"]


def test_a_tracker_that_fails_ends_no_training(recipe, tmp_path, mlflow, monkeypatch):
    notes = []

    def log(*_, **__):
        raise ConnectionError("the server is gone")

    monkeypatch.setattr("accelerate.tracking.MLflowTracker.log", log)
    found = tr.train(recipe, tmp_path / "run", track=["mlflow"], progress=lambda stage, share, text="": notes.append(text))
    assert [row.phase for row in found.epochs][-1] == "control"
    assert notes.count("nothing more is logged: the server is gone") == 1


def test_a_server_that_cannot_be_used_is_told_in_one_line_before_a_folder_is_made(recipe, tmp_path, mlflow, monkeypatch):
    monkeypatch.setenv("MLFLOW_ALLOW_FILE_STORE", "false")
    mlflow.set_tracking_uri(f"file:{tmp_path / 'store'}")
    with pytest.raises(RecipeError, match="track: mlflow cannot be used: The filesystem tracking backend"):
        tr.train(recipe, tmp_path / "run", track=["mlflow"])
    assert not (tmp_path / "run").exists()


def test_overwrite_removes_the_curves_of_the_run_before(recipe, tmp_path):
    pytest.importorskip("tensorboard")
    own = tmp_path / "run" / "logs" / "tracked" / "mine.txt"
    for overwrite in (False, True):
        tr.train(recipe, tmp_path / "run", overwrite=overwrite, track=["tensorboard"])
        own.write_text("of the user")
    assert len(list((tmp_path / "run" / "logs" / "tracked").glob("events.out.tfevents.*"))) == 1
    assert own.read_text() == "of the user"


def test_an_unknown_or_missing_tracker_is_told_before_anything_is_trained(recipe, tmp_path, monkeypatch):
    with pytest.raises(RecipeError, match="track: unknown tracker 'wandb': expected tensorboard or mlflow"):
        tr.train(recipe, tmp_path / "run", track=["wandb"])
    monkeypatch.setattr(tracking, "get_available_trackers", list)
    with pytest.raises(
        RecipeError, match=r"track: mlflow is not installed: install the extra `mlflow`, as in pip install '\.\[mlflow\]'"
    ):
        tr.train(recipe, tmp_path / "run", track=["mlflow"])
    assert not (tmp_path / "run").exists()


def test_settings_are_flat(recipe):
    settings = settings_of(recipe)
    assert settings["name"] == "tracked"
    assert settings["train.admm.rho"] == pytest.approx(0.1)
    assert all(isinstance(value, str | int | float | bool) for value in settings.values())
