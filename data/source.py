"""What a set of images is to the rest of the program: a length, pixels by index, labels, names.

Names and labels live in flat arrays, never in Python lists: a list of a million strings is copied page by page into
every forked worker as its reference counts change, and pickled into every spawned one. torch tensors are shared with
either kind of worker.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Sequence

import numpy as np
import torch

from data.decode import Picture


class PackedStrings:
    """A read-only sequence of strings in two flat arrays: UTF-8 bytes and the offset where each string ends."""

    def __init__(self, blob: np.ndarray, ends: np.ndarray):
        self._blob, self._ends = torch.from_numpy(blob), torch.from_numpy(ends)

    @classmethod
    def pack(cls, strings: Iterable[str]) -> PackedStrings:
        # surrogateescape: a file name need not be valid UTF-8
        encoded = [s.encode("utf-8", "surrogateescape") for s in strings]
        blob = np.frombuffer(bytearray(b"".join(encoded)), dtype=np.uint8)
        return cls(blob, np.cumsum([len(e) for e in encoded], dtype=np.int64))

    def arrays(self) -> tuple[np.ndarray, np.ndarray]:
        """The bytes (uint8) and the ends (int64), without a copy."""
        return self._blob.numpy(), self._ends.numpy()

    def __len__(self) -> int:
        return self._ends.numel()

    def __getitem__(self, i: int) -> str:
        blob, ends = self.arrays()
        if not -len(ends) <= i < len(ends):
            raise IndexError(f"entry {i} of {len(ends)}")
        i %= len(ends)
        start = ends[i - 1] if i else 0
        return blob[start : ends[i]].tobytes().decode("utf-8", "surrogateescape")

    def digest(self) -> bytes:
        blob, ends = self.arrays()
        return hashlib.sha256(blob.tobytes() + ends.tobytes()).digest()


class ImageSource:
    """A fixed sequence of images; the index of an image never changes.

    Subclasses implement `name(i)`, and `read(i)` or `open(i)`, and call this constructor.
    labels: one class number per image, or None; classes: the names of the classes, by number.
    identity: bytes that differ between different sets of images (names, not the place where they lie).
    """

    def __init__(
        self,
        count: int,
        labels: np.ndarray | None = None,
        classes: Sequence[str] | None = None,
        in_chans: int = 3,
        identity: bytes = b"",
        where: str = "",
    ):
        self._count = count
        self._labels = None if labels is None else torch.from_numpy(np.ascontiguousarray(labels, dtype=np.int64))
        self.classes = None if classes is None else list(classes)
        self.in_chans = in_chans
        self.where = where
        self._identity = identity

    def __len__(self) -> int:
        return self._count

    @property
    def labels(self) -> np.ndarray | None:
        """Class numbers, (len,) int64, or None if the set has no labels."""
        return None if self._labels is None else self._labels.numpy()

    def open(self, i: int) -> Picture:
        """The i-th image with its size known and its pixels not decoded yet. Raises `BadImage`."""
        return Picture(self.read(i), self.in_chans)

    def read(self, i: int) -> bytes:
        """The i-th image as its file holds it. Raises `BadImage`."""
        raise NotImplementedError(f"{self.where} keeps no files")

    def name(self, i: int) -> str:
        """Where the i-th image comes from, for messages."""
        raise NotImplementedError

    def load(self, i: int) -> np.ndarray:
        """Pixels of the i-th image, (H, W, C) uint8, EXIF orientation applied. Raises `BadImage`."""
        return self.open(i).pixels()

    def fingerprint(self) -> str:
        """Twelve hexadecimal digits that tell this set of images, in this order with these labels, from another."""
        digest = hashlib.sha256(self._identity)
        digest.update(f"{self._count} {self.in_chans}".encode())
        if self._labels is not None:
            digest.update(self._labels.numpy().tobytes())
        return digest.hexdigest()[:12]


def labels_from_words(words: Sequence[str], numbers: bool = True) -> tuple[np.ndarray, list[str]]:
    """Class numbers and class names from one word per image.

    With `numbers`, words that are all whole numbers are class numbers as they stand, unless they are so large that they
    must be names; otherwise the classes are the different words in sorted order.
    """
    if numbers and all(word.isdecimal() and len(word) <= _DIGITS for word in words):
        labels = np.array([int(word) for word in words], dtype=np.int64)
        if labels.max() < 10 * len(labels) + 1000:
            return labels, numbered_classes(int(labels.max()) + 1)
    classes = sorted(set(words))
    number = {word: i for i, word in enumerate(classes)}
    return np.fromiter((number[word] for word in words), dtype=np.int64, count=len(words)), classes


_DIGITS = 18  # of a label that is a number: more may not fit into 64 bits


def numbered_classes(count: int) -> list[str]:
    """The names of classes that have only numbers."""
    return [str(i) for i in range(count)]


# ---- the same, read back from a cache that others may have written ----


def valid_strings(arrays: dict[str, np.ndarray], blob: str, ends: str) -> bool:
    """Whether two arrays are those of `PackedStrings`."""
    if blob not in arrays or ends not in arrays:
        return False
    letters, stops = arrays[blob], arrays[ends]
    if (letters.dtype, stops.dtype, letters.ndim, stops.ndim) != (np.uint8, np.int64, 1, 1):
        return False
    return bool((np.diff(stops, prepend=0) >= 0).all()) and (stops[-1] if len(stops) else 0) == len(letters)


def valid_classes(arrays: dict[str, np.ndarray]) -> bool:
    """Whether labels and class names, if there are any, fit each other and the number of names."""
    if "labels" not in arrays:
        return True
    labels = arrays["labels"]
    if not valid_strings(arrays, "class_blob", "class_ends") or labels.shape != arrays["ends"].shape:
        return False
    classes = len(arrays["class_ends"])
    return labels.dtype == np.int64 and bool((labels >= 0).all() and (labels < classes).all())
