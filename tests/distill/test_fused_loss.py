"""The losses that bring their gradients along: equal to the published numbers and to DINOLoss, and lean."""

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from distill import fused_loss
from distill.fused_loss import fused_dino_loss, in_place_dino_loss
from distill.heads import WeightNormLinear
from distill.losses import DINOLoss
from tests.reference import assert_close, golden, tensor

B, K, E = 3, 50, 12


def inputs(views: int, train_scale: bool = False, dtype=torch.float32):
    """Bottleneck (V·B, E), prototypes, teacher logits (2B, K) and a center that is not zero."""
    layer = WeightNormLinear(E, K, train_scale=train_scale).to(dtype)
    with torch.no_grad():
        layer.weight_g.copy_(1 + 0.3 * tensor(3, (K, 1)).abs())
    student = F.normalize(tensor(1, (views * B, E)), dim=-1).to(dtype).requires_grad_()
    return student, layer, tensor(2, (2 * B, K)).to(dtype), tensor(4, (1, K)).to(dtype) * 0.1


def expected(logits: Tensor, teacher: Tensor, center: Tensor, views: int) -> tuple[Tensor, Tensor]:
    """Loss and entropy as a sum over pairs, one cross entropy after the other."""
    q = ((teacher - center) / 0.05).softmax(-1).chunk(2)
    p = (logits / 0.1).log_softmax(-1).chunk(views)
    pairs = [(q[i], p[v]) for i in range(2) for v in range(views) if i != v]
    loss = torch.stack([-(q * p).sum(-1).mean() for q, p in pairs]).mean()
    entropy = torch.stack([torch.special.entr(q).sum(-1).mean() for q, _ in pairs]).mean()
    return loss, entropy


@pytest.mark.parametrize("form", ["fused", "in_place"])
def test_published_numbers(form):
    """Over the golden steps loss, entropy, KL, center and gradient are the published code's."""
    case = golden("loss")
    schedule = DINOLoss(case["out_dim"], case["ncrops"], case["warmup_teacher_temp"], case["teacher_temp"],
                        case["warmup_epochs"], case["epochs"])  # fmt: skip
    center = torch.zeros(1, case["out_dim"])
    for step, row in enumerate(case["rows"]):
        logits = (tensor(100 + step, (20, 256)) * 2).requires_grad_()
        teacher, temp = tensor(200 + step, (8, 256)) * 0.3, schedule.teacher_temp(step)
        if form == "fused":  # prototypes along the axes make the bottleneck the logits
            layer = WeightNormLinear(256, 256)
            layer.weight_v.data = torch.eye(256)
            terms = fused_dino_loss(logits, layer, teacher, center, temp, 0.1, 5, chunk=100)
            (grad,) = torch.autograd.grad(terms[0], logits)
        else:
            (grad,) = torch.autograd.grad(
                (terms := in_place_dino_loss(logits, teacher, center, temp, 0.1, 5))[0], logits
            )
        for name, value in zip(("loss", "entropy", "kl"), terms, strict=False):
            assert_close(value.detach(), row[name], what=name)
        center = 0.9 * center + 0.1 * terms[3] / len(teacher)
        assert_close(center, row["center"], what="center")
        assert_close(grad.norm(), row["grad_norm"], rel=1e-4, what="gradient norm")
        assert_close(grad[:, :4], row["grad_head"], rel=1e-4, what="gradient")


