"""The training step on a CUDA device that is not there: tensors without content that know their device.

Asking such a tensor for its value is an error, as is an operation between host and device. torch's engine runs a
backward pass only where there is a device; it is followed on meta tensors, which have no values either.
"""

from __future__ import annotations

import contextlib

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import DataDependentOutputException, FakeTensorMode
from torch.overrides import TorchFunctionMode

import main_dino
import vision_transformer
from data.datasets import open_images
from data.train_set import CropBatch, TrainSet
from tests.pretraining import FAMILIES, VIT
from training.multicrop import crop_spec
from training.run import Run, Wishes

CUDA = torch.device("cuda", 0)


class NoBlockingCopy(TorchFunctionMode):
    """Refuses what copies from the host to a CUDA device and makes the host wait; tensors without content don't see it.

    Those are tensors made on the device from Python numbers, and copies without non_blocking.
    """

    def __torch_function__(self, func, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        made = func in (torch.tensor, torch.as_tensor, Tensor.new_tensor)
        on_device = kwargs.get("device") or (args[0].device if func is Tensor.new_tensor else None)
        if made and on_device is not None and torch.device(on_device).type == "cuda":
            raise AssertionError(f"{func.__name__} copies Python numbers to the device, and the host waits")
        if func in (Tensor.to, Tensor.cuda, Tensor.copy_) and not kwargs.get("non_blocking"):
            source, targets = (args[1], [args[0]]) if func is Tensor.copy_ else (args[0], [*args[1:], *kwargs.values()])
            devices = [getattr(target, "device", target) for target in targets]
            to_cuda = func is Tensor.cuda or any(isinstance(d, torch.device) and d.type == "cuda" for d in devices)
            if isinstance(source, Tensor) and source.device.type == "cpu" and to_cuda:
                raise AssertionError(f"{func.__name__} copies from the host to the device, and the host waits")
        return func(*args, **kwargs)


DEMO = ["--batch_size_per_gpu", "3", "--data_path", "demo", "--device", "cpu", "--freeze_last_layer", "0"]
RUNS = {
    "vit": [*VIT, "--amp", "bf16"],
    "vit, drop path": [*VIT, "--amp", "bf16", "--drop_path_rate", "0.5"],
    "official vit": [*FAMILIES["vit_official"], "--amp", "fp16"],
    "resnet": [*FAMILIES["resnet"], "--amp", "fp16", "--optimizer", "lars"],
    "convnext": [*FAMILIES["convnext"], "--amp", "none", "--local_crops_number", "2"],
}


class HostParameters:
    """Colour parameters (V, B, P), which stay in host memory and keep their values."""

    def __init__(self, values: np.ndarray) -> None:
        self._values = values

    def flatten(self, *_: int) -> HostParameters:
        return HostParameters(self._values.reshape(-1, self._values.shape[-1]))

    def detach(self) -> HostParameters:
        return self

    def cpu(self) -> HostParameters:
        return self

    def numpy(self) -> np.ndarray:
        return self._values


@pytest.fixture(scope="module")
def contentless_cuda() -> None:
    """Older torch wants a driver even for tensors without content, and lacks operations on them."""
    try:
        with FakeTensorMode():
            torch.empty(2, device=CUDA).uniform_()
    except RuntimeError as error:
        pytest.skip(f"torch {torch.__version__} has no CUDA tensors without a device ({error})")


@pytest.fixture
def step(monkeypatch, contentless_cuda):
    """step(flags) -> a run on the device, and two micro-batches of it whose crops are there."""
    monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda **_: True)
    monkeypatch.setattr("torch.cuda.amp.common.amp_definitely_not_available", lambda: False)
    for module in (nn.init, vision_transformer):  # it asks its tensor for its values
        monkeypatch.setattr(module, "trunc_normal_", lambda tensor, **_: tensor)
    monkeypatch.setattr(nn.Module, "to", lambda self, *_, **__: self)  # models are made on the device
    monkeypatch.setattr(Tensor, "pin_memory", lambda self: self)

    def build(flags: list[str]) -> tuple[Run, list[CropBatch]]:
        args = main_dino.parse_arguments([*flags, *DEMO])
        source = open_images("demo", "train")
        batch = TrainSet(source, crop_spec(args), 0).__getitems__([(0, i) for i in range(3)])
        colour = [HostParameters(parameters.numpy()) for parameters in batch.colour]
        stack.enter_context(FakeTensorMode(allow_non_fake_inputs=True))
        with CUDA:
            run = main_dino.build(args, len(source), CUDA)
        monkeypatch.setattr(Tensor, "backward", lambda *_: give_gradients(run.student))
        crops = [torch.empty(group.shape, dtype=group.dtype, device=CUDA) for group in batch.crops]
        return run, [batch._replace(crops=crops, colour=colour)] * 2

    with contextlib.ExitStack() as stack:
        yield build


