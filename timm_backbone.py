"""timm's models behind the interface of our backbones: which names it has, and how a model is built and pooled.

timm is imported only when a name that is not ours is asked for.
"""

from __future__ import annotations

import math
import re
from functools import cache
from typing import Any

import torch
from torch import Tensor, nn

import vision_transformer
from pooled_backbone import PooledBackbone, fewer_blocks
from timm_stem import make_stem_small


@cache
def timm_names() -> tuple[str, ...]:
    try:
        import timm
    except ImportError:
        return ()
    return tuple(timm.list_models())


def knows(name: str) -> bool:
    """Whether timm has this name, with or without a weights tag (name.tag). Hub addresses would need the network."""
    return name.partition(".")[0] in timm_names()


class TimmBackbone(PooledBackbone):
    """A timm model with our interface: `body` is timm's model, pooled by its own head or by an operator.

    With an operator, parameters that the feature does not depend on (those of a head's own pooling, say) are frozen, so
    that distributed training does not wait for their gradients.
    """

    def __init__(self, name: str, body: nn.Module, mode: str, probe: Tensor, pooling: dict, num_classes: int) -> None:
        """`probe` is an image on which widths are found; `pooling` has PooledBackbone's arguments except the mode."""
        super().__init__(mode, **pooling)
        self.name = name
        self.body = body
        self.has_classifier = num_classes > 0
        if mode == "official":
            width = _probe(name, body, body, probe).shape[-1]
            self.num_features = body.head_hidden_size if num_classes > 0 else width
            return
        self.norm = _take_final_norm(body)
        features = _probe(name, body, self.forward_features, probe)
        kind = _kind(features)
        self.make_pooling(features.shape[-1] if kind == "tokens" else features.shape[1], kind)
        if self.norm_width != features.shape[-1 if kind == "tokens" else 1] and not isinstance(self.norm, nn.Identity):
            self.norm = nn.LayerNorm(self.norm_width, eps=1e-6)
        self.head = nn.Linear(self.num_features, num_classes) if num_classes > 0 else nn.Identity()
        self._freeze_what_is_not_used(probe)

    def kind_of_model(self) -> str:
        """timm's name."""
        return self.name

    def set_grad_checkpointing(self, enable: bool = True) -> None:
        """timm's own gradient checkpointing of the body."""
        self.body.set_grad_checkpointing(enable)

    def forward_features(self, x: Tensor, mask: Tensor | None = None) -> Tensor:
        """Tokens (B, N, D) without prefix tokens, or a map (B, D, h, w); before the final norm if an operator pools.

        Raises ValueError if there is a mask: only our own vision transformers take one.
        """
        self.refuse_mask(mask)
        return _patches(self.name, self.body, self.body.forward_features(x))

    def forward(self, x: Tensor) -> Tensor:
        """(B, C, H, W) -> (B, num_features), or (B, num_classes)"""
        if self.mode == "official":
            return self.body(x)
        return self.head(self.feature_of(self.forward_features(x), tuple(x.shape[-2:])))

    def forward_dense(
        self, x: Tensor, mask: Tensor | None = None, need_attention: bool = True
    ) -> tuple[Tensor, Tensor, Tensor | None]:
        """As PooledBackbone's; in official mode the feature is timm's own, and there is no attention."""
        if self.mode != "official":
            return super().forward_dense(x, mask, need_attention)
        self.refuse_mask(mask)
        pooled, _, patches = self.forward_tokens(x)
        return pooled, patches, None

    def forward_tokens(self, x: Tensor) -> tuple[Tensor, Tensor | None, Tensor]:
        """In official mode timm's feature (B, D), [CLS] (B, 1, D), None if there is none, and positions (B, N, D).

        Tokens and positions are after the final norm.
        """
        features = self.body.forward_features(x)
        pooled = self.body.forward_head(features, **({"pre_logits": True} if self.has_classifier else {}))
        patches = _as_tokens(_patches(self.name, self.body, features))
        has_cls = features.ndim == 3 and getattr(self.body, "cls_token", None) is not None
        tokens = [features[:, :1] if has_cls else None, patches]
        owner, attribute = _final_norm(self.body)
        if owner is not None and (owner, attribute) != (self.body, "norm"):  # timm's own features are normed by that
            tokens = [None if one is None else _norm_of(getattr(owner, attribute), one) for one in tokens]
        return pooled, *tokens

    def normed(self, x: Tensor) -> Tensor:
        """The final norm of (..., D), whether timm made it for tokens or for maps."""
        return _norm_of(self.norm, x)

    def grid_of(self, features: Tensor, size: tuple[int, int]) -> tuple[int, int]:
        """(h, w) of a map, or of square patches that tile images of `size`."""
        return super().grid_of(features, size) if features.ndim == 4 else _token_grid(size, features.shape[1])

    def _freeze_what_is_not_used(self, probe: Tensor) -> None:
        training = self.training
        with torch.enable_grad():
            feature = self.eval()(probe).sum()
            parameters = [p for p in self.parameters() if p.requires_grad]
            grads = torch.autograd.grad(feature, parameters, allow_unused=True)
        for parameter, grad in zip(parameters, grads, strict=True):
            parameter.requires_grad_(grad is not None)
        self.train(training)


