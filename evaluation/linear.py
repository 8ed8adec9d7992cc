"""Linear probes on frozen features: many heads trained in one pass of the backbone, and logistic regression.

The protocol is the published one: features of a frozen backbone in eval mode, one linear layer with weights N(0, 0.01)
and bias 0, cross entropy, SGD with momentum 0.9 and no weight decay, learning rate lr * global_batch / 256, cosine to 0
stepped once per epoch. The best rate differs by orders of magnitude between backbones, so a run trains a grid of heads:
every learning rate with every form of the features. The backbone, nearly all of the cost, runs once.

Each head ends as it would alone: all start from the same draw of weights for their width, see the same batches, and
share nothing; only their products are batched. The gradient of softmax cross entropy is written out (softmax minus
one-hot, times the features), so a step is two products and a few elementwise passes whatever the number of heads.

Departures from the published code: the batch is gathered over the ranks instead of averaging gradients (features are
small, the gradients of many heads are not), so all ranks hold the same heads, bit for bit; the best head is chosen on a
part of train held out for it, unless told otherwise; the images that do not fill an epoch's last batch are left out of
that epoch, others in each.

Letters: B global batch, D width of one form of the features, H heads on it (one per learning rate), C classes.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from evaluation.forms import Form, probe_features
from evaluation.heads import head_content
from evaluation.ranks import gather_batch

# Base learning rates of the default sweep, per 256 images: the published base rate is 1e-3, ResNet-50 needs about 0.3,
# and small models on few images more than 1.
DEFAULT_LRS = (1e-4, 3e-4, 1e-3, 3e-3, 1e-2, 3e-2, 0.1, 0.3, 1.0, 3.0, 10.0, 30.0)
MOMENTUM = 0.9
HELD_OUT_PART, HELD_OUT_MOST = 0.1, 50_000


class LinearClassifier(nn.Module):
    """The linear layer of the probe, named as in the published files (`linear.weight`, `linear.bias`)."""

    def __init__(self, dim: int, num_labels: int = 1000):
        super().__init__()
        self.num_labels = num_labels
        self.linear = nn.Linear(dim, num_labels)
        nn.init.normal_(self.linear.weight, std=0.01)
        nn.init.zeros_(self.linear.bias)

    def forward(self, x: Tensor) -> Tensor:
        """(B, D) or (B, D, ...) -> (B, num_labels)."""
        return self.linear(x.flatten(1))


class HeadGroup:
    """Heads on one form of the features, one per learning rate, trained by batched SGD with momentum.

    `lrs` are peak rates as the optimiser uses them, `wds` the heads' weight decays (by default none), which act on the
    weights alone. weight (H, C, D) and bias (H, C) start alike for all heads, drawn from `seed`, so that a head does
    not depend on which others are trained with it.
    """

    def __init__(
        self,
        dim: int,
        num_classes: int,
        lrs: Sequence[float],
        device: torch.device,
        seed: int = 0,
        wds: Sequence[float] | None = None,
    ):
        generator = torch.Generator().manual_seed(seed)
        first = torch.empty(num_classes, dim).normal_(0.0, 0.01, generator=generator)
        heads = len(lrs)
        self.weight = first.to(device).repeat(heads, 1, 1)  # (H, C, D)
        self.bias = torch.zeros(heads, num_classes, device=device)
        self.weight_momentum = torch.zeros_like(self.weight)
        self.bias_momentum = torch.zeros_like(self.bias)
        self.lrs = torch.tensor(lrs, dtype=torch.float32, device=device)
        self.wds = torch.tensor(wds, dtype=torch.float32, device=device) if wds and any(wds) else None

    def logits(self, x: Tensor) -> Tensor:
        """(B, D) -> (B, H, C)."""
        heads, classes, dim = self.weight.shape
        product = torch.addmm(self.bias.flatten(), x, self.weight.view(heads * classes, dim).T)
        return product.view(len(x), heads, classes)

    def step(self, x: Tensor, target: Tensor, lr_scale: float) -> Tensor:
        """One SGD step of every head on the whole global batch; returns their mean losses (H,), before the step."""
        heads, classes, dim = self.weight.shape
        log_p = F.log_softmax(self.logits(x), dim=2)  # (B, H, C)
        at_target = log_p.gather(2, target.view(-1, 1, 1).expand(-1, heads, 1)).squeeze(2)  # (B, H)
        # d loss / d logits = (softmax - one-hot) / B
        gradient = log_p.exp_()
        gradient[torch.arange(len(x), device=x.device), :, target] -= 1.0
        gradient /= len(x)
        flat = gradient.view(len(x), heads * classes)
        self.weight_momentum.mul_(MOMENTUM).view(heads * classes, dim).addmm_(flat.T, x)
        if self.wds is not None:
            self.weight_momentum.addcmul_(self.weight, self.wds.view(-1, 1, 1))
        self.bias_momentum.mul_(MOMENTUM).add_(gradient.sum(0))
        lrs = self.lrs * lr_scale
        self.weight.addcmul_(self.weight_momentum, lrs.view(-1, 1, 1), value=-1.0)
        self.bias.addcmul_(self.bias_momentum, lrs.view(-1, 1), value=-1.0)
        return -at_target.mean(0)

    def state(self) -> dict[str, Tensor]:
        """Weights and momentum, as they are saved."""
        names = ("weight", "bias", "weight_momentum", "bias_momentum", "lrs")
        return {name: getattr(self, name).cpu() for name in names}

    def load(self, state: dict[str, Tensor]) -> None:
        """Continue from what `state` gave. Raises ValueError if it belongs to other heads."""
        for name, value in state.items():
            mine = getattr(self, name)
            if mine.shape != value.shape or (name == "lrs" and not torch.allclose(mine.cpu(), value)):
                raise ValueError(
                    f"the saved heads have {name} {tuple(value.shape)} and these {tuple(mine.shape)}, or other "
                    "learning rates: resume with the same --lr, batch size, features and data, or in another "
                    "--output_dir"
                )
            mine.copy_(value)

    def classifier(self, head: int) -> dict[str, Tensor]:
        """One head under the published names."""
        return {
            "module.linear.weight": self.weight[head].cpu().clone(),
            "module.linear.bias": self.bias[head].cpu().clone(),
        }


def cosine_factor(epoch: int, epochs: int) -> float:
    """Part of the peak learning rate in `epoch` (0-based) of `epochs`: a cosine from 1 towards 0."""
    return 0.5 * (1 + math.cos(math.pi * epoch / epochs))


@dataclass
class Head:
    """One head of a sweep by name: what it sees and its base learning rate (per 256 images)."""

    form: Form
    lr: float

    @property
    def name(self) -> str:
        return f"{self.form.name}, lr {self.lr:g}"

    @property
    def settings(self) -> dict[str, Any]:
        """What distinguishes it from the other heads, as a log's row has it."""
        return {"n_last_blocks": self.form.n, "avgpool_patchtokens": self.form.avgpool, "lr": self.lr}


