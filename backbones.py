"""build_backbone: the only place that turns a name into a model.

Our own names (vit_*, their aliases deit_*, resnet*, convnext_*) are built from the files next to this one; any other
name is looked up in timm, which is imported only then. Nothing is ever downloaded. If both know a name, ours wins.

A timm model keeps its own pooling in official mode. In SimPool mode its tokens (without prefix tokens) or its map are
taken before the final norm, pooled, then normed: tokens with gamma 1.25 and beta, maps with gamma 2.0 and no beta.

Every model has `num_features`, the width of the feature it returns, and `get_attention_map(x) -> (B, heads, h, w)`.
"""

from __future__ import annotations

import difflib
import math
import re
from functools import cache
from typing import Any

import torch
from torch import Tensor, nn

import convnext_simpool
import resnet_simpool
import vision_transformer
from pooled_backbone import MODES
from sp import SimPool

FAMILIES = {
    "vit": {name: getattr(vision_transformer, name) for name in ("vit_tiny", "vit_small", "vit_base")},
    "resnet": {f"resnet{depth}": getattr(resnet_simpool, f"resnet{depth}") for depth in (18, 34, 50, 101, 152)},
    "convnext": {
        f"convnext_{size}": getattr(convnext_simpool, f"convnext_{size}")
        for size in ("tiny", "small", "base", "large", "xlarge")
    },
}
ALIASES = {name.replace("vit", "deit"): name for name in FAMILIES["vit"]}
DEFAULT_GAMMA = {"vit": 1.25, "resnet": 2.0, "convnext": 2.0, "tokens": 1.25, "map": 2.0}

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
    """Whether a name, or an alias, is one of our vision transformers."""
    return ALIASES.get(arch, arch) in FAMILIES["vit"]


def available() -> list[str]:
    """Names of our own models, without aliases or timm's names."""
    return [name for models in FAMILIES.values() for name in models]


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
) -> nn.Module:
    """A randomly initialised backbone that returns features (B, num_features), or logits if num_classes > 0.

    Args:
        arch: a name of ours (`available()`), deit_tiny/small/base, or a timm model's name.
        mode: "official" (the architecture's own pooling) or "simpool".
        gamma: SimPool's exponent, None for none, or "auto" for the family's.
        patch_size: of our ViTs, in pixels; other architectures fix their own.
        drop_path_rate: stochastic depth of the last block.
        img_size: native size in pixels, a number or (height, width).
        embed_dim, depth, num_heads: override a ViT's preset.
        pos_embed_policy: "exact" or "reference", for our SimPool ViTs.
        value_min: SimPool's minimum, "image" or "batch".
        masked_im_modeling: give one of our ViTs the parameter that stands for masked patches.

    Raises:
        ValueError: for an unknown name (listing near matches), and for any setting that the architecture can't honour.
    """
    if mode not in MODES:
        raise ValueError(f"unknown mode {mode!r}; choose one of {', '.join(MODES)}")
    name = ALIASES.get(arch, arch)
    own = _family(name)
    if masked_im_modeling and own != "vit":
        raise ValueError(
            f"{arch} takes no mask of patches, so masked_im_modeling can't be honoured; choose "
            f"{', '.join(FAMILIES['vit'])}, or leave it out"
        )
    shape = {"embed_dim": embed_dim, "depth": depth, "num_heads": num_heads}
    shape = {key: value for key, value in shape.items() if value is not None}
    common = {"in_chans": in_chans, "num_classes": num_classes}
    if own is None:
        pooling = {"gamma": gamma, "value_min": value_min}
        return _build_timm(name, mode, pooling, drop_path_rate, img_size, patch_size, {**common, **shape})

    common |= {"mode": mode, "gamma": resolve_gamma(name, gamma), "value_min": value_min}
    if own == "vit":
        return FAMILIES[own][name](
            patch_size=patch_size,
            img_size=img_size,
            drop_path_rate=drop_path_rate,
            pos_embed_policy=pos_embed_policy,
            masked_im_modeling=masked_im_modeling,
            **common,
            **shape,
        )
    if shape:
        raise ValueError(f"{arch} has a fixed shape: {_listed(shape)} can only be set for vit_*; leave it out")
    if own == "resnet":
        if drop_path_rate:
            raise ValueError(
                f"{arch} has no stochastic depth: drop_path_rate {drop_path_rate} can't be honoured; set 0"
            )
        return FAMILIES[own][name](**common)
    if min(vision_transformer.image_size(img_size)) < convnext_simpool.STRIDE:
        raise ValueError(
            f"img_size {img_size} is too small for {arch}: it needs at least {convnext_simpool.STRIDE} pixels"
        )
    return FAMILIES[own][name](drop_path_rate=drop_path_rate, **common)


