"""The supervised training step against its formulas written plainly, and what a refused step leaves alone."""

from __future__ import annotations

import copy

import numpy as np
import pytest
import torch
import torch.nn.functional as F

import main_supervised
from data.datasets import open_images
from runtime.distributed import leave
from tests.supervised import RESNET, VIT

DEMO = ["--data_path", "demo", "--epochs", "2", "--batch_size_per_gpu", "4"]
STEPS = 3


def build(*flags):
    """A run, and the micro-batches of its first steps."""
    argv = [str(flag) for flag in (*flags, *DEMO)]
    args = main_supervised.parse_arguments(argv)
    source = open_images("demo", "train", subset=8)
    main_supervised.METHOD.fit(args, source)
    run = main_supervised.build(args, len(source), torch.device("cpu"))
    dataset = run.views.dataset(source, args.seed)
    sampler = iter(run.plan.sampler(len(source), args.seed))
    return run, [[dataset.__getitems__(next(sampler)) for _ in range(run.plan.accum)] for _ in range(STEPS)]


@pytest.fixture(autouse=True)
def one_process():
    yield
    leave()


def soft(labels: torch.Tensor, classes: int, smoothing: float) -> torch.Tensor:
    """(B,) -> smoothed one-hot targets (B, K)."""
    return F.one_hot(labels, classes) * (1 - smoothing) + smoothing / classes


def plain_loss(run, model, batch, generator: np.random.RandomState, mixup: bool) -> torch.Tensor:
    """Cross-entropy of smoothed labels, with mixup of the batch and its reverse if that is on."""
    (images,), args = run.views.on_device(batch), run.args
    targets = soft(batch.labels, args.num_classes, args.smoothing)
    if mixup:
        assert generator.rand() < args.mixup_prob  # timm draws whether to mix, then how much
        weight = generator.beta(args.mixup, args.mixup)
        images = weight * images + (1 - weight) * images.flip(0)
        targets = weight * targets + (1 - weight) * targets.flip(0)
    return -(targets * model(images).log_softmax(dim=1)).sum(dim=1).mean()


@pytest.mark.parametrize("mixup", [0.0, 0.8])
def test_the_step_is_the_plain_one(mixup):
    """Three steps of two micro-batches: loss, AdamW with layer-wise rates, average; student and average agree."""
    flags = ["--mixup", mixup, "--drop_rate", 0, "--drop_path_rate", 0, "--grad_accum", 2, "--layer_decay", 0.5]
    run, steps = build(*VIT, *flags, "--warmup_epochs", 0)
    model, average = copy.deepcopy(run.student), copy.deepcopy(run.teacher)
    names = {id(p): name for name, p in run.student.named_parameters()}
    groups = [
        {"params": [model.get_parameter(names[id(p)]) for p in group["params"]], "scale": group["lr_scale"],
         "weight_decay": 0.0 if i not in run._decaying else 0.05}
        for i, group in enumerate(run.optimizer.param_groups)
    ]  # fmt: skip
    plain = torch.optim.AdamW(groups, lr=0.0)
    for step, batches in enumerate(steps):
        result = main_supervised.train_step(run, batches, step)
        run.begin(step)
        generator = np.random.RandomState()
        generator.set_state(np.random.get_state())
        losses = [plain_loss(run, model, batch, generator, mixup > 0) for batch in batches]
        loss = sum(losses) / len(losses)
        plain.zero_grad()
        loss.backward()
        for group in plain.param_groups:
            group["lr"] = run.schedules["lr"][step] * group["scale"]
        plain.step()
        with torch.no_grad():
            for target, source in zip(average.parameters(), model.parameters(), strict=True):
                target.mul_(0.8).add_(0.2 * source)
        torch.testing.assert_close(result[0], loss.detach(), rtol=1e-5, atol=0)
        assert result[2] == 0
    for own, other in ((run.student, model), (run.teacher, average)):
        for name, value in own.named_parameters():
            # AdamW divides gradients by their size: the rounding of small ones shows in a step of the rate
            torch.testing.assert_close(value, other.get_parameter(name), rtol=1e-3, atol=2e-5, msg=name)


def test_splits_are_compared_by_jsd():
    """The loss is timm's: cross-entropy of the clean split, and 12 times the divergence of all from their mean."""
    run, steps = build(*RESNET, "--recipe", "resnet", "--drop_rate", 0)
    (batch,) = steps[0]
    model = copy.deepcopy(run.student).train()
    with torch.no_grad():
        logits = model(run.views.on_device(batch)[0])
    parts = logits.chunk(3)
    targets = soft(batch.labels[:4], run.args.num_classes, 0.1)
    clean = -(targets * parts[0].log_softmax(dim=1)).sum(dim=1).mean()
    probabilities = [part.softmax(dim=1) for part in parts]
    mean = (sum(probabilities) / 3).clamp(1e-7, 1).log()
    divergence = sum(F.kl_div(mean, p, reduction="batchmean") for p in probabilities) / 3
    result = main_supervised.train_step(run, [batch], 0)
    torch.testing.assert_close(result[0], clean + 12 * divergence, rtol=1e-4, atol=0)


@pytest.mark.parametrize("where", ["image", "gradient"])
def test_a_refused_step_changes_nothing(where):
    """A NaN in an image or a gradient: model, BatchNorm's statistics, average and momenta stay bit for bit."""
    run, steps = build(*RESNET, "--recipe", "resnet", "--model_ema_decay", 0.5, "--drop_rate", 0)
    main_supervised.train_step(run, steps[0], 0)

    def state() -> list[torch.Tensor]:
        momenta = [value for of_one in run.optimizer.state.values() for value in of_one.values()]
        return [
            value.clone()
            for value in (*run.student.state_dict().values(), *run.teacher.state_dict().values(), *momenta)
        ]

    before = state()
    if where == "image":
        run.views.on_device = lambda batch: [torch.full((12, 3, 32, 32), float("nan"))]
    else:
        run.student.head.weight.register_hook(lambda gradient: gradient * float("nan"))
    result = main_supervised.train_step(run, steps[1], 1)
    assert result[2] == 1
    assert all(torch.equal(one, other) for one, other in zip(before, state(), strict=True))


def test_draws_follow_from_step_and_rank():
    """The same step mixes and drops alike, another step or rank does not."""
    run, steps = build(*VIT, "--mixup", 0.8, "--cutmix", 1.0, "--drop_rate", 0.2)

    def loss(step: int, rank: int = 0) -> float:
        run.plan = type(run.plan)(4, 1, run.plan.steps_per_epoch, rank)
        run.begin(step)
        images, targets = run.loss.mix(run.views.on_device(steps[0][0])[0], steps[0][0].labels)
        return run.loss(run.student(images), targets).item()

    assert loss(0) == loss(0)
    assert len({loss(0), loss(1), loss(0, rank=1)}) == 3
