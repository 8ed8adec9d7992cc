"""The evaluation set: indices become batches of uint8 images, resized and cut at the centre."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from torch.utils.data import Dataset, get_worker_info

from data.augment import as_batch, crop_memory, resize
from data.decode import BadImage, Picture
from data.source import ImageSource
from runtime.guards import InputError

ON_BAD_IMAGE = ("raise", "skip")
_LONGEST = 64  # times the shorter side; of a longer image only the central part is resized: all of it may fill memory


class EvalSet(Dataset):
    """Indices -> (uint8 images (B, C, S, S), index (B,)): the shorter side to `resize_to`, then the central square.

    on_bad_image: what happens to a file that can't be used. "raise": an `InputError`, since every image of an
    evaluation counts. "skip", for evaluation during training: it is missing from the images and from `index`, so B may
    be less than the number of indices, and 0.
    """

    def __init__(self, source: ImageSource, img_size: int, resize_to: int, on_bad_image: str = "raise"):
        if resize_to < img_size:
            raise InputError(
                f"images are resized to {resize_to} pixels and then cropped to {img_size}: resize to {img_size} or more"
            )
        if on_bad_image not in ON_BAD_IMAGE:
            raise InputError(f"on_bad_image {on_bad_image}: choose from {', '.join(ON_BAD_IMAGE)}")
        self.source, self.img_size, self.resize_to = source, img_size, resize_to
        self.on_bad_image = on_bad_image

    def __len__(self) -> int:
        return len(self.source)

    def __getitems__(self, indices: Sequence[int]) -> tuple[torch.Tensor, torch.Tensor]:
        images = crop_memory(1, len(indices), self.source.in_chans, self.img_size, get_worker_info() is not None)[0]
        good: list[int] = []
        for index in indices:
            try:
                images[len(good)] = central_square(self.source.open(index), self.img_size, self.resize_to)
                good.append(index)
            except BadImage as error:
                if self.on_bad_image == "raise":
                    raise InputError(
                        f"{self.source.name(index)} {error}: an evaluation leaves no image out; fix or remove it "
                        "(python -m tools.check_images lists all such files)"
                    ) from error
        return images[: len(good)], torch.tensor(good, dtype=torch.int64)


def central_square(picture: Picture, img_size: int, resize_to: int) -> torch.Tensor:
    """Resize the shorter side to `resize_to`, bicubic, and cut the central square: (C, img_size, img_size) uint8."""
    short, long = sorted((picture.height, picture.width))
    if long > _LONGEST * short:
        picture = _central_part(picture.pixels(), _LONGEST * short)
    height, width = (int(resize_to * side / short) for side in (picture.height, picture.width))
    shrink = max(s for s in (1, 2, 4, 8) if s == 1 or short >= 2 * s * resize_to)
    image = resize(as_batch(picture.pixels(shrink)), height, width)[0]
    top, left = round((height - img_size) / 2), round((width - img_size) / 2)
    return image[:, top : top + img_size, left : left + img_size]


def _central_part(pixels: np.ndarray, length: int) -> Picture:
    """The central part of an image whose sides are at most `length`."""
    top, left = (max(0, side - length) // 2 for side in pixels.shape[:2])
    return Picture.from_array(np.ascontiguousarray(pixels[top : top + length, left : left + length]))
