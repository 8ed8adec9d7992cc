"""Signs of collapse in self-distillation: numbers that show it, and a warning in plain words.

Collapse comes in two forms (Caron et al. 2021, section 5.3): the teacher's output is uniform whatever the image, and
its entropy reaches log K, or one prototype takes every image, and the entropy is 0. Either way features stop depending
on the image: their cosine between different images tends to 1, and their effective rank to 1. The loss alone
does not show it: it falls in the second form, and stays at log K in the first. What distinguishes both from health is
how much the output says about the image (`teacher_information`). The thresholds below were set on small runs that
collapsed (docs/LOG.md).

The features are those of one fixed probe batch, the same images throughout the run, so that values can be compared.

Letters: B images of the probe batch, D width, K prototypes.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from data.datasets import ImageSource
from data.loader import build_eval_loader, normalize
from evaluation.features import eval_mode, eval_resize

PROBE_IMAGES = 64
UNINFORMED = 0.02  # nats that the output tells of the image; runs that learned: 0.18 and more, collapsed: under 0.01
UNIFORM, ONE_SIDED = 0.9, 0.1  # entropy as a part of log K: which of the two forms it is
SAME_FEATURES = 0.95  # mean cosine between different images; runs that learned: 0.7 at most, collapsed: 0.92 to 0.99
FEW_DIRECTIONS = 5.0  # effective rank; runs that learned: 14 and more, collapsed: 3 to 5


# What a loss makes of the teacher's outputs: ((B, K) outputs, epoch) -> (B, K) rows that sum to 1, with its centering
# and temperature; `DINOLoss.probabilities` is one.
Probabilities = Callable[[Tensor, int], Tensor]


def teacher_entropy(q: Tensor) -> float:
    """Mean entropy of the rows of probabilities q (B, K), as a part of log K: 1 uniform, 0 one-hot."""
    return (row_entropy(q).mean() / math.log(q.shape[-1])).item()


def teacher_information(q: Tensor) -> float:
    """Nats that the teacher's output tells of which image it saw: H(mean of q) - mean of H(q) over rows, 0 to log B.

    0 in either form of collapse, in which every image gets the same output, uniform or not. The entropy alone does not
    tell a teacher that gives each image its own prototype from one that gives all the same.
    """
    return (row_entropy(q.float().mean(0)) - row_entropy(q).mean()).item()


def row_entropy(q: Tensor) -> Tensor:
    """Entropy of probabilities (..., K) in nats, with 0 log 0 = 0."""
    return torch.special.entr(q.float()).sum(-1)


def mean_cosine(features: Tensor) -> float:
    """Mean cosine between the features (B, D) of different images; B of 2 or more."""
    total = F.normalize(features.float(), dim=1).sum(0).square().sum().item()
    count = len(features)
    return (total - count) / (count * (count - 1))


def effective_rank(features: Tensor) -> float:
    """exp of the entropy of the normalised singular values of centred features (B, D): directions really used.

    Roy and Vetterli, "The effective rank" (2007). Between 1 and min(B - 1, D); 1 if all features are equal, NaN if
    one is not finite.
    """
    if not features.isfinite().all():
        return math.nan  # the entropy's warning tells; singular values do not exist
    features = features.cpu().double()  # in this order: MPS has no float64
    values = torch.linalg.svdvals(features - features.mean(0))
    if values.sum() <= 1e-9 * features.norm():
        return 1.0
    share = values / values.sum()
    return (-(share * share.clamp_min(1e-300).log()).sum()).exp().item()


def probe_batch(source: ImageSource, img_size: int, count: int = PROBE_IMAGES) -> Tensor:
    """The run's fixed probe: `count` images spread over the source, (B, C, S, S) uint8, the same at every call."""
    indices = np.unique(np.linspace(0, len(source) - 1, min(count, len(source))).astype(np.int64))
    loader = build_eval_loader(source, len(indices), 0, img_size, eval_resize(img_size), indices)
    return next(iter(loader))[0]


@torch.no_grad()
def monitor(
    teacher: nn.Module, images: Tensor, probabilities: Probabilities, epoch: int, center: Tensor | None = None
) -> dict[str, float]:
    """The monitors of a teacher (with `.backbone` and `.head`) on a probe batch (B, C, S, S) uint8.

    probabilities: the loss's, of teacher outputs (B, K) at an epoch; center: the loss's, if it has one.
    Keys: entropy (of log K), information (nats), mean_cosine, effective_rank and, with a center, center_norm.
    """
    device = next(teacher.parameters()).device
    with eval_mode(teacher):
        features = teacher.backbone(normalize(images.to(device)))
        q = probabilities(teacher.head(features), epoch)
    values = {"entropy": teacher_entropy(q), "information": teacher_information(q)}
    if center is not None:
        values["center_norm"] = center.float().norm().item()
    return {**values, "mean_cosine": mean_cosine(features), "effective_rank": effective_rank(features)}


def collapse_warning(values: Mapping[str, float], out_dim: int) -> str | None:
    """What the monitors say is wrong and what to try, or None. `values` as `monitor` gives them."""
    signs, remedies = [], []
    entropy, information = values.get("entropy", 0.5), values.get("information", math.inf)
    if not math.isfinite(entropy):
        signs.append("the teacher's output is not finite")
        remedies.append("lower --lr, --clip_grad 3.0, --amp bf16 in place of fp16")
    elif information < UNINFORMED:
        found = f"the teacher's output tells {information:.4f} nats of the image"
        found += f" and its entropy is {entropy:.4f} of log {out_dim}"
        if entropy > UNIFORM:
            signs.append(f"{found}: it says the same of every prototype")
            remedies.append("a lower --teacher_temp, or a lower --warmup_teacher_temp with longer warm-up")
            remedies.append("a lower --lr, --clip_grad 3.0")
        elif entropy < ONE_SIDED:
            signs.append(f"{found}: one prototype takes all")
            remedies.append("a higher --teacher_temp, --norm_last_layer true, a longer --freeze_last_layer")
        else:
            signs.append(f"{found}: the same for every image")
    if values.get("mean_cosine", 0.0) > SAME_FEATURES:
        signs.append(f"features of different images have a mean cosine of {values['mean_cosine']:.4f}")
    if values.get("effective_rank", math.inf) < FEW_DIRECTIONS:
        signs.append(f"the features use {values['effective_rank']:.2f} directions")
    if not signs:
        return None
    remedies = remedies or ["a lower --lr, a longer --warmup_epochs, a larger batch, a higher --momentum_teacher"]
    return f"warning: signs of collapse: {'; '.join(signs)}. Try {'; '.join(remedies)}"
