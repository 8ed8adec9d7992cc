"""What is chosen by device."""

from __future__ import annotations

import os

import pytest
import torch

from runtime import hardware
from runtime.guards import InputError


def test_precision_is_chosen_by_its_error(monkeypatch):
    """The fast CPU library is used only if a probe shows float32's accuracy."""
    for error, expected in ((1e-7, "medium"), (1e-3, "highest")):
        monkeypatch.setattr(hardware, "product_error", lambda _, error=error: error)
        choice = hardware.choose(torch.device("cpu"), "auto", "auto", convolutional=True)
        assert choice.matmul_precision == expected
        assert torch.get_float32_matmul_precision() == expected
    assert choice.channels_last
    assert choice.amp == "none"
    assert hardware.choose(torch.device("cpu"), "bf16", "highest", False).amp_dtype == torch.bfloat16
    with pytest.raises(InputError, match="fp8"):
        hardware.choose(torch.device("cpu"), "fp8", "auto", False)


def test_product_error_is_float32s_at_highest():
    """The probe itself: at full precision the error is that of float32 sums."""
    assert hardware.product_error("highest") < 2e-6
    assert torch.get_float32_matmul_precision() == "highest"


def test_processors_are_counted_everywhere(monkeypatch):
    """Without Linux's CPU sets, all processors count."""
    assert 1 <= hardware.cpu_count() <= os.cpu_count()
    monkeypatch.delattr(os, "sched_getaffinity")
    assert hardware.cpu_count() == os.cpu_count()
    monkeypatch.setattr(os, "cpu_count", lambda: None)
    assert hardware.cpu_count() == 1
