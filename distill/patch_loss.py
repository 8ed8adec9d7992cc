"""iBOT's loss: DINO's cross entropy between [CLS] outputs, and the same between the masked patches of a view.

Follows "Image BERT Pre-Training with Online Tokenizer" (ICLR 2022), whose masks AttMask chooses by attention.

Shapes: B images, G global views (each seen by teacher and student), L local views (student only), N patches of a global
view, K prototypes of [CLS], K2 of patches. Views are concatenated along the rows, view by view.

- [CLS]: the mean over the pairs (teacher view i, student view v != i) of the batch mean of -sum_k q_i log p_v.
- Patches: for each global view, -sum_k q log p between the teacher's and the student's patch at the same place; summed
  over the masked patches of an image and divided by their number, or by 1 if there are none; the mean over images and
  views.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn

from distill.fused_loss import in_place_dino_loss
from distill.losses import cross_entropy_between_views, teacher_probabilities, teacher_temp_schedule
from distill.masked_rows import weighted_cross_entropy
from runtime.distributed import get_world_size


def patch_temp_schedule(
    warmup_temp: float, temp: float, warmup_epochs: int, epochs: int, start_epoch: int
) -> np.ndarray:
    """Patch temperature of each epoch, (epochs,): at rest before start_epoch, where the warm-up begins."""
    rest = np.full(min(start_epoch, epochs), warmup_temp)
    return np.concatenate([rest, teacher_temp_schedule(warmup_temp, temp, warmup_epochs, epochs - len(rest))])


def masked_cross_entropy(student: Tensor, targets: Tensor, mask: Tensor, student_temp: float) -> Tensor:
    """The patch term of one view from logits and probabilities (B, N, K2) and its mask (B, N) bool; 0-d, in nats."""
    per_patch = -(targets * F.log_softmax(student.float() / student_temp, dim=-1)).sum(dim=-1)  # (B, N)
    return ((per_patch * mask).sum(dim=1) / mask.sum(dim=1).clamp(min=1)).mean()


class iBOTLoss(nn.Module):
    """iBOT's loss with its two centers, buffers `center` (1, K) and `center2` (1, 1, K2).

    `forward` computes the terms and then updates the centers, as iBOT's does. A training step calls the parts
    separately, so that it can refuse a non-finite step before a center changes.

    Args:
        out_dim, patch_out_dim: K and K2.
        ngcrops: G, 1 or 2 (or more). nlcrops: L. There must be at least 2 views in all.
        warmup_teacher_temp, teacher_temp: of [CLS]; warmup_teacher_temp2, teacher_temp2: of patches.
        warmup_teacher_temp_epochs: of both. nepochs: of the training.
        center_momentum, center_momentum2: of `center` and `center2`.
        lambda1, lambda2: weights of the [CLS] term and the patch term.
        mim_start_epoch: first epoch with masks; before it the patch temperature rests at its start.

    Raises:
        ValueError: for numbers of crops or a mim_start_epoch that can't work.
    """

    def __init__(
        self,
        out_dim: int,
        patch_out_dim: int,
        ngcrops: int,
        nlcrops: int,
        warmup_teacher_temp: float,
        teacher_temp: float,
        warmup_teacher_temp2: float,
        teacher_temp2: float,
        warmup_teacher_temp_epochs: int,
        nepochs: int,
        student_temp: float = 0.1,
        center_momentum: float = 0.9,
        center_momentum2: float = 0.9,
        lambda1: float = 1.0,
        lambda2: float = 1.0,
        mim_start_epoch: int = 0,
    ) -> None:
        super().__init__()
        if ngcrops < 1 or nlcrops < 0 or ngcrops + nlcrops < 2:
            raise ValueError(
                f"ngcrops is {ngcrops} and nlcrops {nlcrops}; iBOT compares at least 2 views, one of them global"
            )
        if mim_start_epoch < 0:
            raise ValueError(f"mim_start_epoch is {mim_start_epoch}; epochs count from 0")
        self.ngcrops = ngcrops
        self.nlcrops = nlcrops
        self.student_temp = student_temp
        self.center_momentum = center_momentum
        self.center_momentum2 = center_momentum2
        self.lambda1 = lambda1
        self.lambda2 = lambda2
        self.register_buffer("center", torch.zeros(1, out_dim))
        self.register_buffer("center2", torch.zeros(1, 1, patch_out_dim))
        self.teacher_temp_schedule = teacher_temp_schedule(
            warmup_teacher_temp, teacher_temp, warmup_teacher_temp_epochs, nepochs
        )
        self.teacher_temp2_schedule = patch_temp_schedule(
            warmup_teacher_temp2, teacher_temp2, warmup_teacher_temp_epochs, nepochs, mim_start_epoch
        )

    def teacher_temps(self, epoch: int) -> tuple[float, float]:
        """Teacher temperatures of [CLS] and patches in an epoch; those of the last epoch beyond the schedules' end."""
        schedules = (self.teacher_temp_schedule, self.teacher_temp2_schedule)
        cls, patch = (float(schedule[min(epoch, len(schedule) - 1)]) for schedule in schedules)
        return cls, patch

    def forward(
        self,
        student_output: tuple[Tensor, Tensor],
        teacher_output: tuple[Tensor, Tensor],
        student_local_cls: Tensor | None,
        student_mask: Sequence[Tensor],
        epoch: int,
    ) -> dict[str, Tensor]:
        """The terms, as `terms` gives them; updates the centers afterwards."""
        terms = self.terms(student_output, teacher_output, student_local_cls, student_mask, epoch)
        self.update_centers(*teacher_output)
        return terms

    def terms(
        self,
        student_output: tuple[Tensor, Tensor],
        teacher_output: tuple[Tensor, Tensor],
        student_local_cls: Tensor | None,
        student_mask: Sequence[Tensor],
        epoch: int,
    ) -> dict[str, Tensor]:
        """The loss with the current centers, which are not updated.

        Args:
            student_output, teacher_output: logits of [CLS] (G·B, K) and of patches (G·B, N, K2).
            student_local_cls: (L·B, K), or None without local views.
            student_mask: for each global view a (B, h, w) bool.

        Returns:
            0-d float32 tensors: "cls" and "patch" with their lambdas in them, and their sum "loss".

        Raises:
            ValueError: for outputs and masks that do not belong together.
        """
        student_cls, student_patch = student_output
        teacher_cls, teacher_patch = teacher_output
        masks = [mask.flatten(1) for mask in student_mask]
        batch = self._check(student_output, teacher_output, student_local_cls, masks)
        temp, temp2 = self.teacher_temps(epoch)

        all_cls = student_cls if student_local_cls is None else torch.cat((student_cls, student_local_cls))
        targets = teacher_probabilities(teacher_cls, self.center, temp)
        cls = cross_entropy_between_views(all_cls, targets, self.ngcrops + self.nlcrops, self.student_temp)

        patch = cls.new_zeros(())
        for student, teacher, mask in zip(student_patch.split(batch), teacher_patch.split(batch), masks, strict=True):
            targets = teacher_probabilities(teacher, self.center2, temp2)
            patch = patch + masked_cross_entropy(student, targets, mask, self.student_temp)

        cls, patch = self.lambda1 * cls, self.lambda2 * patch / self.ngcrops
        return {"loss": cls + patch, "cls": cls, "patch": patch}

    def step_terms(
        self,
        student_cls: Tensor,
        student_patch: Tensor,
        teacher_cls: Tensor,
        teacher_patch: Tensor,
        weights: Tensor,
        epoch: int,
    ) -> tuple[Tensor, Tensor, Tensor]:
        """(loss, cls, patch) as `terms` gives them, for a training step: from the logits of masked patches only.

        The gradients overwrite the student's logits, which must not be read afterwards. The centers are not updated.

        Args:
            student_cls, teacher_cls: (V·B, K), global views first, and (G·B, K).
            student_patch, teacher_patch: (M, K2), the same M patches of both.
            weights: (M,), of each patch: 1 / (G·B · masked patches of its view); 0 for one that is not masked.
        """
        temp, temp2 = self.teacher_temps(epoch)
        views = self.ngcrops + self.nlcrops
        if self.ngcrops == 2:
            cls, *_ = in_place_dino_loss(student_cls, teacher_cls, self.center, temp, self.student_temp, views)
        else:
            targets = teacher_probabilities(teacher_cls, self.center, temp)
            cls = cross_entropy_between_views(student_cls, targets, views, self.student_temp)
        patch = weighted_cross_entropy(student_patch, teacher_patch, self.center2, weights, temp2, self.student_temp)
        cls, patch = self.lambda1 * cls, patch * self.lambda2
        return cls + patch, cls, patch

    @torch.no_grad()
    def probabilities(self, teacher_cls: Tensor, epoch: int) -> Tensor:
        """The teacher's centered and sharpened [CLS] probabilities, (B, K) -> (B, K), for the collapse monitors."""
        return teacher_probabilities(teacher_cls, self.center, self.teacher_temps(epoch)[0])

    @torch.no_grad()
    def center_sums(self, teacher_cls: Tensor, teacher_patch: Tensor) -> tuple[Tensor, Tensor]:
        """(K,), (K2,): the teacher outputs summed over rows, of patches their mean. The count of both is the rows'."""
        return teacher_cls.float().sum(dim=0), teacher_patch.float().mean(dim=1).sum(dim=0)

    @torch.no_grad()
    def update_centers(self, teacher_cls: Tensor, teacher_patch: Tensor) -> None:
        """Move both centers towards the means of the teacher's outputs, (G·B, K) and (G·B, N, K2), of all processes."""
        sums = self.center_sums(teacher_cls, teacher_patch)
        both = torch.cat(sums)
        if get_world_size() > 1:
            dist.all_reduce(both)
        means = both / (len(teacher_cls) * get_world_size())
        self.apply_centers(*means.split([len(part) for part in sums]))

    @torch.no_grad()
    def apply_centers(self, batch_center: Tensor, batch_center2: Tensor, skip: Tensor | None = None) -> None:
        """Move the centers towards (K,) and (K2,) or their own shapes, unless the 0-d bool tensor `skip` is true."""
        for center, towards, momentum in (
            (self.center, batch_center, self.center_momentum),
            (self.center2, batch_center2, self.center_momentum2),
        ):
            moved = center * momentum + towards * (1 - momentum)
            center.copy_(moved if skip is None else torch.where(skip, center, moved))

    def _check(self, student_output, teacher_output, student_local_cls, masks) -> int:
        """B, or a ValueError that says what does not fit."""
        batch, rest = divmod(len(student_output[0]), self.ngcrops)
        rows = [len(part) for part in (*student_output, *teacher_output)]
        local = 0 if student_local_cls is None else len(student_local_cls)
        if rest or len(set(rows)) > 1 or local != self.nlcrops * batch:
            raise ValueError(
                f"{rows[0]} and {rows[1]} student outputs, {rows[2]} and {rows[3]} teacher outputs of [CLS] and "
                f"patches, and {local} of local crops do not belong to {self.ngcrops} global and {self.nlcrops} local "
                "crops of one batch"
            )
        expected = [(batch, student_output[1].shape[1])] * self.ngcrops
        if [tuple(mask.shape) for mask in masks] != expected:
            shapes = [tuple(mask.shape) for mask in masks]
            raise ValueError(
                f"masks of {shapes} (images, patches) do not fit {self.ngcrops} global crops of {expected[0]} each"
            )
        return batch
