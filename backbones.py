"""build_backbone: the only place that turns a name into a model.

Our own names (vit_*, their aliases deit_*, resnet*, convnext_*) are built from the files next to this one; any other
name is looked up in timm, which is imported only then. Nothing is ever downloaded. If both know a name, ours wins.

Every model is a PooledBackbone: `mode` is "official", the architecture's own pooling, or the name of an operator of
poolings/. A timm model keeps its own pooling in official mode; for an operator its tokens (without prefix tokens) or
its map are taken before the final norm, pooled, then normed, or normed and then pooled.
"""

from __future__ import annotations

import difflib
from collections.abc import Mapping
from typing import Any, Protocol

from torch import Tensor, nn

import convnext_simpool
import resnet_simpool
import vision_transformer
from pooled_backbone import GAMMA, MODES, check_pooling
from resnet_simpool import STEMS
from timm_backbone import build_timm, kind_of, knows, listed, timm_names
from timm_stem import has_stem_to_make_small

__all__ = [
    "ALIASES", "DEFAULT_GAMMA", "FAMILIES", "MODES", "STEMS", "Backbone", "available", "build_backbone", "family",
    "resolve_gamma", "resolve_stem",
]  # fmt: skip

FAMILIES = {
    "vit": {name: getattr(vision_transformer, name) for name in ("vit_tiny", "vit_small", "vit_base")},
    "resnet": {f"resnet{depth}": getattr(resnet_simpool, f"resnet{depth}") for depth in (18, 34, 50, 101, 152)},
    "convnext": {
        f"convnext_{size}": getattr(convnext_simpool, f"convnext_{size}")
        for size in ("tiny", "small", "base", "large", "xlarge")
    },
}
ALIASES = {name.replace("vit", "deit"): name for name in FAMILIES["vit"]}
SMALL_IMAGES = 64  # pixels; on images below it a convolutional stem is small unless one is chosen
DEFAULT_GAMMA = {"vit": GAMMA["tokens"], "resnet": GAMMA["map"], "convnext": GAMMA["map"], **GAMMA}

# timm's convolutional families. A name not listed here is treated as a transformer, whose recipe (AdamW, no batch
# statistics) is the safer default for an unknown model.
_RESNET_LIKE = ("resnet", "resnext", "wide_resnet", "regnet", "seresnet", "ecaresnet", "densenet", "vgg", "rexnet")
_CONVNEXT_LIKE = ("convnext", "efficientnet", "tf_efficientnet", "mobilenet", "convmixer", "poolformer", "nfnet")


def family(arch: str) -> str:
    """`vit`, `resnet` or `convnext`: the family whose recipe an architecture follows, judged by its name."""
    name = arch.lower()
    if name.startswith(_RESNET_LIKE):
        return "resnet"
    if name.startswith(_CONVNEXT_LIKE):
        return "convnext"
    return "vit"


def is_own_vit(arch: str) -> bool:
    """Whether the name is one of our vision transformers, or of their aliases."""
    return ALIASES.get(arch, arch) in FAMILIES["vit"]


def available() -> list[str]:
    """Names of our own models, without aliases or timm's names."""
    return [name for models in FAMILIES.values() for name in models]


class Backbone(Protocol):
    """What every model offers."""

    num_features: int

    def forward_features(self, x: Tensor, mask: Tensor | None = None) -> Tensor:
        """(B, C, H, W) -> the last tokens (B, T, D) or map (B, D, h, w), before the final norm."""

    def forward_dense(self, x: Tensor, mask: Tensor | None = None) -> tuple[Tensor, Tensor, Tensor | None]:
        """(B, C, H, W) -> feature (B, num_features), positions (B, N, D), attention (B, heads, N) or None."""

    def get_attention_map(self, x: Tensor) -> Tensor:
        """(B, C, H, W) -> (B, heads, h, w)."""


