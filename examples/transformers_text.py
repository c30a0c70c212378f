"""ADMM under transformers.Trainer: a small BERT tells from which package of Python a docstring comes.

    python examples/transformers_text.py [--epochs 6] [--out FOLDER]

The texts are docstrings of Python's standard library, as bytes; nothing is downloaded. It takes about a minute.
"""

from __future__ import annotations

import argparse
import ast
import random
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from transformers import BertConfig, BertForSequenceClassification, PrinterCallback, Trainer, TrainingArguments

import tensorrail as tr
from tensorrail.integrations.transformers import ADMMCallback

PACKAGES = ("asyncio", "email", "unittest", "xml")
LENGTH, LR = 64, 1e-3


def docstrings(package: str) -> Iterator[str]:
    """Yield the first lines of all docstrings of a package."""
    for path in sorted((Path(ast.__file__).parent / package).rglob("*.py")):
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef) and (text := ast.get_docstring(node)):
                yield " ".join(text.split())[:LENGTH]


def texts() -> tuple[list[dict[str, Any]], list[dict[str, Any]]]:
    """Return the texts to train on and others, as bytes + 1 with 0 for padding, in random order; as many of each package."""
    found = [list(dict.fromkeys(docstrings(package))) for package in PACKAGES]
    shuffler = random.Random(0)  # noqa: S311 - for the order of texts
    rows = []
    for label, own in enumerate(found):
        for text in shuffler.sample(own, min(map(len, found))):
            codes = [byte + 1 for byte in text.encode()[:LENGTH]]
            ids = torch.tensor(codes + [0] * (LENGTH - len(codes)))
            rows.append({"input_ids": ids, "attention_mask": (ids > 0).long(), "labels": label})
    shuffler.shuffle(rows)
    return rows[len(rows) // 5 :], rows[: len(rows) // 5]


class Logits(nn.Module):
    """The classifier with tensors for its input and output, for the export."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model

    def forward(self, input_ids: Tensor, attention_mask: Tensor) -> Tensor:
        """Return the logits (batch, packages)."""
        logits: Tensor = self.model(input_ids=input_ids, attention_mask=attention_mask).logits
        return logits


def accuracy(output: Any) -> dict[str, float]:
    """Return the accuracy in percent, as the trainer asks for it."""
    return {"accuracy": 100 * float((output.predictions.argmax(1) == output.label_ids).mean())}


def main() -> None:
    """Train a dense network, train it toward low rank, cut and fine-tune it, and export it."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--epochs", type=int, default=6, help="Epochs of the ADMM phase.")
    parser.add_argument("--out", type=Path, help="Folder for the exported model. Default: none is kept.")
    options = parser.parse_args()
    train, test = texts()
    torch.manual_seed(0)
    config = BertConfig(
        vocab_size=257, hidden_size=64, num_hidden_layers=2, num_attention_heads=4, intermediate_size=256,
        max_position_embeddings=LENGTH, num_labels=len(PACKAGES), attn_implementation="eager",
    )  # fmt: skip
    model = BertForSequenceClassification(config)
    with tempfile.TemporaryDirectory() as folder:

        def trainer_of(epochs: int, *callbacks: ADMMCallback) -> Trainer:
            args = TrainingArguments(
                folder, num_train_epochs=epochs, learning_rate=LR, per_device_train_batch_size=32, use_cpu=True,
                save_strategy="no", logging_strategy="no", report_to=[], disable_tqdm=True, dataloader_pin_memory=False,
            )  # fmt: skip
            trainer = Trainer(
                model, args, train_dataset=train, eval_dataset=test, compute_metrics=accuracy, callbacks=list(callbacks)
            )
            trainer.remove_callback(PrinterCallback)
            return trainer

        trainer = trainer_of(12)
        trainer.train()
        print(f"dense: {trainer.evaluate()['eval_accuracy']:.1f} %")
        plan = tr.Plan(layers=tr.plan_layers(model, "bert.encoder.*.dense", format="svd", ranks=16))
        callback = ADMMCallback(plan, rho=0.02)
        trainer = trainer_of(options.epochs, callback)
        trainer.train()
        largest = max(residual.primal for residual in callback.residuals)
        print(f"after ADMM, still dense: {trainer.evaluate()['eval_accuracy']:.1f} %, largest primal residual {largest:.3f}")
        callback.finish(trainer, epochs=2)
        print(f"cut into cores and fine-tuned: {trainer.evaluate()['eval_accuracy']:.1f} %")
        example = {name: torch.stack([row[name] for row in test[:2]]) for name in ("input_ids", "attention_mask")}
        report = tr.export_trained(Logits(model).eval(), example, options.out or Path(folder) / "exported")
        print(f"model.onnx differs from the module by {report.torch_difference:.1e}; {report.layers} layers made of cores")


if __name__ == "__main__":
    main()
