"""From the words after --data_path to a set of images: folders, lists, tar shards, the built-in demo set.

    root/train/CLASS/...jpg, root/val/CLASS/...jpg     the usual image-folder root
    folder/CLASS/...jpg                                class folders, without the split
    folder/...jpg                                      images only: no labels
    list.txt, list.csv, root/train.csv                 paths, with or without labels (data/lists.py)
    shards-000000.tar, root/train/*.tar, "x-{000000..000146}.tar"    tar shards (data/shards.py)
    demo, demo:48                                      data/demo.py

Class numbers follow the sorted names of the class folders, as torchvision's ImageFolder does, so they agree with the
published code's.
"""

from __future__ import annotations

import functools
import os
from pathlib import Path

import numpy as np

from data.decode import BadImage
from data.demo import open_demo
from data.files import FileSource, holds_images, read_folder
from data.lists import LIST_SUFFIXES, read_list, read_rows
from data.parts import Part, first_of_each_class, held_out
from data.shards import expand_shards, is_shard_pattern, open_shards, split_shards
from data.source import ImageSource, numbered_classes
from runtime.distributed import on_main_process
from runtime.guards import InputError
from runtime.terminal import say

SPLITS = ("train", "val")
_NO_CLASSES = {"train", "val", "test", "valid", "validation", "extra", "unlabeled"}  # usual names next to train/
_PROBES = 16  # images tried before a data set is said to hold no readable one


def open_images(
    data_path: str | os.PathLike,
    split: str = "train",
    subset: int = -1,
    in_chans: int = 3,
    *,
    val_fraction: float = 0.0,
    seed: int = 0,
    check: bool = True,
) -> ImageSource:
    """The images of `split` ("train" or "val") at `data_path`; see the module for the layouts.

    Every process of a distributed run must call it: one reads the file system and tells the others.
    subset: n > 0 keeps the first n images of each class (all images count as one class if there are no labels);
    -1 keeps all. in_chans: channels of the pixels that `load` returns.
    val_fraction: above 0, for a labelled set without a split: this part of each class, drawn by `seed`, is val, and the
    rest train. check: refuse lists that name missing files, damaged shards, and sets of which no image can be read;
    without it such files are bad images, and the source's `problems` tells what is wrong with the shards.
    Raises `InputError` if the path is missing or holds no image, and for what `check` finds.
    """
    if split not in SPLITS:
        raise InputError(f"split {split!r} is neither 'train' nor 'val'")
    if subset == 0 or subset < -1:
        raise InputError(f"--subset {subset}: give the number of images to keep of each class, or -1 for all")
    if not 0 <= val_fraction < 1:
        raise InputError(f"--val_fraction {val_fraction}: give a part of the images from 0 (none) to below 1")
    path = str(data_path)
    if not path or "\0" in path:
        raise InputError(f"--data_path {path!r} is no path: give a folder of images, a list, shards or demo")
    found_in = "train" if val_fraction else split
    try:
        source = _open_path(path, found_in, in_chans, check)
        if val_fraction and has_val(path):
            raise InputError(f"--data_path {path} has val images already: leave out --val_fraction")
    except (OSError, RuntimeError) as error:  # RuntimeError: no such user in ~name
        raise InputError(f"--data_path {path} can't be opened: {error}") from error
    if check:
        _check_readable(source)
    if val_fraction:
        val = held_out(source, val_fraction, seed)
        source = Part(source, np.flatnonzero(val if split == "val" else ~val), f"{split} {val_fraction} {seed}")
    if subset == -1:
        return source
    labels = np.zeros(len(source), dtype=np.int64) if source.labels is None else source.labels
    return Part(source, first_of_each_class(labels, subset), f"subset {subset}")


def _open_path(path: str, split: str, in_chans: int, check: bool) -> ImageSource:
    if path.partition(":")[0] == "demo" and not Path(path).exists():
        return open_demo(path, split, in_chans)
    return _open_files(Path(path).expanduser(), split, in_chans, check)


