"""Vision transformers tiny, small and base: DINO's, with its [CLS] token ("official"), or pooled by an operator.

Follows "An Image is Worth 16x16 Words" as DINO builds it (pre-norm blocks, LayerNorm eps 1e-6), with the parameter
names of its checkpoints and the methods that its scripts call. In every other mode there is no [CLS] token: an operator
(SimPool, or another one of poolings/) pools the tokens of the last block, before the final norm or after it. Before it,
as in the self-supervised models of SimPool, that norm removes SimPool's scalar beta, which therefore has no effect; the
parameter is kept because the published checkpoints contain it.

Departures from the published code, and why:
- Position embeddings of models without [CLS] are left untouched at the native size and resized to the exact grid
  elsewhere (`pos_embed_policy="exact"`). The published code resamples those of SimPool models by (g + 0.1) / g even at
  the native size; `"reference"` does so too, for the weights that were trained with it. Official mode is DINO's:
  untouched at the native size, (g + 0.1) / g elsewhere.
- The gamma that a model is given is the one it uses (published: every teacher has 1.25).
- Any image size divisible by the patch size is accepted; any other raises an error instead of being cut silently.
- Attention uses the kernel that is fastest on the device; `attend` chooses it.

Shape letters: B batch, H, W image size, h, w grid of patches (h = H / patch_size), N = h w patches,
T tokens (N, or N + 1 with [CLS]), D width.
"""

from __future__ import annotations

import functools
from collections.abc import Mapping, Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.init import trunc_normal_

from distill.heads import DINOHead
from pooled_backbone import PooledBackbone, fewer_blocks

__all__ = [
    "Attention",
    "Block",
    "DINOHead",
    "DropPath",
    "Mlp",
    "PatchEmbed",
    "VisionTransformer",
    "drop_path",
    "trunc_normal_",
    "vit_base",
    "vit_small",
    "vit_tiny",
]

POS_EMBED_POLICIES = ("exact", "reference")
CPU_FUSED_FROM = 512  # smallest number of tokens for which inference on CPU uses the fused attention kernel


def drop_path(x: Tensor, drop_prob: float = 0.0, training: bool = False) -> Tensor:
    """Stochastic depth: zero the residual branch of random images, and scale the others up to keep the mean."""
    if drop_prob == 0.0 or not training:
        return x
    keep = x.new_empty((x.shape[0],) + (1,) * (x.ndim - 1)).bernoulli_(1 - drop_prob)
    return x * keep.div_(1 - drop_prob)


class DropPath(nn.Module):
    """Stochastic depth (see drop_path) with probability drop_prob."""

    def __init__(self, drop_prob: float = 0.0) -> None:
        super().__init__()
        self.drop_prob = drop_prob

    def forward(self, x: Tensor) -> Tensor:
        return drop_path(x, self.drop_prob, self.training)

    def extra_repr(self) -> str:
        return f"drop_prob={self.drop_prob:.3f}"


class Mlp(nn.Module):
    """Two linear layers with an activation between."""

    def __init__(
        self,
        in_features: int,
        hidden_features: int | None = None,
        out_features: int | None = None,
        act_layer: type[nn.Module] = nn.GELU,
        drop: float = 0.0,
    ) -> None:
        super().__init__()
        hidden_features = hidden_features or in_features
        self.fc1 = nn.Linear(in_features, hidden_features)
        self.act = act_layer()
        self.fc2 = nn.Linear(hidden_features, out_features or in_features)
        self.drop = nn.Dropout(drop)

    def forward(self, x: Tensor) -> Tensor:
        return self.drop(self.fc2(self.drop(self.act(self.fc1(x)))))


