"""The heads of probes: each ends as it would alone, and follows the published optimisers."""

from __future__ import annotations

import copy

import pytest
import torch
import torch.nn.functional as F

from evaluation.forms import Form
from evaluation.probe_families import Grid
from evaluation.probe_inputs import Inputs
from evaluation.probe_names import NAMES, read_probes
from evaluation.probe_recipes import RECIPES
from evaluation.probes import Probes, Widths
from tests.reference import assert_close, tensor

CPU = torch.device("cpu")
ALL = ("linear", "ep:queries=8", "ep_all:queries=8", "simpool", "abmilp", "aim:heads=4", "cae:heads=4",
       "coca:queries=3", "vjepa:heads=4", "capi")  # fmt: skip
TWO_FORMS = (Form(1), Form(2))
LRS, WDS = [0.01, 0.3, 100.0], [0.0, 0.1]  # with the largest rate heads diverge


def probes(texts, lrs, wds, recipe="dino", forms=TWO_FORMS):
    forms = list(forms) if "linear" in texts else []
    widths = Widths([12 * (i + 1) for i in range(len(forms))], 64)
    return Probes(read_probes(texts), forms, widths, 5, Grid(lrs, wds, 256), RECIPES[recipe], CPU)


def batches(texts=ALL, steps=4, count=16):
    for step in range(steps):
        target = torch.randint(0, 5, (count,), generator=torch.Generator().manual_seed(step))
        tokens = tensor(step, (count, 1 + 9, 64)) + 2 * F.one_hot(target, 64)[:, None]
        features = [tensor(step, (count, 12)), tensor(step + 50, (count, 24))] if "linear" in texts else []
        yield Inputs(features, tokens[:, 1:].contiguous(), tokens), target


def trained(found, texts, scale=0.7):
    losses = [found.learn(inputs, target, scale) for inputs, target in batches(texts)]
    return torch.stack(losses)


def index_of(found, label, lr, wd):
    """The first head with these settings."""
    return next(i for i, h in enumerate(found.heads) if (h.probe, h.lr, h.wd) == (label, lr, wd))


@pytest.mark.parametrize("recipe", sorted(RECIPES))
def test_every_head_of_every_probe_ends_as_it_would_alone(recipe):
    """Bit for bit, next to neighbours that diverge; the published linear head to rounding, as its products are joint.

    A product of another shape may add up in another order, which leaves 2e-5 of the largest weight.
    """
    together = probes(ALL, LRS, WDS, recipe)
    together_losses = trained(together, ALL)
    for label in ALL:
        alone = probes([label], [0.3], [0.1], recipe)
        losses = trained(alone, [label])
        number = index_of(together, label, 0.3, 0.1)
        mine, theirs = together.content(number, {})["state_dict"], alone.content(0, {})["state_dict"]
        assert list(mine) == list(theirs)
        for name in mine:
            if label == "linear" and recipe == "dino":
                assert_close(mine[name], theirs[name])
            else:
                assert torch.equal(mine[name], theirs[name]), (label, name)
                assert torch.equal(together_losses[:, number], losses[:, 0])


def reference(module, recipe, lr, wd):
    """torch's optimiser of one head, with weight decay on what is no bias and has two dimensions or more."""
    used = [p for p in module.parameters() if p.requires_grad]
    groups = [{"params": [p for p in used if p.ndim > 1], "weight_decay": wd},
              {"params": [p for p in used if p.ndim == 1], "weight_decay": 0.0}]  # fmt: skip
    if recipe == "dino":
        return torch.optim.SGD(groups, lr, momentum=0.9)
    return torch.optim.AdamW(groups, lr, betas=(0.9, 0.95))


