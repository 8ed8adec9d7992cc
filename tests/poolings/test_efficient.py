"""Efficient probing."""

import pytest
import torch
from torch import nn

from poolings.choose import build_pooling
from poolings.efficient import Ep
from tests.poolings.operators import assert_equals_plain, assert_published_probe, build, rows
from tests.reference import tensor


@pytest.mark.parametrize(("published", "settings"), [("ep", {}), ("ep_d2", {"d_out": 2})])
def test_published_numbers(published, settings):
    """The published code's names, number of parameters, output and gradient, also with narrower values."""
    assert_published_probe(published, "ep", queries=8, **settings)


def test_efficient_probe_with_its_classifier():
    """M = 32 queries at width 768 and a linear map to 1000 classes: 1,383,400 parameters."""
    pool = build_pooling("ep", 768, queries=32)
    probe = nn.Sequential(pool, nn.BatchNorm1d(768, affine=False, eps=1e-6), nn.Linear(pool.num_features, 1000))
    assert sum(p.numel() for p in probe.parameters()) == 1_383_400
    assert probe(tensor(1, (2, 5, 768))).shape == (2, 1000)


def plain(pool, x):
    x = rows(x)
    weights = (torch.einsum("md,bnd->bmn", pool.cls_token[0], x) / x.shape[-1] ** 0.5).softmax(-1)
    slices = (x @ pool.v.weight.T).chunk(pool.queries, -1)
    means = [(weight.unsqueeze(-1) * part).sum(1) for weight, part in zip(weights.unbind(1), slices, strict=True)]
    return torch.cat(means, -1), weights


@pytest.mark.parametrize("settings", [{"queries": 1}, {"queries": 4}, {"queries": 3, "d_out": 2}])
def test_formula(settings):
    """Outputs, weights and all gradients are those of values made for every position, cut into slices."""
    assert_equals_plain(build("ep", 12, **settings), plain, tensor(1, (2, 12, 3, 5)))


def test_start():
    """Queries start at 0.02 N(0, 1)."""
    token = Ep(1024).cls_token
    assert token.shape == (1, 32, 1024)
    assert abs(token.mean()) < 0.001
    assert 0.0195 < token.std() < 0.0205


def test_ep_all_is_ep_on_more_tokens():
    """The same operator and state; [CLS] is one token among them."""
    first, second, tokens = build("ep", queries=8), build("ep_all", queries=8), tensor(1, (2, 10, 16))
    second.load_state_dict(first.state_dict(), strict=True)
    assert torch.equal(first(tokens), second(tokens))
    assert not torch.allclose(second(tokens), second(tokens[:, 1:]))
