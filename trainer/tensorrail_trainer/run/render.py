"""A report as Markdown, and as one self-contained HTML page with inline plots."""

from __future__ import annotations

import io
from collections.abc import Iterable, Sequence
from html import escape
from typing import TYPE_CHECKING

import numpy as np

from tensorrail_trainer.run.report import Report
from tensorrail_trainer.training.epochs import Epoch

if TYPE_CHECKING:
    from matplotlib.figure import Figure

_STYLE = (
    "body{font:15px/1.5 system-ui,sans-serif;max-width:64rem;margin:2rem auto;padding:0 1rem;color:#222}"
    "table{border-collapse:collapse;margin:1rem 0;display:block;overflow-x:auto}"
    "td,th{border-bottom:1px solid #ddd;padding:.3rem .8rem;text-align:left;white-space:nowrap}"
    "svg{max-width:100%;height:auto}.no{color:#b00020;font-weight:600}"
)


def markdown(report: Report) -> str:
    """Return the report as Markdown."""
    sections = [f"# {report.name}", f"{report.data}. Made by `{report.command}`.", "## Dense against factored"]
    sections.append(_md_table(report.head(), report.table()))
    sections += ["## Three errors", _md_table(("error", "measured"), report.errors())]
    sections += [
        "## Targets",
        _md_table(_CHECK_HEAD, _checks(report)),
        "## Layers",
        _md_table(_LAYER_HEAD, _layers(report)),
        *([_md_table(_DENSE_HEAD, _dense(report))] if report.dense else []),
    ]
    sections += ["## Training", _md_table(_PHASE_HEAD, _phases(report)), "## Machine", _machine(report)]
    return "\n\n".join(sections) + "\n"


def html(report: Report) -> str:
    """Return the report as one HTML page that loads no other files."""
    sections = [
        f"<h1>{escape(report.name)}</h1><p>{escape(report.data)}. Made by <code>{escape(report.command)}</code>.</p>",
        "<h2>Dense against factored</h2>" + _html_table(report.head(), report.table()),
        "<h2>Three errors</h2>" + _html_table(("error", "measured"), report.errors()),
        "<h2>Targets</h2>" + _html_table(_CHECK_HEAD, _checks(report)),
        "<h2>Latency</h2>" + _svg(_latency_figure(report)),
        "<h2>Training</h2>" + _svg(_training_figure(report.training)) + _html_table(_PHASE_HEAD, _phases(report)),
        "<h2>Layers</h2>"
        + _svg(_layer_figure(report))
        + _html_table(_LAYER_HEAD, _layers(report))
        + (_html_table(_DENSE_HEAD, _dense(report)) if report.dense else ""),
        f"<h2>Machine</h2><p>{escape(_machine(report))}</p>",
    ]
    body = "\n".join(sections)
    title = escape(report.name)
    return (
        f'<!doctype html>\n<html lang="en"><head><meta charset="utf-8"><title>{title}</title>'
        f"<style>{_STYLE}</style></head><body>\n{body}\n</body></html>\n"
    )


_CHECK_HEAD = ("target", "required", "measured", "met")
_LAYER_HEAD = (
    "layer",
    "format",
    "modes",
    "ranks",
    "runs as",
    "dense parameters",
    "core parameters",
    "stored parameters",
    "merged cores",
    "FLOPs",
    "share of FLOPs",
    "share of time",
    "weight error",
)
_DENSE_HEAD = ("layer that stays dense", "reason")
_PHASE_HEAD = ("phase", "epochs", "final loss", "final test accuracy", "largest primal residual", "time (s)")


def _checks(report: Report) -> list[tuple[str, ...]]:
    return [(check.name, check.target, check.measured, "yes" if check.holds else "NO") for check in report.checks]


def _layers(report: Report) -> list[tuple[str, ...]]:
    return [
        (
            row.layer,
            row.format,
            "·".join(map(str, row.modes)),
            "·".join(map(str, row.ranks)),
            row.steps,
            f"{row.dense_params:,}",
            f"{row.core_params:,}",
            f"{row.stored_params:,}",
            " ".join("+".join(map(str, group)) for group in row.merged if len(group) > 1) or "none",
            f"{row.flops:,}",
            f"{row.flops / report.model('factored').cost.flops:.1%}",
            f"{row.time_share:.1%}",
            f"{row.weight_error:.1e}",
        )
        for row in report.layers
    ]


def _dense(report: Report) -> list[tuple[str, ...]]:
    return [(row.layer, row.reason) for row in report.dense]


