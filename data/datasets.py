"""From the words after --data_path to a set of images: folders, lists, tar shards, the built-in demo set.

    root/train/CLASS/...jpg, root/val/CLASS/...jpg     the usual image-folder root
    folder/CLASS/...jpg                                class folders, without the split
    folder/...jpg                                      images only: no labels
    list.txt, list.csv, root/train.csv                 paths, with or without labels
    shards-000000.tar, root/train/*.tar, "x-{000000..000146}.tar"    tar shards (data/shards.py)
    demo, demo:48                                      data/demo.py

Class numbers follow the sorted names of the class folders, as torchvision's ImageFolder does, so they agree with the
published code's.
"""

from __future__ import annotations

import csv
import dataclasses
import functools
import os
from pathlib import Path

import numpy as np

from data.cache import cache_folder, entry_name, recall, remember, stamps_of
from data.decode import IMAGE_SUFFIXES, BadImage, Picture
from data.demo import open_demo
from data.shards import expand_shards, is_shard_pattern, open_shards, split_shards
from data.source import ImageSource, PackedStrings, labels_from_words
from runtime.distributed import on_main_process
from runtime.guards import InputError

SPLITS = ("train", "val")
LIST_SUFFIXES = (".txt", ".csv", ".tsv")
CACHE_FROM = 20_000  # images from which a list is worth keeping for the next start
_PROBES = 16  # images tried before a data set is said to hold no readable one


class FileSource(ImageSource):
    """Image files: names relative to `root`, one label each or none."""

    def __init__(
        self,
        root: Path,
        names: PackedStrings,
        labels: np.ndarray | None = None,
        classes: list[str] | None = None,
        in_chans: int = 3,
        where: str = "",
    ):
        super().__init__(len(names), labels, classes, in_chans, names.digest(), where or str(root))
        self.root, self._names = str(root), names

    def name(self, i: int) -> str:
        return os.path.join(self.root, self._names[i])

    def read(self, i: int) -> bytes:
        try:
            with open(self.name(i), "rb", buffering=0) as file:
                return file.read()
        except OSError as error:
            raise BadImage(f"can't be read: {error.strerror or error}") from error


def open_images(data_path: str | os.PathLike, split: str = "train", subset: int = -1, in_chans: int = 3) -> ImageSource:
    """The images of `split` ("train" or "val") at `data_path`; see the module for the layouts.

    Every process of a distributed run must call it: one reads the file system and tells the others.
    subset: n > 0 keeps the first n images of each class (all images count as one class where there are no labels);
    -1 keeps all. in_chans: channels of the pixels that `load` returns.
    Raises `InputError` where the path is missing, holds no image, or none that can be read.
    """
    if split not in SPLITS:
        raise InputError(f"split {split!r} is neither 'train' nor 'val'")
    if subset == 0 or subset < -1:
        raise InputError(f"--subset {subset}: give the number of images to keep of each class, or -1 for all")
    path = str(data_path)
    if path.partition(":")[0] == "demo" and not Path(path).exists():
        source = open_demo(path, split, in_chans)
        return source if subset == -1 else _Subset(source, subset)
    source = _open_files(Path(path).expanduser(), split, in_chans)
    _check_readable(source)
    return source if subset == -1 else _Subset(source, subset)


def check_same_classes(train: ImageSource, val: ImageSource) -> None:
    """Raise `InputError` unless both sets have labels that mean the same classes."""
    for source in (train, val):
        if source.labels is None:
            raise InputError(
                f"{source.where} has no labels, which evaluation needs: put the images into one folder per class, or "
                "give a list with a label in each line"
            )
    if train.classes != val.classes:
        only_train = sorted(set(train.classes) - set(val.classes))
        only_val = sorted(set(val.classes) - set(train.classes))
        parts = [f"only in {train.where}: {_some(only_train)}"] if only_train else []
        parts += [f"only in {val.where}: {_some(only_val)}"] if only_val else []
        raise InputError(
            f"train has {len(train.classes)} classes and val {len(val.classes)}, and they differ ({'; '.join(parts)}): "
            "class numbers would not mean the same; give both the same class folders"
        )


def _some(names: list[str], most: int = 5) -> str:
    return ", ".join(names[:most]) + (f" and {len(names) - most} more" if len(names) > most else "")


