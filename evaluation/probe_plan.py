"""The flags of attentive probes: which probes are trained, by which recipe and on which grid, and their heads."""

from __future__ import annotations

import argparse
import math
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

from data.loader import build_eval_loader
from evaluation import cached, options
from evaluation.forms import Form
from evaluation.linear import Probe
from evaluation.linear_task import Task
from evaluation.probe_cache import CachedTokens, MemoryBudget
from evaluation.probe_families import Grid
from evaluation.probe_figures import draw_probe_maps
from evaluation.probe_heads import ProbeHead
from evaluation.probe_inputs import grid_of
from evaluation.probe_names import LINEAR, NAMES, ProbeName, read_probes
from evaluation.probe_recipes import RECIPES, Recipe
from evaluation.probes import Probes, find_widths
from runtime.cli import add_flag, bool_flag
from runtime.distributed import is_main_process
from runtime.guards import InputError, input_errors
from runtime.terminal import say

MAPS = 8  # images that --probe_maps shows if it is not told how many
DEFAULT_CACHE = 2.0  # GiB


def add_probe_flags(parser: argparse.ArgumentParser) -> None:
    """--probes and what goes with it."""
    group = parser.add_argument_group("attentive probes")
    add_flag(group, "--probes", nargs="+", default=None, metavar="NAME",
             help=f"trained in one pass: {', '.join(NAMES)}; settings as in ep:queries=16")  # fmt: skip
    add_flag(group, "--probe_recipe", choices=tuple(RECIPES), default="dino",
             help="dino: SGD; ep: LARS, 90 epochs with warm-up; capi: AdamW, 30 heads per probe")  # fmt: skip
    add_flag(group, "--wd", type=float, nargs="+", default=None,
             help="weight decays, each with every rate (default: 0; recipe capi: 0.0005 0.001 0.05)")  # fmt: skip
    add_flag(group, "--probe_maps", type=int, nargs="?", const=MAPS, default=None, metavar="IMAGES",
             help="draw where the queries of the chosen heads look, on this many val images "
                  f"({MAPS} if no number is given)")  # fmt: skip
    add_flag(group, "--augment", type=bool_flag, default=True,
             help="false: train on central crops, whose tokens are computed once and kept")  # fmt: skip
    add_flag(group, "--token_cache", type=float, default=DEFAULT_CACHE, metavar="GIB",
             help="memory per process for tokens of images that are seen without augmentation")  # fmt: skip


@dataclass(frozen=True)
class Plan:
    """The probes of a run and how they are trained; without --probes `names` is empty (the published linear probe)."""

    names: list[ProbeName]
    recipe: Recipe
    lrs: list[float]
    wds: list[float]

    @property
    def has_linear(self) -> bool:
        """Whether the model's own features are needed."""
        return not self.names or any(not name.is_attentive for name in self.names)

    @property
    def attentive(self) -> list[ProbeName]:
        return [name for name in self.names if name.is_attentive]

    def head_count(self, forms: list[Form]) -> int:
        """Heads of the run; `forms` are the linear probe's."""
        return (len(forms) + len(self.attentive)) * len(self.lrs) * len(self.wds)

    def identity(self) -> dict[str, Any]:
        """What a resumed run must have in common, besides a linear run's."""
        if not self.names:
            return {}
        return {"probes": [name.label for name in self.names], "probe_recipe": self.recipe.name, "wds": self.wds}


def read_plan(args: argparse.Namespace) -> Plan:
    """The plan of checked flags; sets `args.epochs` to the recipe's unless given. Raises InputError."""
    recipe = RECIPES[args.probe_recipe]
    asked = args.probes
    if asked is None and (args.wd is not None or recipe.name != "dino" or not args.augment):
        asked = [LINEAR]
    names = read_probes(asked) if asked is not None else []
    for wd in args.wd or []:
        if not (math.isfinite(wd) and wd >= 0):
            raise InputError(f"--wd {wd:g}: give 0 or a number above it")
    if args.wd == []:
        raise InputError("--wd: give at least one weight decay")
    if not (math.isfinite(args.token_cache) and args.token_cache >= 0):
        raise InputError(f"--token_cache {args.token_cache:g}: give the GiB of memory for tokens, 0 or more")
    instead = "--evaluate" if args.evaluate else "--logistic" if args.logistic else None
    if names and instead:
        flags = {"--probes": args.probes is not None, "--wd": args.wd is not None, "--augment": not args.augment}
        given = next((flag for flag, is_given in flags.items() if is_given), "--probe_recipe")
        reads = "reads from its file which probe it is" if args.evaluate else "fits a linear classifier"
        raise InputError(f"{instead} {reads} and trains no probes: leave {given} out")
    plan = Plan(names, recipe, list(dict.fromkeys(args.lr or recipe.lrs)), list(dict.fromkeys(args.wd or recipe.wds)))
    if args.probe_maps is not None:
        options.check_positive(args, "probe_maps")
        if not args.evaluate and not plan.attentive:
            raise InputError("--probe_maps draws what queries look at, and a linear probe has none: give --probes ep")
    if plan.names and not plan.has_linear and (args.n_last_blocks or args.avgpool_patchtokens is not None):
        raise InputError(
            "--n_last_blocks and --avgpool_patchtokens are of the linear probe, which --probes leaves out: add linear, "
            "or leave them out"
        )
    args.epochs = recipe.epochs if args.epochs is None else args.epochs
    return plan


