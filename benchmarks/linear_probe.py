"""What more heads cost a linear probe: steps of one head beside steps of many, backbone included.

python -m benchmarks.linear_probe                       ViT-S/16 at 224 pixels, 1000 classes, batch 64
python -m benchmarks.linear_probe --arch resnet50 --heads 1 10 50
"""

from __future__ import annotations

import argparse

import torch

import backbones
from benchmarks.measure import timed_in_turn
from data.loader import normalize
from evaluation.linear import Probe, default_forms, probe_features


def main() -> None:
    """Time steps in turn, and print each number of heads beside the first."""
    parser = argparse.ArgumentParser("benchmarks.linear_probe", description=__doc__.split("\n")[0])
    parser.add_argument("--arch", default="vit_small")
    parser.add_argument("--mode", default="simpool")
    parser.add_argument("--batch", type=int, default=64)
    parser.add_argument("--classes", type=int, default=1000)
    parser.add_argument("--heads", type=int, nargs="+", default=[1, 10, 50])
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    args = parser.parse_args()
    device = torch.device(args.device)
    torch.manual_seed(0)
    model = backbones.build_backbone(args.arch, mode=args.mode).to(device).eval()
    images = torch.randint(0, 256, (args.batch, 3, 224, 224), dtype=torch.uint8)
    target = torch.randint(0, args.classes, (args.batch,), device=device)
    forms = default_forms(model)

    @torch.no_grad()
    def step(probe: Probe) -> None:
        features = probe_features(model, normalize(images.to(device)), forms)
        probe.step(features, target, 1.0)

    with torch.no_grad():
        widths = [x.shape[1] for x in probe_features(model, normalize(images[:2].to(device)), forms)]
    probes = {
        count: Probe(widths, forms, [10 ** (-4 + 4 * i / count) for i in range(count)], args.classes, 256, device)
        for count in args.heads
    }
    seconds = timed_in_turn({str(n): lambda p=probe: step(p) for n, probe in probes.items()}, args.rounds)
    with torch.no_grad():
        features = probe_features(model, normalize(images.to(device)), forms)
    alone = timed_in_turn({str(n): lambda p=p: p.step(features, target, 1.0) for n, p in probes.items()}, args.rounds)
    print(f"{args.arch} {args.mode}, batch {args.batch}, {args.classes} classes, {device}")
    first = seconds[str(args.heads[0])]
    for count in args.heads:
        ms = 1000 * seconds[str(count)] / args.batch
        heads = 1000 * alone[str(count)] / args.batch
        print(
            f"{count:3d} head(s): {ms:7.2f} ms per image, {seconds[str(count)] / first:.3f}x of {args.heads[0]}; "
            f"the heads' part {heads:.3f} ms"
        )


if __name__ == "__main__":
    main()
