"""Our backbones pooled by SimPool under timm names, for code that builds its models with timm.

    import timm
    import timm_models  # registers the names

    model = timm.create_model("simpool_vit_small_patch16_224", checkpoint_path="model.safetensors", num_classes=0)

The names are simpool_vit_{tiny,small,base}_patch{16,8}_224, simpool_resnet{18,34,50,101,152} and
simpool_convnext_{tiny,small,base,large,xlarge}. Parameters are named as in our checkpoints, so timm reads an export of
the weights strictly. Beyond timm's usual keywords a model takes those of `build_backbone`, such as gamma (timm drops a
None on the way, so write "none") or pos_embed_policy; `export.py --format timm` prints those that a checkpoint needs.
No weights are downloaded.

Official backbones are timm's own models and need nothing from here.

Shape letters: B images, T tokens, D width, h, w the map's size.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from functools import partial
from typing import Any

from timm.models import build_model_with_cfg, generate_default_cfgs, register_model
from torch import Tensor, nn
from torch.nn.init import trunc_normal_

import backbones
from convnext_simpool import ConvNeXt
from resnet_simpool import ResNet
from vision_transformer import VisionTransformer

POOLED, UNPOOLED = "simpool", ""  # values of timm's global_pool


class TimmInterface:
    """What timm expects of a model, added to one of our backbones.

    Attributes:
        num_classes: width of the classifier, 0 for none.
        global_pool: "simpool", or "" for a model that returns its last features as they are.
        feature_info: for each intermediate feature its module, width (num_chs) and stride in pixels (reduction).
    """

    classifier_name = "head"

    # ---- features and classifier ------------------------------------------------------------------------------------

    def forward(self, x: Tensor) -> Tensor:
        """(B, C, H, W) -> (B, num_features), or (B, num_classes); without pooling, the last features."""
        return self.forward_head(self.forward_features(x))

    def forward_head(self, x: Tensor, pre_logits: bool = False) -> Tensor:
        """forward_features' result -> the feature (B, num_features), and unless pre_logits its logits."""
        if self.global_pool == UNPOOLED:
            return x
        feature = self.feature_of(x, (0, 0))  # only operators that need a map look at the size, and SimPool does not
        return feature if pre_logits else self.get_classifier()(feature)

    def get_classifier(self) -> nn.Module:
        """The last layer; an Identity if there are no classes."""
        return getattr(self, self.classifier_name)

    def reset_classifier(self, num_classes: int, global_pool: str | None = None) -> None:
        """Replace the classifier by a new one, or by none for 0. Raises ValueError for another pooling than SimPool."""
        if global_pool is not None:
            self.global_pool = _checked_pool(global_pool, num_classes)
        classifier: nn.Module = nn.Identity()
        if num_classes > 0:
            classifier = nn.Linear(self.num_features, num_classes)
            trunc_normal_(classifier.weight, std=0.02)
            nn.init.zeros_(classifier.bias)
        setattr(self, self.classifier_name, classifier.to(next(self.parameters())))
        self.num_classes = num_classes

    @property
    def head_hidden_size(self) -> int:
        """Width of the classifier's input."""
        return self.num_features

    def no_weight_decay(self) -> set[str]:
        """Parameters with more than one dimension that should not decay."""
        return {"pos_embed"} if hasattr(self, "pos_embed") else set()

    def group_matcher(self, coarse: bool = False) -> dict[str, Any]:
        """Patterns by which timm gives deeper layers larger learning rates."""
        raise NotImplementedError

    # ---- intermediate features --------------------------------------------------------------------------------------

    def steps(self) -> list[Callable[[Tensor], Tensor]]:
        """The model from images to last features in parts, one for each intermediate feature."""
        raise NotImplementedError

    def keep_steps(self, count: int) -> None:
        """Remove the parts behind the first `count`."""
        raise NotImplementedError

    def intermediate(self, x: Tensor, norm: bool, output_fmt: str, size: Sequence[int]) -> Tensor:
        """A part's result as a feature, (B, D, h, w); `size` is the images' height and width."""
        if output_fmt != "NCHW":
            raise ValueError(f"output_fmt {output_fmt}: a {self.kind_of_model()} has maps; take NCHW")
        return x

    def forward_intermediates(
        self,
        x: Tensor,
        indices: int | Sequence[int] | None = None,
        return_prefix_tokens: bool = False,
        norm: bool = False,
        stop_early: bool = False,
        output_fmt: str = "NCHW",
        intermediates_only: bool = False,
    ) -> list[Tensor] | tuple[Tensor, list[Tensor]]:
        """forward_features' result, and intermediate features (B, D, h, w), as timm's models give them.

        Args:
            indices: which ones: the last n, those listed, or all.
            return_prefix_tokens: accepted as by timm's ViTs; without effect, for no model here has such tokens.
            norm: apply the final norm to those that it fits.
            stop_early: do not compute what follows the last one; the first result is then that one's.
            output_fmt: "NCHW"; of ViTs also "NLC", (B, T, D).
            intermediates_only: return the list alone.
        """
        steps, size = self.steps(), x.shape[-2:]
        taken = _chosen(indices, len(steps))
        found = []
        for i, step in enumerate(steps[: max(taken) + 1] if stop_early else steps):
            x = step(x)
            if i in taken:
                found.append(self.intermediate(x, norm, output_fmt, size))
        return found if intermediates_only else (x, found)

    def prune_intermediate_layers(
        self, indices: int | Sequence[int] = 1, prune_norm: bool = False, prune_head: bool = True
    ) -> list[int]:
        """Remove what the intermediate features of these indices do not need; returns the indices, from the start."""
        taken = _chosen(indices, len(self.steps()))
        self.keep_steps(max(taken) + 1)
        if prune_norm:
            self.norm = nn.Identity()
        if prune_head:
            self.reset_classifier(0, UNPOOLED)
            self.simpool = nn.Identity()
        return taken


