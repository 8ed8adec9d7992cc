"""BatchNorm: its running statistics, restored after a step that is not finite, and its splits."""

from __future__ import annotations

import torch
from torch import Tensor, nn


class RunningStatistics:
    """Every BatchNorm buffer of some modules, to be copied before a step and restored after a refused one.

    A forward in train mode updates the statistics before it is known whether the loss is finite.
    """

    def __init__(self, *modules: nn.Module) -> None:
        self._buffers: list[Tensor] = [
            buffer
            for module in modules
            for layer in module.modules()
            if isinstance(layer, nn.modules.batchnorm._BatchNorm)
            for buffer in layer.buffers(recurse=False)
        ]

    @torch.no_grad()
    def copy(self) -> list[Tensor]:
        """The current statistics; an empty list for a model without BatchNorm."""
        return [buffer.clone() for buffer in self._buffers]

    @torch.no_grad()
    def restore(self, saved: list[Tensor], where: Tensor) -> None:
        """Restore `saved` if the 0-d bool tensor `where` is true, without reading it back from the device."""
        for buffer, before in zip(self._buffers, saved, strict=True):
            buffer.copy_(torch.where(where, before, buffer))


def has_batchnorms(model: nn.Module) -> bool:
    """Whether any module normalises over the batch."""
    return any(isinstance(module, nn.modules.batchnorm._BatchNorm) for module in model.modules())


def split_batchnorm(model: nn.Module, splits: int) -> nn.Module:
    """The model with timm's SplitBatchNorm: each of `splits` parts of a batch has its own BatchNorm while training.

    The first part's is the layer itself, which alone counts in eval mode; the others' lie in `aux_bn`.
    Raises ValueError if the model has no BatchNorm.
    """
    from timm.layers import convert_splitbn_model

    if not has_batchnorms(model):
        raise ValueError("the model has no BatchNorm to split")
    return convert_splitbn_model(model, splits)


def has_split_batchnorms(model: nn.Module) -> bool:
    """Whether `split_batchnorm` has been applied."""
    return any(name.endswith("aux_bn") for name, _ in model.named_modules())