def _phases(report: Report) -> list[tuple[str, ...]]:
    rows: list[tuple[str, ...]] = []
    for phase in dict.fromkeys(epoch.phase for epoch in report.training):
        epochs = [epoch for epoch in report.training if epoch.phase == phase]
        last = epochs[-1]
        primal = max((primal for primal, _ in last.residuals.values()), default=None)
        rows.append(
            (
                phase,
                str(len(epochs)),
                f"{last.loss:.4f}",
                f"{last.test_accuracy:.2f} %",
                "–" if primal is None else f"{primal:.4f}",
                f"{sum(epoch.seconds for epoch in epochs):.1f}",
            )
        )
    return rows


def _machine(report: Report) -> str:
    run = report.latency[0]
    threads = run.threads or "ONNX Runtime's own choice of"
    return (
        f"{run.machine.processor}, {run.machine.cores} cores, {run.machine.system}; ONNX Runtime {run.machine.onnxruntime}, "
        f"provider {run.provider}, {threads} threads; times interleaved A B B A{run.fresh}, 95 % confidence intervals."
    )


def _md_table(head: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    lines = ["| " + " | ".join(head) + " |", "|" + "---|" * len(head)]
    return "\n".join(lines + ["| " + " | ".join(row) + " |" for row in rows])


def _html_table(head: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    def cell(text: str) -> str:
        return f'<td class="no">{text}</td>' if text == "NO" else f"<td>{escape(text)}</td>"

    top = "".join(f"<th>{escape(text)}</th>" for text in head)
    body = "".join("<tr>" + "".join(map(cell, row)) + "</tr>" for row in rows)
    return f"<table><tr>{top}</tr>{body}</table>"


def _latency_figure(report: Report) -> Figure:
    from matplotlib.figure import Figure

    figure = Figure(figsize=(9, 3), layout="constrained")
    for axes, run in zip(figure.subplots(1, len(report.latency), squeeze=False)[0], report.latency, strict=True):
        top = max(float(np.percentile(latency.samples, 90)) for latency in run.latencies) * 1.3
        for latency in run.latencies:
            axes.hist(latency.samples, bins=60, range=(0, top), alpha=0.6, label=latency.model)
        axes.set(title=f"batch {run.batch}", xlabel="latency (ms)", ylabel="runs")
        axes.legend()
    return figure


def _layer_figure(report: Report) -> Figure:
    """Plot the FLOPs, the time and the parameters of each layer."""
    from matplotlib.figure import Figure

    rows = report.layers
    figure = Figure(figsize=(9, 1 + 0.35 * len(rows)), layout="constrained")
    left, right = figure.subplots(1, 2, sharey=True)
    places = np.arange(len(rows))
    total = report.model("factored").cost.flops
    left.barh(places - 0.2, [100 * row.flops / total for row in rows], 0.4, label="FLOPs")
    left.barh(places + 0.2, [100 * row.time_share for row in rows], 0.4, label="time, batch 1")
    left.set(xlabel="share of the factored model (%)", yticks=places, yticklabels=[row.layer for row in rows])
    left.invert_yaxis()
    left.legend(fontsize="small")
    right.barh(places - 0.2, [row.dense_params / 1e3 for row in rows], 0.4, label="dense", color="tab:gray")
    right.barh(places + 0.2, [row.stored_params / 1e3 for row in rows], 0.4, label="stored cores", color="tab:green")
    right.set(xlabel="parameters (thousands)")
    right.legend(fontsize="small")
    return figure


def _training_figure(training: Sequence[Epoch]) -> Figure:
    from matplotlib.figure import Figure

    figure = Figure(figsize=(9, 3), layout="constrained")
    layers = dict.fromkeys(name for epoch in training for name in epoch.residuals)
    left, *others = figure.subplots(1, 2 if layers else 1, squeeze=False)[0]
    offset: dict[str, int] = {}
    end = 0
    for phase in dict.fromkeys(epoch.phase for epoch in training):
        rows = [epoch for epoch in training if epoch.phase == phase]
        # The control starts from the dense baseline, as ADMM does, or fine-tuning without ADMM.
        offset[phase] = offset.get("admm", offset.get("finetune", end)) if phase == "control" else end
        left.plot([offset[phase] + e.epoch for e in rows], [e.test_accuracy for e in rows], label=phase)
        end = offset[phase] + rows[-1].epoch
    left.set(xlabel="epoch", ylabel="test accuracy (%)")
    left.legend()
    for right in others:
        for layer in layers:
            rows = [epoch for epoch in training if layer in epoch.residuals]
            right.plot([e.epoch for e in rows], [max(e.residuals[layer][0], 1e-12) for e in rows], label=layer)
        right.set(xlabel="ADMM epoch", ylabel="primal residual ‖W−Z‖/‖W‖", yscale="log")
        right.legend(fontsize="xx-small")
    return figure


def _svg(figure: Figure) -> str:
    buffer = io.StringIO()
    figure.savefig(buffer, format="svg", metadata=dict.fromkeys(("Date", "Creator", "Format", "Type")))
    text = buffer.getvalue()
    return text[text.index("<svg") :]
