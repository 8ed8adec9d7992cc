"""Training images with labels, augmented by timm's transforms.

A worker crops, flips and augments with timm's own parts on PIL images and hands over uint8 pixels, which travel four
times cheaper than floats; the device normalises them and fills the erased rectangles. As in timm, erasing comes after
normalisation, so the rectangle and its contents are drawn in the worker and travel next to the pixels.

timm draws from the process's random generators; they are seeded for each image from (seed, epoch, index), so pixels do
not depend on the number of workers or ranks, nor on where a run resumed.

With augmentation splits (AugMix's scheme) an image gives several crops: the first is only cropped and flipped, the
others are augmented too. A batch holds all first crops, then all second ones, and so on.

Letters: B images, V splits (1 without), N = V * B crops, S side of a crop.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import get_worker_info

from data.augment import crop_memory
from data.decode import Picture
from data.draws import TRANSFORM, generators_restored, seed_generators
from data.loader import normalize
from data.source import ImageSource
from data.train_set import SubstitutingSet
from runtime.guards import InputError

INTERPOLATIONS = ("random", "bilinear", "bicubic")
ERASE_MODES = ("const", "rand", "pixel")


@dataclasses.dataclass(frozen=True)
class TransformSpec:
    """The settings of timm's transforms, under its names.

    auto_augment: a policy in timm's notation, such as rand-m9-mstd0.5-inc1; None for none, and then color_jitter
    applies. splits: crops per image, 1 for no splits. erase_first_split: whether erasing spares the first of several.
    """

    size: int = 224
    scale: tuple[float, float] = (0.08, 1.0)
    hflip: float = 0.5
    color_jitter: float = 0.4
    auto_augment: str | None = None
    interpolation: str = "random"
    reprob: float = 0.0
    remode: str = "pixel"
    splits: int = 1
    erase_first_split: bool = True


class LabelledBatch(NamedTuple):
    """One micro-batch of crops before normalisation.

    crops: one tensor, uint8 (V, B, 3, S, S); labels: int64 (N,), those of the images that are shown, split by split;
    boxes: int64 (n, 5), the erased rectangles (crop, top, left, height, width), always in host memory; noise: float32,
    their contents one after the other; index: (B,) int64, the images asked for; bad: (B,) bool, true if a file could
    not be used and another image stands in, with its own label.
    """

    crops: list[Tensor]
    labels: Tensor
    boxes: Tensor
    noise: Tensor
    index: Tensor
    bad: Tensor

    def to(self, device: torch.device | str, non_blocking: bool = False) -> LabelledBatch:
        """The batch with crops, labels and noise on `device`."""
        crops, labels, noise = (t.to(device, non_blocking=non_blocking) for t in (*self.crops, self.labels, self.noise))
        return self._replace(crops=[crops], labels=labels, noise=noise)


class TransformViews:
    """timm's transforms in the loader's workers, then normalisation and erasing on the device."""

    def __init__(self, spec: TransformSpec) -> None:
        self.spec = spec

    def dataset(self, source: ImageSource, seed: int, on_bad_image: str = "substitute") -> LabelledSet:
        """(epoch, index) pairs to batches of uint8 crops with labels."""
        return LabelledSet(source, self.spec, seed, on_bad_image)

    def on_device(self, batch: LabelledBatch) -> list[Tensor]:
        """Normalised float crops, [(N, 3, S, S)]."""
        images, start = normalize(batch.crops[0].flatten(0, 1)), 0
        for crop, top, left, height, width in batch.boxes.tolist():
            end = start + images.shape[1] * height * width
            images[crop, :, top : top + height, left : left + width] = batch.noise[start:end].view(-1, height, width)
            start = end
        return [images]

    def notes(self) -> list[str]:
        """Nothing that a user must know."""
        return []


class LabelledSet(SubstitutingSet):
    """(epoch, index) pairs -> `LabelledBatch`.

    An index from len(source) on means the image index % len(source), with other random numbers: repeated augmentation.
    Raises InputError if the source has no labels, or its images are not RGB.
    """

    def __init__(self, source: ImageSource, spec: TransformSpec, seed: int, on_bad_image: str = "substitute"):
        super().__init__(source, seed, on_bad_image)
        if source.labels is None:
            raise InputError(f"{source.where} has no labels: put the images into one folder per class")
        if source.in_chans != 3:
            raise InputError(f"--in_chans {source.in_chans}: timm's transforms are for RGB images; use 3")
        self.spec = spec
        self._crop, self._augment, self._erase = transforms(spec)

    def __getitems__(self, pairs: Sequence[tuple[int, int]]) -> LabelledBatch:
        """All crops of one micro-batch."""
        count, spec = len(pairs), self.spec
        crops = crop_memory(spec.splits, count, 3, spec.size, get_worker_info() is not None)
        labels, bad = torch.empty(count, dtype=torch.int64), torch.zeros(count, dtype=torch.bool)
        patches: list[tuple[int, int, int, Tensor]] = []
        with generators_restored():
            for b, (epoch, index) in enumerate(pairs):
                image = index % len(self.source)
                used = self.use(epoch, image, partial(self._fill, epoch=epoch, index=index, out=crops[:, b]))
                labels[b], bad[b] = int(self.source.labels[used]), used != image
                patches += [
                    (split * count + b, *patch) for split in range(spec.splits) for patch in self._erased(split)
                ]
        boxes = [(crop, top, left, *pixels.shape[1:]) for crop, top, left, pixels in patches]
        noise = [pixels.reshape(-1) for *_, pixels in patches]
        return LabelledBatch(
            [crops],
            labels.repeat(spec.splits),
            torch.tensor(boxes, dtype=torch.int64).view(-1, 5),
            torch.cat([torch.empty(0), *noise]),
            torch.tensor([index for _, index in pairs], dtype=torch.int64),
            bad,
        )

    def _fill(self, picture: Picture, epoch: int, index: int, out: Tensor) -> None:
        """Write the crops of one image, (V, 3, S, S) uint8."""
        from PIL import Image

        image = Image.fromarray(np.ascontiguousarray(picture.pixels()))
        seed_generators(self.seed, TRANSFORM, epoch, index)
        image = self._crop(image)
        for split in range(len(out)):
            clean = len(out) > 1 and split == 0
            pixels = np.array(image if clean else self._augment(image))
            out[split].copy_(torch.from_numpy(pixels).permute(2, 0, 1))

    def _erased(self, split: int) -> list[tuple[int, int, Tensor]]:
        """(top, left, pixels (3, h, w)) of the rectangles that are erased from the crop filled last."""
        if self._erase is None or (split == 0 and not self.spec.erase_first_split):
            return []
        canvas = _Canvas(self.spec.size)
        self._erase(canvas)
        return canvas.patches


class _Canvas:
    """What timm's erasing takes for an image (3, S, S): remembers what is drawn into it."""

    dtype = torch.float32

    def __init__(self, side: int) -> None:
        self.side = side
        self.patches: list[tuple[int, int, Tensor]] = []

    def size(self) -> tuple[int, int, int]:
        return 3, self.side, self.side

    def __setitem__(self, where: tuple[slice, slice, slice], pixels: Tensor) -> None:
        _, rows, columns = where
        height, width = rows.stop - rows.start, columns.stop - columns.start
        self.patches.append((rows.start, columns.start, pixels.expand(3, height, width)))


