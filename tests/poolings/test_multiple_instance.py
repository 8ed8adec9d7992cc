"""AbMILP: positions scored by an MLP."""

import pytest
import torch

from poolings.choose import build_pooling
from tests.poolings.operators import assert_equals_plain, assert_published_probe, build, rows
from tests.reference import fill_, tensor


def test_published_numbers():
    """The published code's output and gradient, without self-attention."""
    assert_published_probe("abmilp", "abmilp")


def plain(pool, x):
    """Self-attention with its scores spelt out, then the weighted mean."""
    x = rows(x)
    if pool.self_attn is not None:
        query, key, value = (x @ weight.T for weight in pool.self_attn.qkv.weight.chunk(3))
        scores = query @ key.transpose(1, 2) / x.shape[-1] ** 0.5
        x = pool.self_attn.proj(scores.softmax(-1) @ value)
    first, _, last = pool.attention_predictor
    scores = (x @ first.weight.T + first.bias).tanh() @ last.weight[0] + last.bias
    weights = scores.softmax(1)
    return (weights.unsqueeze(2) * x).sum(1), weights.unsqueeze(1)


@pytest.mark.parametrize("self_attention", [False, True])
def test_formula(self_attention):
    """Outputs, weights and all gradients are those of the formula."""
    assert_equals_plain(build("abmilp", 6, self_attention=self_attention), plain, tensor(1, (2, 6, 3, 5)))


def test_self_attention_is_timms():
    """The attention in front is timm's with one head: the same parameters by name, the same numbers."""
    layers = pytest.importorskip("timm.layers")
    theirs = fill_(layers.Attention(16, num_heads=1), 0.3)
    ours = build_pooling("abmilp", 16, self_attention=True).self_attn
    ours.load_state_dict(theirs.state_dict(), strict=True)
    x = tensor(1, (2, 9, 16))
    torch.testing.assert_close(ours(x), theirs(x), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("value", [1, "true", None])
def test_self_attention_is_true_or_false(value):
    """Another value is refused by name."""
    with pytest.raises(ValueError, match=f"abmilp: self_attention must be True or False, got {value!r}"):
        build_pooling("abmilp", 16, self_attention=value)
