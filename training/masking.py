"""Views with masks: multi-crop, and for each global crop what decides which patches the student doesn't see.

Masks by attention follow from the teacher's forward; the workers only draw which crops are masked, and the noise that
reveals hints. Block-wise and random masks are drawn whole, in the workers. Everything drawn for an image is a function
of (seed, epoch, index); the ratio of masks by attention, one for all images of a step, is one of (seed, step).

Shape letters: B images, G global crops, N = h w patches of each.
"""

from __future__ import annotations

import argparse
import dataclasses
import math
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from data.augment import CropSpec
from data.draws import MASK_RATIO, MASKS, raw_words, uniforms
from data.source import ImageSource
from data.train_set import CropBatch, TrainSet
from data.views import MultiCropViews
from distill.masked_multicrop import Masks, masks_with_rows
from distill.masking import attention_mask, block_mask, random_mask, reveal_hints
from runtime.checks import check_choice, from_zero_to_one, zero_or_more
from runtime.cli import add_flag
from runtime.guards import InputError

BY_ATTENTION = ("attmask_high", "attmask_hint", "attmask_low")
SHAPES = (*BY_ATTENTION, "block", "rand")


@dataclasses.dataclass(frozen=True)
class MaskSettings:
    """How patches are masked.

    Args:
        shape: one of SHAPES.
        grid: (h, w) patches of a global crop.
        ratios, variances: r is uniform in [ratio - variance, ratio + variance] for a pair chosen at random.
        probability: of a crop to be masked at all, in masks by attention; the other shapes mask every crop.
        show_max: hints are revealed among this part of the patches, the most attended ones.
        start_epoch: epochs before it have no masks.
    """

    shape: str
    grid: tuple[int, int]
    ratios: tuple[float, ...] = (0.3,)
    variances: tuple[float, ...] = (0.0,)
    probability: float = 0.5
    show_max: float = 0.1
    start_epoch: int = 0

    @property
    def patches(self) -> int:
        """N"""
        return self.grid[0] * self.grid[1]

    @property
    def by_attention(self) -> bool:
        """Whether the teacher's attention decides."""
        return self.shape in BY_ATTENTION

    def ratio(self, which: float, where: float) -> float:
        """r for two numbers in [0, 1): which pair, and where in its range."""
        pair = int(which * len(self.ratios))
        return min(max(self.ratios[pair] + self.variances[pair] * (2 * where - 1), 0.0), 1.0)

    def ratios_of_step(self, seed: int, step: int) -> tuple[float, float]:
        """The masked part r of a step, and the part s of the patches that hints reveal of it."""
        draws = uniforms(4, seed, MASK_RATIO, 0, step).tolist()
        return self.ratio(*draws[:2]), self.show_max * self.ratio(*draws[2:])


class MaskedBatch(NamedTuple):
    """Crops and what was drawn for their masks, which stays in host memory.

    masked: (G, B) bool, whether a crop is masked. drawn: (G, B, N), the mask itself (bool) for block-wise and random
    masks, the noise (float32) for hints; (G, B, 0) if nothing else is needed.
    """

    views: CropBatch
    masked: Tensor
    drawn: Tensor

    @property
    def crops(self) -> list[Tensor]:
        """As CropBatch's."""
        return self.views.crops

    @property
    def index(self) -> Tensor:
        """As CropBatch's."""
        return self.views.index

    @property
    def bad(self) -> Tensor:
        """As CropBatch's."""
        return self.views.bad

    def to(self, device: torch.device | str, non_blocking: bool = False) -> MaskedBatch:
        """The batch with its crops on `device`."""
        return self._replace(views=self.views.to(device, non_blocking))


class MaskedTrainSet(TrainSet):
    """(epoch, index) pairs -> `MaskedBatch`."""

    def __init__(
        self, source: ImageSource, spec: CropSpec, settings: MaskSettings, seed: int, on_bad_image: str = "substitute"
    ) -> None:
        super().__init__(source, spec, seed, on_bad_image)
        self.settings = settings

    def __getitems__(self, pairs: Sequence[tuple[int, int]]) -> MaskedBatch:
        """All crops of one micro-batch, and the draws of its masks."""
        draw = self._draw if self.settings.by_attention else self._mask
        masked, drawn = zip(*[draw(epoch, index) for epoch, index in pairs], strict=True)
        return MaskedBatch(super().__getitems__(pairs), torch.stack(masked, dim=1), torch.stack(drawn, dim=1))

    def _draw(self, epoch: int, index: int) -> tuple[Tensor, Tensor]:
        """For masks by attention: (G,) bool and the noise (G, N) or (G, 0)."""
        settings, crops = self.settings, self.spec.global_number
        noise = settings.patches if settings.shape == "attmask_hint" else 0
        draws = torch.from_numpy(uniforms(crops * (1 + noise), self.seed, MASKS, epoch, index))
        return draws[:crops] < settings.probability, draws[crops:].view(crops, noise).float()

    def _mask(self, epoch: int, index: int) -> tuple[Tensor, Tensor]:
        """For the other shapes: (G,) bool and the masks (G, N) bool."""
        settings, crops = self.settings, self.spec.global_number
        words = raw_words(3 * crops, self.seed, MASKS, epoch, index).reshape(crops, 3)
        masks = torch.zeros(crops, settings.patches, dtype=torch.bool)
        if epoch >= settings.start_epoch:
            for mask, (which, where, word) in zip(masks, words, strict=True):
                ratio = settings.ratio(*[float(draw >> np.uint64(11)) * 2.0**-53 for draw in (which, where)])
                generator = torch.Generator().manual_seed(int(word >> np.uint64(1)))
                if settings.shape == "block":
                    mask.copy_(block_mask(settings.grid, ratio, generator).flatten())
                else:
                    mask.copy_(random_mask(settings.patches, ratio, generator))
        return torch.ones(crops, dtype=torch.bool), masks


