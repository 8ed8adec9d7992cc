"""How the images of a step are divided among processes and forwards."""

from __future__ import annotations

import argparse
import dataclasses

from data.sampler import TrainSampler
from runtime.distributed import get_rank, get_world_size
from runtime.guards import InputError


@dataclasses.dataclass(frozen=True)
class Plan:
    """The sizes that follow from the requested batch, the data set and the number of processes."""

    batch_size: int  # images per process and forward
    accum: int  # forwards per step
    steps_per_epoch: int
    rank: int = 0
    world_size: int = 1
    repeats: int = 1  # times that a step shows each of its images

    @property
    def global_batch(self) -> int:
        """Images per step, over all processes."""
        return self.batch_size * self.accum * self.world_size

    def sampler(self, images: int, seed: int) -> TrainSampler:
        """The order in which this process takes `images` images."""
        return TrainSampler(images, self.batch_size, self.accum, seed, self.rank, self.world_size, self.repeats)


def make_plan(args: argparse.Namespace, images: int, repeats: int = 1) -> Plan:
    """The plan for a data set of `images` images. Raises InputError if the batch can't be divided or filled."""
    rank, world_size = get_rank(), get_world_size()
    batch_size, accum = split_batch(args, world_size)
    plan = Plan(batch_size, accum, 0, rank, world_size, repeats)
    return dataclasses.replace(plan, steps_per_epoch=plan.sampler(images, args.seed).steps_per_epoch)


def split_batch(args: argparse.Namespace, world_size: int) -> tuple[int, int]:
    """(images per process and forward, forwards per step) for the requested global batch.

    Raises InputError if it can't be divided equally, or only into forwards of a few images each.
    """
    most, wanted = args.batch_size_per_gpu, args.global_batch_size
    if wanted is None:
        return most, args.grad_accum or 1
    per_process, rest = divmod(wanted, world_size)
    if rest or per_process == 0:
        raise InputError(f"--global_batch_size {wanted} cannot be shared equally by {world_size} processes")
    if args.grad_accum is not None:
        if per_process % args.grad_accum:
            raise InputError(
                f"--global_batch_size {wanted} over {world_size} processes is {per_process} images each, "
                f"which --grad_accum {args.grad_accum} does not divide"
            )
        return per_process // args.grad_accum, args.grad_accum
    accum = next(n for n in range(1, per_process + 1) if per_process % n == 0 and per_process // n <= most)
    fewest = -(-per_process // most)
    if accum > 2 * fewest:  # a prime number of images would need forwards of one image each
        near = [n * world_size for n in (per_process // fewest * fewest, -(-per_process // fewest) * fewest) if n]
        raise InputError(
            f"--global_batch_size {wanted} over {world_size} processes is {per_process} images each, which "
            f"--batch_size_per_gpu {most} splits into {accum} forwards of only {per_process // accum}; choose a global "
            f"batch such as {' or '.join(str(n) for n in dict.fromkeys(near))}, or set --grad_accum {accum} to insist"
        )
    return per_process // accum, accum
