"""The loop: where it stands and goes on, and what is read, logged and saved around the steps."""

from __future__ import annotations

import argparse
import dataclasses
from pathlib import Path

import pytest
import torch

import main_dino
import training.loop
from data.datasets import open_images
from data.sampler import TrainSampler
from runtime.preempt import StopRequest
from tests.pretraining import VIT, rows, train
from tests.tensorboard_tags import events, scalars, tags
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


class Lagging:
    """Results that arrive one step late, as on a GPU."""

    def __init__(self, device: torch.device) -> None:
        self._queue = []

    def push(self, step, values):
        self._queue.append((step, values.tolist()))

    def read(self, everything=False):
        due = self._queue if everything else self._queue[:-1]
        self._queue = self._queue[len(due) :]
        return due


def flags(small, folder, *more) -> list:
    return [*VIT, "--data_path", small, "--output_dir", folder, "--epochs", 2, "--eval_every", 0, *more]


def test_no_step_is_missing_on_tensorboard(small, tmp_path, monkeypatch):
    """Results that arrive late are written before a save within an epoch too, each once."""
    monkeypatch.setattr(training.loop, "LateReader", Lagging)
    assert train(*flags(small, tmp_path, "--checkpoint_every_steps", 2)) == 0
    for tag in ("train/loss", "optim/lr", "optim/teacher_temp", "optim/teacher_momentum", "optim/wd"):
        assert list(scalars(tmp_path, tag)) == list(range(12)), tag


def test_late_results_change_no_row(small, tmp_path, monkeypatch):
    """log.txt is the same whether results arrive at once or late."""
    assert train(*flags(small, tmp_path / "at_once")) == 0
    monkeypatch.setattr(training.loop, "LateReader", Lagging)
    assert train(*flags(small, tmp_path / "late")) == 0
    for one, other in zip(rows(tmp_path / "at_once"), rows(tmp_path / "late"), strict=True):
        assert one["train_loss"] == other["train_loss"]


def test_the_schedules_of_a_step_are_logged_at_it(small, tmp_path):
    """TensorBoard shows the learning rate with which each step was made; log.txt that of the epoch's last step."""
    assert train(*flags(small, tmp_path, "--warmup_epochs", 1, "--lr", 0.16)) == 0
    logged = scalars(tmp_path, "optim/lr")
    assert logged[0] == 0.0
    assert logged[5] == pytest.approx(0.01)  # the end of the warm-up: 0.16 * 16 / 256
    assert [row["train_lr"] for row in rows(tmp_path)] == [pytest.approx(logged[5]), pytest.approx(logged[11])]


def test_tensorboard_holds_the_configuration_and_the_pictures(small, tmp_path):
    """A reader of the board alone sees what was run, and what the attention looks like."""
    assert train(*flags(small, tmp_path, "--max_steps", 2, "--report", "true")) == 0
    assert {"configuration/text_summary", "attention"} <= tags(tmp_path)
    text = next(v for e in events(tmp_path) for v in e.summary.value if v.tag == "configuration/text_summary")
    assert b"embed_dim" in text.tensor.string_val[0]


def test_the_report_is_written_while_the_run_is_under_way(small, tmp_path, monkeypatch):
    """At every evaluation, with the state of the run; at the end as done."""
    from evaluation import report

    states, real = [], report.write_report

    def write(folder, state, changed):
        states.append(state)
        return real(folder, state, changed)

    monkeypatch.setattr(report, "write_report", write)
    more = ["--eval_every", 1, "--nb_knn", 3, "--report", "true"]
    assert train(*flags(small, tmp_path, *more)) == 0
    assert states == ["running", "running", "done"]


def test_the_curves_start_at_the_untrained_model(small, tmp_path, capsys):
    """A new run first evaluates its random weights, for the page; log.txt and a continued run don't show them."""
    flags = [*VIT, "--data_path", small, "--epochs", 2, "--nb_knn", 5, "--output_dir", tmp_path, "--report", "true"]
    assert train(*flags, "--max_steps", 6) == 0
    assert "untrained: k-NN 5 top-1" in capsys.readouterr().out
    written = (tmp_path / "untrained.json").read_bytes()
    assert train(*flags) == 0
    assert "untrained" not in capsys.readouterr().out
    assert (tmp_path / "untrained.json").read_bytes() == written
    assert [row["epoch"] for row in rows(tmp_path)] == [0, 1]
