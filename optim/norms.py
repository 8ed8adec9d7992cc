"""Euclidean norms of many tensors at once, accurate for long ones and whole for sharded ones."""

from __future__ import annotations

import torch
import torch.distributed as dist
from torch import Tensor


def tensor_norms(tensors: list[Tensor], group: dist.ProcessGroup | None = None) -> Tensor:
    """Euclidean norms (P,); of slices, with the group of processes that share them, those of the whole tensors.

    On CPU torch's norm adds up long float32 sums: 6e-4 off for 65536 x 256 prototypes, where a dot product is
    off by 3e-5, and faster.
    """
    if any(t.device.type != "cpu" for t in tensors):
        norms = torch.stack(torch._foreach_norm(tensors))
    else:
        flat = [t.view(-1) if t.is_contiguous() else t.flatten() for t in tensors]
        norms = torch.stack([t.dot(t) for t in flat]).sqrt()
    if group is not None:
        squares = norms.square()
        dist.all_reduce(squares, group=group)
        norms = squares.sqrt()
    return norms
