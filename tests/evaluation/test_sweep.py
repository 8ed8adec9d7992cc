"""Training a sweep: the published optimisation, and which head is chosen."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F

from evaluation import sweep
from evaluation.forms import Form
from evaluation.linear import LinearClassifier, Probe, cosine_factor


class Pixels(torch.nn.Module):
    def forward(self, x):
        return F.adaptive_avg_pool2d(x, 2).flatten(1)


def loader(batches=5, count=16):
    generator = torch.Generator().manual_seed(0)
    return [
        (torch.randint(0, 256, (count, 3, 8, 8), generator=generator, dtype=torch.uint8), torch.arange(count) % 4)
        for _ in range(batches)
    ]


def test_an_epoch_is_torch_sgd_over_the_same_batches():
    """Three epochs under a scale per epoch end with the weights of SGD with momentum at these rates."""
    probe = Probe([12], [Form()], [0.8], 4, 16, torch.device("cpu"))
    head = LinearClassifier(12, 4)
    head.load_state_dict({k.removeprefix("module."): v for k, v in probe.classifier(0).items()})
    optimizer = torch.optim.SGD(head.parameters(), 0.8 * 16 / 256, momentum=0.9)
    scheduler = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, 3)
    for epoch in range(3):
        losses = sweep.train_epoch(Pixels(), probe, loader(), cosine_factor(epoch, 3), torch.device("cpu"), desc="test")
        theirs = []
        for images, target in loader():
            loss = F.cross_entropy(head(Pixels()(sweep.normalize(images))), target)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            theirs.append(loss.item())
        scheduler.step()
        assert losses == pytest.approx([sum(theirs) / len(theirs)], rel=1e-4)
    assert torch.allclose(probe.groups[0].weight[0], head.linear.weight, rtol=1e-3, atol=1e-5)


def test_the_best_head_is_the_one_of_the_selection_and_not_of_val(tmp_path):
    """Where the two disagree, the selection's numbers decide, over heads and over epochs."""
    probe = Probe([12], [Form()], [0.1, 1.0], 4, 16, torch.device("cpu"))
    record = sweep.Sweep(tmp_path, probe, {})
    val, selection = torch.tensor([[90.0, 99, 0.1], [10, 50, 2]]), torch.tensor([[20.0, 60, 2], [80, 95, 0.3]])
    record.validated(0, [1.0, 1.0], val, selection)
    assert (record.best["lr"], record.best["val_top1"]) == (1.0, 10.0)
    record.validated(1, [1.0, 1.0], val + 5, selection - 5)
    assert record.best["epoch"] == 0


def test_the_end_of_the_grid_is_named():
    """A best rate at either end comes with rates to try beyond it; one inside, or a single one, without."""
    assert "--lr 9 30" in sweep.end_of_grid(3.0, [0.1, 1.0, 3.0])
    assert "smallest" in sweep.end_of_grid(0.1, [0.1, 1.0, 3.0])
    assert sweep.end_of_grid(1.0, [0.1, 1.0, 3.0]) is None
    assert sweep.end_of_grid(3.0, [3.0, 3.0]) is None
