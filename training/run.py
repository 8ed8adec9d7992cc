"""A run: everything that a training step reads and changes, and the operations common to every method's step.

Shapes: B images per process and micro-batch, V views.
"""

from __future__ import annotations

import argparse
import contextlib
from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple, Protocol

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel
from torch.utils.data import Dataset

from data.source import ImageSource
from optim import sharding
from optim.average import ParameterAverage
from optim.batchnorm import RunningStatistics
from optim.clipping import clip_each_
from optim.groups import Groups, get_params_groups
from optim.optimizers import build_optimizer
from optim.placing import exchanging_gradients, place
from optim.schedules import cosine_scheduler
from runtime import hardware
from runtime.distributed import get_world_size
from runtime.reproduce import seed_step
from training.plan import Plan


class Views(Protocol):
    """Turns the images of a data set into a model's input."""

    def dataset(self, source: ImageSource, seed: int, on_bad_image: str) -> Dataset:
        """A data set of (epoch, index) pairs, whose `__getitems__` returns a whole micro-batch with `.to(device)`."""

    def on_device(self, batch: Any) -> list[Tensor]:
        """The crops of a micro-batch, as model input: one (V·B, C, S, S) tensor per resolution."""

    def notes(self) -> list[str]:
        """What the user should know about these settings."""


class MicroBatch(NamedTuple):
    """The input of one forward.

    crops: per resolution (V·B, C, S, S); labels: int64 (V·B,) of a labelled data set, else None; index: the images'
    numbers, (B,) on the host; last: whether it is the step's last.
    """

    crops: list[Tensor]
    labels: Tensor | None
    index: Tensor | None
    last: bool


class Wishes(NamedTuple):
    """What this process asks of all processes at the end of a step: to stop, to save."""

    stop: bool = False
    save: bool = False


NO_WISHES = Wishes()


class Means:
    """The means of a step's numbers over its micro-batches and over all processes, exchanged in one all-reduce."""

    def __init__(self) -> None:
        self._sums: dict[str, Tensor] = {}
        self._added = 0

    def add(self, **terms: Tensor) -> None:
        """Add a micro-batch's terms: detached tensors of any shape, always under the same names."""
        for name, value in terms.items():
            value = value.detach()
            self._sums[name] = self._sums[name] + value if name in self._sums else value
        self._added += 1

    def over_ranks(self, wishes: Wishes, **counts: float) -> None:
        """Divide each sum by its count (default 1) and by the number of micro-batches, and average over processes."""
        sums = {name: value / counts[name] if name in counts else value for name, value in self._sums.items()}
        flat = [value.reshape(-1) for value in sums.values()]
        # Filled on the device: copying a tensor of Python numbers there would make the host wait.
        flat += [flat[0].new_full((1,), float(wish)) for wish in wishes]
        self._shared = torch.cat(flat) / self._added
        if get_world_size() > 1:
            torch.distributed.all_reduce(self._shared)
            self._shared /= get_world_size()
        parts = self._shared.split([part.numel() for part in flat])
        self._wishes = torch.cat(parts[-len(wishes) :]) > 0
        self._means = {name: part.view(sums[name].shape) for name, part in zip(sums, parts, strict=False)}

    def __getitem__(self, name: str) -> Tensor:
        """The mean of a term, in its shape; after `over_ranks`."""
        return self._means[name]

    def finite(self) -> Tensor:
        """Whether every mean is finite, a 0-d bool tensor."""
        return self._shared.isfinite().all()

    def report(self, norm: Tensor, refused: Tensor) -> Tensor:
        """The step's result (see `Method.results`): the 0-d terms in their order, the gradients' norm before clipping,
        and, each 0 or 1, whether the step was refused and whether any process wants to stop, or to save.
        """
        terms = [value for value in self._means.values() if value.ndim == 0]
        return torch.cat([torch.stack([*terms, norm, refused.float()]), self._wishes.float()])


