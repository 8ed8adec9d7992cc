"""The evaluations that belong to a run, wherever their JSON files lie, as tables.

Every JSON below the run's folder is taken (before/, after/, checkpoint-evaluation/ ...), and of the folders next to it
those whose evaluated checkpoint is one of the run's, by its path or by its SHA-256. A file that can't be read, or holds
something else, is reported and changes nothing else.
"""

from __future__ import annotations

import functools
import json
import os
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from evaluation.map_summary import COLUMNS
from runtime.checkpoint import file_sha256

# Headers of the columns that sum a protocol up, besides top-1.
MEAN, CORLOC, SHARE = "mean of the three", "CorLoc", "percent"
_LARGEST = 32 << 20  # bytes of a JSON; an evaluation's has some thousand
_MOST = 200  # files
_DEPTH = 2  # of folders below the run's


@dataclass
class Evaluation:
    """One evaluation's JSON: where it lies, what was evaluated, and its results as tables."""

    path: Path
    label: str  # the folder, relative to the run's; empty: the run's own
    content: dict[str, Any] = field(default_factory=dict)
    tables: list[tuple[str, list[str], list[list[str]]]] = field(default_factory=list)  # title, header, rows
    problem: str | None = None

    def model(self, key: str) -> Any:
        return _mapping(self.content.get("model")).get(key)


def find_evaluations(folder: Path) -> list[Evaluation]:
    """All evaluations of the run in `folder`, oldest first; those that can't be read carry their `problem`."""
    inside = [_read(path, folder) for path in _files(folder, _DEPTH)]
    beside = []
    for other in _folders(folder.absolute().parent):
        if not _same_file(other, folder):
            for path in _files(other, 0):
                evaluation = _read(path, folder)
                if evaluation.problem is None and _is_of(evaluation, folder):
                    beside.append(evaluation)
    return sorted([*inside, *beside], key=lambda e: (str(e.content.get("date", "")), str(e.path)))[:_MOST]


def _files(folder: Path, depth: int) -> Iterator[Path]:
    """eval_*.json in a folder and in those below it, links to folders left out."""
    try:
        yield from sorted(path for path in folder.glob("eval_*.json") if path.is_file())
    except OSError:
        return
    if depth:
        for below in _folders(folder):
            yield from _files(below, depth - 1)


def _folders(folder: Path) -> list[Path]:
    try:
        with os.scandir(folder) as entries:
            return sorted(Path(entry.path) for entry in entries if entry.is_dir(follow_symlinks=False))
    except OSError:
        return []


def _same_file(one: Path, other: Path) -> bool:
    try:
        return one.samefile(other)
    except OSError:
        return False


def _is_of(evaluation: Evaluation, folder: Path) -> bool:
    """Whether the checkpoint that was evaluated is one of the run in `folder`."""
    path, digest = evaluation.model("checkpoint"), evaluation.model("checkpoint_sha256")
    if isinstance(path, str) and _same_file(Path(path).parent, folder):
        return True
    return isinstance(digest, str) and digest in _hashes(folder)


def _hashes(folder: Path) -> set[str]:
    """SHA-256 of the run's checkpoints."""
    found = set()
    for path in folder.glob("checkpoint*.pth"):
        try:
            status = path.stat()
            found.add(_hash(path, status.st_mtime_ns, status.st_size))
        except OSError:
            continue
    return found


@functools.lru_cache(maxsize=256)
def _hash(path: Path, _mtime: int, _size: int) -> str:
    """Hashed once for each state of the file: a page is written at every evaluation."""
    return file_sha256(path)


# ---- reading --------------------------------------------------------------------------------------------------------


def _read(path: Path, folder: Path) -> Evaluation:
    try:
        label = os.path.relpath(path.parent.absolute(), folder.absolute())
    except ValueError:  # another drive
        label = str(path.parent)
    evaluation = Evaluation(path, "" if label == "." else label)
    try:
        if path.stat().st_size > _LARGEST:
            raise ValueError("too large for an evaluation")
        content = json.loads(path.read_text(encoding="utf-8"))
        if not isinstance(content, dict):
            raise ValueError(f"a {type(content).__name__} and not an object")
        evaluation.content = content
        evaluation.tables = _tables(path.stem, content)
    except (OSError, ValueError, RecursionError, LookupError, TypeError, AttributeError) as error:
        where = f"{evaluation.label}/{path.name}" if evaluation.label else path.name
        evaluation.problem = f"{where}: not the results of an evaluation ({type(error).__name__}: {str(error)[:160]})"
    return evaluation


