"""The evaluation set: indices become batches of uint8 images, resized and cut at the centre."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch.utils.data import Dataset, get_worker_info

from data.augment import as_batch, crop_memory, resize
from data.decode import BadImage
from data.source import ImageSource
from runtime.guards import InputError


class EvalSet(Dataset):
    """Indices -> (uint8 images (B, C, S, S), index (B,)): the shorter side to `resize_to`, then the central square.

    on_bad_image: "raise" stops at a file that can't be used; "mark" gives a black image and ~index, a negative number.
    """

    def __init__(self, source: ImageSource, img_size: int, resize_to: int, on_bad_image: str = "raise"):
        if resize_to < img_size:
            raise InputError(
                f"images are resized to {resize_to} pixels and then cropped to {img_size}: larger than that"
            )
        self.source, self.img_size, self.resize_to = source, img_size, resize_to
        self.on_bad_image = on_bad_image

    def __len__(self) -> int:
        return len(self.source)

    def __getitems__(self, indices: Sequence[int]) -> tuple[torch.Tensor, torch.Tensor]:
        images = crop_memory(1, len(indices), self.source.in_chans, self.img_size, get_worker_info() is not None)[0]
        numbers = torch.tensor(indices, dtype=torch.int64)
        for b, index in enumerate(indices):
            try:
                picture = self.source.open(index)
                images[b] = central_square(picture, self.img_size, self.resize_to)
            except BadImage as error:
                if self.on_bad_image == "mark":
                    images[b], numbers[b] = 0, ~index
                    continue
                raise InputError(
                    f"{self.source.name(index)} {error}: an evaluation leaves no image out; fix or remove it, or give "
                    "--on_bad_image skip (python -m tools.check_images lists such files)"
                ) from error
        return images, numbers


def central_square(picture, img_size: int, resize_to: int) -> torch.Tensor:
    """Resize the shorter side to `resize_to`, bicubic, and cut the central square: (C, img_size, img_size) uint8."""
    short = min(picture.height, picture.width)
    height, width = (int(resize_to * side / short) for side in (picture.height, picture.width))
    shrink = max(s for s in (1, 2, 4, 8) if s == 1 or short >= 2 * s * resize_to)
    image = resize(as_batch(picture.pixels(shrink)), height, width)[0]
    top, left = round((height - img_size) / 2), round((width - img_size) / 2)
    return image[:, top : top + img_size, left : left + img_size]
