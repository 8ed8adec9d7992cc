"""What the tests of the operators share: published numbers, filled modules, and the comparison with a plain formula."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from poolings.choose import POOLINGS, build_pooling
from tests.reference import GOLDEN_DIR, assert_close, fill_, tensor

# In place of defaults that are unhandy in tests.
SETTINGS = {"how": {"width": 24}, "simpool": {"gamma": 2.0}, "slot": {"eval_seed": 1}}
NAMES = tuple(POOLINGS)


@functools.cache
def _published() -> dict[str, Any]:
    return torch.load(GOLDEN_DIR / "poolings.pt", weights_only=True)


def published_names() -> set[str]:
    """Every NAME of the published numbers pool/NAME_7x7."""
    return {key.removeprefix("pool/").removesuffix("_7x7") for key in _published()}


def assert_published(published_name: str, name: str, **settings: Any) -> None:
    """The operator has the published parameters, output, input gradient and norms of the parameters' gradients."""
    case = _published()[f"pool/{published_name}_7x7"]
    holder = nn.ModuleDict({"pool": build_pooling(name, 64, **settings)}).eval()
    holder.load_state_dict(case["state"], strict=True)
    x = case["x"].clone().requires_grad_()
    torch.manual_seed(11)  # slot draws
    y = holder["pool"](x)
    assert y.shape == (len(x), holder["pool"].num_features)
    assert_close(y.detach(), case["y"], what="output")
    (y * tensor(63, y.shape)).sum().backward()
    assert_close(x.grad, case["grad_x"], rel=1e-4, what="gradient")
    norms = {key: parameter.grad.norm() for key, parameter in holder.named_parameters()}
    assert norms.keys() == case["grads"].keys()
    for key, norm in norms.items():
        torch.testing.assert_close(norm, case["grads"][key], rtol=1e-4, atol=1e-4 if norm < 1e-4 else 0, msg=key)


@functools.cache
def _probes() -> dict[str, Any]:
    return torch.load(GOLDEN_DIR / "probes.pt", weights_only=True)


def published_probes() -> set[str]:
    """Every NAME of the published numbers probe/NAME_49."""
    names = {key.removeprefix("probe/").removesuffix("_49") for key in _probes()}
    return names - {"parameters_768"}


def probe_parameters() -> dict[str, int]:
    """Published numbers of parameters at width 768, by name."""
    return _probes()["probe/parameters_768"]


def assert_published_probe(published_name: str, name: str, training: bool = False, **settings: Any) -> None:
    """The probe has the published state, number of parameters, output and input gradient."""
    case = _probes()[f"probe/{published_name}_49"]
    pool = build_pooling(name, 64, **settings).train(training)
    pool.load_state_dict(case["state"], strict=True)
    assert sum(parameter.numel() for parameter in pool.parameters()) == case["parameters"]
    x = case["x"].clone().requires_grad_()
    y = pool(x)
    assert y.shape == (len(x), pool.num_features)
    assert_close(y.detach(), case["y"], what="output")
    (y * tensor(83, y.shape)).sum().backward()
    assert_close(x.grad, case["grad_x"], rel=1e-4, what="gradient")


def build(name: str, dim: int = 16, **settings: Any) -> nn.Module:
    """The operator in eval mode, its weights filled from their names, so that none rests at a special value."""
    return fill_(build_pooling(name, dim, **{**SETTINGS.get(name, {}), **settings}), scale=0.3).eval()


def assert_equals_plain(pool: nn.Module, plain: Callable[..., tuple[Tensor, ...]], x: Tensor) -> None:
    """In float64 the operator gives plain(pool, map)'s output, weights if it has some, and all gradients.

    Both differ by rounding only: 1e-9 is some thousand roundings of float64 after the softmaxes.
    """
    pool, x = pool.double(), x.double().requires_grad_()
    inputs = [x, *(parameter for parameter in pool.parameters() if parameter.requires_grad)]
    wanted = plain(pool, x)
    actual = pool(x, return_attention=True) if len(wanted) == 2 else (pool(x),)
    results = []
    for outputs in (actual, wanted):
        total = sum((output * tensor(7 + i, output.shape)).sum() for i, output in enumerate(outputs))
        results.append([*outputs, *torch.autograd.grad(total, inputs)])
    for one, other in zip(*results, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-9, atol=1e-9)


def rows(x: Tensor) -> Tensor:
    """A map (B, D, H, W) as (B, N, D)."""
    return x.flatten(2).transpose(1, 2)
