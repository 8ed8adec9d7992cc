"""The images of an evaluation: train and val with labels, a held-out part of a set without a split, or all of a set."""

from __future__ import annotations

import numpy as np

from data.datasets import has_val, open_images
from data.decode import Picture
from data.source import ImageSource
from evaluation.features import require_labels
from runtime.terminal import say


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
    train = open_images(data_path, "train", subset, in_chans, val_fraction=val_fraction or 0.0)
    val = open_images(data_path, "val", -1, in_chans, val_fraction=val_fraction or 0.0)
    if val_fraction:
        say(f"no val split at {data_path}: {len(val)} images, a part of each class, are held out as val")
    require_labels(train, val)
    return train, val


def open_all(data_path: str, subset: int, in_chans: int) -> ImageSource:
    """Every image at `data_path`, val after train if the set is divided."""
    train = open_images(data_path, "train", subset, in_chans)
    return Joined([train, open_images(data_path, "val", -1, in_chans)]) if has_val(data_path) else train
