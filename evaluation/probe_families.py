"""The heads of one probe: one for each learning rate and weight decay, with separate parameters and optimiser state.

A head trained together with others ends exactly as it would alone: all heads of a probe start from one draw, which
depends only on the seed, they see the same batches, and they share nothing else. Forward and backward run head by head,
so only one head's graph is in memory at a time. The linear probe of recipe dino, whose gradient is written out in
evaluation/linear.py, has the same interface.

Letters: B images of the global batch, b images of one rank, N tokens, D their width, C classes.
"""

from __future__ import annotations

import copy
import itertools
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from evaluation.forms import Form
from evaluation.linear import Probe, hits_and_losses
from evaluation.probe_heads import ProbeHead, build_head
from evaluation.probe_names import ProbeName
from evaluation.probe_recipes import Recipe
from evaluation.ranks import sum_gradients


@dataclass(frozen=True)
class Grid:
    """The rates and weight decays that every probe is trained with, and the batch that rates refer to."""

    lrs: Sequence[float]
    wds: Sequence[float]
    global_batch: int


@dataclass
class Head:
    """One head by name: its probe, what a linear one sees, its base learning rate and weight decay."""

    probe: str
    lr: float
    wd: float
    form: Form | None  # None: an attentive probe's
    shows_wd: bool
    parameters: int

    @property
    def name(self) -> str:
        what = self.probe if self.form is None else f"{self.probe} on {self.form.name}"
        return f"{what}, lr {self.lr:g}" + (f", wd {self.wd:g}" if self.shows_wd else "")

    @property
    def settings(self) -> dict[str, Any]:
        """What distinguishes it from the other heads, as a log's row has it."""
        form = {} if self.form is None else {"n_last_blocks": self.form.n, "avgpool_patchtokens": self.form.avgpool}
        return {"probe": self.probe, **form, "lr": self.lr, "weight_decay": self.wd, "parameters": self.parameters}

    def linear_as_saved(self) -> dict[str, Any]:
        """What a file says of a linear head, besides its parameters."""
        return {"form": list(self.form), "lr": self.lr, "weight_decay": self.wd}


class TrainedHeads:
    """The heads of one attentive probe, or of the linear probe on one form, trained by autograd.

    width: of the tokens or of the form's features. Raises InputError if the width does not suit the probe.
    """

    def __init__(
        self, probe: ProbeName, form: Form | None, width: int, num_classes: int, grid: Grid, recipe: Recipe,
        device: torch.device, seed: int,
    ) -> None:  # fmt: skip
        self.probe, self.width = probe, width
        first = build_head(probe, width, num_classes, seed).to(device)
        pairs = list(itertools.product(grid.lrs, grid.wds))
        self.modules = [first, *(copy.deepcopy(first) for _ in pairs[1:])]
        peaks = recipe.peaks([lr for lr, _ in pairs], grid.global_batch)
        self.optimizer = recipe.build_optimizer(self.modules, peaks, [wd for _, wd in pairs])
        several = len(grid.wds) > 1
        self.heads = [Head(probe.label, lr, wd, form, several, first.parameter_count()) for lr, wd in pairs]

    def step(self, x: Tensor, target: Tensor, lr_scale: float) -> Tensor:
        """One step of every head; returns their losses (heads,) before it.

        x: tokens (b, N, D) of this rank, or features (B, D) of the global batch, which `target` (B,) is of.
        """
        for group in self.optimizer.param_groups:
            group["lr"] = group["peak"] * lr_scale
        losses = []
        for module in self.modules:
            loss = F.cross_entropy(module.train()(x), target)
            loss.backward()
            losses.append(loss.detach())
        sum_gradients(p for module in self.modules if module.pool is not None for p in module.pool.parameters())
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)
        return torch.stack(losses)

    @torch.no_grad()
    def count(self, x: Tensor, target: Tensor) -> Tensor:
        """Hits at top-1, at top-5 and the sum of losses of every head over some images, (heads, 3)."""
        return torch.cat([hits_and_losses(module.eval()(x).unsqueeze(1), target) for module in self.modules])

    def state(self) -> dict[str, Any]:
        """Everything that training goes on from."""
        heads = [{name: value.cpu() for name, value in module.state_dict().items()} for module in self.modules]
        return {"heads": heads, "optimizer": self.optimizer.state_dict()}

    def load(self, state: Mapping[str, Any]) -> None:
        """Continue from what `state` gave. Raises ValueError if it belongs to other heads."""
        saved, mine = state["optimizer"]["param_groups"], self.optimizer.param_groups
        if [group["peak"] for group in saved] != [group["peak"] for group in mine]:
            raise ValueError(f"the saved heads of {self.probe.label} have other learning rates or weight decays")
        try:
            for module, weights in zip(self.modules, state["heads"], strict=True):
                module.load_state_dict(weights)
        except RuntimeError as error:
            raise ValueError(f"the saved heads of {self.probe.label} do not fit: {error}") from error
        self.optimizer.load_state_dict(state["optimizer"])

    def classifier(self, head: int) -> dict[str, Tensor]:
        """One head's parameters and statistics; a linear one's under the published names."""
        module = self.modules[head]
        if module.pool is None:
            return _folded(module)
        return {f"module.{name}": value.detach().cpu().clone() for name, value in module.state_dict().items()}

    def saved_as(self, head: int) -> dict[str, Any]:
        """What a file says of a head, besides its parameters; of an attentive one enough to build it again."""
        mine = self.heads[head]
        if mine.form is not None:
            return mine.linear_as_saved()
        classes = self.modules[head].num_classes
        return {
            "label": self.probe.label, "probe": self.probe.name, "settings": dict(self.probe.settings),
            "dim": self.width, "classes": classes, "lr": mine.lr, "weight_decay": mine.wd,
        }  # fmt: skip


