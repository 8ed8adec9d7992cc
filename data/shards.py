"""Images in tar shards, in the WebDataset naming convention, read by random access.

    n01440764/00000012.jpg, n01440764/00000012.cls     members with one key: the path up to the first dot of its name
    00000013.png, 00000013.cls                         labels from .cls (or .cls.txt), or else from the folder part

An index of where each image lies is built once and kept beside the shards, or in the cache folder where that can't be
written. With it an image costs one `pread`, so shuffling, subsets and exact resume are what they are with files; the
usual streaming readers shuffle within a buffer and can do none of these.
"""

from __future__ import annotations

import os
import re
import tarfile
from collections import OrderedDict
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch

from data.cache import cache_folder, entry_name, recall, remember, stamps_of
from data.decode import IMAGE_SUFFIXES, BadImage
from data.source import ImageSource, PackedStrings, labels_from_words
from runtime.distributed import on_main_process
from runtime.guards import InputError
from runtime.progress import progress

_LABEL_SUFFIXES = ("cls", "cls.txt")
_OPEN_SHARDS = 64  # file handles that a process keeps; a process may usually hold 1,024
_BRACES = re.compile(r"\{(\d+)\.\.(\d+)\}")


class ShardSource(ImageSource):
    """Images inside tar files, each known by its shard, offset and length."""

    def __init__(self, shards: Sequence[Path], index: dict[str, np.ndarray], in_chans: int, where: str):
        self._names = PackedStrings(index["blob"], index["ends"])
        labels, classes = None, None
        if "labels" in index:
            labels = index["labels"]
            classes = list(PackedStrings(index["class_blob"], index["class_ends"]))
        super().__init__(len(self._names), labels, classes, in_chans, self._names.digest(), where)
        self._shards = [str(s) for s in shards]
        self._places = torch.from_numpy(index["places"])  # (len, 3) int64: shard, offset, length
        self._handles: OrderedDict[int, int] = OrderedDict()

    def __getstate__(self) -> dict:
        return {**self.__dict__, "_handles": OrderedDict()}  # handles stay with the process that opened them

    def __del__(self):
        for handle in getattr(self, "_handles", {}).values():
            os.close(handle)

    def name(self, i: int) -> str:
        return f"{self._shards[int(self._places[i, 0])]}:{self._names[i]}"

    def read(self, i: int) -> bytes:
        shard, offset, length = self._places[i].tolist()
        try:
            # pread has no position to share, so forked workers may use the handles they inherit
            data = os.pread(self._handle(shard), length, offset)
        except OSError as error:
            raise BadImage(f"can't be read: {error.strerror or error}") from error
        if len(data) != length:
            raise BadImage(f"is cut off: {len(data)} of {length} bytes are there")
        return data

    def _handle(self, shard: int) -> int:
        if shard in self._handles:
            self._handles.move_to_end(shard)
        else:
            self._handles[shard] = os.open(self._shards[shard], os.O_RDONLY)
            if len(self._handles) > _OPEN_SHARDS:
                os.close(self._handles.popitem(last=False)[1])
        return self._handles[shard]


# ---- which files ----


def is_shard_pattern(path: Path) -> bool:
    """Whether a path names one shard or a range of them, `x-{000000..000146}.tar`."""
    return path.name.lower().endswith((".tar", ".tar.gz", ".tgz", ".tar.zst"))


def expand_shards(path: Path) -> list[Path]:
    """The shards that a path names, checked to exist and to allow random access."""
    if not path.name.lower().endswith(".tar"):
        raise InputError(
            f"--data_path {path}: a compressed tar can't be read at random; unpack it to a plain .tar first"
        )
    braces = _BRACES.search(str(path))
    names = [str(path)]
    if braces:
        first, last = braces.groups()
        start, end = braces.span()
        names = [f"{str(path)[:start]}{i:0{len(first)}d}{str(path)[end:]}" for i in range(int(first), int(last) + 1)]
    missing = [name for name in names if not Path(name).is_file()]
    if missing or not names:
        some = ", ".join(missing[:3])
        raise InputError(f"--data_path {path}: {len(missing)} of {len(names)} shards do not exist ({some})")
    return [Path(name) for name in names]


