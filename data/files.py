"""Image files in folders: the source that reads them, and the search for them."""

from __future__ import annotations

import dataclasses
import os
import time
from pathlib import Path

import numpy as np

from data.cache import cache_folder, entry_name, recall, remember, stamp_of, stamps_of
from data.decode import IMAGE_SUFFIXES, BadImage
from data.limits import MAX_FILE_BYTES
from data.source import ImageSource, PackedStrings, labels_from_words, valid_classes, valid_strings
from runtime.guards import InputError
from runtime.terminal import say

CACHE_FROM = 20_000  # images from which a list is worth keeping for the next start


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
                size = os.fstat(file.fileno()).st_size
                if size > MAX_FILE_BYTES:
                    raise BadImage(f"is a file of {size:,} bytes, more than the {MAX_FILE_BYTES:,} of an image")
                return file.read()
        except OSError as error:
            raise BadImage(f"can't be read: {error.strerror or error}") from error
        except ValueError as error:
            raise BadImage(f"can't be read: {error}") from error


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
    def from_arrays(cls, arrays: dict[str, np.ndarray]) -> Listing | None:
        """The inverse of `arrays`; None for arrays of another form."""
        if not valid_strings(arrays, "blob", "ends") or not valid_classes(arrays):
            return None
        listing = cls(PackedStrings(arrays["blob"], arrays["ends"]))
        if "labels" in arrays:
            listing.labels = arrays["labels"]
            listing.classes = list(PackedStrings(arrays["class_blob"], arrays["class_ends"]))
        return listing


def read_folder(folder: Path) -> Listing:
    """All images below a folder: scanned, or recalled if no folder below has changed since. Raises `InputError`."""
    name = entry_name("folder", str(folder.resolve()))
    entry = recall(cache_folder() / name)
    if entry is not None and valid_strings(entry, "folder_blob", "folder_ends"):
        folders = [os.path.join(folder, f) for f in PackedStrings(entry["folder_blob"], entry["folder_ends"])]
        listing = Listing.from_arrays(entry)
        if listing is not None and np.array_equal(stamps_of(folders), entry.get("stamps")):
            return listing
    taken_ns = time.time_ns()
    names, folders, stamps = scan_folder(folder)
    if not names:
        raise InputError(
            f"{folder} holds no image: no file below it ends in one of {', '.join(IMAGE_SUFFIXES)}; check --data_path"
        )
    listing = Listing(PackedStrings.pack(names), *_labels_from_folders(names))
    if len(names) >= CACHE_FROM:
        blob, ends = PackedStrings.pack(folders).arrays()
        arrays = {**listing.arrays(), "folder_blob": blob, "folder_ends": ends, "stamps": stamps}
        remember([cache_folder()], name, arrays, stamps, taken_ns)
    return listing


def scan_folder(folder: Path) -> tuple[list[str], list[str], np.ndarray]:
    """Sorted relative names of all image files below `folder`, hidden ones left out; all folders there; their stamps.

    Each stamp is taken before its folder is read, so that a change in between shows later. A folder is read once,
    however many links lead to it: links may form a circle. Raises `InputError` if a folder can't be read.
    """
    found: list[str] = []
    folders: list[str] = []
    stamps: list[tuple[int, int]] = []
    seen: dict[tuple[int, int], str] = {}
    waiting, links = [""], []  # real folders come first, so that a link never stands for a folder that lies here
    while waiting or links:
        relative = waiting.pop() if waiting else links.pop(0)
        path = os.path.join(folder, relative)
        try:
            state = os.stat(path)
            first = seen.setdefault((state.st_dev, state.st_ino), relative)
            if first != relative:
                say(f"warning: {path} is the folder {os.path.join(folder, first)} under another name; read once")
                continue
            folders.append(relative)
            stamps.append(stamp_of(path))
            with os.scandir(path) as listed:
                entries = sorted(listed, key=lambda entry: entry.name)
        except OSError as error:
            raise InputError(
                f"the folder {path} can't be read ({error.strerror or error}): give it read and search permission, or "
                "move it elsewhere"
            ) from error
        for entry in entries:
            if entry.name.startswith("."):
                continue
            name = f"{relative}/{entry.name}" if relative else entry.name
            kind = _kind(entry)
            if kind == "file" and entry.name.lower().endswith(IMAGE_SUFFIXES):
                found.append(name)
            elif kind == "folder":
                (links if entry.is_symlink() else waiting).append(name)
    return sorted(found, key=lambda name: name.split("/")), folders, np.array(stamps, dtype=np.int64)


def _kind(entry: os.DirEntry) -> str:
    """file, folder, or other: a socket, or a link that leads nowhere or to itself."""
    try:
        return "file" if entry.is_file() else "folder" if entry.is_dir() else "other"
    except OSError:
        return "other"


def _labels_from_folders(names: list[str]) -> tuple[np.ndarray, list[str]] | tuple[None, None]:
    """Class numbers and names from the first folder of each name; none if an image lies in no class folder."""
    tops = [name.split("/", 1)[0] if "/" in name else None for name in names]
    return (None, None) if None in tops else labels_from_words(tops, numbers=False)


def holds_images(folder: Path) -> str | None:
    """An image file in the folder or in one of its subfolders, relative to it; None if there is none."""
    for place in (folder, *sorted(p for p in folder.iterdir() if p.is_dir() and not p.name.startswith("."))):
        with os.scandir(place) as entries:
            for entry in entries:
                if entry.name.lower().endswith(IMAGE_SUFFIXES) and entry.name[0] != "." and _kind(entry) == "file":
                    return os.path.relpath(entry.path, folder)
    return None
