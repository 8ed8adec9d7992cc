"""What an evaluation leaves behind: a table on the terminal, and one JSON that says what was evaluated on what."""

from __future__ import annotations

import datetime
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from runtime.checkpoint import check_writable, write_json_atomic
from runtime.distributed import is_main_process
from runtime.terminal import say


def table(header: Sequence[str], rows: Sequence[Sequence[Any]]) -> str:
    """Rows under a header as aligned text: the first column to the left, numbers with two decimals to the right."""
    cells = [list(header)] + [[f"{cell:.2f}" if isinstance(cell, float) else str(cell) for cell in row] for row in rows]
    widths = [max(len(row[column]) for row in cells) for column in range(len(header))]
    lines = []
    for row in cells:
        first, *rest = (
            cell.ljust(w) if i == 0 else cell.rjust(w) for i, (cell, w) in enumerate(zip(row, widths, strict=True))
        )
        lines.append("  ".join([first, *rest]).rstrip())
    lines.insert(1, "  ".join("-" * w for w in widths))
    return "\n".join(lines)


def output_folder(output_dir: str | Path | None, checkpoint: str | Path | None) -> Path:
    """The folder for results, made and tried: `output_dir`, else the checkpoint's folder, else the current one.

    Raises InputError if it cannot be written, before anything is computed.
    """
    folder = Path(output_dir) if output_dir else (Path(checkpoint).parent if checkpoint else Path("."))
    if is_main_process():
        check_writable(folder, "--output_dir")
    return folder


def write_evaluation(
    folder: Path,
    name: str,
    model: dict[str, Any],
    data: dict[str, Any],
    settings: dict[str, Any],
    results: dict[str, Any],
) -> Path:
    """Write `folder/name.json` on rank 0: what was evaluated, on what, how, and what came out. Returns its path."""
    path = folder / f"{name}.json"
    if is_main_process():
        write_json_atomic(
            path,
            {
                "evaluation": name,
                "date": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
                "model": model,
                "data": data,
                "settings": settings,
                "results": results,
            },
        )
        say(f"results written to {path}")
    return path


def describe_data(data_path: str, train: Any, val: Any) -> dict[str, Any]:
    """What a JSON of results says of its images: path, sizes, classes and fingerprints of both splits."""
    return {
        "data_path": str(data_path),
        "train_images": len(train),
        "val_images": len(val),
        "classes": len(train.classes),
        "train_fingerprint": train.fingerprint(),
        "val_fingerprint": val.fingerprint(),
    }