def build_timm(
    name: str,
    mode: str,
    pooling: dict[str, Any],
    rates: dict[str, float],
    img_size: int | tuple[int, int],
    patch_size: int,
    pool_depth: int,
    settings: dict[str, Any],
    stem: str = "standard",
) -> TimmBackbone:
    """timm's model of this name, pooled as `mode` and `pooling` say.

    `rates` are those of dropout and stochastic depth, `settings` other keywords of timm's constructor. Raises
    ValueError for what the model can't honour.
    """
    num_classes = settings.pop("num_classes")
    size = vision_transformer.image_size(img_size)
    optional = {"img_size": size, "dynamic_img_size": True, "strict_img_size": False}  # any crop size where possible
    for key, rate in rates.items():
        (settings if rate else optional)[key] = rate
    settings["num_classes"] = num_classes if mode == "official" else 0
    if pool_depth:
        settings["depth"] = _fewer(name, settings, optional, pool_depth)
    body = _create_timm(name, settings, optional)
    if stem == "small":
        make_stem_small(name, body)
    own = getattr(getattr(body, "patch_embed", None), "patch_size", None)
    if own is not None and patch_size not in (16, *vision_transformer.image_size(own)):
        raise ValueError(f"{name} has patches of {own}: patch_size {patch_size} can't be honoured; leave it out")
    rate = rates["drop_path_rate"]
    if rate and not any(getattr(module, "drop_prob", 0) for module in body.modules()):
        raise ValueError(f"{name} (timm) has no stochastic depth: drop_path_rate {rate} can't be honoured; set 0")
    probe = torch.zeros(1, settings["in_chans"], *size)
    return TimmBackbone(name, body, mode, probe, pooling, num_classes)


def _fewer(name: str, settings: dict[str, Any], optional: dict[str, Any], pool_depth: int) -> int:
    """timm's `depth` for a transformer with `pool_depth` blocks fewer. Raises ValueError for any other model."""
    blocks = getattr(_create_timm(name, settings, optional), "blocks", None)
    if not isinstance(blocks, nn.Sequential | nn.ModuleList):
        raise ValueError(
            f"{name} (timm) has no plain chain of blocks: pool_depth {pool_depth} can't be honoured; set 0"
        )
    return fewer_blocks(len(blocks), pool_depth)


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
                raise ValueError(f"{name} (timm) does not take {listed(impossible)}; leave it out") from error
            if not optional.keys() & set(refused):
                raise
            optional = {key: value for key, value in optional.items() if key not in refused}
        except (AssertionError, RuntimeError) as error:
            raise ValueError(f"timm can't build {name} with {listed({**settings, **optional})}: {error}") from error


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
def kind_of(name: str) -> str:
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


def _norm_of(norm: nn.Module, x: Tensor) -> Tensor:
    """A norm made for tokens or for maps, applied to (..., D)."""
    if isinstance(norm, nn.GroupNorm) or "2d" in type(norm).__name__.lower():
        return norm(x.reshape(-1, x.shape[-1], 1, 1)).view(x.shape)
    return norm(x)


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


def listed(settings: dict[str, Any]) -> str:
    """Settings for a message: `depth 3, num_heads 2`."""
    return ", ".join(f"{key} {value}" for key, value in settings.items())
