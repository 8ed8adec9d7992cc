"""The loop: where it stands, and where it goes on."""

from __future__ import annotations

import argparse
import dataclasses
from pathlib import Path

import torch

import main_dino
from data.datasets import open_images
from data.sampler import TrainSampler
from runtime.preempt import StopRequest
from tests.pretraining import VIT
from training.loop import Loop, Outputs

BATCH, PER_EPOCH = 8, 12  # of the 96 images


class Recorder:
    """A step that trains nothing, and keeps which images it was given."""

    def __init__(self) -> None:
        self.images: list[list[int]] = []

    def __call__(self, run, batches, step, wishes) -> torch.Tensor:
        self.images += [batch.index.tolist() for batch in batches]
        return torch.tensor([float(step), 0.0, 0.0, 1.0, 0.0, 0.0, 0.0])


def make_loop(small: Path, folder: Path) -> tuple[Loop, Recorder]:
    """A loop over 96 images at the start of a run that trains nothing."""
    flags = [*VIT, "--data_path", str(small), "--output_dir", str(folder), "--batch_size_per_gpu", str(BATCH)]
    args, train = main_dino.parse_arguments([*flags, "--device", "cpu", "--epochs", "3"]), open_images(small, "train")
    record = Recorder()
    method = dataclasses.replace(main_dino.METHOD, step=record, watch=lambda *_: None)
    loop = Loop(main_dino.build(args, len(train), torch.device("cpu")), method, train, None, StopRequest())
    loop.out = Outputs(None, None, argparse.Namespace(scalars=lambda values, step: None))
    return loop, record


def test_a_loop_continues_where_its_state_stood(small, tmp_path):
    """Epoch, step, the epoch's means so far and the refused steps in a row come back from a state within an epoch."""
    stopped, _ = make_loop(small, tmp_path)
    stopped.epoch, stopped.step, stopped.refused.in_a_row = 1, PER_EPOCH + 4, 2
    for value in (3.0, 5.0, 10.0):
        stopped.meters.update(loss=value, grad_norm=2 * value)
    state = stopped.state()
    continued, _ = make_loop(small, tmp_path)
    continued.load(state, tmp_path / "checkpoint.pth")
    assert (continued.epoch, continued.step, continued.refused.in_a_row) == (1, PER_EPOCH + 4, 2)
    assert continued.meters.averages() == {"loss": 6.0, "grad_norm": 12.0}
    continued.meters.update(loss=2.0)
    assert continued.meters.averages()["loss"] == 5.0


def test_an_epoch_goes_on_with_its_own_images(small, tmp_path):
    """From its fifth step on, the second epoch has the images that it would have had, each once, and no others."""
    loop, record = make_loop(small, tmp_path)
    loop.epoch, loop.step = 1, PER_EPOCH + 4
    assert loop.train_epoch()
    assert loop.step == 2 * PER_EPOCH
    sampler = TrainSampler(96, BATCH, seed=loop.run.args.seed)
    sampler.set_position(1)
    whole = [[index for _, index in batch] for batch in sampler]
    assert record.images == whole[4:]
    assert loop.meters.averages()["loss"] == sum(range(PER_EPOCH + 4, 2 * PER_EPOCH)) / 8
