"""A learned token that attends to the positions."""

import pytest
import torch
from torch.nn import functional as F

from poolings.tokens import Cait, Cls
from tests.poolings.operators import assert_equals_plain, assert_published, rows
from tests.reference import fill_, tensor


@pytest.mark.parametrize(("published", "name"), [("vit", "cls"), ("cait", "cait")])
def test_published_numbers(published, name):
    """The published formulas' output and gradients."""
    assert_published(published, name)


def attention(query, keys, values, heads):
    """Queries (B, 1, D) to keys and values (B, T, D): context (B, D), weights (B, h, T)."""
    query, keys, values = (t.unflatten(-1, (heads, -1)).transpose(1, 2) for t in (query, keys, values))
    weights = (query @ keys.transpose(2, 3) / query.shape[-1] ** 0.5).softmax(-1)
    return (weights @ values).transpose(1, 2).flatten(2)[:, 0], weights[:, :, 0]


def without_token(weights):
    return weights[:, :, 1:] / weights[:, :, 1:].sum(-1, keepdim=True)


def plain_cls(pool, x):
    tokens = torch.cat([pool.cls_token.expand(len(x), -1, -1), rows(x)], 1)
    query = pool.query_proj(tokens[:, :1])
    context, weights = attention(query, pool.key_proj(tokens), pool.value_proj(tokens), pool.heads)
    return context, without_token(weights)


def plain_cait(pool, x):
    (block,) = pool.blocks_token_only
    width = (x.shape[1],)
    norm = lambda t, layer, eps: F.layer_norm(t, width, layer.weight, layer.bias, eps)  # noqa: E731
    token = pool.cls_token.expand(len(x), -1, -1)
    tokens = norm(torch.cat([token, rows(x)], 1), block.norm1, 1e-6)
    query, keys, values = block.attn["q"](tokens[:, :1]), block.attn["k"](tokens), block.attn["v"](tokens)
    context, weights = attention(query, keys, values, pool.heads)
    token = token[:, 0] + block.gamma_1 * block.attn["proj"](context)
    hidden = block.mlp["fc1"](norm(token, block.norm2, 1e-6))
    hidden = hidden * 0.5 * (1 + torch.erf(hidden / 2**0.5))
    token = token + block.gamma_2 * block.mlp["fc2"](hidden)
    return norm(token, pool.norm, 1e-5), without_token(weights)


@pytest.mark.parametrize("heads", [1, 3])
@pytest.mark.parametrize(("make", "plain"), [(Cls, plain_cls), (Cait, plain_cait)])
def test_formula(make, plain, heads):
    """Folded keys and values give the plain attention's outputs, weights and gradients."""
    assert_equals_plain(fill_(make(6, heads=heads), 0.3), plain, tensor(1, (2, 6, 3, 5)))


def test_start():
    """cls starts at a token of zeros; cait at a small one, with branches that hardly count."""
    assert (Cls(16).cls_token == 0).all()
    pool = Cait(1024)
    assert 0.015 < pool.cls_token.std() < 0.025
    (block,) = pool.blocks_token_only
    assert (block.gamma_1 == 1e-5).all()
    assert (block.gamma_2 == 1e-5).all()
    torch.testing.assert_close(pool(tensor(1, (1, 4, 1024))), pool.norm(pool.cls_token[0]), rtol=0, atol=1e-3)


def test_weights_stay_a_distribution_if_the_token_wins():
    """Even if [CLS] attends to itself alone, its weights over the positions are still finite and sum to 1."""
    pool = fill_(Cls(16))
    pool.cls_token.data.fill_(30.0)
    with torch.no_grad():
        pool.key_proj.weight.copy_(1e3 * torch.eye(16))
        pool.query_proj.weight.copy_(torch.eye(16))
    _, weights = pool(tensor(1, (2, 9, 16)), return_attention=True)
    torch.testing.assert_close(weights.sum(-1), torch.ones(2, 4))
