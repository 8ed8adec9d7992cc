"""A learned token that attends to the positions: [CLS] as in ViT, and class attention as in CaiT.

The token is the same for every image, and so is its query: poolings.queries says how that saves the keys and values.

Shape letters: B batch, N positions, D width, h heads, d = D / h.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from poolings.base import PoolingBase, head_count
from poolings.queries import fold, project, scaled_heads


class Cls(PoolingBase):
    """A learned [CLS] token c joins the positions and attends to all of them, itself included.

        a_j = softmax([c, X] Wk_j^T (Wq c)_j / sqrt(d)),  u = concatenation over heads j of Wv_j sum_p a_jp [c, X]_p

    with biases in all three maps; no output map, no MLP.

    Source: Dosovitskiy et al., "An Image is Worth 16x16 Words", ICLR 2021, one attention of it after the backbone.
    Shapes: (B, N, D) or (B, D, H, W) -> (B, D); attention (B, heads, N): from [CLS] to the positions without itself,
    renormalised to a distribution. The published class can't be run (wrong helper signatures); its formula is this.

    Args:
        dim: width D, divisible by heads.
        heads: heads h of the attention.
    """

    name = "cls"

    def __init__(self, dim: int, heads: int = 4) -> None:
        super().__init__(dim)
        self.heads = head_count(self.name, heads, dim)
        self.cls_token = nn.Parameter(torch.zeros(1, 1, dim))
        self.query_proj = nn.Linear(dim, dim)
        self.key_proj = nn.Linear(dim, dim)
        self.value_proj = nn.Linear(dim, dim)

    def pool(self, x: Tensor) -> tuple[Tensor, Tensor]:
        token = self.cls_token[0, 0]
        return attend(self.query_proj(token), token, x, self.key_proj, self.value_proj, self.heads)

    def extra_repr(self) -> str:
        return f"dim={self.dim}, heads={self.heads}"


class Cait(PoolingBase):
    """One class-attention block on a learned token c, with LayerScale, then a LayerNorm.

        c = c + g1 proj(attention from LN(c) to LN([c, X])),  c = c + g2 MLP(LN(c)),  u = LN(c)

    Source: Touvron et al., "Going deeper with Image Transformers", ICCV 2021. The MLP has ratio 4 and GELU; LayerNorms
    have eps 1e-6 inside the block and 1e-5 at the end; g1 and g2 start at 1e-5.
    Shapes: (B, N, D) or (B, D, H, W) -> (B, D); attention (B, heads, N): from c to the positions without itself,
    renormalised to a distribution. The published class can't be run (wrong helper signatures); its formula is this.

    Args:
        dim: width D, divisible by heads.
        heads: heads h of the attention.
    """

    name = "cait"

    def __init__(self, dim: int, heads: int = 4) -> None:
        super().__init__(dim)
        self.heads = head_count(self.name, heads, dim)
        self.cls_token = nn.Parameter(nn.init.trunc_normal_(torch.empty(1, 1, dim), std=0.02))
        self.blocks_token_only = nn.ModuleList([_ClassAttentionBlock(dim, heads)])
        self.norm = nn.LayerNorm(dim)

    def pool(self, x: Tensor) -> tuple[Tensor, Tensor]:
        (block,) = self.blocks_token_only
        token, attention = block(self.cls_token[0, 0], x)
        return self.norm(token), attention

    def extra_repr(self) -> str:
        return f"dim={self.dim}, heads={self.heads}"


class _ClassAttentionBlock(nn.Module):
    """(D,) token, (B, N, D) features -> (B, D) updated token and (B, h, N) attention."""

    def __init__(self, dim: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.gamma_1 = nn.Parameter(1e-5 * torch.ones(dim))
        self.gamma_2 = nn.Parameter(1e-5 * torch.ones(dim))
        self.norm1 = nn.LayerNorm(dim, eps=1e-6)
        self.attn = nn.ModuleDict({name: nn.Linear(dim, dim) for name in ("q", "k", "v", "proj")})
        self.norm2 = nn.LayerNorm(dim, eps=1e-6)
        self.mlp = nn.ModuleDict({"fc1": nn.Linear(dim, 4 * dim), "fc2": nn.Linear(4 * dim, dim)})
        for module in self.modules():
            if isinstance(module, nn.Linear):  # CaiT's own start
                nn.init.trunc_normal_(module.weight, std=0.02)
                nn.init.zeros_(module.bias)

    def forward(self, token: Tensor, x: Tensor) -> tuple[Tensor, Tensor]:
        attn, mlp = self.attn, self.mlp
        normed = self.norm1(token)
        context, attention = attend(attn["q"](normed), normed, self.norm1(x), attn["k"], attn["v"], self.heads)
        token = token + self.gamma_1 * attn["proj"](context)
        hidden = F.gelu(mlp["fc1"](self.norm2(token)))
        return token + self.gamma_2 * mlp["fc2"](hidden), attention


def attend(
    query: Tensor, token: Tensor, x: Tensor, key: nn.Linear, value: nn.Linear, heads: int
) -> tuple[Tensor, Tensor]:
    """Attention of one query (D,) to the token (D,) and the positions x (B, N, D).

    Returns the context (B, D), and the attention to the positions alone (B, h, N), each head's summing to 1.
    """
    query = scaled_heads(query, heads)
    folded = fold(query, key.weight)  # (h, D)
    shift = (query * key.bias.unflatten(0, query.shape)).sum(-1, keepdim=True)  # (h, 1), moves all logits alike
    to_token = folded @ token.unsqueeze(1) + shift  # (h, 1)
    to_positions = folded @ x.transpose(1, 2) + shift  # (B, h, N)
    logits = torch.cat([to_token.expand(x.shape[0], -1, -1), to_positions], dim=2)
    own, others = logits.softmax(dim=2).split([1, x.shape[1]], dim=2)
    mean = own * token + others @ x  # (B, h, D)
    return project(mean, value.weight) + value.bias, to_positions.softmax(dim=2)
