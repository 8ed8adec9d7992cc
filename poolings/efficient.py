"""Efficient probing (EP): many learned queries, and a single map for the values.

Shape letters: B batch, N positions (tokens), D width, M queries.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from poolings.base import PoolingBase, whole
from poolings.queries import project, weigh


class Ep(PoolingBase):
    """Efficient probing: M queries compare themselves with the features directly, each averages a slice of the values.

        a_j = softmax_p(q_j x_p / sqrt(D)),  u = concatenation over j of sum_p a_jp V_p^(j),  V = X Wv

    V^(j) is the j-th of M slices of V's channels. No other maps; q starts at 0.02 N(0, 1).

    Source: Psomas et al., "Attention, Please! Revisiting Attentive Probing Through the Lens of Efficiency", ICLR 2026.
    Shapes: (B, N, D) or (B, D, H, W) -> (B, D / d_out); attention (B, M, N), one distribution per query.

    Args:
        dim: width D.
        queries: number M of queries, which divides D / d_out.
        d_out: the values and the result are D / d_out wide.
    """

    name = "ep"

    def __init__(self, dim: int, queries: int = 32, d_out: int = 1) -> None:
        super().__init__(dim)
        if dim % whole(self.name, "d_out", d_out):
            raise ValueError(
                f"{self.name}: width {dim} is not divisible by d_out {d_out}; choose d_out that divides it"
            )
        self.num_features = dim // d_out
        if self.num_features % whole(self.name, "queries", queries):
            raise ValueError(
                f"{self.name}: width {self.num_features} is not divisible into {queries} queries; "
                "choose queries that divides it"
            )
        self.queries = queries
        self.cls_token = nn.Parameter(0.02 * torch.randn(1, queries, dim))
        self.v = nn.Linear(dim, self.num_features, bias=False)

    def pool(self, x: Tensor) -> tuple[Tensor, Tensor]:
        attention = weigh(self.cls_token[0] * self.dim**-0.5, x)
        return project(attention @ x, self.v.weight), attention

    def extra_repr(self) -> str:
        return f"dim={self.dim}, queries={self.queries}, num_features={self.num_features}"


class EpAll(Ep):
    """`Ep` over the patches and the [CLS] token together; the operator is the same, its tokens are one more.

    A model without [CLS] can't serve it; whoever feeds the probe refuses that, as the tokens alone don't tell.
    """

    name = "ep_all"
    takes_cls = True
