"""AttMask's benchmark in quick form: both sides compute the same; times are never judged here."""

import torch

from benchmarks import attmask_step
from benchmarks.plain_attmask import PlainAttMaskStep
from tests.pretraining import VIT

CPU = torch.device("cpu")
FLAGS = [*VIT, "--mode", "official", "--batch_size_per_gpu", "4", "--data_path", "demo", "--amp", "none"]


def test_plain_and_own_step_give_the_same_losses():
    """Three steps of both sides agree within 1e-5, and head and loss need less memory than plain."""
    result = attmask_step.compare(FLAGS, CPU, rounds=1)
    assert result.error < 1e-5
    assert result.memory["ours"] < result.memory["plain"]
    assert result.seconds.keys() == {"plain", "ours", attmask_step.APART}


def test_plain_and_own_step_give_the_same_weights():
    """After three steps student, teacher and both centers agree, too."""
    run, batch, crops = attmask_step.build([*FLAGS, "--optimizer", "sgd"], CPU)
    plain, own = PlainAttMaskStep(run), attmask_step.OwnStep(run, batch, crops)
    before = run.teacher.head.mlp[0].weight.clone()
    for step in range(3):
        plain(crops, batch.masked.flatten().tolist(), step)
        own(step)
    for kind in ("student", "teacher"):
        for a, b in zip(getattr(plain, kind).parameters(), getattr(run, kind).parameters(), strict=True):
            torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-6)
    for name in ("center", "center2"):
        torch.testing.assert_close(getattr(plain.loss, name), getattr(run.loss, name), rtol=1e-4, atol=1e-6)
    assert not torch.equal(before, run.teacher.head.mlp[0].weight)


def test_a_difference_is_found():
    """A step with another patch temperature does not pass for the same."""
    run, batch, crops = attmask_step.build(FLAGS, CPU)
    plain, own = PlainAttMaskStep(run), attmask_step.OwnStep(run, batch, crops)
    plain.loss.teacher_temp2_schedule = plain.loss.teacher_temp2_schedule * 2
    assert abs(plain(crops, batch.masked.flatten().tolist(), 0) / own(0)[0].item() - 1) > 1e-5