def _chosen(indices: int | Sequence[int] | None, count: int) -> list[int]:
    """Positions from the start of the last n of `count` features, of those listed, or of all. Raises ValueError."""
    wanted = range(-indices, 0) if isinstance(indices, int) else range(count) if indices is None else indices
    if not len(wanted) or not all(-count <= i < count for i in wanted):
        raise ValueError(f"indices {indices}: this model has {count} intermediate features; give some of them")
    return [i % count for i in wanted]


class TimmVisionTransformer(TimmInterface, VisionTransformer):
    """A ViT with timm's interface."""

    def group_matcher(self, coarse: bool = False) -> dict[str, Any]:
        return {"stem": r"^pos_embed|patch_embed", "blocks": [(r"^blocks\.(\d+)", None), (r"^simpool|norm", (99999,))]}

    def steps(self) -> list[Callable[[Tensor], Tensor]]:
        first, *others = (partial(self.run_block, block) for block in self.blocks)
        return [lambda x: first(self.prepare_tokens(x)), *others]

    def keep_steps(self, count: int) -> None:
        self.blocks = self.blocks[:count]

    def intermediate(self, x: Tensor, norm: bool, output_fmt: str, size: Sequence[int]) -> Tensor:
        if output_fmt not in ("NCHW", "NLC"):
            raise ValueError(f"output_fmt {output_fmt}: take NCHW or NLC")
        x = self.norm(x) if norm else x
        grid = self.patch_embed.grid(*size)
        return x if output_fmt == "NLC" else x.transpose(1, 2).unflatten(2, grid).contiguous()

    def describe(self) -> Iterator[dict[str, Any]]:
        for i in range(len(self.blocks)):
            yield {"module": f"blocks.{i}", "num_chs": self.embed_dim, "reduction": self.patch_size}


class TimmResNet(TimmInterface, ResNet):
    """A ResNet with timm's interface; its first intermediate feature is the stem's, before max-pooling."""

    classifier_name = "fc"
    stages = ("layer1", "layer2", "layer3", "layer4")

    def group_matcher(self, coarse: bool = False) -> dict[str, Any]:
        return {"stem": r"^conv1|bn1", "blocks": r"^layer(\d+)" if coarse else r"^layer(\d+)\.(\d+)"}

    def steps(self) -> list[Callable[[Tensor], Tensor]]:
        def run(stage: str, x: Tensor) -> Tensor:
            for block in getattr(self, stage):
                x = self.run_block(block, x)
            return x

        first, *others = (partial(run, stage) for stage in self.stages)
        return [lambda x: self.relu(self.bn1(self.conv1(x))), lambda x: first(self.maxpool(x)), *others]

    def keep_steps(self, count: int) -> None:
        for stage in self.stages[max(count - 1, 0) :]:
            setattr(self, stage, nn.Sequential())

    def describe(self) -> Iterator[dict[str, Any]]:
        stride = self.conv1.stride[0]
        yield {"module": "relu", "num_chs": self.conv1.out_channels, "reduction": stride}
        for i, stage in enumerate(self.stages):  # the small stem has strides neither in its convolution nor behind it
            width = self.num_features >> (len(self.stages) - 1 - i)
            yield {"module": stage, "num_chs": width, "reduction": stride**2 << i}


