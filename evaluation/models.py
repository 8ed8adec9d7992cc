"""From a checkpoint to a model that is ready to be evaluated, ours or a published one.

What the checkpoint says of its model is read by `pretrained`; a flag that contradicts it is an error that shows both
values.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

import backbones
import pretrained
from data.decode import Picture
from data.eval_set import central_square
from data.loader import normalize
from evaluation import options
from evaluation.features import eval_resize
from poolings.choose import POOLINGS, settings_of
from pretrained import MODEL_KEYS, POLICY_KEYS
from runtime.checkpoint import file_sha256, read_checkpoint
from runtime.guards import InputError, input_errors
from runtime.terminal import say


@dataclass
class LoadedModel:
    """A backbone in eval mode that gives features, and where it came from."""

    model: nn.Module
    config: dict[str, Any]
    sha256: str | None = None
    path: str = ""
    epoch: int | None = None
    notes: list[str] = field(default_factory=list)

    def preprocess(self, image: Any) -> Tensor:
        """A photograph as the evaluations show it to the model: (1, C, S, S) float32, normalised, on its device.

        image: a PIL image, or uint8 pixels (H, W, C). The shorter side is resized, the central square cut out.
        """
        channels, size = options.channels(self.config), options.input_side(self.config)
        if hasattr(image, "convert"):
            image = image.convert({1: "L", 3: "RGB", 4: "RGBA"}.get(channels, image.mode))
        pixels = np.array(image)
        pixels = pixels[..., None] if pixels.ndim == 2 else pixels
        if pixels.dtype != np.uint8 or pixels.ndim != 3 or pixels.shape[2] != channels:
            raise ValueError(f"pixels {pixels.dtype} {pixels.shape}: give uint8 (H, W, {channels}), or a PIL image")
        square = central_square(Picture.from_array(pixels), size, eval_resize(size))
        return normalize(square[None].to(next(self.model.parameters()).device))


def load_checkpoint_model(
    path: str | Path,
    *,
    checkpoint_key: str = "teacher",
    device: torch.device | str = "cpu",
    **flags: Any,
) -> LoadedModel:
    """Build the model that a checkpoint holds and load its weights, in eval mode on `device`.

    `flags` are values of MODEL_KEYS and POLICY_KEYS; None (for gamma "auto", since None is a gamma) means not given.
    An empty path gives random weights of the flags' model, with a message, as DINO's programs do.

    Raises InputError for a file that cannot be used, for a flag that contradicts it, and for a missing flag that
    nothing in the file can replace.
    """
    wrong = set(flags) - {*MODEL_KEYS, *POLICY_KEYS}
    if wrong:
        raise TypeError(f"unknown model flags {sorted(wrong)}")
    given = {key: value for key, value in flags.items() if value != ("auto" if key == "gamma" else None)}
    if not path:
        config = {"arch": "vit_small", **given}
        model = build(config)
        say(f"no checkpoint given: {config['arch']} with random weights")
        return LoadedModel(model.to(device).eval(), config)
    with input_errors():
        found = pretrained.open_pretrained(path, checkpoint_key)
    config, notes = reconcile(found, given, path)
    model = build_to_fit(config, found.weights, path)
    with input_errors():
        notes += pretrained.load_weights(model, found.weights, path)
    for note in notes:
        say(note)
    return LoadedModel(model.to(device).eval(), config, file_sha256(path), str(path), found.epoch, notes)


def build(config: Mapping[str, Any]) -> nn.Module:
    """A backbone from MODEL_KEYS and POLICY_KEYS; what is absent takes the builder's default. Raises InputError."""
    known = {key: config[key] for key in (*MODEL_KEYS, *POLICY_KEYS) if key in config}
    settings = {key: value for key, value in known.items() if value is not None or key == "gamma"}
    with input_errors():
        return backbones.build_backbone(**settings)


def build_to_fit(config: Mapping[str, Any], weights: Mapping[str, Tensor], path: str | Path) -> nn.Module:
    """`build`, after the shapes have been compared without memory: a small file can name a model of any size."""
    with torch.device("meta"):
        outline = build(config)
    with input_errors():
        pretrained.check_fit(outline, weights, path)
    return build(config)