class _Subset(ImageSource):
    """The first n images of each class of another source, in its order."""

    def __init__(self, source: ImageSource, n: int):
        labels = np.zeros(len(source), dtype=np.int64) if source.labels is None else source.labels
        self._indices = first_of_each_class(labels, n)
        kept = None if source.labels is None else labels[self._indices]
        identity = source.fingerprint().encode() + f"subset {n}".encode()
        super().__init__(len(self._indices), kept, source.classes, source.in_chans, identity, source.where)
        self._source = source

    def open(self, i: int) -> Picture:
        return self._source.open(int(self._indices[i]))

    def read(self, i: int) -> bytes:
        return self._source.read(int(self._indices[i]))

    def name(self, i: int) -> str:
        return self._source.name(int(self._indices[i]))


def first_of_each_class(labels: np.ndarray, n: int) -> np.ndarray:
    """Ascending indices of the first `n` entries of every label."""
    order = np.argsort(labels, kind="stable")
    sorted_labels = labels[order]
    starts = np.searchsorted(sorted_labels, sorted_labels, side="left")
    return np.sort(order[np.arange(len(labels)) - starts < n])


# ---- files ----


def _open_files(path: Path, split: str, in_chans: int) -> ImageSource:
    if is_shard_pattern(path):
        if split == "val":
            raise InputError(f"--data_path {path} names shards of one split: give the folder that holds train and val")
        return open_shards(expand_shards(path), in_chans, str(path))
    if not path.exists():
        raise InputError(f"--data_path {path}: no such file or folder; give a folder of images, a list, shards or demo")
    if path.is_dir():
        path = _split_path(path, split)
        if isinstance(path, list):
            return open_shards(path, in_chans, f"{path[0].parent} ({split})")
    elif path.suffix.lower() not in LIST_SUFFIXES:
        raise InputError(
            f"--data_path {path} is a file, but neither a list of images ({', '.join(LIST_SUFFIXES)}) nor a tar shard"
        )
    find = functools.partial(_read_list, path, split) if path.is_file() else functools.partial(_read_folder, path)
    found = on_main_process(find)  # one process reads the file system for all
    root = path.parent if path.is_file() else path
    return FileSource(root, found.names, found.labels, found.classes, in_chans, str(path))


def _split_path(path: Path, split: str) -> Path | list[Path]:
    """The folder, list file or tar shards of `split` below the folder `path`."""
    shards = split_shards(path / split if (path / split).is_dir() else path, split)
    if shards:
        return shards
    present = {name: (path / name).is_dir() for name in SPLITS}
    if present[split]:
        return path / split
    for suffix in LIST_SUFFIXES:
        if (path / f"{split}{suffix}").is_file():
            return path / f"{split}{suffix}"
    if split == "val":
        raise InputError(f"--data_path {path} has no val/ folder: evaluation needs {path / 'val'} beside train/")
    if present["val"]:
        raise InputError(f"--data_path {path} has val/ but no train/: add {path / 'train'}, or give another folder")
    return path


@dataclasses.dataclass
class Listing:
    """Names relative to a root, with labels or without."""

    names: PackedStrings
    labels: np.ndarray | None = None
    classes: list[str] | None = None

    def arrays(self) -> dict[str, np.ndarray]:
        """For `data.cache`."""
        blob, ends = self.names.arrays()
        arrays = {"blob": blob, "ends": ends}
        if self.labels is not None:
            class_blob, class_ends = PackedStrings.pack(self.classes).arrays()
            arrays |= {"labels": self.labels, "class_blob": class_blob, "class_ends": class_ends}
        return arrays

    @classmethod
    def from_arrays(cls, arrays: dict[str, np.ndarray]) -> Listing:
        listing = cls(PackedStrings(arrays["blob"], arrays["ends"]))
        if "labels" in arrays:
            listing.labels = arrays["labels"]
            listing.classes = list(PackedStrings(arrays["class_blob"], arrays["class_ends"]))
        return listing


def _read_folder(folder: Path) -> Listing:
    """All images below a folder: scanned, or remembered where no folder below has changed since."""
    name = entry_name("folder", str(folder.resolve()))
    entry = recall(cache_folder() / name)
    if entry is not None:
        folders = [os.path.join(folder, f) for f in PackedStrings(entry["folder_blob"], entry["folder_ends"])]
        if np.array_equal(stamps_of(folders), entry["stamps"]):
            return Listing.from_arrays(entry)
    names, folders = scan_folder(folder)
    if not names:
        raise InputError(
            f"{folder} holds no image: no file below it ends in one of {', '.join(IMAGE_SUFFIXES)}; check --data_path"
        )
    listing = Listing(PackedStrings.pack(names), *_labels_from_folders(names))
    if len(names) >= CACHE_FROM:
        stamps = stamps_of([os.path.join(folder, f) for f in folders])
        if stamps is not None:
            blob, ends = PackedStrings.pack(folders).arrays()
            arrays = {**listing.arrays(), "folder_blob": blob, "folder_ends": ends, "stamps": stamps}
            remember([cache_folder()], name, arrays, stamps)
    return listing


