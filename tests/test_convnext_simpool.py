"""ConvNeXts: published numbers and names, parameter counts, pooling modes."""

import pytest
import torch

import convnext_simpool as convnexts
from tests.reference import assert_close, fill_, golden, tensor

ARCHS = ("convnext_tiny", "convnext_small", "convnext_base", "convnext_large", "convnext_xlarge")


def small_convnext(mode: str = "simpool", **settings) -> convnexts.ConvNeXt:
    return convnexts.ConvNeXt((1, 1, 2, 1), (8, 12, 16, 24), mode, **{"num_classes": 0, **settings})


@pytest.mark.parametrize("mode", ["official", "simpool"])
def test_published_numbers_and_names(mode):
    """Features and state-dict names are the published model's, the pooling's minimum over the batch."""
    case = golden(f"convnext_tiny/{mode}")
    model = fill_(convnexts.convnext_tiny(mode, num_classes=0, value_min="batch")).eval()
    assert sorted(model.state_dict()) == sorted(case["keys"])
    assert_close(model(case["x"]).detach(), case["y"])


@pytest.mark.parametrize(
    ("arch", "mode", "classes", "count"),
    [("convnext_small", "simpool", 0, 50_635_872), ("convnext_small", "simpool", 1, 50_636_641),
     ("convnext_tiny", "official", 1000, 28_589_128), ("convnext_base", "official", 1000, 88_591_464),
     ("convnext_large", "official", 1000, 197_767_336), ("convnext_xlarge", "official", 1000, 350_196_968)],
)  # fmt: skip
def test_parameter_counts(arch, mode, classes, count):
    """The presets have the published numbers of parameters."""
    with torch.device("meta"):
        model = convnexts.__dict__[arch](mode, num_classes=classes)
    assert sum(p.numel() for p in model.parameters()) == count


@pytest.mark.parametrize("mode", ["official", "simpool"])
@pytest.mark.parametrize("size", [(32, 32), (64, 100)])
def test_any_size(mode, size):
    """Features and maps come out right at square and other sizes, and for a batch of one."""
    model, x = small_convnext(mode).eval(), tensor(1, (1, 3, *size))
    grid = tuple(side // 32 for side in size)
    assert model.forward_features(x).shape == (1, 24, *grid)
    assert model(x).shape == (1, 24)
    if mode == "simpool":
        assert model.get_attention_map(x).shape == (1, 1, *grid)
    else:
        with pytest.raises(ValueError, match="simpool"):
            model.get_attention_map(x)


@pytest.mark.parametrize("arch", ARCHS)
def test_mode_is_honoured(arch):
    """Every size pools by SimPool when asked to, with gamma and value_min."""
    with torch.device("meta"):
        model = convnexts.__dict__[arch]("simpool", gamma=1.5, value_min="batch", num_classes=10)
    assert (model.simpool.gamma, model.simpool.value_min) == (1.5, "batch")
    assert model.head.out_features == 10
    assert model.simpool.beta is None


def test_drop_path_layer_scale_and_head_scale():
    """Drop path rises linearly over all blocks, layer scale starts as given or is absent, the head is scaled."""
    model = small_convnext(drop_path_rate=0.4, layer_scale_init_value=0.5)
    blocks = [block for stage in model.stages for block in stage]
    rates = [getattr(block.drop_path, "drop_prob", 0.0) for block in blocks]
    assert rates == pytest.approx([0.0, 0.1, 0.2, 0.3, 0.4])
    assert all((block.gamma == 0.5).all() for block in blocks)
    assert not any("gamma" in key for key in small_convnext(layer_scale_init_value=0).state_dict())
    torch.manual_seed(1)
    small = small_convnext(num_classes=50, head_init_scale=0.01)
    assert 1e-4 < small.head.weight.std() < 3e-4


def test_gradient_checkpointing_changes_nothing():
    """With gradient checkpointing output and gradients are bitwise the same, drop path included."""
    x, model, results = tensor(1, (2, 3, 64, 64)), small_convnext(drop_path_rate=0.5), []
    for enable in (False, True):
        model.set_grad_checkpointing(enable)
        torch.manual_seed(3)
        y = model(x)
        results.append([y, *torch.autograd.grad(y.square().sum(), list(model.parameters()))])
    assert all(torch.equal(a, b) for a, b in zip(*results, strict=True))


def test_channels_last_gives_the_same():
    """The memory format does not change features."""
    model, x = small_convnext().eval(), tensor(1, (2, 3, 64, 64))
    expected = model(x)
    actual = model.to(memory_format=torch.channels_last)(x.to(memory_format=torch.channels_last))
    torch.testing.assert_close(actual, expected, rtol=1e-4, atol=1e-5)


def test_wrong_input_is_named():
    """An unknown mode and an image without a single position are ValueErrors that show the value."""
    with pytest.raises(ValueError, match="gep"):
        small_convnext("gep")
    with pytest.raises(ValueError, match=r"31x64.*32x32"):
        small_convnext()(torch.zeros(1, 3, 31, 64))


def test_masks_are_refused():
    """A convolutional backbone does not mask patches; it says so instead of ignoring the mask."""
    with pytest.raises(ValueError, match="ConvNeXt takes no mask"):
        small_convnext().forward_features(tensor(1, (1, 3, 32, 32)), torch.ones(1, 2, 2, dtype=torch.bool))


@pytest.mark.parametrize("mode", ["official", "simpool"])
def test_dense_features_are_those_of_the_separate_calls(mode):
    """One pass gives forward's feature, the positions of the last map and SimPool's map; masks are refused."""
    model, x = small_convnext(mode).eval(), tensor(1, (2, 3, 64, 96))
    pooled, positions, attention = model.forward_dense(x)
    assert torch.equal(pooled, model(x))
    torch.testing.assert_close(positions, model.norm(model.forward_features(x).flatten(2).transpose(1, 2)))
    assert (attention is None) == (mode == "official")
    if mode == "simpool":
        torch.testing.assert_close(attention, model.get_attention_map(x).flatten(2))
    assert model.forward_dense(x, need_attention=False)[2] is None
    with pytest.raises(ValueError, match="takes no mask"):
        model.forward_dense(x, torch.ones(2, 2, 3, dtype=torch.bool))
