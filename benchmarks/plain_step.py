"""The training step written directly from its formulas, one operation after the other: the benchmarks' baseline.

Explicit attention, a key for every position in SimPool, one log-softmax per pair of views, Python loops over parameters
for clipping, average and LARS, AdamW unfused, float32 at torch's default precision, default memory layout. Single
process. It shares no computing code with the training step except torch's layers, and starts from copies of a run's
weights. Each part can be replaced by the training step's (`PARTS`), to see what that part gains.

Shapes: B images, V views, K prototypes, T tokens, D width.
"""

from __future__ import annotations

import copy
from collections.abc import Iterable

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from benchmarks.simpool_layer import PlainSimPool
from optim.average import ParameterAverage
from optim.clipping import cancel_gradients_last_layer, clip_each_
from optim.groups import get_params_groups
from optim.optimizers import build_optimizer
from sp import SimPool
from vision_transformer import Attention, VisionTransformer

PARTS = ("pooling", "loss", "updates")
STUDENT_TEMP, CENTER_MOMENTUM = 0.1, 0.9


class PlainAttention(nn.Module):
    """Softmax attention with the weights of an `Attention`, written out."""

    def __init__(self, attention: Attention) -> None:
        super().__init__()
        self.num_heads, self.scale = attention.num_heads, attention.scale
        self.qkv, self.proj = attention.qkv, attention.proj

    def forward(self, x: Tensor, need_attention: bool = False, attention_rows: int = 0) -> tuple[Tensor, Tensor]:
        batch, tokens, width = x.shape
        qkv = self.qkv(x).view(batch, tokens, 3, self.num_heads, -1).permute(2, 0, 3, 1, 4)  # (3, B, heads, T, d)
        weights = ((qkv[0] @ qkv[1].transpose(-2, -1)) * self.scale).softmax(dim=-1)
        return self.proj((weights @ qkv[2]).transpose(1, 2).reshape(batch, tokens, width)), weights


class PlainPooling(PlainSimPool):
    """The plain SimPool of the layer's benchmark, with beta if the layer has one."""

    def __init__(self, pool: SimPool) -> None:
        super().__init__(pool)
        self.beta = getattr(pool, "beta", None)

    def forward(self, x: Tensor) -> Tensor:
        pooled = super().forward(x)
        return pooled if self.beta is None else pooled + self.beta


def make_plain(model: nn.Module, pooling: bool = True) -> nn.Module:
    """A copy of a MultiCropWrapper that computes directly from the formulas, with the same parameter names."""
    model = copy.deepcopy(model).to(memory_format=torch.contiguous_format)
    backbone = model.backbone
    if pooling and isinstance(getattr(backbone, "simpool", None), SimPool):
        backbone.simpool = PlainPooling(backbone.simpool)
    if isinstance(backbone, VisionTransformer):
        for block in backbone.blocks:
            block.attn = PlainAttention(block.attn)
    return model


def plain_loss(student: Tensor, teacher: Tensor, center: Tensor, temp: float, views: int) -> tuple[Tensor, Tensor]:
    """Loss and the teacher's entropy, one log-softmax per pair of views; (V·B, K), (2·B, K) -> 0-d tensors."""
    targets = F.softmax((teacher - center) / temp, dim=-1).chunk(2)
    losses, entropies = [], []
    for i, q in enumerate(targets):
        for v, logits in enumerate(student.chunk(views)):
            if v == i:
                continue
            losses.append(torch.sum(-q * F.log_softmax(logits / STUDENT_TEMP, dim=-1), dim=-1).mean())
            entropies.append(torch.sum(-q * torch.log(q.clamp_min(1e-38)), dim=-1).mean())
    return sum(losses) / len(losses), sum(entropies) / len(entropies)


@torch.no_grad()
def plain_clip(parameters: Iterable[nn.Parameter], clip: float) -> list[float]:
    """Clip each parameter's gradient by its own norm; returns the norms before clipping."""
    norms = []
    for parameter in parameters:
        if parameter.grad is None:
            continue
        norm = parameter.grad.norm(2)
        norms.append(norm.item())
        factor = clip / (norm + 1e-6)
        if clip and factor < 1:
            parameter.grad.mul_(factor)
    return norms


