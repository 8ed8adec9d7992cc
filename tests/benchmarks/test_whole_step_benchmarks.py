"""The benchmarks of the whole step in quick form: both sides compute the same; times are never judged here."""

import pytest
import torch

import backbones
from benchmarks import compile_step, into_docs, optimizer, startup, supervised_step, train_step
from benchmarks.plain_step import PlainStep
from distill.heads import DINOHead
from distill.multicrop import MultiCropWrapper
from runtime.guards import InputError
from tests.pretraining import FAMILIES, VIT

CPU = torch.device("cpu")
DEMO = ["--batch_size_per_gpu", "4", "--data_path", "demo"]


@pytest.mark.parametrize("name", ["vit", "vit_official", "resnet"])
def test_plain_and_own_step_give_the_same_losses(name):
    """Three steps of the plain step, with each part exchanged too, have the training step's losses within 1e-5."""
    result = train_step.compare([*FAMILIES[name], *DEMO], CPU, rounds=1, each=name == "vit")
    assert result.error < 1e-5
    assert result.seconds.keys() >= {"plain", "ours", train_step.APART}


def test_plain_and_own_step_give_the_same_weights():
    """After three steps student, teacher and center agree, too."""
    run, batch = train_step.build([*VIT, *DEMO, "--optimizer", "sgd"], CPU)
    crops = run.views.on_device(batch)
    plain, own = PlainStep(run), train_step.OwnStep(run, batch, crops)
    before = run.teacher.head.mlp[0].weight.clone()
    for step in range(3):
        plain(crops, step)
        own(step)
    for kind in ("student", "teacher"):
        for a, b in zip(getattr(plain, kind).parameters(), getattr(run, kind).parameters(), strict=True):
            torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-6)
    torch.testing.assert_close(plain.loss.center, run.loss.center, rtol=1e-4, atol=1e-6)
    assert not torch.equal(before, run.teacher.head.mlp[0].weight)


def test_the_supervised_step_is_timms():
    """Three steps of main_supervised and of timm's own model, mixing, loss and AdamW have the same losses."""
    flags = ["--arch", "vit_small", "--recipe", "vit", "--img_size", "32", "--data_path", "demo", "--amp", "none"]
    flags += ["--batch_size_per_gpu", "2", "--matmul_precision", "highest", "--lr", "0.01", "--epochs", "1"]
    result = supervised_step.compare(flags, CPU, rounds=1)
    assert result.error < result.tolerance
    assert result.seconds.keys() == {"timm", "ours"}


def test_a_difference_is_found():
    """A step that leaves out the teacher's sharpening does not pass for the same."""
    run, batch = train_step.build([*VIT, *DEMO], CPU)
    crops = run.views.on_device(batch)
    plain, own = PlainStep(run), train_step.OwnStep(run, batch, crops)
    plain.loss.teacher_temp_schedule = plain.loss.teacher_temp_schedule * 2
    assert abs(plain(crops, 0) / own(0)[0].item() - 1) > 1e-5


def test_compiled_steps_give_the_same_losses_and_names(monkeypatch):
    """Captured as a graph the backbone gives the same losses, and parameters keep their names (code generation, which
    takes minutes, is left out)."""
    real = torch.nn.Module.compile
    monkeypatch.setattr(torch.nn.Module, "compile", lambda self: real(self, backend="eager"))
    flags = [*VIT, *DEMO]
    seconds, first, error = compile_step.compare(flags, CPU, rounds=1)
    assert seconds.keys() == first.keys() == {"eager", "compiled"}
    assert error < 1e-5
    names = [list(train_step.build([*flags, "--compile", c], CPU)[0].student.state_dict()) for c in ("true", "false")]
    assert names[0] == names[1]


@pytest.mark.parametrize("name", ["adamw", "sgd", "lars"])
def test_updates_agree(name):
    """Clipping, optimizer and average leave the same weights on both sides."""
    backbone = backbones.build_backbone("vit_tiny", mode="simpool", embed_dim=24, depth=2, num_heads=2)
    model = MultiCropWrapper(backbone, DINOHead(24, 64, norm_last_layer=False))
    seconds, error = optimizer.compare(model, name, 3.0, rounds=1)
    assert error < 1e-5
    assert seconds.keys() == {*optimizer.PHASES, "all"}
    assert seconds["all"].keys() == {"plain", "ours", "apart"}


def test_startup_checks_what_it_times():
    """--help names the program's flags; a command that ends otherwise than it should is no timing."""
    assert "--arch" in startup.answer("--help")
    assert "no_such_flag" in startup.answer("a wrong flag")


def test_tables_go_between_the_markers():
    """A second run replaces the first one's tables and nothing else; a lost marker is an error."""
    once = into_docs.replace_between_markers("# Title\n\nprose\n", "first")
    assert once.startswith("# Title\n\nprose\n")
    twice = into_docs.replace_between_markers(once + "\n## After\n", "second")
    assert "first" not in twice
    assert "second" in twice
    assert twice.endswith("\n## After\n")
    with pytest.raises(InputError, match="one of the markers"):
        into_docs.replace_between_markers(into_docs.BEGIN, "text")
