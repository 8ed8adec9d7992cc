"""The operators on plain timm models, as someone else's project would use them."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from poolings.choose import OPERATORS, build_pooling
from tests.reference import tensor

ROOT = Path(__file__).resolve().parents[2]
SETTINGS = {"how": {"width": 24}, "simpool": {"gamma": 2.0}, "capi": {"classes": 10}}


@pytest.mark.parametrize("name", OPERATORS)
def test_a_step_on_tokens_and_maps_of_timm(name):
    """Features of timm's models, tokens and maps, are pooled and trained; the model's own code is untouched."""
    timm = pytest.importorskip("timm")
    models = {"tokens": timm.create_model("test_vit", num_classes=0, img_size=64),
              "map": timm.create_model("test_resnet", num_classes=0, global_pool="")}  # fmt: skip
    x = tensor(1, (2, 3, 64, 64))
    for kind, model in models.items():
        if name == "capi" and model.num_features % 64:
            continue  # its heads are 64 wide
        pool = build_pooling(name, model.num_features, **SETTINGS.get(name, {}))
        features = model.forward_features(x)[:, model.num_prefix_tokens :] if kind == "tokens" else model(x)
        optimizer = torch.optim.SGD([*model.parameters(), *pool.parameters()], lr=0.01)
        trained = [p for p in pool.parameters() if p.requires_grad]
        before = [p.detach().clone() for p in trained]
        pooled = pool(features)
        assert pooled.shape == (2, pool.num_features)
        (pooled * tensor(2, pooled.shape)).sum().backward()
        optimizer.step()
        assert all(p.grad is not None and p.grad.isfinite().all() for p in trained)
        assert any(not torch.equal(p, old) for p, old in zip(trained, before, strict=True)) == bool(before)
        assert any(p.grad is not None and p.grad.any() for p in model.parameters())


def test_the_documented_example_runs_next_to_a_copy(tmp_path):
    """The code of docs/poolings.md works in a folder that holds only poolings/ and sp.py."""
    pytest.importorskip("timm")
    shutil.copytree(ROOT / "poolings", tmp_path / "poolings")
    shutil.copy(ROOT / "sp.py", tmp_path)
    section = (ROOT / "docs" / "poolings.md").read_text().partition("## In a model of your own")[2]
    code = re.search(r"```python\n(.*?)```", section, re.DOTALL)[1]
    check = "\nassert feature.shape == (2, resnet.num_features) and heat.shape[:2] == (2, 1), heat.shape\n"
    environment = {key: value for key, value in os.environ.items() if key != "PYTHONPATH"}
    done = subprocess.run(
        [sys.executable, "-c", code + check], cwd=tmp_path, env=environment, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