def _tables(name: str, content: Mapping[str, Any]) -> list[tuple[str, list[str], list[list[str]]]]:
    """Tables of one JSON's results. Raises LookupError, TypeError, ValueError if it is not of the known form."""
    results, settings = content["results"], _mapping(content.get("settings"))
    if name == "eval_knn":
        rows = [[str(int(r["k"])), _short(r["temperature"]), _two(r["top1"]), _two(r["top5"])] for r in results["knn"]]
        tables = [("k-NN", ["k", "temperature", "top-1", "top-5"], rows)]
        low = results.get("low_shot") or {}
        if low:
            tables.append(("Low-shot k-NN", ["images per class", "k", "temperature", "top-1", "std"], _low_shot(low)))
        return tables
    if name == "eval_linear":
        best, on = results["selected"], settings.get("selected_on", "val")
        if "probes" in results:  # attentive ones too: the best head of each
            probes = {str(label): _best_head(row) for label, row in results["probes"].items()}
            rows = [[label, *tops, head, epoch] for label, (head, epoch, *tops) in probes.items()]
            return [(f"Probes (heads chosen on {on})", ["probe", "top-1", "top-5", "head", "epoch"], rows)]
        return [(f"Linear probe (head chosen on {on})", ["head", "epoch", "top-1", "top-5"], [_best_head(best)])]
    if name == "eval_linear_saved":
        cells = [
            Path(str(settings.get("linear_weights", ""))).name,
            _two(results["val_top1"]),
            _two(results["val_top5"]),
        ]
        tables = [("Saved linear head", ["file", "top-1", "top-5"], [cells])]
        masked = [[_short(r["hidden"]), _two(r["top1"]), _two(r["top5"])] for r in results.get("masked", [])]
        return tables + (
            [("With the most attended patches black", ["hidden", "top-1", "top-5"], masked)] * bool(masked)
        )
    if name == "eval_logistic":
        cells = [_short(results["penalty"]), _two(results["top1"]), _two(results["top5"])]
        return [("Logistic regression on cached features", ["penalty", "top-1", "top-5"], [cells])]
    if name == "eval_background":
        kinds = [key for key, value in results.items() if isinstance(value, Mapping)]
        rows = [[key, _two(results[key]["top1"])] for key in kinds]
        rows += [["BG-gap", _two(results["bg_gap"])]] if "bg_gap" in results else []
        return [(f"ImageNet-9 ({settings.get('classifier')})", ["variant", "top-1"], rows)]
    if name == "eval_localization_summary":
        rows = [[key, _two(100 * results[key]["mean"])] for key in COLUMNS]
        return [(f"Maps without boxes ({results['images']} images)", ["measure", SHARE], rows)]
    if name.startswith("eval_localization_") and "baselines" in results:
        return _localization(results, settings)
    return [(name.removeprefix("eval_").replace("_", " ").capitalize(), ["", ""], _numbers(results))]


def _best_head(row: Mapping[str, Any]) -> list[str]:
    return [str(row["head"]), str(int(row["epoch"])), _two(row["val_top1"]), _two(row["val_top5"])]


def _localization(
    results: Mapping[str, Any], settings: Mapping[str, Any]
) -> list[tuple[str, list[str], list[list[str]]]]:
    """All images, and those with small objects, each beside the boxes that need no model."""
    tables = []
    for part, name in ((results, ""), (results["small"], ", small objects")):
        if not part["images"]:
            continue
        rows = {"model": part, **part["baselines"]}
        if "accuracy" in part:
            kind = "MaxBoxAccV2" if settings.get("multi_contour", True) else "MaxBoxAcc, largest contour"
            accuracies = [value.get("accuracy", value) for value in rows.values()]
            header = ["box", "IoU 30", "IoU 50", "IoU 70", MEAN]
            cells = [[_two(row[key]) for key in ("30", "50", "70", "mean")] for row in accuracies]
        else:
            kind = {"lost": "LOST", "dino_seg": "DINO-seg"}[settings["protocol"]]
            header = ["box", CORLOC, "mean IoU"]
            cells = [[_two(row["corloc"]), _two(row["mean_iou"])] for row in rows.values()]
        title = f"{kind}{name} ({part['images']} images)"
        tables.append((title, header, [[key, *row] for key, row in zip(rows, cells, strict=True)]))
    return tables


def _low_shot(low: Mapping[str, Any]) -> list[list[str]]:
    rows = []
    for nu, first in low.items():
        entries = {_short(first["temperature"]) if "temperature" in first else "": first}
        for temperature, row in {**entries, **_mapping(first.get("by_temperature"))}.items():
            std = _two(row["std"]) if row.get("std") is not None else ""
            rows.append([str(nu), str(int(row["k"])), temperature, _two(row["mean"]), std])
    return rows


def _numbers(results: Mapping[str, Any], prefix: str = "") -> list[list[str]]:
    """Numbers of an evaluation that is not known here, by their names."""
    rows = []
    for key, value in results.items():
        if isinstance(value, Mapping):
            rows += _numbers(value, f"{prefix}{key} ")
        elif isinstance(value, int | float):
            rows.append([f"{prefix}{key}", _short(value)])
    return rows[:100]


def _two(value: Any) -> str:
    return f"{float(value):.2f}"


def _short(value: Any) -> str:
    return f"{float(value):g}"


def _mapping(value: Any) -> Mapping[str, Any]:
    return value if isinstance(value, Mapping) else {}
