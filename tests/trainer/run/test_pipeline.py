import json
import shutil
import sys
from collections import OrderedDict
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
import yaml
from cases import listener
from torch import nn

from tensorrail_exporter import Plan
from tensorrail_exporter.search import fastest_form
from tensorrail_runtime.errors import CheckpointError, DataError, RecipeError, TrainingError, WeightsError
from tensorrail_trainer.data import Dataset, InMemory
from tensorrail_trainer.layers.swap import swap
from tensorrail_trainer.networks.weights import save_weights
from tensorrail_trainer.planning.ranks import plan_layers
from tensorrail_trainer.recipes import recipe as recipes
from tensorrail_trainer.recipes.recipe import Recipe
from tensorrail_trainer.run import phases, pipeline, render
from tensorrail_trainer.run.folder import prepare
from tensorrail_trainer.run.phases import make_accelerator, train_all
from tensorrail_trainer.run.pipeline import run
from tensorrail_trainer.run.report import Report
from tensorrail_trainer.run.tryout import try_out
from tensorrail_trainer.training.checkpoints import Checkpoints
from tensorrail_trainer.training.loop import place

SMALL = {
    "version": 1,
    "name": "small",
    "data": {"name": "digits", "args": {"test_fraction": 0.9, "size": 16}},
    "model": {"name": "small_resnet", "args": {"widths": [8], "blocks": 1, "hidden": 16}},
    "plan": [{"layers": "stages.*.conv?", "ranks": 4}, {"layers": "hidden", "modes": [4, 4, 8, 16], "ranks": 4}],
    "train": {
        "batch": 32,
        "augment": {"shift": 1},
        "dense": {"epochs": 2, "lr": 0.05},
        "admm": {"epochs": 2, "lr": 0.05, "rho": 0.1},
        "finetune": {"epochs": 2, "lr": 0.02},
    },
    "bench": {"batches": [1], "seconds": 0.2, "processes": 1},
}
SHORT = {phase: SMALL["train"][phase] | {"epochs": 1} for phase in ("dense", "admm", "finetune")}
FILES = ["recipe.yaml", "plan.json", "cores.safetensors", "dense.onnx", "control.onnx", "model.onnx"]
REPORTS = ["report.json", "report.md", "report.html"]


def write(tmp_path, **changes):
    path = tmp_path / "recipe.yaml"
    path.write_text(yaml.safe_dump(SMALL | changes))
    return path


def small(tmp_path, **changes):
    return Recipe.load(write(tmp_path, **changes))


@pytest.fixture(scope="module")
def ended(tmp_path_factory):
    """A run that ended, its report and what its benchmark told: for several tests, which copy the folder to change it."""
    folder = tmp_path_factory.mktemp("ended")
    shares = []
    report = run(small(folder), folder / "run", progress=listener(bench=lambda *share: shares.append(share)))
    return SimpleNamespace(folder=folder / "run", report=report, shares=shares)


class Interrupted(Exception):  # noqa: N818 - stands for a signal, not an error
    pass


def test_a_run_leaves_its_files_and_its_errors_apart(ended):
    folder, report = ended.folder, ended.report
    assert ended.shares == [("measuring latency at batch 1", 0.0), ("measuring latency at batch 1", 1.0)]
    assert all((folder / name).stat().st_size for name in FILES + REPORTS)
    assert not list(folder.rglob("*.part"))
    assert report.numerical.worst < 1e-5
    assert report.approximation.worst > report.numerical.worst
    assert {row.phase for row in report.training} == {"dense", "admm", "finetune", "control"}
    control, finetune = (sum(row.phase == name for row in report.training) for name in ("control", "finetune"))
    assert control == finetune + SMALL["train"]["admm"]["epochs"]
    assert Report.model_validate_json((folder / "report.json").read_bytes()) == report
    assert [run_.processes for run_ in report.latency] == [1]
    page = (folder / "report.html").read_text()
    assert "in 1 fresh process, 95 % confidence intervals" in page
    assert page.count("<svg") == 3
    assert not any(load in page for load in ('src="', 'href="http', "url(http", "@import"))  # nothing is loaded from elsewhere


@pytest.mark.parametrize("stop", [1, 3, pytest.param(5, marks=pytest.mark.slow), 7])
def test_an_interrupted_run_ends_as_an_uninterrupted_one(ended, tmp_path, stop):
    recipe = small(tmp_path)
    whole, broken = ended.folder, tmp_path / "broken"
    prepare(recipe, broken)
    seen = []

    def interrupt(row, *_):
        seen.append(row)
        if len(seen) == stop:
            raise Interrupted

    with pytest.raises(Interrupted):
        train_all(recipe, broken, listener(epoch=interrupt))
    prepare(recipe, broken, resume=True)
    train_all(recipe, broken)
    assert (whole / "cores.safetensors").read_bytes() == (broken / "cores.safetensors").read_bytes()
    last = [Checkpoints(folder / "checkpoints").latest("control") for folder in (whole, broken)]
    for name, tensor in last[0]["model"].items():
        assert torch.equal(tensor, last[1]["model"][name]), name


def two_convolutions(**_):
    conv, cut = nn.Conv2d(1, 8, 3, stride=2), nn.Conv2d(8, 8, 3)
    return nn.Sequential(conv, nn.ReLU(), cut, nn.Flatten(), nn.Linear(200, 10))


def test_a_run_that_ended_is_written_anew_in_its_fastest_form(in_this_process, tmp_path, monkeypatch):
    monkeypatch.setattr(pipeline, "html", lambda *_: "")  # its pictures are drawn in the test above
    changes = {
        "model": {"name": f"{__name__}:two_convolutions"},
        "plan": [{"layers": "2", "ranks": 4}, {"layers": "4", "ranks": 4}],
        "train": SMALL["train"] | SHORT | {"control": "none"},
    }
    plain = run(small(tmp_path, **changes), tmp_path / "run")
    names = [row.layer for row in plain.layers]
    asked, notes = [], []

    def fastest_blocks(model, plan, form, **_):
        asked.append(form)
        return {name: 0 if name == names[0] else 8 for name in names}

    monkeypatch.setattr(fastest_form, "fastest_blocks", fastest_blocks)
    export = {"block": "auto", "dense_if_slower": True, "batch": 4}
    told = listener(note=notes.append, epoch=lambda *_: pytest.fail("it trained again"))
    found = run(small(tmp_path, **changes, export=export), tmp_path / "run", resume=True, progress=told)
    assert asked == [fastest_form.Form(block="auto", dense_if_slower=True, batch=4)]
    assert [row.layer for row in found.layers] == names[1:]
    assert f"kept dense, since no form of their cores is faster here: {names[0]}" in notes
    assert [(row.layer, row.reason) for row in found.dense] == [(names[0], "no form of its cores is faster here")]
    for text in (str(found), (tmp_path / "run" / "report.md").read_text(), render.html(found)):
        assert names[0] in text
        assert "no form of its cores is faster here" in text
    assert found.numerical.worst < 1e-5
    assert found.model("factored").cost.params > plain.model("factored").cost.params  # as it runs
    monkeypatch.setattr(fastest_form, "fastest_blocks", lambda *_, **__: dict.fromkeys(names, 0))
    found = run(small(tmp_path, **changes, export=export), tmp_path / "run", resume=True, progress=told)
    assert [row.layer for row in found.layers] == names
    assert "every planned layer is faster in dense form here, at batch 4" in notes[-1]


