"""AttMask's program: the published steps, the lean step against the formulas, flags, and runs that survive."""

from __future__ import annotations

import functools
import shutil

import pytest
import torch
from torch import Tensor

import main_attmask
import main_dino
from data.datasets import open_images
from distill.heads import DINOHead
from distill.masked_multicrop import Masks, masks_with_rows
from runtime.checkpoint import read_checkpoint
from runtime.guards import InputError
from tests import processes
from tests.distill.attmask import attmask_golden
from tests.pretraining import TINY, assert_equal_states, rows, train
from tests.reference import assert_close, fill_, tensor
from training.masking import MaskedViews
from training.run import Run

ATTMASK = ["--arch", "vit_small", *TINY, "--shared_head", "true"]
run_attmask = functools.partial(train, program=main_attmask)


@pytest.fixture(autouse=True)
def small_heads(monkeypatch):
    """The head's usual widths would take nearly all of the time."""
    small = functools.partial(main_attmask.iBOTHead, hidden_dim=64, bottleneck_dim=32)
    monkeypatch.setattr(main_attmask, "iBOTHead", small)


def make_run(*flags: str, images: int = 4) -> Run:
    line = [*ATTMASK, "--data_path", "demo", "--device", "cpu", "--amp", "none", *map(str, flags)]
    return main_attmask.build(main_attmask.parse_arguments(line), images, torch.device("cpu"))


# ---- the step


class GivenCrops:
    """Views that are crops already, all masked by attention."""

    def __init__(self, ratio: float) -> None:
        self.ratio = ratio

    def on_device(self, batch: list[Tensor]) -> list[Tensor]:
        return batch

    def masks(self, _batch, _step, _epoch, attention: Tensor) -> Masks:
        self.mask = main_attmask.masking.attention_mask(attention, self.ratio, "attmask_high")
        return masks_with_rows(self.mask, int(self.ratio * attention.shape[1]))


def test_five_published_steps():
    """The program's step follows the published run: loss and its terms, masks, parameter norms, masked_embed, center.

    Tolerances are those of the golden numbers; Adam divides small gradients by their own size, so rounding in them
    moves single entries of masked_embed more.
    """
    case = attmask_golden()["trajectory_high"]
    run = make_run(
        "--batch_size_per_gpu", 4, "--embed_dim", 48, "--depth", 3, "--num_heads", 3, "--epochs", case["epochs"],
        "--out_dim", 128, "--local_crops_number", 3, "--norm_last_layer", "false", "--freeze_last_layer",
        case["freeze_last_layer"], "--clip_grad", case["clip"], "--momentum_teacher", case["momentum"],
        "--warmup_teacher_temp", case["temp"][0], "--teacher_temp", case["temp"][1],
        "--warmup_teacher_patch_temp", case["temp"][0], "--teacher_patch_temp", case["temp"][1],
        "--warmup_teacher_temp_epochs", case["temp"][2], "--lr", case["lr"][0] * 64, "--min_lr", case["lr"][1],
        "--warmup_epochs", case["warmup_epochs"], "--weight_decay", case["wd"][0], "--weight_decay_end",
        case["wd"][1], images=4 * case["steps_per_epoch"],
    )  # fmt: skip
    assert run.plan.steps_per_epoch == case["steps_per_epoch"]
    own = fill_(run.student).state_dict()
    named_first = fill_(torch.nn.ModuleDict({"head": DINOHead(48, 128, False, False, 3, 64, 32)}))
    run.student.head.last_layer.load_state_dict(named_first["head"].last_layer.state_dict())
    run.teacher.load_state_dict({name: own[name] for name in run.teacher.state_dict()})
    run.views = GivenCrops(case["ratio"])
    for it, row in enumerate(case["rows"]):
        crops = [tensor(case["seed"] + 100 * it + v, (4, 3, *[32 if v < 2 else 16] * 2)) for v in range(5)]
        result = main_attmask.train_step(run, [[torch.cat(crops[:2]), torch.cat(crops[2:])]], it)
        values = dict(zip(main_attmask.METHOD.results, result, strict=True))
        assert torch.equal(run.views.mask, row["masked"])
        for name in ("loss", "cls", "patch"):
            assert_close(values[name], row[name], 2e-5, f"{name} of step {it}")
        for name, model in (("student", run.student), ("teacher", run.teacher)):
            norm = torch.stack([p.detach().norm() for p in model.parameters()]).norm()
            assert_close(norm, row[f"{name}_norm"], 2e-5, f"{name} of step {it}")
        assert_close(run.student.backbone.masked_embed.detach(), row["masked_embed"], 1e-4, f"masked_embed, step {it}")
        assert_close(run.loss.center2, row["center2"], 2e-5, f"center2 of step {it}")


