"""DINO written out plainly, as the other side of a comparison: one process, float32, one operation after the other.

    python -m experiments.published.plain --data_path cifar10/ --output_dir runs/plain --epochs 20 ...

It takes main_dino.py's flags. The initial weights and the schedules are main_dino.py's; the step is
benchmarks/plain_step.py, the augmentation that of Pillow and torchvision, one crop after the other
(benchmarks/augmentation.py), and torch shuffles the images. It writes checkpoint.pth after each epoch, continues from
it, and leaves a DONE, as the programs do.
"""

from __future__ import annotations

import argparse
from collections.abc import Iterator
from pathlib import Path

import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

import main_dino
from benchmarks.augmentation import PublishedAugmentation
from benchmarks.plain_step import PlainStep
from data.datasets import open_images
from data.source import ImageSource
from runtime.checkpoint import check_writable, read_checkpoint, save_checkpoint, write_json_atomic
from runtime.distributed import choose_device
from runtime.guards import EXIT_DONE, InputError, run_program
from runtime.json_log import JsonLog, cut_json_lines
from runtime.meters import MetricLogger
from runtime.reproduce import fix_random_seeds
from runtime.terminal import say
from training import arguments
from training.multicrop import crop_spec
from training.state import model_config


class AugmentedFiles(Dataset):
    """Image -> its crops, as the published loader makes them."""

    def __init__(self, source: ImageSource, augment: PublishedAugmentation) -> None:
        self.source, self.augment = source, augment

    def __len__(self) -> int:
        return len(self.source)

    def __getitem__(self, i: int) -> list[Tensor]:
        from PIL import Image

        return self.augment(Image.fromarray(self.source.load(i)))


def by_resolution(crops: list[Tensor]) -> list[Tensor]:
    """Crops of each view, (B, C, s, s), as one tensor for the global ones, and one for the local ones if any."""
    parts = (crops[:2], crops[2:])
    return [torch.cat(part) for part in parts if part]


def epochs(args: argparse.Namespace, source: ImageSource, begun: int) -> Iterator[tuple[int, DataLoader]]:
    """The epochs still to train, each with its batches; order and augmentation follow from the seed and the epoch."""
    files = AugmentedFiles(source, PublishedAugmentation(crop_spec(args)))
    for epoch in range(begun, args.epochs):
        fix_random_seeds(args.seed * 100_003 + epoch)
        yield (
            epoch,
            DataLoader(files, args.batch_size_per_gpu, shuffle=True, drop_last=True, num_workers=args.num_workers),
        )


def main(argv: list[str] | None = None) -> int:
    """Train as main_dino.py's flags say; returns the exit code. Raises InputError for what the plain step cannot do."""
    args = main_dino.parse_arguments(argv)
    check(args)
    device, folder = choose_device(args.device), Path(args.output_dir)
    check_writable(folder, "--output_dir")
    source = open_images(args.data_path, "train", args.subset, args.in_chans, val_fraction=args.val_fraction)
    run = main_dino.build(args, len(source), device)
    side, newest, log = PlainStep(run), folder / "checkpoint.pth", JsonLog(folder / "log.txt")
    begun = restore(side, newest) if newest.exists() else 0
    cut_json_lines(folder / "log.txt", begun)
    write_json_atomic(folder / "config.json", arguments.saved(args, main_dino.METHOD))
    for epoch, batches in epochs(args, source, begun):
        losses = []
        for i, crops in enumerate(MetricLogger(delimiter="  ").log_every(batches, 50, f"epoch {epoch}")):
            batch = [crop.to(device) for crop in by_resolution(crops)]
            losses.append(side(batch, epoch * run.plan.steps_per_epoch + i))
        mean = sum(losses) / len(losses)
        log.append({"epoch": epoch, "train_loss": mean})
        save_checkpoint(
            {
                "student": side.student.state_dict(),
                "teacher": side.teacher.state_dict(),
                "optimizer": side.optimizer.state_dict(),
                "dino_loss": {"center": side.loss.center},
                "epoch": epoch + 1,
                "config": model_config(run, main_dino.METHOD, source),
            },
            newest,
        )
        say(f"epoch {epoch}: loss {mean:.4f}, saved {newest}")
    (folder / "DONE").touch()
    return EXIT_DONE


def check(args: argparse.Namespace) -> None:
    """Raise InputError for flags that the plain step does not have."""
    plain = {"grad_accum": (None, 1), "global_crops_number": (2,), "amp": ("auto", "none"), "fsdp": (False,)}
    for name, allowed in plain.items():
        if getattr(args, name) not in allowed:
            raise InputError(f"--{name} {getattr(args, name)}: the plain side has none of this; leave it out")


def restore(side: PlainStep, path: Path) -> int:
    """Continue from a checkpoint; returns the number of epochs that it has."""
    state = read_checkpoint(path)
    side.student.load_state_dict(state["student"])
    side.teacher.load_state_dict(state["teacher"])
    side.optimizer.load_state_dict(state["optimizer"])
    side.loss.center = state["dino_loss"]["center"]
    return state["epoch"]


if __name__ == "__main__":
    run_program(main)
