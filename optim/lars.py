"""LARS, an optimizer for large batches."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor

from optim import devices
from optim.norms import tensor_norms
from optim.sharding import local, sharing_group


class LARS(torch.optim.Optimizer):
    """LARS (You et al. 2017) as the self-supervised literature uses it.

    For tensors that are not 1-D: d = grad + weight_decay · p, scaled by eta · ‖p‖ / ‖d‖ (1 where either norm is 0).
    For 1-D tensors d = grad. Then mu <- momentum · mu + d and p <- p - lr · mu.
    `weight_decay_filter` and `lars_adaptation_filter` take a parameter and say whether it is exempt, as in DINO's.
    """

    def __init__(
        self,
        params: Iterable[Any],
        lr: float = 0.0,
        weight_decay: float = 0.0,
        momentum: float = 0.9,
        eta: float = 0.001,
        weight_decay_filter: Callable[[Tensor], bool] | None = None,
        lars_adaptation_filter: Callable[[Tensor], bool] | None = None,
    ) -> None:
        defaults = {
            "lr": lr,
            "weight_decay": weight_decay,
            "momentum": momentum,
            "eta": eta,
            "weight_decay_filter": weight_decay_filter,
            "lars_adaptation_filter": lars_adaptation_filter,
        }
        super().__init__(params, defaults)

    @torch.no_grad()
    def step(self, closure: Callable[[], Tensor] | None = None) -> Tensor | None:
        """One step; nothing changes if `self.found_inf` is a non-zero tensor."""
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        found_inf: Tensor | None = getattr(self, "found_inf", None)
        if found_inf is not None and devices.on_cpu(found_inf):
            if found_inf.item():
                return loss
            found_inf = None
        for group in self.param_groups:
            parameters = [p for p in group["params"] if p.grad is not None]
            if parameters:
                self._step_group(group, parameters, found_inf)
        return loss

    def _step_group(self, group: dict[str, Any], parameters: list[Tensor], found_inf: Tensor | None) -> None:
        updates = [local(p.grad) for p in parameters]
        adapted = [i for i, p in enumerate(parameters) if p.ndim != 1]
        if adapted:
            scaled = _trust_scaled(group, [parameters[i] for i in adapted], [updates[i] for i in adapted])
            for i, update in zip(adapted, scaled, strict=True):
                updates[i] = update
        for p in parameters:
            if "mu" not in self.state[p]:
                self.state[p]["mu"] = torch.zeros_like(p)
        momenta = [local(self.state[p]["mu"]) for p in parameters]
        parameters = [local(p) for p in parameters]
        if found_inf is None:
            torch._foreach_mul_(momenta, group["momentum"])
            torch._foreach_add_(momenta, updates)
            torch._foreach_add_(parameters, momenta, alpha=-group["lr"])
            return
        skip = found_inf.bool()
        for p, mu, update in zip(parameters, momenta, updates, strict=True):
            mu.copy_(torch.where(skip, mu, mu * group["momentum"] + update))
            p.add_(torch.where(skip, torch.zeros_like(mu), mu), alpha=-group["lr"])


def _trust_scaled(group: dict[str, Any], parameters: list[Tensor], gradients: list[Tensor]) -> list[Tensor]:
    """Gradient plus weight decay, scaled to eta times the parameter's norm; slices if the parameters are sharded."""
    decayed, adapted = group["weight_decay_filter"], group["lars_adaptation_filter"]
    decay = [0.0 if decayed is not None and decayed(p) else group["weight_decay"] for p in parameters]
    updates = torch._foreach_mul([local(p) for p in parameters], decay)
    torch._foreach_add_(updates, gradients)
    group_of_shards = sharing_group(parameters)
    p_norms = tensor_norms([local(p) for p in parameters], group_of_shards)
    u_norms = tensor_norms(updates, group_of_shards)
    ratio = torch.where((p_norms > 0) & (u_norms > 0), group["eta"] * p_norms / u_norms, torch.ones_like(p_norms))
    for p, update, scale in zip(parameters, updates, ratio, strict=True):
        if adapted is None or not adapted(p):
            update.mul_(scale)
    return updates
