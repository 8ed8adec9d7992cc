"""Method: what distinguishes one way of training; the rest of this package is shared by all of them."""

from __future__ import annotations

import argparse
from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

if TYPE_CHECKING:
    from data.source import ImageSource
    from training.run import Run
    from training.watch import Watch


def _nothing(*_: Any) -> dict[str, Any]:
    return {}


def _no_watch(*_: Any) -> None:
    return None


@dataclass(frozen=True)
class Method:
    """A training method, which a program passes to `training.launch.train`.

    Args:
        name: recorded in checkpoints as config["method"]; also names the method's recipes.
        terms: names of the means that a step reports, the loss first, for example ("loss", "entropy", "kl").
        parser: returns the program's argument parser (see `training.flags.new_parser`).
        build: (args, number of training images, device) -> Run.
        step: (run, this process's micro-batches, number of the step, wishes) -> the result of `Means.report`.
        loss_key: the key of the loss's buffers in a checkpoint; None for a loss without buffers.
        check: (args) -> None; completes and checks the method's own arguments, raising InputError.
        config: (args) -> what a reader of the checkpoint needs besides the backbone's settings.
        watch: (run, training images, validation images or None) -> Watch, or None for a method without one.
        cosmetic: the method's own flags that a continued run may change because they don't affect its mathematics.
        labelled: whether it trains with labels; then train and val must have labels of the same classes.
        fit: (args, training images) -> None; completes the arguments that depend on the data, raising InputError.
    """

    name: str
    terms: tuple[str, ...]
    parser: Callable[[], argparse.ArgumentParser]
    build: Callable[[argparse.Namespace, int, torch.device], Run]
    step: Callable[..., Tensor]
    loss_key: str | None = None
    check: Callable[[argparse.Namespace], Any] = _nothing
    config: Callable[[argparse.Namespace], dict[str, Any]] = _nothing
    watch: Callable[[Run, ImageSource, ImageSource | None], Watch | None] = _no_watch
    cosmetic: frozenset[str] = frozenset()
    labelled: bool = False
    fit: Callable[[argparse.Namespace, ImageSource], Any] = _nothing

    @property
    def results(self) -> tuple[str, ...]:
        """The names of the values that a step returns."""
        return (*self.terms, "grad_norm", "bad", "stop", "save")
