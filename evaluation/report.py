"""A page about a run, made of what lies in its folder: state and results first, then curves, pictures and settings.

`write_report` gathers log.txt, config.json, the run's evaluations (evaluation/found.py) and attention grids into
report.html, which needs no other file. It can be called at any time, while the run is under way as well, also by hand:
python -c "from evaluation.report import write_report; write_report('output')". Whatever the folder holds, a page is
written: what can't be read becomes a line on it.
"""

from __future__ import annotations

import datetime
import json
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from evaluation import found, page, plots
from evaluation.found import Evaluation, find_evaluations
from evaluation.records import table
from runtime.checkpoint import write_text_atomic
from runtime.distributed import is_main_process
from runtime.guards import InputError
from runtime.terminal import say

STATES = ("running", "done", "preempted", "stopped")
STALE_S = 30 * 60  # a run that has written nothing for so long, and left no marker, has stopped
SIGNS_OF_LIFE = ("heartbeat", ".heartbeat", "log.txt", "checkpoint.pth", "config.json")
# What says most about a run if it is not known which settings differ from their defaults.
MAIN_SETTINGS = (
    "method", "arch", "mode", "gamma", "patch_size", "img_size", "data_path", "subset", "epochs", "batch_size_per_gpu",
    "global_batch_size", "optimizer", "lr", "recipe", "out_dim", "seed",
)  # fmt: skip
HEADLINES = ("top-1", found.CORLOC, found.MEAN, found.SHARE)  # the columns that are compared
COMPARED = "top-1 or as named, %"
_LARGEST_PICTURE = 16 << 20  # bytes


def refresh_report(checkpoint: str | Path | None) -> None:
    """Write the page of a checkpoint's run again on rank 0, if there is one: a new evaluation belongs on it.

    A page that can't be written is a warning; the evaluation's own results are safe by then.
    """
    page_of_run = Path(checkpoint).parent / "report.html" if checkpoint else None
    if page_of_run is None or not is_main_process() or not page_of_run.is_file():
        return
    try:
        say(f"report: {write_report(page_of_run.parent)}")
    except (OSError, InputError) as error:
        say(f"warning: {page_of_run} was not refreshed ({error})")


def write_report(output_dir: str | Path, state: str | None = None, changed: Sequence[str] | None = None) -> Path:
    """Write output_dir/report.html from what lies in the folder; returns its path.

    state: one of STATES if the caller knows it, else it is told from the markers and the last sign of life. changed:
    names of the settings that are not their defaults, which the page shows open.
    Raises InputError if there is no such folder, ValueError for an unknown state, OSError if the page can't be written;
    nothing for what the folder holds.
    """
    folder = Path(output_dir)
    if not folder.is_dir():
        raise InputError(f"{folder} is not a folder: give the --output_dir of a run or an evaluation")
    if state is not None and state not in STATES:
        raise ValueError(f"state {state!r}: one of {', '.join(STATES)}")
    problems: list[str] = []
    rows = _log(folder / "log.txt", problems)
    untrained = _untrained(folder / "untrained.json", problems)
    config = _config(folder / "config.json", problems)
    evaluations = find_evaluations(folder)
    problems += [e.problem for e in evaluations if e.problem]
    good = [e for e in evaluations if not e.problem]
    state = state or state_of(folder)
    is_run = bool(rows or config)
    facts = _facts(rows, config, good, state, folder)
    sections = [
        page.heading(_title(config, good, folder), state if is_run else None, facts),
        page.section("Results", _results(rows, good)),
        page.section("Training", _curves([*untrained, *rows], config) if is_run else ""),
        page.section("Attention", _pictures(folder, problems)),
        page.section("Settings that are not the defaults" if changed is not None else "Main settings",
                     _settings(config, changed if changed is not None else MAIN_SETTINGS)),
        page.folded("All settings", _settings(config, None)),
        page.folded("The last epoch in numbers", page.table(["", ""], _last_row(rows))),
        *(_detail(evaluation) for evaluation in good),
    ]  # fmt: skip
    sections.insert(2, page.notes("What could not be read", problems))  # known by now
    path = folder / "report.html"
    write_text_atomic(
        path, page.document(_title(config, good, folder), sections, refresh=state == "running" and is_run)
    )
    return path


# ---- the state ------------------------------------------------------------------------------------------------------


def state_of(folder: Path, now: float | None = None) -> str:
    """One of STATES, from the marker that a run left, or else from its last sign of life."""
    for marker, state in (("DONE", "done"), ("PREEMPTED", "preempted")):
        if (folder / marker).exists():
            return state
    last = last_sign_of_life(folder)
    return "running" if last is not None and (now or time.time()) - last < STALE_S else "stopped"


def last_sign_of_life(folder: Path) -> float | None:
    """When a run last wrote one of the files that it writes while it works; seconds since the epoch."""
    times = []
    for name in SIGNS_OF_LIFE:
        try:
            times.append((folder / name).stat().st_mtime)
        except OSError:
            continue
    return max(times, default=None)


