"""safetensors files: weights, and in the header's texts the settings of the model that they belong to.

The package safetensors reads and writes the bytes; its format holds tensors and texts only, so nothing in it can run.
It has no checksum, so a file of ours carries the SHA-256 of its tensors in the header.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

SUFFIX = ".safetensors"
_CONFIG, _EPOCH, _DIGEST = "config", "epoch", "tensors_sha256"


def is_safetensors(path: str | Path) -> bool:
    """Whether the name says so, or the first bytes do: the header's length, then an object of JSON."""
    if Path(path).suffix == SUFFIX:
        return True
    try:
        with open(path, "rb") as file:
            start = file.read(9)
    except OSError:
        return False
    return len(start) == 9 and start[8:] == b"{" and int.from_bytes(start[:8], "little") < 1 << 30


def read(path: str | Path) -> dict[str, Any]:
    """{"state_dict": weights} on the CPU, with "config" and "epoch" if the header has them.

    Raises ValueError if the file is damaged or the package is missing, OSError if it cannot be opened.
    """
    library = _library(f"reading {path}")
    if not Path(path).is_file():
        raise FileNotFoundError(f"{path} does not exist, or is no file")
    try:
        with library.safe_open(path, framework="pt", device="cpu") as file:
            texts = file.metadata() or {}
            weights = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 (it is no dictionary)
    except library.SafetensorError as error:
        raise ValueError(f"{path} is damaged or cut short: {error}") from error
    if _DIGEST in texts and texts[_DIGEST] != digest(weights):
        raise ValueError(f"{path} is damaged: its weights are not those that were written; export it again")
    content: dict[str, Any] = {"state_dict": weights}
    for key in (_CONFIG, _EPOCH):
        try:
            if key in texts:
                content[key] = json.loads(texts[key])
        except (ValueError, RecursionError) as error:
            raise ValueError(f"{path} is damaged: its {key} is not JSON") from error
    return content


def write(path: str | Path, weights: Mapping[str, Tensor], config: Mapping[str, Any], epoch: int | None = None) -> None:
    """Write weights with their model's settings. Raises ValueError if the package is missing."""
    _library(f"writing {path}")
    from safetensors.torch import save_file

    whole = {name: value.contiguous() for name, value in weights.items()}
    texts = {"format": "pt", _CONFIG: json.dumps(config), _DIGEST: digest(whole)}
    if epoch is not None:
        texts[_EPOCH] = json.dumps(epoch)
    save_file(whole, path, metadata=texts)


def digest(weights: Mapping[str, Tensor]) -> str:
    """Hex SHA-256 of names, types, shapes and bytes, in the order of the names."""
    total = hashlib.sha256()
    for name in sorted(weights):
        value = weights[name].contiguous()
        total.update(f"{name} {value.dtype} {tuple(value.shape)}\n".encode())
        total.update(value.reshape(-1).view(torch.uint8).numpy())
    return total.hexdigest()


def _library(purpose: str) -> Any:
    try:
        import safetensors
    except ImportError:
        raise ValueError(f"{purpose} needs the package safetensors: pip install safetensors") from None
    return safetensors
