"""Images with the boxes of their objects: annotations matched with image files, and checked once.

Images without a box are left out, and counted. What can't be used (a box outside its image or without area, an
annotation of a missing image, a listed image without an annotation, a size that is not the picture's) is an
`InputError` that names each, unless such entries are to be skipped.

Letters: N images, M boxes in all.
"""

from __future__ import annotations

import functools
import hashlib
import os
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from torch.utils.data import Dataset

from data.boxes_formats import (
    Annotation,
    Problem,
    kind_of,
    read_annotations,
    read_names,
    voc_root,
    without_suffix,
)
from data.decode import BadImage
from data.files import FileSource, read_folder
from data.loader import build_loader
from data.parts import Part
from data.sampler import shard_for_eval
from data.shards import expand_shards, is_shard_pattern, open_shards, split_shards
from data.source import ImageSource, PackedStrings
from runtime.distributed import all_gather_objects, get_rank, get_world_size, on_main_process
from runtime.guards import InputError
from runtime.progress import progress
from runtime.terminal import say

NAMES = ("boxes.csv", "boxes.json", "metadata")  # where a folder of images may hold its boxes
_SLACK = 1.0  # pixels: formats disagree on whether counting starts at 0 or 1, and on the far edge
_LISTED = 5  # problems that a message names


@dataclass
class BoxedImages:
    """N images, each with at least one box; boxes refer to `sizes`, as the annotations give them."""

    source: ImageSource
    sizes: np.ndarray  # (N, 2) int64: width, height
    starts: np.ndarray  # (N + 1,) int64: the boxes of image i are rows starts[i] to starts[i + 1]
    corners: np.ndarray  # (M, 4) float64: x0, y0, x1, y1
    annotations: str
    left_out: dict[str, int] = field(default_factory=dict)  # images by reason

    def __len__(self) -> int:
        return len(self.sizes)

    def truths(self, i: int) -> np.ndarray:
        """The boxes of image i, (M_i, 4)."""
        return self.corners[self.starts[i] : self.starts[i + 1]]

    def fingerprint(self) -> str:
        """Twelve hexadecimal digits that tell these images with these boxes from others."""
        digest = hashlib.sha256(self.source.fingerprint().encode())
        for array in (self.sizes, self.starts, self.corners):
            digest.update(array.tobytes())
        return digest.hexdigest()[:12]


class _Matched(NamedTuple):
    """Annotations whose images exist, as plain data that processes can exchange."""

    where_images: np.ndarray | PackedStrings  # rows of the shards' source, or names of files
    names: list[str]
    places: list[str]
    sizes: np.ndarray  # (n, 2) as annotated, 0 if unknown
    counts: list[int]
    corners: np.ndarray
    problems: list[Problem]
    unannotated: int


def find_boxes(data_path: str | os.PathLike) -> Path | None:
    """Where the boxes of the images at `data_path` lie: there, or in one of NAMES; None if nowhere."""
    path = Path(data_path).expanduser()
    candidates = [path, *(path / name for name in NAMES)] if path.is_dir() else [path]
    return next((place for place in candidates if kind_of(place) is not None), None)


def open_boxes(
    data_path: str | os.PathLike,
    annotations: str | os.PathLike | None = None,
    image_list: str | os.PathLike | None = None,
    in_chans: int = 3,
    num_workers: int = 0,
    on_bad: str = "raise",
) -> BoxedImages:
    """The images at `data_path` that have boxes. Every process of a distributed run must call it; one reads for all.

    annotations: where the boxes are, by default what `find_boxes` finds; image_list: a file with the names of the
    images to take. on_bad: "raise" for entries that can't be used, or "skip" them, and say which.
    Raises `InputError` for those, for an unknown format, and if no image with a box is left.
    """
    place = on_main_process(lambda: _annotations_place(data_path, annotations))
    shards = _shards(data_path, place, in_chans)
    found = on_main_process(lambda: _match(place, image_list, shards, _image_folder(data_path, place)))
    if shards is not None:
        source: ImageSource = Part(shards, found.where_images, "with boxes")
    else:
        source = FileSource(_image_folder(data_path, place), found.where_images, in_chans=in_chans)
    pictures = picture_sizes(source, num_workers)
    return _checked(source, found, pictures, str(place), on_bad)


# ---- which files ----------------------------------------------------------------------------------------------------


