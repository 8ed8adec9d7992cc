"""A linear head as a file: the published names, what made it, and the reading of ours and of published ones."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

from torch import Tensor

from evaluation.forms import Form, interleaved_weight
from pretrained import without_prefix
from runtime.checkpoint import read_checkpoint
from runtime.guards import InputError
from runtime.terminal import say

# How [CLS] and the mean patch token of one block stand in the features: see forms.with_mean_patch. Our first files do
# not name an order; theirs was the mean after [CLS].
ORDER = "interleaved"


class SavedHead(NamedTuple):
    """A head of C outputs on `form`'s features, in the order of forms.with_mean_patch."""

    weight: Tensor  # (C, D)
    bias: Tensor  # (C,)
    form: Form | None  # None: a published file, which does not tell
    identity: Mapping[str, Any] | None  # what made it (evaluation.identity), None in a published file


def head_content(classifier: Mapping[str, Tensor], form: Form, lr: float, identity: Mapping[str, Any]) -> dict:
    """What a file says of one head; `classifier` has the published names."""
    return {
        "state_dict": dict(classifier),
        "head": {"form": list(form), "lr": lr, "order": ORDER},
        "config": dict(identity),
    }


def read_head(path: Path) -> SavedHead:
    """A head saved by us or by the published program. Raises InputError if the file holds none."""
    saved = read_checkpoint(path)
    head = saved.get("head")
    if isinstance(head, Mapping) and "probe" in head:
        raise InputError(
            f"{path} holds an attentive probe ({head['probe']}), and a linear head is needed here; a run of "
            "--probes linear writes one, best_linear.pth.tar"
        )
    state = saved.get("state_dict", saved)
    state = state if isinstance(state, Mapping) else {}
    state = without_prefix({str(name): value for name, value in state.items()}, "module.")
    weight, bias = state.get("linear.weight"), state.get("linear.bias")
    if not (isinstance(weight, Tensor) and isinstance(bias, Tensor) and weight.ndim == 2):
        raise InputError(f"{path} holds no linear head: no linear.weight and linear.bias under state_dict")
    if bias.shape != weight.shape[:1]:
        raise InputError(f"{path}: linear.weight {tuple(weight.shape)} and linear.bias {tuple(bias.shape)} don't fit")
    if head is None:
        return SavedHead(weight, bias, None, None)
    form = Form(*head["form"])
    if form == Form(1, True) and head.get("order") != ORDER:
        say(f"{path}: an earlier version's head on [CLS] followed by the mean patch, converted to the published order")
        weight = interleaved_weight(weight)
    return SavedHead(weight, bias, form, saved.get("config"))
