"""Training images of a linear probe: one random crop of each, flipped half of the time (the published transform).

The crop is torchvision's RandomResizedCrop at its defaults, so bilinear, unlike the bicubic crops of pretraining. It is
a function of (seed, epoch, index), so that a resumed probe sees the images that it would have seen.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import Dataset

from data.augment import as_batch, crop_box
from data.decode import BadImage
from data.draws import uniforms
from data.loader import Loader, build_loader
from data.sampler import TrainSampler
from data.source import ImageSource
from runtime.guards import InputError

SCALE = (0.08, 1.0)  # part of the image's area, RandomResizedCrop's default
_PURPOSE = 101  # keeps these draws apart from pretraining's
_DRAWS = 23  # what data.augment.crop_box takes, and the flip last


class ProbeSet(Dataset):
    """(epoch, position in `indices`) pairs -> (uint8 crops (B, C, S, S), labels (B,))."""

    def __init__(self, source: ImageSource, indices: np.ndarray, img_size: int, seed: int):
        self.source, self.indices = source, torch.from_numpy(np.asarray(indices))
        self.img_size, self.seed = img_size, seed

    def __len__(self) -> int:
        return len(self.indices)

    def __getitems__(self, pairs: Sequence[tuple[int, int]]) -> tuple[Tensor, Tensor]:
        """One batch."""
        crops = torch.empty(len(pairs), self.source.in_chans, self.img_size, self.img_size, dtype=torch.uint8)
        images = [int(self.indices[position]) for _, position in pairs]
        for b, ((epoch, _), index) in enumerate(zip(pairs, images, strict=True)):
            crops[b] = self._crop(epoch, index)
        return crops, torch.from_numpy(self.source.labels[images])

    def _crop(self, epoch: int, index: int) -> Tensor:
        draws = uniforms(_DRAWS, self.seed, _PURPOSE, epoch, index).tolist()
        try:
            pixels = self.source.load(index)
        except BadImage as error:
            raise InputError(
                f"{self.source.name(index)} {error}: an evaluation leaves no image out; fix or remove it, or give "
                "--on_bad_image skip (python -m tools.check_images lists such files)"
            ) from error
        top, left, height, width = crop_box(draws, SCALE, *pixels.shape[:2])
        crop = resize_bilinear(as_batch(pixels)[:, :, top : top + height, left : left + width], self.img_size)[0]
        return crop.flip(-1) if draws[-1] < 0.5 else crop


def resize_bilinear(image: Tensor, side: int) -> Tensor:
    """(1, C, H, W) uint8 -> (1, C, side, side) uint8, antialiased bilinear, Pillow's filter."""
    if image.shape[-2:] == (side, side):
        return image
    return torch.ops.aten._upsample_bilinear2d_aa(image, (side, side), False)


def build_probe_loader(
    source: ImageSource, indices: np.ndarray, sampler: TrainSampler, img_size: int, num_workers: int, seed: int,
    pin_memory: bool = False,
) -> Loader:  # fmt: skip
    """Batches of (crops, labels); each iteration is one epoch from the sampler's position."""
    return build_loader(ProbeSet(source, indices, img_size, seed), sampler, num_workers, pin_memory)
