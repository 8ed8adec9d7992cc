"""Means, and what Run does in every method's step."""

from __future__ import annotations

import argparse
import contextlib
import dataclasses

import numpy as np
import pytest
import torch
from torch import nn

from runtime import hardware
from tests.reference import tensor
from training.plan import Plan
from training.run import NO_WISHES, Means, Run, Wishes


class Model(nn.Module):
    """A backbone with BatchNorm, and a head."""

    def __init__(self) -> None:
        super().__init__()
        self.backbone, self.head = nn.Sequential(nn.Linear(4, 6), nn.BatchNorm1d(6)), nn.Linear(6, 2)

    def forward(self, x):
        return self.head(self.backbone(x))


def make_run(amp: str = "none", clip: float = 0.0, groups=None, steps: int = 10, teacher: bool = False) -> Run:
    args = argparse.Namespace(
        seed=0, optimizer="adamw", clip_grad=clip, grad_checkpointing=False, compile=False, fsdp=False, epochs=2,
        max_steps=None,
    )  # fmt: skip
    torch.manual_seed(0)
    schedules = {"lr": np.linspace(0.1, 1.0, steps), "wd": np.linspace(0.0, 0.9, steps)}
    choice = hardware.Choice(torch.device("cpu"), amp, "highest", channels_last=False)
    more = {} if groups is None else {"groups": groups}
    models = (Model(), Model() if teacher else None)
    return Run(args, choice, *models, nn.MSELoss(), schedules, None, Plan(3, 1, 5), **more)


def step(run: Run, number: int, scale: float = 1.0, wishes: Wishes = NO_WISHES) -> torch.Tensor:
    """One step towards zero."""
    run.begin(number)
    means = Means()
    loss = run.student(tensor(1, (3, 4))).square().mean() * scale
    run.backward(loss, 1)
    means.add(loss=loss)
    means.over_ranks(wishes)
    run.unscale()
    return means.report(*run.update(means))


def state(run: Run) -> list[torch.Tensor]:
    moments = [value for of_one in run.optimizer.state.values() for value in of_one.values()]
    return [value.clone() for value in (*run.student.state_dict().values(), *moments)]


def test_means_divide_each_term_by_its_count():
    """Sums over two micro-batches: a term by their number, one with a count by that too, in its own shape."""
    means = Means()
    for i in (1.0, 3.0):
        means.add(loss=torch.tensor(i), center=torch.full((1, 4), 10 * i))
    means.over_ranks(Wishes(stop=True, save=False), center=5)
    assert torch.equal(means["center"], torch.full((1, 4), 4.0))
    report = means.report(torch.tensor(7.0), torch.tensor(False))
    assert report.tolist() == [2.0, 7.0, 0.0, 1.0, 0.0]
    assert means.finite()


@pytest.mark.parametrize("bad", ["loss", "center"])
def test_any_mean_that_is_not_finite_is_found(bad):
    """A NaN anywhere in what is averaged refuses the step."""
    values = {"loss": torch.tensor(1.0), "center": torch.ones(1, 4)}
    values[bad] = values[bad] * float("nan")
    means = Means()
    means.add(**values)
    means.over_ranks(Wishes())
    assert not means.finite()


def test_every_step_has_its_own_rate_and_decay():
    """The learning rate goes to all groups; the weight decay to those that don't set their own."""
    run = make_run()
    for number in (0, 4, 9):
        run.begin(number)
        decaying, others = run.optimizer.param_groups
        assert decaying["lr"] == others["lr"] == run.schedules["lr"][number]
        assert decaying["weight_decay"] == run.schedules["wd"][number]
        assert others["weight_decay"] == 0.0


def test_a_groups_own_scale_multiplies_its_rate():
    """As layer-wise decay needs it."""
    run = make_run(groups=lambda m: [{"params": [m.head.weight], "lr_scale": 0.5}, {"params": [m.head.bias]}])
    run.begin(3)
    assert run.optimizer.param_groups[0]["lr"] == 0.5 * run.optimizer.param_groups[1]["lr"]


def test_the_epoch_of_a_step():
    """Five steps each."""
    assert [make_run().begin(number) for number in (0, 4, 5, 9)] == [0, 0, 1, 1]


@pytest.mark.parametrize("amp", ["none", "fp16"])
def test_a_refused_step_changes_nothing(amp):
    """Weights, momenta and BatchNorm's statistics stay bit for bit as they were; the next step counts again."""
    run = make_run(amp)
    step(run, 0)
    before = state(run)
    assert step(run, 1, scale=float("inf"))[2] == 1
    for old, new in zip(before, state(run), strict=True):
        assert torch.equal(old, new)
    assert step(run, 2)[2] == 0
    assert not all(torch.equal(old, new) for old, new in zip(before, state(run), strict=True))


