"""SimPool: the published numbers, the paper's minimum, precision, and the hand-written backward."""

import ast
import sys
import warnings
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

import sp
from sp import SimPool
from tests.reference import assert_close, golden, golden_keys, tensor

CASES = [key for key in golden_keys("simpool/") if not key.endswith("per_image")]


def golden_pool(case: dict, value_min: str) -> SimPool:
    pool = SimPool(case["shape"][-1] if len(case["shape"]) == 3 else case["shape"][1],
                   gamma=case["gamma"], use_beta=case["use_beta"], value_min=value_min)  # fmt: skip
    pool.load_state_dict(case["state"], strict=True)
    return pool


def plain(pool: SimPool, x: Tensor) -> tuple[Tensor, Tensor]:
    """The layer's formula, one differentiable operation after the other."""
    x = x if x.ndim == 3 else x.flatten(2).transpose(1, 2)
    heads = (pool.num_heads, -1)
    normed = pool.norm_patches(x)
    query = pool.wq(x.mean(1)).unflatten(-1, heads)  # (B, h, d)
    key = pool.wk(normed).unflatten(-1, heads)  # (B, N, h, d)
    attention = torch.einsum("bhd,bnhd->bhn", query, key).mul(pool.scale).softmax(-1)
    if pool.gamma is None:
        pooled = torch.einsum("bhn,bnhd->bhd", attention, normed.unflatten(-1, heads)).flatten(1)
    else:
        lowest = normed.min() if pool.value_min == "batch" else normed.amin((1, 2), keepdim=True)
        values = (normed - lowest + 1e-6).pow(pool.gamma).unflatten(-1, heads)
        pooled = torch.einsum("bhn,bnhd->bhd", attention, values).flatten(1).pow(1 / pool.gamma)
    return pooled + (0 if pool.beta is None else pool.beta), attention


@pytest.mark.parametrize("key", CASES)
def test_published_numbers(key):
    """Output and input gradient are the published code's, with its minimum over the batch."""
    case = golden(key)
    x = case["x"].clone().requires_grad_()
    y = golden_pool(case, "batch")(x)
    assert_close(y.detach(), case["y"], what="output")
    (y * tensor(2, y.shape)).sum().backward()
    assert_close(x.grad, case["grad_x"], rel=1e-4, what="gradient")


def test_minimum_per_image_is_the_default_and_matches_each_image_alone():
    """By default a batch is pooled to what the published code gives for each image alone."""
    case, settings = golden("simpool/tokens_1.25_beta_per_image"), golden("simpool/tokens_1.25_beta")
    assert_close(golden_pool(settings, SimPool(8).value_min)(case["x"]), case["y"])


@pytest.mark.parametrize("gamma", [None, 1.25, 2.0])
def test_feature_is_independent_of_batch_mates(gamma):
    """An image's feature is bitwise the same whatever shares its batch."""
    pool, images = SimPool(16, gamma=gamma), tensor(3, (3, 10, 16))
    extreme = torch.cat([images[:1], 100 * images[1:]])
    assert torch.equal(pool(images)[0], pool(extreme)[0])


def test_batch_minimum_depends_on_batch_mates():
    """With value_min="batch" a batch mate with a lower minimum moves the feature, as in the published code."""
    pool, images = SimPool(16, gamma=2.0, value_min="batch"), tensor(3, (2, 10, 16))
    images[1, 0, 0] = -50.0
    assert not torch.allclose(pool(images)[0], pool(images[:1])[0], rtol=1e-4)


@pytest.mark.parametrize("shape", [(1, 5, 16), (1, 16, 3, 2), (1, 1, 16)])
def test_batch_of_one_keeps_its_dimension(shape):
    """One image gives (1, D) and attention (1, heads, N) that sums to one."""
    pooled, attention = SimPool(16, num_heads=2, gamma=2.0)(tensor(1, shape), return_attention=True)
    assert pooled.shape == (1, 16)
    assert attention.shape == (1, 2, shape[1] if len(shape) == 3 else shape[2] * shape[3])
    torch.testing.assert_close(attention.sum(-1), torch.ones(1, 2))