def plain_terms(run: Run, crops: list[Tensor], mask: Tensor, epoch: int) -> dict[str, Tensor]:
    """The loss from all patches' logits, with a forward of the student for global and one for local crops."""
    student, teacher, loss = run.student, run.teacher, run.loss

    def tokens(model, images, *given):
        dense = model.backbone.forward_dense(images, *given, need_attention=False)
        return torch.cat((dense[0][:, None], dense[1]), dim=1)

    hidden = [mask] if hasattr(student.backbone, "masked_embed") else []
    student_output = student.head(tokens(student, crops[0], *hidden))
    local = student.head(student.backbone(crops[1])) if len(crops) > 1 else None
    with torch.no_grad():
        teacher_output = teacher.head(tokens(teacher, crops[0]))
    side = run.views.settings.grid
    return loss(student_output, teacher_output, local, mask.unflatten(1, side).chunk(loss.ngcrops), epoch)


SETTINGS = {
    "high": ["--pred_shape", "attmask_high"],
    "hint, two heads": ["--pred_shape", "attmask_hint", "--show_max", 0.4, "--shared_head", "false",
                        "--shared_head_teacher", "false", "--patch_out_dim", 48, "--lambda2", 0.5],
    "low, simpool": ["--pred_shape", "attmask_low", "--mode", "simpool", "--masking_prob", 0.6],
    "block, batchnorm": ["--pred_shape", "block", "--norm_in_head", "bn"],
    "rand, one global crop": ["--pred_shape", "rand", "--global_crops_number", 1],
    "nothing hidden, no local crops": ["--use_masked_im_modeling", "false", "--local_crops_number", 0],
    "before the first masks": ["--pred_start_epoch", 1],
}  # fmt: skip


@pytest.mark.parametrize("name", SETTINGS)
def test_the_lean_step_is_the_formula(name):
    """Loss, gradients and centers are those of logits for all patches.

    Models compute in float64; the plain loss takes its softmaxes in float32, 6e-8 off in each of some hundred terms.
    """
    run = make_run("--batch_size_per_gpu", 3, "--pred_ratio", 0.4, *SETTINGS[name])
    for module in (run.student, run.teacher, run.loss):
        module.double()
    torch.nn.init.normal_(getattr(run.student.backbone, "masked_embed", torch.zeros(1)))
    with torch.no_grad():
        for parameter in run.teacher.parameters():
            parameter.add_(0.02 * torch.randn_like(parameter))
    source = open_images("demo", "train")
    batch = run.views.dataset(source, 0).__getitems__([(0, i) for i in range(3)])
    crops = [crop.double() for crop in run.views.on_device(batch)]
    before = {name: value.clone() for name, value in run.loss.state_dict().items()}

    teacher = run.teacher(crops[0], lambda attention: run.views.masks(batch, 5, 0, attention))
    mask, masked = teacher.masks.mask, teacher.masks.mask.sum()
    assert (masked == 0) if name == "before the first masks" else (0 < masked < mask.numel() / 2)
    student_cls, student_patch = run.student(crops, teacher.masks)
    assert len(student_patch) == len(teacher.masks.chosen) <= 0.5 * mask.numel()
    terms = run.loss.step_terms(student_cls, student_patch, teacher.cls, teacher.patch, teacher.masks.weights, 0)
    terms[0].backward()
    grads = {name: p.grad.clone() for name, p in run.student.named_parameters() if p.grad is not None}
    rows = run.loss.ngcrops * 3
    run.loss.apply_centers(teacher.cls.sum(0) / rows, teacher.patch_mean / rows)
    centers = {name: value.clone() for name, value in run.loss.state_dict().items()}

    run.loss.load_state_dict(before)
    run.student.zero_grad(set_to_none=True)
    plain = plain_terms(run, crops, mask, 0)
    plain["loss"].backward()
    for mine, key in zip(terms, ("loss", "cls", "patch"), strict=True):
        torch.testing.assert_close(mine.double(), plain[key].double(), rtol=1e-6, atol=1e-9)
    for key, parameter in run.student.named_parameters():
        if parameter.grad is not None:
            assert (grads[key] - parameter.grad).norm() <= 1e-5 * parameter.grad.norm() + 1e-9, key
    for key, center in run.loss.state_dict().items():
        torch.testing.assert_close(centers[key], center, rtol=1e-5, atol=1e-7)


