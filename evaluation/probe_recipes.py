"""How heads of probes are trained: optimiser, grid of rates and weight decays, schedule.

- dino: SGD with momentum 0.9, no weight decay, a cosine stepped once per epoch; rates per 256 images. The linear head
  is a plain layer on the features (evaluation/linear.py).
- ep: the protocol of efficient probing, which is that of MAE's linear probes: LARS with momentum 0.9 and trust
  coefficient 0.001, no weight decay, 90 epochs, 10 of them warm-up, then a cosine to 0, stepped at every iteration;
  rates per 256 images, published 0.1 at a batch of 4096.
- capi: AdamW with betas 0.9 and 0.95, ten rates times three weight decays, a cosine to 0 stepped at every iteration.
  Adam's steps hardly depend on the gradients' size, so its rates are not scaled by the batch.

Biases and 1-D parameters have no weight decay.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from evaluation.linear import DEFAULT_LRS, cosine_factor
from optim.groups import get_params_groups
from optim.optimizers import build_optimizer
from optim.schedules import cosine_scheduler

EP_LRS = (0.01, 0.03, 0.1, 0.3, 1.0, 3.0)  # around the published 0.1, as small sets take fewer steps
CAPI_LRS = (1e-5, 2e-5, 5e-5, 1e-4, 2e-4, 5e-4, 1e-3, 2e-3, 5e-3, 1e-2)
CAPI_WDS = (5e-4, 1e-3, 5e-2)


@dataclass(frozen=True)
class Recipe:
    """One protocol. The command line can replace its `lrs`, `wds` and `epochs`."""

    name: str
    optimizer: str
    lrs: tuple[float, ...]
    wds: tuple[float, ...] = (0.0,)
    epochs: int = 100
    warmup_part: float = 0.0  # of the epochs
    most_warmup: int = 10  # epochs
    per_256_images: bool = True
    per_step: bool = True  # whether the rate changes at every iteration, or once per epoch

    def peaks(self, lrs: Sequence[float], global_batch: int) -> list[float]:
        """The largest rates as the optimiser uses them."""
        return [lr * global_batch / 256.0 if self.per_256_images else lr for lr in lrs]

    def scales(self, epoch: int, epochs: int, steps: int) -> float | list[float]:
        """Part of the peak rate in `epoch` (0-based) of `epochs`, or in each of its `steps`."""
        if not self.per_step:
            return cosine_factor(epoch, epochs)
        schedule = cosine_scheduler(1.0, 0.0, epochs, steps, self.warmup_epochs(epochs))
        return schedule[epoch * steps : (epoch + 1) * steps].tolist()

    def warmup_epochs(self, epochs: int) -> int:
        """The published warm-up, or as large a part of a shorter training."""
        return min(self.most_warmup, int(self.warmup_part * epochs + 1e-9))

    def build_optimizer(
        self, heads: Sequence[nn.Module], peaks: Sequence[float], wds: Sequence[float]
    ) -> torch.optim.Optimizer:
        """One optimiser of all heads, each with its own peak rate (in its groups under "peak") and weight decay."""
        groups: list[dict[str, Any]] = []
        for head, peak, wd in zip(heads, peaks, wds, strict=True):
            for group in get_params_groups(head):
                if group["params"]:
                    groups.append({"weight_decay": wd, **group, "lr": peak, "peak": peak})
        if self.optimizer == "adamw":
            groups = [{"betas": (0.9, 0.95), **group} for group in groups]
        return build_optimizer(self.optimizer, groups)

    def describe(self) -> str:
        """The protocol for a line of output."""
        words = {"sgd": "SGD with momentum 0.9", "lars": "LARS", "adamw": "AdamW"}[self.optimizer]
        warmup = ", warm-up" if self.warmup_part else ""
        stepped = "at every iteration" if self.per_step else "once per epoch"
        return f"recipe {self.name}: {words}{warmup}, cosine to 0 stepped {stepped}"


RECIPES = {
    recipe.name: recipe
    for recipe in (
        Recipe("dino", "sgd", DEFAULT_LRS, per_step=False),
        Recipe("ep", "lars", EP_LRS, epochs=90, warmup_part=1 / 9),
        Recipe("capi", "adamw", CAPI_LRS, CAPI_WDS, per_256_images=False),
    )
}
