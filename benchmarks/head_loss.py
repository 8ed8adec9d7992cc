"""The head's last layer and DINO's loss, forward and backward: plain, as in training, and fused.

    python -m benchmarks.head_loss [--batch_size 64] [--crops 8 10] [--out_dim 65536] [--rounds 5]

plain: normalised weight, logits, one log-softmax per pair of views. DINOLoss: one per view. in place: the gradient
overwrites the logits. fused: chunk by chunk from the head's bottleneck, computing the logits twice; fused, logits kept:
computing them once. Prints the peak memory beyond the inputs (including the gradients, which all sides hold), median
milliseconds of the sides run in turn, both also as ratios to plain, and the largest relative error.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable

import torch
from torch import Tensor
from torch.nn import functional as F

from benchmarks.measure import peak_bytes, relative_error, timed_in_turn
from distill.fused_loss import fused_dino_loss, in_place_dino_loss
from distill.heads import WeightNormLinear
from distill.losses import DINOLoss
from runtime.cli import parse_described
from runtime.distributed import choose_device
from runtime.guards import run_program
from runtime.terminal import say

TEACHER_TEMP, STUDENT_TEMP = 0.04, 0.1


def plain_loss(student: Tensor, teacher: Tensor, center: Tensor, crops: int) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Loss, entropy and KL by their definitions, with one log-softmax per pair of views; and the center's sum."""
    targets = ((teacher - center) / TEACHER_TEMP).softmax(dim=-1).chunk(2)
    losses, entropies = [], []
    for i, q in enumerate(targets):
        for v, logits in enumerate(student.chunk(crops)):
            if v != i:
                log_p = F.log_softmax(logits / STUDENT_TEMP, dim=-1)
                losses.append(torch.sum(-q * log_p, dim=-1).mean())
                entropies.append(torch.special.entr(q).sum(dim=-1).mean())
    loss, entropy = sum(losses) / len(losses), sum(entropies) / len(entropies)
    return loss, entropy, loss.detach() - entropy, teacher.sum(dim=0, keepdim=True)


def sides(batch: int, crops: int, out_dim: int, width: int, device: torch.device) -> dict[str, Callable]:
    """Each side as a function that returns [loss, entropy, gradients of the bottleneck and of weight_v]."""
    torch.manual_seed(0)
    layer = WeightNormLinear(width, out_dim).to(device)
    student = F.normalize(torch.randn(crops * batch, width, device=device), dim=-1).requires_grad_()
    teacher = 0.3 * torch.randn(2 * batch, out_dim, device=device)
    loss = DINOLoss(out_dim, crops, TEACHER_TEMP, TEACHER_TEMP, 0, 1).to(device)
    center = loss.center
    fixed = (teacher, center, TEACHER_TEMP, STUDENT_TEMP, crops)
    forms = {
        "plain": lambda: plain_loss(layer(student), teacher, center, crops),
        "DINOLoss": lambda: loss.terms(layer(student), teacher, 0),
        "in place": lambda: in_place_dino_loss(layer(student), *fixed),
        "fused, logits kept": lambda: fused_dino_loss(student, layer, *fixed, keep_logits=True),
        "fused": lambda: fused_dino_loss(student, layer, *fixed),
    }

    def step(form: Callable) -> list[Tensor]:
        loss, entropy, *_ = form()
        return [loss.detach(), entropy, *torch.autograd.grad(loss, [student, layer.weight_v])]

    return {name: (lambda f=form: step(f)) for name, form in forms.items()}


def compare(
    batch: int, crops: int, out_dim: int, width: int, rounds: int, device: torch.device
) -> dict[str, dict[str, float]]:
    """For each side: peak megabytes, median milliseconds, and the worst relative error against plain."""
    steps = sides(batch, crops, out_dim, width, device)
    expected = steps["plain"]()
    errors = {
        name: max(relative_error(a, b) for a, b in zip(run(), expected, strict=True)) for name, run in steps.items()
    }
    del expected
    memory = {name: peak_bytes(run, device) / 1e6 for name, run in steps.items()}
    seconds = timed_in_turn(steps, rounds)
    return {name: {"MB": memory[name], "ms": 1e3 * seconds[name], "error": errors[name]} for name in steps}


def get_args_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser("benchmarks.head_loss", add_help=False)
    parser.add_argument("--batch_size", type=int, default=64, help="images")
    parser.add_argument(
        "--crops", type=int, nargs="+", default=[8, 10], help="views per image, the global ones included"
    )
    parser.add_argument("--out_dim", type=int, default=65536, help="prototypes")
    parser.add_argument("--bottleneck_dim", type=int, default=256, help="width of the prototypes' input")
    parser.add_argument("--rounds", type=int, default=5, help="rounds, each running all sides in turn")
    parser.add_argument("--device", default="auto", help="auto, cuda, mps or cpu")
    parser.add_argument("--matmul_precision", default="highest", choices=["highest", "high", "medium"])
    return parser


def main(argv: list[str] | None = None) -> int:
    args = parse_described(get_args_parser(), __doc__, argv)
    torch.set_float32_matmul_precision(args.matmul_precision)
    device = choose_device(args.device)
    say("| crops | form | peak MB | of plain | ms | speed | error |\n|---|---|---|---|---|---|---|")
    for crops in args.crops:
        rows = compare(args.batch_size, crops, args.out_dim, args.bottleneck_dim, args.rounds, device)
        plain = rows["plain"]
        for name, row in rows.items():
            say(
                f"| {crops} | {name} | {row['MB']:.0f} | {row['MB'] / plain['MB']:.2f}x | {row['ms']:.0f} "
                f"| {plain['ms'] / row['ms']:.2f}x | {row['error']:.0e} |"
            )
    return 0


if __name__ == "__main__":
    run_program(main)
