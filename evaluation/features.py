"""Features of a frozen model: every image once, in the order of the data set, over any number of ranks.

Each rank extracts one contiguous share, without the duplicates that the published code's sampler pads with, stored in
fp32 or fp16. `extract` brings the shares together on every rank, `extract_shard` leaves them where they are.

Letters: N images, D width.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import numpy as np
import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn

from data.datasets import check_same_classes
from data.decode import BadImage
from data.loader import build_eval_loader, normalize
from data.sampler import shard_for_eval
from data.source import ImageSource
from runtime.distributed import all_gather_objects, get_rank, get_world_size
from runtime.guards import InputError
from runtime.progress import progress
from runtime.terminal import say

GATHER_BYTES = 64 << 20  # a share travels between ranks in pieces of this size
_LISTED = 5  # skipped files that are named


def eval_resize(img_size: int) -> int:
    """Shorter side before the centre crop: 256 for 224 and in proportion; small images (under 96 pixels) stay whole."""
    return img_size if img_size < 96 else round(img_size * 256 / 224)


@contextlib.contextmanager
def eval_mode(model: nn.Module) -> Iterator[None]:
    """Inside, every module of the model is in eval mode; afterwards each is back in the mode it was in."""
    before = {module: module.training for module in model.modules()}
    model.eval()
    try:
        yield
    finally:
        for module, training in before.items():
            module.training = training


class Interrupted(Exception):
    """An extraction was given up because it was asked to stop."""


class Share(NamedTuple):
    """What one rank extracted."""

    features: Tensor  # (N_r, D) on the CPU
    index: Tensor  # (N_r,) int64: which image each row is of
    bad: list[int]  # images that were skipped


def extract_shard(
    model: nn.Module,
    source: ImageSource,
    *,
    device: torch.device | None = None,
    img_size: int = 224,
    resize: int | None = None,
    batch_size: int = 128,
    num_workers: int = 4,
    dtype: torch.dtype = torch.float32,
    amp_dtype: torch.dtype | None = None,
    forward: Callable[[Tensor], Tensor] | None = None,
    indices: np.ndarray | None = None,
    show_progress: bool = True,
    desc: str = "features",
    on_bad_image: str = "raise",
    should_stop: Callable[[], bool] = lambda: False,
) -> Share:
    """This rank's share of the features, of `dtype` on the CPU, in the order of `indices`.

    forward: what is applied to a batch (B, C, H, W), by default the model; amp_dtype: autocast to it, by default none.
    indices: the images of this share, by default this rank's part of the whole source.
    on_bad_image: "raise" at a file that can't be used, or "skip" it, which leaves its row out.
    should_stop: asked before every batch.
    Raises Interrupted if `should_stop` says so, InputError for a bad file or a feature that is not finite.
    """
    device = device or next(model.parameters()).device
    forward = forward or model
    if indices is None:
        indices = shard_for_eval(len(source), get_rank(), get_world_size())
    loader = build_eval_loader(
        source,
        batch_size=batch_size,
        num_workers=num_workers,
        img_size=img_size,
        resize=resize or eval_resize(img_size),
        indices=indices,
        pin_memory=device.type == "cuda",
        on_bad_image=on_bad_image,
    )
    batches = progress(loader, len(loader), desc) if show_progress else loader
    features: Tensor | None = None
    numbers, done = [torch.empty(0, dtype=torch.int64)], 0
    with eval_mode(model), torch.no_grad():
        for images, index in batches:
            if should_stop():
                raise Interrupted
            if not len(images):  # a batch of bad files only
                continue
            images = normalize(images.to(device, non_blocking=True))
            with torch.autocast(device.type, dtype=amp_dtype or torch.bfloat16, enabled=amp_dtype is not None):
                batch = forward(images)
            batch = batch.flatten(1).to("cpu", dtype)
            if features is None:
                features = torch.empty(len(indices), batch.shape[1], dtype=dtype)
            features[done : done + len(batch)] = batch
            numbers.append(index)
            done += len(batch)
    if features is None:  # no image for this rank, or no good one
        features = torch.empty(0, getattr(model, "num_features", 0), dtype=dtype)
    index = torch.cat(numbers)
    bad = np.setdiff1d(indices, index.numpy()).tolist()
    if bad and on_bad_image == "raise":
        raise RuntimeError(f"the loader gave {done} images for {len(indices)} indices")
    features = features[:done]
    if not torch.isfinite(features).all():
        raise InputError(
            "the model's features are not finite: its weights have diverged, or overflow in fp16; take an earlier "
            "checkpoint, or leave out --amp fp16 and fp16 storage"
        )
    return Share(features, index, bad)


def report_skipped(source: ImageSource, bad: list[int], what: str) -> int:
    """Say how many images of `source` were skipped over all ranks, and name some; returns the number.

    bad: this rank's. Every rank must call it. Raises InputError, on all ranks, if no image is left.
    """
    everywhere = sorted(i for of_rank in all_gather_objects(bad) for i in of_rank)
    if len(everywhere) == len(source):
        raise InputError(f"none of the {len(source)} {what} images at {source.where} can be read")
    if everywhere:
        names = [f"{source.name(i)} {_reason(source, i)}" for i in everywhere[:_LISTED]]
        more = f"; and {len(everywhere) - _LISTED} more" if len(everywhere) > _LISTED else ""
        say(f"warning: {len(everywhere)} of {len(source)} {what} images left out: {'; '.join(names)}{more}")
    return len(everywhere)


def _reason(source: ImageSource, i: int) -> str:
    """Why image `i` can't be used, found by reading it once more: the worker sent only its number."""
    try:
        source.load(i)
    except BadImage as error:
        return str(error)
    return "could not be used a moment ago"


