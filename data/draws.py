"""Random numbers as a pure function of what they are for.

Every draw in this package names the seed, its purpose and its counters (epoch, index). Nothing is kept between draws,
so the order of samples and the crops of each do not depend on the number of workers, on the number of ranks, or on
where a resumed run starts. Philox is counter-based: a draw costs a few microseconds and neighbours are independent.
"""

from __future__ import annotations

import contextlib
import random
from collections.abc import Iterator

import numpy as np
import torch

from runtime.guards import InputError

# Purposes: two uses of the same (seed, epoch, index) must not see the same numbers.
ORDER, CROPS, SUBSTITUTE, DEMO, SPLIT, TRANSFORM, MASKS, MASK_RATIO = 1, 2, 3, 4, 5, 6, 7, 8

SEEDS = 2**63  # seeds are 0 .. SEEDS - 1; beyond, numpy would turn the key into a float and different seeds collide


def check_seed(seed: int, flag: str = "--seed") -> int:
    """The seed itself. Raises `InputError` unless it is a whole number from 0 to 2**63 - 1."""
    if not 0 <= seed < SEEDS or int(seed) != seed:
        raise InputError(f"{flag} {seed}: give a whole number from 0 to {SEEDS - 1}")
    return int(seed)


def raw_words(count: int, seed: int, purpose: int, epoch: int = 0, index: int = 0) -> np.ndarray:
    """`count` uniform 64-bit words (uint64) for this seed, purpose, epoch and index."""
    generator = np.random.Philox(key=[check_seed(seed), purpose], counter=[0, epoch, index, 0])
    return generator.random_raw(count)


def uniforms(count: int, seed: int, purpose: int, epoch: int = 0, index: int = 0) -> np.ndarray:
    """`count` float64 numbers, uniform in [0, 1), for this seed, purpose, epoch and index."""
    return (raw_words(count, seed, purpose, epoch, index) >> np.uint64(11)) * 2.0**-53


def permutation(count: int, seed: int, epoch: int) -> np.ndarray:
    """A random order of range(count), int64. Sorting raw words keeps it the same under every version of numpy."""
    return np.argsort(raw_words(count, seed, ORDER, epoch), kind="stable")


# ---- other people's code, which draws from the process's generators


def seed_generators(seed: int, purpose: int, epoch: int = 0, index: int = 0) -> None:
    """Seed `random`, numpy and torch on the CPU for this seed, purpose, epoch and index."""
    words = raw_words(3, seed, purpose, epoch, index)
    random.seed(int(words[0]))
    np.random.seed(words[1:2].view(np.uint32))
    torch.default_generator.manual_seed(int(words[2] >> np.uint64(1)))


@contextlib.contextmanager
def generators_restored() -> Iterator[None]:
    """Afterwards `random`, numpy and torch on the CPU continue as if nothing had been drawn inside."""
    states = random.getstate(), np.random.get_state(), torch.get_rng_state()
    try:
        yield
    finally:
        random.setstate(states[0])
        np.random.set_state(states[1])
        torch.set_rng_state(states[2])