def transforms(spec: TransformSpec) -> tuple[Callable, Callable, Callable[[Any], Any] | None]:
    """timm's (crop and flip, augmentation, erasing or None). Raises InputError for a policy that timm doesn't know."""
    from timm.data import create_transform
    from timm.data.random_erasing import RandomErasing

    try:
        crop, augment, _ = create_transform(
            spec.size, is_training=True, use_prefetcher=True, separate=True, scale=spec.scale, hflip=spec.hflip,
            color_jitter=spec.color_jitter or None, auto_augment=spec.auto_augment, interpolation=spec.interpolation,
        )  # fmt: skip
    except (AssertionError, ValueError, KeyError, IndexError) as error:
        raise InputError(
            f"--auto_augment {spec.auto_augment}: timm does not know this policy ({error or type(error).__name__}); "
            "write it as rand-m9-mstd0.5-inc1, augmix-m3-w3, original, v0, 3a, or none"
        ) from error
    for transform in augment.transforms:
        _accept_no_bits(transform)
    erase = RandomErasing(spec.reprob, mode=spec.remode, device="cpu") if spec.reprob else None
    return crop, augment, erase


def _accept_no_bits(transform: Any) -> None:
    """Let the posterize operations of a policy keep 0 bits, which newer versions of Pillow refuse; in place."""
    from timm.data.auto_augment import posterize

    for operation in _operations(transform):
        if operation.aug_fn is posterize:
            operation.aug_fn = _posterize


def _operations(policy: Any) -> Iterator[Any]:
    """timm's AugmentOps in a policy: RandAugment and AugMix have `ops`, AutoAugment a `policy` of lists."""
    if hasattr(policy, "aug_fn"):
        yield policy
    parts = policy if isinstance(policy, list) else getattr(policy, "ops", getattr(policy, "policy", []))
    for part in parts:
        yield from _operations(part)


def _posterize(image: Any, bits_to_keep: int, **_: Any) -> Any:
    """timm's posterize; an image of 0 bits is black, as Pillow made it until it began to raise."""
    from timm.data.auto_augment import posterize

    return posterize(image, bits_to_keep) if bits_to_keep > 0 else image.point(lambda _: 0)
