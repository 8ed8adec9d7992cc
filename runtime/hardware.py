"""The one place that chooses by device: matmul precision, autocast, memory format, the allocator.

`Choice.lines`, the first lines of a run's log, tell what was chosen.
"""

from __future__ import annotations

import contextlib
import ctypes
import os
import platform
from dataclasses import dataclass, field

import torch

from runtime.distributed import get_world_size
from runtime.guards import InputError

AMP_CHOICES = ("auto", "none", "bf16", "fp16")
PRECISION_CHOICES = ("auto", "highest", "high", "medium")
_DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16}
FLOAT32_LEVEL = 2e-6  # relative error of a product that still counts as float32 (the exact library: about 3e-7)


@dataclass
class Choice:
    """How a run computes on its device."""

    device: torch.device
    amp: str
    matmul_precision: str
    channels_last: bool
    lines: list[str] = field(default_factory=list)

    @property
    def amp_dtype(self) -> torch.dtype | None:
        """The dtype of autocast, or None."""
        return _DTYPES.get(self.amp)

    def autocast(self) -> contextlib.AbstractContextManager:
        """A context for the forward passes."""
        if self.amp_dtype is None:
            return contextlib.nullcontext()
        return torch.autocast(self.device.type, self.amp_dtype)

    @property
    def memory_format(self) -> torch.memory_format:
        """Layout of images and convolution weights."""
        return torch.channels_last if self.channels_last else torch.contiguous_format


def choose(device: torch.device, amp: str, matmul_precision: str, convolutional: bool) -> Choice:
    """Decide, set the process-wide switches, and say what was decided.

    `amp`: auto is bf16 on CUDA devices that compute in it (fp16 on older ones), none elsewhere.
    `matmul_precision`: auto is TF32 on CUDA and the fast float32 library on a CPU where it proves accurate.
    Raises InputError for combinations that a device cannot do.
    """
    amp = _choose_amp(device, amp)
    precision, reason = _choose_precision(device, matmul_precision)
    torch.set_float32_matmul_precision(precision)
    if device.type == "cuda":
        torch.backends.cudnn.allow_tf32 = precision != "highest"
    choice = Choice(device, amp, precision, channels_last=convolutional and device.type != "mps")
    choice.lines = [
        f"matmul precision: {precision} ({reason})",
        f"autocast: {amp}",
        f"memory format: {'channels_last' if choice.channels_last else 'contiguous'}",
    ]
    if device.type == "cpu" and keep_freed_memory():
        choice.lines.append("allocator: freed memory is kept for the next step")
    return choice


def _choose_amp(device: torch.device, amp: str) -> str:
    if amp not in AMP_CHOICES:
        raise InputError(f"--amp {amp!r} is unknown; choose {', '.join(AMP_CHOICES)}")
    if amp == "auto":
        if device.type != "cuda":
            return "none"
        return "bf16" if torch.cuda.is_bf16_supported(including_emulation=False) else "fp16"
    return amp


def _choose_precision(device: torch.device, wanted: str) -> tuple[str, str]:
    if wanted not in PRECISION_CHOICES:
        raise InputError(f"--matmul_precision {wanted!r} is unknown; choose {', '.join(PRECISION_CHOICES)}")
    if wanted != "auto":
        return wanted, "as asked"
    if device.type == "cuda":
        return "high", "TF32 where float32 remains"
    if device.type != "cpu":
        return "highest", "no other choice here"
    error = product_error("medium")
    if error <= FLOAT32_LEVEL:
        return "medium", f"the fast float32 library; relative error {error:.0e} on a probe"
    return "highest", f"the fast library is off by {error:.0e} on a probe, as it is where it computes in bf16"


def product_error(precision: str, size: int = 512) -> float:
    """Largest error of a float32 product at that precision, relative to its largest entry, against float64."""
    generator = torch.Generator().manual_seed(0)
    a, b = (torch.randn(size, size, generator=generator) for _ in range(2))
    exact = a.double() @ b.double()
    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision(precision)
    try:
        return ((a @ b - exact).abs().max() / exact.abs().max()).item()
    finally:
        torch.set_float32_matmul_precision(before)


def device_line(device: torch.device) -> str:
    """What computes: the device's name, and how many processes share the work."""
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else f"{torch.get_num_threads()} threads"
    return f"{device.type} ({name}), {get_world_size()} process(es), torch {torch.__version__}"


def cpu_count() -> int:
    """Processors that this process may use: those of its CPU set if the system has such a thing, else all."""
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1


def keep_freed_memory() -> bool:
    """Let glibc keep large temporaries instead of returning them to the system at every step; False if it cannot.

    Has the effect of MALLOC_MMAP_MAX_=0 MALLOC_TRIM_THRESHOLD_=<large> in the environment, without a restart.
    """
    if platform.libc_ver()[0] != "glibc":
        return False
    mmap_max, trim_threshold = -4, -1  # M_MMAP_MAX, M_TRIM_THRESHOLD of malloc.h
    libc = ctypes.CDLL(None)
    return bool(libc.mallopt(mmap_max, 0)) and bool(libc.mallopt(trim_threshold, 2**31 - 1))
