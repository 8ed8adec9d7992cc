"""A probe as a module: a pooling of frozen tokens, and the classifier that is trained with it.

    logits = Linear(BatchNorm1d(pool(X)))       BatchNorm without an affine map, eps 1e-6

In these protocols a linear probe is the same without the pooling. capi's pooling includes its classifier, without a
BatchNorm. See "Attention, Please! Revisiting Attentive Probing Through the Lens of Efficiency" (ICLR 2026).

Letters: B images of the global batch, b images of one rank, N tokens, D their width, C classes.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from evaluation.probe_names import ProbeName
from evaluation.ranks import with_other_ranks
from runtime.distributed import get_world_size
from runtime.guards import InputError

NORM_EPS = 1e-6
CLASSIFIER_STD = 0.01


class ProbeHead(nn.Module):
    """A pooling (None for a linear probe, whose features are pooled already), BatchNorm and classifier.

    In training each rank pools its part of the batch; BatchNorm and classifier see the whole batch on every rank.
    """

    def __init__(self, pool: nn.Module | None, width: int, num_classes: int, has_classifier: bool = False) -> None:
        """has_classifier: the pooling's result is logits."""
        super().__init__()
        self.pool, self.num_classes = pool, num_classes
        self.norm = self.linear = None
        if not has_classifier:
            self.norm = nn.BatchNorm1d(width, affine=False, eps=NORM_EPS)
            self.linear = nn.Linear(width, num_classes)
            nn.init.normal_(self.linear.weight, std=CLASSIFIER_STD)
            nn.init.zeros_(self.linear.bias)

    def forward(self, x: Tensor) -> Tensor:
        """(B, D) features, or (b, N, D) tokens of this rank -> logits (B, C); in eval mode of the given images."""
        if self.pool is not None:
            x = self.pool(x)
            x = with_other_ranks(x) if self.training else x
        return x if self.linear is None else self.linear(self.norm(x))

    def attention(self, tokens: Tensor) -> Tensor:
        """(B, N, D) -> where each query looks, (B, queries, N); over the tokens it sums to 1."""
        return self.pool(tokens, return_attention=True)[1]

    def parameter_count(self) -> int:
        """Number of parameters, frozen ones included."""
        return sum(p.numel() for p in self.parameters())


def build_head(probe: ProbeName, dim: int, num_classes: int, seed: int = 0) -> ProbeHead:
    """A newly initialised head; its random numbers depend only on the seed.

    dim: width of the tokens, or of a linear probe's features. Raises InputError if the width does not suit the probe.
    """
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        if not probe.is_attentive:
            return ProbeHead(None, dim, num_classes)
        pool = probe.build(dim, num_classes)
        _share_statistics(pool)
        return ProbeHead(pool, pool.num_features, num_classes, has_classifier=probe.name == "capi")


def is_attentive(content: Mapping[str, Any]) -> bool:
    """Whether a file's content is an attentive head of ours."""
    return isinstance(content.get("head"), Mapping) and "probe" in content["head"]


def read_attentive(content: Mapping[str, Any], where: str) -> tuple[ProbeName, ProbeHead]:
    """An attentive head from a file's content, in eval mode. Raises InputError for one that can't be built."""
    head = content["head"]
    try:
        name = ProbeName(str(head["label"]), str(head["probe"]), dict(head["settings"]))
        with torch.device("meta"):  # a small file can name a head of any size
            module = build_head(name, head["dim"], head["classes"])
        weights = {key.removeprefix("module."): value for key, value in content["state_dict"].items()}
        module.load_state_dict(weights, assign=True)
    except (KeyError, TypeError, ValueError, RuntimeError, AttributeError) as error:
        raise InputError(f"{where} holds no attentive probe that can be built: {error}") from error
    return name, module.eval()


class SharedBatchNorm1d(nn.BatchNorm1d):
    """BatchNorm of frozen features, which have no gradient, by the statistics of all ranks' batches."""

    def forward(self, x: Tensor) -> Tensor:
        if not self.training or get_world_size() == 1:
            return super().forward(x)
        with torch.no_grad():
            mean = _sum_over_ranks(x.sum(0)) / (count := len(x) * get_world_size())
            variance = _sum_over_ranks((x - mean).square().sum(0)) / count
            self.num_batches_tracked += 1
            self.running_mean.lerp_(mean, self.momentum)
            self.running_var.lerp_(variance * (count / (count - 1)), self.momentum)
            return (x - mean) * (variance + self.eps).rsqrt()


def _share_statistics(pool: nn.Module) -> None:
    """Let a pooling's own BatchNorm (aim's) see the batches of all ranks."""
    for name, child in pool.named_children():
        if isinstance(child, nn.BatchNorm1d):
            shared = SharedBatchNorm1d(child.num_features, eps=child.eps, momentum=child.momentum, affine=False)
            setattr(pool, name, shared)


def _sum_over_ranks(total: Tensor) -> Tensor:
    dist.all_reduce(total)
    return total
