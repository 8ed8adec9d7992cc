"""Gradients before a step: clipped by their own norm, or dropped."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from optim.clipping import cancel_gradients_last_layer, clip_each_, clip_gradients
from tests.reference import assert_close, fill_, golden, tensor


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


def test_last_layer_freeze():
    """Gradients of the last layer are dropped in the frozen epochs only."""
    model = nn.ModuleDict({"last_layer": nn.Linear(2, 2), "mlp": nn.Linear(2, 2)})
    for epoch, frozen in ((0, True), (1, False)):
        model["mlp"](model["last_layer"](torch.ones(1, 2))).sum().backward()
        cancel_gradients_last_layer(epoch, model, 1)
        assert (model["last_layer"].weight.grad is None) == frozen
        assert model["mlp"].weight.grad is not None