def _annotations_place(data_path: str | os.PathLike, annotations: str | os.PathLike | None) -> Path:
    if annotations is not None:
        place = Path(annotations).expanduser()
        if not place.exists():
            raise InputError(f"--annotations {place}: no such file or folder")
        return place
    path = Path(data_path).expanduser()
    demo = not path.exists() and str(path).partition(":")[0] == "demo"
    if not path.exists() and not demo:
        raise InputError(f"--data_path {path}: no such file or folder; give images with boxes")
    place = find_boxes(path)
    if place is None:
        raise InputError(
            f"--data_path {path} holds no boxes: give a PASCAL VOC folder or tar, or name the boxes with --annotations "
            "(COCO .json, a folder of wsolevaluation's metadata, or a .csv)"
        )
    return place


def _shards(data_path: str | os.PathLike, place: Path, in_chans: int) -> ImageSource | None:
    """The images in tar files, None for files in a folder."""
    path = Path(data_path).expanduser()
    if is_shard_pattern(path):
        return open_shards(expand_shards(path), in_chans, str(path))
    if path.is_dir() and path != place and (shards := split_shards(path, "val") or split_shards(path, "train")):
        return open_shards(shards, in_chans, str(path))
    return None


def _image_folder(data_path: str | os.PathLike, place: Path) -> Path:
    """The folder that the names of annotated images are relative to."""
    path = Path(data_path).expanduser()
    folder = path if path.is_dir() else path.parent
    root = voc_root(folder) if kind_of(folder) == "voc" else None
    return folder if root is None else root / "JPEGImages"


def _match(place: Path, image_list: str | os.PathLike | None, shards: ImageSource | None, folder: Path) -> _Matched:
    """The annotations at `place` with the images that they are of. Raises InputError."""
    wanted = None if image_list is None else read_names(Path(image_list).expanduser())
    annotated, problems = read_annotations(place, wanted)
    if not annotated and not problems:
        raise InputError(f"{place} describes no image")
    if shards is not None:
        files = [shards.name(i).partition(".tar:")[2] for i in range(len(shards))]
    else:
        files = list(read_folder(folder).names)
    finder = _Finder(files)
    rows, kept = [], []
    for annotation in annotated:
        row = finder.find(annotation.image)
        if row is None:
            problems.append(Problem(annotation.image, f"{annotation.where}: the image {annotation.image} does not exist"
                                    f" below {folder if shards is None else shards.where}"))  # fmt: skip
        else:
            rows.append(row)
            kept.append(annotation)
    where = np.array(rows, dtype=np.int64) if shards is not None else PackedStrings.pack(files[row] for row in rows)
    closed = wanted is not None or (kind_of(place) == "voc" and _is_listed(place))
    return _as_arrays(kept, where, problems, 0 if closed else len(files) - len(set(rows)))


def _as_arrays(
    kept: Sequence[Annotation], where: np.ndarray | PackedStrings, problems: list[Problem], unannotated: int
) -> _Matched:
    return _Matched(
        where, [a.image for a in kept], [a.where for a in kept],
        np.array([a.size or (0, 0) for a in kept], dtype=np.int64).reshape(-1, 2), [len(a.boxes) for a in kept],
        np.array([box for a in kept for box in a.boxes], dtype=np.float64).reshape(-1, 4), problems, unannotated,
    )  # fmt: skip


def _is_listed(place: Path) -> bool:
    """Whether a VOC folder says which of its images count."""
    root = voc_root(place) if place.is_dir() else None
    return root is None or (root / "ImageSets" / "Main" / "trainval.txt").is_file()


class _Finder:
    """Rows of files by the names that annotations use: the path, its last part, or either without the suffix."""

    def __init__(self, files: Sequence[str]) -> None:
        self._files = files
        self._exact = {file: row for row, file in enumerate(files)}

    def find(self, name: str) -> int | None:
        """The row of an image, None if no file or more than one goes by this name."""
        name = name.removeprefix("./")
        if name in self._exact:
            return self._exact[name]
        row = self._loose.get(name)
        return row if row is not None else self._loose.get(name.rpartition("/")[2])

    @functools.cached_property
    def _loose(self) -> dict[str, int | None]:
        """Rows by what is left of the names; None for two files of one name. Made for the first name that needs it."""
        rows: dict[str, int | None] = {}
        for form in (without_suffix, _last_part, lambda file: without_suffix(_last_part(file))):
            level: dict[str, int | None] = {}
            for row, file in enumerate(self._files):
                name = form(file)
                level[name] = None if name in level else row
            rows = {**level, **rows}
        return rows


def _last_part(name: str) -> str:
    return name.rpartition("/")[2]


# ---- checks ---------------------------------------------------------------------------------------------------------


