"""The interface that all operators share: layouts, precision, weights over positions, gradients."""

import pytest
import torch

from poolings.base import WITH_ATTENTION
from poolings.choose import POOLINGS, build_pooling
from tests.poolings.operators import NAMES, SETTINGS, build
from tests.reference import fill_, tensor

UNORDERED = ("gap", "max", "avgmax", "gem", "lse", "otk", "slot", "se", "cls", "cait", "simpool")
DISTRIBUTIONS = ("otk", "kmeans", "slot", "cls", "cait", "simpool")


def weights(pool, x, **kwargs):
    """The output, with the weights if there are some."""
    return pool(x, return_attention=True, **kwargs) if pool.name in WITH_ATTENTION else (pool(x, **kwargs),)


@pytest.mark.parametrize("name", NAMES)
def test_interface(name):
    """num_features is the width of what comes out, for any batch; no images give no features."""
    pool = build(name)
    assert isinstance(pool.num_features, int)
    assert pool.needs_map == (name in ("how", "cbam", "ge"))
    for batch in (0, 1, 3):
        assert pool(tensor(1, (batch, 16, 3, 5))).shape == (batch, pool.num_features)
    assert str(pool)


@pytest.mark.parametrize("name", NAMES)
def test_tokens_and_maps_agree(name):
    """A map, the same map in channels-last memory, and its tokens are pooled alike."""
    pool, image = build(name), tensor(1, (2, 16, 3, 5))
    tokens = image.flatten(2).transpose(1, 2).contiguous()
    expected = weights(pool, image)
    others = (weights(pool, image.to(memory_format=torch.channels_last)), weights(pool, tokens, grid=(3, 5)))
    for actual in others:
        for one, other in zip(actual, expected, strict=True):
            torch.testing.assert_close(one, other, rtol=1e-5, atol=1e-6)
    square = tokens[:, :9]
    torch.testing.assert_close(pool(square), pool(square, grid=(3, 3)), rtol=0, atol=0)


