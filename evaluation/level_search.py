"""MaxBoxAcc over a data set: maps come from the model batch by batch, and processes search their boxes meanwhile.

The search of a map takes longer than a GPU needs for its forward pass. So the maps travel, as the "indices" of a
loader, to its worker processes, which return the best box at each level. These 1,020 bytes per image are all that a
rank keeps until the best threshold is known.

Letters: N images, N_r of this rank, B of a batch, n of a piece of work, S pixels of the model's input.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import Dataset

from data.boxes import BoxedImages
from data.loader import build_loader, normalize
from data.sampler import shard_for_eval
from evaluation.level_boxes import LEVELS
from evaluation.localization import (
    OVERLAPS,
    best_at_levels,
    boxes_at_levels,
    inclusive_iou,
    levels_of_thresholds,
    scaled_truths,
    score_map,
)
from evaluation.whole_images import SquashedSet
from runtime.distributed import all_gather_objects, get_rank, get_world_size
from runtime.progress import progress

PIECE = 8  # maps that a process gets at a time


@dataclass
class LevelBoxes:
    """This rank's images: the box of each that meets a truth best, at each level, in the pixels of the map."""

    images: BoxedImages
    index: np.ndarray  # (N_r,)
    boxes: np.ndarray  # (N_r, 255, 4) uint8
    not_finite: int  # maps that counted as zeros, of all ranks
    flat: int  # maps that are the same everywhere, which count as zeros too

    def curves(self, chosen: np.ndarray | None = None) -> dict[int, np.ndarray]:
        """Images of all ranks localised at each of the 1000 thresholds, by overlap; every rank must call it.

        chosen: (N,) bool, which of all images count, by default all.
        """
        counts = np.zeros((len(OVERLAPS), LEVELS - 1), np.int64)
        for i, boxes in zip(self.index.tolist(), self.boxes, strict=True):
            if chosen is None or chosen[i]:
                overlap = self._overlap(i, boxes)
                counts += np.stack([overlap >= limit / 100 for limit in OVERLAPS])
        total = sum(all_gather_objects(counts))
        return {limit: total[row][levels_of_thresholds()] for row, limit in enumerate(OVERLAPS)}

    def at(self, level: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """(index (N,), boxes (N, 4), IoU (N,)) of all ranks' images at one level; every rank must call it."""
        boxes = self.boxes[:, level].astype(np.int64)
        overlap = [self._overlap(i, box[None])[0] for i, box in zip(self.index.tolist(), boxes, strict=True)]
        ranks = all_gather_objects((self.index, boxes, np.array(overlap, np.float64)))
        return tuple(np.concatenate([rank[column] for rank in ranks]) for column in range(3))

    def _overlap(self, i: int, boxes: np.ndarray) -> np.ndarray:
        truths = scaled_truths(self.images.truths(i), self.images.sizes[i])
        return inclusive_iou(boxes.astype(np.int64), truths).max(1)


class _Search(Dataset):
    """(index (n,), maps (n, h, w)) -> (index, best boxes (n, 255, 4) uint8, whether finite and flat (n, 2))."""

    def __init__(self, images: BoxedImages, multi_contour: bool) -> None:
        self.images, self.multi_contour = images, multi_contour

    def __getitems__(self, work: tuple[np.ndarray, np.ndarray]) -> tuple[Tensor, Tensor, Tensor]:
        index, maps = work
        found = np.empty((len(index), LEVELS - 1, 4), np.uint8)
        for row, (i, map) in enumerate(zip(index.tolist(), maps, strict=True)):
            levels = boxes_at_levels(score_map(torch.from_numpy(map)), self.multi_contour)
            found[row] = best_at_levels(levels, scaled_truths(self.images.truths(i), self.images.sizes[i]))[1]
        state = np.stack([np.isfinite(maps).all((1, 2)), maps.max((1, 2)) == maps.min((1, 2))], axis=1)
        return torch.from_numpy(index), torch.from_numpy(found), torch.from_numpy(state)


class _Pieces:
    """The work of a loader of `_Search`, made while it is asked for."""

    def __init__(self, batches: Iterable[tuple[Tensor, Tensor]], images: int, maps_of: Callable[[Tensor], Tensor]):
        self._batches, self._images, self._maps_of = batches, images, maps_of

    def __len__(self) -> int:
        return -(-self._images // PIECE)

    def __iter__(self) -> Iterator[tuple[np.ndarray, np.ndarray]]:
        for images, index in self._batches:
            if not len(index):  # bad files only
                continue
            maps = self._maps_of(normalize(images)).cpu().numpy()
            for start in range(0, len(index), PIECE):
                yield index[start : start + PIECE].numpy(), maps[start : start + PIECE]


def searched(
    images: BoxedImages, pieces: Iterable[tuple[np.ndarray, np.ndarray]], num_workers: int, multi_contour: bool = True
) -> Iterator[tuple[np.ndarray, np.ndarray, np.ndarray]]:
    """(index (n,), best boxes (n, 255, 4), finite and flat (n, 2)) of pieces (index, maps (n, h, w)), in order."""
    for piece in build_loader(_Search(images, multi_contour), pieces, num_workers):
        yield tuple(part.numpy() for part in piece)


def search_levels(
    images: BoxedImages,
    maps_of: Callable[[Tensor], Tensor],
    *,
    side: int,
    device: torch.device,
    batch_size: int = 64,
    num_workers: int = 0,
    multi_contour: bool = True,
    on_bad_image: str = "raise",
) -> LevelBoxes:
    """The search over all images, each on one rank. Every rank must call it.

    maps_of: normalised images (B, C, S, S) on `device` -> maps (B, h, w). side: S, to which whole images are squashed.
    num_workers: processes that read images, and as many that search.
    """
    share = shard_for_eval(len(images), get_rank(), get_world_size())
    order = [share[start : start + batch_size].tolist() for start in range(0, len(share), batch_size)]
    loader = build_loader(
        SquashedSet(images.source, side, on_bad_image), order, num_workers, device.type == "cuda"
    )  # fmt: skip
    batches = ((pixels.to(device, non_blocking=True), index) for pixels, index in loader)
    pieces = _Pieces(batches, len(share), maps_of)
    parts = list(progress(searched(images, pieces, num_workers, multi_contour), len(pieces), "boxes"))
    empty = [np.empty(0, np.int64), np.empty((0, LEVELS - 1, 4), np.uint8), np.empty((0, 2), bool)]
    index, boxes, state = (np.concatenate([empty[c], *(part[c] for part in parts)]) for c in range(3))
    broken = sum(all_gather_objects(np.array([(~state[:, 0]).sum(), state[:, 1].sum()])))
    return LevelBoxes(images, index, boxes, *broken.tolist())
