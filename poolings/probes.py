"""Attentive probes: a learned query's cross-attention, trained with the classifier on tokens of a frozen backbone.

    logits = Linear(BatchNorm1d(pool(X)))       BatchNorm without an affine map, eps 1e-6; capi brings its classifier

Formulas and parameter names follow "Attention, Please! Revisiting Attentive Probing Through the Lens of Efficiency"
(ICLR 2026), its published code, and the codes that it compares with. Queries are folded into the key maps
(poolings.queries), which changes the cost and not the numbers.

Shape letters: B batch, N positions (tokens), D width, h heads, d = D / h.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from poolings.base import PoolingBase, head_count, whole
from poolings.queries import fold, project, scaled_heads, weigh

HEAD_WIDTH = 64  # of coca and capi
CAE_EPS = 1e-5
START = 0.02  # deviation of queries that start small


class Aim(PoolingBase):
    """One learned query attends to batch-normalised features.

        X' = BatchNorm(X),  a_j = softmax_p(q_j Wk_j x'_p / sqrt(d)),  u = concatenation over heads j of
        sum_p a_jp Wv_j x'_p

    BatchNorm is over images and positions, without an affine map, eps 1e-6; in training it takes the batch's own
    statistics. No biases, no query and output maps; q starts at 0.02 N(0, 1).

    Source: El-Nouby et al., "Scalable Pre-training of Large Autoregressive Image Models", ICML 2024.
    Shapes: (B, N, D) or (B, D, H, W) -> (B, D); attention (B, heads, N), one distribution per head.

    Args:
        dim: width D, divisible by heads.
        heads: heads h of the attention.
    """

    name = "aim"

    def __init__(self, dim: int, heads: int = 16) -> None:
        super().__init__(dim)
        self.heads = head_count(self.name, heads, dim)
        self.cls_token = nn.Parameter(START * torch.randn(1, 1, dim))
        self.k = nn.Linear(dim, dim, bias=False)
        self.v = nn.Linear(dim, dim, bias=False)
        self.bn = nn.BatchNorm1d(dim, affine=False, eps=1e-6)

    def pool(self, x: Tensor) -> tuple[Tensor, Tensor]:
        x = self.bn(x.flatten(0, 1)).unflatten(0, x.shape[:2])
        attention = weigh(fold(scaled_heads(self.cls_token[0, 0], self.heads), self.k.weight), x)
        return project(attention @ x, self.v.weight), attention

    def extra_repr(self) -> str:
        return f"dim={self.dim}, heads={self.heads}"


class Cae(PoolingBase):
    """One cross-attention of a learned query c, without residual and MLP.

        a_j = softmax_p((Wq LN_q(c))_j Wk_j LN_k(x_p) / sqrt(d)),  u = proj(concatenation over heads j of
        sum_p a_jp Wv_j LN_v(x_p))

    with a bias in the output map only; c starts at zeros. `norm2_cross` belongs to the published state and takes no
    part: it is frozen, as it never has a gradient.

    Source: Chen et al., "Context Autoencoder for Self-Supervised Representation Learning", IJCV 2024.
    Shapes: (B, N, D) or (B, D, H, W) -> (B, D); attention (B, heads, N), one distribution per head.

    Args:
        dim: width D, divisible by heads.
        heads: heads h of the attention.
    """

    name = "cae"

    def __init__(self, dim: int, heads: int = 8) -> None:
        super().__init__(dim)
        self.heads = head_count(self.name, heads, dim)
        self.query_token = nn.Parameter(torch.zeros(1, 1, dim))
        self.norm1_q = nn.LayerNorm(dim, eps=CAE_EPS)
        self.norm1_k = nn.LayerNorm(dim, eps=CAE_EPS)
        self.norm1_v = nn.LayerNorm(dim, eps=CAE_EPS)
        self.norm2_cross = nn.LayerNorm(dim, eps=CAE_EPS).requires_grad_(False)
        self.cross_attn = nn.ModuleDict(
            {name: nn.Linear(dim, dim, bias=name == "proj") for name in ("q", "k", "v", "proj")}
        )

    def pool(self, x: Tensor) -> tuple[Tensor, Tensor]:
        attn = self.cross_attn
        query = scaled_heads(attn["q"](self.norm1_q(self.query_token[0, 0])), self.heads)
        folded = fold(query, attn["k"].weight)
        x = F.layer_norm(x, (self.dim,), eps=CAE_EPS)  # once: keys and values differ by what follows
        shift = folded @ self.norm1_k.bias  # (h,), moves all logits alike
        logits = (folded * self.norm1_k.weight) @ x.transpose(1, 2) + shift.unsqueeze(1)
        attention = logits.softmax(dim=2)
        means = attention @ x * self.norm1_v.weight + self.norm1_v.bias
        return attn["proj"](project(means, attn["v"].weight)), attention

    def extra_repr(self) -> str:
        return f"dim={self.dim}, heads={self.heads}"


class Coca(PoolingBase):
    """Learned queries of which only the first matters, with one key and value for all heads.

        a_j = softmax_p((Wq LN(q_1))_j Wk x_p / 8),  u = Wo (concatenation over heads j of Wv sum_p a_jp x_p)

    without biases; heads, keys and values are 64 wide. LN has eps 1e-5, and its `beta` is a buffer of zeros. The
    other queries are parameters of the published model that no result depends on.

    Source: Yu et al., "CoCa: Contrastive Captioners are Image-Text Foundation Models", TMLR 2022.
    Shapes: (B, N, D) or (B, D, H, W) -> (B, D); attention (B, heads, N) of the first query, one distribution per head.

    Args:
        dim: width D.
        queries: number of queries.
        heads: heads h of the attention, each 64 wide whatever D is.
    """

    name = "coca"

    def __init__(self, dim: int, queries: int = 196, heads: int = 8) -> None:
        super().__init__(dim)
        self.heads = whole(self.name, "heads", heads)
        self.img_queries = nn.Parameter(torch.randn(whole(self.name, "queries", queries), dim))
        self.norm = _NormWithoutBias(dim)
        self.to_q = nn.Linear(dim, heads * HEAD_WIDTH, bias=False)
        self.to_kv = nn.Linear(dim, 2 * HEAD_WIDTH, bias=False)
        self.to_out = nn.Linear(heads * HEAD_WIDTH, dim, bias=False)

    def pool(self, x: Tensor) -> tuple[Tensor, Tensor]:
        key, value = self.to_kv.weight.chunk(2)  # (64, D)
        query = self.to_q(self.norm(self.img_queries[0])).unflatten(0, (self.heads, HEAD_WIDTH))
        attention = weigh(query @ key * HEAD_WIDTH**-0.5, x)
        return self.to_out((attention @ x @ value.T).flatten(1)), attention

    def extra_repr(self) -> str:
        return f"dim={self.dim}, queries={len(self.img_queries)}, heads={self.heads}"


class _NormWithoutBias(nn.Module):
    """A LayerNorm whose bias is not learned."""

    def __init__(self, dim: int) -> None:
        super().__init__()
        self.gamma = nn.Parameter(torch.ones(dim))
        self.register_buffer("beta", torch.zeros(dim))

    def forward(self, x: Tensor) -> Tensor:
        return F.layer_norm(x, self.gamma.shape, self.gamma, self.beta)


class VJepa(PoolingBase):
    """One block of cross-attention of a learned query q, with residuals and MLP.

        q = q + proj(attention from Wq q to [Wk; Wv] LN(X)),  u = q + MLP(LN(q))

    with biases; the MLP has ratio 4 and GELU, LayerNorms eps 1e-5. Linear maps and q start at 0.02 N(0, 1) (truncated),
    biases at 0.

    Source: Bardes et al., "Revisiting Feature Prediction for Learning Visual Representations from Video", TMLR 2024.
    Shapes: (B, N, D) or (B, D, H, W) -> (B, D); attention (B, heads, N), one distribution per head.

    Args:
        dim: width D, divisible by heads.
        heads: heads h of the attention.
    """

    name = "vjepa"

    def __init__(self, dim: int, heads: int = 16) -> None:
        super().__init__(dim)
        self.query_tokens = nn.Parameter(nn.init.trunc_normal_(torch.empty(1, 1, dim), std=START))
        self.cross_attention_block = _CrossAttentionBlock(dim, head_count(self.name, heads, dim))

    def pool(self, x: Tensor) -> tuple[Tensor, Tensor]:
        return self.cross_attention_block(self.query_tokens[0, 0], x)

    def extra_repr(self) -> str:
        return f"dim={self.dim}, heads={self.cross_attention_block.heads}"


class _CrossAttentionBlock(nn.Module):
    """(D,) query, (B, N, D) features -> (B, D) updated query and (B, h, N) attention."""

    def __init__(self, dim: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.norm1 = nn.LayerNorm(dim)
        maps = {"q": nn.Linear(dim, dim), "kv": nn.Linear(dim, 2 * dim), "proj": nn.Linear(dim, dim)}
        self.xattn = nn.ModuleDict(maps)
        self.norm2 = nn.LayerNorm(dim)
        self.mlp = nn.ModuleDict({"fc1": nn.Linear(dim, 4 * dim), "fc2": nn.Linear(4 * dim, dim)})
        for module in self.modules():
            if isinstance(module, nn.Linear):
                nn.init.trunc_normal_(module.weight, std=START)
                nn.init.zeros_(module.bias)

    def forward(self, query: Tensor, x: Tensor) -> tuple[Tensor, Tensor]:
        context, attention = _attend(self.xattn["q"](query), self.norm1(x), self.xattn["kv"], self.heads)
        query = query + self.xattn["proj"](context)
        hidden = F.gelu(self.mlp["fc1"](self.norm2(query)))
        return query + self.mlp["fc2"](hidden), attention


class Capi(PoolingBase):
    """One learned query and the classifier: logits = Linear(concatenation over heads j of sum_p a_jp v_jp).

        a_j = softmax_p(q_j k_jp / 8),  [k, v] = Wkv x_p + b

    The query is cut into heads of 64. There is no BatchNorm, and the result are logits. q starts at 0.02 N(0, 1)
    (truncated).

    Source: Darcet et al., "Cluster and Predict Latent Patches for Improved Masked Image Modeling", TMLR 2025.
    Shapes: (B, N, D) or (B, D, H, W) -> (B, classes); attention (B, D / 64, N), one distribution per head.

    Args:
        dim: width D, divisible by 64.
        classes: number of classes.
    """

    name = "capi"

    def __init__(self, dim: int, classes: int = 1000) -> None:
        super().__init__(dim)
        if dim % HEAD_WIDTH:
            raise ValueError(
                f"{self.name}: width {dim} is not divisible into heads of {HEAD_WIDTH}; choose a backbone whose width "
                "is, or another probe"
            )
        self.num_features = whole(self.name, "classes", classes)
        self.query_token = nn.Parameter(nn.init.trunc_normal_(torch.empty(dim), std=START))
        self.kv = nn.Linear(dim, 2 * dim)
        self.linear = nn.Linear(dim, classes)

    def pool(self, x: Tensor) -> tuple[Tensor, Tensor]:
        context, attention = _attend(self.query_token, x, self.kv, self.dim // HEAD_WIDTH)
        return self.linear(context), attention

    def extra_repr(self) -> str:
        return f"dim={self.dim}, classes={self.num_features}"


def _attend(query: Tensor, x: Tensor, kv: nn.Linear, heads: int) -> tuple[Tensor, Tensor]:
    """(D,) query, (B, N, D) features, a map to keys and values -> (B, D) context and (B, h, N) attention.

    The weights of a head sum to 1, so the values' bias counts once.
    """
    key, value = kv.weight.chunk(2)
    attention = weigh(fold(scaled_heads(query, heads), key), x)
    return project(attention @ x, value) + kv.bias.chunk(2)[1], attention
