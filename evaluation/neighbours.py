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


def row_topk(values: Tensor, k: int) -> tuple[Tensor, Tensor]:
    """`values.topk(k)` along the rows of a matrix. On CPU in two stages: half the time for wide rows.

    Columns fall into groups of m. The k largest entries lie in at most k groups, and these are among the k groups of
    largest maxima; so only k·m entries are ranked.
    """
    m = 16
    width = values.shape[1]
    groups = width // m
    if values.device.type != "cpu" or groups < 2 * k:
        return values.topk(k)
    best = values[:, : groups * m].unflatten(1, (m, groups)).amax(1).topk(k, sorted=False).indices  # (rows, k)
    columns = (best[:, None, :] + groups * torch.arange(m)[:, None]).flatten(1)  # (rows, m * k)
    if groups * m < width:
        columns = torch.cat([columns, torch.arange(groups * m, width).expand(len(values), -1)], dim=1)
    top, index = values.gather(1, columns).topk(k)
    return top, columns.gather(1, index)


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
    with exact_fp32_matmul(device):
        for start in range(0, n, block):
            keys = train_features[start : start + block].to(device, torch.float32)
            key_labels = train_labels[start : start + block].to(device)
            for first in range(0, q, rows):
                chunk = slice(first, first + rows)
                found, index = row_topk(queries[chunk].float() @ keys.T, min(k, len(keys)))  # (rows, k)
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
