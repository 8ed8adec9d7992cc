"""DINO's whole training step against a plain transcription, under schedules that change much from step to step.

Both sides compute in float64. Their sums differ in order, so their results differ by some thousand roundings of 1e-16;
AdamW keeps such differences small, since its eps of 1e-8 is far above them. What is left after all steps is below
1e-9. An accelerator's branch takes the average's weight in float32, off by 6e-8 at most, which a few steps may amplify
a hundredfold. A schedule that is off by one step moves weights by 1e-3 and more.
"""

from __future__ import annotations

import functools
import math

import pytest
import torch
from torch import Tensor

import main_dino
from benchmarks.plain_step import make_plain, plain_loss
from tests.pretraining import VIT
from training.run import Run

BATCH, ACCUM, STEPS_PER_EPOCH, EPOCHS = 3, 2, 2, 5
LR, MIN_LR, WARMUP, WD, WD_END = 40.0, 2.0, 2, 0.9, 0.05  # rates per 256 images, of which a step has 6
MOMENTUM, WARM_TEMP, TEMP, TEMP_EPOCHS, FROZEN, CLIP = 0.4, 0.03, 0.2, 4, 1, 0.05
OPTIMIZERS = ("adamw", "sgd", "lars")


@pytest.fixture(autouse=True)
def small_heads(monkeypatch):
    """The head's usual widths would take nearly all of the time."""
    small = functools.partial(main_dino.DINOHead, hidden_dim=32, bottleneck_dim=16)
    monkeypatch.setattr(main_dino, "DINOHead", small)


class GivenCrops:
    """Views that are crops already."""

    @staticmethod
    def on_device(batch: list[Tensor]) -> list[Tensor]:
        return batch


def make_run(optimizer: str, scaled: bool = False, global_crops: int = 2) -> Run:
    """A tiny run in float64, at a global batch of 6 with two micro-batches."""
    rate = LR / 100 if optimizer == "adamw" else LR
    flags = {
        "optimizer": optimizer, "lr": rate, "min_lr": rate * MIN_LR / LR, "warmup_epochs": WARMUP,
        "weight_decay": WD, "weight_decay_end": WD_END, "momentum_teacher": MOMENTUM, "warmup_teacher_temp": WARM_TEMP,
        "teacher_temp": TEMP, "warmup_teacher_temp_epochs": TEMP_EPOCHS, "freeze_last_layer": FROZEN, "epochs": EPOCHS,
        "clip_grad": CLIP, "batch_size_per_gpu": BATCH, "grad_accum": ACCUM, "norm_last_layer": "false", "amp": "none",
        "global_crops_number": global_crops,
    }  # fmt: skip
    line = [word for name, value in flags.items() for word in (f"--{name}", str(value))]
    args = main_dino.parse_arguments([*VIT, "--data_path", "demo", "--device", "cpu", *line])
    run = main_dino.build(args, BATCH * ACCUM * STEPS_PER_EPOCH, torch.device("cpu"))
    for module in (run.student, run.teacher, run.loss):
        module.double()
    for state in run.optimizer.state.values():  # SGD's momenta exist from the start
        state.update({name: value.double() for name, value in state.items()})
    run.views = GivenCrops()
    run.scaler = torch.amp.GradScaler("cpu", enabled=scaled)
    return run


def crops_of(step: int, global_crops: int = 2) -> list[list[Tensor]]:
    """Two micro-batches of one or two global and two local crops of each image."""
    generator = torch.Generator().manual_seed(step)

    def crops(number: int, side: int) -> Tensor:
        return torch.randn(number * BATCH, 3, side, side, generator=generator, dtype=torch.float64)

    return [[crops(global_crops, 32), crops(2, 16)] for _ in range(ACCUM)]


def cosine(start: float, end: float, done: float) -> float:
    """From start to end, when a part `done` of the way is done."""
    return end + (start - end) * (1 + math.cos(math.pi * done)) / 2


