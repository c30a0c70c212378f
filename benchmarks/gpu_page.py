"""The page of what benchmarks/gpu.py measured."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

Log = dict[str, Any]
PARITY = {"fp32": 1e-4}  # the largest relative L2 difference; those of the other precisions are reported


def markdown(log: Log) -> str:
    """Return the page of what was measured."""
    found = log["machine"]
    device = "a dry run on the CPU" if log["provider"] == "cpu" else found["gpu"]["name"]
    driver = "" if log["provider"] == "cpu" else f", driver {found['gpu']['driver']}"
    return "\n".join(
        [
            f"# On a GPU: {device}",
            "",
            f"{found['processor']}{driver}, ONNX Runtime {found['onnxruntime']}. Random weights; all forms of a network in "
            "interleaved runs, each row in one fresh process: intervals do not include differences between processes. Inputs "
            "and outputs are on the device. Commands, one after the other:",
            "",
            *(f"- `python benchmarks/gpu.py {arguments}`" for arguments in log["commands"]),
            *_peaks_lines(log.get("peaks")),
            *_table(
                "Plans",
                "network, rank grid|for|FLOPs reduction asked|layers|formats|predicted|measured|took",
                (
                    f"{row['network']}, {row['grid']}|{row['mode']}, batch {row['batch']}|"
                    + (
                        f"{row['target']:g}|{row['layers']} of {row['of']}|{', '.join(row['formats'])}|{row['predicted']:.2f}×"
                        f"|{_times(row['measured'])}|{row['seconds']:.0f} s"
                        if "target" in row
                        else f"none could be met|–|–|–|–|{row['seconds']:.0f} s"
                    )
                    for row in log["plan"]
                ),
            ),
            *_table(
                "Layers, one at a time",
                "network, rank grid|for|layer|forms timed|dense|the fastest form|takes|speed-up",
                (
                    f"{row['network']}, {row['grid']}|{row['mode']}, batch {row['batch']}|{row['layer']}|{row['forms']}"
                    f"|{row['dense']:.3f} ms|"
                    + (f"{row['form']}|{row['ms']:.3f} ms|{row['dense'] / row['ms']:.2f}×" if "form" in row else "–|–|–")
                    for row in log.get("layers", [])
                ),
            ),
            *_table(
                "Placement and parity",
                "network|form|nodes|ran on|elsewhere|" + "|".join(f"{mode} difference" for mode in ("fp32", "tf32", "fp16")),
                (
                    f"{row['network']}|{row['form']}|{row['nodes']}"
                    f"|{', '.join(f'{count} {_short(where)}' for where, count in row['providers'].items())}"
                    f"|{', '.join(row['elsewhere']) or 'none'}|"
                    + "|".join(_difference(row, precision) for precision in ("fp32", "tf32", "fp16"))
                    for row in log["placement"]
                ),
            ),
            *_table(
                "Latency",
                "network|batch|mode|form|MACs reduction|p50|speed-up|95 %|bound|share of it",
                (
                    f"{row['network']}|{row['batch']}|{row['mode']}|{row['form']}|{row['macs']:.2f}|{row['ms']:.3f} ms"
                    f"|{row['speed_up'][0]:.2f}×|{row['speed_up'][1]:.2f}–{row['speed_up'][2]:.2f}|{_bound(row)}"
                    for row in log["latency"]
                ),
            ),
            *_table(
                "Training, seconds an epoch",
                "recipe|dense|ADMM|projection's share|fine-tuning|last accuracy|how it ended",
                (
                    f"{row['recipe']}|{_seconds(row, 'dense')}|{_seconds(row, 'admm')}"
                    f"|{'–' if row.get('projection') is None else format(row['projection'], '.1%')}|{_seconds(row, 'finetune')}"
                    f"|{'–' if 'finetune accuracy' not in row else format(row['finetune accuracy'], '.2f') + ' %'}|{row['how']}"
                    for row in log["training"]
                ),
            ),
            *(["", f"The regression gate: [{log['gate'][0]['file']}]({log['gate'][0]['file']})."] if log["gate"] else []),
            *(["", "## Notes", "", *(f"- {note}" for note in log["notes"])] if log["notes"] else []),
            "",
        ]
    )


def _table(title: str, head: str, rows: Iterator[str]) -> list[str]:
    lines = [f"| {row.replace('|', ' | ')} |" for row in rows]
    if not lines:
        return []
    columns = head.split("|")
    return ["", f"## {title}", "", f"| {' | '.join(columns)} |", "|" + "---|" * len(columns), *lines]


def _peaks_lines(card: Log | None) -> list[str]:
    if card is None:
        return []
    rates = ", ".join(f"{name} {rate / 1e12:.1f} TFLOP/s" for name, rate in card["flops"].items())
    return [
        "",
        f"Measured peaks: {card['bandwidth'] / 1e9:.0f} GB/s copied, {rates}. A bound is the least time of the products.",
    ]


def _times(value: float | None) -> str:
    return "–" if value is None else f"{value:.2f}×"


def _short(provider: str) -> str:
    return provider.removesuffix("ExecutionProvider")


def _difference(row: Log, precision: str) -> str:
    if precision not in row:
        return "–"
    limit = PARITY.get(precision)
    return f"{row[precision]:.1e}" + ("" if limit is None or row[precision] <= limit else f" (above {limit:.0e})")


def _bound(row: Log) -> str:
    return "–|–" if row["bound_ms"] is None else f"{row['bound_ms']:.3f} ms|{row['bound_ms'] / row['ms']:.0%}"


def _seconds(row: Log, phase: str) -> str:
    return f"{row[phase]:.1f} s" if phase in row else "–"