@pytest.mark.parametrize("views", [2, 3, 6])
@pytest.mark.parametrize("chunk", [7, 50, 1000])
@pytest.mark.parametrize("keep_logits", [False, True])
def test_fused_equals_the_sum_over_pairs(views, chunk, keep_logits):
    """Whatever the chunk, all terms and the gradients of features, v and g are those of the plain sum over pairs."""
    student, layer, teacher, center = inputs(views, train_scale=True)
    wanted_loss, wanted_entropy = expected(layer(student), teacher, center, views)
    parameters = [student, layer.weight_v, layer.weight_g]
    wanted = torch.autograd.grad(wanted_loss, parameters)
    loss, entropy, kl, total = fused_dino_loss(
        student, layer, teacher, center, 0.05, 0.1, views, chunk=chunk, keep_logits=keep_logits
    )
    for actual, value in ((loss, wanted_loss), (entropy, wanted_entropy), (kl, wanted_loss - wanted_entropy)):
        torch.testing.assert_close(actual, value.detach(), rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(total, teacher.sum(0, keepdim=True))
    for actual, value in zip(torch.autograd.grad(loss, parameters), wanted, strict=True):
        assert (actual - value).norm() <= 1e-5 * value.norm()


@pytest.mark.parametrize("images", [1, 2, 3])
@pytest.mark.parametrize("views", [2, 3, 6])
def test_in_place_equals_the_sum_over_pairs(monkeypatch, views, images):
    """From logits the terms and the gradient are those of the plain sum over pairs, however many images at a time."""
    monkeypatch.setitem(fused_loss.IMAGES_ELEMENTS, "cpu", images * views * K)
    student, layer, teacher, center = inputs(views)
    logits = layer(student).detach().requires_grad_()
    wanted_loss, wanted_entropy = expected(logits, teacher, center, views)
    (wanted,) = torch.autograd.grad(wanted_loss, logits)
    loss, entropy, kl, total = in_place_dino_loss(logits, teacher, center, 0.05, 0.1, views)
    (grad,) = torch.autograd.grad(loss, logits)
    torch.testing.assert_close(loss, wanted_loss.detach())
    torch.testing.assert_close(entropy, wanted_entropy)
    torch.testing.assert_close(kl, loss.detach() - entropy)
    torch.testing.assert_close(total, teacher.sum(0, keepdim=True))
    assert (grad - wanted).norm() <= 1e-5 * wanted.norm()
    assert grad.untyped_storage().data_ptr() == logits.untyped_storage().data_ptr()


def test_logits_survive_without_gradients():
    """Where no gradient is wanted the logits are left as they were."""
    student, layer, teacher, center = inputs(4)
    logits = layer(student).detach()
    before = logits.clone()
    in_place_dino_loss(logits, teacher, center, 0.05, 0.1, 4)
    with torch.no_grad():
        in_place_dino_loss(logits.requires_grad_(), teacher, center, 0.05, 0.1, 4)
    assert torch.equal(logits, before)


def test_gradients_in_float64():
    """In float64 the gradients of features, v and g are the plain sum's to the last digits."""
    student, layer, teacher, center = inputs(3, train_scale=True, dtype=torch.float64)
    parameters = [student, layer.weight_v, layer.weight_g]
    wanted = torch.autograd.grad(expected(layer(student), teacher, center, 3)[0], parameters)
    loss = fused_dino_loss(student, layer, teacher, center, 0.05, 0.1, 3, chunk=20)[0]
    for actual, value in zip(torch.autograd.grad(loss, parameters), wanted, strict=True):
        torch.testing.assert_close(actual, value, rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize("frozen", ["weight_g", "weight_v", "both", "student"])
def test_frozen_parts_get_no_gradient(frozen):
    """What does not require a gradient gets none, and the others' stay the same."""
    student, layer, teacher, center = inputs(4, train_scale=True)
    parts = {"student": student, "weight_v": layer.weight_v, "weight_g": layer.weight_g}
    fused_dino_loss(student, layer, teacher, center, 0.05, 0.1, 4)[0].backward()
    wanted = {name: part.grad for name, part in parts.items()}
    for name, part in parts.items():
        part.grad = None
        part.requires_grad_(name != frozen and not (frozen == "both" and name.startswith("weight")))
    fused_dino_loss(student, layer, teacher, center, 0.05, 0.1, 4)[0].backward()
    for name, part in parts.items():
        assert torch.equal(part.grad, wanted[name]) if part.requires_grad else part.grad is None


def test_teacher_from_its_bottleneck():
    """The teacher's bottleneck and prototypes give what its logits give."""
    student, layer, _, center = inputs(4)
    teacher_layer, bottleneck = WeightNormLinear(E, K), tensor(7, (2 * B, E))
    from_logits = fused_dino_loss(student, layer, teacher_layer(bottleneck), center, 0.05, 0.1, 4)
    from_bottleneck = fused_dino_loss(
        student, layer, bottleneck, center, 0.05, 0.1, 4, teacher_last_layer=teacher_layer, chunk=9
    )
    for actual, wanted in zip(from_bottleneck, from_logits, strict=True):
        torch.testing.assert_close(actual, wanted)
    assert all(p.grad is None for p in teacher_layer.parameters())


def test_large_logits_stay_finite():
    """Logits of thousands and probabilities that underflow give finite terms: 0 log 0 is 0."""
    student, layer, teacher, center = inputs(4)
    with torch.no_grad():
        layer.weight_g.fill_(1000.0)
    loss, entropy, _, _ = fused_dino_loss(student, layer, 1000 * teacher, center, 0.05, 0.1, 4, chunk=8)
    loss.backward()
    in_place = in_place_dino_loss(layer(student).detach(), 1000 * teacher, center, 0.05, 0.1, 4)
    assert entropy.isfinite()
    assert student.grad.isfinite().all()
    torch.testing.assert_close(loss.detach(), in_place[0])


def test_gradient_follows_the_scale_of_the_loss():
    """A loss scaled for mixed precision or accumulation scales its gradients; they are given away once."""
    student, layer, teacher, center = inputs(4)
    wanted = torch.autograd.grad(fused_dino_loss(student, layer, teacher, center, 0.05, 0.1, 4)[0], student)[0]
    loss = 8 * fused_dino_loss(student, layer, teacher, center, 0.05, 0.1, 4)[0]
    torch.testing.assert_close(torch.autograd.grad(loss, student, retain_graph=True)[0], 8 * wanted)
    with pytest.raises(RuntimeError, match="compute it again"):
        loss.backward()


def test_autocast_lowers_only_the_products():
    """Under bfloat16 autocast the terms stay float32 and near, gradients have their parameters' dtype."""
    student, layer, teacher, center = inputs(4)
    wanted = fused_dino_loss(student, layer, teacher, center, 0.05, 0.1, 4)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        actual = fused_dino_loss(student, layer, teacher, center, 0.05, 0.1, 4)
    assert actual[0].dtype == torch.float32
    torch.testing.assert_close(actual[0], wanted[0], rtol=0.02, atol=0.02)
    grads = [torch.autograd.grad(terms[0], [student, layer.weight_v]) for terms in (actual, wanted)]
    for low, high in zip(*grads, strict=True):
        assert low.dtype == torch.float32
        assert (low - high).norm() <= 0.03 * high.norm()


def test_bfloat16_logits():
    """Logits in bfloat16 get their gradient in bfloat16, computed in float32."""
    student, layer, teacher, center = inputs(4)
    logits = layer(student).detach().bfloat16().requires_grad_()
    exact = logits.detach().float().requires_grad_()
    wanted, _ = expected(exact, teacher, center, 4)
    loss, *_ = in_place_dino_loss(logits, teacher, center, 0.05, 0.1, 4)
    torch.testing.assert_close(loss, wanted, rtol=1e-5, atol=1e-5)
    (grad,) = torch.autograd.grad(loss, logits)
    assert grad.dtype == torch.bfloat16
    torch.testing.assert_close(grad.float(), torch.autograd.grad(wanted, exact)[0], rtol=0.01, atol=1e-4)


@pytest.mark.parametrize(("views", "teachers"), [(1, 2 * B), (5, 2 * B), (4, B)])
def test_rows_that_do_not_fit_are_named(views, teachers):
    """Rows that are not whole crops of one batch are a ValueError with the numbers."""
    student, layer, teacher, center = inputs(4)
    with pytest.raises(ValueError, match="crops"):
        fused_dino_loss(student, layer, teacher[:teachers], center, 0.05, 0.1, views)
    with pytest.raises(ValueError, match="crops"):
        in_place_dino_loss(layer(student), teacher[:teachers], center, 0.05, 0.1, views)


def test_teacher_of_another_width_is_named():
    """A teacher that is neither logits nor a bottleneck with prototypes is a ValueError with both widths."""
    student, layer, _, center = inputs(4)
    with pytest.raises(ValueError, match=f"{E} wide, the student has {K}"):
        fused_dino_loss(student, layer, tensor(7, (2 * B, E)), center, 0.05, 0.1, 4)


def test_float16_gradients_are_rounded_after_the_loss_scale():
    """In float16 the gradient is the exact one times the loss scale, rounded: nothing is flushed to zero before.

    With 16384 prototypes an entry is about 1e-8 before the scale of 65536, below float16's smallest number (6e-8), and
    about 5e-4 after it. Two roundings to 11 bits leave an error of 2^-11 of each entry; where p and Q nearly cancel,
    float32's own rounding of them adds a little.
    """
    views, batch, k, scale = 4, 16, 16384, 65536.0
    logits = (tensor(1, (views * batch, k)) * 0.1).half()
    teacher, center = tensor(2, (2 * batch, k)) * 0.1, torch.zeros(1, k)
    exact = logits.double().requires_grad_()
    expected_loss, _ = expected(exact, teacher.double(), center.double(), views)
    (expected_loss * scale).backward()
    half = logits.clone().requires_grad_()
    loss, *_ = in_place_dino_loss(half * 1, teacher, center, 0.05, 0.1, views)
    (loss * scale).backward()
    wanted = exact.grad
    assert half.grad.dtype == torch.float16
    error = (half.grad.double() - wanted).abs()
    assert (error <= 3 * 2**-11 * wanted.abs() + 1e-3 * wanted.abs().mean()).all()
    assert (half.grad == 0).float().mean() < 0.01
