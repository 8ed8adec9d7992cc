"""Squeeze-and-excitation, gather-excite, CBAM."""

import pytest
import torch
from torch.nn import functional as F

from poolings.gates import Bottleneck, Cbam, GatherExcite, Se
from tests.poolings.operators import assert_equals_plain, assert_published, build
from tests.reference import fill_, tensor

GRIDS = [(3, 5), (4, 4), (1, 2), (8, 3)]


@pytest.mark.parametrize(("name", "settings"), [("se", {}), ("ge", {}), ("cbam", {"flatten": True})])
def test_published_numbers(name, settings):
    """The published code's output and gradients; CBAM's is the gated map, flattened."""
    assert_published(name, name, **settings)


def mlp(layers, x):
    """A bottleneck on vectors (B, D)."""
    hidden = F.linear(x, layers.fc1.weight[:, :, 0, 0], layers.fc1.bias).clamp(min=0)
    return F.linear(hidden, layers.fc2.weight[:, :, 0, 0], layers.fc2.bias)


def plain_se(pool, x):
    gate = torch.sigmoid(mlp(pool.ge["mlp"], x.mean((2, 3))))[..., None, None]
    return (F.relu(x * gate + x).mean((2, 3)),)


def plain_cbam(pool, x):
    gate = torch.sigmoid(mlp(pool.channel, x.mean((2, 3))) + mlp(pool.channel, x.amax((2, 3))))
    x = x * gate[..., None, None]
    summary = F.pad(torch.stack([x.mean(1), x.max(1).values], 1), (3, 3, 3, 3))
    kernel, norm = pool.spatial["conv"]["conv"].weight[0], pool.spatial["conv"]["bn"]
    height, width = x.shape[2:]
    logits = torch.stack(
        [(summary[:, :, i : i + 7, j : j + 7] * kernel).sum((1, 2, 3)) for i in range(height) for j in range(width)], 1
    )
    logits = (logits - norm.running_mean) / (norm.running_var + 1e-5).sqrt() * norm.weight + norm.bias
    gate = torch.sigmoid(logits)  # (B, N)
    return (x.flatten(2) * gate.unsqueeze(1)).mean(2), gate.unsqueeze(1)


def plain_ge(pool, x):
    """Each position asks the small map at its own row and column, scaled down and cut."""
    height, width = x.shape[2:]
    small = x
    for i in range(1, 1 + sum(name.startswith("conv") for name, _ in pool.ge["gather"].named_children())):
        small = small if i == 1 else F.relu(small)
        kernel, norm = (pool.ge["gather"].get_submodule(f"{kind}{i}") for kind in ("conv", "norm"))
        small = F.conv2d(small, kernel.weight, stride=2, padding=1, groups=x.shape[1])
        scale = (norm.weight / (norm.running_var + 1e-5).sqrt())[:, None, None]
        small = (small - norm.running_mean[:, None, None]) * scale + norm.bias[:, None, None]
    total = 0
    for row in range(height):
        for column in range(width):
            source = small[:, :, row * small.shape[2] // height, column * small.shape[3] // width]
            here = x[:, :, row, column]
            total = total + F.relu(here * torch.sigmoid(mlp(pool.ge["mlp"], source)) + here)
    return (total / (height * width),)


@pytest.mark.parametrize("grid", GRIDS)
@pytest.mark.parametrize(
    ("make", "plain"),
    [
        (lambda: Se(6, reduction=2), plain_se),
        (lambda: Cbam(6, reduction=2), plain_cbam),
        (lambda: GatherExcite(6, reduction=2), plain_ge),
        (lambda: GatherExcite(6, extent=4, reduction=2), plain_ge),
    ],
)
def test_formula(make, plain, grid):
    """On any grid outputs, weights and all gradients are the plain formula's."""
    assert_equals_plain(fill_(make(), 0.3).eval(), plain, tensor(1, (2, 6, *grid)))


@pytest.mark.parametrize(("dim", "reduction", "narrow"), [(64, 16, 4), (24, 16, 2), (23, 16, 1), (7, 16, 1), (6, 1, 6)])
def test_bottleneck_width(dim, reduction, narrow):
    """D / reduction to the nearest integer, halves up, and at least one."""
    layers = Bottleneck(dim, reduction, bias=False)
    assert layers.fc1.weight.shape == (narrow, dim, 1, 1)
    assert layers.fc2.weight.shape == (dim, narrow, 1, 1)
    assert layers.fc1.bias is None


def test_flattened_cbam():
    """flatten returns the gated map whose mean is the default's feature, and refuses a map of another size."""
    x = tensor(1, (2, 16, 3, 5))
    pool, flat = build("cbam"), build("cbam", flatten=True, map_size=[3, 5])
    assert flat.num_features == 16 * 15
    torch.testing.assert_close(flat(x).unflatten(1, (16, 15)).mean(2), pool(x))
    with pytest.raises(ValueError, match=r"cbam: flatten=True was built for maps of \(3, 5\), got \(4, 4\)"):
        flat(tensor(1, (2, 16, 4, 4)))
    published = build("cbam", flatten=True)
    assert published.num_features == 16 * 49
    torch.testing.assert_close(published(x), flat(x))


@pytest.mark.parametrize("make", [lambda: Cbam(6), lambda: GatherExcite(6)])
def test_batch_statistics_are_kept(make):
    """In training BatchNorm's running statistics move; in evaluation they stay."""
    pool, x = make(), tensor(1, (4, 6, 5, 5))
    before = {key: value.clone() for key, value in pool.state_dict().items() if "running" in key}
    pool.eval()(x)
    assert all(torch.equal(pool.state_dict()[key], value) for key, value in before.items())
    pool.train()(x)
    assert not any(torch.equal(pool.state_dict()[key], value) for key, value in before.items())