class PublishedLinear:
    """The linear probe of recipe dino on one form: `Probe`, with the interface of the other probes' heads."""

    def __init__(
        self, probe: ProbeName, form: Form, width: int, num_classes: int, grid: Grid, device: torch.device, seed: int
    ) -> None:
        self.probe = probe
        self._probe = Probe([width], [form], grid.lrs, num_classes, grid.global_batch, device, seed, grid.wds)
        parameters = (width + 1) * num_classes
        self.heads = [
            Head(probe.label, lr, wd, form, len(grid.wds) > 1, parameters)
            for lr, wd in itertools.product(grid.lrs, grid.wds)
        ]

    @torch.no_grad()
    def step(self, x: Tensor, target: Tensor, lr_scale: float) -> Tensor:
        """One step of every head on features (B, D) of the global batch; returns their losses (heads,) before it."""
        return self._probe.step([x], target, lr_scale)

    def count(self, x: Tensor, target: Tensor) -> Tensor:
        """As TrainedHeads'."""
        return self._probe.count([x], target)

    def state(self) -> list[dict[str, Tensor]]:
        """Everything that training goes on from."""
        return self._probe.state()

    def load(self, state: Sequence[Mapping[str, Tensor]]) -> None:
        """Continue from what `state` gave. Raises ValueError if it belongs to other heads."""
        self._probe.load(state)

    def classifier(self, head: int) -> dict[str, Tensor]:
        """One head under the published names."""
        return self._probe.classifier(head)

    def saved_as(self, head: int) -> dict[str, Any]:
        """What a file says of a head, besides its parameters."""
        return self.heads[head].linear_as_saved()


def _folded(module: ProbeHead) -> dict[str, Tensor]:
    """A linear head with its BatchNorm, whose statistics are fixed by now, as one layer under the published names."""
    mean, variance = (value.cpu().double() for value in (module.norm.running_mean, module.norm.running_var))
    weight = module.linear.weight.detach().cpu().double() * (variance + module.norm.eps).rsqrt()
    bias = module.linear.bias.detach().cpu().double() - weight @ mean
    return {"module.linear.weight": weight.float(), "module.linear.bias": bias.float()}
