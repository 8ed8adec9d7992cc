"""Slot attention."""

import pytest
import torch
from torch import nn

from poolings.slot import Slot
from tests.poolings.operators import assert_equals_plain, assert_published, build, rows
from tests.reference import fill_, tensor


def test_published_numbers():
    """The published formula's output and gradients, with noise in evaluation as there."""
    assert_published("slot", "slot", eval_noise=True)


def plain(pool, x):
    """Keys and values of all positions, the GRU spelt out."""
    x = pool.norm_input(rows(x))
    keys, values = pool.to_k(x), pool.to_v(x)
    width = x.shape[-1]
    noise = torch.randn(3, width, generator=torch.Generator().manual_seed(5)).to(x)
    slots = (pool.slots_mu + pool.slots_logsigma.exp() * noise).expand(len(x), -1, -1)
    for _ in range(pool.iterations):
        attention = (pool.to_q(pool.norm_slots(slots)) @ keys.transpose(1, 2) / width**0.5).softmax(1) + 1e-8
        attention = attention / attention.sum(2, keepdim=True)
        into = nn.functional.linear(attention @ values, pool.gru.weight_ih, pool.gru.bias_ih).chunk(3, -1)
        held = nn.functional.linear(slots, pool.gru.weight_hh, pool.gru.bias_hh).chunk(3, -1)
        reset, update = (into[0] + held[0]).sigmoid(), (into[1] + held[1]).sigmoid()
        slots = (1 - update) * (into[2] + reset * held[2]).tanh() + update * slots
        slots = slots + pool.mlp(pool.norm_pre_ff(slots))
    return slots.max(1).values, attention.mean(1, keepdim=True)


@pytest.mark.parametrize("iterations", [1, 3])
def test_formula(iterations):
    """Folded keys and values give the plain formula's outputs, weights and gradients."""
    pool = fill_(Slot(6, iterations=iterations, eval_seed=5), 0.3).eval()
    assert_equals_plain(pool, plain, tensor(1, (2, 6, 3, 5)))


def test_noise_in_evaluation():
    """None by default, fresh with eval_noise, fixed with eval_seed; training always draws."""
    x = tensor(1, (2, 9, 16))
    same = lambda pool: torch.equal(pool(x), pool(x))  # noqa: E731
    for seed in (None, 3):
        assert same(build("slot", eval_seed=seed))
        assert not same(build("slot", eval_seed=seed).train())
    assert not same(build("slot", eval_seed=None, eval_noise=True))
    assert not torch.allclose(build("slot", eval_seed=3)(x), build("slot", eval_seed=4)(x))


def test_without_noise_the_slots_are_one():
    """Documented: without noise the attention is uniform; with a seed it is not."""
    x = tensor(1, (2, 9, 16))
    _, uniform = build("slot", eval_seed=None)(x, return_attention=True)
    torch.testing.assert_close(uniform, torch.full((2, 1, 9), 1 / 9))
    _, attention = build("slot", eval_seed=1)(x, return_attention=True)
    assert attention.std() > 1e-4


def test_seeded_noise_is_the_same_for_every_image_and_leaves_torchs_generator_alone():
    """Two equal images have equal features, and nothing is drawn."""
    pool, x = build("slot", eval_seed=1), tensor(1, (1, 9, 16)).expand(2, -1, -1)
    before = torch.get_rng_state()
    pooled = pool(x)
    assert torch.equal(torch.get_rng_state(), before)
    torch.testing.assert_close(pooled[0], pooled[1])


def test_hidden_width():
    """The MLP's hidden layer is max(D, 128)."""
    assert Slot(6).mlp[0].out_features == 128
    assert Slot(130).mlp[0].out_features == 130
