"""Curves of a run and of a sweep, as PNG files."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

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
    figure, axes = new_figure(7.6, 3.6)
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
    axis.legend(frameon=False, fontsize=8, loc="center left", bbox_to_anchor=(1.0, 0.5))
    figure.savefig(path, dpi=150)


PANELS: tuple[tuple[str, tuple[tuple[str, str], ...], str], ...] = (
    # title, (key of log.txt, label) ..., scale of the vertical axis
    ("Loss", (("train_loss", "loss"),), "linear"),
    ("Teacher entropy and KL", (("train_entropy", "entropy"), ("train_kl", "KL")), "linear"),
    ("Learning rate", (("train_lr", "lr"),), "linear"),
    ("Signs of collapse", (("entropy", "teacher entropy / log K"), ("mean_cosine", "mean cosine")), "linear"),
    ("Information of the output (nats)", (("information", "nats"),), "linear"),
    ("Effective rank of the features", (("effective_rank", "effective rank"),), "linear"),
    ("Norm of the center", (("center_norm", "norm"),), "linear"),
)


def read_log(path: Path) -> list[dict[str, Any]]:
    """The rows of a log.txt, monitors lifted to the top of each row; a torn last line is left out."""
    rows = []
    for line in path.read_text(encoding="utf-8", errors="replace").splitlines():
        try:
            row = json.loads(line)
        except ValueError:
            continue
        if isinstance(row, dict) and "epoch" in row:
            rows.append({**(row.get("monitors") or {}), **row})
    return rows


def series(rows: Sequence[dict[str, Any]], key: str) -> tuple[list[int], list[float]]:
    """(epochs, values) of a key where it stands in a row and is a number."""
    points = [(row["epoch"], row[key]) for row in rows if isinstance(row.get(key), int | float)]
    return [epoch for epoch, _ in points], [value for _, value in points]


def knn_series(rows: Sequence[dict[str, Any]]) -> dict[str, tuple[list[int], list[float]]]:
    """Per k, (epochs, top-1) of the k-NN evaluations while training."""
    found: dict[str, tuple[list[int], list[float]]] = {}
    for row in rows:
        for k, accuracy in (row.get("k-NN") or {}).items():
            epochs, values = found.setdefault(k, ([], []))
            epochs.append(row["epoch"])
            values.append(accuracy["top1"])
    return found


def plot_curves(rows: Sequence[dict[str, Any]], path: Path) -> bool:
    """Curves of all that the log holds, one panel each, as a PNG; False where there is nothing to draw."""
    panels = []
    for title, keys, scale in PANELS:
        lines = [(label, *series(rows, key)) for key, label in keys]
        lines = [line for line in lines if line[1]]
        if lines:
            panels.append((title, lines, scale))
    knn = [(f"k = {k}", *points) for k, points in knn_series(rows).items()]
    if knn:
        panels.insert(min(3, len(panels)), ("k-NN top-1 (%)", knn, "linear"))
    if not panels:
        return False
    columns = min(3, len(panels))
    count = -(-len(panels) // columns)
    figure, axes = new_figure(3.6 * columns, 2.6 * count, count, columns)
    for axis, (title, lines, scale) in zip(axes.flat, panels, strict=False):
        for colour, (label, epochs, values) in zip(COLOURS * len(lines), lines, strict=False):
            axis.plot(epochs, values, "o-" if len(epochs) < 25 else "-", color=colour, markersize=3, label=label)
        axis.set(title=title, xlabel="epoch", yscale=scale)
        axis.xaxis.get_major_locator().set_params(integer=True)
        if len(lines) > 1:
            axis.legend(frameon=False, fontsize=8)
    for axis in axes.flat[len(panels) :]:
        axis.axis("off")
    figure.savefig(path, dpi=150)
    return True