class TimmConvNeXt(TimmInterface, ConvNeXt):
    """A ConvNeXt with timm's interface."""

    def group_matcher(self, coarse: bool = False) -> dict[str, Any]:
        blocks = [(r"^downsample_layers\.(\d+)", (0,)), (r"^stages\.(\d+)\.(\d+)", None), (r"^simpool|norm", (99999,))]
        whole = r"^(?:downsample_layers|stages)\.(\d+)"
        return {"stem": r"^downsample_layers\.0", "blocks": whole if coarse else blocks}

    def steps(self) -> list[Callable[[Tensor], Tensor]]:
        def run(halving: nn.Module, stage: nn.Module, x: Tensor) -> Tensor:
            x = halving(x)
            for block in stage:
                x = self.run_block(block, x)
            return x

        return [partial(run, *parts) for parts in zip(self.downsample_layers, self.stages, strict=True)]

    def keep_steps(self, count: int) -> None:
        self.downsample_layers, self.stages = self.downsample_layers[:count], self.stages[:count]

    def intermediate(self, x: Tensor, norm: bool, output_fmt: str, size: Sequence[int]) -> Tensor:
        x = super().intermediate(x, norm, output_fmt, size)
        fits = norm and x.shape[1] == self.num_features
        return self.norm(x.permute(0, 2, 3, 1)).permute(0, 3, 1, 2) if fits else x

    def describe(self) -> Iterator[dict[str, Any]]:
        for i, stage in enumerate(self.stages):
            yield {"module": f"stages.{i}", "num_chs": stage[0].dwconv.out_channels, "reduction": 4 << i}


_INTERFACES = {VisionTransformer: TimmVisionTransformer, ResNet: TimmResNet, ConvNeXt: TimmConvNeXt}
_FEATURES = {"vit": 3, "resnet": (0, 1, 2, 3, 4), "convnext": (0, 1, 2, 3)}  # of features_only, unless asked otherwise
_FIRST_CONV = {"vit": "patch_embed.proj", "resnet": "conv1", "convnext": "downsample_layers.0.0"}


def _build(arch: str, num_classes: int = 1000, global_pool: str = POOLED, **settings: Any) -> nn.Module:
    """The backbone that build_backbone makes, with timm's interface. Raises ValueError as that does."""
    pool = _checked_pool(global_pool, num_classes)
    model = backbones.build_backbone(arch, "simpool", num_classes=num_classes, **settings)
    model.__class__ = _INTERFACES[type(model)]  # adds methods alone: build_backbone stays the one place that builds
    model.num_classes, model.global_pool = num_classes, pool
    model.feature_info = list(model.describe())
    return model


def _checked_pool(global_pool: str, num_classes: int) -> str:
    """global_pool as it is. Raises ValueError for what a SimPool model does not have."""
    if global_pool not in (POOLED, UNPOOLED):
        raise ValueError(f'global_pool {global_pool!r}: this model is pooled by "simpool"; "" turns pooling off')
    if global_pool == UNPOOLED and num_classes > 0:
        raise ValueError(f"num_classes {num_classes}: a model without pooling has no classifier; give num_classes=0")
    return global_pool


def _names() -> Iterator[tuple[str, str, str, dict[str, Any]]]:
    """(timm name, arch, family, settings) of every model."""
    for family, models in backbones.FAMILIES.items():
        for arch in models:
            if family != "vit":
                yield f"simpool_{arch}", arch, family, {}
            for patch in (16, 8) if family == "vit" else ():
                yield f"simpool_{arch}_patch{patch}_224", arch, family, {"patch_size": patch}


default_cfgs = generate_default_cfgs({
    name: {
        "url": "", "classifier": "fc" if family == "resnet" else "head", "first_conv": _FIRST_CONV[family],
        "pool_size": None if family == "vit" else (7, 7),
    }
    for name, _, family, _ in _names()
})  # fmt: skip


def _register(name: str, arch: str, family: str, settings: dict[str, Any]) -> Callable[..., nn.Module]:
    def create(pretrained: bool = False, **kwargs: Any) -> nn.Module:
        features = {"out_indices": _FEATURES[family], "feature_cls": "getter"}
        model = partial(_build, arch)
        return build_model_with_cfg(model, name, pretrained, feature_cfg=features, **{**settings, **kwargs})

    create.__name__ = create.__qualname__ = name
    create.__doc__ = f"{arch} pooled by SimPool; build_backbone's keywords."
    return register_model(create)


for _entry in _names():
    globals()[_entry[0]] = _register(*_entry)