@pytest.mark.parametrize("bad", ["loss", "gradient"])
def test_what_is_not_finite_refuses_a_step(bad):
    """A loss alone, with finite gradients, and one number of one gradient alone."""
    run = make_run()
    run.begin(0)
    loss, means = run.student(tensor(1, (3, 4))).square().mean(), Means()
    run.backward(loss, 1)
    means.add(loss=loss * float("inf") if bad == "loss" else loss)
    if bad == "gradient":
        run.student.head.bias.grad[1] = float("nan")
    means.over_ranks(Wishes())
    before = [p.clone() for p in run.student.parameters()]
    _, refused = run.update(means)
    assert refused
    assert all(torch.equal(a, b) for a, b in zip(before, run.student.parameters(), strict=True))


def test_the_last_micro_batch_is_marked():
    """It is the one in which processes exchange gradients."""
    run = make_run()
    run.views = argparse.Namespace(on_device=lambda batch: [batch])
    assert [batch.last for batch in run.micro_batches([torch.zeros(1, 3, 2, 2)] * 3)] == [False, False, True]


def test_a_steps_draws_are_those_of_its_number_and_rank():
    """What drop path draws is the same whenever a step is run, and another for another step or rank."""
    draws = []
    for number, rank in ((3, 0), (3, 0), (4, 0), (3, 1)):
        run = make_run()
        run.plan = dataclasses.replace(run.plan, rank=rank, world_size=2)
        run.begin(number)
        draws.append(torch.rand(1).item())
    assert draws[0] == draws[1]
    assert len(set(draws)) == 3


def test_a_refused_step_leaves_the_teachers_statistics():
    """A teacher in train mode moves its own in every forward; a refused step puts them back."""
    run = make_run(teacher=True)
    for scale in (1.0, float("nan")):
        before = [buffer.clone() for buffer in run.teacher.buffers()]
        run.begin(0)
        run.teacher(tensor(2, (3, 4)) * scale)
        loss, means = run.student(tensor(1, (3, 4))).square().mean() * scale, Means()
        run.backward(loss, 1)
        means.add(loss=loss)
        means.over_ranks(Wishes())
        refused = bool(run.update(means)[1])
        assert refused == (scale != 1)
        kept = [torch.equal(a, b) for a, b in zip(before, run.teacher.buffers(), strict=True)]
        assert all(kept) if refused else not any(kept)


def test_gradients_are_exchanged_in_the_last_backward_only(monkeypatch):
    """The others run inside DistributedDataParallel's no_sync."""

    class Wrapper(nn.Module):
        exchanges = True

        @contextlib.contextmanager
        def no_sync(self):
            self.exchanges = False
            yield
            self.exchanges = True

    run = make_run()
    monkeypatch.setattr("training.run.DistributedDataParallel", Wrapper)
    run.student = Wrapper()
    for now in (False, True):
        with run.exchange_gradients(now):
            assert run.student.exchanges == now


def test_means_over_two_alike_processes_are_those_of_one(monkeypatch):
    """What all add up is divided by their number; a wish of any of them is a wish of all."""
    monkeypatch.setattr("training.run.get_world_size", lambda: 2)
    monkeypatch.setattr(torch.distributed, "all_reduce", lambda shared: shared.add_(shared.clone()))
    means = Means()
    means.add(loss=torch.tensor(3.0), center=torch.full((1, 4), 10.0))
    means.over_ranks(Wishes(save=True), center=5)
    assert torch.equal(means["center"], torch.full((1, 4), 2.0))
    assert means.report(torch.tensor(7.0), torch.tensor(False)).tolist() == [3.0, 7.0, 0.0, 0.0, 1.0]


def test_the_norm_is_that_before_clipping():
    """The report tells how large the gradients were; the step is taken with clipped ones."""
    plain, clipped = make_run(), make_run(clip=1e-4)
    assert step(plain, 0)[1] == step(clipped, 0)[1] > 1e-3


def test_fp16_gradients_are_unscaled_before_they_are_used():
    """The loss scale leaves no trace in norm and weights: the step is float32's, to its rounding."""
    plain, scaled = make_run(), make_run("fp16")
    assert step(plain, 3)[1].item() == pytest.approx(step(scaled, 3)[1].item(), rel=1e-5)
    for a, b in zip(plain.student.parameters(), scaled.student.parameters(), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-6)


def test_accumulated_gradients_are_the_mean():
    """Two micro-batches give the gradient of their mean loss."""
    run = make_run()
    run.begin(0)
    losses = [run.loss(run.student(tensor(i, (3, 4))), torch.zeros(3, 2)) for i in (1, 2)]
    for loss in losses:
        run.backward(loss, 2)
    summed = run.student.head.weight.grad.clone()
    (expected,) = torch.autograd.grad(
        sum(run.loss(run.student(tensor(i, (3, 4))), torch.zeros(3, 2)) for i in (1, 2)) / 2, run.student.head.weight
    )
    torch.testing.assert_close(summed, expected)
