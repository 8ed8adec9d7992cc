"""A probe as a module: its formula, its size, its start and its file."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from evaluation.probe_heads import SharedBatchNorm1d, build_head, is_attentive, read_attentive
from evaluation.probe_names import NAMES, read_probes
from poolings.choose import build_pooling
from runtime.guards import InputError
from tests.reference import assert_close, tensor


def head(text: str, dim: int = 64, classes: int = 5, seed: int = 0):
    (probe,) = read_probes([text])
    return build_head(probe, dim, classes, seed)


def test_published_parameter_counts():
    """EP with its classifier of 1000 at D = 768 has 1,383,400 parameters, capi 1,950,952; a linear probe 769,000."""
    with torch.device("meta"):
        counts = {name: head(name, 768, 1000).parameter_count() for name in NAMES}
    pools = {"ep": 614400, "ep_all": 614400, "abmilp": 591361, "aim": 1180416, "cae": 2366976, "coca": 1036032,
             "vjepa": 7088640}  # fmt: skip
    assert counts["ep"] == 1383400
    assert counts["capi"] == 1950952
    assert counts["linear"] == 769000
    assert {name: counts[name] - 769000 for name in pools} == pools


@pytest.mark.parametrize("name", [n for n in NAMES if n not in ("linear", "capi")])
def test_logits_are_linear_of_batchnorm_of_the_pooling(name):
    """In training the batch's own statistics normalise (eps 1e-6, no affine map), in evaluation the running ones."""
    module, x = head(name), tensor(0, (6, 9, 64))
    module.linear.bias.data.uniform_(-1, 1)
    pool = build_pooling(name, 64)
    pool.load_state_dict(module.pool.state_dict())
    pooled = pool(x)
    mean, variance = pooled.mean(0), pooled.var(0, unbiased=False)
    expected = (pooled - mean) / (variance + 1e-6).sqrt() @ module.linear.weight.T + module.linear.bias
    assert_close(module.train()(x), expected)
    module.eval()
    module.norm.running_mean.fill_(0.5)
    module.norm.running_var.fill_(4.0)
    pool.eval().load_state_dict(module.pool.state_dict())
    expected = (pool(x) - 0.5) / (4 + 1e-6) ** 0.5 @ module.linear.weight.T + module.linear.bias
    assert_close(module(x), expected)


def test_capi_has_no_batchnorm():
    """capi's logits are its pooling's, whatever the batch."""
    module, x = head("capi"), tensor(0, (6, 9, 64))
    assert not any(isinstance(m, nn.BatchNorm1d) for m in module.modules())
    assert torch.equal(module.train()(x), module.pool(x))
    assert module(x).shape == (6, 5)


def test_the_start_depends_on_the_seed_alone():
    """The same seed gives the same head whatever was drawn before, another seed another, and the draws go on."""
    first = head("vjepa", seed=3).state_dict()
    torch.manual_seed(99)
    before = torch.get_rng_state()
    again = head("vjepa", seed=3).state_dict()
    assert torch.equal(torch.get_rng_state(), before)
    assert all(torch.equal(first[name], again[name]) for name in first)
    assert not torch.equal(first["linear.weight"], head("vjepa", seed=4).state_dict()["linear.weight"])
    assert first["linear.weight"].std().item() == pytest.approx(0.01, rel=0.2)  # of 320 draws: 4 % is one deviation


@pytest.mark.parametrize("name", [n for n in NAMES if n != "linear"])
def test_attention_of_every_query_is_a_distribution(name):
    """Weights over the tokens are not negative and sum to 1."""
    attention = head(name).eval().attention(tensor(0, (2, 9, 64)))
    assert attention.shape[0] == 2
    assert attention.shape[2] == 9
    assert (attention >= 0).all()
    assert_close(attention.sum(2), torch.ones_like(attention[..., 0]))


def content(**changes):
    module = head("ep:queries=8")
    state = {f"module.{name}": value for name, value in module.state_dict().items()}
    about = {"label": "ep:queries=8", "probe": "ep", "settings": {"queries": 8}, "dim": 64, "classes": 5, **changes}
    return module, {"state_dict": state, "head": about}


def test_a_saved_head_is_the_head():
    """Read from its file, a head gives the logits that it gave."""
    module, saved = content()
    assert is_attentive(saved)
    assert not is_attentive({"head": {"form": [1, False]}})
    name, again = read_attentive(saved, "file")
    x = tensor(0, (3, 9, 64))
    assert name.label == "ep:queries=8"
    assert torch.equal(again(x), module.eval()(x))


@pytest.mark.parametrize("changes", [{"dim": 128}, {"classes": 10**9}, {"probe": "none"}, {"settings": {"x": 1}}])
def test_a_file_that_does_not_fit_its_description_is_refused(changes):
    """A description of other shapes, however large, costs a line and no memory."""
    with pytest.raises(InputError, match="file holds no attentive probe"):
        read_attentive(content(**changes)[1], "file")


def test_aims_batchnorm_alone_is_torchs():
    """With one rank, the BatchNorm over all ranks' tokens is torch's, bit for bit."""
    mine, theirs, x = SharedBatchNorm1d(4, affine=False), nn.BatchNorm1d(4, affine=False), tensor(0, (20, 4))
    assert torch.equal(mine(x), theirs(x))
    assert torch.equal(mine.running_var, theirs.running_var)
