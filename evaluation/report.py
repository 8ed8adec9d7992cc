"""What runs and evaluations leave behind for a reader: tables, one JSON per evaluation, and a page about a run.

`write_report` gathers what lies in a run's folder (log.txt, config.json, the JSON files of its evaluations, attention
grids) into report.html, which needs no other file, and writes its curves as a PNG too. It can be called again at any
time, also by hand: python -c "from evaluation.report import write_report; write_report('output')".
"""

from __future__ import annotations

import base64
import datetime
import html
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from runtime.checkpoint import check_writable, write_json_atomic, write_text_atomic
from runtime.distributed import is_main_process
from runtime.guards import InputError
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

    Raises InputError where it cannot be written, before anything is computed.
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


# ---- the page about a run -------------------------------------------------------------------------------------------

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


def evaluation_tables(folder: str | Path) -> list[tuple[str, list[str], list[list[str]]]]:
    """(title, header, rows) of every evaluation whose JSON lies in the folder."""
    folder, tables = Path(folder), []
    knn = _read_json(folder / "eval_knn.json")
    if knn:
        rows = knn["results"].get("knn", [])
        cells = [[str(r["k"]), f"{r['temperature']:g}", f"{r['top1']:.2f}", f"{r['top5']:.2f}"] for r in rows]
        tables.append(("k-NN", ["k", "temperature", "top-1", "top-5"], cells))
        low = knn["results"].get("low_shot") or {}
        if low:
            cells = [[nu, str(r["k"]), f"{r['mean']:.2f} ± {r['std']:.2f}"] for nu, r in low.items()]
            tables.append(("Low-shot k-NN", ["images per class", "k", "top-1"], cells))
    linear = _read_json(folder / "eval_linear.json")
    if linear:
        best, on = linear["results"]["selected"], linear["settings"].get("selected_on", "val")
        cells = [[best["head"], str(best["epoch"]), f"{best['val_top1']:.2f}", f"{best['val_top5']:.2f}"]]
        tables.append((f"Linear probe (head chosen on {on})", ["head", "epoch", "top-1", "top-5"], cells))
    logistic = _read_json(folder / "eval_logistic.json")
    if logistic and logistic["results"]:
        found = logistic["results"]
        cells = [[f"{found['penalty']:g}", f"{found['top1']:.2f}", f"{found['top5']:.2f}"]]
        tables.append(("Logistic regression on cached features", ["penalty", "top-1", "top-5"], cells))
    return tables


def summary(folder: str | Path) -> str:
    """One table of all evaluations whose JSON lies in the folder."""
    rows = []
    for title, header, cells in evaluation_tables(folder):
        top1 = header.index("top-1")
        for row in cells:
            setting = ", ".join(f"{name} {value}" for name, value in zip(header[:top1], row, strict=False))
            rows.append([title, setting, row[top1], row[top1 + 1] if len(row) > top1 + 1 else ""])
    return table(["evaluation", "setting", "top-1", "top-5"], rows)


def _read_json(path: Path) -> dict[str, Any] | None:
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        return None
    except ValueError as error:
        raise InputError(f"{path} is not JSON ({error}): remove it, or run the evaluation again") from error


def write_report(output_dir: str | Path) -> Path:
    """Write output_dir/report.html and curves.png from what lies in the folder; returns the path of the page.

    Attention grids are taken from output_dir/attention*.png and output_dir/attention/grid.png. Raises InputError where
    the folder holds neither a log nor an evaluation.
    """
    folder = Path(output_dir)
    log = folder / "log.txt"
    rows = read_log(log) if log.is_file() else []
    tables = evaluation_tables(folder)
    if not rows and not tables:
        raise InputError(f"{folder} holds no log.txt and no evaluation's JSON: there is nothing to report")
    config = _read_json(folder / "config.json") or {}
    parts = [f"<h1>{html.escape(_run_title(config, folder))}</h1>", f"<p>{html.escape(_run_state(rows, folder))}</p>"]
    if rows and plot_curves(rows, folder / "curves.png"):
        parts.append("<h2>Training</h2>" + _embedded(folder / "curves.png", "training curves"))
    final = _final_row(rows)
    if final:
        parts.append("<h2>Last epoch</h2>" + _html_table(["", ""], final))
    if tables:
        parts.append("<h2>Evaluations</h2>")
        parts += [f"<h3>{html.escape(title)}</h3>" + _html_table(header, cells) for title, header, cells in tables]
    if (folder / "eval_linear.png").is_file():
        parts.append(_embedded(folder / "eval_linear.png", "linear probes by learning rate"))
    grids = [*sorted(folder.glob("attention*.png")), folder / "attention" / "grid.png"]
    for path in (path for path in grids if path.is_file()):
        parts.append(f"<h2>Attention</h2>{_embedded(path, 'attention maps')}")
    if config:
        cells = [[str(key), json.dumps(value)] for key, value in sorted(config.items())]
        parts.append("<h2>Configuration</h2>" + _html_table(["setting", "value"], cells))
    path = folder / "report.html"
    write_text_atomic(path, _PAGE.format(title=html.escape(folder.name or "run"), body="\n".join(parts)))
    return path


def _run_title(config: dict[str, Any], folder: Path) -> str:
    if "arch" not in config:
        return f"Run {folder.resolve().name}"
    mode = "SimPool" if config.get("mode") == "simpool" else str(config.get("mode", ""))
    return f"{config['arch']} {mode}: {folder.resolve().name}"


def _run_state(rows: Sequence[dict[str, Any]], folder: Path) -> str:
    marker = next((name for name in ("DONE", "PREEMPTED") if (folder / name).exists()), None)
    state = {"DONE": "finished", "PREEMPTED": "preempted, to be resumed", None: "not finished"}[marker]
    epochs = f"{rows[-1]['epoch'] + 1} epochs, {state}; " if rows else ""
    return f"{epochs}page of {datetime.datetime.now().astimezone().isoformat(' ', 'minutes')}"


def _final_row(rows: Sequence[dict[str, Any]]) -> list[list[str]]:
    last = rows[-1] if rows else {}
    return [[key, f"{value:.4g}"] for key, value in last.items() if isinstance(value, int | float)]


def _html_table(header: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    def line(cells: Sequence[str], tag: str) -> str:
        return "<tr>" + "".join(f"<{tag}>{html.escape(str(cell))}</{tag}>" for cell in cells) + "</tr>"

    head = line(header, "th") if any(header) else ""
    return f"<table>{head}{''.join(line(row, 'td') for row in rows)}</table>"


def _embedded(path: Path, what: str) -> str:
    data = base64.b64encode(path.read_bytes()).decode()
    return f'<img alt="{html.escape(what)}" src="data:image/png;base64,{data}">'


_PAGE = """<!doctype html>
<html lang="en"><head><meta charset="utf-8"><title>{title}</title><style>
body {{ font: 15px/1.5 system-ui, sans-serif; max-width: 70rem; margin: 2rem auto; padding: 0 1rem; color: #222; }}
h1 {{ font-size: 1.5rem; }} h2 {{ font-size: 1.15rem; margin-top: 2rem; border-bottom: 1px solid #ddd; }}
h3 {{ font-size: 1rem; margin-bottom: .3rem; }}
img {{ max-width: 100%; }} table {{ border-collapse: collapse; margin: .5rem 0; }}
td, th {{ padding: .15rem .8rem .15rem 0; text-align: left; border-bottom: 1px solid #eee; }}
td {{ font-variant-numeric: tabular-nums; }}
</style></head><body>
{body}
</body></html>
"""