class Plain:
    """DINO's step as its paper and SPEC write it, from copies of a run's models, one parameter after the other."""

    def __init__(self, run: Run) -> None:
        self.student, self.teacher = make_plain(run.student), make_plain(run.teacher)
        self.optimizer, self.views, self.globals = run.args.optimizer, run.loss.ncrops, run.loss.nglobal
        self.center = torch.zeros(1, run.args.out_dim, dtype=torch.float64)
        self.scale = run.args.lr / LR
        self.moments: dict[str, list[Tensor]] = {}
        self.updates: dict[str, int] = {}

    def lr(self, step: int) -> float:
        warm, total, peak = WARMUP * STEPS_PER_EPOCH, EPOCHS * STEPS_PER_EPOCH, LR * BATCH * ACCUM / 256
        if step < warm:
            return self.scale * peak * step / (warm - 1)
        return self.scale * cosine(peak, MIN_LR, (step - warm) / (total - warm))

    def loss(self, student: Tensor, teacher: Tensor, temp: float) -> tuple[Tensor, Tensor]:
        """Cross entropy over the pairs of views, and the teacher's entropy."""
        if self.globals == 2:
            return plain_loss(student, teacher, self.center, temp, self.views)
        q = ((teacher - self.center) / temp).softmax(dim=-1)
        pairs = [-(q * p.log_softmax(dim=-1)).sum(-1).mean() for p in (student / 0.1).chunk(self.views)[1:]]
        return sum(pairs) / len(pairs), -(q * q.log()).sum(-1).mean()

    def step(self, batches: list[list[Tensor]], step: int) -> tuple[float, float, float]:
        """Loss, entropy, and norm of the gradients before clipping."""
        done, epoch = step / (EPOCHS * STEPS_PER_EPOCH), step // STEPS_PER_EPOCH
        temp = WARM_TEMP + (TEMP - WARM_TEMP) * min(1.0, epoch / (TEMP_EPOCHS - 1))
        losses, entropies, outputs = [], [], []
        for crops in batches:
            with torch.no_grad():
                outputs.append(self.teacher(crops[:1]))
            loss, entropy = self.loss(self.student(crops), outputs[-1], temp)
            losses.append(loss)
            entropies.append(entropy)
        mean = sum(losses) / len(losses)
        names, parameters = zip(*((n, p) for n, p in self.student.named_parameters() if p.requires_grad), strict=True)
        gradients = dict(zip(names, torch.autograd.grad(mean, parameters, allow_unused=True), strict=True))
        trained = [name for name in names if epoch >= FROZEN or "last_layer" not in name]
        norm = math.sqrt(sum(gradients[name].square().sum().item() for name in trained))
        with torch.no_grad():
            for name, parameter in zip(names, parameters, strict=True):
                if name in trained:
                    gradient = gradients[name] * min(1.0, CLIP / (gradients[name].norm().item() + 1e-6))
                    self.update(name, parameter, gradient, self.lr(step), cosine(WD, WD_END, done))
            momentum = cosine(MOMENTUM, 1.0, done)
            for source, target in zip(self.student.parameters(), self.teacher.parameters(), strict=True):
                target.copy_(momentum * target + (1 - momentum) * source)
            self.center = 0.9 * self.center + 0.1 * torch.cat(outputs).mean(dim=0, keepdim=True)
        return mean.item(), sum(entropies).item() / len(entropies), norm

    def update(self, name: str, p: Tensor, gradient: Tensor, lr: float, wd: float) -> None:
        """AdamW, SGD or LARS; no decay of biases and other vectors."""
        decay = 0.0 if name.endswith("bias") or p.ndim == 1 else wd
        first, second = self.moments.setdefault(name, [torch.zeros_like(p), torch.zeros_like(p)])
        t = self.updates[name] = self.updates.get(name, 0) + 1
        if self.optimizer == "adamw":
            p.mul_(1 - lr * decay)
            first.mul_(0.9).add_(0.1 * gradient)
            second.mul_(0.999).add_(0.001 * gradient.square())
            p.sub_(lr * (first / (1 - 0.9**t)) / ((second / (1 - 0.999**t)).sqrt() + 1e-8))
            return
        change = gradient + decay * p
        if self.optimizer == "lars" and p.ndim != 1 and p.norm() > 0 and change.norm() > 0:
            change = change * (0.001 * p.norm() / change.norm())
        first.mul_(0.9).add_(change)
        p.sub_(lr * first)