@torch.no_grad()
def plain_average(student: nn.Module, teacher: nn.Module, momentum: float) -> None:
    """teacher <- m · teacher + (1 - m) · student, parameter by parameter."""
    for source, target in zip(student.parameters(), teacher.parameters(), strict=True):
        target.mul_(momentum).add_((1 - momentum) * source.detach())


class PlainLARS(torch.optim.Optimizer):
    """LARS, parameter by parameter."""

    def __init__(self, groups: list[dict]) -> None:
        super().__init__(groups, {"lr": 0.0, "weight_decay": 0.0, "momentum": 0.9, "eta": 0.001})

    @torch.no_grad()
    def step(self) -> None:
        for group in self.param_groups:
            for p in group["params"]:
                if p.grad is None:
                    continue
                update = p.grad
                if p.ndim != 1:
                    update = update + group["weight_decay"] * p
                    size, change = p.norm(), update.norm()
                    one = torch.ones_like(size)
                    ratio = torch.where(size > 0, torch.where(change > 0, group["eta"] * size / change, one), one)
                    update = update * ratio
                state = self.state[p]
                if "mu" not in state:
                    state["mu"] = torch.zeros_like(p)
                state["mu"].mul_(group["momentum"]).add_(update)
                p.add_(state["mu"], alpha=-group["lr"])


def plain_optimizer(name: str, groups: list[dict]) -> torch.optim.Optimizer:
    """The optimizer of that name, one parameter after the other."""
    if name == "lars":
        return PlainLARS(groups)
    kind = {"adamw": torch.optim.AdamW, "sgd": torch.optim.SGD}[name]
    return kind(groups, lr=0.0, foreach=False, fused=False, **({"momentum": 0.9} if name == "sgd" else {}))


class PlainStep:
    """Steps on float crops, from copies of a student and a teacher.

    parts: those of PARTS that are taken from the training step.
    precision: of float32 matrix products; it is a process-wide setting, so every call sets it.
    """

    def __init__(self, run, parts: tuple[str, ...] = (), precision: str = "highest") -> None:
        """run: a training.run.Run, read only."""
        self.run, self.parts, self.precision = run, parts, precision
        self.student, self.teacher = (make_plain(m, "pooling" not in parts) for m in (run.student, run.teacher))
        groups = get_params_groups(self.student)
        build = build_optimizer if "updates" in parts else plain_optimizer
        self.optimizer = build(run.args.optimizer, groups)
        self.average = ParameterAverage(self.student, self.teacher)
        self.loss = copy.deepcopy(run.loss)

    def __call__(self, crops: list[Tensor], step: int) -> float:
        """One step on [(2B, C, S, S), (nB, C, s, s)]; returns the loss."""
        torch.set_float32_matmul_precision(self.precision)
        run, epoch = self.run, step // self.run.plan.steps_per_epoch
        for i, group in enumerate(self.optimizer.param_groups):
            group["lr"] = float(run.schedules["lr"][step])
            if i == 0:
                group["weight_decay"] = float(run.schedules["wd"][step])
        with torch.no_grad():
            teacher_output = self.teacher(crops[:1])
        student_output = self.student(crops)
        if "loss" in self.parts:
            loss, _, _, total = self.loss.step_terms(student_output, teacher_output, epoch)
            batch_center = total.view(1, -1) / len(teacher_output)
        else:
            temp, views = self.loss.teacher_temp(epoch), self.loss.ncrops
            loss, _ = plain_loss(student_output, teacher_output, self.loss.center, temp, views)
            batch_center = teacher_output.sum(dim=0, keepdim=True) / len(teacher_output)
        self.loss.center = self.loss.center * CENTER_MOMENTUM + batch_center * (1 - CENTER_MOMENTUM)
        self.optimizer.zero_grad()
        loss.backward()
        self.update(epoch, float(run.schedules["teacher_momentum"][step]))
        return loss.item()

    def update(self, epoch: int, momentum: float) -> None:
        """Clip, drop the prototypes' gradients while they are frozen, step, average."""
        clip = self.run.args.clip_grad
        if "updates" in self.parts:
            clip_each_([p.grad for p in self.student.parameters() if p.grad is not None], clip)
        else:
            plain_clip(self.student.parameters(), clip)
        cancel_gradients_last_layer(epoch, self.student, self.run.args.freeze_last_layer)
        self.optimizer.step()
        if "updates" in self.parts:
            self.average.update(momentum)
        else:
            plain_average(self.student, self.teacher, momentum)
