"""The weighted cross entropy that overwrites its logits: its value and gradient, in every precision."""

import pytest
import torch

from distill import masked_rows
from distill.masked_rows import weighted_cross_entropy


def plain(student, teacher, center, weights):
    q = ((teacher.double() - center.double()) / 0.05).softmax(-1)
    return -((q * (student.double() / 0.1).log_softmax(-1)).sum(-1) * weights.double()).sum()


def inputs(rows: int, dtype: torch.dtype = torch.float32):
    generator = torch.Generator().manual_seed(3)
    student, teacher = (torch.randn(rows, 40, generator=generator).to(dtype) for _ in range(2))
    weights = torch.rand(rows, generator=generator) / 100
    weights[::3] = 0
    return student, teacher * 0.1, torch.randn(1, 1, 40, generator=generator) * 0.01, weights


@pytest.mark.parametrize("rows", [0, 1, 50])
@pytest.mark.parametrize("at_a_time", [1, 1 << 16])
def test_value_and_gradient_are_the_formulas(monkeypatch, rows, at_a_time):
    """In float32, whatever the number of rows computed at a time; also when the loss is scaled before backward."""
    monkeypatch.setitem(masked_rows.ROWS_ELEMENTS, "cpu", at_a_time)
    student, teacher, center, weights = inputs(rows)
    reference = student.clone().requires_grad_()
    expected = plain(reference, teacher, center, weights)
    expected.backward()
    for factor in (1.0, 3.0):
        leaf = student.clone().requires_grad_()
        loss = weighted_cross_entropy(leaf * 1, teacher, center, weights, 0.05, 0.1)
        (loss * factor).backward()
        torch.testing.assert_close(loss.double(), expected.detach(), rtol=1e-5, atol=1e-9)
        torch.testing.assert_close(leaf.grad, factor * reference.grad, rtol=1e-4, atol=1e-7)
        assert (leaf.grad[::3] == 0).all()


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float16, 2e-3), (torch.bfloat16, 1e-2)])
def test_half_precision_keeps_small_gradients(dtype, tolerance):
    """Gradients of 1e-9 times a loss scale of 65536 arrive to the precision of the dtype, 2^-11 and 2^-8 of a value."""
    student, teacher, center, weights = inputs(60, dtype)
    weights = weights * 1e-6
    reference = student.float().requires_grad_()
    (plain(reference, teacher, center, weights) * 65536).backward()
    leaf = student.clone().requires_grad_()
    (weighted_cross_entropy(leaf * 1, teacher, center, weights, 0.05, 0.1) * 65536).backward()
    assert (leaf.grad.float() - reference.grad).norm() <= tolerance * reference.grad.norm()


def test_logits_are_overwritten_only_for_a_gradient():
    """Without gradients the input stays; with them a second backward is refused."""
    student, teacher, center, weights = inputs(5)
    before = student.clone()
    with torch.no_grad():
        weighted_cross_entropy(student, teacher, center, weights, 0.05, 0.1)
    assert torch.equal(student, before)
    logits = student.clone().requires_grad_() * 1
    loss = weighted_cross_entropy(logits, teacher, center, weights, 0.05, 0.1)
    loss.backward(retain_graph=True)
    with pytest.raises(RuntimeError, match="hands its gradient over"):
        loss.backward()


def test_tensors_that_do_not_belong_together_are_refused():
    """The error gives the shapes."""
    student, teacher, center, weights = inputs(5)
    with pytest.raises(ValueError, match=r"\(4, 40\)"):
        weighted_cross_entropy(student, teacher[:4], center, weights, 0.05, 0.1)