def test_a_plan_comes_from_a_file(tmp_path):
    own = small(tmp_path)
    plan = own.make_plan(own.make_model())
    plan.model_copy(update={"precision": "fp16"}).save(tmp_path / "plan.json")  # a recipe trains and exports in fp32
    read = small(tmp_path, plan=[{"file": str(tmp_path / "plan.json")}])
    notes = []
    assert read.make_plan(read.make_model(), note=notes.append) == plan
    assert notes == [f"{tmp_path / 'plan.json'}: the precision fp16 has no effect here: a recipe trains and exports in fp32"]
    read.save(tmp_path / "saved.yaml")
    assert Recipe.load(tmp_path / "saved.yaml") == read
    Plan(layers=(plan.layers[0].model_copy(update={"name": "other"}),)).save(tmp_path / "plan.json")
    with pytest.raises(RecipeError, match=r"plan.0: layer other: not in the model"):
        small(tmp_path, plan=[{"file": str(tmp_path / "plan.json")}])


def test_a_damaged_checkpoint_is_named_and_the_one_before_is_used(tmp_path):
    notes = []
    store = Checkpoints(tmp_path, notes.append)
    for epoch in (1, 2, 3):
        store.save("dense", epoch, {"value": torch.tensor(epoch)})
    assert sorted(path.name for path in tmp_path.iterdir()) == ["dense-0002.pt", "dense-0003.pt"]
    newest = tmp_path / "dense-0003.pt"
    newest.write_bytes(newest.read_bytes()[:100])
    assert store.latest("dense")["epoch"] == 2
    assert notes == ["ignored the damaged checkpoint dense-0003.pt; resuming from epoch 2"]
    (tmp_path / "dense-0002.pt").write_bytes(b"")
    assert store.latest("dense") is None
    assert notes[1] == "ignored the damaged checkpoint dense-0003.pt, dense-0002.pt; phase dense starts from the beginning"
    store.save("dense", 1, {"value": torch.tensor(1)})  # and what it writes then stays
    assert [path.name for path in tmp_path.iterdir()] == ["dense-0001.pt"]
    assert store.latest("dense")["epoch"] == 1


def test_a_checkpoint_that_may_not_be_read_is_not_taken_for_damaged(tmp_path, monkeypatch):
    store = Checkpoints(tmp_path)
    store.save("dense", 1, {"value": torch.tensor(1)})

    def denied(_):
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr(Path, "read_bytes", denied)
    with pytest.raises(
        CheckpointError, match=r"dense-0001.pt cannot be read \(Permission denied\); make it readable, then resume the run"
    ):
        store.latest("dense")


@pytest.mark.parametrize("error", [MemoryError(), RuntimeError("DefaultCPUAllocator: can't allocate memory")])
def test_a_checkpoint_that_does_not_fit_into_memory_is_not_taken_for_damaged(error, tmp_path, monkeypatch):
    store = Checkpoints(tmp_path)
    store.save("dense", 1, {"value": torch.tensor(1)})

    def full(*_, **__):
        raise error

    monkeypatch.setattr(torch, "load", full)
    with pytest.raises(CheckpointError, match=r"dense-0001.pt does not fit into memory; free memory, then resume the run"):
        store.latest("dense")


def test_a_damaged_checkpoint_is_passed_over_by_resume(ended, tmp_path):
    recipe = small(tmp_path)
    shutil.copytree(ended.folder, tmp_path / "run")
    whole, _ = train_all(recipe, tmp_path / "run", listener(epoch=lambda *_: pytest.fail("it trained again")))
    for path in (tmp_path / "run" / "checkpoints").glob("control-*.pt"):
        path.write_bytes(path.read_bytes()[:100])
    notes = []
    again, _ = train_all(recipe, tmp_path / "run", listener(note=notes.append))
    assert any("phase control starts from the beginning" in note for note in notes)
    for name, tensor in whole.dense.state_dict().items():
        assert torch.equal(tensor, again.dense.state_dict()[name]), name
    assert [row.loss for row in again.rows] == [row.loss for row in whole.rows]


def test_batches_of_one_sample_train(tmp_path):
    recipe = small(tmp_path, train=SMALL["train"] | {"batch": 1})
    job = try_out(recipe, recipe.make_data(), None, torch.device("cpu"))
    assert job  # with the channels last
    bad = small(
        tmp_path, train=SMALL["train"] | {"batch": 1}, model=SMALL["model"] | {"args": SMALL["model"]["args"] | {"classes": 3}}
    )
    with pytest.raises(RecipeError, match=r"expected scores of 10 classes, \[1, 10\], for 1 sample.*, got \[1, 3\]"):
        try_out(bad, bad.make_data(), None, torch.device("cpu"))


def test_a_checkpoint_whose_numbers_changed_on_the_disk_is_refused(tmp_path):
    store = Checkpoints(tmp_path)
    store.save("dense", 1, {"value": torch.ones(4096)})
    path = tmp_path / "dense-0001.pt"
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1  # torch reads this without a word
    path.write_bytes(content)
    assert not torch.equal(torch.load(path)["value"], torch.ones(4096))
    assert store.latest("dense") is None


def test_a_checkpoint_of_another_network_ends_in_one_line(tmp_path):
    recipe = small(tmp_path)
    prepare(recipe, tmp_path / "run")
    store = Checkpoints(tmp_path / "run" / "checkpoints")
    whole = {"model": recipe.make_model().state_dict(), "optimizer": {}, "rows": []}
    for state in ({}, {"model": {}, "optimizer": {}, "rows": [], "done": False}, whole):
        store.save("dense", 1, state)
        with pytest.raises(CheckpointError, match=r"phase dense, epoch 1, does not match this network .*; delete it"):
            train_all(recipe, tmp_path / "run")


def test_a_run_that_is_resumed_is_not_overwritten(ended, tmp_path):
    folder = tmp_path / "run"
    shutil.copytree(ended.folder, folder)
    with pytest.raises(RecipeError, match="expected resume or overwrite, got both"):
        prepare(Recipe.load(folder / "recipe.yaml"), folder, resume=True, overwrite=True)
    assert (folder / "cores.safetensors").exists()


