"""Tokens of images that are seen without augmentation: validation images, and the held-out part of train.

The tokens of a large set do not fit into memory (50,000 images of a ViT-B/16 take 30 GB). Batches are cached until a
memory budget is spent; the remaining images pass through the backbone again at every validation, with the same numbers.
Training tokens are never cached, because every epoch sees new crops.

Letters: B images of a batch.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from data.loader import build_eval_loader, normalize
from data.sampler import shard_for_eval
from data.source import ImageSource
from evaluation.cached import percent_over_ranks
from evaluation.features import eval_mode, report_skipped
from evaluation.probe_inputs import Inputs
from evaluation.probes import Probes
from runtime.distributed import get_rank, get_world_size
from runtime.guards import InputError
from runtime.progress import progress
from runtime.terminal import say

GIB = 1 << 30


class MemoryBudget:
    """Memory that this process may fill with tokens; several sets draw on it in turn."""

    def __init__(self, gib: float) -> None:
        self.left = int(gib * GIB)

    def take(self, size: int) -> bool:
        """Reserve `size` bytes if they still fit; returns whether they do."""
        if size > self.left:
            return False
        self.left -= size
        return True


class CachedTokens:
    """This rank's share of `indices` (all: None) of a labelled source as `probes` see it.

    The constructor runs the model on every image once, so that an unusable image or tokens that are not finite raise
    InputError before training. extraction: the settings of `features.extract_shard`.
    """

    def __init__(
        self,
        model: nn.Module,
        source: ImageSource,
        probes: Probes,
        extraction: dict[str, Any],
        budget: MemoryBudget,
        desc: str,
        indices: np.ndarray | None = None,
    ) -> None:
        indices = np.arange(len(source)) if indices is None else indices
        self.model, self.source, self.probes, self.extraction, self.desc = model, source, probes, extraction, desc
        self.mine = indices[shard_for_eval(len(indices), get_rank(), get_world_size())]
        self.kept: list[tuple[Inputs, Tensor]] = []
        self._beyond = 0  # position in `mine` of the first image that is not cached
        self._fill(budget)

    def _fill(self, budget: MemoryBudget) -> None:
        batch_size, keeping = self.extraction["batch_size"], True
        found, tokens = [np.empty(0, dtype=np.int64)], 0
        for number, (inputs, index) in enumerate(self._batches(self.mine)):
            if inputs is not None and not all(x.isfinite().all() for x in inputs.tensors()):
                raise InputError(
                    "the model's tokens are not finite: its weights have diverged, or overflow in fp16; take an "
                    "earlier checkpoint, or leave out --amp fp16"
                )
            found.append(index.numpy())
            keeping = keeping and (inputs is None or budget.take(inputs.nbytes))
            if keeping:
                self._beyond = min(len(self.mine), (number + 1) * batch_size)
                if inputs is not None:
                    tokens += len(index)
                    self.kept.append((inputs.map(Tensor.cpu), self._labels(index)))
        index = np.concatenate(found)
        if self.extraction.get("on_bad_image") == "skip":
            report_skipped(self.source, np.setdiff1d(self.mine, index).tolist(), self.desc)
        if self._beyond < len(self.mine):
            say(
                f"tokens of {tokens} of {len(index)} {self.desc} images (of this process) are kept in memory, those of "
                "the others are computed again at each validation: --token_cache sets how much is kept"
            )

    def _batches(self, indices: np.ndarray) -> Iterator[tuple[Inputs | None, Tensor]]:
        """(inputs, indices) of these images batch by batch; the inputs are None if a batch has only bad files."""
        settings = self.extraction
        device, amp = settings["device"], settings["amp_dtype"]
        loader = build_eval_loader(
            self.source, settings["batch_size"], settings["num_workers"], settings["img_size"], settings["resize"],
            indices, pin_memory=device.type == "cuda", on_bad_image=settings["on_bad_image"],
        )  # fmt: skip
        with eval_mode(self.model), torch.no_grad():
            for images, index in progress(loader, len(loader), f"{self.desc} tokens"):
                if not len(images):
                    yield None, index
                    continue
                images = normalize(images.to(device, non_blocking=True))
                with torch.autocast(device.type, dtype=amp or torch.bfloat16, enabled=amp is not None):
                    inputs = self.probes.inputs(self.model, images)
                yield inputs.map(torch.Tensor.float), index

    def _labels(self, index: Tensor) -> Tensor:
        return torch.from_numpy(self.source.labels[index.numpy()])

    def count(self, probes: Probes) -> Tensor:
        """Per head, percent of hits at top-1 and top-5 and mean loss over all ranks' shares: (heads, 3)."""
        total, images, device = torch.zeros(len(probes.heads), 3, dtype=torch.float64), 0, probes.device
        for inputs, labels in self._all():
            total += probes.count(inputs.map(lambda x: x.to(device)), labels.to(device)).cpu()
            images += len(labels)
        return percent_over_ranks(total, images, device)

    def _all(self) -> Iterator[tuple[Inputs, Tensor]]:
        """Every batch with its labels, cached ones first."""
        yield from self.kept
        rest = self.mine[self._beyond :]
        if len(rest):
            for inputs, index in self._batches(rest):
                if inputs is not None:
                    yield inputs, self._labels(index)
