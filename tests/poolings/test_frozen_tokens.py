"""Probes as they are used: trained with a classifier on frozen tokens of real images."""

import numpy as np
import pytest
import torch
from PIL import Image
from torch import nn
from torch.nn import functional as F

from backbones import build_backbone
from poolings.choose import PROBES, build_pooling

SETTINGS = {"ep": {"queries": 8}, "ep_all": {"queries": 8}, "capi": {"classes": 2}}


@pytest.fixture(scope="module")
def frozen(cifar10):
    """[CLS] and patches (B, 17, 64) of 64 real images under a random frozen ViT, and their two classes (B,)."""
    folders = sorted(path for path in (cifar10 / "train").iterdir() if path.is_dir())[:2]
    files = [file for folder in folders for file in sorted(folder.iterdir())[:32]]
    pixels = np.stack([np.asarray(Image.open(file).convert("RGB").resize((32, 32))) for file in files])
    images = torch.from_numpy(pixels).permute(0, 3, 1, 2) / 127.5 - 1
    settings = {"patch_size": 8, "img_size": 32, "embed_dim": 64, "depth": 2, "num_heads": 4}
    with torch.random.fork_rng(), torch.no_grad():
        torch.manual_seed(0)
        cls, patches, _ = build_backbone("vit_tiny", "official", **settings).eval().forward_dense(images)
    return torch.cat([cls.unsqueeze(1), patches], 1), torch.arange(2).repeat_interleave(32)


@pytest.mark.parametrize("name", [*PROBES, "simpool"])
def test_learns_real_images_from_frozen_tokens(name, frozen):
    """With BatchNorm and classifier (capi has one) 64 images are told apart after 60 steps: loss below a third."""
    tokens, target = frozen
    pool = build_pooling(name, 64, **SETTINGS.get(name, {}))
    tail = [nn.BatchNorm1d(64, affine=False, eps=1e-6), nn.Linear(64, 2)] if name != "capi" else []
    probe = nn.Sequential(pool, *tail)
    optimizer = torch.optim.AdamW([p for p in probe.parameters() if p.requires_grad], lr=1e-2)
    losses = []
    for _ in range(60):
        loss = F.cross_entropy(probe(tokens if pool.takes_cls else tokens[:, 1:]), target)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < losses[0] / 3