def test_overwrite_deletes_nothing_before_the_data_are_there(ended, tmp_path):
    folder = tmp_path / "run"
    shutil.copytree(ended.folder, folder)
    recipe = small(tmp_path)
    gone = recipe.data.model_copy(update={"name": "images", "args": {"root": str(tmp_path / "not-mounted")}})
    with pytest.raises(DataError, match="not-mounted"):
        run(recipe.model_copy(update={"data": gone}), folder, overwrite=True)
    assert sorted(path.name for path in folder.iterdir()) == sorted(path.name for path in ended.folder.iterdir())


def test_a_recipe_resumes_its_own_run_whatever_types_its_arguments_have(tmp_path):
    """A saved recipe has lists for tuples, and texts for the keys of mappings."""
    recipe = small(tmp_path)
    args = {"widths": (8,), "blocks": 1, "hidden": 16}
    recipe = recipe.model_copy(update={"model": recipe.model.model_copy(update={"args": args})})
    prepare(recipe, tmp_path / "run")
    prepare(recipe, tmp_path / "run", resume=True)


def test_a_run_is_neither_overwritten_nor_mixed_unasked(tmp_path):
    prepare(small(tmp_path), tmp_path / "run")
    with pytest.raises(RecipeError, match="already holds a run; resume it, or overwrite it"):
        prepare(small(tmp_path), tmp_path / "run")
    with pytest.raises(RecipeError, match="a recipe that differs in seed"):
        prepare(small(tmp_path, seed=3), tmp_path / "run", resume=True)
    prepare(small(tmp_path, targets={"speedup": 1.1}), tmp_path / "run", resume=True)
    run_ = tmp_path / "run"
    (run_ / "plan.json").write_text("old")
    (run_ / "notes.txt").write_text("mine")
    (run_ / "checkpoints" / ".dense-0003.pt.0123abcd.part").write_text("half")
    Checkpoints(run_ / "checkpoints").save("dense", 1, {})
    prepare(small(tmp_path, seed=3), run_, overwrite=True)
    assert not (run_ / "plan.json").exists()
    assert list((run_ / "checkpoints").iterdir()) == []
    assert (run_ / "notes.txt").read_text() == "mine"


def test_a_run_is_not_resumed_with_files_of_another_content(tmp_path):
    network, weights, taught, plan = (
        small(tmp_path),
        *(tmp_path / name for name in ("a.safetensors", "b.safetensors", "p.json")),
    )
    for path in (weights, taught):
        save_weights(network.make_model(), path)
    network.make_plan(network.make_model()).save(plan)
    distill = {"teacher": SMALL["model"] | {"weights": str(taught)}}
    train = {phase: SMALL["train"][phase] for phase in ("admm", "finetune")} | {"distill": distill}
    changes = {"model": SMALL["model"] | {"weights": str(weights)}, "plan": [{"file": str(plan)}], "train": train}
    recipe, run_ = small(tmp_path, **changes), tmp_path / "run"
    prepare(recipe, run_)
    others = {"model.weights": weights, "train.distill.teacher.weights": taught, "plan.0.file": plan}
    other = small(tmp_path, seed=1).make_model()
    save_weights(other, weights)
    prepare(recipe, run_, resume=True)  # nothing was trained yet
    Checkpoints(run_ / "checkpoints").save("admm", 1, {})
    prepare(recipe, run_, resume=True)
    for key, path in others.items():
        before = path.read_bytes()
        if path == plan:
            network.make_plan(other).model_copy(update={"precision": "fp16"}).save(path)
        else:
            save_weights(small(tmp_path, seed=2).make_model(), path)
        with pytest.raises(RecipeError, match=rf"^{key}: .*{path.name} is not the file that the run in .*run started from"):
            prepare(recipe, run_, resume=True)
        path.write_bytes(before)
        prepare(recipe, run_, resume=True)
    kept = run_ / "checkpoints" / "sources.json"
    kept.write_text("{")
    with pytest.raises(CheckpointError, match=r"sources.json: .*; delete it if no file of the recipe has changed"):
        prepare(recipe, run_, resume=True)
    kept.unlink()  # as in the runs of earlier versions
    save_weights(small(tmp_path, seed=2).make_model(), weights)
    prepare(recipe, run_, resume=True)
    assert not kept.exists()
    prepare(recipe, run_, overwrite=True)
    assert kept.exists()
    weights.unlink()
    with pytest.raises(RecipeError, match=r"model.weights: .*a.safetensors cannot be read \(No such file or directory\)"):
        prepare(recipe, tmp_path / "next")
    assert not (tmp_path / "next").exists()


def test_the_gradient_is_that_of_the_whole_batch_whatever_the_environment(tmp_path, monkeypatch):
    monkeypatch.setenv("ACCELERATE_GRADIENT_ACCUMULATION_STEPS", "4")  # as `accelerate launch` sets it
    x = torch.ones((), requires_grad=True)
    make_accelerator(small(tmp_path)).backward(3 * x)
    assert float(x.grad) == 3.0


def test_a_folder_that_is_no_run_is_left_alone(tmp_path):
    own = write(tmp_path)  # tmp_path/recipe.yaml, as in a project of one's own
    for how in ({}, {"resume": True}, {"overwrite": True}):
        with pytest.raises(RecipeError, match=r"recipe.yaml exists, but its folder holds no run; give the run another folder"):
            prepare(Recipe.load(own), tmp_path, **how)
    assert own.read_text() == yaml.safe_dump(SMALL)
    for name in ("model.onnx", "checkpoints/dense-0002.pt"):
        other = tmp_path / name.replace("/", "_") / name
        other.parent.mkdir(parents=True)
        other.write_text("mine")
        with pytest.raises(RecipeError, match=r"exists, but the folder has no recipe.yaml"):
            prepare(Recipe.load(own), tmp_path / name.replace("/", "_"))
        assert other.read_text() == "mine"


def linear_attention(**_):
    class Attention(nn.Module):
        def __init__(self):
            super().__init__()
            self.out = nn.Linear(256, 10)

        def forward(self, x):
            return self.out(x.flatten(1)) if type(self.out) is nn.Linear else self.out.out_dim

    return Attention()


def two_heads(**_):
    class Heads(nn.Module):
        def __init__(self):
            super().__init__()
            self.out = nn.Linear(256, 10)

        def forward(self, x):
            scores = self.out(x.flatten(1))
            return (scores, scores) if self.training else scores

    return Heads()


def viewing(**_):
    class Net(nn.Module):
        def __init__(self):
            super().__init__()
            self.first, self.conv = nn.Conv2d(1, 4, 3, padding=1), nn.Conv2d(4, 4, 3, padding=1)
            self.out = nn.Linear(1024, 10)

        def forward(self, x):
            return self.out(self.conv(self.first(x)).view(x.size(0), -1))  # which torch refuses with the channels last

    return Net()


KNOWN = {"name": "small_resnet", "args": SMALL["model"]["args"] | {"channels": 1, "classes": 10}}


def viewing_in_training(**_):
    net = viewing()
    maps = nn.Sequential(net.first, net.conv)
    net.forward = lambda x: net.out(maps(x).view(len(x), -1) if net.training else maps(x).flatten(1))
    return net


