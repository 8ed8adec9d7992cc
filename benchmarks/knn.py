"""Weighted k-NN compared with the published algorithm: time, agreement and memory.

    python -m benchmarks.knn                 50k x 10k x 384, 1000 classes: two and four values of k
    python -m benchmarks.knn --large         a tenth of 1.28M x 50k x 2048, and the memory for the whole

The published algorithm takes one k at a time and the queries in a hundred chunks, and sums votes over a one-hot array
of (queries, k, classes); it is written here plainly from its description. Both sides multiply in true float32. Whether
the faster library setting is that exact depends on the processor (see evaluation/knn.py); the output names the setting.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Iterator
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from benchmarks.measure import peak_bytes, timed_in_turn
from evaluation import knn, neighbours
from runtime.cli import parse_described
from runtime.guards import run_program
from runtime.terminal import say

T = 0.07


def published(train: Tensor, train_labels: Tensor, test: Tensor, test_labels: Tensor, k: int, classes: int) -> tuple:
    """One k of the published algorithm: (top-1, top-5) in percent."""
    rows = len(test) // 100
    top1 = top5 = 0.0
    one_hot = torch.zeros(k, classes)
    for start in range(0, len(test), rows):
        features, targets = test[start : start + rows], test_labels[start : start + rows]
        count = len(targets)
        similarity, index = (features @ train.T).topk(k, largest=True, sorted=True)
        neighbours = train_labels.expand(count, -1).gather(1, index)
        one_hot.resize_(count * k, classes).zero_()
        one_hot.scatter_(1, neighbours.view(-1, 1), 1)
        weights = (similarity / T).exp()
        scores = (one_hot.view(count, k, classes) * weights.view(count, k, 1)).sum(1)
        correct = scores.sort(1, descending=True).indices.eq(targets.view(-1, 1))
        top1 += correct[:, :1].sum().item()
        top5 += correct[:, : min(5, k)].sum().item()
    return 100 * top1 / len(test), 100 * top5 / len(test)


def features(n: int, q: int, width: int, classes: int, dtype: torch.dtype = torch.float32) -> tuple:
    """Clustered unit vectors and their labels: training images, then queries."""
    generator = torch.Generator().manual_seed(0)
    prototypes = torch.randn(classes, width, generator=generator)

    def draw(count: int) -> tuple[Tensor, Tensor]:
        labels = torch.randint(0, classes, (count,), generator=generator)
        rows = torch.empty(count, width, dtype=dtype)
        for start in range(0, count, 65536):
            block = prototypes[labels[start : start + 65536]]
            block = block + 4 * torch.randn(block.shape, generator=generator)
            rows[start : start + 65536] = F.normalize(block, dim=1)
        return rows, labels

    return *draw(n), *draw(q)


def product(queries: Tensor, keys: Tensor) -> Tensor:
    """The floor: the similarities alone, with the same exact setting."""
    with neighbours.exact_fp32_matmul(queries.device):
        return queries @ keys.T


class Comparison(NamedTuple):
    """For some values of k: seconds of both sides and of the product, and how far accuracies differ, in points."""

    ks: list[int]
    seconds: dict[str, float]
    differ: float


def compare(images: int, queries: int, width: int, classes: int, rounds: int) -> Iterator[Comparison]:
    """Both sides in turn, for two and for four values of k."""
    data = features(images, queries, width, classes)
    for ks in ([20, 200], [10, 20, 100, 200]):
        sides = {
            "published": lambda ks=ks: {k: published(*data, k, classes) for k in ks},
            "ours": lambda ks=ks: knn.knn_classifier(*data, ks, T),
        }
        theirs, ours = (side() for side in sides.values())
        sides["product"] = lambda: product(data[2], data[0])
        differ = max(abs(a - b) for k in ks for a, b in zip(ours[k], theirs[k], strict=True))
        yield Comparison(ks, timed_in_turn(sides, rounds), differ)


def large(part: int) -> None:
    """Memory for `1 / part` of ImageNet at a ResNet-50's width, with features in fp16; for the whole, calculated."""
    n, q, width, k = 1_281_167, 50_000, 2048, 200
    data = features(n // part, q // part, width, 1000, torch.float16)
    began = time.perf_counter()
    peak = peak_bytes(lambda: knn.knn_classifier(*data, [10, 20, 100, k], T), torch.device("cpu"))
    seconds = time.perf_counter() - began
    stored = sum(tensor.nbytes for tensor in data)
    say(
        f"{n // part} x {q // part} x {width} in fp16: stored {stored / 2**30:.2f} GiB, "
        f"k-NN's own memory {peak / 2**30:.2f} GiB, {seconds:.1f} s"
    )
    neighbours = q * k * (4 + 8)  # similarity and label, kept for all queries; everything else is bounded by chunks
    whole = (n + q) * width * 2 + (n + q) * 8
    own = peak - neighbours // part + neighbours
    total = (whole + own) / 2**30
    say(
        f"{n} x {q} x {width} by count: stored {whole / 2**30:.2f} GiB, k-NN's own memory {own / 2**30:.2f} GiB, "
        f"together {total:.1f} GiB; about {seconds * part**2 / 60:.0f} min on this machine"
    )


def get_args_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser("benchmarks.knn", add_help=False)
    parser.add_argument("--images", type=int, default=50_000, help="training images")
    parser.add_argument("--queries", type=int, default=10_000, help="images to classify")
    parser.add_argument("--width", type=int, default=384, help="width of the features")
    parser.add_argument("--classes", type=int, default=1000, help="classes")
    parser.add_argument("--rounds", type=int, default=3, help="rounds, each running both sides in turn")
    parser.add_argument("--large", action="store_true", help="measure memory on a part of ImageNet x 2048 instead")
    parser.add_argument("--part", type=int, default=10, help="for --large: use one part in this many of both sets")
    return parser


def main(argv: list[str] | None = None) -> int:
    args = parse_described(get_args_parser(), __doc__, argv)
    if args.large:
        large(args.part)
        return 0
    say(f"{args.images} x {args.queries} x {args.width}, {args.classes} classes, {torch.get_num_threads()} threads")
    precision = neighbours.fastest_exact_precision("cpu")
    say(f"float32 products exact to rounding (setting {precision!r} on this processor)")
    for ks, seconds, differ in compare(args.images, args.queries, args.width, args.classes, args.rounds):
        published, ours = seconds["published"], seconds["ours"]
        say(
            f"k = {ks}: published {published:.2f} s, ours {ours:.2f} s, ratio {published / ours:.1f}x; bare product "
            f"{seconds['product']:.2f} s, ours {ours / seconds['product']:.2f} times that; "
            f"largest difference of an accuracy {differ:.4f} points"
        )
    return 0


if __name__ == "__main__":
    run_program(main)
