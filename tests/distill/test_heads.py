"""DINO's and iBOT's heads: published numbers and names, frozen norms, unit bottleneck, shared prototypes."""

import copy

import pytest
import torch
from torch import nn

from distill.heads import DINOHead, WeightNormLinear, iBOTHead
from tests.distill.attmask import attmask_golden
from tests.reference import assert_close, fill_, golden, tensor


def small_head(**settings) -> DINOHead:
    return DINOHead(48, 256, hidden_dim=64, bottleneck_dim=32, **settings)


def small_ibot_head(**settings) -> iBOTHead:
    return iBOTHead(48, 128, 96, hidden_dim=64, bottleneck_dim=32, **settings)


def test_published_numbers_and_names():
    """Logits and state-dict names are the published head's."""
    case = golden("head")
    head = fill_(small_head())
    assert sorted(head.state_dict()) == sorted(case["keys"])
    assert_close(head(case["x"]).detach(), case["y"])


@pytest.mark.parametrize(("use_bn", "linears", "norms"), [(False, (0, 2, 4), ()), (True, (0, 3, 6), (1, 4))])
def test_layer_numbers(use_bn, linears, norms):
    """The MLP's layers carry DINO's numbers with and without BatchNorm."""
    kinds = {int(n): type(m) for n, m in small_head(use_bn=use_bn).mlp.named_children()}
    assert tuple(n for n, kind in kinds.items() if kind is nn.Linear) == linears
    assert tuple(n for n, kind in kinds.items() if kind is nn.BatchNorm1d) == norms


def test_frozen_norms():
    """weight_g is 1, and trained only without norm_last_layer."""
    assert not small_head().last_layer.weight_g.requires_grad
    free = small_head(norm_last_layer=False)
    assert torch.equal(free.last_layer.weight_g, torch.ones(256, 1))
    free(tensor(1, (3, 48))).square().sum().backward()
    assert free.last_layer.weight_g.grad.abs().max() > 0


def test_prototypes_have_their_norm():
    """The effective weight's rows have norm weight_g whatever weight_v's length, and forward uses it."""
    layer = WeightNormLinear(8, 5, train_scale=True)
    with torch.no_grad():
        layer.weight_v *= 7
        layer.weight_g.copy_(torch.arange(1.0, 6.0)[:, None])
    torch.testing.assert_close(layer.weight.norm(dim=1), torch.arange(1.0, 6.0))
    x = tensor(1, (3, 8))
    torch.testing.assert_close(layer(x), x @ layer.weight.T)


def test_bottleneck_is_of_unit_length_and_feeds_the_prototypes():
    """bottleneck() gives float32 unit vectors, also under autocast, and last_layer of it is forward."""
    head, x = small_head(), tensor(1, (4, 48))
    torch.testing.assert_close(head.bottleneck(x).norm(dim=-1), torch.ones(4))
    assert torch.equal(head.last_layer(head.bottleneck(x)), head(x))
    with torch.autocast("cpu", dtype=torch.bfloat16):
        inside = head.bottleneck(x)
    assert inside.dtype == torch.float32
    torch.testing.assert_close(inside.norm(dim=-1), torch.ones(4))


def test_deep_copy_and_current_torch_names():
    """A head can be copied, and loads the names that torch's current weight norm writes."""
    head = small_head()
    state = copy.deepcopy(head).state_dict()
    for old, new in (("weight_g", "original0"), ("weight_v", "original1")):
        state[f"last_layer.parametrizations.weight.{new}"] = state.pop(f"last_layer.{old}")
    other = small_head()
    other.load_state_dict(state, strict=True)
    assert torch.equal(other.last_layer.weight_v, head.last_layer.weight_v)


@pytest.mark.parametrize("layers", [1, 2, 4])
def test_number_of_layers(layers):
    """nlayers counts the MLP's linear layers; their biases start at 0 and their weights at a deviation of .02."""
    head = small_head(nlayers=layers)
    linears = [m for m in head.mlp.modules() if isinstance(m, nn.Linear)]
    assert len(linears) == layers
    assert all(m.bias.abs().max() == 0 and 0.015 < m.weight.std() < 0.025 for m in linears)
    assert head(tensor(1, (2, 48))).shape == (2, 256)


