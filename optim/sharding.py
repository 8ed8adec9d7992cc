"""Student and teacher sharded over the processes (FSDP2), for models that outgrow one device.

Each process holds a slice, along the first dimension, of every parameter, its gradient and its optimizer state; a
block's whole parameters exist only while the block computes. Built on torch's `fully_shard` (Zhao et al., "PyTorch
FSDP", VLDB 2023). The mathematics of DDP is unchanged: gradients are averaged over the processes, and the teacher's
average and AdamW give the same results on slices as on the whole; norms (clipping, LARS) are summed over slices.

What is decided here, and why:

- A unit is a block: an element of the backbone's ModuleLists or Sequentials that has submodules. The rest of the
  backbone is another unit, and so is the head, so that the backbone can be called without the head. The head is sharded
  as well: with K = 65536 it has 22 M parameters, compared with a ViT-B's 86 M. Its prototypes are read in its own
  forward, where they are whole; a loss that reads `last_layer.weight` outside (fused_loss.fused_dino_loss) must not be
  combined with sharding, and the training step does not do so.
- Gradients are reduced after every forward of a step, not once at its end: twice for crops of two sizes, and in each
  micro-batch of an accumulated step. The sum is the same except for rounding; deferring it would need memory for the
  whole gradient on every process.
- Whole parameters are released after every forward, including those of the root units. FSDP keeps the latter for the
  backward pass, which a teacher never has: its next forward would use the parameters from before the average.
- Checkpoints hold whole tensors (`gathered`), so they are the same as without sharding; on loading, each process takes
  its slices (`load_model`, `load_optimizer`).
- Everything outside the training step (k-NN, monitors, pictures) uses a whole copy of the teacher (`whole_copy`): the
  processes go through different numbers of batches there, and a sharded forward needs all of them every time.

Parameters stay float32 and autocast works as it does without sharding; it keeps each block's cast weights for the
backward pass, 2 bytes per parameter, unless gradient checkpointing is on.
"""

from __future__ import annotations

import copy
import functools
import itertools
from collections.abc import Iterator, Mapping
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from runtime.distributed import get_rank, get_world_size, is_main_process
from runtime.guards import InputError


def check_can_shard(device: torch.device, optimizer: str, compiled: bool) -> None:
    """Raise InputError if sharding is impossible or untested, before anything is built."""
    if get_world_size() == 1:
        raise InputError(
            "--fsdp true needs several processes to share the model; start with torchrun --nproc_per_node N, or leave "
            "--fsdp out (a sharded run's checkpoints continue without it)"
        )
    if compiled:
        raise InputError("--fsdp true with --compile true is not supported; leave one of them out")
    if optimizer in ("sgd", "nesterov"):
        raise InputError("--fsdp true: torch's fused SGD does not work on slices; use --optimizer adamw or lars")
    if device.type not in ("cuda", "cpu"):
        raise InputError(f"--fsdp true works on CUDA and CPU, not on {device.type}; leave it out")
    try:
        from torch.distributed.fsdp import fully_shard  # noqa: F401
    except ImportError as error:
        raise InputError(f"--fsdp true needs torch 2.6 or later; this is {torch.__version__}") from error
    if device.type == "cpu" and not hasattr(torch.cpu.Stream, "record_event"):
        raise InputError(
            f"--fsdp true: this torch, {torch.__version__}, shards on CUDA only; leave it out or install a newer one"
        )


# ------------------------------------------------------------------------------------------------ sharding


def shard(model: nn.Module, device: torch.device) -> None:
    """Shard a MultiCropWrapper in place and move it to `device` unit by unit, so that it is never there as a whole.

    Raises InputError if a parameter is 0-d and so has no dimension to cut along.
    """
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import fully_shard, register_fsdp_forward_method

    scalars = [name for name, parameter in model.named_parameters() if parameter.ndim == 0]
    if scalars:
        raise InputError(f"--fsdp true: {', '.join(scalars[:3])} of this model has no dimension to cut; leave it out")
    for parameter in model.parameters():
        parameter.data = parameter.data.contiguous()
    mesh = init_device_mesh(device.type, (get_world_size(),))
    for unit in [*units(model.backbone), model.backbone, model.head]:
        fully_shard(unit, mesh=mesh, reshard_after_forward=True)
    trained = any(parameter.requires_grad for parameter in model.parameters())
    if not trained:
        for root in (model.backbone, model.head):
            root.register_forward_hook(lambda module, inputs, output: module.reshard())
    if hasattr(model.backbone, "forward_dense"):  # the other way into a backbone
        register_fsdp_forward_method(model.backbone, "forward_dense")
        if not trained:
            _release_after(model.backbone, "forward_dense")


def _release_after(module: nn.Module, method: str) -> None:
    """Release a sharded module's whole parameters after each call of a method that FSDP takes for a forward."""
    call = getattr(module, method)

    @functools.wraps(call)
    def releasing(*args: Any, **kwargs: Any) -> Any:
        try:
            return call(*args, **kwargs)
        finally:
            module.reshard()

    setattr(module, method, releasing)