def _untrained(path: Path, problems: list[str]) -> list[dict[str, Any]]:
    """The evaluation before the first epoch, as a row of the log; none without the file."""
    try:
        content = json.loads(path.read_text(encoding="utf-8")) if path.is_file() else None
    except (OSError, ValueError, RecursionError) as error:
        problems.append(f"{path.name} can't be read: {error}")
        return []
    return [{**content, "epoch": -1}] if isinstance(content, dict) else []


def _facts(
    rows: Sequence[Mapping[str, Any]], config: Mapping[str, Any], evaluations: Sequence[Evaluation], state: str,
    folder: Path,
) -> list[str]:  # fmt: skip
    """The lines below the title: how far the run is, or what was evaluated, and when the page was written."""
    facts = []
    if rows or config:
        done, epochs = (int(rows[-1]["epoch"]) + 1 if rows else 0), config.get("epochs")
        progress = f"{done} of {epochs} epochs" if plots.is_number(epochs) else f"{done} epochs"
        times = [row["time_s"] for row in rows[-5:] if plots.is_number(row.get("time_s"))]
        if times:
            each = sum(times) / len(times)
            progress += f", {_duration(each)} each"
            if state == "running" and plots.is_number(epochs) and epochs > done:
                progress += f", about {_duration(each * (epochs - done))} left"
        facts.append(progress)
        if config.get("data_path"):
            facts.append(f"images: {config['data_path']}")
    elif evaluations:
        latest = evaluations[-1]
        data = latest.content.get("data") if isinstance(latest.content.get("data"), Mapping) else {}
        facts.append(f"checkpoint: {latest.model('checkpoint') or 'none (random weights)'}")
        if latest.model("checkpoint_sha256"):
            facts.append(f"SHA-256 {latest.model('checkpoint_sha256')}")
        sizes = ", ".join(f"{data[key]} {what}" for key, what in
                          (("train_images", "training"), ("val_images", "validation images"), ("classes", "classes"),
                           ("images", "images"), ("boxes", "boxes"))
                          if key in data)  # fmt: skip
        facts.append(
            f"data: {data.get('data_path', data.get('load_features', 'unknown'))}" + (f" ({sizes})" if sizes else "")
        )
    last = last_sign_of_life(folder)
    if state in ("running", "stopped") and last is not None:
        facts.append(f"last sign of life {_stamp(last)}")
    return [*facts, f"page written {_stamp(time.time())}"]


def _stamp(seconds: float) -> str:
    return datetime.datetime.fromtimestamp(seconds).astimezone().strftime("%Y-%m-%d %H:%M")


def _duration(seconds: float) -> str:
    if seconds < 100:
        return f"{seconds:.3g} s"
    minutes = round(seconds / 60)
    return f"{minutes} min" if minutes < 100 else f"{minutes // 60} h {minutes % 60} min"


def _title(config: Mapping[str, Any], evaluations: Sequence[Evaluation], folder: Path) -> str:
    """The model and the folder; for a folder of evaluations what the checkpoint says of the model."""
    model, epoch = config, None
    if "arch" not in config and evaluations:
        recorded, epoch = evaluations[-1].model("config"), evaluations[-1].model("epoch")
        model = recorded if isinstance(recorded, Mapping) else {}
    name = folder.resolve().name
    if "arch" not in model:
        return f"Run {name}"
    mode = {"simpool": "SimPool", "official": "official"}.get(model.get("mode"), str(model.get("mode") or ""))
    after = f", epoch {epoch}" if epoch is not None else ""
    return f"{model['arch']} {mode}{after}: {name}"


# ---- reading --------------------------------------------------------------------------------------------------------


def _log(path: Path, problems: list[str]) -> list[dict[str, Any]]:
    if not path.exists():
        return []
    try:
        return plots.read_log(path)
    except OSError as error:
        problems.append(f"{path} can't be read: {error.strerror or error}")
        return []


def _config(path: Path, problems: list[str]) -> dict[str, Any]:
    if not path.exists():
        return {}
    try:
        config = json.loads(path.read_text(encoding="utf-8"))
        if isinstance(config, dict):
            return config
        problems.append(f"{path} holds a {type(config).__name__} and not an object")
    except (OSError, ValueError, RecursionError) as error:
        problems.append(f"{path} can't be read ({type(error).__name__})")
    return {}


# ---- sections -------------------------------------------------------------------------------------------------------


def _results(rows: Sequence[Mapping[str, Any]], evaluations: Sequence[Evaluation]) -> str:
    """The headline numbers: k-NN while training, and a row per evaluation with a column per folder."""
    parts = []
    online = []
    for name, cases in plots.evaluations_of(rows).items():
        for case in cases:
            epochs, values = plots.series(rows, name, case, "top1")
            best = max(range(len(values)), key=values.__getitem__)
            label = f"{case}-NN" if name == "k-NN" else f"{name} {case}"
            online.append(
                [label, f"{values[0]:.2f}", f"{values[-1]:.2f}", f"{values[best]:.2f} (epoch {epochs[best]:g})"]
            )
    if online:
        parts.append("<h3>While training</h3>" + page.table(["top-1, %", "first", "last", "best"], online))
    columns, cells = comparison(evaluations)
    if cells:
        parts.append("<h3>Evaluations</h3>" + page.table([COMPARED, *columns], cells))
    return "".join(parts)


