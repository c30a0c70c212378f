"""ADMM in the trainers of other libraries gives the same network as in a plain loop, also where gradients are accumulated."""

import copy
import importlib
import os
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from torch import nn

import tensorrail as tr
from tensorrail.extras import MissingExtraError
from tensorrail.integrations.phase import Phase

# Both libraries and torch warn of each other's changes.
pytestmark = pytest.mark.filterwarnings("ignore::UserWarning", "ignore::FutureWarning", "ignore::DeprecationWarning")
RHO, LR, EPOCHS = 0.5, 0.1, 4


class Classifier(nn.Module):
    """x (batch, 12) and labels (batch,) → loss and logits (batch, 3)."""

    def __init__(self):
        super().__init__()
        self.hidden, self.head = nn.Linear(12, 16), nn.Linear(16, 3)

    def forward(self, x, labels=None):
        logits = self.head(self.hidden(x).relu())
        return {"loss": nn.functional.cross_entropy(logits, labels), "logits": logits}


@pytest.fixture(scope="module")
def data():
    generator = torch.Generator().manual_seed(1)
    x = torch.randn(32, 12, generator=generator)
    return x, (x @ torch.randn(12, 3, generator=generator)).argmax(1)


@pytest.fixture
def model():
    torch.manual_seed(0)
    return Classifier()


def plan_of(model, prefix=""):
    return tr.Plan(layers=tr.plan_layers(model, f"{prefix}hidden", format="svd", ranks=4))


def plain(model, data, epochs=EPOCHS, every=1, mixed=False):
    """Train in a plain loop, with all samples in a batch: one step an epoch. With `mixed`, the model computes in bf16."""
    x, y = data
    admm = tr.ADMM(model, plan_of(model), rho=RHO)
    optimizer = torch.optim.SGD(model.parameters(), lr=LR)
    for step in range(1, epochs + 1):
        optimizer.zero_grad()
        with torch.autocast("cpu", torch.bfloat16, enabled=mixed):
            loss = model(x, y)["loss"]
        (loss + admm.penalty()).backward()
        optimizer.step()
        if step % every == 0:
            admm.update()
    return admm


def same(model, other):
    for (name, ours), theirs in zip(model.state_dict().items(), other.state_dict().values(), strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-5, msg=lambda text, name=name: f"{name}: {text}")


def test_gradients_are_those_of_the_penalty(model, data):
    other = copy.deepcopy(model)
    for network, in_loss in ((model, True), (other, False)):
        admm = tr.ADMM(network, plan_of(network), rho=RHO)
        loss = network(*data)["loss"]
        (loss + admm.penalty() if in_loss else loss).backward()
        if not in_loss:
            admm.add_gradients()
    for ours, theirs in zip(model.parameters(), other.parameters(), strict=True):
        torch.testing.assert_close(ours.grad, theirs.grad)


def test_a_phase_that_has_not_begun_says_so(model):
    phase = Phase(plan_of(model), RHO, "weight", 0)
    assert phase.logged() == phase.state_dict() == {}
    with pytest.raises(tr.PlanError, match="ADMM has not begun: train with the callback first"):
        phase.factorize()
    with pytest.raises(ValueError, match="every: expected 0 or more steps between updates, got -1"):
        Phase(plan_of(model), RHO, "weight", -1)
    with pytest.raises(tr.PlanError, match="ADMM state: keys steps, epochs, admm are missing"):
        phase.load_state_dict({"rho": 1})


def test_a_checkpoint_is_for_the_model_that_is_trained_next(model):
    first, second = Phase(plan_of(model), RHO, "weight", 0), Phase(plan_of(model), RHO, "weight", 0)
    first.begin(model)
    with torch.no_grad():
        model.hidden.weight.add_(0.1)
    first.after_epoch()
    second.begin(model)
    second.load_state_dict(first.state_dict())
    other = copy.deepcopy(model)
    second.begin(other)
    assert second.admm.model is other
    torch.testing.assert_close(second.admm.U["hidden"], first.admm.U["hidden"])
    second.catch_up(1)  # the checkpoint was written after the update
    torch.testing.assert_close(second.admm.U["hidden"], first.admm.U["hidden"])
    second.catch_up(2)
    assert not torch.equal(second.admm.U["hidden"], first.admm.U["hidden"])