def attend(
    query: Tensor, key: Tensor, value: Tensor, scale: float, dropout: nn.Dropout, need_attention: bool
) -> tuple[Tensor, Tensor | None]:
    """Softmax attention over (B, heads, T, d): the result, and the attention (B, heads, T, T) or None.

    The one place that chooses the kernel: torch's fused one on accelerators, the explicit softmax on CPU. There, with
    gradients, the softmax is as fast in float32 at crop sizes and 1.5 to 6 times as fast in bfloat16; without gradients
    the fused kernel is faster for long sequences and needs less memory. If the attention itself is needed, the softmax
    is always explicit.
    """
    long_inference = query.shape[-2] >= CPU_FUSED_FROM and not torch.is_grad_enabled()
    if not need_attention and (query.device.type != "cpu" or long_inference):
        p = dropout.p if dropout.training else 0.0
        return F.scaled_dot_product_attention(query, key, value, dropout_p=p, scale=scale), None
    attention = attention_weights(query, key, scale)
    return dropout(attention) @ value, attention


def attention_weights(query: Tensor, key: Tensor, scale: float) -> Tensor:
    """(B, heads, R, d) queries, (B, heads, T, d) keys -> (B, heads, R, T), each row a distribution."""
    return (query * scale @ key.transpose(-2, -1)).softmax(dim=-1)