def resolve_gamma(arch: str, gamma: float | str | None) -> float | None:
    """The exponent that `gamma` means for this architecture: a number, None, or the family's for "auto".

    For "auto" and a timm name the model is built once, to see whether it returns tokens or a map.
    """
    if gamma is None or (isinstance(gamma, str) and gamma.lower() == "none"):
        return None
    if gamma != "auto":
        try:
            return float(gamma)
        except ValueError:
            raise ValueError(f'gamma {gamma!r} is not a number, "auto" or "none"') from None
    name = ALIASES.get(arch, arch)
    return DEFAULT_GAMMA[_family(name) or _timm_kind(name)]


def _family(name: str) -> str | None:
    """The family of one of our names, None for a timm name. Raises ValueError with near matches for anything else."""
    for family, models in FAMILIES.items():
        if name in models:
            return family
    if _timm_knows(name):
        return None
    candidates = [*available(), *ALIASES, *_timm_names()]
    near = difflib.get_close_matches(name, candidates, n=5, cutoff=0.5)
    hint = f"did you mean {', '.join(near)}?" if near else "no name is near it;"
    raise ValueError(
        f"unknown architecture {name!r}; {hint} Ours are {', '.join(available())}; any timm name works too"
    )


def _listed(settings: dict[str, Any]) -> str:
    return ", ".join(f"{key} {value}" for key, value in settings.items())


# ---- timm ----


@cache
def _timm_names() -> tuple[str, ...]:
    try:
        import timm
    except ImportError:
        return ()
    return tuple(timm.list_models())


def _timm_knows(name: str) -> bool:
    """Whether timm has this name, with or without a weights tag (name.tag). Hub addresses would need the network."""
    return name.partition(".")[0] in _timm_names()


