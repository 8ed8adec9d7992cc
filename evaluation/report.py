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

from evaluation.plots import plot_curves, read_log
from evaluation.records import table
from runtime.checkpoint import write_text_atomic
from runtime.guards import InputError


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
