"""Pictures of probes: accuracy over the learning rate, and where their queries look.

Letters: B images, C channels, N tokens, h x w patches or positions.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from data.loader import normalize
from evaluation.attention_figure import figure_of_maps
from evaluation.features import eval_mode
from evaluation.plots import COLOURS, new_figure
from evaluation.probe_heads import ProbeHead
from evaluation.probe_inputs import extract_inputs, grid_of
from evaluation.probe_names import ProbeName
from runtime.checkpoint import write_atomic

QUERY_SIDE = 112  # pixels of a picture, if there is one for each query
MOST_QUERIES = 32  # that are drawn one by one


def plot_probes(rows: Sequence[Mapping[str, Any]], best_of: Mapping[str, Mapping[str, Any]], path: Path) -> None:
    """Accuracy on val over the learning rate: per probe its best head at each rate, and a star on the chosen one."""
    figure, axis = new_figure(7.6, 3.6, "constrained")
    for i, (label, best) in enumerate(best_of.items()):
        colour, line = COLOURS[i % len(COLOURS)], ("-", "--", ":")[i // len(COLOURS) % 3]
        mine = [row for row in rows if row["probe"] == label]
        rates = sorted({row["lr"] for row in mine})
        tops = [max(row["val_top1"] for row in mine if row["lr"] == rate) for rate in rates]
        axis.plot(rates, tops, "o" + line, color=colour, markersize=4, label=label)
        axis.plot(best["lr"], best["val_top1"], "*", color=colour, markersize=11, markeredgecolor="black", zorder=5)
    axis.set(xscale="log", xlabel="base learning rate", ylabel="val top-1 (%)", title="Probes (star: the chosen head)")
    axis.legend(frameon=False, fontsize=8, loc="center left", bbox_to_anchor=(1.0, 0.5))
    write_atomic(path, lambda temporary: figure.savefig(temporary, dpi=150, format="png"))


@torch.no_grad()
def probe_maps(
    model: nn.Module, images: Tensor, named: Mapping[str, tuple[ProbeName, ProbeHead]], batch_size: int = 8
) -> dict[str, Tensor]:
    """Where the queries of each probe look: uint8 (B, C, H, W) -> (B, queries, h, w) on the CPU, each map of sum 1.

    Weights on [CLS] are left out, and the others divided by their sum. Raises ValueError if the tokens form no grid.
    """
    device, names = next(model.parameters()).device, [name for name, _ in named.values()]
    found: dict[str, list[Tensor]] = {label: [] for label in named}
    with eval_mode(model):
        grid = grid_of(model, normalize(images[:1].to(device)))
        for start in range(0, len(images), batch_size):
            batch = normalize(images[start : start + batch_size].to(device))
            inputs = extract_inputs(model, batch, [], names)
            for label, (name, head) in named.items():
                attention = head.eval().to(device).attention(inputs.of(name).float())
                attention = attention[..., -grid[0] * grid[1] :].float().cpu()
                attention = attention / attention.sum(-1, keepdim=True).clamp_min(1e-12)
                found[label].append(attention.unflatten(-1, grid))
    return {label: torch.cat(parts) for label, parts in found.items()}


def draw_probe_maps(
    model: nn.Module, images: Tensor, named: Mapping[str, tuple[ProbeName, ProbeHead]], folder: Path
) -> list[Path]:
    """Write folder/probes.png, which compares the probes, and a NAME.png per probe with a column for each query.

    named: name and head of each probe under the title to print. Returns the paths.
    """
    folder.mkdir(parents=True, exist_ok=True)
    maps = probe_maps(model, images, named)
    paths = [figure_of_maps(maps, images, folder / "probes.png")]
    for label, of_queries in maps.items():
        if of_queries.shape[1] > 1:
            kind = "queries" if named[label][0].name in ("ep", "ep_all") else "heads"
            shown = {f"{label}: {of_queries.shape[1]} {kind}": of_queries[:, :MOST_QUERIES]}
            path = folder / f"{named[label][0].file_name}.png"
            side = max(QUERY_SIDE, min(images.shape[-2:]))
            paths.append(figure_of_maps(shown, images, path, per_head=True, side=side))
    return paths
