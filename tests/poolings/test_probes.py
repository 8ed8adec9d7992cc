"""Attentive probes: the published numbers, the formulas with keys and values of all positions, and the interface."""

import re
from pathlib import Path

import pytest
import torch
from torch.nn import functional as F

from pooled_backbone import MODES
from poolings.base import PROBES_WITH_ATTENTION
from poolings.choose import POOLINGS, PROBES, build_pooling
from poolings.probes import Aim, Cae, Capi, Coca, VJepa
from tests.poolings.operators import (
    assert_equals_plain,
    assert_published_probe,
    build,
    probe_parameters,
    published_probes,
    rows,
)
from tests.reference import fill_, tensor

PUBLISHED = {
    "aim": ("aim", {"heads": 4}), "cae": ("cae", {"heads": 4}), "coca": ("coca", {"queries": 5}),
    "vjepa": ("vjepa", {"heads": 4}), "capi": ("capi", {"classes": 10}),
}  # fmt: skip
SMALL = {**dict(PUBLISHED.values()), "ep": {"queries": 8}, "ep_all": {"queries": 8}}
HEADS = {"ep": 8, "ep_all": 8, "abmilp": 1, "aim": 4, "cae": 4, "coca": 8, "vjepa": 4, "capi": 1}
NAMES = tuple(PROBES)


def small(name):
    """The probe at width 64 in eval mode, with filled weights."""
    return build(name, 64, **SMALL.get(name, {}))


@pytest.mark.parametrize("published", PUBLISHED)
def test_published_numbers(published):
    """The published formulas' names, numbers of parameters, outputs and gradients; aim by its batch's statistics."""
    name, settings = PUBLISHED[published]
    assert_published_probe(published, name, training=name == "aim", **settings)


def test_every_published_probe_is_held():
    """No published number is left out (those of abmilp and ep are in their own files)."""
    assert published_probes() == {*PUBLISHED, "abmilp", "ep", "ep_d2"}


def test_numbers_of_parameters():
    """At width 768 and the default settings each has as many parameters as published."""
    published = probe_parameters()
    assert published.keys() == PROBES.keys() - {"ep_all"}
    counts = {name: sum(p.numel() for p in build_pooling(name, 768).parameters()) for name in published}
    assert counts == published


def test_the_documented_example_runs():
    """The code of docs/poolings.md gives what its comments say."""
    section = (Path(__file__).resolve().parents[2] / "docs" / "poolings.md").read_text().partition("## Attentive")[2]
    found = {"tokens": tensor(1, (2, 9, 768))}
    exec(re.search(r"```python\n(.*?)```", section, re.DOTALL)[1], found)
    assert found["logits"].shape == (2, 1000)
    assert found["feature"].shape == (2, 768)
    assert found["attention"].shape == (2, 32, 9)


def attention(query, keys, values, heads):
    """Query (D,), keys and values (B, N, K): context (B, K), weights (B, h, N)."""
    query, keys, values = (t.unflatten(-1, (heads, -1)).transpose(-3, -2) for t in (query[None], keys, values))
    weights = (query @ keys.transpose(2, 3) / query.shape[-1] ** 0.5).softmax(-1)
    return (weights @ values).transpose(1, 2).flatten(1), weights[:, :, 0]


def norm(x, weight=None, bias=None):
    return F.layer_norm(x, x.shape[-1:], weight, bias, 1e-5)


def plain_aim(pool, x):
    x = rows(x)
    mean, var = x.mean((0, 1)), x.var((0, 1), correction=0)
    if not pool.training:
        mean, var = pool.bn.running_mean, pool.bn.running_var
    x = (x - mean) / (var + 1e-6).sqrt()
    return attention(pool.cls_token[0, 0], pool.k(x), pool.v(x), pool.heads)


def plain_cae(pool, x):
    x, attn = rows(x), pool.cross_attn
    normed = lambda t, layer: norm(t, layer.weight, layer.bias)  # noqa: E731
    keys, values = attn["k"](normed(x, pool.norm1_k)), attn["v"](normed(x, pool.norm1_v))
    query = attn["q"](normed(pool.query_token[0, 0], pool.norm1_q))
    context, weights = attention(query, keys, values, pool.heads)
    return attn["proj"](context), weights


def plain_coca(pool, x):
    x = rows(x)
    query = pool.to_q(norm(pool.img_queries, pool.norm.gamma, pool.norm.beta))  # of all queries
    keys, values = pool.to_kv(x).chunk(2, -1)
    query = query.unflatten(-1, (pool.heads, 64))
    weights = torch.einsum("qhd,bnd->bqhn", query / 8, keys).softmax(-1)
    output = pool.to_out(torch.einsum("bqhn,bnd->bqhd", weights, values).flatten(2))
    return output[:, 0], weights[:, 0]