def test_empty_batch_gives_empty_features():
    """No images give (0, D), and backward runs."""
    x = torch.zeros(0, 4, 8, requires_grad=True)
    pooled = SimPool(8, gamma=2.0)(x)
    pooled.sum().backward()
    assert pooled.shape == (0, 8)


def test_map_and_its_tokens_give_the_same():
    """A map is pooled like its positions numbered row by row, in either memory format."""
    pool, maps = SimPool(16, gamma=2.0), tensor(1, (2, 16, 3, 5))
    expected = pool(maps.flatten(2).transpose(1, 2).contiguous(), return_attention=True)
    for image in (maps, maps.to(memory_format=torch.channels_last)):
        for actual, wanted in zip(pool(image, return_attention=True), expected, strict=True):
            torch.testing.assert_close(actual, wanted)


@pytest.mark.parametrize("heads", [1, 3])
@pytest.mark.parametrize("gamma", [None, 1.25, 2.0, 0.7])
@pytest.mark.parametrize("value_min", ["image", "batch"])
def test_equals_the_plain_formula_with_all_gradients(heads, gamma, value_min, monkeypatch):
    """Folded keys and the hand-written backward give the plain formula's outputs and gradients."""
    monkeypatch.setitem(sp.GROUP_ELEMENTS, "cpu", 2 * 7 * 12)  # several groups, the last one smaller
    pool = SimPool(12, num_heads=heads, qkv_bias=True, gamma=gamma, use_beta=True, value_min=value_min).double()
    nn.init.normal_(pool.norm_patches.weight, 1.0, 0.3)
    nn.init.normal_(pool.norm_patches.bias)
    x = tensor(4, (5, 7, 12)).double().requires_grad_()
    inputs = [x, *pool.parameters()]
    results = []
    for pooled, attention in (pool(x, return_attention=True), plain(pool, x)):
        total = (pooled * tensor(5, pooled.shape)).sum() + (attention * tensor(6, attention.shape)).sum()
        results.append([pooled, attention, *torch.autograd.grad(total, inputs)])
    for actual, wanted in zip(*results, strict=True):
        torch.testing.assert_close(actual, wanted, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize(("heads", "gamma"), [(1, 1.25), (2, 2.0), (1, None)])
def test_gradcheck(heads, gamma):
    """Numerical differentiation in float64 confirms the backward."""
    pool = SimPool(8, num_heads=heads, gamma=gamma).double()
    x = tensor(7, (2, 4, 8)).double().requires_grad_()
    assert torch.autograd.gradcheck(lambda x: pool(x, return_attention=True), (x,))


@pytest.mark.parametrize(("shape", "gamma"), [((8, 196, 64), 1.25), ((8, 128, 7, 7), 2.0)])
def test_float32_gradients_within_1e_5(shape, gamma):
    """In float32 all gradients are within 1e-5 (relative norm) of the plain formula in float64."""
    pool = SimPool(shape[-1] if len(shape) == 3 else shape[1], gamma=gamma)
    grads = []
    for dtype, forward in ((torch.float32, pool), (torch.float64, lambda x: plain(pool, x)[0])):
        pool.to(dtype)
        x = tensor(8, shape).to(dtype).requires_grad_()
        pooled = forward(x)
        loss = (pooled * tensor(9, pooled.shape).to(dtype)).sum()
        grads.append(torch.autograd.grad(loss, [x, *pool.parameters()]))
    for actual, wanted in zip(*grads, strict=True):
        assert (actual - wanted).norm() <= 1e-5 * wanted.norm()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_power_stage_stays_float32_under_autocast(dtype):
    """Under autocast the result is bitwise that of float32, and finite for values that float16 loses."""
    pool, x = SimPool(16, gamma=2.0), tensor(1, (2, 9, 16)).requires_grad_()
    expected = pool(x)
    with torch.autocast("cpu", dtype=dtype):
        actual = pool(x)
    assert torch.equal(actual, expected)
    constant = torch.ones(2, 9, 16, dtype=dtype, requires_grad=True)  # every value is eps: eps^2 is 0 in float16
    pool(constant).sum().backward()
    assert constant.grad.dtype == dtype
    assert constant.grad.isfinite().all()


def test_half_precision_module_returns_its_dtype():
    """A module converted to bfloat16 pools bfloat16 input in float32 and returns bfloat16."""
    pool, x = SimPool(16, gamma=1.25), tensor(1, (2, 9, 16)).bfloat16()
    pool.bfloat16()
    pooled = pool(x)
    assert pooled.dtype == torch.bfloat16
    torch.testing.assert_close(pooled.float(), pool.float()(x.float()), rtol=0.02, atol=0.02)


def test_backward_keeps_little_more_than_the_input():
    """Besides the weights the layer keeps for backward its input and less than a tenth of it."""
    pool, x = SimPool(32, gamma=1.25), tensor(1, (4, 196, 32)).requires_grad_()
    kept = {}
    weights = {parameter.untyped_storage().data_ptr() for parameter in pool.parameters()}

    def pack(saved: Tensor) -> Tensor:
        kept[saved.untyped_storage().data_ptr()] = saved.untyped_storage().nbytes()
        return saved

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda saved: saved):
        pool(x)
    size = sum(n for pointer, n in kept.items() if pointer not in weights)
    assert x.untyped_storage().data_ptr() in kept
    assert size <= 1.1 * x.untyped_storage().nbytes()


