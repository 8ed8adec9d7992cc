"""The numbers of runs, from the files that the programs leave in their folders."""

from __future__ import annotations

import csv
import io
import json
import math
import re
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, NamedTuple

from runtime.guards import InputError

RUN = "LABEL/seedN"
_UNTRAINED = "untrained.json"
_TEXTS = ("config.json", "log.txt", "DONE", _UNTRAINED)
_NAMES = ("k", "name", "nu")  # what tells the entries of a list apart in the JSON of an evaluation
_HEADER = ["label", "seed", "metric", "value", "file"]


class Measurement(NamedTuple):
    """One number of one run, and the file that it stands in."""

    label: str
    seed: int
    metric: str
    value: float
    file: str


class RunFolder(NamedTuple):
    """A folder LABEL/seedN."""

    path: Path
    label: str
    seed: int

    @property
    def name(self) -> str:
        return f"{self.label}/seed{self.seed}"

    def files(self) -> list[Path]:
        """Its texts: configuration, log, marker, and the JSON files of evaluations, in folders below as well."""
        own = [self.path / name for name in _TEXTS if (self.path / name).is_file()]
        return own + sorted(self.path.rglob("eval_*.json"))


def find_runs(root: Path) -> list[RunFolder]:
    """All runs below a folder, by label and seed. Raises InputError if there is none."""
    if not root.is_dir():
        raise InputError(f"{root} is not a folder of runs")
    runs = []
    for path in root.rglob("seed*"):
        seed = re.fullmatch(r"seed(\d+)", path.name)
        if seed and path.is_dir() and path != root:
            runs.append(RunFolder(path, path.parent.relative_to(root).as_posix(), int(seed[1])))
    if not runs:
        raise InputError(f"{root} has no runs; a run is a folder {RUN}, such as simpool/seed0")
    return sorted(runs, key=lambda run: (run.label, run.seed))


def read_run(run: RunFolder, relative_to: Path) -> list[Measurement]:
    """Every number of a run: the last loss and evaluations in log.txt, and those of the evaluations' JSON files.

    A metric's name is the path to the number: "train_loss", "val average top1", "k-NN 20 top1", "eval_knn knn 20 top1",
    "untrained k-NN 20 top1" (before the first step).
    Raises InputError for a file that cannot be read, and if its own config.json says another seed.
    """
    measured = []
    config = run.path / "config.json"
    if config.is_file() and read_json(config).get("seed", run.seed) != run.seed:
        raise InputError(f"{config} is of seed {read_json(config)['seed']}, but lies in {run.name}; move it")
    for path in run.files():
        where = path.relative_to(relative_to).as_posix()
        if path.name == "log.txt":
            numbers = _last_of_log(path)
        elif path.name == _UNTRAINED:
            numbers = dict(_flat(read_json(path), path.stem))
        elif path.suffix == ".json" and path.name != "config.json":
            prefix = " ".join([*path.parent.relative_to(run.path).parts, path.stem])
            numbers = dict(_flat(read_json(path).get("results", {}), prefix))
        else:
            continue
        measured += [Measurement(run.label, run.seed, name, value, where) for name, value in numbers.items()]
    return measured


def _last_of_log(path: Path) -> dict[str, float]:
    """The last epoch's mean loss, and the last numbers of each evaluation (in a row: {"val": {"model": {...}}})."""
    last: dict[str, float] = {}
    for number, line in enumerate(path.read_text().splitlines(), 1):
        try:
            row = json.loads(line)
        except ValueError as error:
            raise InputError(f"{path}, line {number}, is no JSON: {error}") from error
        for name, value in row.items():
            if name == "train_loss" or (isinstance(value, Mapping) and name != "monitors"):
                last |= dict(_flat(value, name))
    return last


def _flat(value: Any, name: str) -> Iterator[tuple[str, float]]:
    """Every finite number inside, by the path to it; of lists, those of entries that have a name."""
    if isinstance(value, Mapping):
        for key, entry in value.items():
            yield from _flat(entry, f"{name} {key}")
    elif isinstance(value, list):
        for entry in value:
            own = next((key for key in _NAMES if isinstance(entry, Mapping) and key in entry), None)
            if own is not None:
                yield from _flat({k: v for k, v in entry.items() if k != own}, f"{name} {entry[own]}")
    elif isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value):
        yield name, float(value)


def read_json(path: Path) -> dict[str, Any]:
    """The object that a file holds. Raises InputError if there is none."""
    try:
        content = json.loads(path.read_text())
    except (OSError, ValueError) as error:
        raise InputError(f"{path} can't be read: {error}") from error
    if not isinstance(content, dict):
        raise InputError(f"{path} holds a {type(content).__name__}, not an object")
    return content


# ---- results.csv ----------------------------------------------------------------------------------------------------


def to_csv(measured: list[Measurement]) -> str:
    """One line per number, with all its digits."""
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    writer.writerow(_HEADER)
    writer.writerows([*entry[:3], repr(entry.value), entry.file] for entry in measured)
    return text.getvalue()


def read_csv(path: Path) -> list[Measurement]:
    """The inverse of to_csv. Raises InputError if there is no such file, or it is of another form."""
    try:
        header, *lines = csv.reader(path.read_text().splitlines())
        if header != _HEADER:
            raise ValueError(f"its columns are {', '.join(header)}")
        return [Measurement(label, int(seed), metric, float(value), file) for label, seed, metric, value, file in lines]
    except (OSError, ValueError) as error:
        raise InputError(f"{path} can't be read as results: {error}") from error