def comparison(evaluations: Sequence[Evaluation]) -> tuple[list[str], list[list[str]]]:
    """(labels, rows) of top-1, CorLoc and the like: a row per evaluation and setting, a column per folder by date."""
    labels = list(dict.fromkeys(evaluation.label or "this folder" for evaluation in evaluations))
    values: dict[str, dict[str, str]] = {}
    for evaluation in evaluations:
        for title, header, rows in evaluation.tables:
            headline = next((name for name in HEADLINES if name in header), None)
            if headline is None:
                continue
            column = header.index(headline)
            for row in rows:
                # the setting that was chosen (a head, a penalty) differs between models: one row for all of them
                chosen = header[0] in ("head", "penalty", "file")
                setting = ", ".join(f"{n} {v}" for n, v in zip(header[:column], row, strict=False) if v)
                setting = setting if headline == "top-1" else f"{headline}: {row[0]}"
                name = title if chosen else f"{title}, {setting}"
                values.setdefault(name, {})[evaluation.label or "this folder"] = row[column]
    return labels, [[name, *(found_here.get(label, "") for label in labels)] for name, found_here in values.items()]


def _curves(rows: Sequence[Mapping[str, Any]], config: Mapping[str, Any]) -> str:
    if not rows:
        return "<p>No epoch is finished yet.</p>"
    pictures = [page.image(plots.draw(panel), panel.title) for panel in plots.panels(rows, config)]
    return f'<div class="panels">{"".join(pictures)}</div>'


def _pictures(folder: Path, problems: list[str]) -> str:
    """Attention grids, masks and probes' maps of the folder and those below it."""
    paths = [*sorted(folder.glob("attention*.png")), *sorted(folder.glob("masks.png"))]
    paths += [path for name in ("grid", "masks") for path in sorted(folder.glob(f"**/attention/{name}.png"))[:4]]
    paths += sorted(folder.glob("**/probe_maps/probes.png"))[:4]
    parts = []
    for path in paths[:8]:
        try:
            if path.stat().st_size <= _LARGEST_PICTURE and path.is_file():
                parts.append(
                    f"<h3>{page.text(path.relative_to(folder))}</h3>" + page.wide(path.read_bytes(), path.stem)
                )
        except OSError as error:
            problems.append(f"{path} can't be read: {error.strerror or error}")
    return "".join(parts)


def _settings(config: Mapping[str, Any], names: Sequence[str] | None) -> str:
    keys = sorted(config) if names is None else [name for name in names if config.get(name) is not None]
    return page.table(["setting", "value"], [[key, json.dumps(config[key])] for key in keys])


def _last_row(rows: Sequence[Mapping[str, Any]]) -> list[list[str]]:
    last = rows[-1] if rows else {}
    flat = {**{k: v for k, v in last.items() if k != "monitors"}, **(last.get("monitors") or {})} if last else {}
    return [[str(key), f"{value:.4g}"] for key, value in flat.items() if plots.is_number(value)]


def _detail(evaluation: Evaluation) -> str:
    """One evaluation in full: its tables, its plot, its images and settings."""
    tables = "".join(f"<h3>{page.text(title)}</h3>{page.table(head, rows)}" for title, head, rows in evaluation.tables)
    for suffix in ("", "_best", "_worst", "_random"):
        picture = evaluation.path.with_name(f"{evaluation.path.stem}{suffix}.png")
        if picture.is_file() and not picture.is_symlink() and picture.stat().st_size <= _LARGEST_PICTURE:
            tables += page.wide(picture.read_bytes(), picture.stem)
    facts = {"date": evaluation.content.get("date")}
    for part in ("model", "data", "settings"):
        known = evaluation.content.get(part)
        facts |= known if isinstance(known, Mapping) else {}
    rows = [[key, json.dumps(value)[:300]] for key, value in facts.items() if value is not None]
    where = f"{evaluation.label}/" if evaluation.label else ""
    return page.folded(f"{where}{evaluation.path.name}", tables + page.table(["", ""], rows))


# ---- on the terminal ------------------------------------------------------------------------------------------------


def evaluation_tables(folder: str | Path) -> list[tuple[str, list[str], list[list[str]]]]:
    """(title, header, rows) of every evaluation that belongs to the folder and can be read."""
    return [entry for evaluation in find_evaluations(Path(folder)) for entry in evaluation.tables]


def summary(folder: str | Path) -> str:
    """One table of all evaluations that belong to the folder, and what model, checkpoint and images they are of."""
    folder = Path(folder)
    good = [e for e in find_evaluations(folder) if not e.problem]
    labels, rows = comparison(good)
    facts = _facts([], {}, good, "done", folder)[:-1]
    return "\n".join([_title({}, good, folder), *facts, "", table([COMPARED, *labels], rows)])