def build_backbone(
    arch: str,
    mode: str = "official",
    gamma: float | str | None = "auto",
    patch_size: int = 16,
    drop_path_rate: float = 0.0,
    img_size: int | tuple[int, int] = 224,
    in_chans: int = 3,
    embed_dim: int | None = None,
    depth: int | None = None,
    num_heads: int | None = None,
    pos_embed_policy: str = "exact",
    value_min: str = "image",
    num_classes: int = 0,
    masked_im_modeling: bool = False,
    use_beta: bool | None = None,
    pool_position: str = "before",
    pool_depth: int = 0,
    pooling_args: Mapping[str, Any] | None = None,
    drop_rate: float = 0.0,
    stem: str = "standard",
) -> nn.Module:
    """A randomly initialised backbone that returns features (B, num_features), or logits if num_classes > 0.

    Args:
        arch: a name of ours (`available()`), deit_tiny/small/base, or a timm model's name.
        mode: "official" (the architecture's own pooling) or an operator's name, such as "simpool" or "gem".
        gamma: SimPool's exponent, None for none, or "auto" for the family's.
        patch_size: of our ViTs, in pixels; other architectures fix their own.
        drop_path_rate: stochastic depth of the last block.
        img_size: native size in pixels, a number or (height, width).
        embed_dim, depth, num_heads: override a ViT's preset.
        pos_embed_policy: "exact" or "reference", for our ViTs without [CLS].
        value_min: SimPool's minimum, "image" or "batch".
        masked_im_modeling: give one of our ViTs the parameter that stands for masked patches.
        use_beta: SimPool's learned scalar; None: for tokens that are pooled before the final norm, as published.
        pool_position: pool "before" the final norm or "after" it.
        pool_depth: number of blocks, at the end, that are not built (of a ResNet's or ConvNeXt's last stage).
        pooling_args: the operator's settings, such as {"p": 2.0} for gem.
        drop_rate: dropout, of vision transformers and of timm's models.
        stem: of ResNets and timm's convolutional networks: "standard"; "small", without strides or pooling, for images
            below 64 pixels; or "auto", see `resolve_stem`.

    Raises:
        ValueError: for an unknown name (listing near matches), and for any setting that the architecture can't honour.
    """
    pooling = {"use_beta": use_beta, "pool_position": pool_position, "pooling_args": dict(pooling_args or {})}
    check_pooling(mode, **pooling)
    gamma = _parsed(gamma)
    if mode not in ("official", "simpool") and gamma not in ("auto", None):
        raise ValueError(f"{mode} has no gamma, got {gamma}; only simpool has one: leave it out")
    name = ALIASES.get(arch, arch)
    own = _family(name)
    stem = resolve_stem(arch, stem, img_size)
    if masked_im_modeling and own != "vit":
        raise ValueError(
            f"{arch} takes no mask of patches, so masked_im_modeling can't be honoured; choose "
            f"{', '.join(FAMILIES['vit'])}, or leave it out"
        )
    shape = {"embed_dim": embed_dim, "depth": depth, "num_heads": num_heads}
    shape = {key: value for key, value in shape.items() if value is not None}
    common = {"in_chans": in_chans, "num_classes": num_classes}
    rates = {"drop_path_rate": drop_path_rate, "drop_rate": drop_rate}
    pooling |= {"gamma": gamma, "value_min": value_min}
    if own is None:
        return build_timm(name, mode, pooling, rates, img_size, patch_size, pool_depth, {**common, **shape}, stem)

    common |= {"mode": mode, "pool_depth": pool_depth, **pooling}
    if own == "vit":
        return FAMILIES[own][name](
            patch_size=patch_size,
            img_size=img_size,
            pos_embed_policy=pos_embed_policy,
            masked_im_modeling=masked_im_modeling,
            **rates,
            **common,
            **shape,
        )
    if shape:
        raise ValueError(f"{arch} has a fixed shape: {listed(shape)} can only be set for vit_*; leave it out")
    if drop_rate:
        raise ValueError(f"{arch} has no dropout: drop_rate {drop_rate} can't be honoured; set 0")
    if own == "resnet":
        if drop_path_rate:
            raise ValueError(
                f"{arch} has no stochastic depth: drop_path_rate {drop_path_rate} can't be honoured; set 0"
            )
        return FAMILIES[own][name](stem=stem, **common)
    if min(vision_transformer.image_size(img_size)) < convnext_simpool.STRIDE:
        raise ValueError(
            f"img_size {img_size} is too small for {arch}: it needs at least {convnext_simpool.STRIDE} pixels"
        )
    return FAMILIES[own][name](drop_path_rate=drop_path_rate, **common)


def resolve_gamma(arch: str, gamma: float | str | None) -> float | None:
    """The exponent that `gamma` means for this architecture: a number, None, or the family's for "auto".

    For "auto" and a timm name the model is built once, to see whether it returns tokens or a map.
    """
    gamma = _parsed(gamma)
    if gamma != "auto":
        return gamma
    name = ALIASES.get(arch, arch)
    return DEFAULT_GAMMA[_family(name) or kind_of(name)]


def resolve_stem(arch: str, stem: str, img_size: int | tuple[int, int]) -> str:
    """The stem that `stem` means for this architecture and images of `img_size` pixels: "standard" or "small".

    "auto" is small on images with a side below 64 pixels for ResNets, and for those of timm's convolutional networks
    (judged by their names) whose stem can be made small. A timm name then has its model built once, without memory, to
    find out.

    Raises ValueError for an unknown stem, and for a small one that the architecture can't have.
    """
    if stem not in (*STEMS, "auto"):
        raise ValueError(f"unknown stem {stem!r}; choose {', '.join(STEMS)} or auto")
    large = min(vision_transformer.image_size(img_size)) >= SMALL_IMAGES
    if stem == "standard" or (stem == "auto" and (large or family(arch) == "vit")):
        return "standard"
    name = ALIASES.get(arch, arch)
    own = _family(name)
    possible = own == "resnet" or (own is None and has_stem_to_make_small(name))
    if stem == "small" and not possible:
        raise ValueError(
            f"{arch} has no stem of strided convolutions and pooling, so a small one can't be honoured; only ResNets "
            f"and networks like them have one: leave stem out{', or choose a smaller patch_size' * (own == 'vit')}"
        )
    return "small" if possible else "standard"


def _parsed(gamma: float | str | None) -> float | str | None:
    """A number, "auto" or None. Raises ValueError for anything else."""
    if gamma is None or (isinstance(gamma, str) and gamma.lower() == "none"):
        return None
    if gamma == "auto":
        return "auto"
    try:
        return float(gamma)
    except ValueError:
        raise ValueError(f'gamma {gamma!r} is not a number, "auto" or "none"') from None


def _family(name: str) -> str | None:
    """The family of one of our names, None for a timm name. Raises ValueError with near matches for anything else."""
    for family, models in FAMILIES.items():
        if name in models:
            return family
    if knows(name):
        return None
    candidates = [*available(), *ALIASES, *timm_names()]
    near = difflib.get_close_matches(name, candidates, n=5, cutoff=0.5)
    hint = f"did you mean {', '.join(near)}?" if near else "no name is near it;"
    raise ValueError(
        f"unknown architecture {name!r}; {hint} Ours are {', '.join(available())}; any timm name works too"
    )
