"""Optimisation as DINO does it: parameter groups, LARS, clipping per parameter, schedules per iteration.

A step whose loss or gradients are not finite changes nothing. The optimizers learn of it through `found_inf`, a 0-d
float tensor on the parameters' device (the protocol of torch's fused optimizers, which LARS here follows), so that a
GPU need not report to the host in between.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor, nn

from distill.sharding import local, sharing_group

OPTIMIZERS = ("adamw", "sgd", "lars")


def get_params_groups(model: nn.Module) -> list[dict[str, Any]]:
    """Two groups: what is regularised, and what is not (names ending in `.bias`, and 1-D parameters)."""
    regularised, not_regularised = [], []
    for name, parameter in model.named_parameters():
        if not parameter.requires_grad:
            continue
        no_decay = name.endswith(".bias") or parameter.ndim == 1
        (not_regularised if no_decay else regularised).append(parameter)
    return [{"params": regularised}, {"params": not_regularised, "weight_decay": 0.0}]


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
        """One step; nothing changes where `self.found_inf` is set to a non-zero tensor."""
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        found_inf: Tensor | None = getattr(self, "found_inf", None)
        if found_inf is not None and found_inf.device.type == "cpu":
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
    """Gradient plus weight decay, scaled to eta times the parameter's norm; slices where the parameters are sharded."""
    decayed, adapted = group["weight_decay_filter"], group["lars_adaptation_filter"]
    decay = [0.0 if decayed is not None and decayed(p) else group["weight_decay"] for p in parameters]
    updates = torch._foreach_mul([local(p) for p in parameters], decay)
    torch._foreach_add_(updates, gradients)
    group_of_shards = sharing_group(parameters)
    p_norms = _norms([local(p) for p in parameters], group_of_shards)
    u_norms = _norms(updates, group_of_shards)
    ratio = torch.where((p_norms > 0) & (u_norms > 0), group["eta"] * p_norms / u_norms, torch.ones_like(p_norms))
    for p, update, scale in zip(parameters, updates, ratio, strict=True):
        if adapted is None or not adapted(p):
            update.mul_(scale)
    return updates


# ------------------------------------------------------------------------------------------------ gradients


@torch.no_grad()
def clip_each_(gradients: list[Tensor], clip: float) -> Tensor:
    """Scale each gradient whose norm exceeds `clip` down to it (0: none); returns the norms before, (P,).

    The factor is clip / (norm + 1e-6), applied where it is below 1. Norms are of whole gradients, sharded or not.
    """
    if not gradients:
        return torch.zeros(0)
    group = sharing_group(gradients)
    gradients = [local(gradient) for gradient in gradients]
    norms = _norms(gradients, group)
    if clip > 0:
        factors = (clip / (norms + 1e-6)).clamp(max=1.0)
        if norms.device.type == "cpu":  # reading a factor costs nothing here, and most gradients need no pass
            for gradient, factor in zip(gradients, factors.tolist(), strict=True):
                if factor < 1:
                    gradient.mul_(factor)
        else:
            torch._foreach_mul_(gradients, list(factors.unbind()))
    return norms


def _norms(tensors: list[Tensor], group: dist.ProcessGroup | None = None) -> Tensor:
    """Euclidean norms (P,); of slices, with the group of processes that share them, those of the whole tensors.

    On CPU torch's norm adds up long float32 sums: 6e-4 off for 65536 x 256 prototypes, where a dot product is
    off by 3e-5, and faster.
    """
    if any(t.device.type != "cpu" for t in tensors):
        norms = torch.stack(torch._foreach_norm(tensors))
    else:
        flat = [t.view(-1) if t.is_contiguous() else t.flatten() for t in tensors]
        norms = torch.stack([t.dot(t) for t in flat]).sqrt()
    if group is not None:
        squares = norms.square()
        dist.all_reduce(squares, group=group)
        norms = squares.sqrt()
    return norms


def clip_gradients(model: nn.Module, clip: float) -> list[float]:
    """Clip the gradient of each parameter by its own norm; returns the norms before (DINO's function)."""
    return clip_each_([p.grad for p in model.parameters() if p.grad is not None], clip).tolist()


def cancel_gradients_last_layer(epoch: int, model: nn.Module, freeze_last_layer: int) -> None:
    """Drop the gradients of the head's last layer in the first `freeze_last_layer` epochs."""
    if epoch >= freeze_last_layer:
        return
    for name, parameter in model.named_parameters():
        if "last_layer" in name:
            parameter.grad = None


def has_batchnorms(model: nn.Module) -> bool:
    """Whether any module normalises over the batch."""
    return any(isinstance(module, nn.modules.batchnorm._BatchNorm) for module in model.modules())


# ------------------------------------------------------------------------------------------------ schedules


def cosine_scheduler(
    base_value: float,
    final_value: float,
    epochs: int,
    niter_per_ep: int,
    warmup_epochs: int = 0,
    start_warmup_value: float = 0.0,
) -> np.ndarray:
    """A value for every iteration, (epochs · niter_per_ep,): linear warm-up, then half a cosine to `final_value`.

    A warm-up longer than the training is cut off with it.
    """
    total, warmup = epochs * niter_per_ep, warmup_epochs * niter_per_ep
    ramp = np.linspace(start_warmup_value, base_value, warmup) if warmup else np.array([])
    steps = np.arange(max(0, total - warmup))
    cosine = final_value + 0.5 * (base_value - final_value) * (1 + np.cos(math.pi * steps / max(1, len(steps))))
    return np.concatenate([ramp, cosine])[:total]
