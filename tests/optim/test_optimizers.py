"""Optimizers: built by name, and unmoved by a refused step."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from optim.groups import get_params_groups
from optim.optimizers import OPTIMIZERS, build_optimizer
from tests.reference import fill_, tensor


@pytest.mark.parametrize("device", ["cpu", "accelerator"])
@pytest.mark.parametrize("name", OPTIMIZERS)
def test_a_refused_step_changes_nothing(request, name, device):
    """With found_inf set, parameters and state stay bit for bit, whatever the gradients; the next step is the usual."""
    if device == "accelerator":
        request.getfixturevalue("on_an_accelerator")
    model, twin = fill_(nn.Linear(8, 6)), fill_(nn.Linear(8, 6))
    runs = [(m, build_optimizer(name, get_params_groups(m))) for m in (model, twin)]
    for _, optimizer in runs:
        for group in optimizer.param_groups:
            group["lr"] = 0.1

    def step(m, optimizer, seed, bad):
        optimizer.zero_grad()
        m(tensor(seed, (5, 8))).pow(2).sum().backward()
        if bad:
            for p in m.parameters():
                p.grad.fill_(float("nan"))
        optimizer.found_inf = torch.tensor(float(bad))
        optimizer.step()

    for m, optimizer in runs:
        step(m, optimizer, 1, bad=False)
    before = model.weight.detach().clone()
    step(*runs[0], 2, bad=True)
    assert torch.equal(model.weight, before)
    for m, optimizer in runs:
        step(m, optimizer, 3, bad=False)
    assert torch.equal(model.weight, twin.weight)
    assert not torch.equal(model.weight, before)


def test_unknown_optimizer():
    """The error names the value and the choices."""
    with pytest.raises(ValueError, match=r"'adam'.*adamw, sgd, lars"):
        build_optimizer("adam", [])


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_a_refused_first_step_leaves_no_trace(name):
    """Where the very first step is refused, the second one is what the first would have been."""
    models = [fill_(nn.Linear(300, 200)) for _ in range(2)]
    for model, steps in zip(models, ([True, False], [False]), strict=True):
        optimizer = build_optimizer(name, get_params_groups(model))
        for group in optimizer.param_groups:
            group["lr"] = 0.01
        for bad in steps:
            garbage = torch.full((300 * 200,), float("nan"))  # what freed memory may hold
            del garbage
            optimizer.zero_grad()
            model(tensor(1, (5, 300))).pow(2).mean().backward()
            optimizer.found_inf = torch.tensor(float(bad))
            optimizer.step()
    assert torch.equal(models[0].weight, models[1].weight)
    assert models[0].weight.isfinite().all()