def test_a_refused_step_changes_nothing():
    """With a crop that is not finite, weights, masked_embed, both centers and the optimizer stay bit for bit."""
    run = make_run("--batch_size_per_gpu", 2)
    run.views = GivenCrops(0.3)
    crops = [torch.randn(4, 3, 32, 32), torch.randn(4, 3, 16, 16)]
    main_attmask.train_step(run, [crops], 0)
    before = [
        value.clone() for module in (run.student, run.teacher, run.loss) for value in module.state_dict().values()
    ]
    crops[1][0, 0, 0, 0] = float("inf")
    values = dict(zip(main_attmask.METHOD.results, main_attmask.train_step(run, [crops], 1), strict=True))
    assert values["bad"] == 1
    after = [value for module in (run.student, run.teacher, run.loss) for value in module.state_dict().values()]
    assert all(torch.equal(one, other) for one, other in zip(before, after, strict=True))


def test_a_compiled_step_is_the_step(monkeypatch):
    """--compile captures the masked and the dense forward too: the same loss within float32's rounding."""
    real, captured = torch.compile, []
    monkeypatch.setattr(torch, "compile", lambda f, **_: captured.append(f.__name__) or real(f, backend="eager"))
    results = []
    for compiled in ("false", "true"):
        run = make_run("--batch_size_per_gpu", 2, "--compile", compiled)
        run.views = GivenCrops(0.3)
        crops = [tensor(1, (4, 3, 32, 32)), tensor(2, (4, 3, 16, 16))]
        results.append(main_attmask.train_step(run, [crops], 0))
    assert captured.count("forward_dense") == 2
    torch.testing.assert_close(*results, rtol=1e-5, atol=1e-6)


def test_the_masks_of_a_step_do_not_depend_on_ranks_or_micro_batches():
    """The ratio is one of (seed, step); what is drawn for an image is one of (seed, epoch, index)."""
    run = make_run("--pred_shape", "attmask_hint", "--pred_ratio_var", 0.2, "--batch_size_per_gpu", 2)
    views: MaskedViews = run.views
    ratios = [views.settings.ratios_of_step(0, step) for step in range(200)]
    assert len({ratio for ratio, _ in ratios}) == 200
    assert all(0.1 <= ratio <= 0.5 and 0.01 <= shown <= 0.05 for ratio, shown in ratios)
    assert min(ratios)[0] < 0.12
    assert max(ratios)[0] > 0.48
    source = open_images("demo", "train")
    images = views.dataset(source, 0)
    together, alone = images.__getitems__([(1, 7), (1, 8)]), images.__getitems__([(1, 8)])
    assert torch.equal(together.masked[:, 1:], alone.masked)
    assert torch.equal(together.drawn[:, 1:], alone.drawn)
    assert not torch.equal(images.__getitems__([(2, 8)]).drawn, alone.drawn)


def test_drawn_masks_differ_between_epochs():
    """Block-wise and random masks are drawn per image, crop and epoch, and hide int(r N) at most, r per crop."""
    for shape in ("block", "rand"):
        run = make_run(
            "--batch_size_per_gpu", 2, "--pred_shape", shape, "--pred_ratio", 0, 0.3, "--pred_ratio_var", 0, 0.2
        )
        images = run.views.dataset(open_images("demo", "train"), 0)
        first, again, later = (images.__getitems__([(epoch, i) for i in range(16)]).drawn for epoch in (0, 0, 1))
        assert torch.equal(first, again)
        assert not torch.equal(first, later)
        counts = first.sum(-1).flatten().tolist()
        assert {0} < set(counts)
        assert max(counts) <= 8  # of 16 patches


# ---- flags


