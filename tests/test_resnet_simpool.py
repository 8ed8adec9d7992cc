"""ResNets: published numbers and names, torchvision's weights, pooling modes."""

import pytest
import torch
from torch import nn

import resnet_simpool as resnets
from tests.reference import assert_close, fill_, golden, tensor

ARCHS = ("resnet18", "resnet34", "resnet50", "resnet101", "resnet152")


def small_resnet(mode: str = "simpool", block=resnets.Bottleneck, **settings) -> resnets.ResNet:
    return resnets.ResNet(block, (1, 1, 1, 1), mode, num_classes=0, **settings)


@pytest.mark.parametrize("mode", ["official", "simpool"])
def test_published_numbers_and_names(mode):
    """Features and state-dict names are the published model's, the pooling's minimum over the batch."""
    case = golden(f"resnet18/{mode}")
    model = fill_(resnets.resnet18(mode, num_classes=0, value_min="batch")).eval()
    assert sorted(model.state_dict()) == sorted(case["keys"])
    assert_close(model(case["x"]).detach(), case["y"])


@pytest.mark.parametrize("arch", ARCHS)
def test_shapes_equal_torchvision(arch):
    """Names and shapes are torchvision's, so that its weights load into the official mode."""
    models = pytest.importorskip("torchvision.models")
    with torch.device("meta"):
        ours, theirs = resnets.__dict__[arch](), models.__dict__[arch](weights=None)
    assert {k: v.shape for k, v in ours.state_dict().items()} == {k: v.shape for k, v in theirs.state_dict().items()}


@pytest.mark.parametrize("block", ["BasicBlock", "Bottleneck"])
def test_logits_equal_torchvision(block):
    """With the same weights the logits are torchvision's."""
    models = pytest.importorskip("torchvision.models.resnet")
    theirs = models.ResNet(getattr(models, block), [1, 2, 1, 1], num_classes=5).eval()
    ours = resnets.ResNet(getattr(resnets, block), (1, 2, 1, 1), num_classes=5).eval()
    ours.load_state_dict(theirs.state_dict(), strict=True)
    x = tensor(1, (2, 3, 40, 64))
    torch.testing.assert_close(ours(x), theirs(x))


def test_the_small_stem_is_the_usual_one():
    """3x3, stride 1 and no max-pool under torchvision's names: its ResNet-18, changed so, gives the same logits."""
    models = pytest.importorskip("torchvision.models")
    theirs = models.resnet18(num_classes=5)
    theirs.conv1 = nn.Conv2d(3, 64, kernel_size=3, stride=1, padding=1, bias=False)
    theirs.maxpool = nn.Identity()
    ours = resnets.resnet18(num_classes=5, stem="small")
    ours.load_state_dict(theirs.state_dict(), strict=True)
    x = tensor(1, (2, 3, 32, 32))
    torch.testing.assert_close(ours.eval()(x), theirs.eval()(x))


def test_the_small_stem_leaves_simpool_a_map():
    """At 32 pixels the last map is 4x4; with the standard stem it is a single cell."""
    x = tensor(1, (1, 3, 32, 32))
    maps = {stem: small_resnet(stem=stem).eval().get_attention_map(x).shape for stem in resnets.STEMS}
    assert maps == {"standard": (1, 1, 1, 1), "small": (1, 1, 4, 4)}
    with pytest.raises(ValueError, match="unknown stem 'tiny'; choose standard or small"):
        small_resnet(stem="tiny")