def test_parameters_of_another_optimizer_get_no_gradient(model):
    admm = tr.ADMM(model, plan_of(model), rho=RHO)
    assert not admm.add_gradients(model.head.parameters())
    assert all(parameter.grad is None for parameter in model.parameters())
    assert admm.add_gradients([model.hidden.weight])
    assert model.hidden.weight.grad is not None


def test_copies_of_a_model_on_several_gpus_have_no_moments(model):
    from tensorrail.integrations.transformers import ADMMCallback

    callback = ADMMCallback(plan_of(model), metric="activation")
    with pytest.raises(tr.PlanError, match=r"expects one GPU a process, got 2.*torchrun"):
        callback.on_train_begin(SimpleNamespace(n_gpu=2, deepspeed=None), SimpleNamespace(global_step=0), None, model=model)
    launched = SimpleNamespace(n_gpu=1, deepspeed=None, deepspeed_plugin=object())  # by `accelerate launch --use_deepspeed`
    with pytest.raises(tr.PlanError, match="DeepSpeed divides weights and gradients"):
        callback.on_train_begin(launched, SimpleNamespace(global_step=0), None, model=model)


@pytest.mark.parametrize("library", ["transformers", "lightning"])
def test_a_library_that_is_missing_is_named(library, monkeypatch):
    module = f"tensorrail.integrations.{library}"
    monkeypatch.delitem(sys.modules, module, raising=False)
    for name in [name for name in sys.modules if name == library or name.startswith(f"{library}.")]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.setitem(sys.modules, library, None)
    monkeypatch.setitem(sys.modules, "lightning.pytorch" if library == "lightning" else library, None)
    with pytest.raises(MissingExtraError, match=rf"needs {library}.*: install the extra `{library}`, as in pip install '\.\["):
        importlib.import_module(module)


class TestTransformers:
    @pytest.fixture
    def train(self, model, data, tmp_path):
        pytest.importorskip("transformers")
        from transformers import Trainer, TrainingArguments

        from tensorrail.integrations.transformers import ADMMCallback

        def train(parts=1, every=0, epochs=EPOCHS, resume=None, network=model, folder="run", **options):
            x, y = data
            callback = ADMMCallback(plan_of(network), rho=RHO, every=every, checkpoint=resume)
            args = TrainingArguments(
                output_dir=str(tmp_path / folder),
                num_train_epochs=epochs,
                per_device_train_batch_size=len(x) // parts,
                gradient_accumulation_steps=parts,
                learning_rate=LR,
                lr_scheduler_type="constant",
                optim="sgd",
                max_grad_norm=0.0,
                weight_decay=0.0,
                report_to=[],
                use_cpu=True,
                disable_tqdm=True,
                dataloader_pin_memory=False,
                **{"save_strategy": "no", **options},
            )
            rows = [{"x": row, "labels": label} for row, label in zip(x, y, strict=True)]
            trainer = Trainer(network, args, train_dataset=rows, callbacks=[callback])
            trainer.train(resume_from_checkpoint=resume)
            return trainer, callback

        return train

    @pytest.mark.parametrize("parts", [1, 4])
    def test_the_network_is_that_of_a_plain_loop(self, parts, train, model, data):
        other = copy.deepcopy(model)
        trainer, callback = train(parts)
        admm = plain(other, data)
        same(model, other)
        torch.testing.assert_close(callback.phase.admm.U["hidden"], admm.U["hidden"], rtol=1e-3, atol=1e-4)
        logged = [row for row in trainer.state.log_history if "admm/primal" in row]
        assert [row["step"] for row in logged] == list(range(1, EPOCHS + 1))

    def test_mixed_precision_leaves_the_penalty_in_single(self, train, model, data):
        other = copy.deepcopy(model)
        _, callback = train(bf16=True)
        admm = plain(other, data, mixed=True)
        same(model, other)
        torch.testing.assert_close(callback.phase.admm.Z["hidden"], admm.Z["hidden"], rtol=1e-3, atol=1e-4)

    def test_updates_may_be_counted_in_steps(self, train, model, data):
        other = copy.deepcopy(model)
        train(every=2)
        plain(other, data, every=2)
        same(model, other)

    @pytest.mark.parametrize("when", ["epoch", "steps"])
    def test_a_run_that_is_resumed_ends_in_the_same_network(self, when, train, model, tmp_path):
        start, whole = copy.deepcopy(model), copy.deepcopy(model)
        train(network=whole)
        train(epochs=2, save_strategy=when, save_steps=1)  # by steps: before the update of the epoch
        checkpoint = tmp_path / "run" / "checkpoint-2"
        assert (checkpoint / "tensorrail-admm.pt").exists()
        train(network=start, resume=str(checkpoint), folder="again")
        same(start, whole)
        (checkpoint / "tensorrail-admm.pt").unlink()
        with pytest.raises(tr.PlanError, match="not found: training goes on at step 2"):
            train(network=copy.deepcopy(model), resume=str(checkpoint))

    def test_finish_cuts_and_fine_tunes(self, train, model, data, tmp_path):
        trainer, callback = train(epochs=20)
        before = trainer.args.learning_rate
        network = callback.finish(trainer, epochs=3)
        assert trainer.args.learning_rate == pytest.approx(before / 10)
        assert set(tr.cores_of(network)) == {"hidden"}
        assert trainer.state.global_step == 3
        x, y = data
        trainer.save_model(str(tmp_path / "saved"))
        with torch.no_grad():
            assert float((network(x, y)["logits"].argmax(1) == y).float().mean()) > 0.6