def plain_vjepa(pool, x):
    block, query = pool.cross_attention_block, pool.query_tokens[0, 0]
    keys, values = block.xattn["kv"](norm(rows(x), block.norm1.weight, block.norm1.bias)).chunk(2, -1)
    context, weights = attention(block.xattn["q"](query), keys, values, block.heads)
    query = query + block.xattn["proj"](context)
    hidden = block.mlp["fc1"](norm(query, block.norm2.weight, block.norm2.bias))
    hidden = hidden * 0.5 * (1 + torch.erf(hidden / 2**0.5))
    return query + block.mlp["fc2"](hidden), weights


def plain_capi(pool, x):
    keys, values = pool.kv(rows(x)).chunk(2, -1)
    context, weights = attention(pool.query_token, keys, values, x.shape[1] // 64)
    return pool.linear(context), weights


@pytest.mark.parametrize(
    ("make", "plain", "dim", "settings"),
    [
        (Aim, plain_aim, 6, {"heads": 1}),
        (Aim, plain_aim, 6, {"heads": 3}), (Cae, plain_cae, 6, {"heads": 3}),
        (Coca, plain_coca, 6, {"queries": 3}), (Coca, plain_coca, 6, {"queries": 1, "heads": 2}),
        (VJepa, plain_vjepa, 6, {"heads": 3}), (Capi, plain_capi, 128, {"classes": 5}),
    ],
)  # fmt: skip
@pytest.mark.parametrize("training", [False, True])
def test_formula(make, plain, dim, settings, training):
    """Folded queries give the plain attention's outputs, weights and gradients, in training and evaluation."""
    pool = fill_(make(dim, **settings), 0.3).train(training)
    assert_equals_plain(pool, plain, tensor(1, (2, dim, 3, 5)))


def test_aim_gathers_statistics_over_images_and_positions():
    """After a step its running mean is a tenth of the way from 0 to the mean over batch and tokens."""
    pool, x = Aim(8, heads=2), tensor(1, (3, 5, 8)) + 4
    pool(x)
    torch.testing.assert_close(pool.bn.running_mean, 0.1 * x.mean((0, 1)))


def test_starts():
    """Queries start as published: small and random; cae's and every shift at zeros."""
    for query in (Aim(1024).cls_token, VJepa(1024).query_tokens, Capi(1024).query_token):
        assert 0.018 < query.std() < 0.022
    assert (Cae(16).query_token == 0).all()
    assert (Coca(16).norm.beta == 0).all()
    assert (Coca(16).norm.gamma == 1).all()
    assert (VJepa(16).cross_attention_block.xattn["kv"].bias == 0).all()


def test_only_the_first_query_of_coca_matters():
    """Other queries may be anything, and their gradients are zeros."""
    pool, x = small("coca"), tensor(1, (2, 9, 64))
    before = pool(x)
    before.sum().backward()
    assert pool.img_queries.grad[0].any()
    assert not pool.img_queries.grad[1:].any()
    with torch.no_grad():
        pool.img_queries[1:] = 7
    assert torch.equal(pool(x), before)


def test_probes_are_no_operators_of_backbones():
    """They are in a dictionary apart and no mode; all have weights, and ep_all alone asks for [CLS]."""
    assert list(PROBES) == ["ep", "ep_all", "abmilp", "aim", "cae", "coca", "vjepa", "capi"]
    assert not PROBES.keys() & {*POOLINGS, *MODES}
    assert tuple(PROBES) == PROBES_WITH_ATTENTION
    assert [name for name in (*POOLINGS, *PROBES) if build_pooling(name, 64).takes_cls] == ["ep_all"]


@pytest.mark.parametrize("name", NAMES)
def test_interface(name):
    """(B, num_features) for any batch, and (B, heads, N) distributions; positions may come as tokens or a map."""
    pool, image = small(name), tensor(1, (3, 64, 3, 5))
    pooled, weights = pool(image, return_attention=True)
    assert pooled.shape == (3, pool.num_features)
    assert weights.shape == (3, HEADS[name], 15)
    assert (weights >= 0).all()
    torch.testing.assert_close(weights.sum(-1), torch.ones(3, HEADS[name]))
    torch.testing.assert_close(pool(rows(image).contiguous(), grid=(3, 5)), pooled, rtol=1e-5, atol=1e-5)
    assert pool(image[:0]).shape == (0, pool.num_features)
    alone = torch.cat([pool(one[None]) for one in image])
    torch.testing.assert_close(alone, pooled, rtol=1e-5, atol=1e-5)
    assert f"dim={64}" in str(pool)


@pytest.mark.parametrize("name", NAMES)
def test_order_of_positions(name):
    """The order of positions does not matter; the weights follow it."""
    pool, x = small(name), tensor(1, (2, 16, 64))
    order = torch.randperm(16, generator=torch.Generator().manual_seed(3))
    (before, weights), (after, moved) = pool(x, return_attention=True), pool(x[:, order], return_attention=True)
    torch.testing.assert_close(before, after, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(weights[..., order], moved, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("training", [False, True])
def test_every_trained_parameter_gets_a_gradient(name, training):
    """Only cae's unused norm is left out, and it is frozen, so that DistributedDataParallel accepts the probe."""
    pool, x = small(name).train(training), tensor(1, (3, 64, 4, 4)).requires_grad_()
    pool(x).square().sum().backward()
    frozen = {key for key, parameter in pool.named_parameters() if not parameter.requires_grad}
    assert frozen == ({"norm2_cross.weight", "norm2_cross.bias"} if name == "cae" else set())
    for key, parameter in pool.named_parameters():
        assert (parameter.grad is None) == (key in frozen), key
        assert key in frozen or parameter.grad.isfinite().all(), key
    assert (x.grad.flatten(1).norm(dim=1) > 0).all()


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_autocast_does_not_change_the_numbers(name, dtype):
    """Under autocast the output is bitwise float32's; features of half precision are pooled to their dtype."""
    pool, x = small(name), tensor(1, (2, 64, 4, 4))
    expected = pool(x)
    with torch.autocast("cpu", dtype=dtype):
        assert torch.equal(pool(x), expected)
        half = (30 * x).to(dtype).requires_grad_()
        pooled = pool(half)
        assert pooled.dtype == dtype
        pooled.float().sum().backward()
    assert half.grad.isfinite().all()
    assert small(name).bfloat16()(x.bfloat16()).isfinite().all()


@pytest.mark.parametrize(
    ("name", "settings", "message"),
    [
        ("ep", {"queries": 7}, "ep: width 64 is not divisible into 7 queries; choose queries that divides it"),
        ("ep", {"queries": 64, "d_out": 2}, "ep: width 32 is not divisible into 64 queries"),
        ("ep_all", {"queries": 7}, "ep_all: width 64 is not divisible into 7 queries"),
        ("ep", {"queries": 0}, "ep: queries must be an integer of at least 1, got 0"),
        ("ep", {"queries": "8"}, "ep: queries must be an integer of at least 1, got '8'"),
        ("ep", {"d_out": 3}, "ep: width 64 is not divisible by d_out 3"),
        ("ep", {"d_out": 0}, "ep: d_out must be an integer of at least 1, got 0"),
        ("ep", {"query": 8}, "ep has no setting 'query' .did you mean queries.*it has queries, d_out"),
        ("abmilp", {"self_atention": True}, "did you mean self_attention"),
        ("aim", {"heads": 5}, "aim: width 64 is not divisible into 5 heads"),
        ("cae", {"heads": 5}, "cae: width 64 is not divisible into 5 heads"),
        ("vjepa", {"heads": 0}, "vjepa: heads must be an integer of at least 1, got 0"),
        ("coca", {"queries": 0}, "coca: queries must be an integer of at least 1, got 0"),
        ("coca", {"heads": 0}, "coca: heads must be an integer of at least 1, got 0"),
        ("capi", {"classes": 0}, "capi: classes must be an integer of at least 1, got 0"),
        ("vjepa", {"gamma": 2.0}, "vjepa has no gamma"),
    ],
)
def test_settings_that_cannot_work(name, settings, message):
    """Each is refused when the probe is built, by name and value."""
    with pytest.raises(ValueError, match=message):
        build_pooling(name, 64, **settings)


@pytest.mark.parametrize("dim", [32, 96, 1000])
def test_capi_needs_heads_of_64(dim):
    """A width that 64 does not divide is refused."""
    with pytest.raises(ValueError, match=f"capi: width {dim} is not divisible into heads of 64; choose"):
        build_pooling("capi", dim)


@pytest.mark.parametrize("name", NAMES)
def test_widths_and_inputs_that_do_not_fit(name):
    """Width 0, and input of another rank or width, are refused with the probe's name."""
    with pytest.raises(ValueError, match=f"^{name}: dim must be an integer of at least 1, got 0"):
        build_pooling(name, 0)
    for shape in ((2, 64), (2, 9, 63), (2, 63, 3, 3), (2, 0, 64)):
        with pytest.raises(ValueError, match=f"^{name} "):
            small(name)(torch.zeros(shape))