def units(backbone: nn.Module) -> Iterator[nn.Module]:
    """The backbone's blocks: elements of ModuleLists and Sequentials that have submodules, outermost first."""
    for module in backbone.children():
        if isinstance(module, nn.ModuleList | nn.Sequential):
            for element in module:
                if isinstance(element, nn.ModuleList | nn.Sequential):
                    yield from units(nn.ModuleList([element]))
                elif any(True for _ in element.children()) and any(True for _ in element.parameters()):
                    yield element
        else:
            yield from units(module)


def description(model: nn.Module) -> str:
    """A line for the log: how much of the model this process holds."""
    here = sum(local(parameter).numel() for parameter in model.parameters())
    whole = sum(parameter.numel() for parameter in model.parameters())
    return f"sharding: {get_world_size()} processes, {here / 1e6:.1f} M of {whole / 1e6:.1f} M parameters on this one"


# ------------------------------------------------------------------------------------------------ slices


def is_sharded(value: Any) -> bool:
    """Whether this is a tensor of which every process has a slice (a DTensor, which is slow to import)."""
    return hasattr(value, "to_local")


def local(tensor: Tensor) -> Tensor:
    """This process's slice, sharing its memory and possibly empty; a tensor that is not sharded is returned as is."""
    if not is_sharded(tensor):
        return tensor
    with torch.no_grad():
        return tensor.to_local()


def sharing_group(tensors: list[Tensor]) -> dist.ProcessGroup | None:
    """The processes that share the tensors; None if they are not sharded."""
    return tensors[0].device_mesh.get_group() if tensors and is_sharded(tensors[0]) else None


def slice_like(whole: Tensor, sharded: Tensor) -> Tensor:
    """This process's slice of `whole`, as a DTensor laid out like `sharded`, without communication."""
    from torch.distributed.tensor import DTensor

    if whole.shape != sharded.shape:
        raise ValueError(f"a tensor has shape {tuple(whole.shape)}, but {tuple(sharded.shape)} is needed")
    start = sum(len(part) for part in whole.chunk(get_world_size())[: get_rank()])
    mine = whole[start : start + len(local(sharded))].to(sharded.device, copy=True)
    return DTensor.from_local(
        mine, sharded.device_mesh, sharded.placements, run_check=False, shape=sharded.shape, stride=sharded.stride()
    )


# ------------------------------------------------------------------------------------------------ states


@torch.no_grad()
def gathered(value: Any, everywhere: bool = False) -> Any:
    """A state with its sharded tensors made whole; all processes must take part.

    Only rank 0 gets them, in host memory, and the others get None in their place. With `everywhere` every process gets
    them, on its own device.
    """
    if is_sharded(value):
        whole = value.full_tensor()
        if everywhere:
            return whole
        return whole.cpu() if is_main_process() else None
    if isinstance(value, Mapping):
        return {key: gathered(item, everywhere) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return type(value)(gathered(item, everywhere) for item in value)
    return value


def load_model(model: nn.Module, state: Mapping[str, Tensor]) -> None:
    """`load_state_dict` from whole tensors, for a model that is sharded or not."""
    present = model.state_dict()
    model.load_state_dict(
        {name: slice_like(value, present[name]) if is_sharded(present.get(name)) else value
         for name, value in state.items()}
    )  # fmt: skip


def load_optimizer(optimizer: torch.optim.Optimizer, state: dict[str, Any]) -> None:
    """`load_state_dict` from whole tensors, for an optimizer of parameters that are sharded or not."""
    parameters = list(itertools.chain.from_iterable(group["params"] for group in optimizer.param_groups))

    def sliced(index: int, value: Any) -> Any:
        parameter = parameters[index]
        like_parameter = isinstance(value, Tensor) and value.shape == parameter.shape
        return slice_like(value, parameter) if like_parameter and is_sharded(parameter) else value

    states = {
        index: {name: sliced(index, value) for name, value in of_parameter.items()}
        for index, of_parameter in state["state"].items()
    }
    optimizer.load_state_dict({**state, "state": states})


def skeleton(model: nn.Module) -> nn.Module:
    """A copy of a model that is not sharded yet, without memory for its parameters, for `whole_copy`."""
    without_memory = {id(p): nn.Parameter(p.detach().to("meta"), p.requires_grad) for p in model.parameters()}
    return copy.deepcopy(model, without_memory)


def whole_copy(model: nn.Module, skeleton: nn.Module, device: torch.device) -> nn.Module:
    """A whole copy of the sharded model's current state on every process; all must take part."""
    whole = copy.deepcopy(skeleton)
    whole.load_state_dict(gathered(model.state_dict(), everywhere=True), assign=True)
    return whole.to(device)