def wrong_labels(kind="range"):
    x, y = torch.zeros(40, 1, 16, 16), torch.arange(40) % 11
    split = InMemory(x, y if kind == "range" else (y % 10).int())
    return Dataset("made", 10, split, split)


class Broken(torch.utils.data.Dataset):
    """A data set whose first sample fails in one of several ways."""

    def __init__(self, way):
        self.way = way

    def __len__(self):
        return 40

    def __getitem__(self, index):
        if index == 0 and self.way == "key":
            return {"image": 1}["label"]
        if index == 0 and self.way == "exit":
            raise SystemExit(0)
        return torch.zeros(1, 16, 16), index % 10


def broken(way="key"):
    if way == "function":
        raise KeyError("root")
    if way == "function ends":
        raise SystemExit(0)
    return Broken(way), Broken(way), 10


def ends(**_):
    class Net(nn.Module):
        def __init__(self):
            super().__init__()
            self.out = nn.Linear(256, 10)

        def forward(self, x):
            raise SystemExit(0)

    return Net()


def absent(**_):
    return {}["model"]


def data_of(way):
    return {"data": {"name": f"{__name__}:broken", "args": {"way": way}}, "model": KNOWN}


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        (data_of("key"), r"sample 0 of Broken: cannot be read \(KeyError: 'label'\) at test_pipeline.py, line \d+$"),
        (data_of("exit"), r"sample 0 of Broken: cannot be read \(SystemExit: 0\) at test_pipeline.py"),
        (
            data_of("function"),
            r"data.name: test_pipeline:broken failed with \{'way': 'function'\} \(KeyError: 'root'\) at test_pipeline.py",
        ),
        (data_of("function ends"), r"data.name: test_pipeline:broken failed with .* \(SystemExit: 0\) at test_pipeline.py"),
        ({"model": {"name": f"{__name__}:absent"}}, r"model.name: test_pipeline:absent failed with .*\(KeyError: 'model'\)"),
        (
            {"model": {"name": f"{__name__}:ends"}, "plan": [{"layers": "out", "ranks": 4}]},
            r"model: the network does not accept samples of shape \[1, 16, 16\] .*SystemExit: 0.* at test_pipeline.py",
        ),
    ],
)
def test_what_ones_own_code_raises_is_said_with_its_place(change, reason, tmp_path):
    def attempt():
        recipe = small(tmp_path, **change)
        prepare(recipe, tmp_path / "run")
        train_all(recipe, tmp_path / "run", listener(epoch=lambda *_: pytest.fail("it trained")))

    with pytest.raises((RecipeError, DataError), match=reason):
        attempt()


def flat_digits():
    split = InMemory(torch.rand(40, 64), torch.arange(40) % 10)
    return Dataset("flat", 10, split, split)


def one_layer(**_):
    return nn.Sequential(OrderedDict(out=nn.Linear(64, 10)))


def lazy(**_):
    return nn.Sequential(OrderedDict(conv=nn.Conv2d(1, 8, 3), flat=nn.Flatten(), out=nn.LazyLinear(10)))


ONE_PLAN = [{"layers": "out", "ranks": 2}]


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        (
            {"model": {"name": "small_resnet", "args": SMALL["model"]["args"] | {"classes": 5}}},
            r"model: expected .*\[2, 10\], for 2 samples, got \[2, 5\]; try .*classes: 10",
        ),
        (
            {"model": {"name": "small_resnet", "args": SMALL["model"]["args"] | {"channels": 3}}},
            r"model: the network does not accept samples of shape \[1, 16, 16\] .*RuntimeError: .*channels",
        ),
        (
            {"train": SMALL["train"] | {"augment": {"shift": 16, "border": "reflect"}}},
            r"train.augment: cannot be applied to these data .*[Pp]adding",
        ),
        (
            {"data": {"name": f"{__name__}:flat_digits"}, "model": {"name": f"{__name__}:one_layer"}, "plan": ONE_PLAN},
            r"train.augment: it applies to images in memory, \(N, C, H, W\), and has no effect on these data",
        ),
        (
            {"model": {"name": f"{__name__}:linear_attention"}, "plan": [{"layers": "out", "ranks": 4}]},
            r"plan: the factored network does not accept samples .*AttributeError: .*out_dim",
        ),
        (
            {"model": {"name": f"{__name__}:two_heads"}, "plan": [{"layers": "out", "ranks": 4}]},
            r"model: expected scores .* for 2 samples in training, got tuple",
        ),
        (
            {"data": {"name": f"{__name__}:wrong_labels"}, "model": KNOWN},
            r"data: expected training labels from 0 to 9 \(10 classes\), got 0 to 10",
        ),
        (
            {"data": {"name": f"{__name__}:wrong_labels", "args": {"kind": "type"}}, "model": KNOWN},
            r"data: expected training labels of type torch.int64, got torch.int32",
        ),
        (
            {"train": SMALL["train"] | {"admm": {"epochs": 1, "lr": 0.05, "every_steps": 10000}}},
            r"train.admm.every_steps: expected at most \d+ \(1 epochs of \d+ steps\), got 10000: ADMM would never update",
        ),
    ],
)
def test_what_cannot_work_is_found_before_anything_is_trained(change, reason, tmp_path):
    recipe = small(tmp_path, **change)
    prepare(recipe, tmp_path / "run")
    with pytest.raises(RecipeError, match=reason):
        train_all(recipe, tmp_path / "run", listener(epoch=lambda *_: pytest.fail("it trained")))


def test_a_layer_whose_size_is_not_known_is_found_when_the_recipe_is_read(tmp_path):
    with pytest.raises(RecipeError, match=r"model\.name: the size of out\.weight is not known yet: give the sizes of lazy"):
        small(tmp_path, model={"name": f"{__name__}:lazy"}, plan=[{"layers": "conv", "ranks": 2}])


class OwnConvolution(nn.Conv2d):
    """A convolution that computes what torch's does."""


def padded(**_):
    return nn.Sequential(
        OrderedDict(
            first=nn.Conv2d(1, 8, 3, padding="same"),
            second=nn.Conv2d(8, 8, 3, padding="valid"),
            third=OwnConvolution(8, 8, 3),
            pool=nn.AdaptiveAvgPool2d(1),
            flat=nn.Flatten(),
            out=nn.Linear(8, 10),
        )
    )


def test_paddings_by_name_and_subclasses_are_exported(tmp_path):
    plan = [{"layers": name, "ranks": 2} for name in ("first", "second", "third")]
    changes = {"model": {"name": f"{__name__}:padded"}, "plan": plan, "train": SMALL["train"] | SHORT}
    report = run(small(tmp_path, **changes), tmp_path / "run")
    assert {row.layer for row in report.layers} == {"first", "second", "third"}


