"""Features as files under the published names, with a description that is checked.

Letters: N images, D width.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from evaluation import identity
from runtime.checkpoint import write_atomic, write_json_atomic
from runtime.guards import InputError
from runtime.terminal import say

TENSOR_FILES = ("trainfeat.pth", "testfeat.pth", "trainlabels.pth", "testlabels.pth")
DESCRIPTION_FILE = "features.json"


@dataclass
class FeatureSet:
    """L2-normalised features and labels of a training and a test set, and what made them."""

    train_features: Tensor  # (n, D)
    test_features: Tensor  # (q, D)
    train_labels: Tensor  # (n,) int64
    test_labels: Tensor  # (q,) int64
    description: dict[str, Any]


def dump_features(folder: str | Path, features: FeatureSet) -> None:
    """Write the four tensors under the published names, and features.json, which says what made them."""
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    tensors = (features.train_features, features.test_features, features.train_labels, features.test_labels)
    (folder / DESCRIPTION_FILE).unlink(missing_ok=True)  # never next to tensors that it does not describe
    for name, tensor in zip(TENSOR_FILES, tensors, strict=True):
        write_atomic(folder / name, lambda path, tensor=tensor: torch.save(tensor.cpu(), path))
    shapes = {"train_shape": list(tensors[0].shape), "test_shape": list(tensors[1].shape)}
    write_json_atomic(folder / DESCRIPTION_FILE, {**features.description, **shapes})


def load_features(folder: str | Path, expected: Mapping[str, Any] | None = None) -> FeatureSet:
    """Read what `dump_features`, or the published code, wrote.

    expected: what made the features that are wanted (evaluation.identity); whatever it holds must agree. Raises
    InputError if a file is missing or damaged, if tensors do not belong together, or if the features are those of
    another checkpoint, other settings or other images. Files without a description are used, and the output says that
    they cannot be checked.
    """
    folder = Path(folder)
    tensors = [_read_tensor(folder / name) for name in TENSOR_FILES]
    train, test, train_labels, test_labels = tensors
    for name, features, labels in (("train", train, train_labels), ("test", test, test_labels)):
        if features.ndim != 2 or labels.ndim != 1 or len(features) != len(labels):
            raise InputError(
                f"{folder}: {name} features {tuple(features.shape)} and labels {tuple(labels.shape)} do not belong "
                "together; dump them again with --dump_features"
            )
        if not features.is_floating_point() or labels.is_floating_point():
            raise InputError(
                f"{folder}: {name} features are {features.dtype} and labels {labels.dtype}; dump them again with "
                "--dump_features"
            )
    description = _read_description(folder)
    if description is None:
        say(f"{folder} has no {DESCRIPTION_FILE}: these features cannot be checked against a checkpoint or data set")
        return FeatureSet(train, test, train_labels.long(), test_labels.long(), {})
    if description.get("train_shape") != list(train.shape) or description.get("test_shape") != list(test.shape):
        raise InputError(f"{folder}: {DESCRIPTION_FILE} describes other tensors; dump them again with --dump_features")
    if expected:
        identity.require_same(
            description, expected, identity.recorded(description, expected, str(folder / DESCRIPTION_FILE)),
            f"the features in {folder} were made otherwise",
            "Give the checkpoint, settings and data that made them, or leave out --load_features",
        )  # fmt: skip
    return FeatureSet(train, test, train_labels.long(), test_labels.long(), description)


def _read_description(folder: Path) -> dict[str, Any] | None:
    """features.json, None if there is none. Raises InputError if it is no description of ours."""
    path = folder / DESCRIPTION_FILE
    if not path.is_file():
        return None
    remedy = "dump the features again with --dump_features"
    try:
        description = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        raise InputError(f"{path} can't be read ({type(error).__name__}): {remedy}") from error
    if not isinstance(description, dict):
        raise InputError(f"{path} holds a {type(description).__name__} and not an object: {remedy}")
    classes = description.get("classes")
    if classes is not None and not (isinstance(classes, list) and all(isinstance(c, str) for c in classes)):
        raise InputError(f"{path}: classes is not a list of names: {remedy}")
    return description


def _read_tensor(path: Path) -> Tensor:
    if not path.is_file():
        raise InputError(f"{path} does not exist: --load_features takes a folder that --dump_features wrote")
    try:
        tensor = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # damage takes many forms inside torch's reader
        raise InputError(f"{path} can't be read ({type(error).__name__}): dump the features again") from error
    if not isinstance(tensor, Tensor):
        raise InputError(f"{path} holds a {type(tensor).__name__}, not a tensor: dump the features again")
    return tensor
