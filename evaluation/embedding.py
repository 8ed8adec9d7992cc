"""Features of every image as files, with the images' names: one file, or a folder of parts for sets that do not fit.

A file is an .npz, or an .npy with a .csv of names. A folder holds part-00000.npz, part-00001.npz ... and index.json,
which lists them and says what made them; it is written last, so a folder without it is not complete. The ranks share
the parts, and the same command continues where it was interrupted: a part has its name only once it is whole.

Letters: N images, D width; patch features have one more axis, (N, positions, D).
"""

from __future__ import annotations

import csv
import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from data.source import ImageSource
from evaluation import features, identity
from runtime.checkpoint import check_writable, write_atomic, write_json_atomic
from runtime.distributed import barrier, get_rank, get_world_size, is_main_process, on_main_process
from runtime.guards import InputError
from runtime.terminal import say

PART_BYTES = 256 << 20  # of features in one part, if the number of images in it is not given
INDEX, SETTINGS = "index.json", "settings.json"


def is_folder(path: str | Path) -> bool:
    """Whether `path` means a folder of parts: it is one, or has no suffix."""
    return Path(path).is_dir() or not Path(path).suffix


def check_path(path: str | Path) -> None:
    """Raise InputError unless features can be written to `path`: tried before anything is computed."""
    path = Path(path)
    if not is_folder(path) and path.suffix not in (".npz", ".npy"):
        raise InputError(
            f"--embed {path}: the file must end in .npz, or in .npy (names then go to a .csv next to it); a name "
            "without a suffix is a folder of parts"
        )
    if path.is_dir() and any(path.iterdir()) and not (path / SETTINGS).exists():
        raise InputError(f"--embed {path} is a folder with other files: give a new or an empty one, or a file's name")
    check_writable(path if is_folder(path) else path.parent, "--embed")


@torch.no_grad()
def shape_of(
    model: nn.Module, forward: Callable[[Tensor], Tensor], in_chans: int, settings: dict[str, Any]
) -> tuple[int, ...]:
    """Shape of one image's features, found with an empty image. settings: those of `features.extract_shard`."""
    side = settings["img_size"]
    with features.eval_mode(model):
        return tuple(forward(torch.zeros(1, in_chans, side, side, device=settings["device"])).shape[1:])


# ---- one file -------------------------------------------------------------------------------------------------------


def write_file(
    path: str | Path, array: Tensor, source: ImageSource, description: dict[str, Any], index: Tensor | None = None
) -> list[Path]:
    """Features (N, ...) with the names of their images: one .npz, or an .npy with a .csv of names; returns the files.

    index: which image of the source each row is of, by default all in order.
    .npz: `features` (N, ...), `names` (N,), `labels` (N,) if there are any, `description` (JSON text).
    .csv: columns index, name and, if there are labels, label and class; the description goes to a .json.
    """
    path = Path(path)
    check_path(path)
    columns = _columns(source, np.arange(len(source)) if index is None else index.numpy())
    if path.suffix == ".npz":
        _write_npz(path, {"features": array.numpy(), **columns, "description": np.array(json.dumps(description))})
        return [path]

    def write_npy(temporary: Path) -> None:
        with open(temporary, "wb") as file:
            np.save(file, array.numpy())

    def write_names(temporary: Path) -> None:
        labels = columns.get("labels")
        with open(temporary, "w", newline="", encoding="utf-8", errors="surrogateescape") as file:
            writer = csv.writer(file)
            writer.writerow(["index", "name"] + (["label", "class"] if labels is not None else []))
            for i, name in enumerate(columns["names"]):
                row = [i, name] + ([int(labels[i]), source.classes[labels[i]]] if labels is not None else [])
                writer.writerow(row)

    write_atomic(path, write_npy)
    write_atomic(path.with_suffix(".csv"), write_names)
    write_json_atomic(path.with_suffix(".json"), description)
    return [path, path.with_suffix(".csv"), path.with_suffix(".json")]