def check_same_classes(train: ImageSource, val: ImageSource) -> None:
    """Raise `InputError` unless both sets have labels that mean the same classes.

    If labels are class numbers, val may lack the highest ones.
    """
    for source in (train, val):
        if source.labels is None:
            raise InputError(
                f"{source.where} has no labels, which evaluation needs: put the images into one folder per class, or "
                "give a list with a label in each line"
            )
    numbered = train.classes == numbered_classes(len(train.classes))
    if numbered and train.labels.min() == 1 and (np.bincount(train.labels)[1:] > 0).all():
        raise InputError(
            f"the labels of {train.where} run from 1 to {train.labels.max()}, but class numbers start at 0: subtract 1 "
            "from every label, in train and val"
        )
    if numbered and val.classes == train.classes[: len(val.classes)]:
        return
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


# ---- files ----


def _open_files(path: Path, split: str, in_chans: int, check: bool) -> ImageSource:
    if is_shard_pattern(path):
        if split == "val":
            raise InputError(f"--data_path {path} names shards of one split: give the folder that holds train and val")
        return open_shards(expand_shards(path), in_chans, str(path), check)
    if not path.exists():
        raise InputError(f"--data_path {path}: no such file or folder; give a folder of images, a list, shards or demo")
    if path.is_dir():
        path = _split_path(path, split)
        if isinstance(path, list):
            return open_shards(path, in_chans, f"{path[0].parent} ({split})", check)
    elif path.suffix.lower() not in LIST_SUFFIXES:
        raise InputError(
            f"--data_path {path} is a file, but neither a list of images ({', '.join(LIST_SUFFIXES)}) nor a tar shard"
        )
    is_list = path.is_file()
    find = functools.partial(read_list, path, split, check) if is_list else functools.partial(read_folder, path)
    found = on_main_process(find)  # one process reads the file system for all
    root = path.parent if is_list else path
    return FileSource(root, found.names, found.labels, found.classes, in_chans, str(path))


def _split_path(path: Path, split: str) -> Path | list[Path]:
    """The folder, list file or tar shards of `split` below the folder `path`."""
    folder = path / split if (path / split).is_dir() else path
    shards = split_shards(folder, split)
    if shards:
        image = holds_images(folder)
        if image is not None:
            raise InputError(
                f"{folder} holds both a tar file ({shards[0].name}) and image files ({image}): move one kind elsewhere"
            )
        return shards
    present = {name: (path / name).is_dir() for name in SPLITS}
    if present[split]:
        if split == "train" and not present["val"]:
            _tell_of_neighbours(path)
        return path / split
    for suffix in LIST_SUFFIXES:
        if (path / f"{split}{suffix}").is_file():
            return path / f"{split}{suffix}"
    if split == "val":
        raise InputError(
            f"--data_path {path} has no val/ folder, which evaluation needs: add {path / 'val'} with the class folders "
            "of train, or set part of each class apart with --val_fraction 0.1"
        )
    if present["val"]:
        raise InputError(f"--data_path {path} has val/ but no train/: add {path / 'train'}, or give another folder")
    return path


def _tell_of_neighbours(path: Path) -> None:
    """Say that folders next to train/ are left out if they look like classes, of which train may be one."""
    others = sorted(p for p in path.iterdir() if p.is_dir() and p.name.lower() not in _NO_CLASSES and p.name[0] != ".")
    classes = [p.name for p in others if holds_images(p) is not None]
    if classes:
        say(
            f"warning: {path / 'train'} is taken as the training split, and its neighbours are left out "
            f"({_some(classes)}); if train is a class, rename its folder"
        )


def has_val(data_path: str | os.PathLike) -> bool:
    """Whether the images at `data_path` are divided into train and val."""
    path = str(data_path)
    place = Path(path).expanduser()
    if place.is_dir():
        lists = any((place / f"val{suffix}").is_file() for suffix in LIST_SUFFIXES)
        return lists or (place / "val").is_dir() or bool(split_shards(place, "val"))
    if place.suffix.lower() in LIST_SUFFIXES:
        try:
            return place.stem != "val" and bool(read_rows(place, "val"))
        except InputError:  # no split column
            return False
    return path.partition(":")[0] == "demo" and not place.exists()


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