class TimmBackbone(nn.Module):
    """A timm model with our interface: `body` is timm's model, pooled by its own head or by SimPool.

    In SimPool mode, parameters that the feature does not depend on (those of a head's own pooling, say) are frozen, so
    that distributed training does not wait for their gradients.
    """

    def __init__(self, name: str, body: nn.Module, mode: str, probe: Tensor, pooling: dict, num_classes: int) -> None:
        super().__init__()
        self.name = name
        self.mode = mode
        self.body = body
        self.has_classifier = num_classes > 0
        self.simpool = None
        if mode == "official":
            width = _probe(name, body, body, probe).shape[-1]
            self.num_features = body.head_hidden_size if num_classes > 0 else width
            return
        self.norm = _take_final_norm(body)
        features = _probe(name, body, self.forward_features, probe)
        kind = _kind(features)
        self.num_features = features.shape[-1] if kind == "tokens" else features.shape[1]
        gamma = DEFAULT_GAMMA[kind] if pooling["gamma"] == "auto" else resolve_gamma(name, pooling["gamma"])
        self.simpool = SimPool(
            self.num_features, gamma=gamma, use_beta=kind == "tokens", value_min=pooling["value_min"]
        )
        self.head = nn.Linear(self.num_features, num_classes) if num_classes > 0 else nn.Identity()
        self._freeze_what_is_not_used(probe)

    def set_grad_checkpointing(self, enable: bool = True) -> None:
        """timm's own gradient checkpointing of the body."""
        self.body.set_grad_checkpointing(enable)

    def forward_features(self, x: Tensor, mask: Tensor | None = None) -> Tensor:
        """Tokens (B, N, D) without prefix tokens, or a map (B, D, h, w); before the final norm in SimPool mode.

        Raises ValueError if there is a mask: only our own vision transformers take one.
        """
        self._refuse_mask(mask)
        return _patches(self.name, self.body, self.body.forward_features(x))

    def _refuse_mask(self, mask: Tensor | None) -> None:
        if mask is not None:
            raise ValueError(
                f"{self.name} takes no mask of patches; use a vit_tiny, vit_small or vit_base built with "
                "masked_im_modeling=True"
            )

    def forward(self, x: Tensor) -> Tensor:
        """(B, C, H, W) -> (B, D), or (B, num_classes)"""
        if self.mode == "official":
            return self.body(x)
        return self.head(_norm_of_vector(self.norm, self.simpool(self.forward_features(x))))

    def forward_dense(
        self, x: Tensor, mask: Tensor | None = None, need_attention: bool = True
    ) -> tuple[Tensor, Tensor, Tensor | None]:
        """Pooled feature (B, D), patches (B, N, D), both after the final norm if there is one, and the attention.

        The attention (B, 1, N) is SimPool's; None in official mode and without need_attention. The feature is forward's
        without the classifier. Raises ValueError if there is a mask.
        """
        if self.mode == "official":
            return self._official_dense(x, mask)
        features = self.forward_features(x, mask)
        pooled, attention = self.simpool(features, return_attention=True)
        patches = _norm_of_tokens(self.norm, _as_tokens(features))
        return _norm_of_vector(self.norm, pooled), patches, attention if need_attention else None

    def _official_dense(self, x: Tensor, mask: Tensor | None) -> tuple[Tensor, Tensor, None]:
        self._refuse_mask(mask)
        features = self.body.forward_features(x)
        pooled = self.body.forward_head(features, **({"pre_logits": True} if self.has_classifier else {}))
        patches = _as_tokens(_patches(self.name, self.body, features))
        owner, attribute = _final_norm(self.body)
        if owner is not None and (owner, attribute) != (self.body, "norm"):  # timm's own features are normed by that
            patches = _norm_of_tokens(getattr(owner, attribute), patches)
        return pooled, patches, None

    def get_attention_map(self, x: Tensor) -> Tensor:
        """SimPool's map, (B, 1, h, w)."""
        if self.simpool is None:
            raise ValueError(f'{self.name} with its own pooling has no attention map; build it with mode="simpool"')
        features = self.forward_features(x)
        _, attention = self.simpool(features, return_attention=True)  # (B, 1, N)
        grid = features.shape[-2:] if features.ndim == 4 else _token_grid(x.shape[-2:], attention.shape[-1])
        return attention.unflatten(-1, grid)

    def _freeze_what_is_not_used(self, probe: Tensor) -> None:
        training = self.training
        with torch.enable_grad():
            feature = self.eval()(probe).sum()
            parameters = [p for p in self.parameters() if p.requires_grad]
            grads = torch.autograd.grad(feature, parameters, allow_unused=True)
        for parameter, grad in zip(parameters, grads, strict=True):
            parameter.requires_grad_(grad is not None)
        self.train(training)


def _build_timm(
    name: str, mode: str, pooling: dict, drop_path_rate: float, img_size, patch_size: int, settings: dict
) -> TimmBackbone:
    num_classes = settings.pop("num_classes")
    size = vision_transformer.image_size(img_size)
    optional = {"img_size": size, "dynamic_img_size": True, "strict_img_size": False}  # any crop size where possible
    (settings if drop_path_rate else optional)["drop_path_rate"] = drop_path_rate
    settings["num_classes"] = num_classes if mode == "official" else 0
    body = _create_timm(name, settings, optional)
    own = getattr(getattr(body, "patch_embed", None), "patch_size", None)
    if own is not None and patch_size not in (16, *vision_transformer.image_size(own)):
        raise ValueError(f"{name} has patches of {own}: patch_size {patch_size} can't be honoured; leave it out")
    if drop_path_rate and not any(getattr(module, "drop_prob", 0) for module in body.modules()):
        raise ValueError(
            f"{name} (timm) has no stochastic depth: drop_path_rate {drop_path_rate} can't be honoured; set 0"
        )
    probe = torch.zeros(1, settings["in_chans"], *size)
    return TimmBackbone(name, body, mode, probe, pooling, num_classes)


def _create_timm(name: str, settings: dict[str, Any], optional: dict[str, Any]) -> nn.Module:
    """timm's model with all `settings` (ValueError if it doesn't accept one) and the `optional` ones it accepts."""
    import timm

    while True:
        try:
            return timm.create_model(name, pretrained=False, **settings, **optional)
        except TypeError as error:
            refused = re.findall(r"'(\w+)'", str(error)) if "unexpected keyword" in str(error) else []
            impossible = {key: settings[key] for key in refused if key in settings}
            if impossible:
                raise ValueError(f"{name} (timm) does not take {_listed(impossible)}; leave it out") from error
            if not optional.keys() & set(refused):
                raise
            optional = {key: value for key, value in optional.items() if key not in refused}
        except (AssertionError, RuntimeError) as error:
            raise ValueError(f"timm can't build {name} with {_listed({**settings, **optional})}: {error}") from error


