"""Mean, maximum and what lies between."""

import itertools

import pytest
import torch

from poolings.simple import AvgMax, Gap, GeM, Lse, Max
from tests.poolings.operators import assert_equals_plain, assert_published, build, rows
from tests.reference import fill_, tensor

PUBLISHED_GEM = {"p": 2, "learn": False, "reduce": "sum", "eps": None}


@pytest.mark.parametrize(
    ("published", "name", "settings"),
    [
        ("avg", "gap", {}),
        ("max", "max", {}),
        ("avgmax", "avgmax", {}),
        ("gem", "gem", PUBLISHED_GEM),
        ("lse", "lse", {"r": 1, "learn": False}),
        ("learnlse", "lse", {}),
    ],
)
def test_published_numbers(published, name, settings):
    """The published code's output and gradients, with the settings that restore it."""
    assert_published(published, name, **settings)


@pytest.mark.parametrize(
    ("pool", "plain"),
    [
        (Gap(6), lambda pool, x: rows(x).mean(1)),
        (Max(6), lambda pool, x: rows(x).max(1).values),
        (AvgMax(6), lambda pool, x: (rows(x).mean(1) + rows(x).max(1).values) / 2),
        (GeM(6), lambda pool, x: rows(x).clamp(min=1e-6).pow(pool.p).mean(1).pow(1 / pool.p)),
        (GeM(6, p=2.5, learn=False), lambda pool, x: rows(x).clamp(min=1e-6).pow(2.5).mean(1).pow(0.4)),
        (GeM(6, **PUBLISHED_GEM), lambda pool, x: rows(x).square().sum(1).sqrt()),
        (Lse(6), lambda pool, x: (pool.r * rows(x)).exp().mean(1).log() / pool.r),
        (Lse(6, r=0.5, learn=False), lambda pool, x: 2 * (0.5 * rows(x)).exp().mean(1).log()),
    ],
)
@pytest.mark.parametrize("grid", [(2, 5), (4, 1)])
def test_formula(pool, plain, grid):
    """Outputs and all gradients are the plain formula's."""
    assert_equals_plain(pool, lambda pool, x: (plain(pool, x),), tensor(1, (3, 6, *grid)))


def test_settings_start_the_parameters():
    """Learned exponents start as set and are in the state; fixed ones are not."""
    assert GeM(6, p=2.5).state_dict()["p"].tolist() == [2.5]
    assert Lse(6, r=4).state_dict()["r"].tolist() == [4.0]
    assert not GeM(6, learn=False).state_dict()
    assert not Lse(6, learn=False).state_dict()


def test_order_of_the_means():
    """mean < gem < max and mean < lse < max for positive features, and larger exponents come nearer to the maximum."""
    x = tensor(1, (2, 9, 6)).abs() + 0.1
    lowest, highest = Gap(6)(x), Max(6)(x)
    for make in (lambda e: GeM(6, p=e), lambda e: Lse(6, r=e)):
        chain = [lowest, make(1.5)(x), make(6.0)(x), make(60.0)(x), highest]
        assert all((low < high).all() for low, high in itertools.pairwise(chain))
    torch.testing.assert_close(GeM(6, p=1)(x), lowest)
    torch.testing.assert_close(Lse(6, r=1e-2)(x), lowest, rtol=2e-2, atol=0)


@pytest.mark.parametrize("name", ["gem", "lse"])
def test_large_exponents_and_values(name):
    """Channels of zeros and of large values, to powers that float32 can't hold, stay finite, and so do slopes."""
    x = torch.stack([torch.zeros(2, 9), 1e6 * tensor(1, (2, 9)).abs(), 1e-4 * tensor(2, (2, 9)).abs()], 2)
    x.requires_grad_()
    pool = build(name, dim=3)
    next(pool.parameters()).data.fill_(20.0)
    pooled = pool(x)
    pooled.sum().backward()
    assert (pooled <= x.amax(1).clamp_min(1e-6) * (1 + 1e-6)).all()
    assert (pooled[:, 1] > 0.5 * x[:, :, 1].amax(1)).all()
    assert x.grad.isfinite().all()
    assert next(pool.parameters()).grad.isfinite().all()


def test_a_channel_of_zeros_without_clamping():
    """The published gem has a slope of NaN there; ours is 0."""
    x = torch.zeros(1, 4, 2, requires_grad=True)
    pooled = GeM(2, **PUBLISHED_GEM)(x)
    pooled.sum().backward()
    assert pooled.abs().max() < 1e-30
    assert (x.grad == 0).all()


@pytest.mark.parametrize("shape", [(1, 4, 2), (1, 2, 2, 2)])
def test_of_positions_that_tie_one_gets_the_gradient(shape):
    """Each channel's whole gradient goes to a single position, as in torch's max-pooling layers."""
    x = torch.ones(shape, requires_grad=True)
    Max(2)(x).sum().backward()
    assert x.grad.sum() == 2
    assert (x.grad == 1).sum() == 2


def test_representation_shows_what_is_learned():
    """repr tells learned from fixed exponents without reading them, so it works for models on the meta device too."""
    assert "p=learned" in repr(GeM(6).to("meta"))
    assert "r=2.5" in repr(fill_(Lse(6, r=2.5, learn=False)))
