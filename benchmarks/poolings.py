"""Forward and backward of every pooling operator, compared with gap and with timm's operator if it has one.

    python -m benchmarks.poolings [--rounds 5] [--device auto] [--operators gem cait ...]

At (64, 196, 384) tokens and at (64, 2048, 7, 7) maps. Printed are median milliseconds of all sides, run in turn, the
peak memory of one pass, and ratios to gap and to timm. timm's SE and CBAM are its gates followed by its mean, without a
residual, and its SimPool subtracts each channel's own minimum: near relatives, not the same numbers. (timm 1.0.31 has a
GatherExcite too, which can't be built.)
"""

from __future__ import annotations

import argparse

import torch
from torch import Tensor, nn

from benchmarks.measure import peak_bytes, timed_in_turn
from poolings.choose import POOLINGS, build_pooling
from runtime.cli import parse_described
from runtime.distributed import choose_device
from runtime.guards import run_program
from runtime.terminal import say

CASES = {"tokens 64 x 196 x 384": (64, 196, 384), "maps 64 x 2048 x 7 x 7": (64, 2048, 7, 7)}
TIMM_POOL_TYPES = {"gap": "avg", "max": "max", "avgmax": "avgmax"}


def timm_operator(name: str, shape: tuple[int, ...]) -> nn.Module | None:
    """timm's module for an operator at this input, None if it has none."""
    from timm import layers

    gamma, tokens = _gamma(shape), len(shape) == 3
    dim = _width(shape)
    if name == "simpool":
        return layers.SimPool1d(dim, gamma=gamma) if tokens else layers.SimPool2d(dim, gamma=gamma)
    if tokens:
        return _GlobalPool(TIMM_POOL_TYPES[name]) if name in TIMM_POOL_TYPES else None
    if name in TIMM_POOL_TYPES:
        return layers.SelectAdaptivePool2d(pool_type=TIMM_POOL_TYPES[name], flatten=True)
    gates = {
        "se": lambda: layers.SEModule(dim, rd_divisor=1),
        "cbam": lambda: layers.create_attn("cbam", dim, rd_divisor=1),
    }
    if name not in gates:
        return None
    return nn.Sequential(gates[name](), layers.SelectAdaptivePool2d(pool_type="avg", flatten=True))


class _GlobalPool(nn.Module):
    """timm's function for tokens as a module."""

    def __init__(self, pool_type: str) -> None:
        super().__init__()
        self.pool_type = pool_type

    def forward(self, x: Tensor) -> Tensor:
        from timm.layers import global_pool_nlc

        return global_pool_nlc(x, self.pool_type, num_prefix_tokens=0)


def _width(shape: tuple[int, ...]) -> int:
    return shape[2] if len(shape) == 3 else shape[1]


def _gamma(shape: tuple[int, ...]) -> float:
    return 1.25 if len(shape) == 3 else 2.0


def sides(names: list[str], shape: tuple[int, ...], device: torch.device) -> dict[str, nn.Module]:
    """Our operators by name, and timm's as `timm NAME`, in training mode."""
    torch.manual_seed(0)
    found: dict[str, nn.Module] = {}
    for name in names:
        found[name] = build_pooling(name, _width(shape), gamma=_gamma(shape) if name == "simpool" else None)
        theirs = timm_operator(name, shape)
        if theirs is not None:
            found[f"timm {name}"] = theirs
    return {name: module.to(device).train() for name, module in found.items()}


def measure(
    shape: tuple[int, ...], rounds: int, device: torch.device, names: list[str] | None = None
) -> dict[str, tuple[float, float]]:
    """Milliseconds and megabytes of one forward and backward pass of every side."""
    modules = sides(names or list(POOLINGS), shape, device)
    x = torch.randn(shape, device=device, requires_grad=True)

    def run(name: str) -> None:
        modules[name](x).sum().backward()
        x.grad = None
        modules[name].zero_grad()

    memory = {name: peak_bytes(lambda n=name: run(n), device) / 1e6 for name in modules}
    seconds = timed_in_turn({name: (lambda n=name: run(n)) for name in modules}, rounds)
    return {name: (1e3 * seconds[name], memory[name]) for name in modules}


def table(rows: dict[str, tuple[float, float]]) -> list[str]:
    """Lines of Markdown, one for each of our operators."""
    lines = ["| operator | ms | MB | time / gap's | timm ms | timm MB | timm's time / ours |", "|---" * 7 + "|"]
    for name in rows:
        if name.startswith("timm "):
            continue
        ms, megabytes = rows[name]
        line = f"| {name} | {ms:.1f} | {megabytes:.0f} | {ms / rows['gap'][0]:.1f}x |"
        theirs = rows.get(f"timm {name}")
        lines.append(line + (f" {theirs[0]:.1f} | {theirs[1]:.0f} | {theirs[0] / ms:.2f}x |" if theirs else " | | |"))
    return lines


def get_args_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser("benchmarks.poolings", add_help=False)
    parser.add_argument("--rounds", type=int, default=5, help="rounds, each running all sides in turn")
    parser.add_argument("--device", default="auto", help="auto, cuda, mps or cpu")
    parser.add_argument(
        "--operators", nargs="+", choices=list(POOLINGS), default=list(POOLINGS), help="which to run; gap always runs"
    )
    return parser


def main(argv: list[str] | None = None) -> int:
    args = parse_described(get_args_parser(), __doc__, argv)
    device = choose_device(args.device)
    names = list(dict.fromkeys(["gap", *args.operators]))
    for title, shape in CASES.items():
        say(f"{title}:\n\n" + "\n".join(table(measure(shape, args.rounds, device, names))))
    return 0


if __name__ == "__main__":
    run_program(main)