@torch.no_grad()
def _probe(name: str, body: nn.Module, function, probe: Tensor):
    """function(probe) in eval mode. Raises ValueError if the model doesn't accept such images."""
    training = body.training
    body.eval()
    try:
        return function(probe)
    except (AssertionError, RuntimeError, ValueError) as error:
        size = "x".join(map(str, probe.shape[-2:]))
        raise ValueError(
            f"{name} (timm) does not take images of {size} pixels with {probe.shape[1]} channels: {error}"
        ) from error
    finally:
        body.train(training)


def _patches(name: str, body: nn.Module, features: Any) -> Tensor:
    """timm's features as tokens (B, N, D) without prefix tokens, or as a map (B, D, h, w)."""
    if not isinstance(features, Tensor) or features.ndim not in (3, 4):
        found = tuple(features.shape) if isinstance(features, Tensor) else type(features).__name__
        raise ValueError(f'{name} (timm) gives neither tokens nor a map ({found}); only mode="official" works for it')
    if features.ndim == 4:
        channels_last = getattr(body, "output_fmt", None) == "NHWC" or (
            features.shape[1] != body.num_features == features.shape[-1]
        )
        return features.permute(0, 3, 1, 2) if channels_last else features
    prefix = getattr(body, "num_prefix_tokens", None)
    if prefix is None:
        prefix = int(getattr(body, "cls_token", None) is not None)
    return features[:, prefix:]


def _kind(features: Tensor) -> str:
    return "tokens" if features.ndim == 3 else "map"


@cache
def _timm_kind(name: str) -> str:
    """Whether a timm model returns "tokens" or a "map"."""
    body = _create_timm(name, {"num_classes": 0}, {})
    size = getattr(body, "default_cfg", {}).get("input_size", (3, 224, 224))
    features = _probe(name, body, body.forward_features, torch.zeros(1, *size))
    return _kind(_patches(name, body, features))


def _final_norm(body: nn.Module) -> tuple[nn.Module | None, str]:
    """The module that holds the norm before or after timm's pooling, and its name there; (None, "") without one."""
    head = getattr(body, "head", None)
    for owner, attribute in ((body, "norm"), (body, "fc_norm"), (head, "norm")):
        norm = getattr(owner, attribute, None)
        if isinstance(norm, nn.Module) and not isinstance(norm, nn.Identity):
            return owner, attribute
    return None, ""


def _take_final_norm(body: nn.Module) -> nn.Module:
    """Remove the norm before or after timm's pooling from the body and return it; an Identity if there is none."""
    owner, attribute = _final_norm(body)
    if owner is None:
        return nn.Identity()
    norm = getattr(owner, attribute)
    setattr(owner, attribute, nn.Identity())
    return norm


def _norm_of_vector(norm: nn.Module, x: Tensor) -> Tensor:
    """A norm made for tokens or for maps, applied to pooled features (B, D)."""
    if isinstance(norm, nn.GroupNorm) or "2d" in type(norm).__name__.lower():
        return norm(x[:, :, None, None]).flatten(1)
    return norm(x)


def _norm_of_tokens(norm: nn.Module, x: Tensor) -> Tensor:
    """A norm made for tokens or for maps, applied to each of (B, N, D)."""
    return _norm_of_vector(norm, x.flatten(0, 1)).unflatten(0, x.shape[:2])


def _as_tokens(features: Tensor) -> Tensor:
    """Tokens (B, N, D) as they are, a map (B, D, h, w) row by row."""
    return features if features.ndim == 3 else features.flatten(2).transpose(1, 2)


def _token_grid(size: tuple[int, int], tokens: int) -> tuple[int, int]:
    """(h, w) of `tokens` square patches on an image of `size`."""
    side = math.sqrt(size[0] * size[1] / tokens)
    grid = (round(size[0] / side), round(size[1] / side))
    if grid[0] * grid[1] != tokens:
        raise ValueError(f"{tokens} tokens do not form a grid on an image of {size[0]}x{size[1]} pixels")
    return grid
