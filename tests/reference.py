"""The golden numbers and the generators of their weights and inputs (tests/golden/README.md says what they hold)."""

from __future__ import annotations

import functools
import zlib
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

GOLDEN_DIR = Path(__file__).parent / "golden"


@functools.cache
def _golden() -> dict[str, Any]:
    return torch.load(GOLDEN_DIR / "reference.pt", weights_only=True)


def golden(key: str) -> Any:
    """Entry `key` of the golden numbers."""
    return _golden()[key]


def golden_keys(prefix: str = "") -> list[str]:
    """All golden keys that start with `prefix`."""
    return [key for key in _golden() if key.startswith(prefix)]


def reference_checkpoint_path() -> Path:
    """A full training checkpoint as the published code writes it (an argparse.Namespace inside)."""
    return GOLDEN_DIR / "reference_checkpoint.pth"


def tensor(seed: int, shape: tuple[int, ...]) -> Tensor:
    """T(seed, shape) of the golden README: legacy numpy normal numbers as float32."""
    return torch.from_numpy(np.random.RandomState(seed).standard_normal(tuple(shape)).astype(np.float32))


def _entry(name: str, shape: tuple[int, ...], scale: float) -> Tensor:
    value = tensor(zlib.crc32(name.encode()) & 0x7FFFFFFF, shape) * scale
    if name.endswith("running_var"):
        return value.abs() + 0.5
    if name.endswith("weight_g"):
        return torch.ones(shape)
    if len(shape) == 1 and name.endswith("weight"):
        return value + 1
    return value


def fill_(module: nn.Module, scale: float = 0.05) -> nn.Module:
    """Overwrite every float entry of the module's state dict by the golden rule; returns the module."""
    state = module.state_dict()
    for name, value in state.items():
        if value.is_floating_point():
            state[name] = _entry(name, tuple(value.shape), scale)
    module.load_state_dict(state)
    return module


def assert_close(actual: Tensor, expected: Tensor, rel: float = 2e-5, what: str = "") -> None:
    """Relative to the largest entry of what is expected, as the golden tolerance is meant."""
    assert actual.shape == expected.shape, f"{what}: shape {tuple(actual.shape)}, expected {tuple(expected.shape)}"
    error = ((actual - expected).abs().max() / expected.abs().max().clamp_min(1e-12)).item()
    assert error <= rel, f"{what}: relative error {error:.2e} > {rel:.0e}"
