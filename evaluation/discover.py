"""One box for each image of a data set, by DINO-seg or LOST: images one at a time, at their own resolution.

An image is normalised and then padded with zeros to whole patches, as published. Boxes come back in the pixels that
the annotations count in, whatever size the model saw.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor, nn

from data.boxes import BoxedImages
from data.loader import build_loader, normalize
from data.sampler import shard_for_eval
from evaluation.discovery import dino_seg_box, lost
from evaluation.object_maps import lost_features, map_step, one_map, padded
from evaluation.whole_images import OwnSizeSet
from runtime.distributed import all_gather_objects, get_rank, get_world_size
from runtime.progress import progress


class Sight(NamedTuple):
    """A box in the pixels of the model's input, and the map (h, w) that it comes from; no box for a broken map."""

    box: tuple[float, float, float, float] | None
    map: Tensor
    step: int  # pixels per position of the map

    def over(self, height: int, width: int) -> Tensor:
        """The map with a value for each pixel of the image without its padding, (height, width)."""
        return self.map.repeat_interleave(self.step, 0).repeat_interleave(self.step, 1)[:height, :width]


Finder = Callable[[Tensor], Sight]  # a normalised image (1, C, H, W), not padded yet


def dino_seg_finder(
    model: nn.Module, head: int | None, side: int, channels: int, amp_dtype: torch.dtype | None = None, **settings: Any
) -> Finder:
    """DINO-seg on the map of one head, or of the mean; settings: `mass` and `published_components` of dino_seg_box."""
    step = map_step(model, side, channels)

    @torch.no_grad()
    def find(image: Tensor) -> Sight:
        with _autocast(image, amp_dtype):
            attention = model.get_attention_map(padded(image, step))
        map = one_map(attention, head)[0].cpu()
        if not map.isfinite().all() or map.min() < 0 or map.sum() <= 0:
            return Sight(None, torch.zeros_like(map), step)
        return Sight(dino_seg_box(map.flatten(), tuple(map.shape), step, **settings), map, step)

    return find


def lost_finder(model: nn.Module, side: int, channels: int, amp_dtype: torch.dtype | None = None) -> Finder:
    """LOST on the keys of the last block, or on the last map."""
    step = map_step(model, side, channels, dilate=True)

    def find(image: Tensor) -> Sight:
        with _autocast(image, amp_dtype):
            features, grid = lost_features(model, padded(image, step), step)
        if not features.isfinite().all():
            return Sight(None, torch.zeros(grid), step)
        found = lost(features, grid, step, tuple(image.shape[-2:]))
        return Sight(found.box, found.scores.clamp_min(0).reshape(grid), step)

    return find


def _autocast(image: Tensor, dtype: torch.dtype | None) -> torch.autocast:
    return torch.autocast(image.device.type, dtype or torch.bfloat16, enabled=dtype is not None)


@dataclass
class Discovered:
    """All images' boxes, on every rank."""

    index: np.ndarray  # (n,) images, in their order
    boxes: np.ndarray  # (n, 4) float64, in the pixels of the annotations; zeros where there is none
    not_finite: int


def discover(
    images: BoxedImages,
    find: Finder,
    *,
    device: torch.device,
    max_side: int = 0,
    num_workers: int = 0,
    on_bad_image: str = "raise",
    desc: str = "boxes",
) -> Discovered:
    """The box of every image, each found on one rank. Every rank must call it.

    max_side: larger images are resized so that their longer side has so many pixels; 0: none is.
    """
    share = shard_for_eval(len(images), get_rank(), get_world_size())
    loader = build_loader(
        OwnSizeSet(images.source, max_side, on_bad_image), [[int(i)] for i in share], num_workers,
        device.type == "cuda",
    )  # fmt: skip
    rows = []
    for pixels, index in progress(loader, len(share), desc):
        if not len(index):
            continue
        i = int(index)
        sight = find(normalize(pixels.to(device)))
        scale = np.tile(images.sizes[i] / (pixels.shape[-1], pixels.shape[-2]), 2)
        box = np.zeros(4) if sight.box is None else np.array(sight.box) * scale
        rows.append([i, *box, sight.box is None])
    everything = np.concatenate([np.array(rank, np.float64).reshape(-1, 6) for rank in all_gather_objects(rows)])
    return Discovered(everything[:, 0].astype(np.int64), everything[:, 1:5], int(everything[:, 5].sum()))
