"""What an evaluation leaves behind: a table on the terminal and one JSON file."""

from __future__ import annotations

import datetime
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from runtime.checkpoint import write_json_atomic
from runtime.distributed import is_main_process
from runtime.guards import InputError
from runtime.log import say


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

    Raises InputError where it cannot be written, before anything is computed.
    """
    folder = Path(output_dir) if output_dir else (Path(checkpoint).parent if checkpoint else Path("."))
    try:
        folder.mkdir(parents=True, exist_ok=True)
        if is_main_process():
            probe = folder / f".writable-{datetime.datetime.now().timestamp()}"
            probe.touch()
            probe.unlink()
    except OSError as error:
        raise InputError(
            f"results can't be written to {folder} ({error.strerror}): give another --output_dir"
        ) from None
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


# ---- pictures -------------------------------------------------------------------------------------------------------

COLOURS = ("#3b528b", "#21918c", "#e07b39", "#c44e52", "#7a5195", "#5ec962")


def new_figure(width: float, height: float, rows: int = 1, columns: int = 1) -> tuple[Any, Any]:
    """A figure of `width` x `height` inches without a display, in this project's plain style, and its axes."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(width, height), layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.subplots(rows, columns, squeeze=False)
    for axis in axes.flat:
        axis.spines[["top", "right"]].set_visible(False)
        axis.grid(alpha=0.25, linewidth=0.6)
    return figure, axes


def plot_heads(rows: Sequence[dict[str, Any]], best: dict[str, Any], selected_on: str, path: Path) -> None:
    """Accuracy of each head of a sweep over its learning rate, one line per form of the features."""
    figure, axes = new_figure(6.4, 3.6)
    axis = axes[0, 0]
    forms = list(dict.fromkeys((row["n_last_blocks"], row["avgpool_patchtokens"]) for row in rows))
    for colour, (n, avgpool) in zip(COLOURS * len(forms), forms, strict=False):
        line = [row for row in rows if (row["n_last_blocks"], row["avgpool_patchtokens"]) == (n, avgpool)]
        label = line[0]["head"].rsplit(",", 1)[0]
        rates = [row["lr"] for row in line]
        axis.plot(rates, [row["val_top1"] for row in line], "o-", color=colour, markersize=4, label=f"{label}: val")
        if selected_on != "val":
            axis.plot(
                rates, [row["selection_top1"] for row in line], "o--", color=colour, markersize=3, alpha=0.6,
                label=f"{label}: {selected_on}",
            )  # fmt: skip
    axis.plot(best["lr"], best["val_top1"], "*", color="black", markersize=12, label="selected", zorder=5)
    axis.set(xscale="log", xlabel="base learning rate (per 256 images)", ylabel="top-1 (%)", title="Linear probes")
    axis.legend(frameon=False, fontsize=8)
    figure.savefig(path, dpi=150)