class Run:
    """Everything that a step reads and changes. Moves the models to the device and builds the optimizer.

    Args:
        args: the program's arguments.
        choice: how the device computes, from `choose_hardware`.
        student: the trained model, with `backbone` and `head`, on the CPU.
        teacher: its average, or None.
        loss: a module; its buffers are saved with the run.
        schedules: arrays (steps,) under TensorBoard's names: "lr", "wd", and those that the method adds.
        views: turns images into the model's input.
        plan: how a step's images are divided.
        groups: returns the student's parameter groups. Weight decay follows the schedule in groups that don't set their
            own; a group's "lr_scale" multiplies the learning rate.
        average_buffers: whether the teacher averages the student's buffers too (see `ParameterAverage`).
    """

    def __init__(
        self,
        args: argparse.Namespace,
        choice: hardware.Choice,
        student: nn.Module,
        teacher: nn.Module | None,
        loss: nn.Module,
        schedules: dict[str, np.ndarray],
        views: Views,
        plan: Plan,
        groups: Callable[[nn.Module], Groups] = get_params_groups,
        average_buffers: bool = False,
    ) -> None:
        self.args, self.hardware, self.schedules, self.views, self.plan = args, choice, schedules, views, plan
        if args.grad_checkpointing:
            student.backbone.set_grad_checkpointing(True)
        models = [model for model in (student, teacher) if model is not None]
        if args.compile:  # in place, so that names in checkpoints do not change
            for model in models:
                model.backbone.compile()
        # The templates for whole copies of sharded models.
        self._skeletons = [sharding.skeleton(model) for model in models] if args.fsdp else []
        models = [place(model, choice, args.fsdp) for model in models]
        self.teacher = models[1] if teacher is not None else None
        sometimes_frozen = bool(getattr(args, "freeze_backbone_epochs", 0))
        self.student = exchanging_gradients(models[0], choice, args.fsdp, sometimes_frozen)
        self.loss = loss.to(choice.device)
        grouped = groups(self.student)
        self._decaying = [i for i, group in enumerate(grouped) if "weight_decay" not in group]
        self.optimizer = build_optimizer(args.optimizer, grouped)
        self.scaler = torch.amp.GradScaler(choice.device.type, enabled=choice.amp == "fp16")
        self.average: ParameterAverage | None = None
        if self.teacher is not None:
            self.average = ParameterAverage(self.student, self.teacher, average_buffers)
        self._statistics = RunningStatistics(self.student, *([self.teacher] if self.teacher is not None else []))
        self._before: list[Tensor] = []

    # ---- a step

    def begin(self, step: int) -> int:
        """Set a step's seeds, learning rate and weight decay, and copy BatchNorm's statistics; returns its epoch."""
        seed_step(self.args.seed, step, self.plan.rank)
        for group in self.optimizer.param_groups:
            group["lr"] = float(self.schedules["lr"][step]) * group.get("lr_scale", 1.0)
        for i in self._decaying:
            self.optimizer.param_groups[i]["weight_decay"] = float(self.schedules["wd"][step])
        self._before = self._statistics.copy()
        return step // self.plan.steps_per_epoch

    def micro_batches(self, batches: Sequence[Any]) -> Iterator[MicroBatch]:
        """The micro-batches of a step, as model input."""
        for i, batch in enumerate(batches):
            crops = self.views.on_device(batch)  # [(2B, C, S, S), (nB, C, s, s)]
            crops = [crop.contiguous(memory_format=self.hardware.memory_format) for crop in crops]
            labels, index = getattr(batch, "labels", None), getattr(batch, "index", None)
            yield MicroBatch(crops, labels, index, last=i + 1 == len(batches))

    def exchange_gradients(self, now: bool) -> contextlib.AbstractContextManager:
        """A context for forward and backward in which processes exchange gradients only if `now` is true."""
        skip = isinstance(self.student, DistributedDataParallel) and not now
        return self.student.no_sync() if skip else contextlib.nullcontext()

    def backward(self, loss: Tensor, accum: int) -> None:
        """Accumulate the gradients of one of `accum` micro-batches."""
        self.scaler.scale(loss / accum).backward()

    def unscale(self) -> None:
        """Divide fp16's loss scale out of the gradients; call this before anything reads or changes them."""
        self.scaler.unscale_(self.optimizer)

    def update(self, means: Means) -> tuple[Tensor, Tensor]:
        """Clip and step, unless a mean or a gradient of any process is not finite; then nothing changes.

        Returns two 0-d tensors: the norm of the gradients before clipping, and whether the step was refused, which the
        averages of models that follow take as `skip`.
        """
        gradients = [p.grad for p in self.student.parameters() if p.grad is not None]
        norms = clip_each_(gradients, self.args.clip_grad)
        refused = ~(means.finite() & norms.isfinite().all())
        self.optimizer.found_inf = refused.float()
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)
        self.scaler.update()
        self._statistics.restore(self._before, where=refused)
        return norms.norm(), refused

    # ---- around the steps

    @property
    def bare_student(self) -> nn.Module:
        """The student without DistributedDataParallel, with the same names as the teacher."""
        return self.student.module if isinstance(self.student, DistributedDataParallel) else self.student

    def whole_teacher(self) -> nn.Module:
        """The teacher for use outside a step; a copy if it is sharded, so all processes must call this."""
        if not self._skeletons:
            return self.teacher
        return sharding.whole_copy(self.teacher, self._skeletons[1], self.hardware.device)

    def whole_student(self) -> nn.Module:
        """The same for the student."""
        if not self._skeletons:
            return self.bare_student
        return sharding.whole_copy(self.bare_student, self._skeletons[0], self.hardware.device)

    @property
    def total_steps(self) -> int:
        """Steps of the whole run."""
        steps = self.args.epochs * self.plan.steps_per_epoch
        return min(steps, self.args.max_steps) if self.args.max_steps else steps


# ------------------------------------------------------------------------------------------------ building


def choose_hardware(args: argparse.Namespace, device: torch.device, convolutional: bool) -> hardware.Choice:
    """How the device computes for these arguments. Raises InputError if it can't."""
    if args.fsdp:
        sharding.check_can_shard(device, args.optimizer, args.compile)
    channels_last = convolutional and not args.fsdp  # slices are cut from contiguous parameters
    return hardware.choose(device, args.amp, args.matmul_precision, channels_last)


def common_schedules(args: argparse.Namespace, plan: Plan) -> dict[str, np.ndarray]:
    """Learning rate (scaled to the global batch) and weight decay of every step of the run."""
    scale = plan.global_batch / 256
    epochs, steps = args.epochs, plan.steps_per_epoch
    return {
        "lr": cosine_scheduler(args.lr * scale, args.min_lr, epochs, steps, args.warmup_epochs),
        "wd": cosine_scheduler(args.weight_decay, args.weight_decay_end, epochs, steps),
    }