def assert_the_same_steps(run: Run, tolerance: float) -> None:
    """All steps of the run agree with the plain ones, and so do the models that they leave."""
    plain = Plain(run)
    moved = [value.clone() for value in run.student.parameters()]
    for step in range(EPOCHS * STEPS_PER_EPOCH):
        batches = crops_of(step, run.loss.nglobal)
        loss, entropy, norm = plain.step(batches, step)
        result = main_dino.train_step(run, batches, step).tolist()
        expected = [loss, entropy, loss - entropy, norm, 0, 0, 0]
        assert result == pytest.approx(expected, rel=tolerance, abs=tolerance), f"step {step}"
    for ours, theirs in ((run.student, plain.student), (run.teacher, plain.teacher)):
        for (name, a), b in zip(ours.named_parameters(), theirs.parameters(), strict=True):
            torch.testing.assert_close(
                a, b, rtol=tolerance, atol=tolerance, msg=lambda text, name=name: f"{name}: {text}"
            )
    torch.testing.assert_close(run.loss.center, plain.center, rtol=tolerance, atol=tolerance)
    for (name, after), before in zip(run.student.named_parameters(), moved, strict=True):
        assert not torch.equal(after, before) or not after.requires_grad, f"{name} never moved"


@pytest.mark.parametrize("optimizer", OPTIMIZERS)
def test_the_step_is_the_plain_one(optimizer):
    """Loss, entropy, norm, both models and the center, over a whole run with accumulation."""
    assert_the_same_steps(make_run(optimizer), 1e-9)


def test_the_step_of_one_global_crop():
    """The teacher sees one crop, which the student's local ones are compared with; its center is the mean of one.

    The loss is computed in float32: 6e-8, which the steps amplify up to a hundredfold.
    """
    assert_the_same_steps(make_run("sgd", global_crops=1), 1e-5)


@pytest.mark.parametrize("optimizer", OPTIMIZERS)
def test_the_step_of_an_accelerator_is_the_plain_one(optimizer, on_an_accelerator):
    """The branches that ask the device for nothing compute the same."""
    assert_the_same_steps(make_run(optimizer), 1e-5)


@pytest.mark.parametrize("device", ["cpu", "accelerator"])
@pytest.mark.parametrize("optimizer", OPTIMIZERS)
def test_a_refused_step_changes_nothing(request, optimizer, device):
    """After a step with a NaN the models, the center and the moments are bit for bit as before; the next one counts."""
    if device == "accelerator":
        request.getfixturevalue("on_an_accelerator")
    run = make_run(optimizer)

    def state() -> list[Tensor]:
        moments = [value for of_one in run.optimizer.state.values() for value in of_one.values()]
        models = (*run.student.state_dict().values(), *run.teacher.state_dict().values())
        return [value.clone() for value in (*models, run.loss.center, *moments)]

    for step in (2, 3):
        assert main_dino.train_step(run, crops_of(step), step)[4] == 0
    before, poisoned = state(), crops_of(4)
    poisoned[1][0][0] = math.nan
    assert main_dino.train_step(run, poisoned, 4)[4] == 1
    assert all(torch.equal(a, b) for a, b in zip(before, state(), strict=True))
    assert main_dino.train_step(run, crops_of(5), 5)[4] == 0
    assert not any(torch.equal(a, b) for a, b in zip(run.teacher.parameters(), run.student.parameters(), strict=True))


def test_a_loss_scale_leaves_no_trace():
    """fp16's scale is a power of two: with it and without, a step is the same to the last bit."""
    runs = [make_run("sgd", scaled) for scaled in (False, True)]
    for step in range(4):
        results = [main_dino.train_step(run, crops_of(step), step) for run in runs]
        assert torch.equal(*results)
    assert runs[1].scaler.get_scale() > 1
    for a, b in zip(runs[0].student.parameters(), runs[1].student.parameters(), strict=True):
        assert torch.equal(a, b)