@pytest.mark.filterwarnings("error:No artists")
def test_a_run_without_admm_draws_its_control_beside_the_cores(tmp_path):
    phases = {key: value for key, value in (SMALL["train"] | SHORT).items() if key != "admm"}
    recipe = small(tmp_path, train=phases, plan=[{"layers": "hidden", "ranks": 4}])
    report = run(recipe, tmp_path / "run")
    assert "ADMM epoch" not in (tmp_path / "run" / "report.html").read_text()
    assert {epoch.phase for epoch in report.training} == {"dense", "finetune", "control"}


def test_a_teacher_of_other_classes_is_found_before_anything_is_trained(tmp_path):
    wide = {"name": "small_resnet", "args": SMALL["model"]["args"] | {"classes": 12}}
    save_weights(small(tmp_path, model=wide).make_model(), tmp_path / "wide.safetensors")
    teacher = wide | {"weights": str(tmp_path / "wide.safetensors")}
    recipe = small(tmp_path, train=SMALL["train"] | {"distill": {"teacher": teacher}})
    prepare(recipe, tmp_path / "run")
    with pytest.raises(RecipeError, match=r"train.distill.teacher: expected 10 scores per sample, .*, got 12"):
        train_all(recipe, tmp_path / "run", listener(epoch=lambda *_: pytest.fail("it trained")))


@pytest.mark.parametrize(("model", "layers"), [("viewing", "out"), ("viewing", "conv"), ("viewing_in_training", "out")])
def test_a_network_that_views_its_images_trains_with_the_channels_first(model, layers, tmp_path):
    changes = {"plan": [{"layers": layers, "ranks": 2}], "train": SMALL["train"] | SHORT}
    recipe = small(tmp_path, model={"name": f"{__name__}:{model}"}, **changes)
    notes = []
    prepare(recipe, tmp_path / "run")
    trained, _ = train_all(recipe, tmp_path / "run", listener(note=notes.append))
    assert {row.phase for row in trained.rows} == {"dense", "admm", "finetune", "control"}
    assert sum("channels_last" in note for note in notes) == 1


def test_a_run_is_not_removed_that_the_next_one_starts_from(tmp_path):
    folder = tmp_path / "run"
    prepare(small(tmp_path), folder)
    best = folder / "checkpoints" / "finetune-0003-best.pt"  # a user's own
    best.touch()
    prepare(small(tmp_path), folder, overwrite=True)
    assert best.exists()
    weights = folder / "dense.safetensors"
    save_weights(small(tmp_path).make_model(), weights)
    again = small(
        tmp_path,
        model=SMALL["model"] | {"weights": str(weights)},
        train={key: value for key, value in SMALL["train"].items() if key != "dense"},
    )
    with pytest.raises(RecipeError, match=r"model.weights: .*dense.safetensors belongs to the run that would be overwritten"):
        prepare(again, folder, overwrite=True)
    assert weights.exists()
    assert (folder / "recipe.yaml").exists()


def test_functions_beside_a_recipe_are_found_from_any_folder(tmp_path, monkeypatch):
    monkeypatch.setattr(sys, "path", list(sys.path))
    (tmp_path / "beside_it.py").write_text(
        "from torch import nn\ndef net():\n    return nn.Sequential(nn.Flatten(), nn.Linear(256, 10))\n"
    )
    path = write(tmp_path, model={"name": "beside_it:net"}, plan=[{"layers": "1", "ranks": 4}])
    monkeypatch.chdir("/")
    assert Recipe.load(path).make_model()[1].out_features == 10


def test_a_recipe_survives_being_saved_whatever_its_texts_look_like(tmp_path):
    recipe = small(tmp_path).model_copy(update={"name": "2e4"})
    recipe.save(tmp_path / "saved.yaml")
    assert Recipe.load(tmp_path / "saved.yaml") == recipe


@pytest.mark.parametrize(("control", "epochs"), [("same", 2), ({"epochs": 3, "lr": 0.02}, 3)])
def test_the_control_has_the_epochs_that_admm_took(control, epochs, tmp_path):
    admm = {"epochs": 4, "lr": 0.05, "rho": 0.1, "stop": 10.0}  # after the first epoch: no residual is as large
    recipe = small(tmp_path, train=SMALL["train"] | SHORT | {"admm": admm, "control": control})
    prepare(recipe, tmp_path / "run")
    trained, _ = train_all(recipe, tmp_path / "run")
    counts = {phase: sum(row.phase == phase for row in trained.rows) for phase in ("admm", "finetune", "control")}
    assert counts == {"admm": 1, "finetune": 1, "control": epochs}
    again, _ = train_all(recipe, tmp_path / "run", listener(epoch=lambda *_: pytest.fail("it trained again")))
    assert again.rows == trained.rows


def test_a_control_without_a_dense_network_is_refused(tmp_path):
    scratch = {"finetune": {"epochs": 1, "lr": 0.1}, "control": {"epochs": 2, "lr": 0.1}}
    with pytest.raises(RecipeError, match=r"train.control: expected a trained dense network to start from, found none"):
        small(tmp_path, train=scratch)


def test_checkpoints_are_in_the_order_of_their_numbers(tmp_path):
    store = Checkpoints(tmp_path)
    for epoch in (9998, 9999, 10000, 10001):
        store.save("dense", epoch, {"x": epoch})
    assert store.latest("dense")["epoch"] == 10001
    assert sorted(path.name for path in tmp_path.iterdir()) == ["dense-10000.pt", "dense-10001.pt"]


