"""The images of an evaluation: train and val with labels, a held-out part of a set without a split, or all of a set."""

from __future__ import annotations

import hashlib
import re
from pathlib import Path

import numpy as np

from data.datasets import open_images
from data.decode import Picture
from data.shards import split_shards
from data.source import ImageSource
from evaluation.features import require_labels
from runtime.guards import InputError
from runtime.terminal import say

_SPLIT_SEED = 0x5A11  # one split for every evaluation of a data set, whatever the seed of its heads


class Part(ImageSource):
    """Some images of another source, in the order of `indices`."""

    def __init__(self, source: ImageSource, indices: np.ndarray):
        self._source, self._indices = source, np.asarray(indices, dtype=np.int64)
        labels = None if source.labels is None else source.labels[self._indices]
        identity = source.fingerprint().encode() + hashlib.sha256(self._indices.tobytes()).digest()
        super().__init__(len(self._indices), labels, source.classes, source.in_chans, identity, source.where)

    def open(self, i: int) -> Picture:
        return self._source.open(int(self._indices[i]))

    def read(self, i: int) -> bytes:
        return self._source.read(int(self._indices[i]))

    def name(self, i: int) -> str:
        return self._source.name(int(self._indices[i]))


class Joined(ImageSource):
    """Several sources, one after the other; labelled if all have labels of the same classes."""

    def __init__(self, sources: list[ImageSource]):
        self._sources = sources
        self._starts = np.cumsum([0, *(len(source) for source in sources)])
        first = sources[0]
        agree = all(s.labels is not None and s.classes == first.classes for s in sources)
        labels = np.concatenate([s.labels for s in sources]) if agree else None
        identity = b"".join(source.fingerprint().encode() for source in sources)
        super().__init__(
            int(self._starts[-1]), labels, first.classes if agree else None, first.in_chans, identity, first.where
        )

    def _at(self, i: int) -> tuple[ImageSource, int]:
        number = int(np.searchsorted(self._starts, i, side="right")) - 1
        return self._sources[number], int(i - self._starts[number])

    def open(self, i: int) -> Picture:
        source, index = self._at(i)
        return source.open(index)

    def read(self, i: int) -> bytes:
        source, index = self._at(i)
        return source.read(index)

    def name(self, i: int) -> str:
        source, index = self._at(i)
        return source.name(index)


def open_labelled(
    data_path: str, subset: int, in_chans: int, val_fraction: float | None = None
) -> tuple[ImageSource, ImageSource]:
    """Train and val images with labels of the same classes.

    val_fraction: for a set without a split, the part of each class that is held out as val, always the same images.
    Raises InputError if labels, a class or the split is missing, or if there is a split already.
    """
    if val_fraction is None:
        train, val = open_images(data_path, "train", subset, in_chans), open_images(data_path, "val", -1, in_chans)
    else:
        if has_val(data_path):
            raise InputError(
                f"--val_fraction {val_fraction:g}: {data_path} has a val split already; leave the flag out"
            )
        whole = open_images(data_path, "train", subset, in_chans)
        if whole.labels is None:
            raise InputError(f"--val_fraction: {whole.where} has no labels; put the images into one folder per class")
        kept, held_out = split_by_class(whole.labels, val_fraction)
        train, val = Part(whole, kept), Part(whole, held_out)
        say(f"no val split at {data_path}: {len(held_out)} of {len(whole)} images held out as val")
    require_labels(train, val)
    return train, val


def split_by_class(labels: np.ndarray, fraction: float) -> tuple[np.ndarray, np.ndarray]:
    """(kept, held out) indices: `fraction` of each class, at least one image, and never all of a class."""
    rng = np.random.default_rng(_SPLIT_SEED)
    held_out = []
    for c in np.unique(labels):
        members = rng.permutation(np.flatnonzero(labels == c))
        held_out.append(members[: min(max(1, round(fraction * len(members))), len(members) - 1)])
    held_out = np.sort(np.concatenate(held_out))
    return np.setdiff1d(np.arange(len(labels)), held_out), held_out


def open_all(data_path: str, subset: int, in_chans: int) -> ImageSource:
    """Every image at `data_path`, val after train if the set is divided."""
    train = open_images(data_path, "train", subset, in_chans)
    return Joined([train, open_images(data_path, "val", -1, in_chans)]) if has_val(data_path) else train


def has_val(data_path: str) -> bool:
    """Whether the images at `data_path` are divided into train and val."""
    path = Path(data_path).expanduser()
    if str(data_path).partition(":")[0] == "demo" and not path.exists():
        return True
    if path.is_file():
        with open(path, encoding="utf-8", errors="replace") as file:
            return path.suffix != ".tar" and "split" in re.split(r"[,\t\s]+", file.readline().strip().lower())
    return path.is_dir() and (any(path.glob("val")) or any(path.glob("val.*")) or bool(split_shards(path, "val")))
