"""Whole images for localisation: squashed to a square, or in their own shape. Nothing is cut off."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch.utils.data import Dataset, get_worker_info

from data.augment import as_batch, crop_memory, resize
from data.decode import BadImage
from data.source import ImageSource
from evaluation.crops import resize_bilinear
from runtime.guards import InputError


class _WholeSet(Dataset):
    """Images by index; on_bad_image: see `data.eval_set.EvalSet`."""

    def __init__(self, source: ImageSource, on_bad_image: str = "raise") -> None:
        self.source, self.on_bad_image = source, on_bad_image

    def __len__(self) -> int:
        return len(self.source)

    def pixels(self, index: int) -> torch.Tensor | None:
        """(1, C, H, W) uint8, None for an image that is to be skipped. Raises InputError."""
        try:
            return whole_pixels(self.source, index)
        except BadImage as error:
            if self.on_bad_image == "skip":
                return None
            raise InputError(
                f"{self.source.name(index)} {error}: an evaluation leaves no image out; fix or remove it, or leave it "
                "out with --on_bad_image skip"
            ) from error


class SquashedSet(_WholeSet):
    """Indices -> (uint8 images (B, C, S, S), index (B,)): each whole image squashed to a square of S pixels, bilinear.

    MaxBoxAcc's input, resized as torchvision's Resize((S, S)) does it.
    """

    def __init__(self, source: ImageSource, side: int, on_bad_image: str = "raise") -> None:
        super().__init__(source, on_bad_image)
        self.side = side

    def __getitems__(self, indices: Sequence[int]) -> tuple[torch.Tensor, torch.Tensor]:
        images = crop_memory(1, len(indices), self.source.in_chans, self.side, get_worker_info() is not None)[0]
        good: list[int] = []
        for index in indices:
            image = self.pixels(index)
            if image is not None:
                images[len(good)] = resize_bilinear(image, self.side)[0]
                good.append(index)
        return images[: len(good)], torch.tensor(good, dtype=torch.int64)


class OwnSizeSet(_WholeSet):
    """[index] -> (uint8 image (1, C, H, W), index (1,)): one image at a time, its longer side at most `max_side`.

    max_side: 0 keeps every size. A skipped image is (0, C, 0, 0) with an empty index.
    """

    def __init__(self, source: ImageSource, max_side: int = 0, on_bad_image: str = "raise") -> None:
        super().__init__(source, on_bad_image)
        self.max_side = max_side

    def __getitems__(self, indices: Sequence[int]) -> tuple[torch.Tensor, torch.Tensor]:
        (index,) = indices
        image = self.pixels(index)
        if image is None:
            return torch.empty(0, self.source.in_chans, 0, 0, dtype=torch.uint8), torch.empty(0, dtype=torch.int64)
        return bounded(image, self.max_side).contiguous(), torch.tensor([index])


def whole_pixels(source: ImageSource, index: int) -> torch.Tensor:
    """(1, C, H, W) uint8 of one image. Raises `BadImage`."""
    return as_batch(source.load(index))


def bounded(image: torch.Tensor, max_side: int) -> torch.Tensor:
    """(1, C, H, W) uint8 with its longer side brought to `max_side` if it is longer; 0 means no bound."""
    height, width = image.shape[-2:]
    longest = max(height, width)
    if not max_side or longest <= max_side:
        return image
    return resize(image, *(max(1, round(side * max_side / longest)) for side in (height, width)))
