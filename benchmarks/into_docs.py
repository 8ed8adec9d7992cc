"""Put a file of measured tables into a document, between its two markers (at its end if it has none).

python -m benchmarks.into_docs TABLES.md docs/performance.md
"""

from __future__ import annotations

import argparse
import os
from datetime import date
from pathlib import Path

import torch

from runtime.checkpoint import write_text_atomic
from runtime.cli import parse_described
from runtime.guards import InputError, run_program
from runtime.reproduce import get_sha

BEGIN, END = "<!-- benchmarks/run_all.sh: begin -->", "<!-- benchmarks/run_all.sh: end -->"


def replace_between_markers(document: str, text: str) -> str:
    """The document with `text` between its markers. Raises InputError if it has only one of them."""
    section = f"{BEGIN}\n{text.strip()}\n{END}"
    if BEGIN not in document and END not in document:
        return f"{document.rstrip()}\n\n{section}\n"
    before, begin, rest = document.partition(BEGIN)
    _, end, after = rest.partition(END)
    if not begin or not end:
        raise InputError(f"the document holds one of the markers {BEGIN!r} and {END!r}; restore or remove both")
    return before + section + after


def machine() -> str:
    """The machine that the figures were measured on, and its load."""
    name = next((x.split(":")[1].strip() for x in _lines("/proc/cpuinfo") if x.startswith("model name")), "unknown CPU")
    device = torch.cuda.get_device_name() if torch.cuda.is_available() else f"{name}, {os.cpu_count()} cores"
    load = ", ".join(f"{value:.1f}" for value in os.getloadavg())
    return (
        f"{device}; torch {torch.__version__}, {torch.get_num_threads()} thread(s); load at the end {load}; "
        f"{date.today()}; {get_sha()}"
    )


def _lines(path: str) -> list[str]:
    return Path(path).read_text().splitlines() if Path(path).exists() else []


def get_args_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser("benchmarks.into_docs", add_help=False)
    parser.add_argument("tables", type=Path, help="file with the tables")
    parser.add_argument("document", type=Path, help="document to put them into")
    return parser


def main(argv: list[str] | None = None) -> int:
    args = parse_described(get_args_parser(), __doc__, argv)
    for path in (args.tables, args.document):
        if not path.exists():
            raise InputError(f"{path} does not exist")
    text = f"## All benchmarks in one run\n\n`benchmarks/run_all.sh`. {machine()}\n\n{args.tables.read_text()}"
    write_text_atomic(args.document, replace_between_markers(args.document.read_text(), text))
    return 0


if __name__ == "__main__":
    run_program(main)
