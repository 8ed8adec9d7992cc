"""iBOTLoss against the published numbers and an independent transcription, and its parts."""

from __future__ import annotations

import pytest
import torch

from distill.patch_loss import iBOTLoss, patch_temp_schedule
from tests.distill.attmask import attmask_golden
from tests.reference import assert_close, tensor


def golden_loss(case: dict) -> iBOTLoss:
    temps = case.get("temps") or (case["warmup"], case["temp"]) * 2
    return iBOTLoss(
        case["out_dim"], case.get("patch_out_dim", case["out_dim"]), 2, 3, *temps,
        case["warmup_epochs"], case["epochs"],
        lambda1=case["lambda1"], lambda2=case["lambda2"], mim_start_epoch=case["pred_start_epoch"],
    )  # fmt: skip


def outputs(seed: int, rows: int, local: int, patches: int, k: int, k2: int) -> list[torch.Tensor]:
    """Student [CLS], patches and local [CLS], which need gradients; teacher [CLS] and patches."""
    student = [
        (tensor(seed + 10 * i, shape) * 2).requires_grad_()
        for i, shape in enumerate([(rows, k), (rows, patches, k2), (local, k)])
    ]
    return [*student, tensor(seed + 30, (rows, k)) * 0.3, tensor(seed + 40, (rows, patches, k2)) * 0.3]


@pytest.mark.parametrize("name", ["loss", "loss_general"])
def test_published_numbers(name):
    """Loss, terms, both centers and gradients of all epochs equal the published code's."""
    case = attmask_golden()[name]
    loss_fn = golden_loss(case)
    for epoch, row in enumerate(case["rows"]):
        cls, patch, local, teacher_cls, teacher_patch = outputs(
            case["seed"] + epoch, 8, 12, 16, case["out_dim"], case.get("patch_out_dim", case["out_dim"])
        )
        terms = loss_fn((cls, patch), (teacher_cls, teacher_patch), local, row["mask"].chunk(2), epoch)
        terms["loss"].backward()
        for key, value in {**terms, "center": loss_fn.center, "center2": loss_fn.center2}.items():
            assert_close(value.detach(), row[key], 2e-5, f"{key} of epoch {epoch}")
        expected = row["grads"] if "grads" in row else [row[f"grad_{part}"] for part in ("cls", "patch", "local")]
        for value, norm in zip((cls, patch, local), expected, strict=True):
            assert_close(value.grad.norm(), norm, 1e-4, f"gradient norm of epoch {epoch}")
        if "grad_patch_part" in row:
            assert_close(patch.grad[..., :4], row["grad_patch_part"], 1e-4, "gradient of the patches")


