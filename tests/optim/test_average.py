"""The teacher's average, BatchNorm's guard, and the multi-crop wrapper."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from distill.multicrop import MultiCropWrapper
from optim.average import ParameterAverage
from optim.batchnorm import RunningStatistics
from tests.reference import fill_, tensor


def test_average_is_the_formula():
    """teacher <- m teacher + (1 - m) student, for every parameter, no buffer."""
    student, teacher = nn.Linear(3, 4), fill_(nn.Linear(3, 4))
    expected = [0.9 * t + 0.1 * s for t, s in zip(teacher.parameters(), student.parameters(), strict=True)]
    ParameterAverage(student, teacher).update(0.9)
    for t, e in zip(teacher.parameters(), expected, strict=True):
        torch.testing.assert_close(t, e)


@pytest.mark.parametrize("device", ["cpu", "accelerator"])
@pytest.mark.parametrize("skip", [True, False])
def test_average_with_a_flag(request, skip, device):
    """A skipped update leaves the teacher bit for bit; one that is not skipped is the formula."""
    if device == "accelerator":
        request.getfixturevalue("on_an_accelerator")
    student, teacher = nn.Linear(3, 4), fill_(nn.Linear(3, 4))
    before = teacher.weight.detach().clone()
    ParameterAverage(student, teacher).update(0.9, skip=torch.tensor(skip))
    if skip:
        assert torch.equal(teacher.weight, before)
    else:
        torch.testing.assert_close(teacher.weight, 0.9 * before + 0.1 * student.weight)


@pytest.mark.parametrize("device", ["cpu", "accelerator"])
@pytest.mark.parametrize("skip", [True, False])
def test_buffers_follow_if_asked(request, skip, device):
    """Statistics are averaged like parameters and counters copied; a skipped update changes neither."""
    if device == "accelerator":
        request.getfixturevalue("on_an_accelerator")
    student, teacher = nn.BatchNorm1d(3), nn.BatchNorm1d(3)
    student(tensor(1, (8, 3)))
    before = teacher.running_mean.clone()
    ParameterAverage(student, teacher, buffers=True).update(0.9, skip=torch.tensor(skip))
    expected = before if skip else 0.9 * before + 0.1 * student.running_mean
    torch.testing.assert_close(teacher.running_mean, expected)
    assert teacher.num_batches_tracked.item() == (0 if skip else 1)


def test_missing_counterpart_is_named():
    """A teacher that has a parameter the student lacks is refused by its name."""
    with pytest.raises(ValueError, match="bias"):
        ParameterAverage(nn.Linear(2, 2, bias=False), nn.Linear(2, 2))


def test_running_statistics_are_put_back():
    """After a refused step BatchNorm's buffers are what they were; otherwise they are the new ones."""
    for refused in (True, False):
        model = nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4))
        guard = RunningStatistics(model)
        before = guard.copy()
        model(torch.full((2, 3, 5, 5), float("nan")))
        guard.restore(before, where=torch.tensor(refused))
        assert torch.equal(model[1].running_mean, torch.zeros(4)) == refused
        assert model[1].num_batches_tracked.item() == (0 if refused else 1)


class Shapes(nn.Module):
    """A backbone that records what it is given and returns the mean over space."""

    def __init__(self) -> None:
        super().__init__()
        self.seen: list[tuple[int, ...]] = []

    def forward(self, x):
        self.seen.append(tuple(x.shape))
        return x.mean((2, 3))


def test_one_forward_per_resolution():
    """Crops of one height and width go together, in order; height counts as well as width."""
    backbone = Shapes()
    model = MultiCropWrapper(backbone, nn.Identity())
    crops = [tensor(i, (2, 3, h, w)) for i, (h, w) in enumerate([(8, 8), (8, 8), (4, 8), (4, 4)])]
    out = model(crops)
    assert backbone.seen == [(4, 3, 8, 8), (2, 3, 4, 8), (2, 3, 4, 4)]
    torch.testing.assert_close(out, torch.cat([crop.mean((2, 3)) for crop in crops]))


def test_classifiers_are_taken_off():
    """The wrapper replaces fc and head, as DINO's scripts rely on."""
    backbone = nn.Module()
    backbone.fc = backbone.head = nn.Linear(2, 2)
    MultiCropWrapper(backbone, nn.Identity())
    assert isinstance(backbone.fc, nn.Identity)
    assert isinstance(backbone.head, nn.Identity)
