"""AttMask's training step written directly from its formulas, as the published program computes it: the baseline.

Logits of every patch for student and teacher, a forward of the student for global crops and one for local crops, masks
chosen on the host one crop at a time, the log-softmax of all patches. Updates and attention as in plain_step. Starts
from copies of a run's weights. Single process, attmask_high, two global crops.

Shapes: B images, V views, N patches, K prototypes.
"""

from __future__ import annotations

import copy

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from benchmarks.plain_step import CENTER_MOMENTUM, STUDENT_TEMP, make_plain, plain_clip, plain_loss, plain_optimizer
from optim.clipping import cancel_gradients_last_layer
from optim.groups import get_params_groups
from vision_transformer import VisionTransformer


def tokens(backbone: VisionTransformer, images: Tensor, mask: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """All normed tokens (B, 1 + N, D), and the last block's [CLS] attention (B, N), averaged over heads."""
    x, weights = backbone.prepare_tokens(images, mask), None
    for block in backbone.blocks:
        y, weights = block.attn(block.norm1(x), True)
        x = x + y
        x = x + block.mlp(block.norm2(x))
    return backbone.norm(x), weights[:, :, 0, 1:].mean(1)


def host_mask(attention: Tensor, ratio: float, masked: list[bool]) -> Tensor:
    """(B, N) bool: the int(ratio N) most attended patches of each masked crop, sorted on the host."""
    mask = torch.zeros(attention.shape, dtype=torch.bool)
    for row, values, wanted in zip(mask, attention.cpu(), masked, strict=True):
        if wanted:
            row[torch.argsort(values, descending=True, stable=True)[: int(ratio * len(values))]] = True
    return mask.to(attention.device)


def patch_loss(student: Tensor, teacher: Tensor, center: Tensor, temp: float, mask: Tensor) -> Tensor:
    """The mean over two views of the masked cross entropy, (2B, N, K) logits and the mask (2B, N)."""
    losses = []
    for s, t, m in zip(student.chunk(2), teacher.chunk(2), mask.chunk(2), strict=True):
        q = F.softmax((t - center) / temp, dim=-1)
        of_patches = torch.sum(-q * F.log_softmax(s / STUDENT_TEMP, dim=-1), dim=-1)
        losses.append((torch.sum(of_patches * m.float(), dim=-1) / m.sum(dim=-1).clamp(min=1.0)).mean())
    return sum(losses) / len(losses)


@torch.no_grad()
def average_by_name(student: nn.Module, teacher: nn.Module, momentum: float) -> None:
    """teacher <- m · teacher + (1 - m) · student, parameter by parameter."""
    source = dict(student.named_parameters())
    for name, target in teacher.named_parameters():
        target.mul_(momentum).add_((1 - momentum) * source[name].detach())


class PlainAttMaskStep:
    """Steps on float crops, from copies of a student and a teacher with a shared head."""

    def __init__(self, run, precision: str = "highest") -> None:
        """run: a training.run.Run of main_attmask.py, read only; precision: of float32 matrix products."""
        self.run, self.precision = run, precision
        self.student, self.teacher = make_plain(run.student), make_plain(run.teacher)
        self.optimizer = plain_optimizer(run.args.optimizer, get_params_groups(self.student))
        self.loss = copy.deepcopy(run.loss)

    def __call__(self, crops: list[Tensor], masked: list[bool], step: int) -> float:
        """One step on [(2B, C, S, S), (nB, C, s, s)]; `masked`: which of the 2B crops are. Returns the loss."""
        torch.set_float32_matmul_precision(self.precision)
        run, epoch = self.run, step // self.run.plan.steps_per_epoch
        ratio, _ = run.views.settings.ratios_of_step(run.args.seed, step)
        for i, group in enumerate(self.optimizer.param_groups):
            group["lr"] = float(run.schedules["lr"][step])
            if i == 0:
                group["weight_decay"] = float(run.schedules["wd"][step])
        with torch.no_grad():
            output, attention = tokens(self.teacher.backbone, crops[0])
            teacher_output = self.teacher.head(output)
            mask = host_mask(attention, ratio, masked)
        student = tokens(self.student.backbone, crops[0], mask)[0]
        local = [tokens(self.student.backbone, crop)[0][:, 0] for crop in crops[1:]]
        loss = self.head_and_loss(student, local, teacher_output, mask, epoch)
        self.optimizer.zero_grad()
        loss.backward()
        self.update_centers(*teacher_output)
        plain_clip(self.student.parameters(), run.args.clip_grad)
        cancel_gradients_last_layer(epoch, self.student, run.args.freeze_last_layer)
        self.optimizer.step()
        average_by_name(self.student, self.teacher, float(run.schedules["teacher_momentum"][step]))
        return loss.item()

    def head_and_loss(
        self, student: Tensor, local: list[Tensor], teacher_output: tuple[Tensor, Tensor], mask: Tensor, epoch: int
    ) -> Tensor:
        """The loss from the student's tokens (2B, 1 + N, D) and local features (nB, D), and the teacher's logits."""
        cls, patch = self.student.head(student)
        all_cls = torch.cat((cls, *[self.student.head(crop) for crop in local]))
        temp, temp2 = self.loss.teacher_temps(epoch)
        views = self.loss.ngcrops + self.loss.nlcrops
        of_cls, _ = plain_loss(all_cls.float(), teacher_output[0].float(), self.loss.center, temp, views)
        return of_cls + patch_loss(patch.float(), teacher_output[1].float(), self.loss.center2, temp2, mask)

    @torch.no_grad()
    def update_centers(self, cls: Tensor, patch: Tensor) -> None:
        """Move both centers towards the batch's means."""
        for name, mean in (("center", cls.mean(0, keepdim=True)), ("center2", patch.mean(1).mean(0)[None, None])):
            setattr(self.loss, name, getattr(self.loss, name) * CENTER_MOMENTUM + mean * (1 - CENTER_MOMENTUM))
