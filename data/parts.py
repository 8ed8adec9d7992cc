"""Parts of a set of images: the first of each class, and a held-out share of each class."""

from __future__ import annotations

import numpy as np

from data.decode import Picture
from data.draws import SPLIT, check_seed, raw_words
from data.source import ImageSource
from runtime.guards import InputError


class Part(ImageSource):
    """The images of another source at `indices`, which stay in its order. description: tells the part from others."""

    def __init__(self, source: ImageSource, indices: np.ndarray, description: str):
        self._indices = indices
        kept = None if source.labels is None else source.labels[indices]
        identity = source.fingerprint().encode() + description.encode()
        super().__init__(len(indices), kept, source.classes, source.in_chans, identity, source.where)
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
    return np.sort(order[_rank_within(labels[order]) < n])


def held_out(source: ImageSource, fraction: float, seed: int) -> np.ndarray:
    """(len,) bool: true for `fraction` of each class, rounded, drawn by `seed`; the same on every machine.

    Of a class of two or more images at least one is held out, and at least one is not. Raises `InputError` if there are
    no labels, or nothing to divide.
    """
    check_seed(seed)
    if source.labels is None:
        raise InputError(
            f"--val_fraction {fraction:g}: {source.where} has no labels, which evaluation needs; put the images "
            "into one folder per class"
        )
    labels = source.labels
    order = np.lexsort((raw_words(len(labels), seed, SPLIT), labels))
    counts = np.bincount(labels)
    wanted = np.clip(np.round(fraction * counts).astype(np.int64), np.minimum(1, counts), np.maximum(counts - 1, 0))
    if not wanted.any():
        raise InputError(f"--val_fraction {fraction:g}: no class of {source.where} has two images to divide")
    mask = np.zeros(len(labels), dtype=bool)
    mask[order] = _rank_within(labels[order]) < wanted[labels[order]]
    return mask


def _rank_within(sorted_labels: np.ndarray) -> np.ndarray:
    """The position of each entry among those with its label."""
    return np.arange(len(sorted_labels)) - np.searchsorted(sorted_labels, sorted_labels, side="left")
