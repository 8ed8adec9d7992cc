"""The common base of our backbones: choice of the pooling, SimPool's map, and gradient checkpointing by block."""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from sp import SimPool

MODES = ("official", "simpool")
GAMMA = {"tokens": 1.25, "map": 2.0}  # the published exponents, by what a backbone ends in


class PooledBackbone(nn.Module):
    """A backbone whose last features are pooled in the architecture's way ("official") or by SimPool.

    Subclasses set `num_features` and, with `make_pooling`, `simpool`.
    """

    def __init__(self, mode: str) -> None:
        """Raises ValueError for an unknown mode."""
        super().__init__()
        if mode not in MODES:
            raise ValueError(f"unknown mode {mode!r}; choose one of {', '.join(MODES)}")
        self.mode = mode
        self.grad_checkpointing = False

    def make_pooling(self, dim: int, **settings) -> None:
        """Add `simpool` in SimPool mode. The order of this call and other layers decides the random weights."""
        if self.mode == "simpool":
            self.simpool = SimPool(dim, **settings)

    def pool_map(self, x: Tensor) -> Tensor:
        """A map (B, D, h, w) -> (B, D): by SimPool, or its mean in official mode."""
        return self.simpool(x) if self.mode == "simpool" else x.mean((2, 3))

    def get_attention_map(self, x: Tensor) -> Tensor:
        """SimPool's attention over the last map, (B, 1, h, w). Raises ValueError in official mode, which has none."""
        if self.mode != "simpool":
            raise ValueError(
                f'a {type(self).__name__} pooled by averaging has no attention map; build it with mode="simpool"'
            )
        x = self.forward_features(x)
        return self.simpool(x, return_attention=True)[1].unflatten(-1, x.shape[-2:])

    def forward_dense(
        self, x: Tensor, mask: Tensor | None = None, need_attention: bool = True
    ) -> tuple[Tensor, Tensor, Tensor | None]:
        """Pooled feature (B, D), positions (B, N, D), both after the final norm if there is one, and the attention.

        The attention (B, heads, N) is SimPool's; None in official mode, which has none, and without need_attention.
        Raises ValueError if there is a mask.
        """
        x = self.forward_features(x, mask)
        attention = None
        if self.mode == "simpool":
            pooled, attention = self.simpool(x, return_attention=True)
        else:
            pooled = self.pool_map(x)
        norm = getattr(self, "norm", nn.Identity())
        return norm(pooled), norm(x.flatten(2).transpose(1, 2)), attention if need_attention else None

    def refuse_mask(self, mask: Tensor | None) -> None:
        """For backbones that cannot mask patches. Raises ValueError if there is a mask."""
        if mask is not None:
            raise ValueError(
                f"a {type(self).__name__} takes no mask of patches; use a vision transformer built with "
                "masked_im_modeling=True"
            )

    def set_grad_checkpointing(self, enable: bool = True) -> None:
        """Keep only the blocks' inputs for backward and compute each block twice: less memory, about 1.3x the time."""
        self.grad_checkpointing = enable

    def run_block(self, block: nn.Module, x: Tensor, **settings: Any) -> Any:
        """block(x, **settings), checkpointed if that is on and gradients are needed."""
        if not (self.grad_checkpointing and torch.is_grad_enabled()):
            return block(x, **settings)
        return checkpoint(
            block, x, use_reentrant=False, context_fn=lambda: (nullcontext(), self.second_pass(block)), **settings
        )

    def second_pass(self, block: nn.Module) -> AbstractContextManager:
        """A context for computing a checkpointed block again in backward."""
        return nullcontext()
