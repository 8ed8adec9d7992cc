"""All heads of several probes, which share one pass of the backbone: `--probes` of eval_linear.py.

Letters: B images of the global batch, b images of one rank, D width of tokens or features.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from evaluation.forms import Form
from evaluation.heads import ORDER
from evaluation.linear import in_double
from evaluation.probe_families import Grid, PublishedLinear, TrainedHeads
from evaluation.probe_inputs import Inputs, extract_inputs
from evaluation.probe_names import ProbeName
from evaluation.probe_recipes import Recipe
from evaluation.ranks import gather_batch
from runtime.guards import InputError


class Widths(NamedTuple):
    """Widths of what the probes see."""

    features: list[int]  # of each form
    tokens: int | None  # None: there is no attentive probe


def find_widths(
    model: nn.Module, forms: Sequence[Form], names: Sequence[ProbeName], side: int, in_chans: int, device: torch.device
) -> tuple[Widths, int]:
    """The widths, and the number of tokens of an image (0 without attentive probes), found on a blank image.

    Raises ValueError if the model cannot serve a form or a probe.
    """
    with torch.no_grad():
        inputs = extract_inputs(model, torch.zeros(2, in_chans, side, side, device=device), forms, names)
    tokens = inputs.patches if inputs.patches is not None else inputs.with_cls
    features = [x.shape[1] for x in inputs.features]
    if tokens is None:
        return Widths(features, None), 0
    return Widths(features, tokens.shape[2]), tokens.shape[1]


class Probes:
    """The heads of several probes: each probe with every rate and weight decay of the grid, the linear one also with
    every form of the features.

    Raises InputError if the tokens' width does not suit a probe, and for a batch of one image.
    """

    def __init__(
        self,
        names: Sequence[ProbeName],
        forms: Sequence[Form],
        widths: Widths,
        num_classes: int,
        grid: Grid,
        recipe: Recipe,
        device: torch.device,
        seed: int = 0,
    ) -> None:
        if grid.global_batch < 2:
            raise InputError("--batch_size_per_gpu 1: probes normalise over the batch, which takes at least 2 images")
        self.names, self.forms, self.num_classes, self.device = list(names), list(forms), num_classes, device
        self.families: list[TrainedHeads | PublishedLinear] = []
        self._form_of: list[int | None] = []  # which of the features a family sees; None: tokens
        for name in names:
            if name.is_attentive:
                family = TrainedHeads(name, None, widths.tokens, num_classes, grid, recipe, device, seed)
                self._add(family, None)
                continue
            for i, (form, width) in enumerate(zip(forms, widths.features, strict=True)):
                if recipe.name == "dino":
                    self._add(PublishedLinear(name, form, width, num_classes, grid, device, seed), i)
                else:
                    self._add(TrainedHeads(name, form, width, num_classes, grid, recipe, device, seed), i)
        self.heads = [head for family in self.families for head in family.heads]

    def _add(self, family: TrainedHeads | PublishedLinear, form: int | None) -> None:
        self.families.append(family)
        self._form_of.append(form)

    def inputs(self, model: nn.Module, images: Tensor) -> Inputs:
        """What the heads see of (b, C, H, W) images, from one pass of the model."""
        return extract_inputs(model, images, self.forms, self.names)

    def learn(self, inputs: Inputs, target: Tensor, lr_scale: float) -> Tensor:
        """One step of every head on the batches of all ranks together; returns losses (heads,) before it."""
        inputs = inputs.map(torch.Tensor.float)
        features, target = gather_batch(inputs.features, target)
        inputs = inputs._replace(features=features)
        return torch.cat([family.step(x, target, lr_scale) for family, x in self._seen(inputs)])

    def count(self, inputs: Inputs, target: Tensor) -> Tensor:
        """Per head: hits at top-1, hits at top-5, and the sum of losses over the images, (heads, 3) float64."""
        inputs = inputs.map(torch.Tensor.float)
        return torch.cat([in_double(family.count(x, target)) for family, x in self._seen(inputs)])

    def _seen(self, inputs: Inputs) -> Iterator[tuple[TrainedHeads | PublishedLinear, Tensor]]:
        """(family, what it sees) for all of them."""
        for family, form in zip(self.families, self._form_of, strict=True):
            yield family, inputs.of(family.probe) if form is None else inputs.features[form]

    def state(self) -> list[Any]:
        """Everything that training goes on from."""
        return [family.state() for family in self.families]

    def load(self, state: Sequence[Any]) -> None:
        """Continue from what `state` gave. Raises ValueError if it belongs to other heads."""
        if len(state) != len(self.families):
            raise ValueError(f"the saved run has {len(state)} probes and forms, and this one {len(self.families)}")
        for family, saved in zip(self.families, state, strict=True):
            family.load(saved)

    def content(self, head: int, made_by: Mapping[str, Any]) -> dict[str, Any]:
        """What a file says of head number `head`; made_by: see evaluation.identity."""
        family, i = self._find(head)
        saved = family.saved_as(i)
        if "form" in saved:
            saved["order"] = ORDER
        return {"state_dict": family.classifier(i), "head": saved, "config": dict(made_by)}

    def _find(self, head: int) -> tuple[TrainedHeads | PublishedLinear, int]:
        for family in self.families:
            if head < len(family.heads):
                return family, head
            head -= len(family.heads)
        raise IndexError(head)