class Probe:
    """All heads of a sweep: the grid of forms and base learning rates, on one global batch size.

    wds: weight decays to combine with every rate, by default none.
    """

    def __init__(
        self,
        dims: Sequence[int],
        forms: Sequence[Form],
        lrs: Sequence[float],
        num_classes: int,
        global_batch: int,
        device: torch.device,
        seed: int = 0,
        wds: Sequence[float] = (0.0,),
    ):
        peaks = [lr * global_batch / 256.0 for lr in lrs]
        grid = [peak for peak in peaks for _ in wds], [wd for _ in peaks for wd in wds]
        self.groups = [HeadGroup(dim, num_classes, grid[0], device, seed, grid[1]) for dim in dims]
        self.forms = list(forms)
        self.heads = [Head(form, lr) for form in forms for lr in lrs for _ in wds]
        self.num_classes, self.device = num_classes, device

    def inputs(self, model: nn.Module, images: Tensor) -> list[Tensor]:
        """What the heads see of (B, C, H, W) images: one (B, D) per form."""
        return probe_features(model, images, self.forms)

    @torch.no_grad()
    def learn(self, features: Sequence[Tensor], target: Tensor, lr_scale: float) -> Tensor:
        """`step` on the batches of all ranks together; features and labels are this rank's."""
        batch, target = gather_batch([x.float() for x in features], target)
        return self.step(batch, target, lr_scale)

    def step(self, features: Sequence[Tensor], target: Tensor, lr_scale: float) -> Tensor:
        """One step of every head; features: one (B, D) per form, of the global batch. Returns losses (heads,)."""
        losses = [group.step(x, target, lr_scale) for group, x in zip(self.groups, features, strict=True)]
        return torch.cat(losses)

    @torch.no_grad()
    def count(self, features: Sequence[Tensor], target: Tensor) -> Tensor:
        """Per head: hits at top-1, hits at top-5, and the sum of losses over the batch, (heads, 3) float64."""
        rows = [hits_and_losses(g.logits(x), target) for g, x in zip(self.groups, features, strict=True)]
        return in_double(torch.cat(rows))

    @property
    def logits_per_image(self) -> int:
        """Numbers that `count` holds for an image at once."""
        return self.num_classes * len(self.groups[0].lrs)

    def state(self) -> list[dict[str, Tensor]]:
        return [group.state() for group in self.groups]

    def load(self, state: Sequence[dict[str, Tensor]]) -> None:
        if len(state) != len(self.groups):
            raise ValueError(f"the saved run has {len(state)} forms of features and this one {len(self.groups)}")
        for group, saved in zip(self.groups, state, strict=True):
            group.load(saved)

    def classifier(self, head: int) -> dict[str, Tensor]:
        """Head number `head` of `heads` under the published names."""
        per_group = len(self.groups[0].lrs)
        return self.groups[head // per_group].classifier(head % per_group)

    def content(self, head: int, made_by: Mapping[str, Any]) -> dict[str, Any]:
        """What a file says of head number `head`; made_by: see evaluation.identity."""
        return head_content(self.classifier(head), self.heads[head].form, self.heads[head].lr, made_by)


def hits_and_losses(logits: Tensor, target: Tensor) -> Tensor:
    """(B, H, C) logits -> per head the hits at top-1, those at top-5 and the sum of losses, (H, 3)."""
    heads, classes = logits.shape[1:]
    ranked = logits.topk(min(5, classes), dim=2).indices == target.view(-1, 1, 1)
    log_p = F.log_softmax(logits, dim=2)
    loss = -log_p.gather(2, target.view(-1, 1, 1).expand(-1, heads, 1)).sum((0, 2))
    return torch.stack([ranked[..., 0].sum(0), ranked.sum((0, 2)), loss], dim=1)


def in_double(numbers: Tensor) -> Tensor:
    """The numbers in float64, on the CPU if the device has none."""
    return numbers.double() if numbers.device.type != "mps" else numbers.cpu().double()


def split_train(labels: np.ndarray, seed: int = 0) -> tuple[np.ndarray, np.ndarray]:
    """(indices to train on, indices held out to choose the head by): a tenth of each class, at most 50,000 in all.

    Drawn from `seed`; a class keeps at least one image to train on, and gives one up if it has two or more.
    """
    part = min(HELD_OUT_PART, HELD_OUT_MOST / max(len(labels), 1))
    rng = np.random.default_rng([seed, 0x11EA])
    held_out = []
    for c in np.unique(labels):
        members = np.flatnonzero(labels == c)
        if len(members) > 1:
            held_out.append(rng.permutation(members)[: max(1, round(part * len(members)))])
    held_out = np.sort(np.concatenate(held_out)) if held_out else np.zeros(0, dtype=np.int64)
    return np.setdiff1d(np.arange(len(labels)), held_out), held_out
