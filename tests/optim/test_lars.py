"""LARS against the published numbers."""

from __future__ import annotations

from torch import nn

from optim.groups import get_params_groups
from optim.lars import LARS
from tests.reference import assert_close, fill_, golden, tensor


def test_lars_four_steps():
    """Four LARS steps equal the published code's."""
    g = golden("lars")
    model = fill_(nn.Linear(8, 6))
    groups = get_params_groups(model)
    groups[0]["weight_decay"] = g["weight_decay"]
    lars = LARS(groups, lr=g["lr"])
    for i, row in enumerate(g["steps"]):
        lars.zero_grad()
        model(tensor(7 + i, (5, 8))).pow(2).sum().backward()
        lars.step()
        assert_close(model.weight.detach(), row["weight"], 2e-5, f"weight after step {i}")
        assert_close(model.bias.detach(), row["bias"], 2e-5, f"bias after step {i}")