def split_shards(folder: Path, split: str) -> list[Path]:
    """The shards of `split` that lie directly in `folder`: all, unless their names say train and val."""
    shards = sorted(folder.glob("*.tar"))
    if folder.name == split:
        return shards
    other = "val" if split == "train" else "train"
    named = [s for s in shards if re.search(rf"(^|[^a-z]){split}([^a-z]|$)", s.name.lower())]
    others = [s for s in shards if re.search(rf"(^|[^a-z]){other}([^a-z]|$)", s.name.lower())]
    if named or others:
        return named
    return shards if split == "train" else []


# ---- the index ----


def open_shards(shards: Sequence[Path], in_chans: int = 3, where: str = "") -> ShardSource:
    """Open shards through their index, which one process of a run builds or reads for all."""
    return ShardSource(shards, on_main_process(lambda: _index(shards)), in_chans, where or str(shards[0].parent))


def _index(shards: Sequence[Path]) -> dict[str, np.ndarray]:
    folder = shards[0].parent
    name = ".shards-" + entry_name("shards", *(s.name for s in shards))
    stamps = stamps_of(shards)
    folders = [folder, cache_folder() / entry_name("folder of shards", str(folder.resolve()))]
    for place in folders:
        index = recall(place / name)
        if index is not None and np.array_equal(stamps, index["stamps"]):
            return index
    index = build_index(shards)
    remember(folders, name, {**index, "stamps": stamps}, stamps)
    return index


def build_index(shards: Sequence[Path]) -> dict[str, np.ndarray]:
    """Read the headers of all shards: names (blob, ends), places (N, 3), and labels and classes where there are any."""
    names: list[str] = []
    places: list[tuple[int, int, int]] = []
    words: list[str | None] = []
    for number, shard in enumerate(progress(shards, len(shards), "indexing shards")):
        for name, place, word in _samples(shard):
            names.append(name)
            places.append((number, *place))
            words.append(word)
    if not names:
        raise InputError(f"{shards[0]} and the shards beside it hold no image ({', '.join(IMAGE_SUFFIXES)})")
    blob, ends = PackedStrings.pack(names).arrays()
    index = {"blob": blob, "ends": ends, "places": np.array(places, dtype=np.int64)}
    labels, classes = _labels(names, words, shards)
    if labels is not None:
        class_blob, class_ends = PackedStrings.pack(classes).arrays()
        index |= {"labels": labels, "class_blob": class_blob, "class_ends": class_ends}
    return index


def _samples(shard: Path):
    """(name, (offset, length), label or None) of each image of a shard; members of a key stand one after the other."""
    try:
        with tarfile.open(shard, "r:") as tar:
            key, image, word = None, None, None
            for member in tar:
                if not member.isfile():
                    continue
                name = member.name.removeprefix("./")
                folder, _, base = name.rpartition("/")
                stem, _, suffix = base.partition(".")
                if (folder, stem) != key:
                    if image is not None:
                        yield *image, word
                    key, image, word = (folder, stem), None, None
                if suffix.lower() in _LABEL_SUFFIXES:
                    word = tar.extractfile(member).read().decode("utf-8", "replace").strip()
                elif base.lower().endswith(IMAGE_SUFFIXES):
                    image = name, (member.offset_data, member.size)
            if image is not None:
                yield *image, word
    except (tarfile.TarError, OSError) as error:
        raise InputError(f"{shard} can't be read as a tar file ({error}): pack or download it again") from error


def _labels(names: list[str], words: list[str | None], shards: Sequence[Path]):
    """Labels from .cls members, with the folders as class names where the two agree; else from the folder part."""
    folders = [name.rpartition("/")[0].rpartition("/")[2] for name in names]
    have_folders = all(folders)
    if any(word is not None for word in words):
        if None in words:
            lacking = names[words.index(None)]
            raise InputError(f"some images of {shards[0].parent} have a .cls and {lacking} has none: label all or none")
        labels, classes = labels_from_words(words)
        if have_folders:
            name_of = dict(zip(labels.tolist(), folders, strict=True))
            if all(name_of[label] == folder for label, folder in zip(labels.tolist(), folders, strict=True)):
                classes = [name_of.get(i, name) for i, name in enumerate(classes)]
        return labels, classes
    return labels_from_words(folders, numbers=False) if have_folders else (None, None)
