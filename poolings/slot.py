"""Slot attention: a few slots compete for the positions.

Shape letters: B batch, N positions, D width, S slots.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from poolings.base import PoolingBase, flag, whole

ATTENTION_EPS = 1e-8  # a slot that wins no position still has weights to divide by their sum


class Slot(PoolingBase):
    """Maximum over slots that are refined by attention, a GRU and an MLP, three times.

        slots = mu + exp(logsigma) noise,  X' = LN(X),  K = Wk X' + bk,  V = Wv X' + bv
        a     = softmax over the slots of (Wq LN(slots) + bq) K^T / sqrt(D)
        a     = (a + 1e-8) / (its sum over the positions)
        slots = GRU(a V, slots),  slots += W2 relu(W1 LN(slots))
        u     = max over the slots

    Source: Locatello et al., "Object-Centric Learning with Slot Attention", NeurIPS 2020.
    Shapes: (B, N, D) or (B, D, H, W) -> (B, D); attention (B, 1, N): a of the last iteration, its mean over the slots,
    a distribution. Keys and values of all positions are never made: query and key maps are folded into one vector per
    slot, and V is projected after the weighted mean, which gives the same numbers.

    Noise tells the slots apart, as mu and sigma are common to all. In training it is drawn from torch's generator. In
    evaluation the published code draws too (`eval_noise=True`), so that one image has many features. By default there
    is none: features repeat, but then **the slots are all equal and the attention is uniform**. `eval_seed` lets
    features repeat and keeps the slots apart: the same S draws for every image.

    Args:
        dim: width D.
        slots: number S of slots.
        iterations: refinements.
        eval_noise: draw noise in evaluation as in training.
        eval_seed: seed of a noise that is the same in every evaluation and for every image; excludes eval_noise.
    """

    name = "slot"

    def __init__(
        self,
        dim: int,
        slots: int = 3,
        iterations: int = 3,
        eval_noise: bool = False,
        eval_seed: int | None = None,
    ) -> None:
        super().__init__(dim)
        self.slots = whole(self.name, "slots", slots)
        self.iterations = whole(self.name, "iterations", iterations)
        self.eval_noise = flag(self.name, "eval_noise", eval_noise)
        self.eval_seed = None if eval_seed is None else whole(self.name, "eval_seed", eval_seed, least=0)
        if eval_noise and eval_seed is not None:
            raise ValueError(f"{self.name}: eval_noise draws every time, eval_seed={eval_seed} only once; choose one")
        self.scale = dim**-0.5
        self.slots_mu = nn.Parameter(torch.randn(1, 1, dim))
        self.slots_logsigma = nn.Parameter(nn.init.xavier_uniform_(torch.empty(1, 1, dim)))
        self.to_q = nn.Linear(dim, dim)
        self.to_k = nn.Linear(dim, dim)
        self.to_v = nn.Linear(dim, dim)
        self.gru = nn.GRUCell(dim, dim)
        hidden = max(dim, 128)
        self.mlp = nn.Sequential(nn.Linear(dim, hidden), nn.ReLU(), nn.Linear(hidden, dim))
        self.norm_input = nn.LayerNorm(dim)
        self.norm_slots = nn.LayerNorm(dim)
        self.norm_pre_ff = nn.LayerNorm(dim)

    def pool(self, x: Tensor) -> tuple[Tensor, Tensor]:
        x = self.norm_input(x)
        slots = self._start(x)  # (B, S, D)
        for _ in range(self.iterations):
            attention = self._attend(slots, x)
            updates = self.to_v(attention @ x)  # a sums to 1, so the bias counts once
            slots = self.gru(updates.flatten(0, 1), slots.flatten(0, 1)).view_as(slots)
            slots = slots + self.mlp(self.norm_pre_ff(slots))
        return slots.amax(1), attention.mean(1, keepdim=True)

    def _attend(self, slots: Tensor, x: Tensor) -> Tensor:
        """(B, S, D) slots, (B, N, D) normed features -> (B, S, N), each slot's weights summing to 1."""
        query = self.scale * self.to_q(self.norm_slots(slots))
        folded = query @ self.to_k.weight  # (B, S, D)
        logits = folded @ x.transpose(1, 2) + (query @ self.to_k.bias).unsqueeze(-1)  # (B, S, N)
        attention = logits.softmax(dim=1) + ATTENTION_EPS
        return attention / attention.sum(-1, keepdim=True)

    def _start(self, x: Tensor) -> Tensor:
        """Slots before the first iteration (B, S, D)."""
        shape = (x.shape[0], self.slots, self.dim)
        if self.training or self.eval_noise:
            noise = torch.randn(shape, device=x.device, dtype=x.dtype)
        elif self.eval_seed is not None:
            generator = torch.Generator("cpu").manual_seed(self.eval_seed)  # on the CPU: alike on every device
            noise = torch.randn(shape[1:], generator=generator, device="cpu").to(x).expand(shape)
        else:
            noise = x.new_zeros(shape)
        return self.slots_mu + self.slots_logsigma.exp() * noise

    def extra_repr(self) -> str:
        noise = f"eval_noise={self.eval_noise}, eval_seed={self.eval_seed}"
        return f"dim={self.dim}, slots={self.slots}, iterations={self.iterations}, {noise}"
