"""DINO's loss and its gradient computed together, chunk by chunk, so that the step's largest tensors never exist.

Two alternatives to DINOLoss, both pure functions of their inputs with the same mathematics (losses.py):

- `fused_dino_loss` takes the inputs of the prototypes and goes over the K prototypes in chunks, twice: once for the
  log-sum-exp of every row, and once for loss and gradients, recomputing each chunk's logits. It stores neither the
  (V·B, K) logits nor the normalised weight; besides the weight's gradient it needs only a few chunks.
- `in_place_dino_loss` takes logits, processes a few images at a time, and overwrites their logits with the gradient.

Both read the teacher's output once for its normaliser and sum, and once for its probabilities. Everything is computed
in float32 except the matrix products, which follow autocast.

Let S = s / T_s be the student's scaled logits and q the teacher's probabilities. A student view v is compared with the
target Q_v: the other global view's q for v = 0, 1, and the mean of both for local views, which count twice. With the
weights w_v = (1, 1, 2, 2 ...) and c = 1 / (2 (V - 1) B), the loss is -c sum_v w_v sum_rows Q_v · log p_v, and its
gradient with respect to S is c w_v (p_v - Q_v).

Shape letters: B images, V views (2 global first), K prototypes, R = V·B rows, E width of the bottleneck,
k prototypes of one chunk.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from distill.heads import WeightNormLinear

# Elements of a chunk of logits and its weights, small enough on CPU to stay in the second-level cache.
CHUNK_ELEMENTS = {"cpu": 1 << 20}
CHUNK_ELEMENTS_DEFAULT = 1 << 26
# Elements of the logits that are processed at a time if the gradient is written in place: one image on CPU, whose rows
# stay in the cache; many on other devices, where a few kernels over many images cost less than many launches.
IMAGES_ELEMENTS = {"cpu": 1}
IMAGES_ELEMENTS_DEFAULT = 1 << 24
# Gradients p - Q, at most 2 with their weight, are multiplied by this when stored in float16. Otherwise probabilities
# of 1e-5 would lose most of their digits, and with the loss's own factors would be flushed to zero.
HALF_UNIT = 2.0**14

Terms = tuple[Tensor, Tensor, Tensor, Tensor]


class _Settings(NamedTuple):
    teacher_temp: float
    student_temp: float
    views: int
    chunk: int
    keep_logits: bool
    matmul_dtype: torch.dtype | None  # None: the inputs' own
    wants_grad: bool


def fused_dino_loss(
    student_bottleneck: Tensor,
    last_layer: WeightNormLinear,
    teacher: Tensor,
    center: Tensor,
    teacher_temp: float,
    student_temp: float,
    ncrops: int,
    teacher_last_layer: WeightNormLinear | None = None,
    chunk: int | None = None,
    keep_logits: bool = False,
) -> Terms:
    """DINO's loss from the inputs of the head's last layer.

    Args:
        student_bottleneck: (V·B, E), crop by crop, the two global crops first.
        last_layer: the student's prototypes; weight_v and weight_g get gradients if they require them.
        teacher: logits (2·B, K), or the teacher's bottleneck (2·B, E) together with teacher_last_layer.
        center: (1, K).
        teacher_temp, student_temp: temperatures of the two softmaxes.
        ncrops: V.
        chunk: prototypes at a time; None chooses by device and number of rows.
        keep_logits: store the (V·B, K) logits between the two passes instead of computing them twice: three matrix
            products instead of four, at the cost of that memory.

    Returns:
        loss (differentiable), entropy of the teacher, kl = loss - entropy, all 0-d and in nats; and the sum of the
        teacher's raw logits over its rows, (1, K), from which the center is updated.

    Raises:
        ValueError: if the rows are not ncrops and 2 crops of one batch, or the widths do not match.
    """
    _check_rows(len(student_bottleneck), len(teacher), ncrops)
    prototypes = last_layer.out_features
    if teacher_last_layer is None and teacher.shape[1] != prototypes:
        raise ValueError(
            f"the teacher's logits are {teacher.shape[1]} wide, the student has {prototypes} prototypes; "
            "give teacher_last_layer if `teacher` is the bottleneck"
        )
    device = student_bottleneck.device.type
    rows, width = student_bottleneck.shape
    budget = CHUNK_ELEMENTS.get(device, CHUNK_ELEMENTS_DEFAULT)
    autocast = torch.amp.is_autocast_available(device) and torch.is_autocast_enabled(device)
    settings = _Settings(
        teacher_temp,
        student_temp,
        ncrops,
        min(prototypes, chunk or max(64, budget // (rows + width))),
        keep_logits,
        torch.get_autocast_dtype(device) if autocast else None,
        torch.is_grad_enabled(),
    )
    if teacher_last_layer is None:
        teacher_v = teacher_g = None
    else:
        teacher_v, teacher_g = teacher_last_layer.weight_v.detach(), teacher_last_layer.weight_g.detach()
    with torch.autocast(device, enabled=False):
        return _FusedLoss.apply(
            student_bottleneck, last_layer.weight_v, last_layer.weight_g,
            teacher.detach(), teacher_v, teacher_g, center, settings,
        )  # fmt: skip


def in_place_dino_loss(
    student_logits: Tensor,
    teacher_logits: Tensor,
    center: Tensor,
    teacher_temp: float,
    student_temp: float,
    ncrops: int,
) -> Terms:
    """DINO's loss from logits (V·B, K) and (2·B, K); arguments and results as in fused_dino_loss.

    If a gradient is needed, it overwrites student_logits, which must not be read afterwards.
    """
    _check_rows(len(student_logits), len(teacher_logits), ncrops)
    wants_grad = torch.is_grad_enabled() and student_logits.requires_grad
    settings = _Settings(teacher_temp, student_temp, ncrops, 0, False, None, wants_grad)
    return _InPlaceLoss.apply(student_logits, teacher_logits.detach(), center, settings)


def _check_rows(student: int, teacher: int, ncrops: int) -> None:
    if ncrops < 2:
        raise ValueError(f"ncrops is {ncrops}; DINO compares at least the 2 global crops")
    batch, rest = divmod(student, ncrops)
    if rest or teacher != 2 * batch or batch == 0:
        raise ValueError(
            f"{student} student and {teacher} teacher rows do not belong to {ncrops} and 2 crops of one batch"
        )


class _FusedLoss(torch.autograd.Function):
    """Computes the gradients of its scalar result in forward; backward only scales them."""

    @staticmethod
    def forward(ctx, student, weight_v, weight_g, teacher, teacher_v, teacher_g, center, settings):
        batch = len(student) // settings.views
        dtype = torch.promote_types(student.dtype, torch.float32)
        scaled = student.to(dtype) / settings.student_temp  # its products with the prototypes are S
        weights = _view_weights(settings.views, scaled) / (2 * (settings.views - 1) * batch)  # c w_v, (V,)
        norm = _norm(weight_v)  # (K, 1)
        chunks = [slice(k, k + settings.chunk) for k in range(0, len(weight_v), settings.chunk)]

        def teacher_logits(part: slice) -> Tensor:
            if teacher_v is None:
                return teacher[:, part].to(dtype)
            weight = teacher_v[part] * (teacher_g[part] / _norm(teacher_v[part]))
            return _product(teacher.to(dtype), weight.T, settings)

        def student_weight(part: slice) -> Tensor:
            return weight_v[part] * (weight_g[part] / norm[part])

        kept: dict[int, Tensor] = {}
        student_norm, teacher_norm = _LogSumExp(scaled), _LogSumExp(teacher[:, :1].to(dtype))
        teacher_sum = torch.empty_like(center, dtype=dtype)
        for part in chunks:
            raw = teacher_logits(part)
            teacher_sum[:, part] = raw.sum(0)
            teacher_norm.add(_centered(raw, center[:, part], settings))
            logits = _product(scaled, student_weight(part).T, settings)
            student_norm.add(logits)
            if settings.keep_logits:
                kept[part.start] = logits

        needs_student, needs_v, needs_g = (settings.wants_grad and need for need in ctx.needs_input_grad[:3])
        grad_student = torch.zeros_like(scaled) if needs_student else None
        grad_v = torch.empty_like(weight_v, dtype=dtype) if needs_v else None
        grad_g = torch.empty_like(weight_g, dtype=dtype) if needs_g else None
        weighted = (scaled.unflatten(0, (settings.views, batch)) * weights[:, None, None]).flatten(0, 1)
        student_lse, teacher_lse = student_norm.result(), teacher_norm.result()
        loss, entropy = scaled.new_zeros(()), scaled.new_zeros(())
        for part in chunks:
            log_q = _centered(teacher_logits(part), center[:, part], settings).sub_(teacher_lse)
            q = log_q.exp()
            entropy -= _dot(q, log_q)
            weight = student_weight(part)
            logits = kept.pop(part.start) if settings.keep_logits else _product(scaled, weight.T, settings)
            log_p = logits.sub_(student_lse).unflatten(0, (settings.views, batch))  # (V, B, k)
            targets = _targets(q, settings.views)
            loss -= _cross_entropy(log_p, targets, weights)
            if not (needs_student or needs_v or needs_g):
                continue
            surplus = _surplus(log_p, targets).flatten(0, 1)  # p - Q, (R, k)
            if needs_student:
                _add_product(grad_student, surplus, weight, settings)
            if needs_v or needs_g:
                grad_weight = _product(surplus.T, weighted, settings)  # (k, E)
                grad_v_part, grad_g_part = _through_norm(grad_weight, weight_v[part], weight_g[part], norm[part])
                if needs_v:
                    grad_v[part] = grad_v_part
                if needs_g:
                    grad_g[part] = grad_g_part
        if needs_student:
            grad_student.unflatten(0, (settings.views, batch)).mul_(weights[:, None, None] / settings.student_temp)
        ctx.grads = [grad_student, grad_v, grad_g]
        return _finish(ctx, loss, entropy / len(teacher), teacher_sum)

    @staticmethod
    @once_differentiable
    def backward(ctx, grad_loss, *_):
        return (*_scaled_grads(ctx, grad_loss), None, None, None, None, None)


class _InPlaceLoss(torch.autograd.Function):
    """Computes the gradient of its scalar result in forward, in place of the logits; backward only scales it."""

    @staticmethod
    def forward(ctx, student, teacher, center, settings):
        batch = len(student) // settings.views
        dtype = torch.promote_types(student.dtype, torch.float32)
        weights = _view_weights(settings.views, center.to(dtype)) / (2 * (settings.views - 1) * batch)
        slope = (weights / settings.student_temp)[:, None, None]
        half = student.dtype == torch.float16
        kept = slope / slope[0] * HALF_UNIT if half else slope
        student = student.detach().unflatten(0, (settings.views, batch))
        teacher = teacher.unflatten(0, (2, batch))
        teacher_sum = torch.zeros_like(center, dtype=dtype)
        loss, entropy = weights.new_zeros(()), weights.new_zeros(())
        elements = IMAGES_ELEMENTS.get(student.device.type, IMAGES_ELEMENTS_DEFAULT)
        images = max(1, elements // student[:, 0].numel())  # b of them at a time
        for first in range(0, batch, images):
            part = slice(first, first + images)
            raw = teacher[:, part].flatten(0, 1).to(dtype)  # (2·b, K)
            teacher_sum += raw.sum(0)
            log_q = _log_softmax(_centered(raw, center, settings))
            q = log_q.exp()
            entropy -= _dot(q, log_q)
            log_p = _log_softmax(student[:, part].to(dtype, copy=True).div_(settings.student_temp))  # (V, b, K)
            targets = _targets(q, settings.views)
            loss -= _cross_entropy(log_p, targets, weights)
            if settings.wants_grad:
                student[:, part] = _surplus(log_p, targets).mul_(kept)
        ctx.grads = [student.flatten(0, 1) if settings.wants_grad else None]
        ctx.unit = slope[0].squeeze() / HALF_UNIT if half else None  # the unit of the stored gradients
        return _finish(ctx, loss, entropy / (2 * batch), teacher_sum)

    @staticmethod
    @once_differentiable
    def backward(ctx, grad_loss, *_):
        return (*_scaled_grads(ctx, grad_loss), None, None, None)


class _LogSumExp:
    """log sum exp of each row of a matrix whose columns arrive in chunks."""

    def __init__(self, rows: Tensor) -> None:
        self.highest = rows.new_full((len(rows), 1), -torch.inf)
        self.total = rows.new_zeros((len(rows), 1))

    def add(self, chunk: Tensor) -> None:
        highest = torch.maximum(self.highest, chunk.amax(1, keepdim=True))
        self.total = self.total * (self.highest - highest).exp_() + (chunk - highest).exp_().sum(1, keepdim=True)
        self.highest = highest

    def result(self) -> Tensor:
        return self.highest + self.total.log()


def _finish(ctx, loss: Tensor, entropy: Tensor, teacher_sum: Tensor) -> Terms:
    kl = loss - entropy
    ctx.mark_non_differentiable(entropy, kl, teacher_sum)
    return loss, entropy, kl, teacher_sum


def _scaled_grads(ctx, grad_loss: Tensor) -> list[Tensor | None]:
    """The gradients, scaled in place and handed over, so a second backward is an error."""
    if ctx.grads is None:
        raise RuntimeError("this loss gives its gradients away in backward; compute it again instead of retaining it")
    grads, ctx.grads = ctx.grads, None
    if getattr(ctx, "unit", None) is not None:
        return [None if grad is None else _scaled_half(grad, grad_loss * ctx.unit) for grad in grads]
    if grad_loss.device.type == "cpu" and grad_loss.item() == 1.0:
        return grads
    return [None if grad is None else grad.mul_(grad_loss.to(grad.dtype)) for grad in grads]


def _scaled_half(grad: Tensor, factor: Tensor) -> Tensor:
    """float16 gradients times a float32 factor, in place: multiplied in float32, a few rows at a time, then rounded.

    The factor is the product of the loss scale, which float16 cannot represent (65536 is infinite), and the loss's own
    small factors. With the scale included, rounding the gradient to float16 loses few digits.
    """
    rows = max(1, IMAGES_ELEMENTS_DEFAULT // grad.shape[1])
    for part in grad.split(rows):
        part.copy_(part.float().mul_(factor))
    return grad


def _view_weights(views: int, like: Tensor) -> Tensor:
    """w (V,): how many teacher views a student view is compared with."""
    weights = like.new_full((views,), 2.0)
    weights[:2] = 1.0
    return weights


def _centered(raw: Tensor, center: Tensor, settings: _Settings) -> Tensor:
    return (raw - center).div_(settings.teacher_temp)


def _log_softmax(x: Tensor) -> Tensor:
    """Over the last dimension, in place."""
    x.sub_(x.amax(-1, keepdim=True))
    return x.sub_(x.exp().sum(-1, keepdim=True).log_())


def _targets(q: Tensor, views: int) -> tuple[Tensor, Tensor | None]:
    """From q (2·b, k), the targets of the two global views, swapped (2, b, k), and those of the local ones (b, k)."""
    first, second = q.chunk(2)
    return torch.stack((second, first)), (first + second).mul_(0.5) if views > 2 else None


def _cross_entropy(log_p: Tensor, targets: tuple[Tensor, Tensor | None], weights: Tensor) -> Tensor:
    """sum of w_v Q_v log p_v, with log_p (V, b, k); local views share their target, so they are summed first."""
    swapped, mean = targets
    total = weights[0] * _dot(swapped, log_p[:2])
    return total if mean is None else total + weights[2] * _dot(mean, log_p[2:].sum(0))


def _surplus(log_p: Tensor, targets: tuple[Tensor, Tensor | None]) -> Tensor:
    """p - Q (V, b, k), in place of log_p."""
    swapped, mean = targets
    p = log_p.exp_()
    p[:2] -= swapped
    if mean is not None:
        p[2:] -= mean
    return p


def _dot(a: Tensor, b: Tensor) -> Tensor:
    return (a * b).sum()


def _norm(weight_v: Tensor) -> Tensor:
    """|v| of each row, (k, 1)."""
    return torch.linalg.vector_norm(weight_v, dim=1, keepdim=True)


def _through_norm(grad_weight: Tensor, weight_v: Tensor, weight_g: Tensor, norm: Tensor) -> tuple[Tensor, Tensor]:
    """From the gradient of g v / |v| (k, E) to those of v, whose row lengths have no effect, and of g (k, 1)."""
    unit = weight_v / norm
    grad_g = (grad_weight * unit).sum(1, keepdim=True)
    return grad_weight.addcmul_(unit, grad_g, value=-1).mul_(weight_g / norm), grad_g


def _product(a: Tensor, b: Tensor, settings: _Settings) -> Tensor:
    """a @ b in autocast's precision if autocast is on; the result has the dtype of a."""
    if settings.matmul_dtype is None:
        return a @ b
    return (a.to(settings.matmul_dtype) @ b.to(settings.matmul_dtype)).to(a.dtype)


def _add_product(total: Tensor, a: Tensor, b: Tensor, settings: _Settings) -> None:
    """total += a @ b, in place."""
    if settings.matmul_dtype is None:
        total.addmm_(a, b)
    else:
        total += _product(a, b, settings)
