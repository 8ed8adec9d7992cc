"""Linear probes: a head in a sweep is the head that it would be alone."""

from __future__ import annotations

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from evaluation import linear
from evaluation.forms import Form
from evaluation.linear import HeadGroup, LinearClassifier, Probe
from tests.reference import assert_close, tensor


def batches(steps=6, count=32, dim=12, classes=5):
    for step in range(steps):
        generator = torch.Generator().manual_seed(step)
        target = torch.randint(0, classes, (count,), generator=generator)
        yield tensor(step, (count, dim)) + 2 * F.one_hot(target, dim), target


def test_every_head_of_a_sweep_ends_as_it_would_alone():
    """After six steps each head of a group of four equals, to rounding, the head trained without the others.

    A product of another shape may add up in another order, which leaves 2e-5 of the largest weight.
    """
    lrs = [0.001, 0.1, 1.0, 30.0]
    together = HeadGroup(12, 5, lrs, torch.device("cpu"))
    for x, target in batches():
        together.step(x, target, 0.7)
    for i, lr in enumerate(lrs):
        alone = HeadGroup(12, 5, [lr], torch.device("cpu"))
        for x, target in batches():
            alone.step(x, target, 0.7)
        assert_close(together.weight[i], alone.weight[0])
        assert_close(together.bias[i], alone.bias[0])


def test_a_head_follows_torch_sgd_with_momentum():
    """The written-out gradient and update equal autograd with torch.optim.SGD(momentum=0.9), and so do the losses."""
    group = HeadGroup(12, 5, [0.3], torch.device("cpu"))
    head = LinearClassifier(12, 5)
    head.load_state_dict({k.removeprefix("module."): v for k, v in group.classifier(0).items()})
    optimizer = torch.optim.SGD(head.parameters(), 0.3, momentum=0.9)
    for x, target in batches():
        loss = F.cross_entropy(head(x), target)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        assert group.step(x, target, 1.0).item() == pytest.approx(loss.item(), rel=1e-5)
    assert torch.allclose(group.weight[0], head.linear.weight, rtol=1e-4, atol=1e-6)
    assert torch.allclose(group.bias[0], head.linear.bias, rtol=1e-4, atol=1e-6)


def test_a_saved_sweep_continues_exactly():
    """Heads loaded from a saved state go on bit for bit, and other learning rates are refused."""
    whole = HeadGroup(12, 5, [0.1, 1.0], torch.device("cpu"))
    first = HeadGroup(12, 5, [0.1, 1.0], torch.device("cpu"))
    steps = list(batches())
    for x, target in steps[:3]:
        first.step(x, target, 1.0)
    second = HeadGroup(12, 5, [0.1, 1.0], torch.device("cpu"), seed=9)
    second.load(first.state())
    for x, target in steps:
        whole.step(x, target, 1.0)
    for x, target in steps[3:]:
        second.step(x, target, 1.0)
    assert torch.equal(whole.weight, second.weight)
    with pytest.raises(ValueError, match="learning rates"):
        HeadGroup(12, 5, [0.1, 2.0], torch.device("cpu")).load(first.state())


def test_heads_are_ordered_by_form_then_rate_and_counted_apart():
    """The grid names each head once, and each is counted on its own form of the features."""
    probe = Probe([12, 12], [Form(1), Form(4)], [0.1, 1.0], 5, 256, torch.device("cpu"))
    assert [head.name for head in probe.heads] == [
        "1 block, lr 0.1", "1 block, lr 1", "4 blocks, lr 0.1", "4 blocks, lr 1"
    ]  # fmt: skip
    for x, target in batches(40):
        probe.step([x, torch.zeros_like(x)], target, 1.0)
    x, target = next(batches())
    hits = probe.count([x, torch.zeros_like(x)], target)
    assert hits[0, 0] > hits[2, 0]
    logits = F.linear(x, probe.groups[0].weight[1], probe.groups[0].bias[1])
    assert hits[1, 0] == (logits.argmax(1) == target).sum()
    assert hits[1, 2].item() == pytest.approx(F.cross_entropy(logits, target, reduction="sum").item(), rel=1e-5)


def test_the_held_out_part_is_a_tenth_of_each_class():
    """Held-out and kept images are disjoint, cover train, and every class is in both; one image stays in training."""
    labels = np.repeat(np.arange(4), [100, 50, 10, 1])
    kept, held_out = linear.split_train(labels, seed=1)
    assert sorted(np.concatenate([kept, held_out]).tolist()) == list(range(161))
    assert np.bincount(labels[held_out], minlength=4).tolist() == [10, 5, 1, 0]
    assert np.array_equal(held_out, linear.split_train(labels, seed=1)[1])


def test_rates_are_scaled_by_the_global_batch_and_follow_a_cosine():
    """A base rate is per 256 images, and epoch e of E runs at (1 + cos(pi e / E)) / 2 of it."""
    probe = Probe([12], [Form(1)], [0.5], 5, 1024, torch.device("cpu"))
    assert probe.groups[0].lrs.tolist() == [2.0]
    factors = [linear.cosine_factor(epoch, 4) for epoch in range(4)]
    assert factors == pytest.approx([1, 0.853553, 0.5, 0.146447], abs=1e-6)
