"""Features that a linear head is validated on: of images seen without augmentation, computed once.

Letters: N images, D width of one form of the features.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor, nn

from data.sampler import shard_for_eval
from data.source import ImageSource
from evaluation import features
from evaluation.forms import Form, probe_features
from evaluation.linear import Probe
from runtime.distributed import get_rank, get_world_size


@dataclass
class Cached:
    """Features of images that are seen without augmentation, computed once; this rank's share of them."""

    features: list[Tensor]  # one (N_r, D) per form
    labels: Tensor  # (N_r,)

    def count(self, probe: Probe) -> Tensor:
        """Per head, percent of hits at top-1 and top-5 and mean loss over all ranks' shares: (heads, 3)."""
        device = probe.device
        total = torch.zeros(len(probe.heads), 3, dtype=torch.float64)
        rows = max(1, (256 << 20) // (4 * probe.logits_per_image))
        for start in range(0, len(self.labels), rows):
            chunk = [x[start : start + rows].to(device) for x in self.features]
            total += probe.count(chunk, self.labels[start : start + rows].to(device)).cpu()
        return percent_over_ranks(total, len(self.labels), device)


def percent_over_ranks(total: Tensor, images: int, device: torch.device) -> Tensor:
    """Sums (heads, 3) over this rank's images -> percent at top-1 and top-5 and mean loss over all ranks' images."""
    everything = torch.cat([total.flatten(), torch.tensor([float(images)], dtype=torch.float64)])
    everything = everything.float().to(device)  # counts of images: exact up to 16 million
    if get_world_size() > 1:
        dist.all_reduce(everything)
    everything = everything.double().cpu()
    mean = everything[:-1].view_as(total) / everything[-1]
    mean[:, :2] *= 100.0
    mean[~mean[:, 2].isfinite(), :2] = 0.0  # a head that has diverged predicts nothing
    return mean


def cache(
    model: nn.Module,
    source: ImageSource,
    forms: Sequence[Form],
    widths: Sequence[int],
    extraction: dict[str, Any],
    desc: str,
    indices: np.ndarray | None = None,
    forward: Callable[[Tensor], Tensor] | None = None,
) -> Cached:
    """This rank's share of the features of `indices` (all: None) of a labelled source, for every form.

    widths: of each form's features; extraction: the settings of `features.extract_shard`. forward: what gives a batch's
    features, as wide as all `widths` together, in place of the model's in these forms.
    """
    indices = np.arange(len(source)) if indices is None else indices
    mine = indices[shard_for_eval(len(indices), get_rank(), get_world_size())]
    share = features.extract_shard(
        model, source, indices=mine, desc=desc,
        forward=forward or (lambda images: torch.cat(probe_features(model, images, forms), dim=1)),
        **extraction,
    )  # fmt: skip
    if extraction.get("on_bad_image") == "skip":
        features.report_skipped(source, share.bad, desc.removesuffix(" features"))
    joined = share.features
    parts = joined.split(list(widths), dim=1) if len(joined) else [joined.new_empty(0, width) for width in widths]
    return Cached([part.contiguous() for part in parts], torch.from_numpy(source.labels[share.index.numpy()]))
