"""The cross entropy of chosen rows, weighted, with its gradient computed in forward: iBOT's patch loss.

Masked patches of a step are M rows of K prototypes. Written plainly, their loss keeps the student's log-softmax, the
teacher's probabilities and the product of both, each as large as the logits. Here a few rows at a time are computed,
and their logits are overwritten with the gradient.

The loss is -sum_m w_m q_m · log p_m, with q = softmax((t - center) / T) and p = softmax(s / T_s). Its gradient with
respect to s is w_m (p_m - q_m) / T_s.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

# Elements of the logits processed at a time: on a CPU so few that they stay in the second-level cache; on other devices
# many, because there each operation costs a launch.
ROWS_ELEMENTS = {"cpu": 1 << 16}
ROWS_ELEMENTS_DEFAULT = 1 << 24
# Gradients p - q, at most 1, are multiplied by this when stored in float16, which would flush small ones to zero.
HALF_UNIT = 2.0**15


def weighted_cross_entropy(
    student: Tensor, teacher: Tensor, center: Tensor, weights: Tensor, teacher_temp: float, student_temp: float
) -> Tensor:
    """The module docstring's loss, a 0-d float32 tensor in nats, differentiable with respect to the student's logits.

    If a gradient is needed, it overwrites `student`, which must not be read afterwards.

    Args:
        student, teacher: logits (M, K); M may be 0.
        center: K values.
        weights: (M,); rows of weight 0 don't count.
        teacher_temp, student_temp: temperatures of the two softmaxes.

    Raises:
        ValueError: for tensors that do not belong together.
    """
    if student.ndim != 2 or student.shape != teacher.shape or weights.shape != student.shape[:1]:
        raise ValueError(
            f"student logits of shape {tuple(student.shape)}, teacher logits of {tuple(teacher.shape)} and weights of "
            f"{tuple(weights.shape)} do not belong together; give (M, K), (M, K) and (M,)"
        )
    temps, needed = (teacher_temp, student_temp), torch.is_grad_enabled() and student.requires_grad
    return _WeightedRows.apply(student, teacher.detach(), center.reshape(1, -1), weights, temps, needed)


class _WeightedRows(torch.autograd.Function):
    """Stores the gradient, or in float16 p - q, in place of the student's logits; backward multiplies it."""

    @staticmethod
    def forward(ctx, student, teacher, center, weights, temps, needed):
        teacher_temp, student_temp = temps
        dtype = torch.promote_types(student.dtype, torch.float32)
        slopes = (weights.to(dtype) / student_temp)[:, None]  # (M, 1)
        half = student.dtype == torch.float16
        student, loss = student.detach(), center.new_zeros((), dtype=dtype)
        rows = max(1, ROWS_ELEMENTS.get(student.device.type, ROWS_ELEMENTS_DEFAULT) // student.shape[1])
        for first in range(0, len(student), rows):
            part = slice(first, first + rows)
            q = torch.softmax((teacher[part].to(dtype) - center).div_(teacher_temp), dim=-1)
            log_p = torch.log_softmax(student[part].to(dtype) / student_temp, dim=-1)
            loss -= ((q * log_p).sum(-1) * weights[part]).sum()
            if needed:
                student[part] = log_p.exp_().sub_(q).mul_(HALF_UNIT if half else slopes[part])
        ctx.grad = student if needed else None
        ctx.factors = slopes / HALF_UNIT if half else None
        return loss

    @staticmethod
    @once_differentiable
    def backward(ctx, grad_loss):
        if ctx.grad is None:
            raise RuntimeError(
                "this loss hands its gradient over in backward; compute it again instead of retaining it"
            )
        grad, ctx.grad = ctx.grad, None
        if ctx.factors is not None:  # float16: multiplied in float32, loss scale included, then rounded
            rows = max(1, ROWS_ELEMENTS_DEFAULT // grad.shape[1])
            for part, factors in zip(grad.split(rows), ctx.factors.split(rows), strict=True):
                part.copy_(part.float().mul_(factors * grad_loss))
        elif grad.device.type != "cpu" or grad_loss.item() != 1.0:
            grad.mul_(grad_loss.to(grad.dtype))
        return grad, None, None, None, None, None