def test_a_loss_that_is_not_finite_stops_with_the_step_and_the_rate(tmp_path):
    recipe = small(tmp_path, train=SMALL["train"] | {"dense": {"epochs": 2, "lr": 1e30}})
    prepare(recipe, tmp_path / "run")
    with pytest.raises(TrainingError, match=r"phase dense, epoch 1, step \d+: the loss is .*learning rate .*lower"):
        train_all(recipe, tmp_path / "run")


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        ({"extra": 1}, "extra: unknown key"),
        ({"seed": 2**63}, "seed: expected a value less than"),
        (
            {"train": SMALL["train"] | {"dense": {"epochs": 1, "lr": 0.1, "momentum": 1.0}}},
            "momentum: expected a value less than 1",
        ),
        (
            {"train": {"finetune": {"epochs": 1, "lr": 0.1}, "distill": {"weight": 0.9}}},
            "train.distill: expected a trained network to learn from, found none",
        ),
        ({"model": {"name": "small_resnet", "args": {"widths": [], "blocks": 1, "hidden": 16}}}, "small_resnet cannot be"),
        ({"model": {"name": "vit_tiny", "args": {"patch": 0}}}, "vit_tiny cannot be created with"),
        ({"plan": []}, "plan"),
        ({"train": SMALL["train"] | {"admm": SMALL["train"]["admm"] | {"rho": float("inf")}}}, "rho: expected a finite"),
        ({"seed": "one"}, "seed: expected a valid integer, got 'one'"),
        ({"version": 2}, "version: expected 1, got 2"),
        (
            {"data": {"name": "mnist"}},
            "data.name: unknown data set 'mnist'; expected one of cifar10, .*digits, .* or module:function",
        ),
        ({"data": {"name": "digits", "args": {"scale": 2}}}, "data.args.scale: unknown argument"),
        ({"model": {"name": "vgg"}}, "model.name: unknown model 'vgg'; expected one of .*lstm, .*resnet18, .*module:function"),
        ({"plan": [{"layers": "hidden"}]}, "plan.0.*expected exactly one of ranks and params"),
        ({"plan": [{"published": "resnet18", "layers": "x"}]}, "plan.0.published.layers: unknown key"),
        ({"plan": [{"published": "resnet18"}]}, "plan.0: layer .*: not in the model"),
        ({"plan": [{"file": "none.json", "ranks": 3}]}, "plan.0.file.ranks: unknown key"),
        ({"plan": [{"file": "none.json"}]}, "plan.0: none.json: cannot be read"),
        ({"plan": [{"layers": "hidden", "params": 500.0}]}, "plan.0: parameters cannot be reduced 500×"),
        ({"model": {"name": "small_resnet"}}, "model.args: small_resnet cannot be created"),
        ({"plan": [{"layers": "nothing*", "ranks": 4}]}, "plan.0: no layer matches 'nothing"),
        ({"plan": [{"layers": "hidden", "ranks": [1, 99, 1]}]}, "plan.0: .*expected ranks of at most .*, got "),
        ({"plan": [{"layers": "hidden", "ranks": [1, 2, 3, 1]}]}, "expected 3 ranks"),
        ({"plan": [{"layers": "hidden", "ranks": 0}]}, "plan.0: .*1 or larger"),
        ({"plan": [{"layers": "hidden", "ranks": 2, "format": "xx"}]}, "plan.0: unknown format 'xx': expected one of"),
        ({"train": SMALL["train"] | {"dense": {"epochs": 0, "lr": 1.0}}}, "train.dense.epochs: .*greater than or equal to 1"),
        ({"plan": [{"layers": "hidden", "ranks": 2, "merge": "all"}]}, "unknown merge 'all'"),
        ({"train": SMALL["train"] | {"cuda_graph": True, "mixup": 0.2}}, "train: .*mixup, which changes the work"),
        (
            {"train": SMALL["train"] | {"cuda_graph": True, "precision": "fp16"}},
            "train: .*precision: fp16, which changes the work",
        ),
        ({"train": SMALL["train"] | {"distill": {"teacher": {"name": "vgg"}}}}, "train.distill.teacher.weights: expected the"),
        (
            {"train": SMALL["train"] | {"distill": {"teacher": {"name": "vgg", "weights": "a"}}}},
            "train.distill.teacher.name: unknown model 'vgg'",
        ),
    ],
)
def test_a_bad_recipe_is_one_line_with_its_key(tmp_path, change, reason):
    with pytest.raises(RecipeError, match=reason) as caught:
        Recipe.load(write(tmp_path, **change))
    assert "\n" not in str(caught.value)
    assert str(caught.value).startswith(str(tmp_path))


def test_a_network_that_was_trained_before_teaches(tmp_path, monkeypatch):
    teachers = {}
    real = phases.train
    monkeypatch.setattr(
        phases, "train", lambda phase, *rest: teachers.update({phase.name: phase.teacher}) or real(phase, *rest)
    )

    def trained(name, **changes):
        recipe = small(tmp_path, **changes)
        prepare(recipe, tmp_path / name)
        return train_all(recipe, tmp_path / name)[0]

    wider = {"name": "small_resnet", "args": {"widths": [24], "blocks": 1, "hidden": 16}}
    brief = SMALL["train"] | SHORT | {"control": {"epochs": 1, "lr": 0.02}}
    trained("wider", model=wider, plan=[{"layers": "hidden", "ranks": 2}], train=brief)
    weights = tmp_path / "wider" / "dense.safetensors"
    distill = {"weight": 1.0, "teacher": wider | {"weights": str(weights)}}
    assert teachers == dict.fromkeys(("dense", "admm", "finetune", "control"))
    long = brief | {phase: SMALL["train"][phase] for phase in ("dense", "admm")}
    taught = trained("taught", train=long | {"distill": distill})
    assert teachers.pop("dense") is None
    assert [(name, next(one.parameters()).shape[0]) for name, one in teachers.items()] == [
        ("admm", 24),
        ("finetune", 24),
        ("control", 24),
    ]
    alone = trained("alone", train=long | {"distill": {"weight": 1.0}})
    dense, admm = (
        [row.loss for one in (taught, alone) for row in one.rows if row.phase == phase] for phase in ("dense", "admm")
    )
    assert dense[:2] == dense[2:]  # it teaches what comes after
    assert admm[:2] != admm[2:]
    weights.unlink()
    with pytest.raises(WeightsError, match="cannot be read"):
        small(tmp_path, train=SMALL["train"] | {"distill": distill}).make_teacher()


def test_a_recipe_that_is_not_there_or_not_yaml_is_refused(tmp_path):
    with pytest.raises(RecipeError, match="cannot be read"):
        Recipe.load(tmp_path / "none.yaml")
    (tmp_path / "bad.yaml").write_text("a: [")
    with pytest.raises(RecipeError, match="not valid YAML: line 1, column 5: "):
        Recipe.load(tmp_path / "bad.yaml")
    (tmp_path / "list.yaml").write_text("- 1")
    with pytest.raises(RecipeError, match="the file"):
        Recipe.load(tmp_path / "list.yaml")


def test_a_saved_recipe_reads_back_the_same(tmp_path):
    recipe = small(tmp_path)
    recipe.save(tmp_path / "again.yaml")
    assert Recipe.load(tmp_path / "again.yaml") == recipe


def test_a_report_is_plain_json(ended):
    raw = json.loads((ended.folder / "report.json").read_text())
    assert raw["version"] == 1
    assert len(raw["latency"][0]["latencies"][0]["samples"]) == raw["latency"][0]["rounds"]


def test_a_key_that_comes_twice_is_refused(tmp_path):
    path = write(tmp_path)
    path.write_text(path.read_text() + "seed: 1\nseed: 2\n")
    with pytest.raises(RecipeError, match=r"not valid YAML: .*found the key 'seed' twice"):
        Recipe.load(path)


def test_convolutions_of_two_and_three_axes_and_cores_of_five_train_together(tmp_path):
    net = nn.ModuleDict({"flat": nn.Conv2d(4, 8, 3), "deep": nn.Conv3d(4, 8, 3)})
    place(net, torch.device("cpu"), channels_last=True)
    assert net["flat"].weight.is_contiguous(memory_format=torch.channels_last)
    assert net["deep"].weight.is_contiguous()
    dense = nn.Sequential(nn.Conv2d(8, 8, 3))
    cores = plan_layers(dense, "0", format="tucker", modes=[4, 2, 9, 4, 2], ranks=2)
    cut = swap(dense, Plan(layers=cores))
    place(cut, torch.device("cpu"), channels_last=True)
    assert cut(torch.randn(2, 8, 6, 6).contiguous(memory_format=torch.channels_last)).shape == (2, 8, 4, 4)
    dense = nn.Sequential(nn.Conv2d(8, 8, 1), nn.Conv2d(8, 8, 3, groups=2))
    cut = swap(dense, Plan(layers=plan_layers(dense, "1", ranks=3)))
    place(cut, torch.device("cpu"), channels_last=True)
    assert [core.dim() for core in cut[1].cores] == [4, 4, 4]
    assert all(core.is_contiguous() for core in cut[1].cores)


