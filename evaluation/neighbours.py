"""The nearest training images of each query: exact cosine neighbours in bounded memory, over any number of ranks.

Letters: n training images, q queries, D width, k neighbours.
"""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Iterator
from typing import NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor

from runtime.distributed import get_world_size
from runtime.hardware import FLOAT32_LEVEL, product_error

CHUNK_BYTES = 128 << 20  # bound of each large temporary: a block of training features, a chunk of similarities
GROUP = 16  # columns of one group: about the root of (images / k), which balances the two stages
BLOCK = 4096  # columns multiplied at once: with a few hundred queries, what a core's cache holds


class Neighbours(NamedTuple):
    """The k nearest training images of each query, nearest first."""

    similarity: Tensor  # (q, k) float32; -inf if a shard had fewer than k images
    label: Tensor  # (q, k) int64


@functools.cache
def fastest_exact_precision(device_type: str) -> str:
    """The fastest float32 matmul setting whose products have float32's error here.

    "medium" takes another CPU library, about twice as fast and as exact, except on processors with AMX, on which it
    multiplies in bf16 (measured error 6e-4 on unit vectors, which reorders neighbours). TF32 on a GPU does the same.
    """
    return "medium" if device_type == "cpu" and product_error("medium") < FLOAT32_LEVEL else "highest"


@contextlib.contextmanager
def exact_fp32_matmul(device: torch.device) -> Iterator[None]:
    """Inside, float32 products have float32's error, whatever faster setting the program runs under."""
    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision(fastest_exact_precision(device.type))
    try:
        yield
    finally:
        torch.set_float32_matmul_precision(before)


def product_topk(queries: Tensor, keys: Tensor, k: int, space: Tensor) -> tuple[Tensor, Tensor]:
    """The k largest entries of each row of queries @ keys.T, largest first, and their columns: (q, k) each.

    queries (q, D), keys (n, D) with n >= k, float32; space: q x n numbers or more, which are overwritten.

    On a CPU in two stages. Columns fall into groups of GROUP, and a group's maximum is taken while its part of the
    product is still in the cache. The k largest entries lie in at most k groups, and these are among the k groups of
    largest maxima; so only k * GROUP entries are ranked.
    """
    q, n = len(queries), len(keys)
    values = space.view(-1)[: q * n].view(q, n)
    blocks = -(-n // BLOCK)
    width = n // (GROUP * blocks)  # groups in a block: columns p, p + width, p + 2 width ... are one
    if queries.device.type != "cpu" or width * blocks < 2 * k:
        return torch.mm(queries, keys.T, out=values).topk(k)
    columns = GROUP * width
    maxima = torch.empty(q, blocks, width)
    for i in range(blocks):
        part = values[:, i * columns : (i + 1) * columns]
        torch.mm(queries, keys[i * columns : (i + 1) * columns].T, out=part)
        torch.amax(part.unflatten(1, (GROUP, width)), 1, out=maxima[:, i])
    left = torch.mm(queries, keys[blocks * columns :].T)  # fewer columns than fill one more group in each block

    best = maxima.flatten(1).topk(k, sorted=False).indices
    first = best // width * columns + best % width  # (q, k): each group's first column
    groups = values.as_strided((q, n - (GROUP - 1) * width, GROUP), (n, 1, width))  # the group that starts at a column
    candidates = groups.gather(1, first[:, :, None].expand(-1, -1, GROUP)).flatten(1)
    top, place = torch.cat([candidates, left], dim=1).topk(k)
    inside = first.gather(1, (place // GROUP).clamp(max=k - 1)) + place % GROUP * width
    return top, torch.where(place < k * GROUP, inside, place - k * GROUP + blocks * columns)


def nearest(
    train_features: Tensor, train_labels: Tensor, queries: Tensor, k: int, chunk_bytes: int = CHUNK_BYTES
) -> Neighbours:
    """The k nearest of `train_features` (n, D) for each of `queries` (q, D), in fp32 from fp32 or fp16 storage.

    Training features pass once, block by block; for each block the queries pass chunk by chunk, and the best k so far
    are kept. Work is done on the device of the queries. With n < k the missing neighbours have similarity -inf.
    """
    n, dim = train_features.shape
    q, device = len(queries), queries.device
    similarity = torch.full((q, k), -torch.inf, device=device)
    label = torch.zeros((q, k), dtype=torch.int64, device=device)
    block = max(1, min(n, chunk_bytes // (4 * dim)))
    rows = max(1, min(q, chunk_bytes // (4 * block)))
    space = torch.empty(rows * block, device=device)
    with exact_fp32_matmul(device):
        for start in range(0, n, block):
            keys = train_features[start : start + block].to(device, torch.float32)
            key_labels = train_labels[start : start + block].to(device)
            for first in range(0, q, rows):
                chunk = slice(first, first + rows)
                found, index = product_topk(queries[chunk].float(), keys, min(k, len(keys)), space)  # (rows, k)
                found_labels = key_labels[index]
                if start:  # merge with the blocks before
                    found = torch.cat([similarity[chunk], found], dim=1)
                    found_labels = torch.cat([label[chunk], found_labels], dim=1)
                    found, index = found.topk(min(k, found.shape[1]))
                    found_labels = found_labels.gather(1, index)
                similarity[chunk, : found.shape[1]] = found
                label[chunk, : found.shape[1]] = found_labels
    return Neighbours(similarity, label)


def merge_ranks(part: Neighbours) -> Neighbours:
    """The k nearest over all ranks' shards of the training set, from each rank's own k nearest."""
    k = part.similarity.shape[1]
    gathered = []
    for tensor in part:
        pieces = [torch.empty_like(tensor) for _ in range(get_world_size())]
        dist.all_gather(pieces, tensor.contiguous())
        gathered.append(torch.cat(pieces, dim=1))  # (rows, k * world)
    similarity, index = gathered[0].topk(k)
    return Neighbours(similarity, gathered[1].gather(1, index))
