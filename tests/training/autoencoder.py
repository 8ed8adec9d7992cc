"""A method that a stranger might add: a linear autoencoder of small images, in one file, on the house's contract."""

from __future__ import annotations

import argparse
import sys

import torch
from torch import Tensor, nn

from data.views import MultiCropViews
from runtime.checks import at_least_one
from runtime.cli import add_flag
from runtime.guards import run_program
from runtime.reproduce import fix_random_seeds
from training import arguments, flags, launch, multicrop
from training.method import Method
from training.plan import make_plan
from training.run import Means, Run, Wishes, choose_hardware, common_schedules


class Autoencoder(nn.Module):
    """(B, C, S, S) -> its reconstruction, through `width` numbers."""

    def __init__(self, pixels: int, width: int) -> None:
        super().__init__()
        self.backbone, self.head = nn.Linear(pixels, width), nn.Linear(width, pixels)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.backbone(x.flatten(1))).view_as(x)


def train_step(run: Run, batches: list, step: int, wishes: Wishes) -> Tensor:
    run.begin(step)
    means = Means()
    for batch in run.micro_batches(batches):
        with run.exchange_gradients(batch.last):
            with run.hardware.autocast():
                output = run.student(batch.crops[0])
            loss = run.loss(output.float(), batch.crops[0])
            run.backward(loss, len(batches))
        means.add(loss=loss)
    means.over_ranks(wishes)
    run.unscale()
    norm, refused = run.update(means)
    return means.report(norm, refused)


def build(args: argparse.Namespace, images: int, device: torch.device) -> Run:
    plan, choice = make_plan(args, images), choose_hardware(args, device, convolutional=False)
    fix_random_seeds(args.seed)
    student = Autoencoder(args.in_chans * args.img_size**2, args.width)
    views = MultiCropViews(multicrop.crop_spec(args))
    return Run(args, choice, student, None, nn.MSELoss(), common_schedules(args, plan), views, plan)


def get_args_parser() -> argparse.ArgumentParser:
    parser = flags.new_parser("autoencoder", _add_flags, multicrop.add_flags)
    parser.set_defaults(
        optimizer="adamw", lr=0.1, min_lr=0.0, warmup_epochs=0, weight_decay=0.0, weight_decay_end=0.0, clip_grad=0.0,
        batch_size_per_gpu=16, drop_path_rate=0.0, local_crops_number=0, global_crops_scale=(0.5, 1.0),
        local_crops_scale=(0.1, 0.5), img_size=16, eval_every=0,
    )  # fmt: skip
    return parser


def _add_flags(group: argparse._ArgumentGroup) -> None:
    add_flag(group, "--width", type=int, default=8, help="numbers that an image is squeezed into")


def _check(args: argparse.Namespace) -> None:
    at_least_one(args, "width")
    multicrop.complete(args)


METHOD = Method("autoencoder", ("loss",), get_args_parser, build, train_step, check=_check)


def main(argv: list[str] | None = None) -> int:
    return launch.train(arguments.parse("autoencoder.py", METHOD, __doc__, argv), METHOD)


if __name__ == "__main__":
    run_program(main, sys.argv[1:])