def test_a_number_without_a_point_is_a_number(tmp_path):
    path = write(tmp_path)
    text = path.read_text()
    path.write_text(text.replace("lr: 0.05", "lr: 5e-2").replace("rho: 0.1", "rho: 1E-1"))
    assert path.read_text() != text
    assert Recipe.load(path) == small(tmp_path)


def test_a_misspelled_key_is_told_with_the_key_that_is_missing(tmp_path):
    path = write(tmp_path)
    path.write_text(path.read_text().replace("model:", "modle:"))
    with pytest.raises(RecipeError, match=r"modle: unknown key; did you mean 'model'\?"):
        Recipe.load(path)


@pytest.mark.parametrize(
    ("text", "reason"),
    [
        ("version: 1\nname: 2020-13-45", "line 2, column 7: '2020-13-45' is not a valid timestamp"),
        ("version: 1\nname: !!bool maybe", "line 2, column 7: 'maybe' is not a valid bool"),
        ("version: 1\nname: !!timestamp noon", "line 2, column 7: 'noon' is not a valid timestamp"),
        ("version: 1\nname: {{ run }}", "line 2, column 8: found unhashable key"),  # a template that was not filled in
        ("? [a]\n: 1", "line 1, column 3: found unhashable key"),
        ("data: !!map [a]", "line 1, column 7: expected a mapping node, but found sequence"),
        ("data: !!set a", "line 1, column 7: expected a mapping node, but found scalar"),
        ('name: "\\UFFFFFFFF"', "."),
        ("[" * 1200, "."),
        ("a: [", "line 1, column 5: ."),
        ("{", "."),
    ],
)
def test_what_is_no_yaml_is_refused_in_one_line(text, reason, tmp_path):
    (tmp_path / "r.yaml").write_text(text)
    with pytest.raises(RecipeError, match=f"r.yaml: not valid YAML: {reason}") as found:
        Recipe.load(tmp_path / "r.yaml")
    assert "\n" not in str(found.value)


def test_ranks_and_cut_by_activations(tmp_path):
    """The cores are those of the metric of the layers' inputs, also behind an ADMM phase in the plain one."""
    rule = {"layers": "stages.*.conv?", "params": 1.3, "metric": "activation"}
    cut = {}
    for name, admm in (("cut", None), ("admm", SHORT["admm"])):
        for metric in ("activation", "weight"):
            phases = {phase: SHORT[phase] for phase in ("dense", "finetune")} | ({"admm": admm} if admm else {})
            settings = SMALL["train"] | phases | {"cut": metric, "control": "none"}
            if admm is None:
                del settings["admm"]
            folder = tmp_path / f"{name}-{metric}"
            recipe = small(tmp_path, plan=[rule], train=settings)
            prepare(recipe, folder)
            trained, _ = train_all(recipe, folder)
            cut[name, metric] = trained
        one, other = cut[name, "activation"], cut[name, "weight"]
        assert one.plan == other.plan == Plan.load(tmp_path / f"{name}-weight" / "plan.json")
        assert set(one.roots) == {layer.name for layer in one.plan.layers}
        assert other.roots == {}
        assert one.cut_accuracy != other.cut_accuracy or one.rows[-1].loss != other.rows[-1].loss


@pytest.mark.parametrize("admm", [False, True])
def test_trained_weights_are_cut_by_activations_unless_the_recipe_says_otherwise(admm, tmp_path):
    phases = {phase: SHORT[phase] for phase in ("dense", "finetune", *(["admm"] if admm else []))}
    settings = {key: value for key, value in SMALL["train"].items() if key != "admm"} | phases | {"control": "none"}
    trained = {}
    for name, metric in (("default", {}), ("asked", {"metric": "activation"}), ("weight", {"metric": "weight"})):
        recipe = small(tmp_path, plan=[{"layers": "stages.*.conv?", "params": 1.3} | metric], train=settings)
        prepare(recipe, tmp_path / name)
        trained[name], _ = train_all(recipe, tmp_path / name)
    assert trained["default"].plan == trained["asked"].plan
    assert trained["default"].roots.keys() == {layer.name for layer in trained["default"].plan.layers}
    assert trained["default"].cut_accuracy == trained["asked"].cut_accuracy
    assert trained["weight"].roots == {}
    assert trained["weight"].plan != trained["default"].plan


@pytest.mark.parametrize(("kind", "pattern"), [("deep", "lstm.*"), ("groups", "conv"), ("read", "out")])
def test_weights_whose_inputs_cannot_be_measured_are_cut_as_they_are(kind, pattern, tmp_path):
    """Layers that no metric of inputs supports, and one that only a batch shows to be such: its weight is read, not called."""
    settings = {phase: SHORT[phase] for phase in ("dense", "finetune")} | {"batch": 32, "control": "none"}
    recipe = small(tmp_path, model=over_rows(kind), plan=[{"layers": pattern, "params": 1.05}], train=settings)
    prepare(recipe, tmp_path / "run")
    trained, _ = train_all(recipe, tmp_path / "run")
    assert trained.plan.layers
    assert trained.roots == {}


def test_a_rule_may_ask_for_a_metric_that_layers_of_others_do_not_have(tmp_path):
    settings = {phase: SHORT[phase] for phase in ("dense", "finetune")} | {"batch": 32, "control": "none"}
    rules = [{"layers": "out", "params": 1.01, "metric": "activation"}, {"layers": "lstm.weight_hh_l0", "ranks": 2}]
    recipe = small(tmp_path, model=over_rows("deep"), plan=rules, train=settings)
    prepare(recipe, tmp_path / "run")
    notes = []
    trained, _ = train_all(recipe, tmp_path / "run", lambda stage, share, text: notes.append(text))
    assert [layer.name for layer in trained.plan.layers] == ["out", "lstm.weight_hh_l0"]
    assert trained.roots == {}
    assert any(text.startswith("cut so that the weights change least: test accuracy") for text in notes)


def test_a_run_says_why_ranks_are_chosen_by_the_weights(tmp_path):
    settings = {phase: SHORT[phase] for phase in ("dense", "finetune")} | {"batch": 32, "control": "none"}
    recipe = small(tmp_path, model=over_rows("groups"), plan=[{"layers": "conv", "params": 1.05}], train=settings)
    prepare(recipe, tmp_path / "run")
    notes = []
    train_all(recipe, tmp_path / "run", lambda stage, share, text: notes.append(text))
    reason = "ranks of 'conv' are chosen by the weights, not by the outputs of the layers: layer conv: `metric: activation` "
    assert any(text.startswith(reason) for text in notes)


