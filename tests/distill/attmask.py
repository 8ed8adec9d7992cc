"""The golden numbers of iBOT with attention-guided masks (tests/golden/README.md says what they hold)."""

from __future__ import annotations

import functools
from typing import Any

import torch

from tests.reference import GOLDEN_DIR


@functools.cache
def attmask_golden() -> dict[str, Any]:
    """All entries, by their keys without the leading `attmask/`."""
    entries = torch.load(GOLDEN_DIR / "attmask.pt", weights_only=True)
    return {key.removeprefix("attmask/"): value for key, value in entries.items()}
