"""DINO's own functions for one linear head: `train` and `validate_network` of its eval_linear."""

from __future__ import annotations

from collections.abc import Iterable

import torch
import torch.nn.functional as F
from torch import nn

from evaluation.forms import Form, probe_features
from evaluation.knn import accuracy
from runtime.meters import MetricLogger


def train(
    model: nn.Module,
    linear_classifier: nn.Module,
    optimizer: torch.optim.Optimizer,
    loader: Iterable,
    epoch: int,
    n: int,
    avgpool: bool,
) -> dict[str, float]:
    """One epoch of one head with a torch optimiser (DINO's function): {"lr", "loss"}, means over the ranks."""
    device = next(model.parameters()).device
    linear_classifier.train()
    metric_logger = MetricLogger(delimiter="  ")
    for images, target in metric_logger.log_every(loader, 20, f"Epoch: [{epoch}]"):
        with torch.no_grad():
            output = probe_features(model, images.to(device, non_blocking=True), [Form(n, bool(avgpool))])[0]
        loss = F.cross_entropy(linear_classifier(output), target.to(device, non_blocking=True))
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        metric_logger.update(loss=loss.item(), lr=optimizer.param_groups[0]["lr"])
    metric_logger.synchronize_between_processes()
    return {name: meter.global_avg for name, meter in metric_logger.meters.items()}


@torch.no_grad()
def validate_network(
    val_loader: Iterable, model: nn.Module, linear_classifier: nn.Module, n: int, avgpool: bool
) -> dict[str, float]:
    """Validate one head (DINO's function): {"loss", "acc1", "acc5"}, in percent, means over the ranks."""
    device = next(model.parameters()).device
    linear_classifier.eval()
    metric_logger = MetricLogger(delimiter="  ")
    for images, target in metric_logger.log_every(val_loader, 20, "Test:"):
        images, target = images.to(device, non_blocking=True), target.to(device, non_blocking=True)
        output = linear_classifier(probe_features(model, images, [Form(n, bool(avgpool))])[0])
        acc1, acc5 = accuracy(output, target, topk=(1, 5))
        metric_logger.update(loss=F.cross_entropy(output, target).item())
        metric_logger.meters["acc1"].update(acc1.item(), n=len(images))
        metric_logger.meters["acc5"].update(acc5.item(), n=len(images))
    metric_logger.synchronize_between_processes()
    return {name: meter.global_avg for name, meter in metric_logger.meters.items()}