def written_out(loss_fn: iBOTLoss, cls, patch, local, teacher_cls, teacher_patch, masks, epoch):
    """The definition as loops over pairs, images and patches; (cls, patch) with their lambdas."""
    temp, temp2 = loss_fn.teacher_temps(epoch)
    batch = len(cls) // loss_fn.ngcrops
    views = [*cls.split(batch), *([] if local is None else local.split(batch))]
    pairs = []
    for i, teacher in enumerate(teacher_cls.split(batch)):
        q = ((teacher - loss_fn.center) / temp).softmax(-1)
        pairs += [-(q * (p / 0.1).log_softmax(-1)).sum(-1).mean() for v, p in enumerate(views) if v != i]
    q = ((teacher_patch - loss_fn.center2) / temp2).softmax(-1)
    log_p = (patch / 0.1).log_softmax(-1)
    images = []
    for row in range(len(patch)):
        hidden = masks[row // batch][row % batch].flatten().nonzero().flatten().tolist()
        images.append(sum((-(q[row, n] * log_p[row, n]).sum() for n in hidden), torch.zeros(())) / max(1, len(hidden)))
    return loss_fn.lambda1 * torch.stack(pairs).mean(), loss_fn.lambda2 * torch.stack(images).mean()


@pytest.mark.parametrize(
    ("ngcrops", "nlcrops", "batch", "grid", "lambda1", "lambda2"),
    [(2, 0, 3, (2, 3), 1.0, 1.0), (2, 5, 2, (3, 3), 0.3, 2.0),
     (1, 4, 3, (1, 5), 2.0, 0.7), (1, 1, 2, (4, 2), 1.0, 0.0)],
)  # fmt: skip
def test_equals_the_definition_written_out(ngcrops, nlcrops, batch, grid, lambda1, lambda2):
    """Other numbers of crops, grids and weights, images without a mask too, give the loops' loss and gradient."""
    k, k2, patches = 20, 12, grid[0] * grid[1]
    loss_fn = iBOTLoss(
        k, k2, ngcrops, nlcrops, 0.1, 0.2, 0.3, 0.15, 3, 5, lambda1=lambda1, lambda2=lambda2, mim_start_epoch=1
    )
    loss_fn.apply_centers(tensor(70, (1, k)), tensor(71, (1, 1, k2)))
    data = outputs(800, ngcrops * batch, max(1, nlcrops * batch), patches, k, k2)
    if not nlcrops:
        data[2] = None
    masks = list((tensor(72, (ngcrops, batch, *grid)) > 0).unbind())
    masks[0][0] = False
    inputs = [x for x in data[:3] if x is not None]

    terms = loss_fn.terms((data[0], data[1]), (data[3], data[4]), data[2], masks, 2)
    cls, patch = written_out(loss_fn, *data, masks, 2)
    for actual, expected in ((terms["cls"], cls), (terms["patch"], patch), (terms["loss"], cls + patch)):
        torch.testing.assert_close(actual, expected, rtol=1e-5, atol=1e-6)
    # The [CLS] output of a single global view is compared with nothing, and has no gradient.
    inputs = inputs[1:] if ngcrops == 1 else inputs
    gradients = torch.autograd.grad(terms["loss"], inputs)
    for actual, expected in zip(gradients, torch.autograd.grad(cls + patch, inputs), strict=True):
        torch.testing.assert_close(actual, expected, rtol=1e-4, atol=1e-6)


def case(dtype: torch.dtype = torch.float32) -> tuple:
    """A loss of 2 global and 1 local crops of 2 images, and what it takes."""
    loss_fn = iBOTLoss(8, 6, 2, 1, 0.04, 0.07, 0.04, 0.07, 2, 4)
    cls, patch, local, teacher_cls, teacher_patch = (x.detach().to(dtype) for x in outputs(900, 4, 2, 4, 8, 6))
    masks = (torch.tensor([True, False, False, True]).view(1, 2, 2).expand(2, 2, 2),) * 2
    return loss_fn, (cls, patch), (teacher_cls, teacher_patch), local, masks


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_logits(dtype):
    """The arithmetic is float32 whatever the logits' precision: large ones are finite, with their float32 loss."""
    loss_fn, student, teacher, local, masks = case(dtype)
    student, teacher = tuple(x * 100 for x in student), tuple(x * 100 for x in teacher)
    terms = loss_fn.terms(student, teacher, local, masks, 0)
    full = loss_fn.terms(
        tuple(x.float() for x in student), tuple(x.float() for x in teacher), local.float(), masks, 0
    )  # fmt: skip
    for name, value in terms.items():
        assert value.dtype == torch.float32
        assert value.isfinite()
        assert torch.equal(value, full[name])
    loss_fn.update_centers(*teacher)
    assert loss_fn.center.isfinite().all()
    assert loss_fn.center2.isfinite().all()


def test_patches_outside_the_mask_do_not_count():
    """The patch term and its gradient depend on masked patches alone; without any, both are 0."""
    loss_fn, (cls, patch), teacher, local, masks = case()
    patch.requires_grad_()
    terms = loss_fn.terms((cls, patch), teacher, local, masks, 0)
    (gradient,) = torch.autograd.grad(terms["patch"], patch)
    hidden = torch.cat([mask.flatten(1) for mask in masks])
    assert (gradient[~hidden] == 0).all()
    assert (gradient[hidden].abs().sum(-1) > 0).all()
    nothing = loss_fn.terms((cls, patch), teacher, local, [mask & False for mask in masks], 0)
    assert nothing["patch"] == 0
    assert nothing["loss"] == terms["cls"]


def test_the_teacher_gets_no_gradient():
    """Targets are constants."""
    loss_fn, student, teacher, local, masks = case()
    student, teacher = (tuple(x.requires_grad_() for x in pair) for pair in (student, teacher))
    loss_fn(student, teacher, local, masks, 0)["loss"].backward()
    assert all(x.grad is None for x in teacher)
    assert all(x.grad is not None for x in student)


def test_terms_leave_the_centers_alone():
    """`terms` can be computed, and refused, before anything changes; forward is terms and then the centers."""
    loss_fn, *inputs = case()
    before = loss_fn.terms(*inputs, 0)
    assert not loss_fn.center.any()
    assert not loss_fn.center2.any()
    after = loss_fn(*inputs, 0)
    assert all(torch.equal(before[name], after[name]) for name in before)
    assert_close(loss_fn.center, 0.1 * inputs[1][0].mean(0, keepdim=True), 1e-6)
    assert_close(loss_fn.center2, 0.1 * inputs[1][1].mean((0, 1))[None, None], 1e-6)


def test_center_sums_over_the_rows_are_the_update():
    """A training step's exchanged sums, divided by the rows, move the centers as update_centers does."""
    loss_fn, _, teacher, *_ = case()
    other, *_ = case()
    loss_fn.update_centers(*teacher)
    other.apply_centers(*(part / 4 for part in loss_fn.center_sums(*teacher)))
    assert_close(other.center, loss_fn.center, 1e-6)
    assert_close(other.center2, loss_fn.center2, 1e-6)


def test_the_centers_are_means_over_all_processes(monkeypatch):
    """Two alike processes move them as one does: sums are divided by the rows of both."""
    one, _, teacher, *_ = case()
    two, *_ = case()
    one.update_centers(*teacher)
    monkeypatch.setattr("distill.patch_loss.get_world_size", lambda: 2)
    monkeypatch.setattr(torch.distributed, "all_reduce", lambda total: total.mul_(2))
    two.update_centers(*teacher)
    torch.testing.assert_close(one.center, two.center)
    torch.testing.assert_close(one.center2, two.center2)


def test_each_center_has_its_momentum():
    """center_momentum moves `center`, center_momentum2 `center2`."""
    loss_fn = iBOTLoss(3, 2, 2, 0, 0.1, 0.1, 0.1, 0.1, 0, 1, center_momentum=0.5, center_momentum2=0.75)
    loss_fn.apply_centers(torch.ones(3), torch.ones(2))
    assert torch.equal(loss_fn.center, torch.full((1, 3), 0.5))
    assert torch.equal(loss_fn.center2, torch.full((1, 1, 2), 0.25))


def test_skipped_centers_stay_bit_for_bit():
    """`apply_centers` with skip leaves both as they are, whatever the new ones hold; without, it moves them."""
    loss_fn, *_ = case()
    loss_fn.apply_centers(tensor(5, (8,)), tensor(6, (6,)), skip=torch.tensor(False))
    before = {name: value.clone() for name, value in loss_fn.state_dict().items()}
    assert all(value.any() for value in before.values())
    loss_fn.apply_centers(torch.full((8,), torch.nan), torch.full((6,), torch.nan), skip=torch.tensor(True))
    assert all(torch.equal(value, before[name]) for name, value in loss_fn.state_dict().items())


def test_the_state_dict_is_the_published_one():
    """Two centers by their names and shapes, and nothing else."""
    loss_fn, *_ = case()
    assert {name: tuple(x.shape) for name, x in loss_fn.state_dict().items()} == {
        "center": (1, 8),
        "center2": (1, 1, 6),
    }


def test_patch_temperatures_wait_for_the_masks():
    """They rest at the warm-up's start until the first epoch with masks, then warm up; the last value stays."""
    expected = [0.04, 0.04, 0.04, 0.055, 0.07, 0.07]
    assert patch_temp_schedule(0.04, 0.07, 3, 6, 2).tolist() == pytest.approx(expected)
    assert patch_temp_schedule(0.04, 0.07, 3, 3, 9).tolist() == [0.04] * 3
    assert len(patch_temp_schedule(0.04, 0.07, 30, 10, 2)) == 10
    loss_fn = iBOTLoss(4, 4, 2, 0, 0.02, 0.03, 0.04, 0.07, 3, 6, mim_start_epoch=2)
    assert loss_fn.teacher_temps(2) == pytest.approx((0.03, 0.04))
    assert loss_fn.teacher_temps(99) == pytest.approx((0.03, 0.07))


@pytest.mark.parametrize(
    ("settings", "message"),
    [({"ngcrops": 0}, "ngcrops is 0"), ({"nlcrops": -1}, "nlcrops -1"), ({"ngcrops": 1}, "at least 2 views"),
     ({"mim_start_epoch": -1}, "mim_start_epoch is -1")],
)  # fmt: skip
def test_settings_that_cannot_work(settings, message):
    """They are refused with their name and value."""
    with pytest.raises(ValueError, match=message):
        iBOTLoss(4, 4, **{"ngcrops": 2, "nlcrops": 0, **settings}, **dict.fromkeys(
            ("warmup_teacher_temp", "teacher_temp", "warmup_teacher_temp2", "teacher_temp2"), 0.1
        ), warmup_teacher_temp_epochs=0, nepochs=1)  # fmt: skip


def test_outputs_that_do_not_belong_together():
    """Wrong numbers of rows, crops or patches are refused, not silently split."""
    loss_fn, student, teacher, local, masks = case()
    for bad in (
        ((student[0][:3], student[1]), teacher, local, masks),
        (student, (teacher[0], teacher[1][:2]), local, masks),
        (student, teacher, None, masks),
    ):
        with pytest.raises(ValueError, match="2 global and 1 local crops"):
            loss_fn.terms(*bad, 0)
    for bad in (masks[:1], [mask[:, :1] for mask in masks], [mask[:1] for mask in masks]):
        with pytest.raises(ValueError, match=r"do not fit 2 global crops of \(2, 4\)"):
            loss_fn.terms(student, teacher, local, bad, 0)
