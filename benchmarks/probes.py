"""What the heads of each probe add to a pass of the backbone.

python -m benchmarks.probes                           ViT-S/16 at 224 pixels, 1000 classes, batch 16
python -m benchmarks.probes --probes ep ep:queries=64 --heads 12
"""

from __future__ import annotations

import argparse

import torch
from torch import Tensor, nn

import backbones
from benchmarks.measure import timed_in_turn
from data.loader import normalize
from evaluation.forms import default_forms
from evaluation.probe_families import Grid
from evaluation.probe_inputs import extract_inputs
from evaluation.probe_names import NAMES, read_probes
from evaluation.probe_recipes import RECIPES
from evaluation.probes import Probes, find_widths
from runtime.cli import parse_described
from runtime.distributed import choose_device
from runtime.guards import run_program
from runtime.terminal import say

BACKBONE = "backbone"


def compare(
    model: nn.Module, images: Tensor, target: Tensor, classes: int, probes: list[str], heads: int, rounds: int
) -> dict[str, float]:
    """Seconds of the backbone on uint8 `images` (B, 3, H, W) and of a step of `heads` heads of each probe, in turn."""
    names, forms = read_probes(probes), default_forms(model)[:1]
    grid = Grid([10 ** (-4 + 4 * i / heads) for i in range(heads)], [0.0], 256)
    widths, _ = find_widths(model, forms, names, images.shape[-1], images.shape[1], images.device)

    @torch.no_grad()
    def seen(which=names):
        return extract_inputs(model, normalize(images), forms, which)

    sides = {BACKBONE: seen}
    for name in names:
        mine = [] if name.is_attentive else forms
        alone = Probes([name], mine, widths, classes, grid, RECIPES["dino"], images.device)
        inputs = seen([name])._replace(features=seen().features if mine else [])
        sides[name.label] = lambda heads=alone, inputs=inputs: heads.learn(inputs, target, 1.0)
    return timed_in_turn(sides, rounds)


def get_args_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser("benchmarks.probes", add_help=False)
    parser.add_argument("--arch", default="vit_small", help="backbone, in official mode")
    parser.add_argument("--batch", type=int, default=16, help="images")
    parser.add_argument("--classes", type=int, default=1000, help="classes")
    parser.add_argument("--probes", nargs="+", default=list(NAMES), help="probes to time")
    parser.add_argument("--heads", type=int, default=1, help="heads of each probe")
    parser.add_argument("--rounds", type=int, default=3, help="rounds, each running every side in turn")
    parser.add_argument("--device", default="auto", help="auto, cuda, mps or cpu")
    return parser


def main(argv: list[str] | None = None) -> int:
    args = parse_described(get_args_parser(), __doc__, argv)
    device = choose_device(args.device)
    torch.manual_seed(0)
    model = backbones.build_backbone(args.arch).to(device).eval()
    images = torch.randint(0, 256, (args.batch, 3, 224, 224), dtype=torch.uint8, device=device)
    target = torch.randint(0, args.classes, (args.batch,), device=device)
    seconds = compare(model, images, target, args.classes, args.probes, args.heads, args.rounds)
    backbone = seconds.pop(BACKBONE)
    say(f"{args.arch}, batch {args.batch}, {args.classes} classes, {args.heads} head(s) of each probe, {device}")
    say(f"{BACKBONE:>16}: {1e3 * backbone / args.batch:8.3f} ms per image")
    for name, value in seconds.items():
        each = value / args.heads
        say(f"{name:>16}: {1e3 * each / args.batch:8.3f} ms per image and head, {each / backbone:.4f} of the backbone")
    return 0


if __name__ == "__main__":
    run_program(main)
