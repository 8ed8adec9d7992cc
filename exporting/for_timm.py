"""A backbone as weights that timm reads: which of timm's models it is, and what that one calls the parameters.

An official backbone is a model of timm's own. One pooled by SimPool has a name in timm_models. Nothing else has one.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

import backbones
from convnext_simpool import ConvNeXt
from evaluation.models import LoadedModel
from exporting.prepare import Classifier, size_of
from resnet_simpool import ResNet
from runtime.guards import InputError
from timm_backbone import TimmBackbone
from vision_transformer import VisionTransformer

Weights = dict[str, Tensor]
_CONVNEXT = (  # our names, which are the original ones, and timm's
    (r"^downsample_layers\.0\.", "stem."),
    (r"^downsample_layers\.(\d+)\.", r"stages.\1.downsample."),
    (r"^stages\.(\d+)\.(\d+)\.", r"stages.\1.blocks.\2."),
    (r"\.dwconv\.", ".conv_dw."),
    (r"\.pwconv(\d)\.", r".mlp.fc\1."),
    (r"^head\.", "head.fc."),
    (r"^norm\.", "head.norm."),
)


@dataclass(frozen=True)
class Target:
    """A timm model: `timm.create_model(name, **settings)`."""

    name: str
    settings: dict[str, Any]

    def call(self, file: str) -> str:
        """How a user creates the model with the weights of a file."""
        settings = "".join(f", {key}={value!r}" for key, value in self.settings.items())
        return f'timm.create_model("{self.name}", checkpoint_path="{file}"{settings})'

    def hub_config(self, size: tuple[int, int], mean_std: Sequence[Sequence[float]]) -> dict[str, Any]:
        """What timm reads from config.json next to model.safetensors, for `local-dir:FOLDER` and `hf-hub:NAME`."""
        preprocessing = {"input_size": [self.settings.get("in_chans", 3), *size], "interpolation": "bicubic"}
        preprocessing |= {"mean": list(mean_std[0]), "std": list(mean_std[1])}
        preprocessing["num_classes"] = self.settings["num_classes"]
        return {"architecture": self.name, "model_args": self.settings, "pretrained_cfg": preprocessing}


def target_of(loaded: LoadedModel, classifier: Classifier | None) -> Target:
    """The timm model whose parameters these are. Raises InputError if there is none."""
    model, config = loaded.model, loaded.config
    arch = backbones.ALIASES.get(config["arch"], config["arch"])
    from_timm, official = isinstance(model, TimmBackbone), model.mode == "official"
    if not official and (from_timm or model.mode != "simpool"):
        raise _no_model(f"{arch} pooled by {model.mode}")
    stem = config.get("stem", "standard")
    if official and stem != "standard":
        raise _no_model(f"{arch} with a {stem} stem")
    settings = {"num_classes": 0 if classifier is None else len(classifier.bias)}
    if config.get("in_chans", 3) != 3:
        settings["in_chans"] = config["in_chans"]
    if from_timm:
        native = tuple(model.body.pretrained_cfg["input_size"][-2:])
        if hasattr(model.body, "patch_embed") and size_of(loaded) != native:
            settings["img_size"] = size_of(loaded)
        return Target(arch.partition(".")[0], settings)
    name, own = _shape(model, arch, config)
    if official:
        return Target(name, {**settings, **own})
    if stem != "standard":
        settings["stem"] = stem
    return Target(f"simpool_{name}", {**settings, **own, **_pooling(model, arch)})


def _no_model(what: str) -> InputError:
    return InputError(f"--format timm: timm has no model for {what}; export it as safetensors or torch")


def _shape(model: nn.Module, arch: str, config: Mapping[str, Any]) -> tuple[str, dict[str, Any]]:
    """(timm's name, what differs from the model of that name)."""
    left_out = config.get("pool_depth", 0)
    if not isinstance(model, VisionTransformer):
        if not left_out:
            return arch, {}
        if model.mode == "simpool":
            return arch, {"pool_depth": left_out}
        if isinstance(model, ResNet):
            return arch, {"layers": tuple(len(getattr(model, f"layer{i}")) for i in (1, 2, 3, 4))}
        return arch, {"depths": tuple(len(stage) for stage in model.stages)}
    with torch.device("meta"):
        usual = backbones.build_backbone(arch)
    patch = model.patch_size if model.patch_size in _patches_of(arch, model.mode) else 16
    pairs = {
        "img_size": (model.patch_embed.img_size, (224, 224)),
        "patch_size": (model.patch_size, patch),
        "embed_dim": (model.embed_dim, usual.embed_dim),
        "depth": (len(model.blocks), len(usual.blocks)),
        "num_heads": (model.blocks[0].attn.num_heads, usual.blocks[0].attn.num_heads),
    }
    changed = {key: value for key, (value, native) in pairs.items() if value != native}
    if "img_size" in changed and len(set(changed["img_size"])) == 1:
        changed["img_size"] = changed["img_size"][0]
    return f"{arch}_patch{patch}_224", changed


def _patches_of(arch: str, mode: str) -> tuple[int, ...]:
    """Patch sizes for which there is a name of this architecture."""
    import timm

    prefix = "simpool_" if mode == "simpool" else ""
    return (16, 8) if prefix else tuple(p for p in (16, 8) if timm.models.is_model(f"{arch}_patch{p}_224"))


def _pooling(model: nn.Module, arch: str) -> dict[str, Any]:
    """Settings of the pooling that a model of this name does not have by itself."""
    with torch.device("meta"):
        usual = backbones.build_backbone(arch, "simpool")
    changed = {key: value for key, value in model.pooling_config.items() if value != usual.pooling_config[key]}
    return {key: "none" if value is None else value for key, value in changed.items()}  # timm drops a None


def weights_of(model: nn.Module, classifier: Classifier | None) -> Weights:
    """The parameters under the names of timm's model, with the classifier's if there is one."""
    weights = dict(model.state_dict())
    if isinstance(model, TimmBackbone):
        name = model.body.pretrained_cfg["classifier"]
        weights = {key.removeprefix("body."): value for key, value in weights.items()}
    else:
        name = "fc" if isinstance(model, ResNet) else "head"
    if classifier is not None:
        weights |= {f"{name}.weight": classifier.weight, f"{name}.bias": classifier.bias}
    if isinstance(model, ConvNeXt) and model.mode == "official":
        return {_renamed(key): value for key, value in weights.items()}
    return weights


def _renamed(name: str) -> str:
    for ours, theirs in _CONVNEXT:
        name = re.sub(ours, theirs, name)
    return name


def write(path: Path, weights: Weights, safetensors: bool) -> None:
    """Write nothing but weights, in one of the two formats that timm reads."""
    if safetensors:
        from safetensors.torch import save_file

        save_file({name: value.contiguous() for name, value in weights.items()}, path, metadata={"format": "pt"})
    else:
        torch.save({"state_dict": weights}, path)


@torch.no_grad()
def difference(path: Path, target: Target, images: Tensor, expected: Tensor) -> float:
    """Largest difference between what the model that timm makes of a file gives and what it should.

    Raises InputError if timm does not take the weights strictly.
    """
    import timm

    import timm_models  # noqa: F401 (registers names)

    try:
        model = timm.create_model(target.name, checkpoint_path=str(path), **target.settings)
        found = model.eval()(images)
    except (AssertionError, RuntimeError, TypeError, ValueError) as error:
        reason = " ".join(str(error).split())[:200]
        raise InputError(
            f"--format timm: timm's {target.name} does not take these weights ({reason}); export them as safetensors "
            "or torch"
        ) from error
    return (found - expected).abs().max().item() if found.shape == expected.shape else float("inf")
