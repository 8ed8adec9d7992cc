"""Vision transformers: published numbers and names, sizes, position policies, and DINO's script interface."""

from functools import partial

import pytest
import torch
from torch import nn

import vision_transformer as vits
from tests.distill.attmask import attmask_golden
from tests.reference import assert_close, fill_, golden, golden_keys, tensor


def small_vit(mode: str = "official", **settings) -> vits.VisionTransformer:
    defaults = {"img_size": [64], "patch_size": 8, "embed_dim": 48, "depth": 3, "num_heads": 3, "qkv_bias": True}
    return fill_(vits.VisionTransformer(mode=mode, **{**defaults, **settings})).eval()


@pytest.mark.parametrize("key", golden_keys("vit/"))
def test_published_numbers_and_names(key):
    """Features and state-dict names are the published model's, at the native size and at another."""
    mode, gamma, _ = key.removeprefix("vit/").split("_")
    gamma = None if gamma == "None" else float(gamma)
    case = golden(key)
    model = small_vit(mode, gamma=gamma, pos_embed_policy="reference", value_min="batch")
    assert sorted(model.state_dict()) == sorted(case["keys"])
    assert_close(model(case["x"]).detach(), case["y"])


@pytest.mark.parametrize(
    ("arch", "mode", "count"),
    [("vit_small", "official", 21_665_664), ("vit_small", "simpool", 21_960_577), ("vit_tiny", "official", 5_524_416),
     ("vit_base", "official", 85_798_656)],
)  # fmt: skip
def test_parameter_counts(arch, mode, count):
    """The presets have the published numbers of parameters."""
    with torch.device("meta"):
        model = vits.__dict__[arch](mode, patch_size=16)
    assert sum(p.numel() for p in model.parameters()) == count


def test_presets_can_be_overridden():
    """Width, depth and heads given by keyword win over the preset."""
    model = vits.vit_small("simpool", patch_size=4, img_size=16, embed_dim=24, depth=2, num_heads=2)
    assert model.num_features == model.embed_dim == 24
    assert len(model.blocks) == 2
    assert model.blocks[0].attn.num_heads == 2


