"""Random numbers as a pure function of what they are for.

Every draw of this room names the seed, its purpose and its counters (epoch, index). Nothing is kept between draws, so
the order of samples and the crops of each do not depend on the number of workers, on the number of ranks, or on
where a resumed run starts. Philox is counter-based: a draw costs a few microseconds and neighbours are independent.
"""

from __future__ import annotations

import numpy as np

# Purposes: two uses of the same (seed, epoch, index) must not see the same numbers.
ORDER, CROPS, SUBSTITUTE, DEMO = 1, 2, 3, 4


def raw_words(count: int, seed: int, purpose: int, epoch: int = 0, index: int = 0) -> np.ndarray:
    """`count` uniform 64-bit words (uint64) for this seed, purpose, epoch and index."""
    generator = np.random.Philox(key=[seed % 2**64, purpose], counter=[0, epoch, index, 0])
    return generator.random_raw(count)


def uniforms(count: int, seed: int, purpose: int, epoch: int = 0, index: int = 0) -> np.ndarray:
    """`count` float64 numbers, uniform in [0, 1), for this seed, purpose, epoch and index."""
    return (raw_words(count, seed, purpose, epoch, index) >> np.uint64(11)) * 2.0**-53


def permutation(count: int, seed: int, epoch: int) -> np.ndarray:
    """A random order of range(count), int64. Sorting raw words keeps it the same under every version of numpy."""
    return np.argsort(raw_words(count, seed, ORDER, epoch), kind="stable")