def reconcile(
    found: pretrained.Pretrained, given: Mapping[str, Any], path: str | Path
) -> tuple[dict[str, Any], list[str]]:
    """(configuration, notes): the recorded settings with the user's flags checked against them.

    Raises InputError for a contradiction, and if a setting is neither recorded nor given.
    """
    recorded = found.settings
    clashes = [
        f"--{key} {given[key]} but the checkpoint says {recorded[key]}"
        for key in MODEL_KEYS
        if key != "pooling_args" and key in given and key in recorded and not _same(key, given[key], recorded[key])
    ]
    if not clashes and "pooling_args" in given and "pooling_args" not in found.unknown:
        given = {**given, "pooling_args": _merged(given["pooling_args"], recorded, clashes)}
    if clashes:
        raise InputError(f"{path}: {'; '.join(clashes)}. Leave the flag out to use the checkpoint's value")
    missing = [f"--{key}" for key in found.unknown if key not in given]
    if missing:
        size = f" (embed_dim {recorded['embed_dim']}, depth {recorded['depth']})" if "embed_dim" in recorded else ""
        raise InputError(
            f"{path} does not tell {' or '.join(missing)}, and the weights{size} don't either; give {' '.join(missing)}"
        )
    notes = found.notes + [
        f"{key} {given[key]} as asked, instead of the checkpoint's {recorded[key]}"
        for key in POLICY_KEYS
        if key in given and recorded.get(key) not in (None, given[key])
    ]
    chosen = (*POLICY_KEYS, "pooling_args")
    added = {key: value for key, value in given.items() if key not in recorded or key in chosen}
    return {**recorded, **added}, notes


def _same(key: str, one: Any, other: Any) -> bool:
    if key == "arch":
        return str(one).replace("deit_", "vit_") == str(other).replace("deit_", "vit_")
    if key == "img_size":
        return _pair(one) == _pair(other)
    return one == other


def _merged(given: Mapping[str, Any], recorded: Mapping[str, Any], clashes: list[str]) -> dict[str, Any]:
    """The recorded settings of the pooling with the user's; adds to `clashes` those that contradict them.

    What was not recorded had its default. Settings of the evaluation alone (slot's eval_seed) are the user's choice.
    """
    mode, before = recorded.get("mode"), recorded.get("pooling_args", {})
    built = {**(settings_of(mode) if mode in POOLINGS else {}), **before}
    for name, value in given.items():
        if name in built and not name.startswith("eval_") and _listed(value) != _listed(built[name]):
            clashes.append(f"--pooling_args {name}={value} but the checkpoint says {built[name]}")
    return {**before, **given}


def _listed(value: Any) -> Any:
    return list(value) if isinstance(value, tuple) else value


def _pair(size: Any) -> tuple[int, ...]:
    sizes = tuple(size) if isinstance(size, list | tuple) else (size,)
    return sizes * 2 if len(sizes) == 1 else sizes


# ------------------------------------------------------------------------------------------------ into built models


def backbone_weights(content: Mapping[str, Any], checkpoint_key: str, path: str | Path) -> dict[str, Tensor]:
    """The backbone's weights in a checkpoint's content, under the names of our models. Raises InputError."""
    with input_errors():
        weights, notes = pretrained.find_backbone(content, checkpoint_key, path)
    for note in notes:
        say(note)
    return weights


def load_backbone(model: nn.Module, weights: dict[str, Tensor], path: str | Path) -> None:
    """Load backbone weights strictly; only a classifier and iBOT's mask token may be left over. Raises InputError."""
    with input_errors():
        notes = pretrained.load_weights(model, weights, path)
    for note in notes:
        say(note)


def load_pretrained_weights(
    model: nn.Module,
    pretrained_weights: str | Path,
    checkpoint_key: str | None = None,
    model_name: str | None = None,
    patch_size: int | None = None,
) -> None:
    """Load a checkpoint's backbone into a model that has been built (DINO's function and argument order).

    Nothing is downloaded: an empty path keeps the random weights and says so, a wrong one is an error.
    """
    if not pretrained_weights:
        say("no --pretrained_weights given: the model keeps its random weights")
        return
    content = read_checkpoint(pretrained_weights)
    load_backbone(model, backbone_weights(content, checkpoint_key or "teacher", pretrained_weights), pretrained_weights)
    say(f"loaded {checkpoint_key or 'the weights'} of {pretrained_weights}")


def load_pretrained_linear_weights(
    linear_classifier: nn.Module, model_name: str, patch_size: int, path: str | Path | None = None
) -> None:
    """Load a linear head from `path` (DINO's function, which downloaded it; here the network is the user's choice).

    Raises InputError without a path, and if the file does not hold such a head.
    """
    if path is None:
        raise InputError(
            f"no file given for the linear head of {model_name}/{patch_size}, and nothing is downloaded here; "
            "download the published head yourself and pass its path"
        )
    content = read_checkpoint(path)
    state = content.get("state_dict", content)
    state = pretrained.without_prefix(state, "module.") if isinstance(state, dict) else {}
    try:
        linear_classifier.load_state_dict({name: value for name, value in state.items() if isinstance(value, Tensor)})
    except RuntimeError as error:
        raise InputError(f"{path} does not hold this linear head: {error}") from error
