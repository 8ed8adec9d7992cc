"""Tokens of images that are seen without augmentation: validation and held-out images, and training images on request.

The tokens of a large set do not fit into memory (50,000 images of a ViT-B/16 take 30 GB). Batches are cached until a
memory budget is spent; the remaining images pass through the backbone again at every validation, with the same numbers.
Training tokens are not cached, because every epoch sees new crops; without augmentation they are, and must fit.

Letters: B images of a batch.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from data.loader import build_eval_loader, normalize
from data.sampler import TrainSampler, shard_for_eval
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


def batches_seen(
    model: nn.Module, source: ImageSource, probes: Probes, extraction: dict[str, Any], indices: np.ndarray, desc: str
) -> Iterator[tuple[Inputs | None, Tensor]]:
    """(inputs, indices) of these images batch by batch; the inputs are None if a batch has only bad files."""
    device, amp = extraction["device"], extraction["amp_dtype"]
    loader = build_eval_loader(
        source, extraction["batch_size"], extraction["num_workers"], extraction["img_size"], extraction["resize"],
        indices, pin_memory=device.type == "cuda", on_bad_image=extraction["on_bad_image"],
    )  # fmt: skip
    with eval_mode(model), torch.no_grad():
        for images, index in progress(loader, len(loader), f"{desc} tokens"):
            if not len(images):
                yield None, index
                continue
            images = normalize(images.to(device, non_blocking=True))
            with torch.autocast(device.type, dtype=amp or torch.bfloat16, enabled=amp is not None):
                inputs = probes.inputs(model, images)
            yield inputs.map(torch.Tensor.float), index


def require_finite(inputs: Inputs) -> None:
    """Raise InputError if a feature or token is not finite."""
    if not all(x.isfinite().all() for x in inputs.tensors()):
        raise InputError(
            "the model's tokens are not finite: its weights have diverged, or overflow in fp16; take an earlier "
            "checkpoint, or leave out --amp fp16"
        )


class TrainingTokens:
    """Batches of (inputs, labels) for training without augmentation: the model runs once on every image.

    Each process holds all of `indices`, since every epoch divides them otherwise. A sampler's positions, as in
    `crops.ProbeSet`, say which images make up a batch. Raises InputError if they do not fit into the budget.
    """

    def __init__(
        self,
        model: nn.Module,
        source: ImageSource,
        probes: Probes,
        extraction: dict[str, Any],
        budget: MemoryBudget,
        indices: np.ndarray,
        sampler: TrainSampler,
    ) -> None:
        self.sampler, self.labels = sampler, torch.from_numpy(source.labels[indices])
        self.inputs: Inputs | None = None
        done = 0
        for inputs, index in batches_seen(model, source, probes, extraction, indices, "training"):
            if inputs is None:
                continue
            require_finite(inputs)
            if self.inputs is None:
                self.inputs = self._reserve(inputs, len(index), budget)
            for whole, part in zip(self.inputs.tensors(), inputs.tensors(), strict=True):
                whole[done : done + len(index)] = part
            done += len(index)
        say(f"the tokens of {done} training images, without augmentation, are kept in memory: {self._gib():.2f} GiB")

    def _gib(self) -> float:
        return self.inputs.nbytes / GIB

    def _reserve(self, first: Inputs, count: int, budget: MemoryBudget) -> Inputs:
        """Memory for all images, from a batch of `count`."""
        images = len(self.labels)
        size = first.nbytes // count * images
        if not budget.take(size):
            raise InputError(
                f"--augment false keeps the tokens of {images} training images, which take {size / GIB:.2f} GiB: give "
                f"--token_cache {size / GIB + 0.5:.1f} or more, or leave --augment out"
            )
        return first.map(lambda x: x.new_empty((images, *x.shape[1:]), device="cpu"))

    def __len__(self) -> int:
        return len(self.sampler)

    def __iter__(self) -> Iterator[tuple[Inputs, Tensor]]:
        for pairs in self.sampler:
            rows = torch.tensor([position for _, position in pairs])
            yield self.inputs.map(lambda x, rows=rows: x[rows]), self.labels[rows]


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
            if inputs is not None:
                require_finite(inputs)
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
        return batches_seen(self.model, self.source, self.probes, self.extraction, indices, self.desc)

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
