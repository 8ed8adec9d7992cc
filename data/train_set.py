"""Training sets: (epoch, index) pairs become batches; here of uint8 crops and colour parameters.

A worker makes a whole batch at a time and writes each crop straight into the batch's memory, which the training process
shares: nothing is stacked or copied on the way. What a batch holds is a function of the seed and of its (epoch, index)
pairs alone.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from typing import NamedTuple

import numpy as np
import torch
from torch.utils.data import Dataset, get_worker_info

from data.augment import CropSpec, MultiCrop, colour_parameters, crop_memory
from data.decode import BadImage, Picture
from data.draws import SUBSTITUTE, check_seed, raw_words
from data.source import ImageSource
from runtime.guards import InputError

ON_BAD_IMAGE = ("substitute", "raise")
_SUBSTITUTES = 20  # files tried in place of a bad one before giving up


class CropBatch(NamedTuple):
    """One micro-batch of crops before colour.

    crops: per resolution uint8 (V, B, C, S, S); colour: per resolution float32 (V, B, P) parameters, always in host
    memory; index: (B,) int64, the images asked for; bad: (B,) bool, true if a file could not be used and another
    image stands in.
    """

    crops: list[torch.Tensor]
    colour: list[torch.Tensor]
    index: torch.Tensor
    bad: torch.Tensor

    def to(self, device: torch.device | str, non_blocking: bool = False) -> CropBatch:
        """The batch with its crops on `device`. The rest stays: the host reads it to plan the colour stage."""
        crops = [c.to(device, non_blocking=non_blocking) for c in self.crops]
        return self._replace(crops=crops)


class SubstitutingSet(Dataset):
    """(epoch, index) pairs -> batches, with another image in place of one that can't be used.

    on_bad_image: "substitute", or "raise" an `InputError` that names the file.
    """

    def __init__(self, source: ImageSource, seed: int, on_bad_image: str = "substitute"):
        if on_bad_image not in ON_BAD_IMAGE:
            raise InputError(f"--on_bad_image {on_bad_image}: choose from {', '.join(ON_BAD_IMAGE)}")
        self.source, self.seed, self.on_bad_image = source, check_seed(seed), on_bad_image

    def __len__(self) -> int:
        return len(self.source)

    def use(self, epoch: int, index: int, function: Callable[[Picture], None]) -> int:
        """Call `function` with image `index`, or with a substitute if it is bad; returns the image that was used."""
        try:
            function(self.source.open(index))
            return index
        except BadImage as error:
            if self.on_bad_image == "raise":
                raise InputError(f"{self.source.name(index)} {error} (--on_bad_image raise)") from error
        words = raw_words(_SUBSTITUTES, self.seed, SUBSTITUTE, epoch, index)
        for other in (words % np.uint64(len(self.source))).tolist():
            try:
                function(self.source.open(other))
                return other
            except BadImage:
                continue
        raise InputError(
            f"{self.source.name(index)} can't be used, nor {_SUBSTITUTES} images tried in its place: most of "
            f"{self.source.where} seems broken; python -m tools.check_images lists what is wrong"
        )


class TrainSet(SubstitutingSet):
    """(epoch, index) pairs -> `CropBatch`."""

    def __init__(self, source: ImageSource, spec: CropSpec, seed: int, on_bad_image: str = "substitute"):
        super().__init__(source, seed, on_bad_image)
        if source.in_chans != spec.in_chans:
            raise InputError(
                f"the images have {source.in_chans} channels and the crops {spec.in_chans}: see --in_chans"
            )
        self.spec = spec
        self._multicrop = MultiCrop(spec)

    def __getitems__(self, pairs: Sequence[tuple[int, int]]) -> CropBatch:
        """All crops of one micro-batch."""
        count, channels, shared = len(pairs), self.spec.in_chans, get_worker_info() is not None
        crops = [crop_memory(v, count, channels, s, shared) for v, s in self.spec.resolutions]
        bad = torch.zeros(count, dtype=torch.bool)
        draws = np.stack([self._multicrop.draws(self.seed, epoch, index) for epoch, index in pairs])
        targets = zip(*[view.unbind(0) for c in crops for view in c.unbind(0)], strict=True)  # per image, V crops
        for b, ((epoch, index), out) in enumerate(zip(pairs, targets, strict=True)):
            bad[b] = self.use(epoch, index, partial(self._multicrop.cut, draws=draws[b], out=out)) != index
        index = torch.tensor([i for _, i in pairs], dtype=torch.int64)
        return CropBatch(crops, colour_parameters(draws, self.spec), index, bad)