@pytest.mark.parametrize("name", NAMES)
def test_an_image_is_pooled_alike_in_any_batch(name):
    """In evaluation each image alone gives (1, D') with the numbers it has in a batch."""
    pool, images = build(name), tensor(1, (3, 16, 4, 4))
    images[1:] *= 50
    alone = torch.cat([pool(image[None]) for image in images])
    torch.testing.assert_close(alone, pool(images), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("name", NAMES)
def test_weights_over_positions(name):
    """(B, h, N) and not negative; distributions sum to 1, how's and cbam's do not; the others say who has some."""
    pool, x = build(name), tensor(1, (2, 16, 3, 5))
    if name not in WITH_ATTENTION:
        with pytest.raises(ValueError, match=f"^{name} has no weights.*{'.*'.join(WITH_ATTENTION)}"):
            pool(x, return_attention=True)
        return
    pooled, attention = pool(x, return_attention=True)
    assert torch.equal(pooled, pool(x))
    heads = {"kmeans": 3, "cls": 4, "cait": 4}.get(name, 1)
    assert attention.shape == (2, heads, 15)
    assert (attention >= 0).all()
    sums = attention.sum(-1)
    assert torch.allclose(sums, torch.ones_like(sums), rtol=1e-5) == (name in DISTRIBUTIONS)


@pytest.mark.parametrize("name", NAMES)
def test_order_of_positions(name):
    """Without neighbours (and k-means' drawn start) the order of positions does not matter; the weights follow it."""
    pool, x = build(name), tensor(1, (2, 16, 16))
    order = torch.randperm(16, generator=torch.Generator().manual_seed(3))
    before, after = weights(pool, x), weights(pool, x[:, order])
    same = torch.allclose(before[0], after[0], rtol=1e-4, atol=1e-5)
    assert same == (name in UNORDERED)
    if same and len(before) == 2:
        torch.testing.assert_close(before[1][..., order], after[1], rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("training", [False, True])
def test_every_parameter_and_every_image_get_gradients(name, training):
    """No parameter is left without a gradient, which DistributedDataParallel would refuse."""
    pool, x = build(name).train(training), tensor(1, (3, 16, 4, 4)).requires_grad_()
    pool(x).square().sum().backward()
    for key, parameter in pool.named_parameters():
        assert parameter.grad is not None, key
        assert parameter.grad.isfinite().all(), key
    assert (x.grad.flatten(1).norm(dim=1) > 0).all()


@pytest.mark.parametrize("name", NAMES)
def test_gradcheck(name):
    """Numerical differentiation in float64 confirms input and parameter gradients."""
    pool = build(name, dim=4, **({"width": 3} if name == "how" else {})).double()
    x = tensor(8, (2, 4, 3, 2)).double().abs().requires_grad_()  # gem has kinks at 0
    parameters = dict(pool.named_parameters())

    def run(x, *values):
        with_values = {**dict(pool.named_buffers()), **dict(zip(parameters, values, strict=True))}
        return torch.func.functional_call(pool, with_values, (x,))

    assert torch.autograd.gradcheck(
        run, (x, *(p.detach().requires_grad_() for p in parameters.values())), fast_mode=True
    )


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_autocast_does_not_change_the_numbers(name, dtype):
    """Under autocast output and weights are bitwise float32's, and the gradients of half-precision input are finite."""
    pool, x = build(name), tensor(1, (2, 16, 4, 4))
    expected = weights(pool, x)
    with torch.autocast("cpu", dtype=dtype):
        for one, other in zip(weights(pool, x), expected, strict=True):
            assert torch.equal(one, other)
        half = (30 * x).to(dtype)
        half[:, :, 0] = 0  # a row of dead positions
        half[:, :4] = 0  # dead channels
        half.requires_grad_()
        pooled = pool(half)
        assert pooled.dtype == dtype
        pooled.float().sum().backward()
    assert half.grad.isfinite().all()
    assert all(parameter.grad.isfinite().all() for parameter in pool.parameters())


@pytest.mark.parametrize("name", NAMES)
def test_a_module_in_half_precision(name):
    """A model converted to bfloat16 pools bfloat16 features."""
    pool, x = build(name).bfloat16(), tensor(1, (2, 16, 4, 4)).bfloat16()
    assert pool(x).dtype == torch.bfloat16
    assert pool(x).isfinite().all()


@pytest.mark.parametrize("name", NAMES)
def test_state_dict_round_trip(name):
    """Another operator that loads the state pools alike."""
    settings = SETTINGS.get(name, {})
    first, second = (fill_(build_pooling(name, 16, **settings).eval(), scale) for scale in (0.3, 0.1))
    second.load_state_dict(first.state_dict(), strict=True)
    x = tensor(1, (2, 16, 4, 4))
    assert torch.equal(first(x), second(x))


@pytest.mark.parametrize("name", NAMES)
def test_training_mode(name):
    """A batch of one can be trained on; only slot draws, and what it draws is torch's generator's."""
    pool, x = build(name).train(), tensor(1, (1, 16, 4, 4))
    results = []
    for seed in (1, 1, 2):
        torch.manual_seed(seed)
        results.append(pool(x))
    assert torch.equal(results[0], results[1])
    assert torch.equal(results[0], results[2]) == (name != "slot")


@pytest.mark.parametrize("name", NAMES)
def test_input_that_does_not_fit(name):
    """Another rank or width is refused with the operator's name."""
    pool = build(name)
    for shape in ((2, 16), (2, 9, 15), (2, 15, 3, 3), (2, 0, 16)):
        with pytest.raises(ValueError, match=name if name != "simpool" else "(?i)simpool"):
            pool(torch.zeros(shape))
    with pytest.raises(ValueError, match="9 positions, but there are 10 tokens"):
        pool(torch.zeros(2, 10, 16), grid=(3, 3))


def test_who_needs_a_map_asks_for_the_grid():
    """Tokens that form no square are refused by these operators alone."""
    for name in POOLINGS:
        pool = build(name)
        if pool.needs_map:
            with pytest.raises(ValueError, match=f"^{name} needs a map, and 10 tokens form no square: pass grid="):
                pool(torch.zeros(2, 10, 16))
        else:
            assert pool(torch.zeros(2, 10, 16)).shape == (2, 16)