class TestLightning:
    @pytest.fixture
    def module(self, model):
        pytest.importorskip("lightning")
        from lightning.pytorch import LightningModule

        class Module(LightningModule):
            def __init__(self):
                super().__init__()
                self.model = model

            def training_step(self, batch, _):
                return self.model(*batch)["loss"]

            def configure_optimizers(self):
                return torch.optim.SGD(self.parameters(), lr=LR)

        return Module()

    @pytest.fixture
    def fit(self, data, tmp_path):
        from lightning.pytorch import Trainer
        from torch.utils.data import DataLoader, TensorDataset

        from tensorrail.integrations.lightning import ADMMCallback

        def fit(module, parts=1, every=0, epochs=EPOCHS, resume=None, precision="32-true", saving=()):
            loader = DataLoader(TensorDataset(*data), batch_size=len(data[0]) // parts)
            callback = ADMMCallback(plan_of(module, "model."), rho=RHO, every=every)
            trainer = Trainer(
                max_epochs=epochs,
                accumulate_grad_batches=parts,
                callbacks=[callback, *saving],
                accelerator="cpu",
                precision=precision,
                logger=False,
                enable_checkpointing=bool(saving),
                enable_progress_bar=False,
                enable_model_summary=False,
                default_root_dir=tmp_path,
            )
            trainer.fit(module, loader, ckpt_path=resume)
            return trainer, callback, loader

        return fit

    @pytest.mark.parametrize("parts", [1, 4])
    def test_the_network_is_that_of_a_plain_loop(self, parts, fit, module, data):
        other = copy.deepcopy(module.model)
        trainer, callback, _ = fit(module, parts)
        admm = plain(other, data)
        same(module.model, other)
        torch.testing.assert_close(callback.phase.admm.U["model.hidden"], admm.U["hidden"], rtol=1e-3, atol=1e-4)
        assert float(trainer.callback_metrics["admm/primal"]) == pytest.approx(callback.residuals[0].primal, rel=1e-5)

    def test_mixed_precision_leaves_the_penalty_in_single(self, fit, module, data):
        other = copy.deepcopy(module.model)
        _, callback, _ = fit(module, precision="bf16-mixed")
        admm = plain(other, data, mixed=True)
        same(module.model, other)
        torch.testing.assert_close(callback.phase.admm.Z["model.hidden"], admm.Z["hidden"], rtol=1e-3, atol=1e-4)

    def test_updates_may_be_counted_in_steps(self, fit, module, data):
        other = copy.deepcopy(module.model)
        fit(module, parts=2, every=2)
        plain(other, data, every=2)
        same(module.model, other)

    def test_a_run_that_is_resumed_ends_in_the_same_network(self, fit, module, tmp_path):
        start, whole = copy.deepcopy(module), copy.deepcopy(module)
        fit(whole)
        trainer, _, _ = fit(module, epochs=2)
        trainer.save_checkpoint(tmp_path / "half.ckpt")
        fit(start, resume=tmp_path / "half.ckpt")
        same(start.model, whole.model)

    def test_a_checkpoint_of_the_last_batch_lacks_the_update_of_its_epoch(self, fit, module, tmp_path):
        """Lightning then takes the epoch for processed, and does not call `on_train_epoch_end` again."""
        from lightning.pytorch.callbacks import ModelCheckpoint

        start, whole = copy.deepcopy(module), copy.deepcopy(module)
        fit(whole)
        fit(module, epochs=2, saving=[ModelCheckpoint(tmp_path, "{step}", every_n_train_steps=1, save_top_k=-1)])
        fit(start, resume=tmp_path / "step=2.ckpt")
        same(start.model, whole.model)

    def test_finish_cuts_and_fine_tunes(self, fit, module, data, tmp_path):
        from lightning.pytorch import Trainer

        _, callback, loader = fit(module, epochs=20)
        quiet = {"logger": False, "enable_checkpointing": False, "enable_progress_bar": False, "enable_model_summary": False}
        trainer = Trainer(max_epochs=3, accelerator="cpu", default_root_dir=tmp_path, **quiet)
        assert callback.finish(trainer, module, loader) is module
        assert set(tr.cores_of(module)) == {"model.hidden"}
        assert trainer.global_step == 3
        x, y = data
        with torch.no_grad():
            assert float((module.model(x, y)["logits"].argmax(1) == y).float().mean()) > 0.6


SCRIPT = """
import sys, torch
sys.path.insert(0, {folder!r})
import test_callbacks as cases
import tensorrail as tr

generator = torch.Generator().manual_seed(1)
x = torch.randn(32, 12, generator=generator)
y = (x @ torch.randn(12, 3, generator=generator)).argmax(1)
torch.manual_seed(0)
model = cases.Classifier()
plan = cases.plan_of(model)
{training}
if torch.distributed.get_rank() == 0:
    torch.save(model.state_dict(), {out!r})
torch.distributed.destroy_process_group()
"""
OF_TRANSFORMERS = """
from transformers import Trainer, TrainingArguments
from tensorrail.integrations.transformers import ADMMCallback

args = TrainingArguments(
    {work!r}, num_train_epochs=cases.EPOCHS, per_device_train_batch_size=len(x) // 2, learning_rate=cases.LR,
    lr_scheduler_type="constant", optim="sgd", max_grad_norm=0.0, save_strategy="no", report_to=[], use_cpu=True,
    ddp_backend="gloo", disable_tqdm=True, dataloader_pin_memory=False,
)
rows = [dict(x=row, labels=label) for row, label in zip(x, y)]
Trainer(model, args, train_dataset=rows, callbacks=[ADMMCallback(plan, rho=cases.RHO)]).train()
"""
OF_LIGHTNING = """
from lightning.pytorch import LightningModule, Trainer
from torch.utils.data import DataLoader, TensorDataset
from tensorrail.integrations.lightning import ADMMCallback


class Module(LightningModule):
    def __init__(self):
        super().__init__()
        self.model = model

    def training_step(self, batch, _):
        return self.model(*batch)["loss"]

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), lr=cases.LR)


module = Module()
loader = DataLoader(TensorDataset(x, y), batch_size=len(x) // 2)
Trainer(
    max_epochs=cases.EPOCHS, callbacks=[ADMMCallback(cases.plan_of(module, "model."), rho=cases.RHO)], accelerator="cpu",
    devices=2, strategy="ddp", logger=False, enable_checkpointing=False, enable_progress_bar=False, enable_model_summary=False,
).fit(module, loader)
"""


@pytest.mark.parametrize(("library", "training"), [("transformers", OF_TRANSFORMERS), ("lightning", OF_LIGHTNING)])
def test_two_processes_train_the_same_network_as_one(library, training, model, data, tmp_path):
    pytest.importorskip(library)
    out, script = tmp_path / "trained.pt", tmp_path / "train.py"
    training = training.format(work=str(tmp_path / "work"))
    script.write_text(SCRIPT.format(folder=str(Path(__file__).parent), training=training, out=str(out)))
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2", str(script)]
    path = os.pathsep.join([*(place for place in sys.path if place)])
    done = subprocess.run(
        command, env=os.environ | {"PYTHONPATH": path}, capture_output=True, text=True, timeout=120, check=False
    )
    assert done.returncode == 0, done.stderr[-2000:]
    plain(model, data)
    trained = copy.deepcopy(model)
    trained.load_state_dict(torch.load(out, weights_only=True))
    same(trained, model)
