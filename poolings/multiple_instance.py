"""AbMILP: multiple-instance learning's pooling, which scores every position on its own.

Shape letters: B batch, N positions, D width.
"""

from __future__ import annotations

from torch import Tensor, nn
from torch.nn import functional as F

from poolings.base import PoolingBase, flag


class AbMilp(PoolingBase):
    """A mean weighted by scores of an MLP: a = softmax_p(w2 tanh(W1 x_p + b1) + b2), u = sum_p a_p x_p.

    Source: Ilse et al., "Attention-based Deep Multiple Instance Learning", ICML 2018; as a probe: Przewiezlikowski et
    al., "Beyond [cls]: Exploring the True Potential of Masked Image Modeling Representations", ICCV 2025, which by
    default attends among the positions first (`self_attention=True`).
    Shapes: (B, N, D) or (B, D, H, W) -> (B, D); attention (B, 1, N), a distribution.

    Args:
        dim: width D; the MLP's hidden layer is D wide too.
        self_attention: score and average the output of one self-attention with a single head (timm's `Attention`,
            biased at its output only) in place of the features.
    """

    name = "abmilp"

    def __init__(self, dim: int, self_attention: bool = False) -> None:
        super().__init__(dim)
        self.self_attn = _SelfAttention(dim) if flag(self.name, "self_attention", self_attention) else None
        self.attention_predictor = nn.Sequential(nn.Linear(dim, dim), nn.Tanh(), nn.Linear(dim, 1))

    def pool(self, x: Tensor) -> tuple[Tensor, Tensor]:
        if self.self_attn is not None:
            x = self.self_attn(x)
        attention = self.attention_predictor(x).transpose(1, 2).softmax(dim=2)  # (B, 1, N)
        return (attention @ x).squeeze(1), attention

    def extra_repr(self) -> str:
        return f"dim={self.dim}, self_attention={self.self_attn is not None}"


class _SelfAttention(nn.Module):
    """One head over all positions: (B, N, D) -> (B, N, D)."""

    def __init__(self, dim: int) -> None:
        super().__init__()
        self.qkv = nn.Linear(dim, 3 * dim, bias=False)
        self.proj = nn.Linear(dim, dim)

    def forward(self, x: Tensor) -> Tensor:
        return self.proj(F.scaled_dot_product_attention(*self.qkv(x).chunk(3, dim=-1)))