@pytest.mark.parametrize("mode", ["official", "simpool"])
@pytest.mark.parametrize("size", [(64, 64), (32, 32), (40, 72), (8, 64), (128, 16)])
def test_any_divisible_size(mode, size):
    """Features, tokens and maps come out right at square and non-square sizes, and for a batch of one."""
    model, grid = small_vit(mode), (size[0] // 8, size[1] // 8)
    tokens = grid[0] * grid[1] + (mode == "official")
    for batch in (1, 2):
        x = tensor(1, (batch, 3, *size))
        assert model(x).shape == (batch, 48)
        assert model.forward_features(x).shape == (batch, tokens, 48)
        assert model.get_attention_map(x).shape == (batch, 3 if mode == "official" else 1, *grid)


@pytest.mark.parametrize("patch_size", [2, 5, 14])
def test_any_patch_size(patch_size):
    """Patches of unusual size cover the image."""
    model = small_vit("simpool", patch_size=patch_size, img_size=patch_size * 3)
    assert model(tensor(1, (2, 3, patch_size * 3, patch_size * 2))).shape == (2, 48)


def test_non_square_native_size():
    """A model whose native size is not square leaves its positions untouched there."""
    model = small_vit("simpool", img_size=(16, 32))
    assert model.interpolate_pos_encoding(torch.zeros(1, 8, 48), 16, 32) is model.pos_embed
    assert model(tensor(1, (1, 3, 32, 16))).shape == (1, 48)


@pytest.mark.parametrize("size", [(60, 64), (64, 4), (0, 64)])
def test_indivisible_size_is_named(size):
    """An image that the patches don't fill is a ValueError with its size, the patch size and a size that works."""
    with pytest.raises(ValueError, match=f"{size[0]}x{size[1]}.*size 8; resize or crop to .*64"):
        small_vit()(torch.zeros(1, 3, *size))


def test_position_policies():
    """At the native size "exact" and official leave positions alone while "reference" resamples them."""
    tokens = torch.zeros(1, 64, 48)
    exact, reference = (small_vit("simpool", pos_embed_policy=p) for p in vits.POS_EMBED_POLICIES)
    assert exact.interpolate_pos_encoding(tokens, 64, 64) is exact.pos_embed
    assert small_vit().interpolate_pos_encoding(torch.zeros(1, 65, 48), 64, 64).shape == (1, 65, 48)
    resampled = reference.interpolate_pos_encoding(tokens, 64, 64)
    assert resampled.shape == (1, 64, 48)
    assert (resampled - reference.pos_embed).norm() > 0.01 * reference.pos_embed.norm()


def test_exact_policy_samples_the_whole_grid():
    """Off the native size "exact" is the bicubic resize to the grid, corner to corner."""
    model = small_vit("simpool")
    grid = model.pos_embed.unflatten(1, (8, 8)).permute(0, 3, 1, 2)
    expected = nn.functional.interpolate(grid, size=(4, 6), mode="bicubic").flatten(2).transpose(1, 2)
    torch.testing.assert_close(model.interpolate_pos_encoding(torch.zeros(1, 24, 48), 32, 48), expected)


def test_policy_does_not_concern_official_mode():
    """Official mode computes the same under either policy."""
    x = tensor(1, (1, 3, 32, 64))
    assert torch.equal(*(small_vit("official", pos_embed_policy=p)(x) for p in vits.POS_EMBED_POLICIES))


def test_gamma_and_value_min_reach_the_pooling():
    """gamma and value_min given to the model are SimPool's, and beta comes with gamma."""
    model = small_vit("simpool", gamma=2.0, value_min="batch")
    assert (model.simpool.gamma, model.simpool.value_min) == (2.0, "batch")
    assert "simpool.beta" in model.state_dict()
    assert "simpool.beta" not in small_vit("simpool", gamma=None).state_dict()


def test_dino_scripts_work():
    """What DINO's scripts do works: building by name, attention, intermediate layers, a hook on the last qkv."""
    model = vits.__dict__["vit_tiny"](patch_size=16, num_classes=0, img_size=[32]).eval()
    x, seen = tensor(1, (2, 3, 32, 32)), {}
    model._modules["blocks"][-1]._modules["attn"]._modules["qkv"].register_forward_hook(
        lambda module, inputs, output: seen.update(qkv=output)
    )
    attention = model.get_last_selfattention(x)
    assert attention.shape == (2, 3, 5, 5)
    torch.testing.assert_close(attention.sum(-1), torch.ones(2, 3, 5))
    query, key, _ = seen["qkv"].reshape(2, 5, 3, 3, 64).permute(2, 0, 3, 1, 4)
    torch.testing.assert_close((query @ key.transpose(-2, -1) * 64**-0.5).softmax(-1), attention)
    layers = model.get_intermediate_layers(x, n=4)
    assert [layer.shape for layer in layers] == [(2, 5, 192)] * 4
    torch.testing.assert_close(layers[-1][:, 0], model(x))
    assert model.patch_embed.patch_size == 16
    assert model.patch_embed.num_patches == 4
    y, probabilities = model.blocks[0].attn(torch.zeros(1, 5, 192))
    assert y.shape == (1, 5, 192)
    assert probabilities.shape == (1, 3, 5, 5)


def test_intermediate_layers_are_bounded():
    """Asking for more layers than there are blocks is a ValueError that gives their number."""
    with pytest.raises(ValueError, match="3 blocks"):
        small_vit().get_intermediate_layers(torch.zeros(1, 3, 64, 64), n=4)


def test_attention_map_is_what_pools():
    """SimPool's map weighs the tokens: without gamma, map-weighted normed tokens through the norm are the feature."""
    model, x = small_vit("simpool", gamma=None), tensor(1, (2, 3, 32, 64))
    weights = model.get_attention_map(x).flatten(2)  # (B, 1, N)
    torch.testing.assert_close(weights.sum(-1), torch.ones(2, 1))
    tokens = model.simpool.norm_patches(model.forward_features(x))
    torch.testing.assert_close(model.norm((weights @ tokens).squeeze(1)), model(x))


def test_kernels_agree(monkeypatch):
    """The fused kernel, used for long inference on CPU, gives what the explicit softmax gives."""
    model, x = small_vit(), tensor(1, (2, 3, 64, 64))
    calls, fused = [], nn.functional.scaled_dot_product_attention
    monkeypatch.setattr(vits.F, "scaled_dot_product_attention", lambda *a, **k: calls.append(1) or fused(*a, **k))
    with torch.no_grad():
        explicit = model(x)
        assert not calls
        monkeypatch.setattr(vits, "CPU_FUSED_FROM", 65)
        torch.testing.assert_close(model(x), explicit)
    assert len(calls) == 3
    model(x)  # with gradients the explicit one again
    assert len(calls) == 3


@pytest.mark.parametrize("mode", ["official", "simpool"])
def test_gradient_checkpointing_changes_nothing(mode):
    """With gradient checkpointing output and gradients are bitwise the same, drop path included."""
    x, results = tensor(1, (2, 3, 64, 64)), []
    for enable in (False, True):
        model = small_vit(mode, drop_path_rate=0.5).train()
        model.set_grad_checkpointing(enable)
        torch.manual_seed(3)
        y = model(x)
        results.append([y, *torch.autograd.grad(y.square().sum(), list(model.parameters()))])
    assert all(torch.equal(a, b) for a, b in zip(*results, strict=True))


def test_drop_path_keeps_the_mean():
    """Drop path zeroes whole images at its rate, scales the rest, and does nothing in eval."""
    x = torch.ones(4000, 2, 3)
    layer = vits.DropPath(0.25)
    y = layer(x)
    assert y.unique().tolist() == pytest.approx([0.0, 4 / 3])
    assert (y == y[:, :1, :1]).all()
    assert abs(y.mean().item() - 1) < 0.05
    assert torch.equal(layer.eval()(x), x)
    rates = [getattr(b.drop_path, "drop_prob", 0.0) for b in small_vit(drop_path_rate=0.2).blocks]
    assert rates == pytest.approx([0.0, 0.1, 0.2])


def test_initialisation():
    """Linear weights, positions and the token start at a deviation of .02, biases at 0, norms at 1."""
    model = vits.VisionTransformer("official", img_size=32, patch_size=4, embed_dim=96, depth=1, num_heads=2)
    for weight in (model.blocks[0].attn.qkv.weight, model.blocks[0].mlp.fc1.weight, model.pos_embed):
        assert 0.018 < weight.std() < 0.022
    assert model.blocks[0].mlp.fc1.bias.abs().max() == 0
    assert (model.norm.weight == 1).all()


def test_classifier():
    """num_classes adds a linear head on the features."""
    model = small_vit(num_classes=7)
    assert model(torch.zeros(2, 3, 64, 64)).shape == (2, 7)


@pytest.mark.parametrize(
    "settings", [{"mode": "gep"}, {"pos_embed_policy": "near"}, {"num_heads": 5}, {"patch_size": 0}, {"img_size": 60}]
)
def test_wrong_settings_are_named(settings):
    """A setting that cannot be honoured is a ValueError that shows its value."""
    with pytest.raises(ValueError, match=str(next(iter(settings.values())))):
        small_vit(**settings)


def test_bfloat16_module_and_autocast():
    """A module in bfloat16 and autocast both give features near float32's, at a size that resamples positions."""
    model, x = small_vit("simpool"), tensor(1, (2, 3, 32, 32))
    expected = model(x)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        torch.testing.assert_close(model(x).float(), expected, atol=0.1, rtol=0.05)
    torch.testing.assert_close(model.bfloat16()(x.bfloat16()).float(), expected, atol=0.1, rtol=0.05)


def test_compiled_whole():
    """The compiler captures the model without a graph break, with the same numbers."""
    model, x = small_vit("simpool", depth=1), tensor(1, (2, 3, 64, 64))
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(compiled(x), model(x))


def test_other_norm_layer():
    """norm_layer replaces every norm of the transformer."""
    model = small_vit(norm_layer=partial(nn.LayerNorm, eps=1e-3))
    assert {m.eps for m in model.modules() if isinstance(m, nn.LayerNorm)} == {1e-3}


@pytest.mark.parametrize("mode", ["official", "simpool"])
@pytest.mark.parametrize("size", [(32, 32), (40, 72), (96, 64)])
def test_positions_resampled_by_matrix_are_the_interpolated_ones(monkeypatch, mode, size):
    """What CUDA does under deterministic algorithms, run here: the same positions and gradients, but for rounding."""
    model = vits.VisionTransformer(mode, img_size=[64], patch_size=8, embed_dim=12, depth=1, num_heads=2)
    tokens = torch.zeros(1, 1, 12)
    expected = model.interpolate_pos_encoding(tokens, *size)
    (expected_grad,) = torch.autograd.grad(expected.square().sum(), model.pos_embed)
    monkeypatch.setattr(vits, "_lacks_backward", lambda device: True)
    found = model.interpolate_pos_encoding(tokens, *size)
    (grad,) = torch.autograd.grad(found.square().sum(), model.pos_embed)
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(grad, expected_grad, rtol=1e-5, atol=1e-6)


def test_published_numbers_with_masks():
    """Tokens of masked images, and the state dict's names, are those of the published iBOT model."""
    case = attmask_golden()["masked_vit"]
    model = small_vit(img_size=[32], masked_im_modeling=True)
    assert sorted(model.state_dict()) == sorted(case["keys"])
    for mask in (case["mask"], case["mask"].flatten(1)):
        assert_close(model.norm(model.forward_features(case["x"], mask)).detach(), case["tokens"])


@pytest.mark.parametrize("mode", ["official", "simpool"])
def test_masked_patches_are_not_seen(mode):
    """What lies under the mask changes nothing, at any size; an empty mask is none; masked_embed is trained."""
    model = small_vit(mode, masked_im_modeling=True)
    x = tensor(1, (2, 3, 32, 48))
    mask = torch.zeros(2, 4, 6, dtype=torch.bool)
    assert torch.equal(model.forward_features(x, mask), model.forward_features(x))
    mask[0, 1:3, 2:5] = True
    other = torch.where(mask.repeat_interleave(8, 1).repeat_interleave(8, 2)[:, None], torch.ones(()), x)
    tokens = model.forward_features(x, mask)
    assert torch.equal(model.forward_features(other, mask), tokens)
    assert not torch.equal(model.forward_features(other), model.forward_features(x))
    tokens.square().sum().backward()
    assert model.masked_embed.grad.any()


@pytest.mark.parametrize("mode", ["official", "simpool"])
def test_masked_im_modeling_adds_one_parameter(mode):
    """It is masked_embed, zeros; the others' names and initial values stay as they are."""
    settings = {"img_size": 16, "patch_size": 8, "embed_dim": 12, "depth": 1, "num_heads": 3}
    torch.manual_seed(4)
    plain = vits.VisionTransformer(mode, **settings).state_dict()
    torch.manual_seed(4)
    masked = vits.VisionTransformer(mode, masked_im_modeling=True, **settings).state_dict()
    assert torch.equal(masked.pop("masked_embed"), torch.zeros(1, 12))
    assert list(masked) == list(plain)
    assert all(torch.equal(masked[name], plain[name]) for name in plain)


def test_masks_that_do_not_fit():
    """A model without masked_embed, and masks of another grid or dtype, are refused by name."""
    x, mask = tensor(1, (2, 3, 32, 32)), torch.ones(2, 4, 4, dtype=torch.bool)
    with pytest.raises(ValueError, match="masked_im_modeling=True"):
        small_vit().forward_features(x, mask)
    model = small_vit(masked_im_modeling=True)
    for bad in (mask[:1], mask[:, :3], mask.float()):
        with pytest.raises(ValueError, match="does not fit 2 images of 16 patches"):
            model.forward_features(x, bad)


@pytest.mark.parametrize("mode", ["official", "simpool"])
def test_dense_features_are_those_of_the_separate_calls(mode):
    """One pass gives forward's feature, the normed patches and the attention map; without the map the same features."""
    model, x = small_vit(mode, masked_im_modeling=True).eval(), tensor(1, (2, 3, 32, 48))
    pooled, patches, attention = model.forward_dense(x)
    torch.testing.assert_close(pooled, model(x), rtol=0, atol=0)
    torch.testing.assert_close(patches, model.norm(model.forward_features(x))[:, model.num_prefix_tokens :])
    assert patches.shape == (2, 24, 48)
    torch.testing.assert_close(attention, model.get_attention_map(x).flatten(2), rtol=1e-5, atol=1e-7)
    plain = model.forward_dense(x, need_attention=False)
    assert plain[2] is None
    assert torch.equal(plain[0], pooled)
    assert torch.equal(plain[1], patches)

    mask = tensor(2, (2, 4, 6)) > 0
    masked_pooled, masked_patches, _ = model.forward_dense(x, mask)
    normed = model.norm(model.forward_features(x, mask))[:, model.num_prefix_tokens :]
    torch.testing.assert_close(masked_patches, normed)
    assert not torch.allclose(masked_pooled, pooled)


@pytest.mark.parametrize("mode", ["official", "simpool"])
def test_dense_features_compute_each_layer_once(mode):
    """No block, and in no block the queries, keys and values, are computed twice for the map's sake."""
    model, calls = small_vit(mode), []
    for block in model.blocks:
        block.register_forward_hook(lambda *_: calls.append("block"))
        block.attn.qkv.register_forward_hook(lambda *_: calls.append("qkv"))
    model.forward_dense(tensor(1, (1, 3, 32, 32)))
    assert sorted(calls) == ["block"] * len(model.blocks) + ["qkv"] * len(model.blocks)


@pytest.mark.parametrize("mode", ["official", "simpool"])
def test_dense_features_with_checkpointed_blocks(mode):
    """Recomputing the blocks in backward changes no gradient, those through the attention included."""
    x, grads = tensor(1, (2, 3, 32, 32)), []
    for checkpointed in (False, True):
        model = small_vit(mode)
        model.set_grad_checkpointing(checkpointed)
        pooled, patches, attention = model.forward_dense(x)
        (pooled.square().sum() + patches.sin().sum() + attention.square().sum()).backward()
        grads.append([p.grad for p in model.blocks.parameters()])
    assert all(torch.equal(one, other) for one, other in zip(*grads, strict=True))


def test_dense_features_never_hold_a_whole_attention_of_an_inference(monkeypatch):
    """For long sequences without gradients the fused kernel runs in every block, and one row is computed beside it."""
    model, x, shapes = small_vit(), tensor(1, (1, 3, 192, 192)), []  # 577 tokens
    explicit = vits.attention_weights
    monkeypatch.setattr(vits, "attention_weights", lambda *a: shapes.append(explicit(*a).shape) or explicit(*a))
    with torch.no_grad():
        model.forward_dense(x)
    assert shapes == [(1, 3, 1, 577)]
