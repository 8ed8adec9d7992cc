"""Five steps of AttMask's published training, from the parts of distill/ and optim/ in a plain loop."""

from __future__ import annotations

import copy

import torch
from torch import Tensor, nn

from distill.heads import DINOHead, iBOTHead
from distill.masking import attention_mask
from distill.patch_loss import iBOTLoss
from optim.clipping import cancel_gradients_last_layer, clip_gradients
from optim.groups import get_params_groups
from optim.schedules import cosine_scheduler
from tests.distill.attmask import attmask_golden
from tests.reference import assert_close, fill_, tensor
from vision_transformer import VisionTransformer

SIZES = {"hidden_dim": 64, "bottleneck_dim": 32, "norm_last_layer": False}


def models() -> tuple[nn.ModuleDict, nn.ModuleDict]:
    """Student and teacher with the golden weights, the shared prototypes under their first name."""
    vit = VisionTransformer(
        img_size=32, patch_size=8, embed_dim=48, depth=3, num_heads=3, qkv_bias=True, masked_im_modeling=True
    )
    filled = fill_(nn.ModuleDict({"backbone": vit, "head": DINOHead(48, 128, **SIZES)}))
    head = iBOTHead(48, 128, shared_head=True, **SIZES)
    state = filled["head"].state_dict()
    state |= {name.replace("layer.", "layer2."): x for name, x in state.items() if name.startswith("last_layer.")}
    head.load_state_dict(state)
    student = nn.ModuleDict({"backbone": filled["backbone"], "head": head})
    teacher = copy.deepcopy(student).requires_grad_(False)
    del teacher["backbone"].masked_embed
    return student, teacher


def tokens(model: nn.ModuleDict, images: Tensor, mask: Tensor | None = None) -> Tensor:
    return model["backbone"].norm(model["backbone"].forward_features(images, mask))


def norm(model: nn.Module) -> Tensor:
    return torch.stack([p.detach().norm() for p in model.parameters()]).norm()


def test_five_published_steps():
    """Loss and its terms, masks, parameter norms, masked_embed and the patches' center follow the published run."""
    case = attmask_golden()["trajectory_high"]
    student, teacher = models()
    loss_fn = iBOTLoss(128, 128, 2, 3, *case["temp"][:2] * 2, case["temp"][2], case["epochs"])
    optimizer = torch.optim.AdamW(get_params_groups(student))
    length = (case["epochs"], case["steps_per_epoch"])
    lrs = cosine_scheduler(*case["lr"], *length, case["warmup_epochs"])
    decays, momenta = cosine_scheduler(*case["wd"], *length), cosine_scheduler(case["momentum"], 1, *length)

    for it, row in enumerate(case["rows"]):
        epoch = it // case["steps_per_epoch"]
        for group, decay in zip(optimizer.param_groups, (decays[it], 0.0), strict=True):
            group["lr"], group["weight_decay"] = float(lrs[it]), float(decay)
        crops = [tensor(case["seed"] + 100 * it + v, (4, 3, *[32 if v < 2 else 16] * 2)) for v in range(5)]
        images, local = torch.cat(crops[:2]), torch.cat(crops[2:])
        with torch.no_grad():
            teacher_output = teacher["head"](tokens(teacher, images))
            attention = teacher["backbone"].get_last_selfattention(images)[:, :, 0, 1:].mean(1)
        mask = attention_mask(attention, case["ratio"], case["mode"])
        assert torch.equal(mask, row["masked"])

        student_output = student["head"](tokens(student, images, mask))
        local_cls = student["head"](tokens(student, local)[:, 0])
        masks = mask.unflatten(1, (4, 4)).chunk(2)
        terms = loss_fn(student_output, teacher_output, local_cls, masks, epoch)
        optimizer.zero_grad()
        terms["loss"].backward()
        clip_gradients(student, case["clip"])
        cancel_gradients_last_layer(epoch, student, case["freeze_last_layer"])
        optimizer.step()
        own = dict(student.named_parameters())
        with torch.no_grad():
            for name, parameter in teacher.named_parameters():
                parameter.mul_(momenta[it]).add_((1 - momenta[it]) * own[name])

        for name in ("loss", "cls", "patch"):
            assert_close(terms[name].detach(), row[name], 2e-5, f"{name} of step {it}")
        assert_close(norm(student), row["student_norm"], 2e-5, f"student of step {it}")
        assert_close(norm(teacher), row["teacher_norm"], 2e-5, f"teacher of step {it}")
        # Adam divides small gradients by their own size, so rounding in them moves single entries more.
        assert_close(student["backbone"].masked_embed.detach(), row["masked_embed"], 1e-4, f"masked_embed of step {it}")
        assert_close(loss_fn.center2, row["center2"], 2e-5, f"center2 of step {it}")
