"""Moving a model to its device: BatchNorm over all processes, sharding, DistributedDataParallel."""

from __future__ import annotations

from torch import nn
from torch.nn.parallel import DistributedDataParallel

from optim import sharding
from optim.batchnorm import has_batchnorms, has_split_batchnorms
from runtime import hardware
from runtime.distributed import get_world_size


def place(model: nn.Module, choice: hardware.Choice, fsdp: bool) -> nn.Module:
    """Move a model to its device, with BatchNorm over all processes if the device supports it, sharded if asked."""
    device = choice.device
    if get_world_size() > 1 and has_batchnorms(model):
        split = has_split_batchnorms(model)
        if device.type == "cuda" and not split:
            model = nn.SyncBatchNorm.convert_sync_batchnorm(model)
        else:
            why = "it is split" if split else f"SyncBatchNorm needs CUDA, not {device.type}"
            note = f"note: BatchNorm sees each process's own batch; {why}"
            choice.lines += [note] if note not in choice.lines else []
    if not fsdp:
        return model.to(device, memory_format=choice.memory_format)
    sharding.shard(model, device)
    return model


def exchanging_gradients(
    student: nn.Module, choice: hardware.Choice, fsdp: bool, sometimes_frozen: bool = False
) -> nn.Module:
    """The student in DistributedDataParallel if there are several processes and it is not sharded.

    sometimes_frozen: whether some parameters have no gradients in a part of the run; looking for them costs a little.
    """
    if fsdp:
        choice.lines.append(sharding.description(student))
        return student
    if get_world_size() == 1:
        return student
    ids = [choice.device.index] if choice.device.type == "cuda" else None
    return DistributedDataParallel(
        student, device_ids=ids, gradient_as_bucket_view=True, find_unused_parameters=sometimes_frozen
    )
