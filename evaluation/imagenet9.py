"""ImageNet-9: how much a prediction rests on the background (Xiao et al., "Noise or Signal", 2020).

The same objects on changed backgrounds, in folders of nine classes. A 1000-way classifier answers with the class that
its arg-max belongs to; of ImageNet's classes 370 belong to one of the nine, and any other answer is wrong. Images are
shown as they are: 224 pixels, scaled and normalised, without a crop.
"""

from __future__ import annotations

import functools
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from data.datasets import has_val, open_images
from data.source import ImageSource
from runtime.guards import InputError

# folder: the name in tables. fg_mask holds masks, not images.
VARIANTS = {
    "original": "IN-9", "mixed_same": "MS", "mixed_rand": "MR", "mixed_next": "MN", "only_fg": "OF", "no_fg": "NF",
    "only_bg_b": "OBB", "only_bg_t": "OBT",
}  # fmt: skip
# The nine classes, each with its word in the folders' names and its classes of ImageNet-1k, ranges inclusive.
CLASSES = {
    "dog": "151-170 173-268",
    "bird": "7-24 87-100 127-146",
    "vehicle": "407-408 428 436 444 468 511 547 555 561 565 569 573 586 603 609 612 627 656 661 665 670-671 675 690 "
    "705 717 734 751 757 791 802-803 817 820 829 847 864 866-867 870 880",
    "reptile": "33-68",
    "carnivore": "269-280 286-299 356-362 387-388",
    "insect": "300-326",
    "instrument": "401-402 420 432 486 494 513 541 546 558 566 577 579 593-594 641-642 683-684 687 699 776 822 875 881 "
    "889",
    "primate": "365-384",
    "fish": "0-6 389-397",
}
IMAGENET_CLASSES = 1000


@functools.cache
def nine_of_thousand() -> Tensor:
    """(1000,) int64: the number of the nine that each class of ImageNet-1k belongs to, -1 for none."""
    table = torch.full((IMAGENET_CLASSES,), -1, dtype=torch.int64)
    for number, ranges in enumerate(CLASSES.values()):
        for part in ranges.split():
            first, _, last = part.partition("-")
            table[int(first) : int(last or first) + 1] = number
    return table


def class_numbers(names: list[str], where: str) -> np.ndarray:
    """The number among CLASSES of each class folder, by the words in their names. Raises InputError."""
    found = []
    for name in names:
        words = [number for number, word in enumerate(CLASSES) if word in name.lower()]
        found.append(words[0] if len(words) == 1 else None)
    if sorted(found, key=str) != list(range(len(CLASSES))):
        raise InputError(
            f"{where} has the class folders {', '.join(names[:12])}: ImageNet-9 has nine, one for each of "
            f"{', '.join(CLASSES)} (as in 00_dog)"
        )
    return np.array(found, dtype=np.int64)


def open_variants(root: str | Path, in_chans: int = 3) -> dict[str, ImageSource]:
    """The labelled images of each variant below `root`, of its val/ if it has one. Raises InputError if none is there.

    Every process of a distributed run must call it.
    """
    folder = Path(root).expanduser()
    there = [name for name in VARIANTS if (folder / name).is_dir()]
    if not there:
        raise InputError(
            f"--data_path {root} has none of ImageNet-9's folders: give the folder that holds {', '.join(VARIANTS)}"
        )
    sources = {}
    for name in there:
        split = "val" if has_val(folder / name) else "train"
        sources[name] = open_images(folder / name, split, -1, in_chans)
        if sources[name].labels is None:
            raise InputError(f"{sources[name].where} has no class folders, such as 00_dog")
    return sources


def open_train(root: str | Path, in_chans: int = 3) -> ImageSource | None:
    """The train part of the original variant; None if there is none."""
    folder = Path(root).expanduser() / "original"
    if not (folder / "train").is_dir():
        return None
    return open_images(folder / "train", "train", -1, in_chans)


def hits(predictions: Tensor, labels: np.ndarray, names: list[str], where: str, outputs: int) -> float:
    """Percent of right answers. predictions: (N,) arg-max of `outputs` classes, 1000 or nine; labels: of `names`."""
    numbers = torch.from_numpy(class_numbers(names, where)[labels])
    answers = nine_of_thousand()[predictions] if outputs == IMAGENET_CLASSES else predictions
    return 100.0 * (answers == numbers).double().mean().item()