@pytest.mark.parametrize(
    ("flags", "words"),
    [
        (["--pred_ratio", 1.2], "--pred_ratio 1.2"),
        (["--pred_ratio", 0.3, "--pred_ratio_var", 0.4], "--pred_ratio_var 0.3"),
        (["--pred_ratio", 0.9, "--pred_ratio_var", 0.2], "beyond [0, 1]"),
        (["--pred_ratio", 0.1, 0.3], "as many of both"),
        (["--show_max", 1], "--show_max 1"),
        (["--show_max", 0], "--show_max 0"),
        (["--masking_prob", 1.5], "--masking_prob 1.5"),
        (["--shared_head", "true", "--shared_head_teacher", "false"], "--shared_head_teacher false"),
        (["--patch_out_dim", 48], "--patch_out_dim 48"),
        (["--global_crops_number", 1, "--local_crops_number", 0], "no pair of views"),
        (["--global_crops_number", 3], "--global_crops_number 3"),
        (["--local_crops_size", 32], "--local_crops_size 32"),
        (["--arch", "resnet18"], "--arch resnet18"),
        (["--pred_shape", "attmask"], "attmask_high"),
        (["--recipe", "simpool"], "attmask300"),
        (["--n_last_blocks", 4], "n_last_blocks"),
        (["--load_from", "missing.pth"], "missing.pth"),
    ],
)
def test_bad_flags_are_one_line(flags, words):
    """Each error names the flag and its value or remedy, before anything is built."""
    with pytest.raises(InputError) as caught:
        main_attmask.parse_arguments([*ATTMASK, "--data_path", "demo", *map(str, flags)])
    assert words in str(caught.value)
    assert "\n" not in str(caught.value)


def test_a_shared_head_decides_the_number_of_patch_prototypes():
    """With the published defaults (the teacher's head is shared, 65536 and 8192 prototypes) patches get K, said so."""
    args = main_attmask.parse_arguments(["--data_path", "demo", "--arch", "vit_small"])
    assert (args.out_dim, args.patch_out_dim, args.shared_head) == (65536, 65536, False)
    assert "shared" in args.sources["patch_out_dim"]


@pytest.mark.parametrize(
    ("recipe", "expected"),
    [
        ("auto", {"pred_shape": "attmask_high", "local_crops_number": 0, "batch_size_per_gpu": 128, "clip_grad": 3.0}),
        ("attmask", {"pred_shape": "attmask_hint", "pred_ratio_var": (0.2,), "out_dim": 8192, "shared_head": True}),
        ("attmask300", {"epochs": 300, "pred_shape": "attmask_high", "global_crops_scale": (0.32, 1.0)}),
        ("attmask20", {"momentum_teacher": 0.99, "local_crops_number": 6, "subset": 260}),
        ("ibot", {"pred_shape": "block", "pred_ratio": (0.0, 0.3), "pred_ratio_var": (0.0, 0.2)}),
    ],
)
def test_recipes(recipe, expected):
    """The published settings of each recipe; a flag of the user wins."""
    args = main_attmask.parse_arguments(["--data_path", "photos", "--recipe", recipe, "--lr", "0.1"])
    assert {key: getattr(args, key) for key in expected} == expected
    assert args.lr == 0.1


def test_few_images_choose_prototypes_for_both_heads(small, tmp_path, capsys):
    """Without a recipe, 96 images take fewer prototypes, patches with them, in a run and in its continuation."""
    flags = ["--arch", "vit_small", *TINY, "--data_path", small, "--epochs", 2, "--eval_every", 0]
    flags = [*flags[: flags.index("--out_dim")], *flags[flags.index("--out_dim") + 2 :], "--output_dir", tmp_path]
    assert run_attmask(*flags, "--max_steps", 2) == 0
    assert run_attmask(*flags) == 0
    saved = read_checkpoint(tmp_path / "checkpoint.pth")
    assert saved["config"]["out_dim"] == saved["config"]["patch_out_dim"] == saved["ibot_loss"]["center2"].shape[-1]
    assert saved["config"]["out_dim"] == 1024
    assert "are few for the published recipe" in capsys.readouterr().out


PUBLISHED = """--batch_size_per_gpu 60 --norm_last_layer False --epochs 100 --output_dir out --shared_head True
--out_dim 8192 --local_crops_number 10 --global_crops_scale 0.25 1 --local_crops_scale 0.05 0.25 --pred_ratio 0.3
--pred_ratio_var 0.2 --masking_prob 0.5 --pred_shape attmask_high --show_max 0.1 --data_path photos --num_workers 4
--momentum_teacher 0.996 --teacher_temp 0.07 --warmup_teacher_temp_epochs 30 --drop_path 0.1 --use_fp16 false
--saveckp_freq 40 --n_last_blocks 1 --avgpool_patchtokens 0"""


def test_published_command():
    """The published ImageNet-1k command line is understood."""
    args = main_attmask.parse_arguments(PUBLISHED.split())
    assert (args.drop_path_rate, args.out_dim, args.patch_out_dim) == (0.1, 8192, 8192)


# ---- runs

RUN = ["--epochs", 3, "--subset", 24, "--eval_every", 1, "--nb_knn", 5, "--pred_shape", "attmask_hint",
       "--pred_ratio_var", 0.2, "--show_max", 0.3, "--pred_start_epoch", 1]  # fmt: skip