@pytest.mark.parametrize("recipe", ["dino", "capi"])
@pytest.mark.parametrize("label", [label for label in ALL if label != "linear"])
def test_a_head_follows_torchs_optimizer(label, recipe):
    """Four steps of SGD with momentum, or AdamW, at the peak rate times the scale, on the batch's mean loss.

    Adam divides by the gradient's size, so parameters without influence (a bias before BatchNorm) walk by rounding
    alone: its losses are compared, and SGD's parameters too.
    """
    found = probes([label], [0.02], [0.1], recipe)
    module = copy.deepcopy(found.families[0].modules[0]).train()
    optimizer = reference(module, recipe, 0.02 * 0.7, 0.1)
    for inputs, target in batches([label]):
        loss = F.cross_entropy(module(inputs.with_cls if label.startswith("ep_all") else inputs.patches), target)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        assert found.learn(inputs, target, 0.7).item() == pytest.approx(loss.item(), rel=1e-4)
    mine, theirs = found.families[0].modules[0].state_dict(), module.state_dict()
    if recipe == "dino":
        for name in mine:
            torch.testing.assert_close(mine[name], theirs[name], rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("recipe", sorted(RECIPES))
def test_saved_probes_continue_exactly(recipe):
    """Probes loaded from a saved state go on bit for bit; other rates and other probes are refused."""
    texts, steps = ("linear", "ep:queries=8", "aim:heads=4"), list(batches(("linear",)))
    whole, first, second = (probes(texts, [0.1, 1.0], [0.0, 0.1], recipe) for _ in range(3))
    for inputs, target in steps[:2]:
        first.learn(inputs, target, 1.0)
    second.load(copy.deepcopy(first.state()))
    for inputs, target in steps:
        whole.learn(inputs, target, 1.0)
    for inputs, target in steps[2:]:
        second.learn(inputs, target, 1.0)
    for i in range(len(whole.heads)):
        mine, theirs = whole.content(i, {})["state_dict"], second.content(i, {})["state_dict"]
        assert all(torch.equal(mine[name], theirs[name]) for name in mine)
    with pytest.raises(ValueError, match="learning rates"):
        probes(texts, [0.1, 2.0], [0.0, 0.1], recipe).load(first.state())
    with pytest.raises(ValueError, match="4 probes and forms, and this one 1"):
        probes(["ep:queries=8"], [0.1, 1.0], [0.0, 0.1], recipe).load(first.state())


def test_a_linear_head_with_batchnorm_is_saved_as_one_layer():
    """The folded layer gives the logits of BatchNorm and classifier, under the names that every evaluator reads."""
    found = probes(["linear"], [1.0], [0.0], "ep", [Form(1)])
    for inputs, target in batches():
        found.learn(inputs._replace(features=inputs.features[:1]), target, 1.0)
    state = found.content(0, {"made": "by"})
    weight, bias = state["state_dict"]["module.linear.weight"], state["state_dict"]["module.linear.bias"]
    x = next(batches())[0].features[0]
    assert_close(F.linear(x, weight, bias), found.families[0].modules[0].eval()(x))
    assert state["head"]["form"] == [1, False]
    assert state["config"] == {"made": "by"}


def test_heads_are_counted_apart_in_eval_mode():
    """Hits and losses are those of each head's logits in eval mode, where images do not depend on each other."""
    found = probes(ALL, [0.01, 0.3], [0.0])
    trained(found, ALL)
    inputs, target = next(batches())
    counts = found.count(inputs, target)
    one = sum(found.count(inputs.map(lambda x, i=i: x[i : i + 1]), target[i : i + 1]) for i in range(len(target)))
    assert counts.dtype == torch.float64
    assert_close(counts, one)
    number = index_of(found, "ep_all:queries=8", 0.3, 0.0)
    family = next(f for f in found.families if f.probe.label == "ep_all:queries=8")
    logits = family.modules[1].eval()(inputs.with_cls)
    assert counts[number, 0] == (logits.argmax(1) == target).sum()
    assert counts[number, 2].item() == pytest.approx(F.cross_entropy(logits, target, reduction="sum").item(), rel=1e-5)


def test_names_and_settings_tell_heads_apart():
    """Every head of a run has a different name, and its row in the log names its probe."""
    found = probes(ALL, LRS, WDS)
    assert len({head.name for head in found.heads}) == len(found.heads) == 11 * len(LRS) * len(WDS)
    assert found.heads[0].settings == {
        "probe": "linear", "n_last_blocks": 1, "avgpool_patchtokens": False, "lr": 0.01, "weight_decay": 0.0,
        "parameters": 65,
    }  # fmt: skip
    assert found.heads[-1].settings["probe"] == "capi"
    assert {name.name for name in found.names} == set(NAMES)
