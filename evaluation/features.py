"""Features of a frozen model: every image once, in the order of the data set, over any number of ranks.

Each rank extracts one contiguous share (no padded duplicates, which the published code's sampler adds), stored in fp32
or fp16; `extract` brings the shares together on every rank, `extract_shard` leaves them where they are. Stored features
(`dump_features`, `load_features`) keep the published file names and carry a small JSON beside them, which says what
model and images made them; loading checks it.

Letters: N images, D width.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn

from data.datasets import check_same_classes
from data.loader import build_eval_loader, normalize
from data.sampler import shard_for_eval
from data.source import ImageSource
from runtime.distributed import get_rank, get_world_size
from runtime.guards import InputError
from runtime.progress import progress

GATHER_BYTES = 64 << 20  # a share travels between ranks in pieces of this size


def eval_resize(img_size: int) -> int:
    """Shorter side before the centre crop: 256 for 224 and in proportion; small images (under 96 pixels) stay whole."""
    return img_size if img_size < 96 else round(img_size * 256 / 224)


@contextlib.contextmanager
def eval_mode(model: nn.Module) -> Iterator[None]:
    """Inside, every module of the model is in eval mode; after, each is in the mode it was in."""
    before = {module: module.training for module in model.modules()}
    model.eval()
    try:
        yield
    finally:
        for module, training in before.items():
            module.training = training


class Interrupted(Exception):
    """An extraction was given up because it was asked to stop."""


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
    should_stop: Callable[[], bool] = lambda: False,
) -> tuple[Tensor, Tensor]:
    """This rank's share: features (N_r, D) of `dtype` on the CPU, and the indices (N_r,) of their images.

    forward: what is applied to a batch (B, C, H, W), default the model; amp_dtype: autocast to it, default none.
    indices: the images of this share, default this rank's part of the whole source.
    should_stop: asked before every batch.
    Raises Interrupted where `should_stop` says so, InputError where a feature is not finite.
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
    )
    batches = progress(loader, len(loader), desc) if show_progress else loader
    features: Tensor | None = None
    done = 0
    with eval_mode(model), torch.no_grad():
        for images, _ in batches:
            if should_stop():
                raise Interrupted
            images = normalize(images.to(device, non_blocking=True))
            with torch.autocast(device.type, dtype=amp_dtype or torch.bfloat16, enabled=amp_dtype is not None):
                batch = forward(images)
            batch = batch.flatten(1).to("cpu", dtype)
            if features is None:
                features = torch.empty(len(indices), batch.shape[1], dtype=dtype)
            features[done : done + len(batch)] = batch
            done += len(batch)
    if features is None:  # more ranks than images
        features = torch.empty(0, getattr(model, "num_features", 0), dtype=dtype)
    if done != len(indices):
        raise RuntimeError(f"the loader gave {done} images for {len(indices)} indices")
    if not torch.isfinite(features).all():
        raise InputError(
            "the model's features are not finite: its weights have diverged, or overflow in fp16; take an earlier "
            "checkpoint, or leave out --amp fp16 and fp16 storage"
        )
    return features, torch.from_numpy(np.asarray(indices))


def gather_shards(share: Tensor, total: int) -> Tensor:
    """All ranks' contiguous shares (N_r, ...) of `total` rows as one tensor, in order, on every rank."""
    world = get_world_size()
    if world == 1:
        return share
    counts = [len(shard_for_eval(total, rank, world)) for rank in range(world)]
    device = torch.device("cuda", torch.cuda.current_device()) if dist.get_backend() == "nccl" else torch.device("cpu")
    width = max(share.shape[1:].numel(), 1)
    # a rank without rows does not know the width; the widest knows
    widths = torch.tensor([width], device=device)
    dist.all_reduce(widths, op=dist.ReduceOp.MAX)
    if not len(share) and share.ndim > 1:
        share = share.new_empty(0, int(widths))
    full = share.new_empty((total, *share.shape[1:]))
    starts = np.cumsum([0, *counts])
    rows = max(1, GATHER_BYTES // (int(widths) * share.element_size()))
    for first in range(0, max(counts), rows):
        size = min(rows, max(counts) - first)
        piece = share.new_zeros((size, *share.shape[1:]))
        mine = share[first : first + size]
        piece[: len(mine)] = mine
        pieces = [torch.empty_like(piece, device=device) for _ in range(world)]
        dist.all_gather(pieces, piece.to(device))
        for rank, received in enumerate(pieces):
            count = min(max(counts[rank] - first, 0), size)
            full[starts[rank] + first : starts[rank] + first + count] = received[:count].cpu()
    return full


def extract(model: nn.Module, source: ImageSource, **settings: Any) -> Tensor:
    """Features (N, D) of the whole source in its order, on every rank; each image passes through one rank once.

    The settings are those of `extract_shard`.
    """
    share, _ = extract_shard(model, source, **settings)
    return gather_shards(share, len(source))


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


def normalize_rows_(features: Tensor) -> Tensor:
    """Give the rows unit length, in place (a copy of a large training set may not fit); computed in fp32."""
    for start in range(0, len(features), 65536):
        block = features[start : start + 65536]
        block.copy_(F.normalize(block.float(), dim=1))
    return features