def test_one_test_sample_is_too_few_for_the_export(tmp_path):
    sizes = {"channels": 1, "classes": 10}
    model = {"name": "small_resnet", "args": SMALL["model"]["args"] | sizes}
    recipe = small(tmp_path, data={"name": f"{__name__}:one_tested"}, model=model)
    prepare(recipe, tmp_path / "run")
    with pytest.raises(RecipeError, match="data: expected two test samples or more"):
        train_all(recipe, tmp_path / "run")


def one_tested():
    images, labels = torch.rand(64, 1, 16, 16), torch.arange(64) % 10
    return Dataset("noise", 10, InMemory(images, labels), InMemory(images[:1], labels[:1]))


def test_cores_from_scratch_need_no_metric(tmp_path):
    settings = {"finetune": SHORT["finetune"], "control": "none"}
    recipe = small(tmp_path, plan=[{"layers": "stages.*.conv?", "params": 1.3}], train=settings)
    prepare(recipe, tmp_path / "run")
    assert train_all(recipe, tmp_path / "run")[0].roots == {}


@pytest.mark.parametrize(
    ("plan", "train", "reason"),
    [
        ({"ranks": 4, "metric": "activation"}, {}, "expected metric: activation together with params"),
        ({"params": 1.2, "metric": "activation", "modes": [4, 4, 8, 16]}, {}, "plan.0: layer hidden: .*expects one input mode"),
        ({"ranks": 4, "modes": [4, 4, 8, 16]}, {"cut": "activation"}, "train.cut: layer hidden: .*expects one input mode"),
        ({"ranks": 4}, {"cut": "outputs"}, "train.cut: "),
    ],
)
def test_a_metric_that_cannot_be_is_refused(plan, train, reason, tmp_path):
    with pytest.raises(RecipeError, match=reason):
        small(tmp_path, plan=[{"layers": "hidden"} | plan], train=SMALL["train"] | train)


def rows_of_images(kind, **_):
    """A network over the rows of images, with layers that not every metric and not every graph has a place for."""

    class Net(nn.Module):
        def __init__(self):
            super().__init__()
            self.attn = nn.MultiheadAttention(16, 2, batch_first=True)
            self.lstm = nn.LSTM(16, 8, num_layers=2, batch_first=True) if kind == "deep" else None
            self.places = nn.Embedding(16, 16) if kind == "places" else None
            self.conv = nn.Conv1d(16, 16, 3, padding=1, groups=4) if kind == "groups" else None
            self.out = nn.Linear(8 if kind == "deep" else 16, 10)
            self.register_buffer("positions", torch.arange(16))

        def forward(self, x):
            x = x.squeeze(1)
            x = x if self.conv is None else self.conv(x)
            x = x if self.places is None else x + self.places(self.positions)
            x = self.attn(x[:, :3] if kind == "memory" else x, x, x)[0]
            x = (x if self.lstm is None else self.lstm(x)[0]).mean(1)
            return nn.functional.linear(x, self.out.weight, self.out.bias) if kind == "read" else self.out(x)

    return Net()


def over_rows(kind):
    return {"name": f"{__name__}:rows_of_images", "args": {"kind": kind}}


@pytest.mark.parametrize("kind", ["deep", "groups"])
@pytest.mark.parametrize("metric", ["rule", "cut", "admm"])
def test_every_layer_of_a_pattern_is_checked_for_the_metric_when_a_recipe_is_read(metric, kind, tmp_path):
    """Not only the layers of some plan of the right size: the plan of the trained network may have others."""
    rule = {"layers": "*", "params": 1.01} | ({"metric": "activation"} if metric == "rule" else {})
    train = SMALL["train"] | ({"cut": "activation"} if metric == "cut" else {})
    if metric == "admm":
        train["admm"] = SMALL["train"]["admm"] | {"metric": "activation"}
    where = {"rule": "plan.0", "cut": "train.cut", "admm": "train.admm.metric"}[metric]
    layer = {"deep": "lstm.weight_ih_l1", "groups": "conv"}[kind]
    with pytest.raises(RecipeError, match=f"{where}: layer {layer}: `metric: activation` "):
        small(tmp_path, model=over_rows(kind), plan=[rule], train=train)


@pytest.mark.parametrize(
    ("kind", "train", "reason"),
    [
        ("memory", {"cut": "activation"}, "plan: layer attn.in_proj_weight: `metric: activation` expects self-attention"),
        ("memory", {}, "plan: layer attn.in_proj_weight: expected attention .* got different ones; .*: leave the layer out of"),
        ("places", {}, "plan: layer places: expected an embedding of indices that a run gives, .*: leave the layer out of"),
    ],
)
@pytest.mark.parametrize("ranks", [{"params": 1.01}, {"ranks": 2, "format": "svd"}])
def test_a_layer_that_cannot_be_measured_or_exported_is_found_before_anything_is_trained(ranks, kind, train, reason, tmp_path):
    recipe = small(tmp_path, model=over_rows(kind), plan=[{"layers": "*"} | ranks], train=SMALL["train"] | train)
    prepare(recipe, tmp_path / "run")
    with pytest.raises(RecipeError, match=reason):
        train_all(recipe, tmp_path / "run", listener(epoch=lambda *_: pytest.fail("it trained")))


def test_attention_to_oneself_is_cut_by_activations_and_exported(tmp_path):
    settings = {phase: SHORT[phase] for phase in ("dense", "finetune")} | {"batch": 32, "cut": "activation", "control": "none"}
    plan = [{"layers": "attn*", "ranks": 4, "format": "svd"}]
    recipe = small(tmp_path, model=over_rows("self"), plan=plan, train=settings)
    prepare(recipe, tmp_path / "run")
    trained, _ = train_all(recipe, tmp_path / "run")
    assert set(trained.roots) == {"attn.in_proj_weight", "attn.out_proj"}


def test_samples_to_measure_on_are_where_the_model_is_and_shared_out(tmp_path, monkeypatch):
    recipe = small(tmp_path, data=SMALL["data"] | {"args": {"test_fraction": 0.85, "size": 16}})
    whole = list(recipe.measured_inputs())
    assert len(whole) > 1
    assert {x.device.type for x in recipe.measured_inputs(device=torch.device("meta"))} == {"meta"}
    monkeypatch.setattr(recipes, "world", lambda: 2)
    shares = []
    for rank in (0, 1):
        monkeypatch.setattr(recipes, "rank", lambda rank=rank: rank)
        shares.append(list(recipe.measured_inputs()))
    for x, *parts in zip(whole, *shares, strict=True):
        assert torch.equal(x[0::2], parts[0])
        assert torch.equal(x[1::2], parts[1])
