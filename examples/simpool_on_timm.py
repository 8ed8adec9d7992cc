"""SimPool on a timm model: its tokens are pooled by `sp.py`, and both learn to tell the built-in photographs apart.

    python -m examples.simpool_on_timm [--epochs 3]

About half a minute on one CPU core. The model has random weights: nothing is downloaded.
"""

from __future__ import annotations

import argparse

import timm
import torch
from torch import Tensor, nn

from data.datasets import open_images
from data.loader import normalize
from data.source import ImageSource
from runtime.cli import parse_described
from runtime.guards import InputError, run_program
from sp import SimPool

SIDE, BATCH = 32, 100


class Classifier(nn.Module):
    """A timm transformer, SimPool in place of its own pooling, and a linear layer."""

    def __init__(self, classes: int) -> None:
        super().__init__()
        self.body = timm.create_model(
            "vit_tiny_patch16_224", img_size=SIDE, patch_size=4, embed_dim=64, depth=2, num_heads=4, num_classes=0
        )
        self.pool = SimPool(self.body.num_features, gamma=1.25)
        self.head = nn.Linear(self.body.num_features, classes)

    def forward(self, images: Tensor) -> Tensor:
        """(B, 3, H, W) -> logits (B, classes)"""
        tokens = self.body.forward_features(images)[:, self.body.num_prefix_tokens :]  # SimPool needs no [CLS] token
        return self.head(self.pool(tokens))


def images_and_labels(source: ImageSource) -> tuple[Tensor, Tensor]:
    """All images (N, 3, H, W), normalised, and their labels (N,)."""
    pixels = torch.stack([torch.from_numpy(source.load(i).copy()) for i in range(len(source))])
    return normalize(pixels.permute(0, 3, 1, 2)), torch.tensor(source.labels)


@torch.no_grad()
def accuracy(model: nn.Module, images: Tensor, labels: Tensor) -> float:
    """Percent of the images whose largest logit is their label's."""
    model.eval()
    logits = torch.cat([model(batch) for batch in images.split(BATCH)])
    return 100 * (logits.argmax(1) == labels).float().mean().item()


def main(argv: list[str] | None = None) -> None:
    """Train, and print the accuracy on patches from other parts of the photographs."""
    parser = argparse.ArgumentParser("simpool_on_timm", add_help=False)
    parser.add_argument("--epochs", type=int, default=3, help="passes over the 4,000 training patches")
    args = parse_described(parser, __doc__, argv)
    if args.epochs < 1:
        raise InputError(f"--epochs {args.epochs}: give at least 1")
    torch.manual_seed(0)
    train, val = open_images("demo", "train"), open_images("demo", "val")
    images, labels = images_and_labels(train)
    unseen = images_and_labels(val)
    model = Classifier(len(train.classes))
    print(f"untrained: {accuracy(model, *unseen):.1f} % of {len(val)} patches right", flush=True)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
    for epoch in range(args.epochs):
        model.train()
        for batch in torch.randperm(len(images)).split(BATCH):
            loss = nn.functional.cross_entropy(model(images[batch]), labels[batch])
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
        print(f"epoch {epoch + 1}: {accuracy(model, *unseen):.1f} %", flush=True)


if __name__ == "__main__":
    run_program(main)
