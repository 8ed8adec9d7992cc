"""The index of tar shards: which images they hold, where each lies, and its label.

Only headers are read. What would lose or confuse images is refused: a shard that is damaged or cut off in the middle
(Python's reader takes that for its end), two images under one key, members that are stored sparsely.
"""

from __future__ import annotations

import tarfile
from collections.abc import Iterator, Sequence
from pathlib import Path

import numpy as np

from data.decode import IMAGE_SUFFIXES
from data.source import PackedStrings, labels_from_words, valid_classes, valid_strings
from runtime.guards import InputError
from runtime.progress import progress

_LABEL_SUFFIXES = ("cls", "cls.txt")
_LONGEST_LABEL = 4096  # bytes
_CLOSING = 1024  # zero bytes that end a tar file


def build_index(shards: Sequence[Path], expected: Sequence[int | None]) -> tuple[dict[str, np.ndarray], list[str]]:
    """Read the headers of all shards; expected: the number of images in each, if it is known.

    Returns the index, namely names (blob, ends), places (N, 3: shard, offset, length), and labels and classes if there
    are any; and what is wrong with the shards, one line each. Raises `InputError` if there is no image.
    """
    names: list[str] = []
    places: list[tuple[int, int, int]] = []
    words: list[str | None] = []
    problems: list[str] = []
    for number, shard in enumerate(progress(shards, len(shards), "indexing shards")):
        before = len(names)
        try:
            for name, place, word in _samples(shard):
                names.append(name)
                places.append((number, *place))
                words.append(word)
            if expected[number] not in (None, len(names) - before):
                raise InputError(
                    f"{shard} holds {len(names) - before} images, but {expected[number]} were packed into it: pack or "
                    "copy it again"
                )
        except InputError as error:
            problems.append(str(error))
    if not names:
        found = problems[0] if problems else f"no file in them ends in one of {', '.join(IMAGE_SUFFIXES)}"
        raise InputError(f"{shards[0]} and the shards next to it hold no image: {found}")
    blob, ends = PackedStrings.pack(names).arrays()
    index = {"blob": blob, "ends": ends, "places": np.array(places, dtype=np.int64)}
    labels, classes = _labels(names, words, shards)
    if labels is not None:
        class_blob, class_ends = PackedStrings.pack(classes).arrays()
        index |= {"labels": labels, "class_blob": class_blob, "class_ends": class_ends}
    return index, problems


def valid_index(index: dict[str, np.ndarray], sizes: np.ndarray) -> bool:
    """Whether arrays have the form of an index over shards of these sizes, in bytes."""
    if not valid_strings(index, "blob", "ends") or not valid_classes(index):
        return False
    places = index.get("places")
    if places is None or places.dtype != np.int64 or places.shape != (len(index["ends"]), 3) or not len(places):
        return False
    shard, offset, length = places.T
    inside = (shard >= 0) & (shard < len(sizes)) & (offset >= 0) & (length >= 0)
    return bool(inside.all()) and bool((length <= sizes[shard] - offset).all())


def _samples(shard: Path) -> Iterator[tuple[str, tuple[int, int], str | None]]:
    """(name, (offset, length), label or None) of each image of a shard; members of a key stand one after the other."""
    try:
        with tarfile.open(shard, "r:") as tar:
            key, image, word = None, None, None
            for member in tar:
                name = member.name.removeprefix("./")
                if not member.isfile() or any(part.startswith(".") for part in name.split("/")):
                    continue  # a folder, a link; a hidden file, as macOS adds (._name)
                folder, _, base = name.rpartition("/")
                stem, _, suffix = base.partition(".")
                if (folder, stem) != key:
                    if image is not None:
                        yield *image, word
                    key, image, word = (folder, stem), None, None
                if suffix.lower() in _LABEL_SUFFIXES:
                    word = _label(tar, member, shard)
                elif base.lower().endswith(IMAGE_SUFFIXES):
                    if image is not None:
                        raise InputError(
                            f"{shard}: {image[0]} and {name} have one key ({stem}), which ends at the first dot of a "
                            "name: pack them under names without further dots"
                        )
                    _refuse_sparse(member, shard)
                    image = name, (member.offset_data, member.size)
            if image is not None:
                yield *image, word
            _check_end(tar, shard)
    except (tarfile.TarError, OSError, ValueError, MemoryError) as error:
        if isinstance(error, InputError):
            raise
        raise InputError(f"{shard} can't be read as a tar file ({error}): pack or download it again") from error


def _label(tar: tarfile.TarFile, member: tarfile.TarInfo, shard: Path) -> str:
    _refuse_sparse(member, shard)
    if member.size > _LONGEST_LABEL:
        raise InputError(f"{shard}: the label {member.name} has {member.size:,} bytes; a .cls holds one word or number")
    return tar.extractfile(member).read().decode("utf-8", "replace").strip()


def _refuse_sparse(member: tarfile.TarInfo, shard: Path) -> None:
    """A sparse member's bytes are not those of the file, and there may be any number of them."""
    if member.issparse():
        raise InputError(f"{shard}: {member.name} is stored sparsely: pack the shard without tar's --sparse (-S)")


def _check_end(tar: tarfile.TarFile, shard: Path) -> None:
    """Raise `InputError` unless the headers end where the shard's closing zeros begin."""
    tar.fileobj.seek(tar.offset)
    closing = tar.fileobj.read(_CLOSING)
    if closing.strip(b"\0"):
        raise InputError(
            f"{shard} is damaged at byte {tar.offset:,}, so images behind it are lost: pack or copy it again"
        )
    if len(closing) < _CLOSING:
        raise InputError(f"{shard} is cut off: the zeros that close a tar file are missing; pack or copy it again")


def _labels(names: list[str], words: list[str | None], shards: Sequence[Path]):
    """Labels from .cls members, with the folders as class names if the two agree; else from the folder part."""
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
