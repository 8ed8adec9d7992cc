"""Images in tar shards, in the WebDataset naming convention, read by random access.

    n01440764/00000012.jpg, n01440764/00000012.cls     members with one key: the path up to the first dot of its name
    00000013.png, 00000013.cls                         labels from .cls (or .cls.txt), or else from the folder part

An index of where each image lies is built once (data/shard_index.py) and kept beside the shards, or in the cache folder
if that can't be written. With it an image costs one `pread`, so shuffling, subsets and exact resume are what they are
with files; the usual streaming readers shuffle within a buffer and can do none of these.
"""

from __future__ import annotations

import json
import os
import re
import time
from collections import OrderedDict
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch

from data.cache import cache_folder, entry_name, recall, remember, stamps_of
from data.decode import BadImage
from data.limits import MAX_FILE_BYTES
from data.shard_index import build_index, valid_index
from data.source import ImageSource, PackedStrings
from runtime.distributed import on_main_process
from runtime.guards import InputError

_OPEN_SHARDS = 64  # file handles that a process keeps; a process may usually hold 1,024
_BRACES = re.compile(r"\{(\d{1,18})\.\.(\d{1,18})\}")
_MOST_SHARDS = 1_000_000  # in one range: more is a slip of the keyboard


class ShardSource(ImageSource):
    """Images inside tar files, each known by its shard, offset and length.

    problems: what is wrong with the shards themselves; empty unless they were opened without a check.
    """

    def __init__(
        self,
        shards: Sequence[Path],
        index: dict[str, np.ndarray],
        in_chans: int,
        where: str,
        problems: Sequence[str] = (),
    ):
        self._names = PackedStrings(index["blob"], index["ends"])
        labels, classes = None, None
        if "labels" in index:
            labels = index["labels"]
            classes = list(PackedStrings(index["class_blob"], index["class_ends"]))
        super().__init__(len(self._names), labels, classes, in_chans, self._names.digest(), where)
        self.problems = list(problems)
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
        if length > MAX_FILE_BYTES:
            raise BadImage(f"has {length:,} bytes, more than the {MAX_FILE_BYTES:,} of an image")
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
        first, last = (int(number) for number in braces.groups())
        if not first <= last < first + _MOST_SHARDS:
            raise InputError(
                f"--data_path {path}: the range runs from {first} to {last}; give the smaller number first, "
                f"and at most {_MOST_SHARDS:,} shards"
            )
        start, end = braces.span()
        digits = len(braces.group(1))
        names = [f"{str(path)[:start]}{i:0{digits}d}{str(path)[end:]}" for i in range(first, last + 1)]
    missing = [name for name in names if not Path(name).is_file()]
    if missing:
        some = ", ".join(missing[:3])
        raise InputError(f"--data_path {path}: {len(missing)} of {len(names)} shards do not exist ({some})")
    return [Path(name) for name in names]


def split_shards(folder: Path, split: str) -> list[Path]:
    """The shards of `split` that lie directly in `folder`: all, unless their names say train and val."""
    shards = sorted(s for s in folder.glob("*.tar") if not s.name.startswith("."))
    if folder.name != split:
        other = "val" if split == "train" else "train"
        named = [s for s in shards if re.search(rf"(^|[^a-z]){split}([^a-z]|$)", s.name.lower())]
        others = [s for s in shards if re.search(rf"(^|[^a-z]){other}([^a-z]|$)", s.name.lower())]
        shards = named if named or others else shards if split == "train" else []
    _check_all_there(shards)
    return shards


def packed_as(shard: Path) -> tuple[int, int, int] | None:
    """(number of this shard, images in all, images per shard) by what tools.pack_shards recorded; None for others."""
    match = re.fullmatch(r"(.+)-(\d{6,9})\.tar", shard.name)
    if match is None:
        return None
    try:
        job = json.loads((shard.parent / f"{match.group(1)}.json").read_text())
        images, per_shard = job["images"], job["images_per_shard"]
    except (OSError, ValueError, KeyError, TypeError, RecursionError):
        return None
    if not all(type(number) is int and number > 0 for number in (images, per_shard)):
        return None
    return int(match.group(2)), images, per_shard


def _check_all_there(shards: Sequence[Path]) -> None:
    """Raise `InputError` if a folder lacks some of the shards that were packed into it."""
    jobs = {}
    for shard in shards:
        job = packed_as(shard)
        if job is not None:
            numbers, _ = jobs.setdefault(shard.name.rpartition("-")[0], (set(), -(-job[1] // job[2])))
            numbers.add(job[0])
    for prefix, (numbers, count) in jobs.items():
        if numbers != set(range(count)):
            raise InputError(
                f"{shards[0].parent} holds {len(numbers)} of the {count} shards of {prefix}: run tools.pack_shards "
                "again, which writes those that are missing, or copy the rest"
            )


# ---- through the index ----


def open_shards(shards: Sequence[Path], in_chans: int = 3, where: str = "", check: bool = True) -> ShardSource:
    """Open shards through their index, which one process of a run builds or recalls for all.

    check: raise `InputError` for a damaged shard; without it, the images before the damage are opened, and `problems`
    of the source tells what is wrong.
    """
    index, problems = on_main_process(lambda: _index(shards, check))
    return ShardSource(shards, index, in_chans, where or str(shards[0].parent), problems)


def _index(shards: Sequence[Path], check: bool) -> tuple[dict[str, np.ndarray], list[str]]:
    folder = shards[0].parent
    name = ".shards-" + entry_name("shards", *(s.name for s in shards))
    taken_ns, stamps = time.time_ns(), stamps_of(shards)
    folders = [folder, cache_folder() / entry_name("folder of shards", str(folder.resolve()))]
    for place in folders:
        index = recall(place / name)
        if index is not None and np.array_equal(stamps, index.get("stamps")) and valid_index(index, stamps[:, 1]):
            return index, []
    jobs = [packed_as(shard) for shard in shards]
    expected = [None if job is None else min(job[2], job[1] - job[0] * job[2]) for job in jobs]
    index, problems = build_index(shards, expected)
    if check and problems:
        raise InputError(problems[0])
    if not problems:
        remember(folders, name, {**index, "stamps": stamps}, stamps, taken_ns)
    return index, problems