def test_published_numbers_and_names_of_the_shared_head():
    """[CLS], patch and local logits, and the state dict's names, are the published head's."""
    case = attmask_golden()["head_shared"]
    head = small_ibot_head(shared_head=True, norm_last_layer=False)
    assert sorted(head.state_dict()) == sorted(case["keys"])
    state = fill_(DINOHead(48, 128, hidden_dim=64, bottleneck_dim=32)).state_dict()
    state |= {name.replace("layer.", "layer2."): x for name, x in state.items() if name.startswith("last_layer.")}
    head.load_state_dict(state)
    cls, patch = head(case["x"])
    for name, value in (("cls", cls), ("patch", patch), ("local", head(case["x"][:, 0]))):
        assert_close(value.detach(), case[name], what=name)


def test_shared_prototypes_are_one_layer():
    """With shared_head last_layer2 is last_layer, also after a copy; its parameters count once."""
    head = copy.deepcopy(small_ibot_head(shared_head=True))
    assert head.last_layer2 is head.last_layer
    assert len(list(head.parameters())) == len(list(small_head().parameters()))
    assert head(tensor(1, (2, 5, 48)))[1].shape == (2, 4, 128)
    split = small_ibot_head().state_dict()
    head = small_ibot_head(shared_head=True)
    split |= {name: torch.full_like(head.last_layer.weight_v, 3.0) for name in ("last_layer2.weight_v",)}
    split["last_layer2.weight_g"] = torch.ones(128, 1)
    head.load_state_dict(split)
    assert (head.last_layer.weight_v == 3).all()  # the value that is loaded last


def test_two_layers_of_prototypes():
    """Without shared_head patches have prototypes of their own, frozen in norm like those of [CLS]."""
    head, x = small_ibot_head(), tensor(1, (2, 5, 48))
    cls, patch = head(x)
    assert cls.shape == (2, 128)
    assert patch.shape == (2, 4, 96)
    assert not head.last_layer2.weight_g.requires_grad
    assert small_ibot_head(norm_last_layer=False).last_layer2.weight_g.requires_grad
    torch.testing.assert_close(patch[:, 2], head.last_layer2(head.bottleneck(x[:, 3])))
    torch.testing.assert_close(cls, head(x[:, 0]))


def test_ibot_head_starts_as_dinos():
    """The same seed gives the same MLP and [CLS] prototypes in both heads, hence the same logits."""
    torch.manual_seed(3)
    dino = DINOHead(48, 128, hidden_dim=64, bottleneck_dim=32)
    torch.manual_seed(3)
    ibot = small_ibot_head()
    x = tensor(1, (3, 48))
    assert torch.equal(dino(x), ibot(x))


def test_batch_norm_takes_all_tokens_as_rows():
    """With norm="bn" the statistics are over images and tokens together."""
    head = small_ibot_head(norm="bn", act="relu")
    assert any(isinstance(m, nn.ReLU) for m in head.mlp)
    assert not any(isinstance(m, nn.GELU) for m in head.mlp)
    x = tensor(1, (2, 5, 48))
    cls, _ = head(x)
    torch.testing.assert_close(cls, head(x.flatten(0, 1)).unflatten(0, (2, 5))[:, 0])


@pytest.mark.parametrize(
    ("setting", "value"), [("norm", "ln"), ("norm", "none"), ("act", "silu"), ("act", None), ("last_norm", "bn")]
)
def test_what_ibot_head_does_not_offer(setting, value):
    """An unknown norm or activation is refused by name, with what there is."""
    with pytest.raises(ValueError, match=f"^{setting} {value!r} is not offered.*it takes"):
        small_ibot_head(**{setting: value})


def test_ibot_head_refuses_maps():
    """Only (B, D) and (B, 1 + P, D) have a meaning."""
    with pytest.raises(ValueError, match=r"\(2, 48, 3, 3\)"):
        small_ibot_head()(tensor(1, (2, 48, 3, 3)))
