"""Monitors: what they read on features and outputs whose state is known."""

from __future__ import annotations

import math

import pytest
import torch

from data.datasets import open_images
from evaluation import monitors
from tests.reference import tensor


def test_entropy_is_one_for_uniform_and_zero_for_one_hot_outputs():
    """Entropy in parts of log K is 1 for equal probabilities and 0 for certain ones."""
    assert monitors.teacher_entropy(torch.full((4, 50), 1 / 50)) == pytest.approx(1.0, abs=1e-5)
    assert monitors.teacher_entropy(torch.eye(50)[:4]) == 0
    q = torch.softmax(tensor(1, (4, 50)) / 0.5, 1)
    expected = -(q * q.log()).sum(1).mean().item() / math.log(50)
    assert monitors.teacher_entropy(q) == pytest.approx(expected, rel=1e-5)


def test_information_tells_collapse_from_a_sure_teacher():
    """0 if all images get the same output, uniform or one-hot; log B if each gets a different prototype."""
    each = torch.eye(50)[:4]
    assert monitors.teacher_information(torch.full((4, 50), 1 / 50)) == pytest.approx(0, abs=1e-6)
    assert monitors.teacher_information(each[:1].repeat(4, 1)) == pytest.approx(0, abs=1e-6)
    assert monitors.teacher_information(each) == pytest.approx(math.log(4), abs=1e-5)
    q = torch.softmax(tensor(1, (4, 50)) / 0.5, 1)
    divergence = (q * (q / q.mean(0)).log()).sum(1).mean()  # the same quantity, as a mean divergence from the mean
    assert monitors.teacher_information(q) == pytest.approx(divergence.item(), rel=1e-4)


def test_mean_cosine_is_over_pairs_of_different_images():
    """It equals the mean of the off-diagonal cosines, 1 for equal features."""
    features = tensor(2, (7, 5))
    cosines = torch.nn.functional.cosine_similarity(features[:, None], features[None], dim=2)
    expected = (cosines.sum() - 7) / 42
    assert monitors.mean_cosine(features) == pytest.approx(expected.item(), abs=1e-6)
    assert monitors.mean_cosine(features[:1].repeat(7, 1)) == pytest.approx(1.0, abs=1e-5)


def test_effective_rank_counts_directions():
    """r equal orthogonal directions give r; constant features give 1, whatever their offset."""
    directions = torch.cat([torch.eye(10)[:4], -torch.eye(10)[:4]])
    assert monitors.effective_rank(directions + 3) == pytest.approx(4.0, rel=1e-6)
    assert monitors.effective_rank(torch.full((8, 10), 0.3)) == 1.0


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"entropy": 1.0, "information": 0.0}, "every prototype"),
        ({"entropy": 0.0, "information": 0.0}, "one prototype"),
        ({"entropy": 0.5, "information": 0.001}, "same for every image"),
        ({"entropy": math.nan}, "not finite"),
        ({"mean_cosine": 0.999}, "mean cosine"),
        ({"effective_rank": 1.0}, "directions"),
    ],
)
def test_each_sign_of_collapse_is_named_with_a_remedy(change, words):
    """Healthy values give no warning; each sign gives one that names it and a flag to try."""
    healthy = {"entropy": 0.6, "information": 1.2, "center_norm": 3.0, "mean_cosine": 0.4, "effective_rank": 20.0}
    assert monitors.collapse_warning(healthy, 1024) is None
    message = monitors.collapse_warning(healthy | change, 1024)
    assert words in message
    assert "--" in message


def test_the_probe_batch_is_fixed_and_the_model_keeps_its_mode():
    """Two calls give the same images; monitoring changes neither a teacher's mode nor its buffers."""
    source = open_images("demo", "train")
    images = monitors.probe_batch(source, 32, 16)
    assert torch.equal(images, monitors.probe_batch(source, 32, 16))
    backbone = torch.nn.Sequential(torch.nn.Conv2d(3, 8, 8, 8), torch.nn.BatchNorm2d(8), torch.nn.Flatten())
    teacher = torch.nn.ModuleDict({"backbone": backbone, "head": torch.nn.Linear(128, 64)}).train()
    before = {name: value.clone() for name, value in teacher.state_dict().items()}
    asked = []

    def probabilities(outputs, epoch):
        asked.append((tuple(outputs.shape), epoch))
        return torch.softmax(outputs, dim=1)

    values = monitors.monitor(teacher, images, probabilities, 3, torch.zeros(1, 64))
    assert asked == [((16, 64), 3)]
    assert "center_norm" not in monitors.monitor(teacher, images, probabilities, 3)
    assert set(values) == {"entropy", "information", "center_norm", "mean_cosine", "effective_rank"}
    assert teacher.training
    assert all(torch.equal(value, before[name]) for name, value in teacher.state_dict().items())


def test_non_finite_features_have_no_rank():
    """A poisoned teacher is reported, it does not end the run with a failed decomposition."""
    features = torch.randn(8, 4)
    features[3, 2] = float("nan")
    assert math.isnan(monitors.effective_rank(features))


COLLAPSED = [  # the last epochs of small runs that collapsed, and of others that learned: docs/LOG.md
    {"entropy": 0.8413, "information": 0.0001, "center_norm": 8.2, "mean_cosine": 0.9623, "effective_rank": 4.0178},
    {"entropy": 0.9986, "information": 0.0093, "center_norm": 5.4, "mean_cosine": 0.9665, "effective_rank": 3.3144},
]
LEARNED = [
    {"entropy": 0.0025, "information": 1.0202, "center_norm": 0.0, "mean_cosine": 0.1309, "effective_rank": 18.9209},
    {"entropy": 0.9689, "information": 0.1803, "center_norm": 1.5, "mean_cosine": 0.4095, "effective_rank": 56.9845},
]


@pytest.mark.parametrize("values", COLLAPSED)
def test_runs_that_collapsed_are_warned_of(values):
    """What the monitors read late in a run whose k-NN ended 12 points below the others'."""
    assert monitors.collapse_warning(values, 1024)


@pytest.mark.parametrize("values", LEARNED)
def test_runs_that_learned_are_not_warned_of(values):
    """A sure teacher (entropy near 0) and a soft one (near log K) may both be healthy."""
    assert monitors.collapse_warning(values, 1024) is None
