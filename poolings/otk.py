"""OTK: pooling by the optimal transport of positions to a learned reference.

Shape letters: B batch, N positions, D width.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from poolings.base import PoolingBase, positive


class Otk(PoolingBase):
    """Weights by half a Sinkhorn step towards one learned reference vector w.

        K = exp(X w / eps),  a = K / sum_p K_p,  u = sum_p a_p x_p

    With one reference and one iteration the plan is a softmax over positions, and is computed as one: the exponential
    can't overflow.

    Source: Mialon et al., "A Trainable Optimal Transport Embedding for Feature Aggregation and its Relationship to
    Attention", ICLR 2021. Shapes: (B, N, D) or (B, D, H, W) -> (B, D); attention a (B, 1, N), a distribution.

    Args:
        dim: width D.
        eps: entropic regularisation; large values spread the weights evenly. 25 is what SimPool's comparison uses.
    """

    name = "otk"

    def __init__(self, dim: int, eps: float = 25.0) -> None:
        super().__init__(dim)
        self.eps = positive(self.name, "eps", eps)
        self.otk = nn.ParameterDict({"weight": torch.empty(1, 1, dim).uniform_(-1, 1)})  # (heads, references, D)

    def pool(self, x: Tensor) -> tuple[Tensor, Tensor]:
        # A product with a matrix of one column: onnxruntime gets the one of a transposed map with a vector wrong.
        similarity = x @ self.otk["weight"][0].T  # (B, N, 1)
        attention = (similarity / self.eps).softmax(dim=1).transpose(1, 2)
        return (attention @ x).squeeze(1), attention

    def extra_repr(self) -> str:
        return f"dim={self.dim}, eps={self.eps:g}"
