"""Changes to gradients before a step: clipping per parameter, and dropping those of a frozen layer."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from optim import devices
from optim.norms import tensor_norms
from optim.sharding import local, sharing_group


@torch.no_grad()
def clip_each_(gradients: list[Tensor], clip: float) -> Tensor:
    """Scale down to `clip` each gradient whose norm exceeds it (0: none); returns the norms before clipping, (P,).

    The factor is clip / (norm + 1e-6), applied if it is below 1. Norms are those of whole gradients, sharded or not.
    """
    if not gradients:
        return torch.zeros(0)
    group = sharing_group(gradients)
    gradients = [local(gradient) for gradient in gradients]
    norms = tensor_norms(gradients, group)
    if clip > 0:
        factors = (clip / (norms + 1e-6)).clamp(max=1.0)
        if devices.on_cpu(norms):  # reading a factor costs nothing here, and most gradients need no scaling
            for gradient, factor in zip(gradients, factors.tolist(), strict=True):
                if factor < 1:
                    gradient.mul_(factor)
        else:
            torch._foreach_mul_(gradients, list(factors.unbind()))
    return norms


def clip_gradients(model: nn.Module, clip: float) -> list[float]:
    """Clip the gradient of each parameter by its own norm; returns the norms before clipping (DINO's function)."""
    return clip_each_([p.grad for p in model.parameters() if p.grad is not None], clip).tolist()


def cancel_gradients_last_layer(epoch: int, model: nn.Module, freeze_last_layer: int) -> None:
    """Drop the gradients of the head's last layer in the first `freeze_last_layer` epochs."""
    if epoch >= freeze_last_layer:
        return
    for name, parameter in model.named_parameters():
        if "last_layer" in name:
            parameter.grad = None