class _Sizes(Dataset):
    """Indices -> (n, 3) int64: index, width and height of each picture, 0 for one that can't be read."""

    def __init__(self, source: ImageSource) -> None:
        self.source = source

    def __getitems__(self, indices: Sequence[int]) -> torch.Tensor:
        rows = []
        for i in indices:
            try:
                picture = self.source.open(i)
                rows.append((i, picture.width, picture.height))
            except BadImage:
                rows.append((i, 0, 0))
        return torch.tensor(rows, dtype=torch.int64)


def picture_sizes(source: ImageSource, num_workers: int = 0) -> np.ndarray:
    """(N, 2) width and height of every picture as it is shown, from the headers; 0 for one that can't be read.

    The ranks divide the work; every rank must call it.
    """
    share = shard_for_eval(len(source), get_rank(), get_world_size())
    batches = [share[start : start + 64].tolist() for start in range(0, len(share), 64)]
    loader = build_loader(_Sizes(source), batches, min(num_workers, len(batches)))
    shown = progress(loader, len(batches), "image sizes") if len(batches) > 50 else loader
    mine = torch.cat([torch.empty(0, 3, dtype=torch.int64), *shown]).numpy()
    sizes = np.zeros((len(source), 2), np.int64)
    for rows in all_gather_objects(mine):
        sizes[rows[:, 0]] = rows[:, 1:]
    return sizes


def _checked(source: ImageSource, found: _Matched, pictures: np.ndarray, place: str, on_bad: str) -> BoxedImages:
    """The images that have a good box. Raises InputError for problems, unless on_bad is "skip"."""
    problems = list(found.problems)
    kept, sizes, corners, counts = [], [], [], []
    empty, start = found.unannotated, 0
    for i, count in enumerate(found.counts):
        boxes, start = found.corners[start : start + count], start + count
        picture, where = pictures[i], f"{found.places[i]} ({found.names[i]})"
        size = found.sizes[i] if found.sizes[i].all() else picture
        if not picture.all():
            problems.append(Problem(found.names[i], f"{source.name(i)} {_reason(source, i)}"))
            continue
        if abs(size[0] * picture[1] - size[1] * picture[0]) > max(size.max(), picture.max()) * 2:
            problems.append(Problem(found.names[i], f"{where}: the annotation is of {size[0]} x {size[1]} pixels, but "
                                    f"the picture has {picture[0]} x {picture[1]}"))  # fmt: skip
            continue
        good = []
        for box in boxes:
            wrong = box_problem(box, size)
            if wrong:
                problems.append(Problem(found.names[i], f"{where}: box {shown_box(box)} {wrong}"))
            else:
                good.append(box)
        if good:
            kept.append(i)
            sizes.append(size)
            corners.extend(good)
            counts.append(len(good))
        elif not len(boxes):
            empty += 1
    if problems:
        _report(problems, on_bad)
    without = len(source) + found.unannotated - len(kept)
    if not kept:
        raise InputError(f"{place}: none of {without} images has a box that can be used")
    if empty:
        say(f"{empty} images without a box are left out")
    if len(kept) < len(source):
        source = Part(source, np.array(kept), "with good boxes")
    return BoxedImages(
        source, np.array(sizes, dtype=np.int64), np.cumsum([0, *counts]), np.array(corners), place,
        {"without_boxes": empty, "bad": without - empty},
    )  # fmt: skip


def _reason(source: ImageSource, i: int) -> str:
    try:
        source.open(i)
    except BadImage as error:
        return str(error)
    return "could not be read a moment ago"


def box_problem(box: np.ndarray, size: Sequence[int]) -> str | None:
    """What is wrong with a box in an image of `size` (width, height); None if nothing is.

    A box may reach one pixel beyond the image: formats disagree on where counting starts and on the far edge.
    """
    x0, y0, x1, y1 = box
    if not (x0 < x1 and y0 < y1):
        return "has no area"
    if x0 < -_SLACK or y0 < -_SLACK or x1 > size[0] + _SLACK or y1 > size[1] + _SLACK:
        return f"is not inside its image of {size[0]} x {size[1]} pixels"
    return None


def shown_box(box: Sequence[float]) -> str:
    """A box as text."""
    return "(" + ", ".join(f"{value:g}" for value in box) + ")"


def _report(problems: Sequence[Problem], on_bad: str) -> None:
    """Name the problems: as an error, or as a warning if they are skipped."""
    lines = [problem.message for problem in problems]
    listed = "; ".join(lines[:_LISTED]) + (f"; and {len(lines) - _LISTED} more" if len(lines) > _LISTED else "")
    if on_bad == "skip":
        say(f"warning: {len(lines)} annotations or images left out: {listed}")
        return
    raise InputError(f"{listed}: correct the annotations, or leave such entries out with --on_bad_image skip")
