"""SimPool forward and backward: the formula, one operation after the other, compared with sp.py.

    python -m benchmarks.simpool_layer [--rounds 9] [--device auto] [--matmul_precision highest]

For (64, 196, 384) tokens with gamma 1.25 and (64, 2048, 7, 7) maps with gamma 2. Prints median milliseconds of both
sides, run in turn, the ratio, the largest relative error of the gradients, and the peak memory of one pass.
"""

from __future__ import annotations

import argparse

import torch
from torch import Tensor, nn

from benchmarks.measure import peak_bytes, relative_error, timed_in_turn
from runtime.cli import parse_described
from runtime.distributed import choose_device
from runtime.guards import run_program
from runtime.terminal import say
from sp import SimPool

CASES = {"tokens 64 x 196 x 384": ((64, 196, 384), 1.25), "maps 64 x 2048 x 7 x 7": ((64, 2048, 7, 7), 2.0)}


class PlainSimPool(nn.Module):
    """The formula with keys for every position and autograd's own backward; shares the weights of a SimPool."""

    def __init__(self, pool: SimPool) -> None:
        super().__init__()
        self.norm_patches, self.wq, self.wk = pool.norm_patches, pool.wq, pool.wk
        self.scale, self.gamma = pool.scale, pool.gamma

    def forward(self, x: Tensor) -> Tensor:
        x = x if x.ndim == 3 else x.flatten(2).transpose(1, 2)
        normed = self.norm_patches(x)
        query, key = self.wq(x.mean(1, keepdim=True)), self.wk(normed)
        attention = (query @ key.transpose(1, 2) * self.scale).softmax(dim=-1)  # (B, 1, N)
        values = normed - normed.amin((1, 2), keepdim=True) + 1e-6
        return (attention @ values.pow(self.gamma)).pow(1 / self.gamma).squeeze(1)


def compare(shape: tuple[int, ...], gamma: float, rounds: int, device: torch.device) -> dict[str, float]:
    """Milliseconds and megabytes of both sides, and the worst relative error of output and gradients."""
    torch.manual_seed(0)
    pool = SimPool(shape[2] if len(shape) == 3 else shape[1], gamma=gamma).to(device)
    x = torch.randn(shape, device=device, requires_grad=True)
    slope = torch.randn(shape[0], pool.dim, device=device)
    inputs = [x, *pool.parameters()]
    sides = {"plain": PlainSimPool(pool), "ours": pool}

    def run(name: str) -> list[Tensor]:
        pooled = sides[name](x)
        return [pooled.detach(), *torch.autograd.grad(pooled, inputs, slope)]

    error = max(relative_error(a, b) for a, b in zip(run("ours"), run("plain"), strict=True))
    memory = {f"{name} MB": peak_bytes(lambda n=name: run(n), device) / 1e6 for name in sides}
    seconds = timed_in_turn({name: (lambda n=name: run(n)) for name in sides}, rounds)
    return {**{f"{name} ms": 1e3 * s for name, s in seconds.items()}, **memory, "error": error}


def get_args_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser("benchmarks.simpool_layer", add_help=False)
    parser.add_argument("--rounds", type=int, default=9, help="rounds, each running both sides in turn")
    parser.add_argument("--device", default="auto", help="auto, cuda, mps or cpu")
    parser.add_argument("--matmul_precision", default="highest", choices=["highest", "high", "medium"])
    return parser


def main(argv: list[str] | None = None) -> int:
    args = parse_described(get_args_parser(), __doc__, argv)
    torch.set_float32_matmul_precision(args.matmul_precision)
    device = choose_device(args.device)
    say("| input | plain ms | ours ms | ratio | plain MB | ours MB | gradients' error |\n|---|---|---|---|---|---|---|")
    for name, (shape, gamma) in CASES.items():
        row = compare(shape, gamma, args.rounds, device)
        say(
            f"| {name} | {row['plain ms']:.1f} | {row['ours ms']:.1f} | {row['plain ms'] / row['ours ms']:.2f}x "
            f"| {row['plain MB']:.0f} | {row['ours MB']:.0f} | {row['error']:.1e} |"
        )
    return 0


if __name__ == "__main__":
    run_program(main)