@pytest.mark.parametrize("mode", ["official", "simpool"])
@pytest.mark.parametrize("size", [(64, 64), (33, 100), (7, 7)])
def test_any_size(mode, size):
    """Features and maps come out right at any image size and for a batch of one."""
    model, x = small_resnet(mode).eval(), tensor(1, (1, 3, *size))
    grid = model.forward_features(x).shape[-2:]
    assert grid == tuple(-(-side // 32) for side in size)
    assert model(x).shape == (1, 2048)
    if mode == "simpool":
        attention = model.get_attention_map(x)
        assert attention.shape == (1, 1, *grid)
        torch.testing.assert_close(attention.sum(), torch.tensor(1.0))
    else:
        with pytest.raises(ValueError, match="simpool"):
            model.get_attention_map(x)


@pytest.mark.parametrize("arch", ARCHS)
def test_mode_is_honoured(arch):
    """Every depth, 18 and 34 too, pools by SimPool when asked to, with gamma and value_min."""
    with torch.device("meta"):
        model = resnets.__dict__[arch]("simpool", gamma=1.5, value_min="batch", num_classes=10)
    assert (model.simpool.gamma, model.simpool.value_min) == (1.5, "batch")
    assert model.fc.out_features == 10
    assert model.simpool.beta is None


def test_gradient_checkpointing_changes_nothing():
    """With gradient checkpointing output, gradients and running statistics are bitwise the same."""
    x, results = tensor(1, (2, 3, 64, 64)), []
    model = small_resnet(block=resnets.BasicBlock)
    state = {k: v.clone() for k, v in model.state_dict().items()}
    for enable in (False, True):
        model.load_state_dict(state)
        model.set_grad_checkpointing(enable)
        y = model(x)
        grads = torch.autograd.grad(y.square().sum(), list(model.parameters()))
        results.append([y, *grads, *(b.clone() for b in model.buffers())])
    assert all(torch.equal(a, b) for a, b in zip(*results, strict=True))


def test_channels_last_gives_the_same():
    """The memory format does not change features."""
    model, x = small_resnet().eval(), tensor(1, (2, 3, 64, 64))
    expected = model(x)
    actual = model.to(memory_format=torch.channels_last)(x.to(memory_format=torch.channels_last))
    torch.testing.assert_close(actual, expected, rtol=1e-4, atol=1e-5)


def test_wrong_input_is_named():
    """An unknown mode and an empty image are ValueErrors that show the value."""
    with pytest.raises(ValueError, match="gep"):
        small_resnet("gep")
    with pytest.raises(ValueError, match="0x32"):
        small_resnet()(torch.zeros(1, 3, 0, 32))


def test_checkpointing_with_synchronised_batchnorm():
    """SyncBatchNorm counts its batches and insists on it: a checkpointed backward passes, and counts once."""
    model = nn.SyncBatchNorm.convert_sync_batchnorm(resnets.resnet18(num_classes=0))
    model.set_grad_checkpointing(True)
    model(tensor(1, (2, 3, 32, 32))).sum().backward()
    assert {m.num_batches_tracked.item() for m in model.modules() if isinstance(m, nn.SyncBatchNorm)} == {1}


def test_masks_are_refused():
    """A convolutional backbone does not mask patches; it says so instead of ignoring the mask."""
    with pytest.raises(ValueError, match="ResNet takes no mask"):
        small_resnet().forward_features(tensor(1, (1, 3, 32, 32)), torch.ones(1, 2, 2, dtype=torch.bool))


@pytest.mark.parametrize("mode", ["official", "simpool"])
def test_dense_features_are_those_of_the_separate_calls(mode):
    """One pass gives forward's feature, the positions of the last map and SimPool's map; masks are refused."""
    model, x = small_resnet(mode).eval(), tensor(1, (2, 3, 64, 96))
    pooled, positions, attention = model.forward_dense(x)
    assert torch.equal(pooled, model(x))
    torch.testing.assert_close(positions, (model.forward_features(x).flatten(2).transpose(1, 2)))
    assert (attention is None) == (mode == "official")
    if mode == "simpool":
        torch.testing.assert_close(attention, model.get_attention_map(x).flatten(2))
    assert model.forward_dense(x, need_attention=False)[2] is None
    with pytest.raises(ValueError, match="takes no mask"):
        model.forward_dense(x, torch.ones(2, 2, 3, dtype=torch.bool))