# ---- heads, and the images that they are tried on -------------------------------------------------------------------


def build_probe(
    task: Task, plan: Plan, forms: list[Form], num_labels: int, global_batch: int
) -> tuple[Probe | Probes, int]:
    """The heads of a run, and the number of tokens of an image, 0 without attentive probes.

    Raises InputError for a probe that the model can't serve.
    """
    args = task.args
    if not plan.names:
        return Probe(task.widths(forms), forms, plan.lrs, num_labels, global_batch, task.device, args.seed), 0
    side, channels = task.extraction["img_size"], options.channels(task.loaded.config)
    with input_errors():
        widths, tokens = find_widths(task.model, forms, plan.names, side, channels, task.device)
    if args.probe_maps is not None:
        with input_errors("--probe_maps"), torch.no_grad():
            grid_of(task.model, torch.zeros(1, channels, side, side, device=task.device))
    grid = Grid(plan.lrs, plan.wds, global_batch)
    return Probes(plan.names, forms, widths, num_labels, grid, plan.recipe, task.device, args.seed), tokens


def evaluation_set(
    task: Task, probe: Probe | Probes, budget: MemoryBudget, source: Any, desc: str, indices: np.ndarray | None = None
) -> cached.Cached | CachedTokens:
    """This rank's share of a source, or of its `indices`, as the heads see it, to count their hits on."""
    if isinstance(probe, Probe):
        return task.cache(source, probe.forms, f"{desc} features", indices)
    return CachedTokens(task.model, source, probe, task.extraction, budget, desc, indices)


def describe(plan: Plan, probe: Probe | Probes, tokens: int, global_batch: int) -> None:
    """Say which heads are about to be trained, and how."""
    heads = probe.heads
    rates = f"lr {', '.join(f'{lr:g}' for lr in sorted(plan.lrs))}"
    if not plan.names:
        names = ", ".join(dict.fromkeys(head.form.name for head in heads))
        say(f"{len(heads)} head(s) on {names}; {rates} per 256 images; global batch {global_batch}")
        return
    for label in dict.fromkeys(head.probe for head in heads):
        mine = [head for head in heads if head.probe == label]
        forms = ", ".join(dict.fromkeys(head.form.name for head in mine if head.form is not None))
        parameters = " or ".join(dict.fromkeys(f"{head.parameters:,}" for head in mine))
        say(f"{label}: {len(mine)} head(s){' on ' + forms if forms else ''}, {parameters} parameters each")
    decays = f"; weight decay {', '.join(f'{wd:g}' for wd in plan.wds)}" if any(plan.wds) else ""
    per = " per 256 images" if plan.recipe.per_256_images else ""
    say(f"{plan.recipe.describe()}; {rates}{per}{decays}; global batch {global_batch}")
    if tokens == 1:
        say("note: the model has one position for an image of this size, so attentive probes have nothing to choose")


def draw_maps(task: Task, named: dict[str, tuple[ProbeName, ProbeHead]]) -> None:
    """--probe_maps of these heads, by rank 0 in the folder probe_maps of the results."""
    if not is_main_process():
        return
    count = min(task.args.probe_maps, len(task.val))
    chosen = np.unique(np.linspace(0, len(task.val) - 1, count).round().astype(np.int64))  # over all classes
    settings = task.extraction
    loader = build_eval_loader(
        task.val, count, 0, settings["img_size"], settings["resize"], chosen, on_bad_image=settings["on_bad_image"]
    )
    images = torch.cat([images for images, _ in loader])
    paths = draw_probe_maps(task.model, images, named, task.folder / "probe_maps")
    say(f"what the probes look at: {', '.join(map(str, paths))}")
