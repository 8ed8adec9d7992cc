"""A batch that is spread over the ranks: each rank has a part of it, and heads train on the whole.

Letters: B images of the global batch, b images of one rank, D width.
"""

from __future__ import annotations

from collections.abc import Iterable

import torch
import torch.distributed as dist
from torch import Tensor

from runtime.distributed import get_rank, get_world_size


def gather_batch(batch: list[Tensor], target: Tensor) -> tuple[list[Tensor], Tensor]:
    """The global batch on every rank, in the order of ranks: features (B, D) per form, and labels (B,)."""
    if get_world_size() == 1:
        return batch, target
    if batch:
        widths = [x.shape[1] for x in batch]
        joined = torch.cat(_pieces(torch.cat(batch, dim=1)))
        batch = [part.contiguous() for part in joined.split(widths, dim=1)]
    return batch, torch.cat(_pieces(target))


def with_other_ranks(mine: Tensor) -> Tensor:
    """(b, D) of every rank as one (B, D), on every rank; only this rank's own rows have a gradient.

    If all ranks then compute the same loss over B, the sum of their gradients of what made the rows is the gradient of
    that loss (`sum_gradients`), and nothing has to travel in the backward pass.
    """
    if get_world_size() == 1:
        return mine
    pieces = _pieces(mine.detach())
    pieces[get_rank()] = mine
    return torch.cat(pieces)


def sum_gradients(parameters: Iterable[torch.nn.Parameter]) -> None:
    """Replace each gradient by its sum over the ranks, in one exchange."""
    if get_world_size() == 1:
        return
    gradients = [p.grad for p in parameters if p.grad is not None]
    if not gradients:
        return
    flat = torch.cat([gradient.flatten() for gradient in gradients])
    dist.all_reduce(flat)
    for gradient, total in zip(gradients, flat.split([g.numel() for g in gradients]), strict=True):
        gradient.copy_(total.view_as(gradient))


def _pieces(mine: Tensor) -> list[Tensor]:
    """Every rank's tensor of this shape, in the order of ranks."""
    mine = mine.contiguous()
    pieces = [torch.empty_like(mine) for _ in range(get_world_size())]
    dist.all_gather(pieces, mine)
    return pieces
