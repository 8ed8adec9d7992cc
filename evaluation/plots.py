"""Curves of a run and of a sweep of linear heads.

A run's panels follow from its log, whatever the method: every `train_*` number, every monitor and every evaluation
becomes a curve. What is known of some of them (which share a panel, a threshold, a title) stands in the tables below.
"""

from __future__ import annotations

import io
import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from evaluation.monitors import FEW_DIRECTIONS, ONE_SIDED, SAME_FEATURES, UNIFORM, UNINFORMED
from runtime.checkpoint import write_atomic

COLOURS = ("#3b528b", "#21918c", "#e07b39", "#c44e52", "#7a5195", "#5ec962")
LIMIT_COLOUR = "#c44e52"

Points = tuple[list[float], list[float]]  # epochs done, values


def new_figure(width: float, height: float, layout: str | None = None) -> tuple[Any, Any]:
    """A figure of `width` x `height` inches without a display, in this project's plain style, and its axis."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(width, height), layout=layout)
    FigureCanvasAgg(figure)
    axis = figure.subplots()
    axis.spines[["top", "right"]].set_visible(False)
    axis.grid(alpha=0.25, linewidth=0.6)
    return figure, axis


def plot_heads(rows: Sequence[dict[str, Any]], best: dict[str, Any], selected_on: str, path: Path) -> None:
    """Accuracy of each head of a sweep over its learning rate, one line per form of the features."""
    figure, axis = new_figure(7.6, 3.6, "constrained")
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
    write_atomic(path, lambda temporary: figure.savefig(temporary, dpi=150, format="png"))


# ---- what a log holds -----------------------------------------------------------------------------------------------


def read_log(path: Path) -> list[dict[str, Any]]:
    """The rows of a log.txt with an epoch, in order; a torn line and anything else is left out."""
    rows = []
    for line in path.read_text(encoding="utf-8", errors="replace").splitlines():
        try:
            row = json.loads(line)
        except (ValueError, RecursionError):
            continue
        if isinstance(row, dict) and is_number(row.get("epoch")):
            rows.append(row)
    return rows


def is_number(value: Any) -> bool:
    """Whether a value of a JSON file is a finite number."""
    return isinstance(value, int | float) and not isinstance(value, bool) and abs(value) < 1e300


def series(rows: Sequence[Mapping[str, Any]], *keys: str) -> Points:
    """(epochs done, values) of what stands under nested keys, if it is a number. A row with epoch -1 is at 0."""
    epochs, values = [], []
    for row in rows:
        value: Any = row
        for key in keys:
            value = value.get(key) if isinstance(value, Mapping) else None
        if is_number(value):
            epochs.append(row["epoch"] + 1)
            values.append(float(value))
    return epochs, values


def evaluations_of(rows: Sequence[Mapping[str, Any]]) -> dict[str, list[str]]:
    """The evaluations in a log, {"k-NN": ["10", "20"]}: entries of the form {case: {"top1": number}}."""
    found: dict[str, list[str]] = {}
    for row in rows:
        for name, cases in row.items():
            if name != "monitors" and isinstance(cases, Mapping):
                for case, numbers in cases.items():
                    if isinstance(numbers, Mapping) and is_number(numbers.get("top1")):
                        known = found.setdefault(name, [])
                        known.extend([case] if case not in known else [])
    return found


# ---- panels ---------------------------------------------------------------------------------------------------------


@dataclass
class Panel:
    """One small plot: lines by label, and horizontal limits by label."""

    title: str
    lines: dict[str, Points]
    limits: dict[str, float] = field(default_factory=dict)


TERMS = {"train_entropy": "entropy of the target", "train_kl": "KL"}  # share a panel: their sum is the loss
TITLES = {
    "train_loss": "Loss", "train_cls": "Loss of [CLS]", "train_patch": "Loss of masked patches",
    "train_lr": "Learning rate", "train_wd": "Weight decay", "train_grad_norm": "Gradient norm",
    "images_per_s": "Images per second", "data_wait": "Part of the time spent waiting for data",
    "bad_images": "Bad images in the epoch",
}  # fmt: skip
MONITORS = {
    "information": ("Information of the output (nats)", {"collapse: below": UNINFORMED}),
    "entropy": ("Entropy of the output / log K", {"uniform: above": UNIFORM, "one-sided: below": ONE_SIDED}),
    "mean_cosine": ("Cosine between different images", {"collapse: above": SAME_FEATURES}),
    "effective_rank": ("Effective rank of the features", {"collapse: below": FEW_DIRECTIONS}),
    "center_norm": ("Norm of the center", {}),
}
LAST = ("train_lr", "train_wd", "train_grad_norm")


def panels(rows: Sequence[Mapping[str, Any]], config: Mapping[str, Any]) -> list[Panel]:
    """A panel for everything that a log holds: loss, evaluations, terms, monitors, then what drives and times it."""
    names = list(dict.fromkeys(key for row in rows for key in row))
    curves = {name: points for name in names if (points := series(rows, name))[0]}
    train = [name for name in curves if name.startswith("train_")]
    found: list[Panel] = []
    if "train_loss" in train:
        limits = {}
        out_dim = config.get("out_dim")
        if "train_entropy" in train and is_number(out_dim) and out_dim > 1:
            limits["ln K: an output that says nothing"] = math.log(out_dim)
        found.append(Panel(TITLES["train_loss"], {"loss": curves["train_loss"]}, limits))
    for name, cases in evaluations_of(rows).items():
        lines = {f"k = {case}" if name == "k-NN" else case: series(rows, name, case, "top1") for case in cases}
        found.append(Panel(f"{name} top-1 (%)", lines))
    terms = {label: curves[name] for name, label in TERMS.items() if name in curves}
    if terms:
        found.append(Panel("Terms of the loss", terms))
    rest = [name for name in train if name != "train_loss" and name not in TERMS]
    for name in [n for n in rest if n not in LAST]:
        found.append(Panel(title_of(name), {name: curves[name]}))
    seen = {key: None for row in rows if isinstance(row.get("monitors"), Mapping) for key in row["monitors"]}
    for key in [k for k in MONITORS if k in seen] + [k for k in seen if k not in MONITORS]:
        points = series(rows, "monitors", key)
        title, limits = MONITORS.get(key, (key.replace("_", " ").capitalize(), {}))
        if points[0]:
            found.append(Panel(title, {key: points}, limits))
    for name in [n for n in LAST if n in rest] + [n for n in ("images_per_s", "data_wait") if n in curves]:
        found.append(Panel(title_of(name), {name: curves[name]}))
    if any(curves.get("bad_images", ([], []))[1]):
        found.append(Panel(TITLES["bad_images"], {"images": curves["bad_images"]}))
    return found


def title_of(name: str) -> str:
    """A panel's title for a key of the log."""
    return TITLES.get(name, name.removeprefix("train_").replace("_", " ").capitalize())[:44]


