"""The projection heads of DINO and iBOT: an MLP, L2 normalisation, and a weight-normalised layer of K prototypes.

Follows "Emerging Properties in Self-Supervised Vision Transformers" (ICCV 2021), with the parameter names of its
checkpoints: `mlp.*`, `last_layer.weight_g`, `last_layer.weight_v`. torch's current weight normalisation names the last
two differently, and its older one cannot be deep-copied, hence our own layer. iBOT ("Image BERT Pre-Training with
Online Tokenizer", ICLR 2022) adds the patches' prototypes, `last_layer2.*`.

The bottleneck is normalised in float32 under autocast too, because float16 loses small norms.

Shape letters: N rows (views times images), K prototypes. In iBOTHead: B rows, P patches, K2 prototypes of patches.
"""

from __future__ import annotations

import itertools
import math

import torch
from torch import Tensor, nn
from torch.nn import functional as F

ACTIVATIONS = {"gelu": nn.GELU, "relu": nn.ReLU}


class WeightNormLinear(nn.Module):
    """Linear layer without bias whose rows are g · v / |v|, with v the parameter weight_v and g weight_g.

    Args:
        in_features, out_features: widths.
        train_scale: whether the row norms weight_g (K, 1) are trained; they start at 1, and stay there if not.
    """

    def __init__(self, in_features: int, out_features: int, train_scale: bool = False) -> None:
        super().__init__()
        self.in_features = in_features
        self.out_features = out_features
        self.weight_g = nn.Parameter(torch.ones(out_features, 1), requires_grad=train_scale)
        self.weight_v = nn.Parameter(torch.empty(out_features, in_features))
        nn.init.kaiming_uniform_(self.weight_v, a=math.sqrt(5))
        self.register_load_state_dict_pre_hook(_rename_parametrized)

    @property
    def weight(self) -> Tensor:
        """The effective weight (K, in_features)."""
        return torch._weight_norm(self.weight_v, self.weight_g, 0)

    def forward(self, x: Tensor) -> Tensor:
        """(N, in_features) -> (N, K)"""
        return F.linear(x, self.weight)

    def extra_repr(self) -> str:
        return f"in_features={self.in_features}, out_features={self.out_features}"


def _rename_parametrized(module, state_dict, prefix, *_) -> None:
    """Let checkpoints written with torch.nn.utils.parametrizations.weight_norm load too."""
    for new, old in (("original0", "weight_g"), ("original1", "weight_v")):
        key = f"{prefix}parametrizations.weight.{new}"
        if key in state_dict:
            state_dict[prefix + old] = state_dict.pop(key)


class DINOHead(nn.Module):
    """Features (N, in_dim) to prototype logits (N, out_dim).

    Args:
        in_dim: width of the backbone's feature.
        out_dim: K, the number of prototypes.
        use_bn: BatchNorm before each activation.
        norm_last_layer: keep the prototypes at norm 1 (weight_g frozen).
        nlayers: linear layers of the MLP, at least 1.
        hidden_dim, bottleneck_dim: widths inside the MLP, and of its output, which the prototypes take.
        activation: DINO's is GELU.
    """

    def __init__(
        self,
        in_dim: int,
        out_dim: int,
        use_bn: bool = False,
        norm_last_layer: bool = True,
        nlayers: int = 3,
        hidden_dim: int = 2048,
        bottleneck_dim: int = 256,
        activation: type[nn.Module] = nn.GELU,
    ) -> None:
        super().__init__()
        self.mlp = _mlp(in_dim, hidden_dim, bottleneck_dim, max(1, nlayers), use_bn, activation)
        self.mlp.apply(_init_linear)
        self.last_layer = WeightNormLinear(bottleneck_dim, out_dim, train_scale=not norm_last_layer)

    def bottleneck(self, x: Tensor) -> Tensor:
        """The prototypes' input: unit vectors (N, bottleneck_dim), in float32 even under autocast."""
        x = self.mlp(x)
        # Autocast lowers neither of these operations again.
        return F.normalize(x.float() if x.dtype in (torch.float16, torch.bfloat16) else x, dim=-1)

    def forward(self, x: Tensor) -> Tensor:
        """Logits (N, K)."""
        return self.last_layer(self.bottleneck(x))