def test_the_page_of_a_run_shows_its_masks(small, tmp_path):
    """A finished run draws masks.png, and its page holds it."""
    flags = [*ATTMASK, "--data_path", small, "--epochs", 1, "--eval_every", 0, "--report", "true"]
    assert run_attmask(*flags, "--output_dir", tmp_path) == 0
    assert (tmp_path / "masks.png").stat().st_size > 1000
    assert "<h3>masks.png</h3>" in (tmp_path / "report.html").read_text()


def test_every_third_step_can_be_continued(small, tmp_path):
    """A run from the save of a step ends bit for bit as the whole one, whatever the number of loader workers."""
    flags = [*ATTMASK, *RUN, "--data_path", small, "--drop_path_rate", 0.1]
    saves = ["--checkpoint_every_steps", 1, "--keep_checkpoints", 99]
    assert run_attmask(*flags, *saves, "--output_dir", tmp_path / "whole") == 0
    logged = rows(tmp_path / "whole")
    assert logged[0]["train_patch"] == 0
    assert logged[1]["train_patch"] > 0
    assert all(row["k-NN"]["5"]["top1"] > 0 for row in logged)
    steps = sorted((tmp_path / "whole").glob("checkpoint_step*.pth"))
    for i, checkpoint in enumerate(steps[::3]):
        folder = tmp_path / f"continued{i}"
        folder.mkdir()
        shutil.copy(checkpoint, folder / "checkpoint.pth")
        shutil.copy(checkpoint.parent / "log.txt", folder)
        assert run_attmask(*flags, "--output_dir", folder, "--num_workers", i % 2) == 0
        assert_equal_states(tmp_path / "whole", folder)


@pytest.mark.parametrize(
    "extra",
    [pytest.param([], id="copied"), pytest.param(["--fsdp", "true"], id="sharded", marks=pytest.mark.full)],
)
def test_two_processes_train_as_one(small, tmp_path, extra):
    """At one global batch, two processes get the losses of one within 1e-5, and near weights."""
    flags = [*ATTMASK, "--data_path", small, "--epochs", 2, "--eval_every", 0, "--global_batch_size", 16,
             "--pred_ratio_var", 0.2, "--freeze_last_layer", 0, "--lr", 0.01, "--shared_head", "false"]  # fmt: skip
    run = functools.partial(processes.run, folder=tmp_path, program="main_attmask")
    run([*flags, "--output_dir", tmp_path / "one"])
    run([*flags, "--output_dir", tmp_path / "two", *extra], world=2)
    for one, two in zip(rows(tmp_path / "one"), rows(tmp_path / "two"), strict=True):
        for term in ("train_loss", "train_cls", "train_patch", "train_grad_norm"):
            assert two[term] == pytest.approx(one[term], rel=1e-5), term
    one, two = (read_checkpoint(tmp_path / name / "checkpoint.pth") for name in ("one", "two"))
    for key in ("student", "teacher", "ibot_loss"):
        assert one[key].keys() == two[key].keys()
        for name, value in one[key].items():
            if value.ndim > 1:  # some vectors have gradients of zero, whose rounding AdamW turns into steps
                assert (value - two[key][name]).norm() <= 1e-4 * value.norm(), name


def test_the_methods_do_not_continue_each_other(small, tmp_path):
    """A run of the other method in the folder is refused in one line; its backbone starts a new run either way."""
    dino = ["--arch", "vit_small", *TINY, "--data_path", small, "--epochs", 1, "--eval_every", 0]
    attmask = [*ATTMASK, "--data_path", small, "--epochs", 1, "--eval_every", 0]
    assert train(*dino, "--output_dir", tmp_path / "dino") == 0
    assert run_attmask(*attmask, "--output_dir", tmp_path / "attmask") == 0
    with pytest.raises(InputError, match="--init_from"):
        run_attmask(*attmask, "--output_dir", tmp_path / "dino")
    with pytest.raises(InputError, match="--init_from"):
        train(*dino, "--output_dir", tmp_path / "attmask")
    first, second = tmp_path / "dino" / "checkpoint.pth", tmp_path / "attmask" / "checkpoint.pth"
    assert run_attmask(*attmask, "--output_dir", tmp_path / "a", "--init_from", first) == 0
    assert train(*dino, "--output_dir", tmp_path / "b", "--init_from", second) == 0
    assert main_dino.METHOD.name == "dino"
