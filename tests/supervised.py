"""Tiny runs of the supervised program on real images."""

from __future__ import annotations

import main_supervised
from runtime.distributed import leave

COMMON = ["--num_workers", "0", "--device", "cpu", "--matmul_precision", "highest", "--report", "false"]
VIT = [
    "--arch", "vit_small", "--mode", "simpool", "--patch_size", "8", "--embed_dim", "24", "--depth", "2",
    "--num_heads", "2", "--img_size", "32", "--batch_size_per_gpu", "16", "--warmup_epochs", "1", "--lr", "0.002",
    "--model_ema_decay", "0.8", *COMMON,
]  # fmt: skip
RESNET = [
    "--arch", "resnet18", "--stem", "standard", "--mode", "simpool", "--img_size", "32", "--batch_size_per_gpu", "16",
    "--lr", "0.01", "--warmup_epochs", "0", *COMMON,
]  # fmt: skip


def train(*flags) -> int:
    """main_supervised in this process."""
    try:
        return main_supervised.main([str(flag) for flag in flags])
    finally:
        leave()