def _columns(source: ImageSource, rows: np.ndarray) -> dict[str, np.ndarray]:
    """`names` and, if the source has them, `labels` of these images."""
    columns = {"names": np.array([source.name(int(i)) for i in rows])}
    if source.labels is not None:
        columns["labels"] = source.labels[rows]
    return columns


def _write_npz(path: Path, columns: dict[str, np.ndarray]) -> None:
    def write(temporary: Path) -> None:
        with open(temporary, "wb") as file:
            np.savez(file, **columns)

    write_atomic(path, write)


# ---- a folder of parts ----------------------------------------------------------------------------------------------


def write_parts(
    folder: str | Path,
    model: nn.Module,
    forward: Callable[[Tensor], Tensor],
    source: ImageSource,
    shape: tuple[int, ...],
    description: dict[str, Any],
    settings: dict[str, Any],
    part_images: int | None = None,
) -> Path:
    """Write every image's features as parts of `part_images` images, those that are not there yet; returns the index.

    shape: that of one image's features. settings: those of `features.extract_shard`. Every rank calls, and makes every
    world-size-th of the missing parts; no more than one part is in memory. Raises InputError, on all ranks, if the
    folder holds features that were made otherwise.
    """
    folder, item = Path(folder), torch.empty((), dtype=settings["dtype"]).itemsize
    count = part_images or max(1, PART_BYTES // (item * int(np.prod(shape))))
    starts = range(0, len(source), count)
    made_by = {
        **description, "images": len(source), "images_per_part": count, "shape": list(shape),
        "dtype": str(settings["dtype"]).removeprefix("torch."), "classes": source.classes,
    }  # fmt: skip
    missing = on_main_process(lambda: _missing(folder, made_by, len(starts)))
    if len(missing) < len(starts):
        say(f"{folder}: {len(starts) - len(missing)} of {len(starts)} parts are there already")
    bad: list[int] = []
    for number in missing[get_rank() :: get_world_size()]:
        indices = np.arange(starts[number], min(starts[number] + count, len(source)))
        share = features.extract_shard(
            model, source, forward=forward, indices=indices, desc=f"part {number + 1} of {len(starts)}", **settings
        )
        bad += share.bad
        rows = share.index.numpy()
        array = share.features.view(len(rows), *shape).numpy()
        _write_npz(_part(folder, number), {"features": array, "index": rows, **_columns(source, rows)})
    if settings["on_bad_image"] == "skip":
        features.report_skipped(source, bad, "input")
    barrier()  # the index says that all parts are there
    if is_main_process():
        files = [_part(folder, number).name for number in range(len(starts))]
        write_json_atomic(folder / INDEX, made_by | {"parts": files})
    return folder / INDEX


def _missing(folder: Path, made_by: dict[str, Any], parts: int) -> list[int]:
    """Numbers of the parts still to make; what made them is compared with settings.json, or written there."""
    settings = folder / SETTINGS
    if settings.exists():
        try:
            saved = json.loads(settings.read_text(encoding="utf-8"))
        except ValueError as error:
            raise InputError(f"--embed: {settings} can't be read ({error}): give another folder") from error
        identity.require_same(
            saved, made_by, made_by, f"--embed {folder} holds features that were made otherwise",
            "Give another folder, or remove this one",
        )  # fmt: skip
    else:
        folder.mkdir(parents=True, exist_ok=True)
        write_json_atomic(settings, made_by)
    return [number for number in range(parts) if not _part(folder, number).exists()]


def _part(folder: Path, number: int) -> Path:
    return folder / f"part-{number:05d}.npz"


def read_parts(folder: str | Path) -> Iterator[dict[str, np.ndarray]]:
    """The parts of a complete folder, in the order of the images: `features`, `index`, `names` and, if any, `labels`.

    Raises InputError if the folder is not complete.
    """
    folder = Path(folder)
    if not (folder / INDEX).is_file():
        raise InputError(f"{folder} has no {INDEX}: it is not complete; run eval_knn.py --embed {folder} to its end")
    for name in json.loads((folder / INDEX).read_text(encoding="utf-8"))["parts"]:
        with np.load(folder / name, allow_pickle=False) as part:
            yield dict(part)