def test_one_layer_used_twice_adds_its_gradients():
    """Two uses in one graph, as with crops of two resolutions, accumulate the gradients of both."""
    pool, a, b = SimPool(8, gamma=1.25), tensor(1, (2, 9, 8)), tensor(2, (3, 4, 8))
    apart = [torch.autograd.grad(pool(x).square().sum(), pool.wk.weight)[0] for x in (a, b)]
    together = torch.autograd.grad(pool(a).square().sum() + pool(b).square().sum(), pool.wk.weight)[0]
    torch.testing.assert_close(together, apart[0] + apart[1])


def test_frozen_weights_still_pass_gradients_to_the_input():
    """With all parameters frozen the input's gradient is unchanged."""
    pool, x = SimPool(8, gamma=1.25), tensor(1, (2, 9, 8)).requires_grad_()
    (expected,) = torch.autograd.grad(pool(x).square().sum(), x)
    (actual,) = torch.autograd.grad(pool.requires_grad_(False)(x).square().sum(), x)
    assert torch.equal(actual, expected)


@pytest.mark.parametrize("gamma", [1.25, None])
def test_traced_for_any_number_of_images(gamma):
    """A TorchScript graph of the layer, traced on two images, gives the layer's numbers for other batches."""
    pool = SimPool(16, num_heads=2, gamma=gamma, use_beta=gamma is not None)
    with torch.no_grad(), warnings.catch_warnings():
        warnings.simplefilter("ignore")  # torch's, on its own format
        traced = torch.jit.trace(pool, torch.rand(2, 6, 16), check_trace=False)
        for batch in (1, 5):
            x = torch.randn(batch, 6, 16)
            assert torch.allclose(traced(x), pool(x), atol=1e-6)


def test_captured_whole_by_the_compiler():
    """torch.compile traces forward and backward without a graph break and without changing the numbers."""
    pool, x = SimPool(8, gamma=1.25, use_beta=True), tensor(1, (2, 9, 8)).requires_grad_()
    compiled = torch.compile(pool, fullgraph=True, backend="aot_eager")
    inputs = [x, *pool.parameters()]
    for actual, wanted in zip(
        *(torch.autograd.grad(f(x).square().sum(), inputs) for f in (compiled, pool)), strict=True
    ):
        torch.testing.assert_close(actual, wanted)


def test_beta_is_added_to_every_feature():
    """The learned scalar moves all of a pooled feature alike."""
    pool, x = SimPool(8, gamma=2.0, use_beta=True), tensor(0, (2, 5, 8))
    without = pool(x)
    with torch.no_grad():
        pool.beta.fill_(0.7)
    torch.testing.assert_close(pool(x), without + 0.7)


