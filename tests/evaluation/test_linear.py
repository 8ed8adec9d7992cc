"""Linear probes: a head in a sweep is the head that it would be alone."""

from __future__ import annotations

import numpy as np
import pytest
import torch
import torch.nn.functional as F

import vision_transformer as vits
from evaluation import linear
from evaluation.linear import Form, HeadGroup, LinearClassifier, Probe
from runtime.guards import InputError
from tests.reference import tensor


def batches(steps=6, count=32, dim=12, classes=5):
    for step in range(steps):
        generator = torch.Generator().manual_seed(step)
        target = torch.randint(0, classes, (count,), generator=generator)
        yield tensor(step, (count, dim)) + 2 * F.one_hot(target, dim), target


def test_every_head_of_a_sweep_ends_as_it_would_alone():
    """After six steps each head of a group of four equals, to rounding, the head trained without the others."""
    lrs = [0.001, 0.1, 1.0, 30.0]
    together = HeadGroup(12, 5, lrs, torch.device("cpu"))
    for x, target in batches():
        together.step(x, target, 0.7)
    for i, lr in enumerate(lrs):
        alone = HeadGroup(12, 5, [lr], torch.device("cpu"))
        for x, target in batches():
            alone.step(x, target, 0.7)
        assert torch.allclose(together.weight[i], alone.weight[0], rtol=1e-5, atol=1e-6)
        assert torch.allclose(together.bias[i], alone.bias[0], rtol=1e-5, atol=1e-6)


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


def tiny_vit(mode):
    return vits.VisionTransformer(
        mode=mode, img_size=[32], patch_size=8, embed_dim=12, depth=3, num_heads=2, qkv_bias=True
    ).eval()


def test_official_vit_features_are_cls_of_the_last_blocks():
    """Form(n) is the normed [CLS] of the last n blocks side by side; with avgpool the mean patch token follows."""
    model, images = tiny_vit("official"), tensor(1, (2, 3, 32, 32))
    with torch.no_grad():
        one, two, pooled = linear.probe_features(model, images, [Form(1), Form(2), Form(1, True)])
        layers = model.get_intermediate_layers(images, 2)
    assert torch.allclose(one, model(images), atol=1e-6)
    assert torch.equal(two, torch.cat([tokens[:, 0] for tokens in layers], dim=1))
    assert torch.equal(pooled[:, 12:], layers[-1][:, 1:].mean(1))


def test_simpool_uses_its_own_feature_and_refuses_cls_forms():
    """A SimPool model is probed on model(x); asking it for four blocks is an error that says what to give."""
    model, images = tiny_vit("simpool"), tensor(1, (2, 3, 32, 32))
    with torch.no_grad():
        (feature,) = linear.probe_features(model, images, [Form()])
        assert torch.equal(feature, model(images))
    with pytest.raises(ValueError, match="n_last_blocks 1"):
        linear.probe_features(model, images, [Form(4)])
    assert linear.default_forms(model) == [Form()]
    with pytest.raises(ValueError, match="exceeds the 3 blocks"):
        linear.probe_features(tiny_vit("official"), images, [Form(4)])


def test_the_held_out_part_is_a_tenth_of_each_class():
    """Held-out and kept images are disjoint, cover train, and every class is in both; one image stays in training."""
    labels = np.repeat(np.arange(4), [100, 50, 10, 1])
    kept, held_out = linear.split_train(labels, seed=1)
    assert sorted(np.concatenate([kept, held_out]).tolist()) == list(range(161))
    assert np.bincount(labels[held_out], minlength=4).tolist() == [10, 5, 1, 0]
    assert np.array_equal(held_out, linear.split_train(labels, seed=1)[1])


def test_logistic_regression_reaches_the_optimum_of_its_objective():
    """The fitted weights have a vanishing gradient, and beat the scikit-learn solution's objective to 1e-4."""
    from sklearn.linear_model import LogisticRegression

    x, target = next(batches(1, 400))
    weight = linear.fit_logistic(x, target, 0.01, 5)
    theirs = LogisticRegression(C=1 / (0.01 * len(x)), max_iter=1000, tol=1e-8).fit(x.numpy(), target.numpy())
    other = torch.cat([torch.from_numpy(theirs.coef_), torch.from_numpy(theirs.intercept_)[:, None]], 1).float()

    def objective(w):
        return F.cross_entropy(F.linear(x, w[:, :-1], w[:, -1]), target) + 0.005 * w[:, :-1].square().sum()

    assert objective(weight).item() == pytest.approx(objective(other).item(), rel=1e-4)


def test_logistic_regression_chooses_its_penalty_without_the_test_set():
    """The penalty is that of the best held-out score, and classes with one image each are an error."""
    x, target = next(batches(1, 400))
    result = linear.logistic_regression(x, target, x, target)
    assert result["held_out"][result["penalty"]] == max(result["held_out"].values())
    assert result["top1"] > 80
    with pytest.raises(InputError, match="only one"):
        linear.logistic_regression(x[:5], torch.arange(5), x, target)