def draw(panel: Panel) -> bytes:
    """One panel as a PNG, 3.6 x 2.4 inches."""
    from matplotlib.ticker import FuncFormatter

    figure, axis = new_figure(3.6, 2.4)
    figure.subplots_adjust(left=0.19, right=0.97, top=0.88, bottom=0.2)  # a third of the time of a layout that measures
    for colour, (label, (epochs, values)) in zip(COLOURS * len(panel.lines), panel.lines.items(), strict=False):
        axis.plot(epochs, values, "o-" if len(epochs) < 25 else "-", color=colour, markersize=3, label=label)
    for label, limit in panel.limits.items():
        axis.axhline(limit, color=LIMIT_COLOUR, linewidth=1, linestyle=":", label=f"{label} {limit:.3g}")
    axis.set_title(panel.title, fontsize=9.5, loc="left")
    axis.set_xlabel("epochs done", fontsize=8)
    axis.tick_params(labelsize=8)
    last = max(max(epochs) for epochs, _ in panel.lines.values())
    axis.set_xlim(-0.02 * max(2, last), 1.03 * max(2, last))  # from the start, and no hundredths of a first epoch
    axis.xaxis.get_major_locator().set_params(integer=True)
    axis.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:.5g}"))  # never as an offset
    axis.margins(y=0.12)
    if len(panel.lines) > 1 or panel.limits:
        axis.legend(frameon=False, fontsize=7, handlelength=1.6)
    buffer = io.BytesIO()
    figure.savefig(buffer, dpi=170, format="png")
    return buffer.getvalue()
