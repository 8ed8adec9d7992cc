"""DINOLoss against the published numbers, and its parts."""

from __future__ import annotations

import math

import pytest
import torch

from distill.losses import DINOLoss, mean_entropy, teacher_temp_schedule
from tests.reference import assert_close, golden, tensor


def golden_loss() -> DINOLoss:
    g = golden("loss")
    return DINOLoss(
        g["out_dim"], g["ncrops"], g["warmup_teacher_temp"], g["teacher_temp"], g["warmup_epochs"], g["epochs"]
    )


def test_three_steps_of_the_published_loss():
    """Loss, entropy, KL, center and gradient of three steps equal the published code's."""
    loss_fn = golden_loss()
    for step, row in enumerate(golden("loss")["rows"]):
        student = (tensor(100 + step, (20, 256)) * 2).requires_grad_()
        teacher = tensor(200 + step, (8, 256)) * 0.3
        loss, entropy, kl = loss_fn(student, teacher, step)
        loss.backward()
        for name, value in (("loss", loss), ("entropy", entropy), ("kl", kl), ("center", loss_fn.center)):
            assert_close(value.detach(), row[name], 2e-5, f"{name} of step {step}")
        assert_close(student.grad.norm(), row["grad_norm"], 1e-4, "gradient norm")
        assert_close(student.grad[:, :4], row["grad_head"], 1e-4, "gradient")


def test_terms_leave_the_center_alone():
    """`terms` can be computed, and refused, before anything changes."""
    loss_fn = golden_loss()
    loss_fn.terms(tensor(1, (20, 256)), tensor(2, (8, 256)), 0)
    assert torch.equal(loss_fn.center, torch.zeros(1, 256))


def test_equals_the_sum_over_pairs():
    """The shortened form equals SPEC's mean over the pairs (i, v != i), written out."""
    loss_fn = golden_loss()
    student, teacher = tensor(3, (20, 256)), tensor(4, (8, 256))
    q = ((teacher - loss_fn.center) / loss_fn.teacher_temp(2)).softmax(-1).chunk(2)
    p = (student / 0.1).log_softmax(-1).chunk(5)
    pairs = [-(q[i] * p[v]).sum(-1).mean() for i in range(2) for v in range(5) if v != i]
    assert_close(loss_fn.terms(student, teacher, 2)[0], torch.stack(pairs).mean(), 1e-6)


@pytest.mark.parametrize("views", [2, 4])
def test_one_global_crop_is_compared_with_the_local_ones(views):
    """The mean over the pairs (0, v > 0), in both forms; the student's own global crop gets no gradient."""
    loss_fn = DINOLoss(16, views, 0.05, 0.05, 0, 1, nglobal=1)
    loss_fn.apply_center(tensor(1, (1, 16)) * 0.1)
    student, teacher = tensor(2, (views * 3, 16)).requires_grad_(), tensor(3, (3, 16))
    q = ((teacher - loss_fn.center) / 0.05).softmax(-1)
    pairs = [-(q * p.log_softmax(-1)).sum(-1).mean() for p in (student / 0.1).chunk(views)[1:]]
    wanted = torch.stack(pairs).mean()
    (gradient,) = torch.autograd.grad(wanted, student)
    assert not gradient[:3].any()
    loss, _, kl, total = loss_fn.step_terms(student, teacher, 0)
    torch.testing.assert_close(loss, wanted)
    torch.testing.assert_close(torch.autograd.grad(loss, student)[0], gradient)
    torch.testing.assert_close(kl, wanted.detach() - mean_entropy(q))
    torch.testing.assert_close(total, teacher.sum(0, keepdim=True))
    assert torch.equal(loss_fn.terms(student, teacher, 0)[0], loss)


@pytest.mark.parametrize(("views", "nglobal", "message"), [(1, 1, "ncrops is 1"), (5, 3, "nglobal is 3")])
def test_crops_that_leave_nothing_to_compare(views, nglobal, message):
    """Two views at least, and one or two for the teacher."""
    with pytest.raises(ValueError, match=message):
        DINOLoss(8, views, 0.04, 0.04, 0, 1, nglobal=nglobal)


def test_underflowed_probabilities_give_no_nan():
    """A teacher probability of exactly 0 counts as 0 in entropy and KL."""
    loss_fn = DINOLoss(8, 2, 0.001, 0.001, 0, 1)
    teacher = torch.zeros(4, 8)
    teacher[:, 0] = 100.0
    loss, entropy, kl = loss_fn(torch.randn(4, 8), teacher, 0)
    assert math.isfinite(loss.item())
    assert math.isfinite(kl.item())
    assert entropy.item() == 0


def test_entropy_of_uniform_is_log_k():
    """The logged entropy is in nats."""
    assert mean_entropy(torch.full((3, 7), 1 / 7)).item() == pytest.approx(math.log(7))


def test_temperature_schedule_is_clamped():
    """A warm-up longer than the training is cut off with it; later epochs keep the last value."""
    assert teacher_temp_schedule(0.04, 0.07, 30, 2).tolist() == pytest.approx([0.04, 0.04 + 0.03 / 29])
    loss_fn = DINOLoss(4, 2, 0.04, 0.07, 0, 3)
    assert loss_fn.teacher_temp(99) == 0.07


def test_wrong_number_of_crops_is_an_error():
    """Outputs that do not belong together are refused, not silently chunked."""
    with pytest.raises(ValueError, match="5 and 2 crops"):
        golden_loss().terms(torch.randn(21, 256), torch.randn(8, 256), 0)


def test_the_center_is_the_mean_over_two_alike_processes(monkeypatch):
    """It moves as it does in one process: sums are divided by the rows of all."""
    one, two = golden_loss(), golden_loss()
    teacher = tensor(5, (8, 256))
    one.update_center(teacher)
    monkeypatch.setattr("distill.losses.get_world_size", lambda: 2)
    monkeypatch.setattr(torch.distributed, "all_reduce", lambda total: total.mul_(2))
    two.update_center(teacher)
    torch.testing.assert_close(one.center, two.center)


def test_a_skipped_center_stays_bit_for_bit():
    """`apply_center` with skip leaves the center as it is, whatever the new one holds."""
    loss_fn = golden_loss()
    loss_fn.apply_center(tensor(5, (1, 256)))
    before = loss_fn.center.clone()
    loss_fn.apply_center(torch.full((1, 256), float("nan")), skip=torch.tensor(True))
    assert torch.equal(loss_fn.center, before)