def test_beta_only_with_gamma():
    """beta is a parameter of shape (1,) where gamma and use_beta are set, and absent otherwise."""
    assert SimPool(8, gamma=2.0, use_beta=True).state_dict()["beta"].shape == (1,)
    for settings in ({"use_beta": True}, {"gamma": 2.0}):
        assert "beta" not in SimPool(8, **settings).state_dict()


@pytest.mark.parametrize("shape", [(8,), (4, 8), (2, 5, 7), (2, 7, 3, 3), (2, 0, 8), (1, 2, 3, 4, 8)])
def test_wrong_input_is_named(shape):
    """Another rank or width is a ValueError that shows the shape."""
    with pytest.raises(ValueError, match=r"SimPool .*\(" + ", ".join(map(str, shape))):
        SimPool(8)(torch.zeros(shape))


@pytest.mark.parametrize("settings", [{"num_heads": 3}, {"gamma": 0.0}, {"gamma": -1.0}, {"value_min": "pixel"}])
def test_wrong_settings_are_named(settings):
    """A setting that cannot be honoured is a ValueError that shows its value."""
    with pytest.raises(ValueError, match=str(next(iter(settings.values())))):
        SimPool(8, **settings)


def test_file_needs_only_torch():
    """sp.py imports the standard library and torch only, so that it can be copied into any project."""
    tree = ast.parse(Path(sp.__file__).read_text())
    imported = {a.name.split(".")[0] for n in ast.walk(tree) if isinstance(n, ast.Import) for a in n.names}
    imported |= {n.module.split(".")[0] for n in ast.walk(tree) if isinstance(n, ast.ImportFrom)}
    assert imported <= {"torch"} | sys.stdlib_module_names


@pytest.mark.parametrize(("heads", "bias"), [(1, False), (3, True)])
@pytest.mark.parametrize("gamma", [None, 1.25])
def test_from_timm(heads, bias, gamma):
    """timm's layer by its own weights: its numbers without gamma; with gamma those of its formula for the image.

    timm subtracts each channel's minimum over the positions, the paper and this layer the image's.
    """
    from timm.layers import SimPool1d, SimPool2d

    x = torch.randn(2, 12, 24)
    maps = x.transpose(1, 2).unflatten(2, (3, 4))
    for theirs, inputs in ((SimPool1d, x), (SimPool2d, maps)):
        module = theirs(24, num_heads=heads, qkv_bias=bias, gamma=gamma).eval()
        torch.nn.init.normal_(module.norm.weight, 1.0, 0.3)
        torch.nn.init.normal_(module.norm.bias, 0.0, 0.3)
        pool = SimPool.from_timm(module)
        assert not pool.training
        with torch.no_grad():
            values = module.norm(x)
            split = lambda t: t.unflatten(-1, (heads, -1)).transpose(1, 2)  # noqa: E731 (B, h, N, d)
            logits = split(module.q(x.mean(1, keepdim=True))) @ split(module.k(values)).transpose(-1, -2)
            attention = (logits * module.scale).softmax(-1)
            if gamma is None:
                expected = module(inputs)
            else:
                shifted = split(values - values.amin((1, 2), keepdim=True) + 1e-6)
                expected = (attention @ shifted.pow(gamma)).pow(1 / gamma).transpose(1, 2).flatten(1)
                assert not torch.allclose(module(inputs), expected, atol=1e-2)
            pooled, weights = pool(inputs, return_attention=True)
        assert_close(pooled, expected)
        assert_close(weights, attention[:, :, 0])


def test_from_timm_refuses_what_it_cannot_hold():
    """Normed queries, another norm and another module are named."""
    from timm.layers import RmsNorm, SimPool1d

    for module, message in (
        (SimPool1d(24, qk_norm=True), "qk_norm=False"),
        (SimPool1d(24, norm_layer=RmsNorm), "must be a LayerNorm"),
        (nn.Linear(4, 4), "Linear has no norm"),
    ):
        with pytest.raises(ValueError, match=message):
            SimPool.from_timm(module)
