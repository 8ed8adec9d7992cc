"""The cost of more heads in a linear probe: steps with one head and with many, backbone included.

python -m benchmarks.linear_probe                       ViT-S/16 at 224 pixels, 1000 classes, batch 64
python -m benchmarks.linear_probe --arch resnet50 --heads 1 10 50
"""

from __future__ import annotations

import argparse
from typing import NamedTuple

import torch
from torch import Tensor, nn

import backbones
from benchmarks.measure import timed_in_turn
from data.loader import normalize
from evaluation.forms import default_forms, probe_features
from evaluation.linear import Probe
from runtime.cli import parse_described
from runtime.distributed import choose_device
from runtime.guards import run_program
from runtime.terminal import say


class Seconds(NamedTuple):
    """Seconds of a step with a number of heads: the whole, and the heads' part."""

    whole: float
    heads: float


def compare(
    model: nn.Module, images: Tensor, target: Tensor, classes: int, heads: list[int], rounds: int
) -> dict[int, Seconds]:
    """Steps of probes with 1, 10, ... `heads` in turn, on uint8 `images` (B, 3, H, W) on the model's device."""
    forms = default_forms(model)

    @torch.no_grad()
    def features() -> list[Tensor]:
        return probe_features(model, normalize(images), forms)

    fixed = features()
    widths = [x.shape[1] for x in fixed]
    probes = {
        count: Probe(widths, forms, [10 ** (-4 + 4 * i / count) for i in range(count)], classes, 256, target.device)
        for count in heads
    }
    whole = timed_in_turn(
        {str(n): lambda p=probe: p.step(features(), target, 1.0) for n, probe in probes.items()}, rounds
    )
    alone = timed_in_turn({str(n): lambda p=probe: p.step(fixed, target, 1.0) for n, probe in probes.items()}, rounds)
    return {n: Seconds(whole[str(n)], alone[str(n)]) for n in heads}


def get_args_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser("benchmarks.linear_probe", add_help=False)
    parser.add_argument("--arch", default="vit_small", help="backbone")
    parser.add_argument("--mode", default="simpool", choices=["official", "simpool"], help="its pooling")
    parser.add_argument("--batch", type=int, default=64, help="images")
    parser.add_argument("--classes", type=int, default=1000, help="classes")
    parser.add_argument("--heads", type=int, nargs="+", default=[1, 10, 50], help="numbers of heads to compare")
    parser.add_argument("--rounds", type=int, default=3, help="rounds, each running every number of heads in turn")
    parser.add_argument("--device", default="auto", help="auto, cuda, mps or cpu")
    return parser


def main(argv: list[str] | None = None) -> int:
    args = parse_described(get_args_parser(), __doc__, argv)
    device = choose_device(args.device)
    torch.manual_seed(0)
    model = backbones.build_backbone(args.arch, mode=args.mode).to(device).eval()
    images = torch.randint(0, 256, (args.batch, 3, 224, 224), dtype=torch.uint8, device=device)
    target = torch.randint(0, args.classes, (args.batch,), device=device)
    seconds = compare(model, images, target, args.classes, args.heads, args.rounds)
    say(f"{args.arch} {args.mode}, batch {args.batch}, {args.classes} classes, {device}")
    first = args.heads[0]
    for count, (whole, heads) in seconds.items():
        say(
            f"{count:3d} head(s): {1e3 * whole / args.batch:7.2f} ms per image, "
            f"{whole / seconds[first].whole:.3f}x of {first}; the heads' part {1e3 * heads / args.batch:.3f} ms"
        )
    return 0


if __name__ == "__main__":
    run_program(main)