class MaskedViews(MultiCropViews):
    """Multi-crop views, and the masks of their global crops."""

    def __init__(self, spec: CropSpec, settings: MaskSettings, seed: int) -> None:
        super().__init__(spec)
        self.settings, self.seed = settings, seed

    def dataset(self, source: ImageSource, seed: int, on_bad_image: str = "substitute") -> MaskedTrainSet:
        """(epoch, index) pairs to batches of uint8 crops and the draws of their masks."""
        return MaskedTrainSet(source, self.spec, self.settings, seed, on_bad_image)

    def on_device(self, batch: MaskedBatch) -> list[Tensor]:
        """Normalised float crops, one tensor per resolution: [(G·B, C, S, S), (L·B, C, s, s)]."""
        return super().on_device(batch.views)

    def masks(self, batch: MaskedBatch, step: int, epoch: int, attention: Tensor) -> Masks:
        """The masks of the global crops, from the teacher's attention (G·B, N); the device is never waited for."""
        settings, device = self.settings, attention.device
        if not settings.by_attention:
            mask = batch.drawn.flatten(0, 1)
            most = int(mask.sum(dim=1).max())
            return masks_with_rows(mask.to(device, non_blocking=True), most)
        ratio, shown = settings.ratios_of_step(self.seed, step) if epoch >= settings.start_epoch else (0.0, 0.0)
        crops = batch.masked.flatten().nonzero()[:, 0].to(device, non_blocking=True)  # of tensors on the host
        seen = attention.index_select(0, crops)
        mask = attention_mask(seen, ratio, "attmask_low" if settings.shape == "attmask_low" else "attmask_high")
        if settings.shape == "attmask_hint":
            noise = batch.drawn.flatten(0, 1).to(device, non_blocking=True).index_select(0, crops)
            mask = reveal_hints(mask, seen, shown, settings.show_max, noise)
        whole = torch.zeros_like(attention, dtype=torch.bool).index_copy_(0, crops, mask)
        return masks_with_rows(whole, int(float(ratio) * settings.patches), crops)


# ------------------------------------------------------------------------------------------------ flags


def add_flags(group: argparse._ArgumentGroup) -> None:
    """The flags of the masks; recipes hold all their defaults."""
    add_flag(group, "--pred_shape", choices=SHAPES, help="what is masked: the most attended patches, all (high) or but "
             "for a few hints (hint), the least attended ones (low), blocks, or random patches")  # fmt: skip
    add_flag(
        group, "--pred_ratio", type=float, nargs="+", help="part of the patches to mask; of several, one at random"
    )
    add_flag(group, "--pred_ratio_var", type=float, nargs="+",
             help="the part varies uniformly by up to this; as many numbers as --pred_ratio")  # fmt: skip
    add_flag(group, "--masking_prob", type=float, help="probability of a crop to be masked, in masks by attention")
    add_flag(group, "--show_max", type=float, help="hints are among this part of the patches, the most attended ones")
    add_flag(group, "--pred_start_epoch", type=int, help="first epoch with masks")


def settings(args: argparse.Namespace) -> MaskSettings:
    """What the flags say of the masks."""
    side = args.img_size // args.patch_size
    return MaskSettings(
        args.pred_shape, (side, side), tuple(args.pred_ratio), tuple(args.pred_ratio_var), args.masking_prob,
        args.show_max, args.pred_start_epoch,
    )  # fmt: skip


def check(args: argparse.Namespace) -> None:
    """Raise InputError for masks that can't be made."""
    check_choice(args, "pred_shape", SHAPES)
    zero_or_more(args, "pred_start_epoch")
    from_zero_to_one(args, "masking_prob")
    if not 0 < args.show_max < 1:
        raise InputError(f"--show_max {args.show_max}: must be between 0 and 1, both excluded")
    ratios, variances = args.pred_ratio, args.pred_ratio_var
    if len(ratios) != len(variances):
        raise InputError(
            f"--pred_ratio has {len(ratios)} numbers and --pred_ratio_var {len(variances)}; give as many of both"
        )
    for ratio, variance in zip(ratios, variances, strict=True):
        if not (0 <= ratio <= 1 and 0 <= variance <= 1):
            raise InputError(f"--pred_ratio {ratio} --pred_ratio_var {variance}: both must be from 0 to 1")
        if variance > ratio or (ratio + variance > 1 and not math.isclose(ratio + variance, 1)):
            raise InputError(
                f"--pred_ratio {ratio} --pred_ratio_var {variance}: the masked part would vary from "
                f"{ratio - variance:g} to {ratio + variance:g}, beyond [0, 1]; use at most "
                f"--pred_ratio_var {min(ratio, 1 - ratio):g}"
            )
