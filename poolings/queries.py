"""Attention of learned queries, the same for every image, computed without keys and values of all positions.

A query is folded into the key map: each head is one vector of the features' width, which all positions are compared
with. The value map, linear too, is applied to the weighted means. Together that is a few products of D x D per image in
place of N of them, and the same numbers. A bias of the key map moves all logits of a head alike and changes nothing.

Shape letters: B batch, N positions, D width of the features, K width of the result, h heads, d = width of a head.
"""

from __future__ import annotations

import torch
from torch import Tensor


def scaled_heads(query: Tensor, heads: int) -> Tensor:
    """(h d,) query -> (h, d), divided by sqrt(d)."""
    return query.unflatten(0, (heads, -1)) * (query.shape[0] // heads) ** -0.5


def fold(query: Tensor, key: Tensor) -> Tensor:
    """(h, d) scaled query and (h d, D) weight of the key map -> (h, D), whose products with features are logits."""
    return torch.einsum("hd,hde->he", query, key.unflatten(0, query.shape))


def weigh(folded: Tensor, x: Tensor) -> Tensor:
    """(h, D) folded queries and (B, N, D) features -> (B, h, N) attention, a distribution for each head."""
    return (folded @ x.transpose(1, 2)).softmax(dim=2)


def project(means: Tensor, value: Tensor) -> Tensor:
    """(B, h, D) weighted means and (K, D) weight of the value map -> (B, K), each head from its own K / h rows."""
    return torch.einsum("bhe,hde->bhd", means, value.unflatten(0, (means.shape[1], -1))).flatten(1)
