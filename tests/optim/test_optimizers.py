"""Optimisers, clipping, groups and schedules against the published numbers."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torch import nn

from optim.clipping import cancel_gradients_last_layer, clip_each_, clip_gradients
from optim.groups import get_params_groups
from optim.lars import LARS
from optim.optimizers import OPTIMIZERS, build_optimizer
from optim.schedules import cosine_scheduler
from tests.reference import assert_close, fill_, golden, tensor


def test_lars_four_steps():
    """Four LARS steps equal the published code's."""
    g = golden("lars")
    model = fill_(nn.Linear(8, 6))
    groups = get_params_groups(model)
    groups[0]["weight_decay"] = g["weight_decay"]
    lars = LARS(groups, lr=g["lr"])
    for i, row in enumerate(g["steps"]):
        lars.zero_grad()
        model(tensor(7 + i, (5, 8))).pow(2).sum().backward()
        lars.step()
        assert_close(model.weight.detach(), row["weight"], 2e-5, f"weight after step {i}")
        assert_close(model.bias.detach(), row["bias"], 2e-5, f"bias after step {i}")


def test_cosine_schedules():
    """Both golden schedules hold."""
    np.testing.assert_allclose(cosine_scheduler(0.5, 0.01, 10, 7, 3), golden("cosine")["a"].numpy(), rtol=2e-6)
    np.testing.assert_allclose(cosine_scheduler(0.996, 1, 5, 11), golden("cosine")["b"].numpy(), rtol=2e-6)


def test_a_warmup_longer_than_training_is_cut():
    """The schedule always has epochs x steps entries."""
    assert len(cosine_scheduler(1.0, 0.0, 2, 5, warmup_epochs=10)) == 10


def test_clipping():
    """Norms before and gradients after clipping equal the published code's."""
    g = golden("clip")
    model = fill_(nn.Sequential(nn.Linear(16, 16), nn.GELU(), nn.Linear(16, 4)))
    (model(tensor(8, (32, 16))) * 30).pow(2).sum().backward()
    norms = clip_gradients(model, g["clip"])
    assert_close(torch.tensor(norms), g["norms"].float(), 1e-4)
    for p, expected in zip(model.parameters(), g["grads"], strict=True):
        assert_close(p.grad, expected, 1e-4)


def test_clipping_on_an_accelerator(on_an_accelerator):
    """Without a look at the factors: long gradients are cut to the length, short ones stay bit for bit."""
    long, short = tensor(1, (4, 4)) * 100, tensor(2, (4, 4)) * 0.01
    gradients, norms = [long.clone(), short.clone()], [long.norm().item(), short.norm().item()]
    assert clip_each_(gradients, 0.5).tolist() == pytest.approx(norms)
    torch.testing.assert_close(gradients[0], long * (0.5 / (long.norm() + 1e-6)))
    assert torch.equal(gradients[1], short)


def test_no_clipping_changes_nothing():
    """Clip 0 still reports the norms and leaves the gradients bit for bit."""
    gradient = tensor(1, (4, 4)) * 100
    before = gradient.clone()
    assert clip_each_([gradient], 0).item() == pytest.approx(before.norm().item())
    assert torch.equal(gradient, before)


def test_groups():
    """Biases and 1-D parameters get no weight decay; everything else does; frozen ones are left out."""
    model = nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4))
    model[0].weight.requires_grad_(False)
    model.register_parameter("pos_embed", nn.Parameter(torch.zeros(1, 2, 3)))
    regularised, rest = get_params_groups(model)
    assert [p.shape for p in regularised["params"]] == [(1, 2, 3)]
    assert len(rest["params"]) == 3
    assert rest["weight_decay"] == 0.0


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


def test_last_layer_freeze():
    """Gradients of the last layer are dropped in the frozen epochs only."""
    model = nn.ModuleDict({"last_layer": nn.Linear(2, 2), "mlp": nn.Linear(2, 2)})
    for epoch, frozen in ((0, True), (1, False)):
        model["mlp"](model["last_layer"](torch.ones(1, 2))).sum().backward()
        cancel_gradients_last_layer(epoch, model, 1)
        assert (model["last_layer"].weight.grad is None) == frozen
        assert model["mlp"].weight.grad is not None


def test_unknown_optimizer():
    """The error names the value and the choices."""
    with pytest.raises(ValueError, match=r"'adam'.*adamw, sgd, lars"):
        build_optimizer("adam", [])


def test_norms_of_large_gradients_are_exact():
    """The norm of a gradient as long as the prototypes' is float32's, on any processor.

    Blocks of 2^18 squares are added up in float32. However a library does it, the sum of n positive numbers is off by
    less than n times 6e-8, and by sqrt(n) times that, 3e-5, unless all roundings go the same way.
    """
    gradient = torch.randn(1 << 24, generator=torch.Generator().manual_seed(0))
    exact = gradient.double().norm().item()
    assert clip_each_([gradient], 0.0).item() == pytest.approx(exact, rel=3e-5)


def test_norms_follow_no_memory_layout():
    """A channels_last gradient has the norm of the same numbers."""
    gradient = torch.randn(8, 4, 3, 3).to(memory_format=torch.channels_last)
    norm = clip_each_([gradient], 0.5)
    torch.testing.assert_close(gradient.norm(), torch.tensor(0.5), rtol=1e-4, atol=1e-5)
    assert norm.item() > 0.5


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
