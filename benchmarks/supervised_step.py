"""The whole training step of main_supervised.py compared with the same step written with timm's own model and loop.

    python -m benchmarks.supervised_step [--amp bf16] [--batch_size 8] [--rounds 5]

timm's side is what its train.py does in a step: its ViT-S, Mixup, SoftTargetCrossEntropy, AdamW from its factory,
ModelEmaV3. Ours is main_supervised.train_step of an official ViT-S with the same recipe, with everything that it does
besides: gradient norms, the check that all numbers are finite, the exchange of means. Both start from the same weights,
take the same images and mix them alike; the first steps, which are not timed, must give the same losses. It prints the
medians of both sides run in turn and their ratio.

Dropout and drop path are off, so that the sides can be compared.
"""

from __future__ import annotations

import argparse
from typing import NamedTuple

import torch
from torch import Tensor

import main_supervised
from benchmarks.measure import timed_in_turn
from benchmarks.train_step import CHECKED_STEPS, Coloured, exit_code
from data.datasets import open_images
from data.labelled_set import LabelledBatch
from runtime.cli import parse_described
from runtime.distributed import choose_device
from runtime.guards import run_program
from runtime.terminal import say
from training.run import Run

# Of the losses, relative. AdamW's first steps divide gradients by their own size: rounding counts in those near 0.
TOLERANCE = {"none": 1e-4, "bf16": 2e-2, "fp16": 1e-2}


class Result(NamedTuple):
    """seconds: of each side; error: largest relative difference of the first losses; tolerance: what is allowed."""

    seconds: dict[str, float]
    error: float
    tolerance: float


def build(flags: list[str], device: torch.device) -> tuple[Run, LabelledBatch]:
    """A run as main_supervised.py makes it from `flags`, and a batch of real images on the device."""
    fixed = ["--drop_rate", "0", "--drop_path_rate", "0", "--warmup_epochs", "0"]
    args = main_supervised.parse_arguments([*flags, *fixed])
    source = open_images(args.data_path, "train")
    main_supervised.METHOD.fit(args, source)
    run = main_supervised.build(args, len(source), device)
    images = run.views.dataset(source, args.seed)
    return run, images.__getitems__([(0, i) for i in range(run.plan.batch_size)]).to(device)


class TimmStep:
    """Steps with timm's parts, from copies of a run's weights."""

    def __init__(self, run: Run) -> None:
        import timm
        from timm.data import Mixup
        from timm.loss import SoftTargetCrossEntropy
        from timm.optim import create_optimizer_v2
        from timm.utils import ModelEmaV3

        args = self.args = run.args
        self.run = run
        self.model = timm.create_model("vit_small_patch16_224", num_classes=args.num_classes, img_size=args.img_size)
        state = run.bare_student.state_dict()
        self.model.load_state_dict({name.removeprefix("backbone."): value.clone() for name, value in state.items()})
        self.model.to(run.hardware.device).train()
        self.optimizer = create_optimizer_v2(self.model, opt="adamw", lr=args.lr, weight_decay=args.weight_decay)
        self.average = ModelEmaV3(self.model, decay=args.model_ema_decay)
        self.loss = SoftTargetCrossEntropy()
        self.mixup = Mixup(args.mixup, args.cutmix, label_smoothing=args.smoothing, num_classes=args.num_classes)

    def __call__(self, images: Tensor, labels: Tensor, step: int) -> float:
        """One step on (B, 3, S, S) float images; returns the loss."""
        for group in self.optimizer.param_groups:
            group["lr"] = float(self.run.schedules["lr"][step])
        images, targets = self.mixup(images, labels)
        with self.run.hardware.autocast():
            loss = self.loss(self.model(images), targets)
        self.optimizer.zero_grad()
        loss.backward()
        self.optimizer.step()
        self.average.update(self.model, step=step)
        return loss.item()


class OwnStep:
    """main_supervised.train_step on images that are normalised already."""

    def __init__(self, run: Run, batch: LabelledBatch) -> None:
        self.run, self.batch = run, batch

    def __call__(self, images: Tensor, step: int) -> float:
        """One step on (B, 3, S, S) float images; returns the loss."""
        self.run.views = Coloured([images])
        return main_supervised.train_step(self.run, [self.batch], step)[0].item()


def compare(flags: list[str], device: torch.device, rounds: int) -> Result:
    """Times of both sides, and how far their first losses differ."""
    run, batch = build(flags, device)
    (images,) = run.views.on_device(batch)
    own, timm = OwnStep(run, batch), TimmStep(run)
    error = 0.0
    for step in range(CHECKED_STEPS):
        loss = own(images.clone(), step)  # mixing works in place
        run.begin(step)  # the same draws for timm's mixing
        error = max(error, abs(timm(images.clone(), batch.labels, step) / loss - 1))
    seconds = timed_in_turn(
        {
            "timm": lambda: timm(images.clone(), batch.labels, CHECKED_STEPS),
            "ours": lambda: own(images.clone(), CHECKED_STEPS),
        },
        rounds,
    )
    return Result(seconds, error, TOLERANCE[run.hardware.amp])


def get_args_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser("benchmarks.supervised_step", add_help=False)
    parser.add_argument("--amp", default="none", choices=["none", "bf16", "fp16"], help="autocast of both sides")
    parser.add_argument("--batch_size", type=int, default=8, help="images; an even number")
    parser.add_argument("--img_size", type=int, default=224, help="side of the images, in pixels")
    parser.add_argument("--rounds", type=int, default=5, help="rounds, each running both sides in turn")
    parser.add_argument("--data_path", default="demo", help="images, as main_supervised.py's")
    parser.add_argument("--device", default="auto", help="auto, cuda, mps or cpu")
    return parser


def main(argv: list[str] | None = None) -> int:
    args = parse_described(get_args_parser(), __doc__, argv)
    flags = ["--arch", "vit_small", "--mode", "official", "--recipe", "vit", "--matmul_precision", "highest"]
    for key in ("amp", "img_size", "data_path"):
        flags += [f"--{key}", str(getattr(args, key))]
    flags += ["--batch_size_per_gpu", str(args.batch_size)]
    result = compare(flags, choose_device(args.device), args.rounds)
    size = f"{args.batch_size} x {args.img_size}"
    say("| model | autocast | step | ms | timm's time / this |\n|---|---|---|---|---|")
    for name, seconds in result.seconds.items():
        ratio = result.seconds["timm"] / seconds
        say(f"| vit_small, {size} | {args.amp} | {name} | {1e3 * seconds:.0f} | {ratio:.2f}x |")
    say(f"first losses differ by {result.error:.1e}")
    return exit_code(result.error, result.tolerance)


if __name__ == "__main__":
    run_program(main)