class Attention(nn.Module):
    """Multi-head self-attention."""

    def __init__(
        self,
        dim: int,
        num_heads: int = 8,
        qkv_bias: bool = False,
        qk_scale: float | None = None,
        attn_drop: float = 0.0,
        proj_drop: float = 0.0,
    ) -> None:
        super().__init__()
        if dim % num_heads:
            raise ValueError(f"width {dim} is not divisible into {num_heads} heads; change embed_dim or num_heads")
        self.num_heads = num_heads
        self.scale = (dim // num_heads) ** -0.5 if qk_scale is None else qk_scale
        self.qkv = nn.Linear(dim, dim * 3, bias=qkv_bias)
        self.attn_drop = nn.Dropout(attn_drop)
        self.proj = nn.Linear(dim, dim)
        self.proj_drop = nn.Dropout(proj_drop)

    def forward(self, x: Tensor, need_attention: bool = True, attention_rows: int = 0) -> tuple[Tensor, Tensor | None]:
        """(B, T, D) -> (B, T, D) and the attention (B, heads, T, T), which may be None if it is not needed.

        With attention_rows = R the attention is that of the first R tokens alone, (B, heads, R, T), computed apart from
        the others so that the fastest kernel can be used for the result.
        """
        batch, tokens, dim = x.shape
        qkv = self.qkv(x).reshape(batch, tokens, 3, self.num_heads, dim // self.num_heads)
        query, key, value = qkv.permute(2, 0, 3, 1, 4)  # each (B, heads, T, d)
        x, attention = attend(query, key, value, self.scale, self.attn_drop, need_attention and not attention_rows)
        if attention_rows:
            attention = attention_weights(query[:, :, :attention_rows], key, self.scale)
        x = x.transpose(1, 2).reshape(batch, tokens, dim)
        return self.proj_drop(self.proj(x)), attention


class Block(nn.Module):
    """Pre-norm transformer block: tokens (B, T, D) -> (B, T, D).

    With return_attention it returns the attention (B, heads, T, T) instead of the tokens, as DINO's does; with
    attention_rows = R both: the tokens, and the attention of the first R of them (B, heads, R, T).
    """

    def __init__(
        self,
        dim: int,
        num_heads: int,
        mlp_ratio: float = 4.0,
        qkv_bias: bool = False,
        qk_scale: float | None = None,
        drop: float = 0.0,
        attn_drop: float = 0.0,
        drop_path: float = 0.0,
        act_layer: type[nn.Module] = nn.GELU,
        norm_layer=nn.LayerNorm,
    ) -> None:
        super().__init__()
        self.norm1 = norm_layer(dim)
        self.attn = Attention(dim, num_heads, qkv_bias, qk_scale, attn_drop, proj_drop=drop)
        self.drop_path = DropPath(drop_path) if drop_path > 0 else nn.Identity()
        self.norm2 = norm_layer(dim)
        self.mlp = Mlp(dim, int(dim * mlp_ratio), act_layer=act_layer, drop=drop)

    def forward(
        self, x: Tensor, return_attention: bool = False, attention_rows: int = 0
    ) -> Tensor | tuple[Tensor, Tensor]:
        rows = {"attention_rows": attention_rows} if attention_rows else {}  # a substitute of Attention may lack it
        y, attention = self.attn(self.norm1(x), need_attention=return_attention, **rows)
        if return_attention:
            return attention
        x = x + self.drop_path(y)
        x = x + self.drop_path(self.mlp(self.norm2(x)))
        return (x, attention) if attention_rows else x


def image_size(size: int | Sequence[int]) -> tuple[int, int]:
    """(height, width) from a number, [size] or (height, width); ValueError for anything else."""
    sizes = (size,) if isinstance(size, int) else tuple(size)
    if len(sizes) not in (1, 2) or min(sizes) < 1:
        raise ValueError(f"image size {size} is not a positive number or a (height, width) pair")
    return sizes[0], sizes[-1]


class PatchEmbed(nn.Module):
    """Image to patch tokens: (B, C, H, W) -> (B, N, D)."""

    def __init__(
        self, img_size: int | Sequence[int] = 224, patch_size: int = 16, in_chans: int = 3, embed_dim: int = 768
    ) -> None:
        super().__init__()
        if patch_size < 1:
            raise ValueError(f"patch size {patch_size} must be at least 1")
        self.img_size = image_size(img_size)
        self.patch_size = patch_size
        self.grid_size = self.grid(*self.img_size)
        self.num_patches = self.grid_size[0] * self.grid_size[1]
        self.proj = nn.Conv2d(in_chans, embed_dim, kernel_size=patch_size, stride=patch_size)

    def grid(self, height: int, width: int) -> tuple[int, int]:
        """(h, w) of an image. Raises ValueError if its size is not divisible by the patch size."""
        size = self.patch_size
        if height < size or width < size or height % size or width % size:
            near = tuple(max(size, round(side / size) * size) for side in (height, width))
            raise ValueError(
                f"image size {height}x{width} is not divisible into patches of size {size}; "
                f"resize or crop to {near[0]}x{near[1]}, or choose another patch size"
            )
        return height // size, width // size

    def forward(self, x: Tensor) -> Tensor:
        self.grid(*x.shape[-2:])
        return self.proj(x).flatten(2).transpose(1, 2)


def _resample(maps: Tensor, size: tuple[int, int], scale: tuple[float, float] | None) -> Tensor:
    """Bicubic resampling of maps (B, C, h, w) to `size`; `scale`, if given, sets the source positions."""
    if not _lacks_backward(maps.device):
        if scale is None:
            return F.interpolate(maps, size=size, mode="bicubic")
        return F.interpolate(maps, scale_factor=scale, mode="bicubic")
    rows, columns = (
        _bicubic_matrix(maps.shape[2 + axis], size[axis], None if scale is None else scale[axis]).to(maps)
        for axis in (0, 1)
    )
    return rows @ maps @ columns.T


def _lacks_backward(device: torch.device) -> bool:
    """Whether bicubic interpolation fails on this device: on CUDA it has no deterministic backward."""
    return device.type == "cuda" and torch.are_deterministic_algorithms_enabled()


@functools.cache
def _bicubic_matrix(before: int, after: int, scale: float | None) -> Tensor:
    """The matrix (after, before) with which torch resamples one axis, obtained by interpolating unit vectors."""
    units = torch.eye(before).view(1, before, before, 1)  # unit vector c lies along the rows of channel c
    if scale is None:
        return F.interpolate(units, size=(after, 1), mode="bicubic")[0, :, :, 0].T
    return F.interpolate(units, scale_factor=(scale, 1.0), mode="bicubic")[0, :, :, 0].T


class VisionTransformer(PooledBackbone):
    """Vision transformer that returns features (B, D), or logits if num_classes > 0.

    Args:
        mode: "official" ([CLS] token, as DINO's) or an operator's name, such as "simpool".
        gamma: SimPool's exponent, or None; other modes do not use it.
        img_size: native size in pixels: a number, [size] or (height, width). forward accepts other sizes too.
        patch_size: side of the square patches in pixels.
        drop_path_rate: stochastic depth of the last block; earlier ones have proportionally less.
        pos_embed_policy: "exact" or "reference" (module docstring); official mode follows DINO.
        value_min, use_beta, pool_position, pooling_args: of the pooling, see PooledBackbone.
        pool_depth: number of blocks, at the end, that are not built: pooling takes place as much earlier.
        masked_im_modeling: have the parameter `masked_embed` (1, D), zeros at first, which takes the place of masked
            patches (iBOT's student); without it the model takes no masks.

    Raises:
        ValueError: for an unknown mode or policy, settings that the pooling does not have, a size not divisible by the
            patch size, or a width not divisible by the number of heads.
    """

    def __init__(
        self,
        mode: str = "official",
        gamma: float | None = 1.25,
        img_size: int | Sequence[int] = (224,),
        patch_size: int = 16,
        in_chans: int = 3,
        num_classes: int = 0,
        embed_dim: int = 768,
        depth: int = 12,
        num_heads: int = 12,
        mlp_ratio: float = 4.0,
        qkv_bias: bool = False,
        qk_scale: float | None = None,
        drop_rate: float = 0.0,
        attn_drop_rate: float = 0.0,
        drop_path_rate: float = 0.0,
        norm_layer=partial(nn.LayerNorm, eps=1e-6),  # noqa: B008 (a constructor, never changed)
        pos_embed_policy: str = "exact",
        value_min: str = "image",
        masked_im_modeling: bool = False,
        use_beta: bool | None = None,
        pool_position: str = "before",
        pool_depth: int = 0,
        pooling_args: Mapping[str, Any] | None = None,
    ) -> None:
        super().__init__(mode, gamma, value_min, use_beta, pool_position, pooling_args)
        depth = fewer_blocks(depth, pool_depth)
        if pos_embed_policy not in POS_EMBED_POLICIES:
            known = ", ".join(POS_EMBED_POLICIES)
            raise ValueError(f"unknown pos_embed_policy {pos_embed_policy!r}; choose one of {known}")
        self.pos_embed_policy = pos_embed_policy
        self.embed_dim = embed_dim
        self.patch_size = patch_size

        self.patch_embed = PatchEmbed(img_size, patch_size, in_chans, embed_dim)
        self.num_prefix_tokens = 1 if mode == "official" else 0
        if mode == "official":
            self.cls_token = nn.Parameter(torch.zeros(1, 1, embed_dim))
        if masked_im_modeling:
            self.masked_embed = nn.Parameter(torch.zeros(1, embed_dim))
        positions = self.num_prefix_tokens + self.patch_embed.num_patches
        self.pos_embed = nn.Parameter(torch.zeros(1, positions, embed_dim))
        self.pos_drop = nn.Dropout(drop_rate)
        self.blocks = nn.ModuleList(
            Block(
                embed_dim, num_heads, mlp_ratio, qkv_bias, qk_scale, drop_rate, attn_drop_rate,
                drop_path=drop_path_rate * i / max(1, depth - 1), norm_layer=norm_layer,
            )
            for i in range(depth)
        )  # fmt: skip
        self.make_pooling(embed_dim, "tokens")
        self.norm = norm_layer(self.norm_width)
        self.head = nn.Linear(self.num_features, num_classes) if num_classes > 0 else nn.Identity()

        trunc_normal_(self.pos_embed, std=0.02)
        if mode == "official":
            trunc_normal_(self.cls_token, std=0.02)
        self.initialise(_init_weights)

    def interpolate_pos_encoding(self, x: Tensor, height: int, width: int) -> Tensor:
        """Position embeddings (1, T, D) for the tokens x of a height x width image, by the policy (module docstring).

        DINO calls the two sides w and h, in this order.
        """
        native, grid = self.patch_embed.grid_size, self.patch_embed.grid(height, width)
        resamples_always = self.mode != "official" and self.pos_embed_policy == "reference"
        if grid == native and not resamples_always:
            return self.pos_embed
        prefix = self.pos_embed[:, : self.num_prefix_tokens]
        patches = self.pos_embed[:, self.num_prefix_tokens :].float().unflatten(1, native).permute(0, 3, 1, 2)
        scale = None
        if self.mode == "official" or self.pos_embed_policy == "reference":
            # as DINO does: the 0.1 prevents rounding from making the grid one too small
            scale = tuple((side + 0.1) / own for side, own in zip(grid, native, strict=True))
        patches = _resample(patches, grid, scale)
        patches = patches.permute(0, 2, 3, 1).flatten(1, 2).to(prefix.dtype)
        return torch.cat((prefix, patches), dim=1)

    def mask_patches(self, x: Tensor, mask: Tensor) -> Tensor:
        """Patches (B, N, D) with masked_embed in place of those that the mask, (B, h, w) or (B, N) bool, hides.

        Raises ValueError for a mask of another shape or dtype, and in a model built without masked_im_modeling.
        """
        if not hasattr(self, "masked_embed"):
            raise ValueError("this model has no masked_embed and takes no mask; build it with masked_im_modeling=True")
        flat = mask.flatten(1)
        if mask.dtype != torch.bool or flat.shape != x.shape[:2]:
            raise ValueError(
                f"mask of shape {tuple(mask.shape)} and dtype {mask.dtype} does not fit {x.shape[0]} images of "
                f"{x.shape[1]} patches; it must be (B, h, w) or (B, N), torch.bool"
            )
        return torch.where(flat[..., None], self.masked_embed.to(x.dtype), x)

    def prepare_tokens(self, x: Tensor, mask: Tensor | None = None) -> Tensor:
        """Images (B, C, H, W) -> the first block's input (B, T, D); `mask` as mask_patches takes it."""
        height, width = x.shape[-2:]
        x = self.patch_embed(x)
        if mask is not None:
            x = self.mask_patches(x, mask)
        if self.mode == "official":
            x = torch.cat((self.cls_token.expand(x.shape[0], -1, -1).to(x.dtype), x), dim=1)
        return self.pos_drop(x + self.interpolate_pos_encoding(x, height, width))

    def forward_features(self, x: Tensor, mask: Tensor | None = None) -> Tensor:
        """Tokens (B, T, D) after the last block, before the final norm: what is pooled.

        Patches that `mask`, (B, h, w) or (B, N) bool, hides enter as masked_embed, at their own positions.
        """
        x = self.prepare_tokens(x, mask)
        for block in self.blocks:
            x = self.run_block(block, x)
        return x

    def own_pooling(self, features: Tensor) -> Tensor:
        """[CLS], (B, D)."""
        return features[:, 0]

    def grid_of(self, features: Tensor, size: tuple[int, int]) -> tuple[int, int]:
        """(h, w) of the patches of images of `size` = (H, W)."""
        return self.patch_embed.grid(*size)

    def forward(self, x: Tensor) -> Tensor:
        """(B, C, H, W) -> (B, num_features), or (B, num_classes)"""
        return self.head(self.feature_of(self.forward_features(x), tuple(x.shape[-2:])))

    def forward_dense(
        self, x: Tensor, mask: Tensor | None = None, need_attention: bool = True
    ) -> tuple[Tensor, Tensor, Tensor | None]:
        """As PooledBackbone's; in official mode the attention is the last block's [CLS] row, the only one computed."""
        if self.mode != "official":
            return super().forward_dense(x, mask, need_attention)
        x, attention = self.prepare_tokens(x, mask), None
        for block in self.blocks[:-1]:
            x = self.run_block(block, x)
        if need_attention:
            x, attention = self.run_block(self.blocks[-1], x, attention_rows=1)
            attention = attention[:, :, 0, 1:]  # (B, heads, N)
        else:
            x = self.run_block(self.blocks[-1], x)
        x = self.norm(x)
        return x[:, 0], x[:, 1:], attention

    def get_last_selfattention(self, x: Tensor) -> Tensor:
        """Attention of the last block, (B, heads, T, T)."""
        x = self.prepare_tokens(x)
        for block in self.blocks[:-1]:
            x = block(x)
        return self.blocks[-1](x, return_attention=True)

    def get_intermediate_layers(self, x: Tensor, n: int = 1) -> list[Tensor]:
        """Tokens (B, T, D) of the last n blocks, each through the final norm, in the order of the blocks.

        Raises ValueError if n is not 1 to the number of blocks, and if the final norm has another width (mode how).
        """
        if not 1 <= n <= len(self.blocks):
            raise ValueError(f"this model has {len(self.blocks)} blocks, so n must be 1 to {len(self.blocks)}, not {n}")
        if self.norm_width != self.embed_dim:
            raise ValueError(
                f'the tokens are {self.embed_dim} wide, and the final norm of mode "{self.mode}" is {self.norm_width}; '
                'build the model with pool_position="after" to norm tokens'
            )
        x = self.prepare_tokens(x)
        outputs = []
        for i, block in enumerate(self.blocks):
            x = self.run_block(block, x)
            if i >= len(self.blocks) - n:
                outputs.append(self.norm(x))
        return outputs

    @property
    def has_attention_map(self) -> bool:
        """Also in official mode: the [CLS] row."""
        return self.mode == "official" or super().has_attention_map

    def get_attention_map(self, x: Tensor) -> Tensor:
        """The pooling's attention (B, heads, h, w): the operator's, or the [CLS] row of the last block."""
        if self.mode != "official":
            return super().get_attention_map(x)
        attention = self.forward_dense(x)[2]  # (B, heads, N); a matrix (T, T) of each head would fill the memory
        return attention.unflatten(-1, self.patch_embed.grid(*x.shape[-2:]))


def _init_weights(module: nn.Module) -> None:
    if isinstance(module, nn.Linear):
        trunc_normal_(module.weight, std=0.02)
        if module.bias is not None:
            nn.init.zeros_(module.bias)


def _vit(preset: dict, mode: str, patch_size: int, kwargs: dict) -> VisionTransformer:
    settings = {"depth": 12, "mlp_ratio": 4.0, "qkv_bias": True, **preset, **kwargs}
    return VisionTransformer(mode=mode, patch_size=patch_size, **settings)


def vit_tiny(mode: str = "official", patch_size: int = 16, **kwargs) -> VisionTransformer:
    """Width 192, 3 heads, 12 blocks; takes VisionTransformer's keywords, which override the preset."""
    return _vit({"embed_dim": 192, "num_heads": 3}, mode, patch_size, kwargs)


def vit_small(mode: str = "official", patch_size: int = 16, **kwargs) -> VisionTransformer:
    """Width 384, 6 heads, 12 blocks; takes VisionTransformer's keywords, which override the preset."""
    return _vit({"embed_dim": 384, "num_heads": 6}, mode, patch_size, kwargs)


def vit_base(mode: str = "official", patch_size: int = 16, **kwargs) -> VisionTransformer:
    """Width 768, 12 heads, 12 blocks; takes VisionTransformer's keywords, which override the preset."""
    return _vit({"embed_dim": 768, "num_heads": 12}, mode, patch_size, kwargs)