class iBOTHead(DINOHead):
    """DINO's head with logits for patches too: one MLP, and prototypes for [CLS] and for patches.

    Args:
        in_dim, out_dim, norm_last_layer, nlayers, hidden_dim, bottleneck_dim: as DINOHead's.
        patch_out_dim: K2, the number of the patches' prototypes; not used with shared_head.
        norm: None, or "bn" for BatchNorm before each activation, over all rows and tokens together.
        act: "gelu" or "relu".
        last_norm: None; a norm of the logits is not offered.
        shared_head: patches have the prototypes of [CLS]: `last_layer2` is `last_layer`, and K2 is K. Both names are in
            the state dict; in loading, the values of `last_layer2` win.

    Raises:
        ValueError: for a norm, act or last_norm that is not offered.
    """

    def __init__(
        self,
        in_dim: int,
        out_dim: int,
        patch_out_dim: int = 8192,
        norm: str | None = None,
        act: str = "gelu",
        last_norm: str | None = None,
        nlayers: int = 3,
        hidden_dim: int = 2048,
        bottleneck_dim: int = 256,
        norm_last_layer: bool = True,
        shared_head: bool = False,
    ) -> None:
        for name, value, offered in (
            ("norm", norm, (None, "bn")),
            ("act", act, tuple(ACTIVATIONS)),
            ("last_norm", last_norm, (None,)),
        ):
            if value not in offered:
                listed = " or ".join(repr(choice) for choice in offered)
                raise ValueError(f"{name} {value!r} is not offered by iBOTHead; it takes {listed}")
        super().__init__(
            in_dim, out_dim, norm == "bn", norm_last_layer, nlayers, hidden_dim, bottleneck_dim, ACTIVATIONS[act]
        )
        self.shared_head, self.has_batchnorm = shared_head, norm == "bn"
        self.last_layer2 = self.last_layer
        if not shared_head:
            trained = self.last_layer.weight_g.requires_grad
            self.last_layer2 = WeightNormLinear(bottleneck_dim, patch_out_dim, train_scale=trained)

    def forward(
        self, x: Tensor, patches: Tensor | None = None, chosen: Tensor | None = None, all_patches: bool = False
    ) -> Tensor | tuple[Tensor, ...]:
        """[CLS] alone (B, D) -> (B, K); with patches (B, 1 + P, D) -> (B, K) and (B, P, K2).

        A training step gives the patches apart, (G, P, D), with the int64 indices (M,) into their G·P rows whose logits
        it wants, and gets (B, K) and (M, K2). With `all_patches` also the logits' mean over the P patches, summed over
        the G crops, (K2,) in float32: what `center2` is updated with. Logits are linear in the bottleneck, so the
        mean of the bottlenecks gives it without the G·P rows of logits.

        Raises ValueError for any other number of dimensions.
        """
        if patches is not None:
            return self._with_chosen(x, patches, chosen, all_patches)
        if x.ndim == 2:
            return super().forward(x)
        if x.ndim != 3:
            raise ValueError(f"input has shape {tuple(x.shape)}; iBOTHead takes (B, D), or (B, 1 + P, D) with patches")
        # BatchNorm takes rows.
        x = self.bottleneck(x.flatten(0, 1)).unflatten(0, x.shape[:2])
        return self.last_layer(x[:, 0]), self.last_layer2(x[:, 1:])

    def _with_chosen(self, x: Tensor, patches: Tensor, chosen: Tensor, all_patches: bool) -> tuple[Tensor, ...]:
        rows = patches.flatten(0, 1)
        every = all_patches or self.has_batchnorm  # whose statistics are those of all rows
        rows = self.bottleneck(torch.cat((x, rows if every else rows.index_select(0, chosen))))
        cls, rows = rows.split([len(x), len(rows) - len(x)])
        logits = self.last_layer(cls), self.last_layer2(rows.index_select(0, chosen) if every else rows)
        if not all_patches:
            return logits
        with torch.autocast(x.device.type, enabled=False):
            return *logits, self.last_layer2(rows.unflatten(0, patches.shape[:2]).mean(dim=1).sum(dim=0))


def _mlp(
    in_dim: int, hidden_dim: int, out_dim: int, layers: int, use_bn: bool, activation: type[nn.Module]
) -> nn.Module:
    if layers == 1:
        return nn.Linear(in_dim, out_dim)
    widths = [in_dim] + [hidden_dim] * (layers - 1)
    modules: list[nn.Module] = []
    for before, after in itertools.pairwise(widths):
        modules += [nn.Linear(before, after), *([nn.BatchNorm1d(after)] if use_bn else []), activation()]
    return nn.Sequential(*modules, nn.Linear(hidden_dim, out_dim))


def _init_linear(module: nn.Module) -> None:
    if isinstance(module, nn.Linear):
        nn.init.trunc_normal_(module.weight, std=0.02)
        nn.init.zeros_(module.bias)