def give_gradients(model: nn.Module) -> None:
    for parameter in model.parameters():
        if parameter.requires_grad:
            parameter.grad = torch.empty_like(parameter)


@pytest.mark.parametrize("flags", RUNS.values(), ids=RUNS)
def test_a_step_never_waits_for_the_device(step, flags):
    """Colours, forward passes, loss, clipping, optimizer, average, center and statistics ask for no value, and leave
    everything on the device.
    """
    run, batches = step(flags)
    with NoBlockingCopy():
        result = main_dino.train_step(run, batches, 0, Wishes(stop=True, save=False))
    assert result.device == CUDA
    assert result.shape == (len(main_dino.METHOD.results),)
    tensors = [*run.student.state_dict().values(), *run.teacher.state_dict().values(), run.loss.center]
    assert {tensor.device for tensor in tensors} == {CUDA}


def test_a_question_is_found(step, monkeypatch):
    """A step whose average asks whether to skip fails here."""
    run, batches = step(RUNS["vit"])
    monkeypatch.setattr(run.average, "update", lambda momentum, skip: skip.item())
    with pytest.raises(DataDependentOutputException):
        main_dino.train_step(run, batches, 0)


@pytest.mark.parametrize(
    "copy",
    [
        lambda on_device: on_device.new_tensor([1.0]),
        lambda on_device: torch.tensor([1.0], device=CUDA),
        lambda on_device: torch.zeros(1).to(CUDA),
        lambda on_device: torch.zeros(1).to(device=CUDA),
        lambda on_device: on_device.copy_(torch.zeros(1)),
    ],
)
def test_a_blocking_copy_is_found(contentless_cuda, copy):
    """Each way of bringing numbers from the host that makes it wait."""
    with FakeTensorMode():
        on_device = torch.empty(1, device=CUDA)
        with NoBlockingCopy(), pytest.raises(AssertionError, match="the host waits"):
            copy(on_device)


@pytest.mark.parametrize("name", ["vit", "official vit", "resnet", "convnext"])
@pytest.mark.parametrize("checkpointing", ["false", "true"])
def test_backward_asks_for_no_value(contentless_cuda, name, checkpointing):
    """From the loss to every parameter."""
    args = main_dino.parse_arguments([*RUNS[name], *DEMO, "--amp", "none", "--grad_checkpointing", checkpointing])
    run = main_dino.build(args, 12, torch.device("cpu"))
    student, teacher, loss = (module.to("meta") for module in (run.student, run.teacher, run.loss))
    crops = [torch.empty(v * 3, 3, s, s, device="meta") for v, s in crop_spec(args).resolutions]
    with torch.no_grad():
        targets = teacher(crops[:1])
    total, *_ = loss.step_terms(student(crops), targets, 0)
    total.backward()
    assert all(p.grad is not None and p.grad.is_meta for p in student.parameters() if p.requires_grad)
