"""DINO's loss: cross entropy between the teacher's centered, sharpened output and the student's, over pairs of views.

Shapes: B images, G global views (2, or 1), V student views (the global ones first), K prototypes.

For teacher views q_0 .. q_{G-1} and student views p_0 .. p_{V-1} the loss is the mean over the G (V - 1) pairs
(i, v != i) of the batch mean of -sum_k q_i log p_v. A student view v is compared with the sum Q_v of the teacher views
other than itself, so one log-softmax and one product per view give the same number as one per pair. The teacher's
entropy over the same pairs, and KL = loss - entropy, are computed too. If a teacher probability underflows to 0, its
term is 0 (NaN in the published code).
"""

from __future__ import annotations

import numpy as np
import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn

from distill.fused_loss import in_place_dino_loss
from runtime.distributed import get_world_size


def teacher_temp_schedule(warmup_temp: float, temp: float, warmup_epochs: int, epochs: int) -> np.ndarray:
    """Teacher temperature of each epoch, (epochs,): linear over the warm-up (cut to `epochs`), then constant."""
    warmup = np.linspace(warmup_temp, temp, warmup_epochs)[:epochs]
    return np.concatenate([warmup, np.full(max(0, epochs - warmup_epochs), temp)])


def teacher_probabilities(teacher_output: Tensor, center: Tensor, temp: float) -> Tensor:
    """softmax((t - center) / temp) in float32, (N, K)."""
    return F.softmax((teacher_output.detach().float() - center) / temp, dim=-1)


def mean_entropy(probabilities: Tensor) -> Tensor:
    """Mean over rows of -sum p log p, with 0 log 0 = 0; a 0-d tensor in nats."""
    return torch.special.entr(probabilities).sum(dim=-1).mean()


def cross_entropy_between_views(student: Tensor, targets: Tensor, views: int, student_temp: float) -> Tensor:
    """DINO's cross entropy from student logits (views·B, K) and teacher probabilities (G·B, K); 0-d, in nats."""
    batch = len(student) // views
    teacher_views = targets.split(batch)
    of_all = sum(teacher_views) if views > len(teacher_views) else None  # what every local view is compared with
    total = student.new_zeros((), dtype=torch.float32)
    for v, view in enumerate(student.split(batch)):
        if v < len(teacher_views):
            others = [q for i, q in enumerate(teacher_views) if i != v]
            if not others:
                continue  # the only global view is compared with nothing
            target = sum(others)
        else:
            target = of_all
        total = total - (target * F.log_softmax(view.float() / student_temp, dim=-1)).sum() / batch
    return total / (len(teacher_views) * (views - 1))


class DINOLoss(nn.Module):
    """DINO's loss with its center, a buffer (1, K) saved in the checkpoint under `dino_loss`.

    `forward` computes the terms and then updates the center, as DINO's does. The training step calls the two parts
    separately, so that it can refuse a non-finite step before the center changes.
    """

    def __init__(
        self,
        out_dim: int,
        ncrops: int,
        warmup_teacher_temp: float,
        teacher_temp: float,
        warmup_teacher_temp_epochs: int,
        nepochs: int,
        student_temp: float = 0.1,
        center_momentum: float = 0.9,
        nglobal: int = 2,
    ) -> None:
        super().__init__()
        if nglobal not in (1, 2):
            raise ValueError(f"nglobal is {nglobal}; the teacher sees 1 or 2 global crops")
        if ncrops < 2:
            raise ValueError(f"ncrops is {ncrops}; DINO compares at least 2 crops")
        self.ncrops, self.nglobal = ncrops, nglobal
        self.student_temp = student_temp
        self.center_momentum = center_momentum
        self.register_buffer("center", torch.zeros(1, out_dim))
        self.teacher_temp_schedule = teacher_temp_schedule(
            warmup_teacher_temp, teacher_temp, warmup_teacher_temp_epochs, nepochs
        )

    def teacher_temp(self, epoch: int) -> float:
        """Teacher temperature of an epoch; that of the last epoch beyond the schedule's end."""
        return float(self.teacher_temp_schedule[min(epoch, len(self.teacher_temp_schedule) - 1)])

    def forward(self, student_output: Tensor, teacher_output: Tensor, epoch: int) -> tuple[Tensor, Tensor, Tensor]:
        """(V·B, K), (G·B, K) -> (loss, entropy, kl), 0-d tensors; updates the center afterwards."""
        terms = self.terms(student_output, teacher_output, epoch)
        self.update_center(teacher_output)
        return terms

    def terms(self, student_output: Tensor, teacher_output: Tensor, epoch: int) -> tuple[Tensor, Tensor, Tensor]:
        """(loss, entropy, kl) with the current center, which is not updated."""
        batch, rest = divmod(len(student_output), self.ncrops)
        if rest or len(teacher_output) != self.nglobal * batch:
            raise ValueError(
                f"{len(student_output)} student and {len(teacher_output)} teacher outputs do not belong to "
                f"{self.ncrops} and {self.nglobal} crops of one batch"
            )
        targets = teacher_probabilities(teacher_output, self.center, self.teacher_temp(epoch))
        loss = cross_entropy_between_views(student_output, targets, self.ncrops, self.student_temp)
        entropy = mean_entropy(targets)
        return loss, entropy, loss.detach() - entropy

    def step_terms(self, student_output: Tensor, teacher_output: Tensor, epoch: int) -> tuple[Tensor, ...]:
        """(loss, entropy, kl) and the teacher outputs' sum (1, K), for a training step; the center is not updated.

        The same numbers as `terms` in one pass over the teacher's output and half the memory: the gradient overwrites
        the student's output, which must not be read afterwards. With one global crop it is `terms` itself.
        """
        if self.nglobal == 1:
            return *self.terms(student_output, teacher_output, epoch), teacher_output.float().sum(dim=0, keepdim=True)
        return in_place_dino_loss(
            student_output, teacher_output, self.center, self.teacher_temp(epoch), self.student_temp, self.ncrops
        )

    @torch.no_grad()
    def probabilities(self, teacher_output: Tensor, epoch: int) -> Tensor:
        """The teacher's centered and sharpened probabilities, (B, K) -> (B, K), for the collapse monitors."""
        return teacher_probabilities(teacher_output, self.center, self.teacher_temp(epoch))

    @torch.no_grad()
    def update_center(self, teacher_output: Tensor) -> None:
        """center <- momentum · center + (1 - momentum) · mean of the teacher's outputs over all processes."""
        total = teacher_output.float().sum(dim=0, keepdim=True)
        if get_world_size() > 1:
            dist.all_reduce(total)
        self.apply_center(total / (len(teacher_output) * get_world_size()))

    @torch.no_grad()
    def apply_center(self, batch_center: Tensor, skip: Tensor | None = None) -> None:
        """Move the center towards `batch_center` (1, K), unless the 0-d bool tensor `skip` is true."""
        moved = self.center * self.center_momentum + batch_center * (1 - self.center_momentum)
        self.center.copy_(moved if skip is None else torch.where(skip, self.center, moved))
