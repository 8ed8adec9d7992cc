"""Which images make up which batch: a pure function of (seed, epoch), cut into steps and ranks.

One permutation per epoch is cut into global steps of G = batch_size * accum * world_size images; rank r takes the r-th
contiguous slice of a step, in `accum` micro-batches. With a fixed global batch, a step therefore sees the same images
whatever the number of ranks or micro-batches, and a run resumes in the middle of an epoch from its step number alone.
The published code shards with torch's DistributedSampler, which does neither.
"""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np

from data.draws import check_seed, permutation
from runtime.guards import InputError


class TrainSampler:
    """Batch sampler of (epoch, index) pairs for one rank.

    Iterating gives the micro-batches of one epoch, lists of `batch_size` pairs, from the position set by
    `set_position`; the iteration after that starts the next epoch unless a position is set again. The images that
    do not fill a last step are left out of the epoch.

    repeats: above 1, a step holds fewer images, each that often (repeated augmentation); the n-th repetition of image i
    has the index i + n * num_samples. An epoch has as many steps as without, so it shows a part of the images only.
    """

    def __init__(
        self, num_samples: int, batch_size: int, accum: int = 1, seed: int = 0, rank: int = 0, world_size: int = 1,
        repeats: int = 1,
    ):  # fmt: skip
        counts = {"batch size": batch_size, "number of micro-batches": accum, "world size": world_size}
        for name, value in (counts | {"number of repetitions": repeats}).items():
            if value < 1:
                raise InputError(f"the {name} must be at least 1, not {value}")
        if not 0 <= rank < world_size:
            raise InputError(f"rank {rank} is not one of the {world_size} ranks 0..{world_size - 1}")
        self.num_samples, self.batch_size, self.accum, self.repeats = num_samples, batch_size, accum, repeats
        self.seed, self.rank, self.world_size = check_seed(seed), rank, world_size
        self.global_batch = batch_size * accum * world_size
        self.steps_per_epoch = num_samples // self.global_batch
        if self.steps_per_epoch == 0:
            parts = f"{batch_size} per process x {accum} micro-batches x {world_size} processes"
            raise InputError(
                f"the data set has {num_samples} images, fewer than one global batch of {self.global_batch} ({parts}): "
                f"lower --batch_size_per_gpu or --global_batch_size to at most {num_samples} images in all, "
                "or use more images"
            )
        self.epoch, self.step = 0, 0

    def set_position(self, epoch: int, step: int = 0) -> None:
        """Make the next iteration start at optimiser step `step` (0-based) of `epoch`."""
        if not 0 <= step <= self.steps_per_epoch:
            raise InputError(f"step {step} is outside an epoch of {self.steps_per_epoch} steps")
        self.epoch, self.step = epoch, step

    def __len__(self) -> int:
        """Micro-batches that this rank still gets from the epoch at the current position."""
        return (self.steps_per_epoch - self.step) * self.accum

    def __iter__(self) -> Iterator[list[tuple[int, int]]]:
        epoch, first_step = self.epoch, self.step
        self.epoch, self.step = epoch + 1, 0
        order = permutation(self.num_samples, self.seed, epoch)
        per_rank = self.batch_size * self.accum
        different = -(-self.global_batch // self.repeats)  # images in a step
        repetition, place = np.divmod(np.arange(self.global_batch), different)
        for step in range(first_step, self.steps_per_epoch):
            indices = order[step * different + place] + repetition * self.num_samples
            start = self.rank * per_rank
            for micro in range(start, start + per_rank, self.batch_size):
                yield [(epoch, int(i)) for i in indices[micro : micro + self.batch_size]]


def shard_for_eval(count: int, rank: int, world_size: int) -> np.ndarray:
    """The contiguous share of range(count) that `rank` evaluates, int64: each index on one rank only, no padding."""
    return np.arange(count * rank // world_size, count * (rank + 1) // world_size)