def gather_shards(share: Tensor) -> Tensor:
    """All ranks' shares (N_r, ...) as one tensor, in the order of ranks, on every rank."""
    world = get_world_size()
    if world == 1:
        return share
    shapes = all_gather_objects((len(share), tuple(share.shape[1:])))
    counts = [count for count, _ in shapes]
    rest = next((shape for count, shape in shapes if count), tuple(share.shape[1:]))  # an empty share knows no width
    if not len(share):
        share = share.new_empty(0, *rest)
    device = torch.device("cuda", torch.cuda.current_device()) if dist.get_backend() == "nccl" else torch.device("cpu")
    full = share.new_empty((sum(counts), *rest))
    starts = np.cumsum([0, *counts])
    rows = max(1, GATHER_BYTES // (max(int(np.prod(rest)), 1) * share.element_size()))
    for first in range(0, max(counts), rows):
        size = min(rows, max(counts) - first)
        piece = share.new_zeros((size, *rest))
        mine = share[first : first + size]
        piece[: len(mine)] = mine
        pieces = [torch.empty_like(piece, device=device) for _ in range(world)]
        dist.all_gather(pieces, piece.to(device))
        for rank, received in enumerate(pieces):
            count = min(max(counts[rank] - first, 0), size)
            full[starts[rank] + first : starts[rank] + first + count] = received[:count].cpu()
    return full


def extract(model: nn.Module, source: ImageSource, **settings: Any) -> tuple[Tensor, Tensor]:
    """Features (N, D) of the whole source in its order, and the images' indices (N,), on every rank.

    The settings are those of `extract_shard`. Images that it skipped have no row, and are reported.
    """
    share = extract_shard(model, source, **settings)
    if settings.get("on_bad_image") == "skip":
        report_skipped(source, share.bad, settings.get("desc", "features").removesuffix(" features"))
    return gather_shards(share.features), gather_shards(share.index)


def normalize_rows_(features: Tensor) -> Tensor:
    """Give the rows unit length, in place (a copy of a large training set may not fit); computed in fp32."""
    for start in range(0, len(features), 65536):
        block = features[start : start + 65536]
        block.copy_(F.normalize(block.float(), dim=1))
    return features


# ---- labels ---------------------------------------------------------------------------------------------------------


def require_labels(train: ImageSource, val: ImageSource) -> None:
    """Raise InputError unless both sets are labelled, with the same classes, more than one, none of them empty."""
    check_same_classes(train, val)
    if len(train.classes) < 2:
        raise InputError(
            f"{train.where} has one class only ({train.classes[0]!r}): classification needs at least two class folders"
        )
    counts = np.bincount(train.labels, minlength=len(train.classes))
    empty = [train.classes[c] for c in np.flatnonzero(counts == 0)]
    if empty:
        more = f" and {len(empty) - 5} more" if len(empty) > 5 else ""
        raise InputError(
            f"{train.where}: no image of class {', '.join(map(repr, empty[:5]))}{more}: add images, or remove the "
            "class from train and val"
        )


# ---- files that can't be used ---------------------------------------------------------------------------------------


def readable(source: ImageSource, num_workers: int, desc: str = "training") -> np.ndarray:
    """Indices of the images that can be decoded, the others reported; every rank looks at its share of them.

    For programs that read images many times, and must know beforehand which of them count.
    """
    share = shard_for_eval(len(source), get_rank(), get_world_size())
    loader = build_eval_loader(source, 64, num_workers, 8, 8, share, on_bad_image="skip")
    numbers = [index for _, index in progress(loader, len(loader), f"checking {desc} images")]
    index = torch.cat([torch.empty(0, dtype=torch.int64), *numbers])
    report_skipped(source, np.setdiff1d(share, index.numpy()).tolist(), desc)
    return gather_shards(index).numpy()
