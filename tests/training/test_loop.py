"""The loop: what is read, logged and saved around the steps."""

from __future__ import annotations

import pytest
import torch

from tests.pretraining import VIT, rows, train
from tests.tensorboard_tags import events, scalars, tags
from training import loop


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
    monkeypatch.setattr(loop, "LateReader", Lagging)
    assert train(*flags(small, tmp_path, "--checkpoint_every_steps", 2)) == 0
    for tag in ("train/loss", "optim/lr", "optim/teacher_temp", "optim/teacher_momentum", "optim/wd"):
        assert list(scalars(tmp_path, tag)) == list(range(12)), tag


def test_late_results_change_no_row(small, tmp_path, monkeypatch):
    """log.txt is the same whether results arrive at once or late."""
    assert train(*flags(small, tmp_path / "at_once")) == 0
    monkeypatch.setattr(loop, "LateReader", Lagging)
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