def scan_folder(folder: Path) -> tuple[list[str], list[str]]:
    """Sorted relative names of all image files below `folder`, hidden ones left out; and of all folders there."""
    found: list[str] = []
    folders = [""]
    for relative in folders:  # grows while it is walked
        with os.scandir(os.path.join(folder, relative)) as entries:
            for entry in entries:
                if entry.name.startswith("."):
                    continue
                name = f"{relative}/{entry.name}" if relative else entry.name
                if entry.name.lower().endswith(IMAGE_SUFFIXES):
                    if entry.is_file():
                        found.append(name)
                elif entry.is_dir():
                    folders.append(name)
    return sorted(found, key=lambda name: name.split("/")), folders


def _labels_from_folders(names: list[str]) -> tuple[np.ndarray, list[str]] | tuple[None, None]:
    """Class numbers and names from the first folder of each name; none where an image lies in no class folder."""
    tops = [name.split("/", 1)[0] if "/" in name else None for name in names]
    return (None, None) if None in tops else labels_from_words(tops, numbers=False)


# ---- lists ----


def _read_list(file: Path, split: str) -> Listing:
    """A text file with `path` or `path label` in each line, or CSV/TSV with or without a header path,label,split."""
    name = entry_name("list", str(file.resolve()), split)
    stamps = stamps_of([file])
    entry = recall(cache_folder() / name)
    if entry is not None and np.array_equal(stamps, entry["stamps"]):
        return Listing.from_arrays(entry)
    rows = _read_rows(file, split)
    if not rows:
        raise InputError(f"{file} lists no image for {split}: each line should hold a path, or a path and a label")
    root = file.parent
    missing = [path for path, _ in rows if not os.path.isfile(os.path.join(root, path))]
    if missing:
        raise InputError(
            f"{len(missing)} of the {len(rows)} images that {file} lists do not exist ({_some(missing, 3)}): "
            f"paths are taken relative to {root}; correct the list or leave these lines out"
        )
    labelled = [label is not None for _, label in rows]
    if any(labelled) and not all(labelled):
        line = labelled.index(False)
        raise InputError(f"{file} has a label in some lines but none for {rows[line][0]}: label all lines or none")
    listing = Listing(PackedStrings.pack(path for path, _ in rows))
    if all(labelled):
        listing.labels, listing.classes = labels_from_words([label for _, label in rows])
    if len(rows) >= CACHE_FROM:
        remember([cache_folder()], name, {**listing.arrays(), "stamps": stamps}, stamps)
    return listing


def _read_rows(file: Path, split: str) -> list[tuple[str, str | None]]:
    with open(file, encoding="utf-8-sig", errors="surrogateescape", newline="") as text:
        if file.suffix.lower() == ".txt":
            table = [_split_text_line(line) for line in text if line.strip() and not line.startswith("#")]
        else:
            delimiter = "\t" if file.suffix.lower() == ".tsv" else ","
            table = [row for row in csv.reader(text, delimiter=delimiter) if row]
    columns = {"path": 0, "label": 1}
    if table and "path" in [cell.strip().lower() for cell in table[0]]:
        columns = {cell.strip().lower(): number for number, cell in enumerate(table.pop(0))}
    if "split" in columns:
        table = [row for row in table if row[columns["split"]].strip() == split]
    elif split == "val" and file.stem != "val":
        raise InputError(f"{file} has no split column, so it has no val images: add one, or give a folder with val.csv")
    label = columns.get("label")
    return [
        (row[columns["path"]].strip(), row[label].strip() if label is not None and label < len(row) else None)
        for row in table
    ]


def _split_text_line(line: str) -> list[str]:
    """`path`, `path<TAB>label`, `path,label` or `path label`."""
    line = line.strip()
    for separator in ("\t", ",", " "):
        head, _, tail = line.rpartition(separator)
        if head and not tail.lower().endswith(IMAGE_SUFFIXES):
            return [head, tail]
    return [line]


def _check_readable(source: ImageSource) -> None:
    """Raise `InputError` unless one of a few images, spread over the set, can be decoded."""
    reasons = []
    for i in np.unique(np.linspace(0, len(source) - 1, _PROBES).astype(np.int64)):
        try:
            source.load(int(i))
            return
        except BadImage as error:
            reasons.append(f"{source.name(int(i))} {error}")
    raise InputError(
        f"{source.where}: no readable image among the {len(reasons)} tried of {len(source)} ({_some(reasons, 3)}); "
        "python -m tools.check_images lists what is wrong"
    )
