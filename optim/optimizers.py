"""The optimizers: AdamW, SGD with and without Nesterov's momentum, and LARS, all of which can skip a step.

A step whose loss or gradients are not finite changes nothing. The optimizers learn of it through `found_inf`, a 0-d
float tensor on the parameters' device (the protocol of torch's fused optimizers, which our LARS follows), so that a GPU
does not have to synchronize with the host.
"""

from __future__ import annotations

from typing import Any

import torch

from optim.lars import LARS

OPTIMIZERS = ("adamw", "sgd", "lars", "nesterov")


def build_optimizer(name: str, groups: list[dict[str, Any]]) -> torch.optim.Optimizer:
    """AdamW, SGD with momentum .9 (plain or Nesterov's), or LARS.

    The schedules set learning rate and weight decay at every step. Raises ValueError for any other name.
    """
    if name == "adamw":
        return torch.optim.AdamW(groups, fused=True)
    if name in ("sgd", "nesterov"):
        return _sgd(groups, nesterov=name == "nesterov")
    if name == "lars":
        return LARS(groups)
    raise ValueError(f"unknown optimizer {name!r}; choose {', '.join(OPTIMIZERS)}")


def _sgd(groups: list[dict[str, Any]], nesterov: bool) -> torch.optim.SGD:
    """SGD with momentum .9 whose momenta start as zeros.

    torch's fused SGD allocates them in the first step and, if that step is refused (found_inf), leaves them
    uninitialised, so that whatever the memory held, sometimes NaN, would enter the next step.
    """
    sgd = torch.optim.SGD(groups, lr=0.0, momentum=0.9, nesterov=nesterov, fused=True)
    for group in sgd.param_groups:
        for parameter in group["params"]:
            sgd.state[parameter]["momentum_buffer"] = torch.zeros_like(parameter)
    return sgd
