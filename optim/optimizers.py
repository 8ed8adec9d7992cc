"""Optimisation as DINO does it: parameter groups, LARS, clipping per parameter, schedules per iteration.

A step whose loss or gradients are not finite changes nothing. The optimizers learn of it through `found_inf`, a 0-d
float tensor on the parameters' device (the protocol of torch's fused optimizers, which LARS here follows), so that a
GPU need not report to the host in between.
"""

from __future__ import annotations

from typing import Any

import torch

from optim.lars import LARS

OPTIMIZERS = ("adamw", "sgd", "lars")


def build_optimizer(name: str, groups: list[dict[str, Any]]) -> torch.optim.Optimizer:
    """AdamW, SGD with momentum .9, or LARS; learning rate and weight decay are set at every step by the schedules.

    Raises ValueError for another name.
    """
    if name == "adamw":
        return torch.optim.AdamW(groups, fused=True)
    if name == "sgd":
        return _sgd(groups)
    if name == "lars":
        return LARS(groups)
    raise ValueError(f"unknown optimizer {name!r}; choose {', '.join(OPTIMIZERS)}")


def _sgd(groups: list[dict[str, Any]]) -> torch.optim.SGD:
    """SGD with momentum .9 whose momenta are zeros from the start.

    torch's fused SGD allocates them in the first step and leaves them unset where that step is refused (found_inf):
    what lay in that memory, NaN at times, would enter the next step.
    """
    sgd = torch.optim.SGD(groups, lr=0.0, momentum=0.9, fused=True)
    for group in sgd.param_groups:
        for parameter in group["params"]:
            sgd.state[parameter]["momentum_buffer"] = torch.zeros_like(parameter)
    return sgd
