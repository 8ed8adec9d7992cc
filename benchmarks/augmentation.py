"""Multi-crop augmentation on one core: the published pipeline compared with ours.

    python -m benchmarks.augmentation --data_path FOLDER [--images 64] [--rounds 5]

Both start from the bytes of the files. The published pipeline is written here from its description: Pillow decodes, and
torchvision's transforms run one after the other on every crop. Ours has a worker stage (decode once, cut uint8 crops)
and a colour stage over the batch. The two sides run in turn, and the medians over the rounds are printed. Times are CPU
time of the process, so that other work on the machine counts for neither side.
"""

from __future__ import annotations

import argparse
import statistics
import time
from pathlib import Path

import torch

from data.augment import ColourStage, CropSpec, GaussianBlur, Solarization
from data.datasets import open_images
from data.train_set import TrainSet
from runtime.cli import parse_described
from runtime.guards import run_program
from runtime.hardware import keep_freed_memory
from runtime.terminal import say


class PublishedAugmentation:
    """PIL image -> list of normalised crops: the published transforms, one crop after the other."""

    def __init__(self, spec: CropSpec):
        from torchvision import transforms as T

        def view(size: int, scale, blur: float, solarize: float):
            jitter = T.ColorJitter(spec.brightness, spec.contrast, spec.saturation, spec.hue)
            return T.Compose(
                [
                    T.RandomResizedCrop(size, scale=scale, interpolation=T.InterpolationMode.BICUBIC),
                    T.RandomHorizontalFlip(spec.flip),
                    T.RandomApply([jitter], p=spec.jitter),
                    T.RandomGrayscale(spec.gray),
                    GaussianBlur(blur, *spec.sigma),
                    Solarization(solarize),
                    T.ToTensor(),
                    T.Normalize((0.485, 0.456, 0.406), (0.229, 0.224, 0.225)),
                ]
            )

        kinds = [(spec.global_size, spec.global_scale)] * 2 + [(spec.local_size, spec.local_scale)]
        views = [view(*kind, spec.blur[i], spec.solarize[i]) for i, kind in enumerate(kinds)]
        self.views = views[:2] + views[2:] * spec.local_number

    def __call__(self, image) -> list[torch.Tensor]:
        return [view(image) for view in self.views]


def published_batch(files: list[Path], augment: PublishedAugmentation) -> list[torch.Tensor]:
    """The published loader's work for one batch: read, decode, augment, stack by crop."""
    from PIL import Image

    samples = []
    for file in files:
        with open(file, "rb") as handle:
            samples.append(augment(Image.open(handle).convert("RGB")))
    return [torch.stack(crops) for crops in zip(*samples, strict=True)]


def seconds(function, *args) -> tuple[float, object]:
    start = time.process_time()
    result = function(*args)
    return time.process_time() - start, result


def measure(data_path: str, spec: CropSpec, images: int, batch: int, rounds: int) -> dict[str, float]:
    """Median milliseconds per image of each side over the rounds, and the medians of each round's ratios."""
    source = open_images(data_path)
    images = min(images, len(source)) // batch * batch
    ours, colour, published = TrainSet(source, spec, seed=0), ColourStage(spec), PublishedAugmentation(spec)
    batches = [list(range(i, i + batch)) for i in range(0, images, batch)]
    names = ("published", "worker", "colour")
    rows = {name: [] for name in (*names, "worker ratio", "end to end ratio")}
    for epoch in range(rounds + 1):  # the first round warms up
        total = dict.fromkeys(names, 0.0)
        for indices in batches:
            total["published"] += seconds(published_batch, [Path(source.name(i)) for i in indices], published)[0]
            spent, crops = seconds(ours.__getitems__, [(epoch, i) for i in indices])
            total["worker"] += spent
            total["colour"] += seconds(colour, crops.crops, crops.colour)[0]
        if epoch:
            for name in names:
                rows[name].append(total[name] / images * 1e3)
            rows["worker ratio"].append(total["published"] / total["worker"])
            rows["end to end ratio"].append(total["published"] / (total["worker"] + total["colour"]))
    return {name: statistics.median(values) for name, values in rows.items()}


def get_args_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser("benchmarks.augmentation", description=__doc__.splitlines()[0], add_help=False)
    parser.add_argument("--data_path", required=True, help="a folder of images")
    parser.add_argument("--images", type=int, default=96, help="images per round")
    parser.add_argument("--batch_size", type=int, default=32, help="images per batch")
    parser.add_argument("--rounds", type=int, default=5, help="rounds, each running both sides in turn")
    parser.add_argument("--img_size", type=int, default=224, help="side of a global crop, pixels")
    parser.add_argument("--local_crops_size", type=int, default=96, help="side of a local crop, pixels")
    parser.add_argument("--local_crops_number", type=int, default=6, help="local crops per image")
    parser.add_argument("--threads", type=int, default=1, help="threads of the process")
    return parser


def main(argv: list[str] | None = None) -> int:
    args = parse_described(get_args_parser(), __doc__, argv)
    torch.set_num_threads(args.threads)
    keep_freed_memory()  # for both sides, as the programs do on a CPU
    spec = CropSpec(args.img_size, args.local_crops_size, local_number=args.local_crops_number)
    row = measure(args.data_path, spec, args.images, args.batch_size, args.rounds)
    say(f"2 x {spec.global_size} + {spec.local_number} x {spec.local_size}, ms per image on {args.threads} thread(s):")
    say(f"  published pipeline          {row['published']:8.2f}")
    say(f"  ours, worker stage          {row['worker']:8.2f}   {row['worker ratio']:.1f}x")
    end_to_end = row["worker"] + row["colour"]
    say(f"  ours, colour stage          {row['colour']:8.2f}")
    say(f"  ours, both                  {end_to_end:8.2f}   {row['end to end ratio']:.1f}x")
    return 0


if __name__ == "__main__":
    run_program(main)
