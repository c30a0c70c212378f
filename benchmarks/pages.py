"""What benchmarks of given networks share: the options that say which networks, and the files of their results."""

from __future__ import annotations

import argparse
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from tensorrail_runtime.records import write_text


def parser_of(doc: str, files: str = "FILE.md and FILE.json") -> argparse.ArgumentParser:
    """Return a parser for the networks, the latency tables and the results, which are `files`; `doc` describes the script."""
    parser = argparse.ArgumentParser(description=doc.partition("\n")[0])
    parser.add_argument("models", type=Path, nargs="+", metavar="DENSE.onnx")
    parser.add_argument("--cache", type=Path, help="Folder of latency tables. Default: the user's.")
    parser.add_argument("-o", "--out", type=Path, help=f"Without suffix: {files} are written.")
    return parser


def write_results(out: Path | None, records: Sequence[Any], text: str) -> None:
    """Write the records as JSON and their page as Markdown, if there is a name for them."""
    if out:
        write_text(out.with_suffix(".json"), json.dumps(records, indent=1) + "\n")
        write_text(out.with_suffix(".md"), text)
